"""Requests that wait for the same graph run together.

The first to come leads: it takes what waits, runs it as one, hands out the answers, and gives the lead on. So without
a wait a lone request runs at once, in its own thread, and a batch is what came while the one before it ran. With a
wait one leader at a time collects: all that come join its batch, until that is full or its first request has waited.
A leader also needs one of the slots that all versions share; it takes its batch when it has one.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from shared.serving.protocol import BatchingParameters
from shared.serving.refusal import RefusedError, invalid
from shared.serving.servable import Servable

MOST = 1000  # examples in a batch where nothing is said, as in TensorFlow Serving
OVERDUE = "Run() timeout exceeded while waiting in batching queue"


@dataclass(frozen=True)
class Rules:
    """How batches are made; what they mean is in TensorFlow Serving's BatchingParameters."""

    largest: int = MOST  # examples that a request may hold, also one that runs in parts
    wait: float = 0.0  # seconds that a batch waits for more
    waiting: int = 10  # batches' worth of examples that may wait
    threads: int = 2  # batches that run at a time, of all that share these
    sizes: tuple[int, ...] = ()  # batches are filled up to one of these
    pad: bool = False  # examples of different shapes are padded to the largest
    split: bool = False  # a request of more than run together runs in parts
    run_largest: int = MOST  # examples that run together


def rules(text: BatchingParameters, *, threads: int) -> Rules:
    """The rules that a parameter file gives; ValueError where they contradict each other."""

    def value(name, otherwise):
        return getattr(text, name).value if text.HasField(name) else otherwise

    largest = value("max_batch_size", MOST)
    split = value("enable_large_batch_splitting", False)
    run_largest = value("max_execution_batch_size", largest) if split else largest
    sizes = tuple(text.allowed_batch_sizes)
    if sizes and (list(sizes) != sorted(set(sizes)) or sizes[-1] != run_largest):
        raise ValueError(f"allowed_batch_sizes {list(sizes)} must rise, and end in the largest batch, {run_largest}")
    found = Rules(
        largest=largest,
        wait=value("batch_timeout_micros", 0) / 1e6,
        waiting=value("max_enqueued_batches", 10),
        threads=value("num_batch_threads", threads),
        sizes=sizes,
        pad=text.pad_variable_length_inputs,
        split=split,
        run_largest=run_largest,
    )
    if min(found.largest, found.waiting, found.threads, found.run_largest) < 1 or found.run_largest > found.largest:
        raise ValueError(f"batches of {found.run_largest} of at most {found.largest} examples, {found.waiting} waiting "
                         f"in {found.threads} threads cannot be made")  # fmt: skip
    return found


