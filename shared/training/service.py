"""Training batches that a data service makes (`cornucopia data-service`), in the order in which they are learned from.

The service gives each step to whichever of its workers asks first (ShardingPolicy.DYNAMIC), so batches come out of
order. Each carries its step, and is put back in its place here: training reads the batches that it would make itself,
one by one, so determinism and exact resume hold as without a service. A step that went down with its worker, which the
service does not make again, is made here.

Where many processes train, each step's batch is made once and cut: TensorFlow's coordinated reads give each process its
part of the same step.
"""

import contextlib
import inspect
import itertools
import queue
import threading
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from shared import data_service
from shared.data import Splits
from shared.run import Config, say
from shared.training import workers

AHEAD = 64  # batches that may have come while an earlier one has not; then it is taken for lost
PATIENCE = 20.0  # seconds without a batch after which the service is looked at


class Reader:
    """Reads a stream from `config.data_service`.

    Raises:
        ValueError: the stream cannot be made elsewhere.
    """

    def __init__(self, config: Config, splits: Splits, devices: tf.distribute.Strategy):
        if "numbered" not in inspect.signature(splits.stream).parameters:
            raise ValueError("this task makes its examples as it learns, so no --data-service can; leave it out")
        self._address, self._name = config.data_service, config.name
        self._splits, self._devices = splits, devices
        self._index, self._of = (workers.index(), workers.count()) if workers.many(devices) else (0, 1)
        self._problem: Exception | None = None

    def stream(self, step: int) -> tf.data.Dataset:
        """The batches from that step on; of many processes, this one's part of each."""
        options = tf.data.Options()
        options.experimental_external_state_policy = tf.data.experimental.ExternalStatePolicy.FAIL
        numbered = self._splits.stream(step, numbered=True).with_options(options)
        sharing = {}
        if self._of > 1:
            numbered = numbered.flat_map(self._parts)
            # A name that no earlier run had: TensorFlow would go on with that one's batches.
            job = f"{self._name}-{step}-{workers.lot(self._devices)}"
            sharing = {"job_name": job, "consumer_index": self._index, "num_consumers": self._of}
        service = tf.data.experimental.service
        try:
            made = numbered.apply(service.distribute(service.ShardingPolicy.DYNAMIC, self._address, **sharing))
        except (tf.errors.OpError, ValueError) as error:
            raise ValueError(
                f"these training examples cannot be sent to a data service ({str(error).splitlines()[0]}): they must "
                f"be read by TensorFlow's own operations, from memory, and be less than 2 GB; leave out --data-service"
            ) from error
        spec = made.element_spec[1]
        return tf.data.Dataset.from_generator(lambda: self._in_order(made, step), output_signature=spec).prefetch(2)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """While this block lasts, what goes wrong with the service is raised as itself, not as TensorFlow's error."""
        try:
            yield
        except tf.errors.OpError:
            if self._problem:
                raise self._problem from None
            raise

    def _parts(self, at: tf.Tensor, batch: Any) -> tf.data.Dataset:
        whole = tf.data.Dataset.from_tensors(batch)
        cut = workers.in_parts(whole, first=0, count=self._of)
        return cut.map(lambda *part: (at, part))

    def _in_order(self, made: tf.data.Dataset, step: int) -> Iterator[Any]:
        arrived: queue.Queue = queue.Queue(2)
        ended = threading.Event()

        def fetch():
            try:
                for element in made:
                    arrived.put(element)
                    if ended.is_set():
                        return
            except Exception as error:  # goes on in the thread that trains
                arrived.put(error)

        # A thread of its own, for nothing can end its wait for a service that is gone.
        threading.Thread(target=fetch, daemon=True).start()
        waiting = {}
        try:
            for at in itertools.count(step):
                while at not in waiting and len(waiting) < AHEAD:
                    number, batch = self._next(arrived)
                    if number >= at:
                        waiting[int(number)] = batch
                if at not in waiting:
                    say("service", f"step {at} was lost with its worker, and is made here")
                    waiting[at] = self._made_here(at)
                yield waiting.pop(at)
        except Exception as error:
            self._problem = error
            raise
        finally:
            ended.set()
            with contextlib.suppress(queue.Empty):
                arrived.get_nowait()

    def _next(self, arrived: queue.Queue) -> tuple[tf.Tensor, Any]:
        while True:
            with contextlib.suppress(queue.Empty):
                element = arrived.get(timeout=PATIENCE)
                break
            try:
                data_service.check(self._address)
            except ConnectionError as error:
                raise self._told(error) from None
            say("service", f"no batch has come for {PATIENCE:g} s, though {self._address} answers; waiting")
        if isinstance(element, Exception):
            raise self._told(f"the data service at {self._address} failed: {element}") from element
        return element

    def _told(self, problem: Any) -> ConnectionError:
        return ConnectionError(f"{problem} (then go on with --resume --name={self._name})")

    def _made_here(self, at: int) -> Any:
        whole = self._splits.stream(at).take(1)
        return next(iter(workers.in_parts(whole, first=self._index, count=1, of=self._of)))