class Slots:
    """Places for batches that run at a time, taken in the order in which they are asked for."""

    def __init__(self, count: int):
        self._lock, self._free = threading.Lock(), count
        self._waiting: deque[threading.Lock] = deque()  # each is let go when its owner's turn has come

    def acquire(self, timeout: float) -> bool:
        """Take a place, at once or within some seconds; -1: however long that takes."""
        with self._lock:
            if self._free and not self._waiting:
                self._free -= 1
                return True
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        if turn.acquire(timeout=timeout):
            return True
        with self._lock:
            if turn not in self._waiting:  # it came in the same moment
                return True
            self._waiting.remove(turn)
            return False

    def release(self) -> None:
        """Give a place back, to who has waited longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1


class _Task:
    __slots__ = ("answer", "arrays", "at", "error", "leads", "rows", "run", "said", "together", "until")

    def __init__(self, arrays: list[np.ndarray], rows: int, until: float):
        self.arrays, self.rows, self.at, self.until = arrays, rows, time.perf_counter(), until
        self.said = threading.Lock()  # a lock that is let go says it: faster than an Event, which holds two
        self.said.acquire()
        self.leads, self.answer, self.error = False, None, None
        self.run, self.together = 0.0, 0


class _Queue:
    def __init__(self):
        self.lock = threading.Lock()
        self.more = threading.Condition(self.lock)
        self.tasks: list[_Task] = []
        self.rows = 0
        self.leaders = 0
        self.collecting = False  # whether one of them waits for more


class Batching:
    """Runs requests of one version together; one queue for each set of tensors, shapes and types."""

    def __init__(self, rules: Rules, ran: Callable[[list[float]], None] = lambda waits: None,
                 slots: Slots | None = None):  # fmt: skip
        """`ran` is told of every batch: the seconds that each of its requests waited. `slots` are the `rules.threads`
        that versions with the same rules share; without, this one has as many for itself.
        """
        self._rules, self._ran = rules, ran
        self._slots = slots or Slots(rules.threads)
        self._queues: dict[tuple, _Queue] = {}
        self._lock = threading.Lock()

    def run(self, servable: Servable, feeds: tuple, fetches: tuple, arrays: Sequence[np.ndarray],
            until: float | None = None) -> tuple[list[np.ndarray], float, int]:  # fmt: skip
        """Run a request in a batch.

        Returns:
            Its part of the outputs, the seconds that the batch ran, and its size.

        Raises:
            RefusedError: the request cannot be part of a batch, too many wait, or its time (`until`, on the clock
                of `time.monotonic`) is over.
        """
        rules = self._rules
        rows = _rows(arrays)
        if rows > rules.largest:
            raise invalid(f"Task size {rows} is larger than maximum input batch size {rules.largest}")
        if rows > rules.run_largest:
            return self._in_parts(servable, feeds, fetches, arrays, rows, until)
        queue = self._queue(feeds, fetches, arrays)
        task = _Task(list(arrays), rows, math.inf if until is None else until)
        with queue.lock:
            if queue.rows + rows > rules.waiting * rules.run_largest:
                raise RefusedError(
                    grpc.StatusCode.UNAVAILABLE,
                    "The batch scheduling queue to which this task was submitted is full; currently "
                    f"{len(queue.tasks)} tasks wait with {queue.rows} examples",
                )
            queue.tasks.append(task)
            queue.rows += rows
            self._appoint(queue)
            if queue.collecting and queue.rows >= rules.run_largest:
                queue.more.notify()
        # Of one that leads it is let go at once, and again with its answer.
        if not task.said.acquire(timeout=_left(task)):
            with queue.lock:
                if task in queue.tasks and not task.leads:
                    queue.tasks.remove(task)
                    queue.rows -= rows
                    raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, OVERDUE)  # as upstream's
            task.said.acquire()
        if task.leads:
            self._lead(servable, queue, task, feeds, fetches)
            task.said.acquire()
        if task.error is not None:
            try:
                raise task.error
            finally:
                del task  # else the error's traceback would hold what holds the error, and the version with it
        return task.answer, task.run, task.together

    def _queue(self, feeds: tuple, fetches: tuple, arrays: Sequence[np.ndarray]) -> _Queue:
        shapes = tuple([(len(array.shape) if self._rules.pad else array.shape[1:]) for array in arrays])
        key = (feeds, fetches, shapes)
        try:
            return self._queues[key]
        except KeyError:
            with self._lock:
                if len(self._queues) > 1000:  # shapes that came once must not stay for ever
                    self._queues = {key: queue for key, queue in self._queues.items() if queue.tasks or queue.leaders}
                return self._queues.setdefault(key, _Queue())

    def _lead(self, servable: Servable, queue: _Queue, task: _Task, feeds: tuple, fetches: tuple) -> None:
        """Run a batch, in which one's own request is the first; then give the lead on."""
        rules = self._rules
        with queue.lock:
            if rules.wait:
                end = task.at + rules.wait
                while queue.rows < rules.run_largest and (left := end - time.perf_counter()) > 0:
                    queue.more.wait(left)
        taken = [task]
        if self._slots.acquire(_left(task)):
            try:
                taken = self._take_and_run(servable, queue, task, feeds, fetches)
            finally:
                self._slots.release()
        else:
            task.error = RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, OVERDUE)
            with queue.lock:
                queue.collecting = False
                queue.tasks.remove(task)
                queue.rows -= task.rows
        with queue.lock:
            queue.leaders -= 1
            self._appoint(queue)
        for done in taken:
            done.said.release()

    def _take_and_run(self, servable: Servable, queue: _Queue, task: _Task, feeds: tuple, fetches: tuple
                      ) -> list[_Task]:  # fmt: skip
        rules = self._rules
        with queue.lock:
            queue.collecting = False
            taken, rows = [], 0
            for one in queue.tasks:
                if one.leads and one is not task:
                    continue  # it wakes up, or waits for a slot, to lead a batch of its own
                if rows + one.rows > rules.run_largest:
                    break
                taken.append(one)
                rows += one.rows
            queue.tasks = [one for one in queue.tasks if one not in taken]
            queue.rows -= rows
            self._appoint(queue)  # what did not fit must not wait until this batch has run
        self._run(servable, taken, rows, feeds, fetches)
        return taken

    def _appoint(self, queue: _Queue) -> None:
        """Have the first that waits lead the next batch, if none collects one and a thread is free for it."""
        if queue.tasks and queue.leaders < self._rules.threads and not queue.collecting:
            next_ = next((one for one in queue.tasks if not one.leads), None)
            if next_ is not None:
                queue.leaders += 1
                next_.leads, queue.collecting = True, self._rules.wait > 0
                next_.said.release()

    def _run(self, servable: Servable, tasks: list[_Task], rows: int, feeds: tuple, fetches: tuple, *,
             again: bool = False) -> None:  # fmt: skip
        begun = time.perf_counter()
        self._ran([] if again else [begun - task.at for task in tasks])
        try:
            joined = self._joined(tasks, rows)
            until = max([task.until for task in tasks])
            outputs = _cut(servable.answer(feeds, fetches, joined, until=until), tasks, len(joined[0]))
        except RefusedError as error:
            alone = len(tasks) == 1
            if alone:
                tasks[0].error = _bare(error)
        except Exception as error:  # who waits must be told
            alone = True
            for task in tasks:
                task.error = _bare(error)
        else:
            run = time.perf_counter() - begun
            for task, answer in zip(tasks, outputs, strict=True):
                task.answer, task.run, task.together = answer, run, rows
            return
        if not alone:  # one of them may be bad: it shall fail alone
            for task in tasks:
                self._run(servable, [task], task.rows, feeds, fetches, again=True)

    def _joined(self, tasks: list[_Task], rows: int) -> list[np.ndarray]:
        size = next((size for size in self._rules.sizes if size >= rows), rows)
        if len(tasks) == 1 and size == rows:
            return tasks[0].arrays
        joined = []
        for parts in zip(*[task.arrays for task in tasks], strict=True):
            if self._rules.pad:
                parts = _padded(parts)
            fill = [np.repeat(parts[0][:1], size - rows, axis=0)] if size > rows else []
            joined.append(np.concatenate([*parts, *fill]))
        return joined

    def _in_parts(self, servable: Servable, feeds: tuple, fetches: tuple, arrays: Sequence[np.ndarray], rows: int,
                  until: float | None):  # fmt: skip
        size = self._rules.run_largest
        parts = [self.run(servable, feeds, fetches, [array[at : at + size] for array in arrays], until)
                 for at in range(0, rows, size)]  # fmt: skip
        outputs = [np.concatenate(pieces) for pieces in zip(*[part[0] for part in parts], strict=True)]
        return outputs, sum(part[1] for part in parts), max(part[2] for part in parts)


def _left(task: _Task) -> float:
    """Seconds until a request's time is over, as locks take them; -1 where it has any time."""
    return -1 if task.until == math.inf else max(0.0, task.until - time.monotonic())


def _bare(error: Exception) -> Exception:
    """An error without the frames that it came through: they hold the version, which then could not be unloaded."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


def _rows(arrays: Sequence[np.ndarray]) -> int:
    if not arrays:
        raise invalid("Batching Run() must have at least one input tensor")
    sizes = {array.shape[0] if array.ndim else None for array in arrays}
    if None in sizes:
        raise invalid("Batching Run() input tensors must have at least one dimension")
    if len(sizes) > 1:
        raise invalid("Batching Run() input tensors must have equal 0th-dimension size")
    return sizes.pop()


def _padded(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Arrays of one rank, each as large as the largest of them, filled with its own first value."""
    shape = np.max([part.shape[1:] for part in parts], axis=0)
    padded = []
    for part in parts:
        behind = [(0, 0), *[(0, int(most) - have) for most, have in zip(shape, part.shape[1:], strict=True)]]
        value = part.ravel()[0] if part.size else np.zeros((), part.dtype)[()]
        padded.append(np.pad(part, behind, constant_values=value))
    return padded


def _cut(outputs: Sequence[np.ndarray], tasks: list[_Task], rows: int) -> list[list[np.ndarray]]:
    """Each request's rows of the outputs, which have `rows` with the padding behind them, that is dropped."""
    for output in outputs:
        if not output.ndim or len(output) != rows:
            raise RefusedError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension sizes of the input "
                "tensors",
            )
    answers: list[list[np.ndarray]] = []
    at = 0
    for task in tasks:
        answers.append([output[at : at + task.rows] for output in outputs])
        at += task.rows
    return answers
