"""Requests that run together, against a stand-in for a version that says what ran."""

import contextlib
import math
import threading
import time

import numpy as np
import pytest
from conftest import until
from google.protobuf import text_format

from shared.serving import batching, protocol
from shared.serving.batching import Batching, Rules, Slots
from shared.serving.refusal import RefusedError, invalid

FEEDS, FETCHES = ("x:0",), ("y:0",)


class Version:
    """Doubles its input; refuses a batch with a 13 in it; remembers the batches that it ran.

    A batch takes so many seconds; without that it lasts until `go` is set.
    """

    def __init__(self, seconds=None):
        self.batches, self.limits, self.seconds, self.go = [], [], seconds or 0, threading.Event()
        if seconds is not None:
            self.go.set()

    def answer(self, feeds, fetches, arrays, until):
        self.batches.append(arrays[0].copy())
        self.limits.append(until)
        assert self.go.wait(20)
        time.sleep(self.seconds)
        if (arrays[0] == 13).any():
            raise invalid("13 brings bad luck")
        return [arrays[0] * 2]

    @property
    def sizes(self):
        return [len(batch) for batch in self.batches]


def until_there(together, version, rows):
    """Wait until so many examples run or are in a queue, and who need not wait has taken his."""

    def there():
        queues = list(together._queues.values())
        leads = not together._rules.wait and any(task.leads for queue in queues for task in queue.tasks)
        return sum(version.sizes) + sum(queue.rows for queue in queues) >= rows and not leads

    end = time.monotonic() + 20
    while not there():
        assert time.monotonic() < end
        time.sleep(0.0005)


def ask_together(rules, requests, version=None):
    """Send requests, in this order and before one is answered; the version, and each request's answer or error."""
    version, together = version or Version(), Batching(rules)
    answers = [None] * len(requests)

    def ask(index):
        try:
            answers[index] = together.run(version, FEEDS, FETCHES, [requests[index]])[0][0]
        except RefusedError as error:
            answers[index] = error

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(requests))]
    rows = 0
    for thread, request in zip(threads, requests, strict=True):
        thread.start()
        rows += len(request)
        if not version.go.is_set():
            until_there(together, version, rows)
    version.go.set()
    for thread in threads:
        thread.join(20)
    return version, answers


def row(value, width=2):
    return np.full((1, width), value, np.float32)


def test_what_comes_while_a_batch_runs_is_the_next():
    version, answers = ask_together(Rules(threads=1), [row(index) for index in range(8)])
    assert version.sizes == [1, 7]  # alone there is nothing to wait for
    assert [answer[0, 0] for answer in answers] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert all(answer.shape == (1, 2) for answer in answers)


def test_a_wait_fills_the_first_batch_and_a_full_one_does_not_wait():
    for threads in (1, 2):
        version, _ = ask_together(Rules(threads=threads, wait=1.0), [row(index) for index in range(4)])
        assert version.sizes == [4]
        begun = time.monotonic()
        rules = Rules(threads=threads, wait=15.0, largest=4, run_largest=4)
        version, _ = ask_together(rules, [row(index) for index in range(4)])
        assert version.sizes == [4]
        assert time.monotonic() - begun < 5


def test_with_a_wait_as_many_full_batches_run_as_there_are_threads():
    rules = Rules(threads=2, wait=15.0, largest=4, run_largest=4)
    begun = time.monotonic()
    version, answers = ask_together(rules, [row(index) for index in range(12)])
    assert version.sizes == [4, 4, 4]
    assert [answer[0, 0] for answer in answers] == [2.0 * index for index in range(12)]
    # What does not fit into a batch begins the next, and is not left without a leader.
    version, _ = ask_together(rules, [np.ones((3, 2), np.float32), np.ones((3, 2), np.float32), row(1)])
    assert version.sizes == [3, 4]
    assert time.monotonic() - begun < 5


def test_without_a_wait_none_joins_while_a_thread_is_free():
    version, _ = ask_together(Rules(threads=2), [row(index) for index in range(5)])
    assert version.sizes[:2] == [1, 1]
    assert sum(version.sizes) == 5


def test_many_in_many_threads_each_get_their_own():
    for rules in (Rules(threads=2, largest=8, run_largest=8, waiting=1000), Rules(threads=3, wait=0.001, waiting=1000)):
        version, answers = ask_together(rules, [row(index) for index in range(20, 120)], Version(0.001))
        assert [answer[0, 0] for answer in answers] == [2.0 * index for index in range(20, 120)]
        assert sum(version.sizes) == 100


def test_a_bad_request_fails_alone():
    version, answers = ask_together(Rules(threads=1), [row(value) for value in (1, 2, 13, 4)])
    assert str(answers[2]) == "13 brings bad luck"
    assert [answers[index][0, 0] for index in (0, 1, 3)] == [2, 4, 8]
    assert version.sizes == [1, 3, 1, 1, 1]


def test_sizes_are_filled_with_the_first_row():
    rules = Rules(threads=1, sizes=(1, 4, 8), largest=8, run_largest=8)
    version, answers = ask_together(rules, [row(index) for index in range(4)])
    assert version.sizes == [1, 4]
    assert version.batches[1][:, 0].tolist() == [1, 2, 3, 1]
    assert [len(answer) for answer in answers] == [1, 1, 1, 1]


def test_other_shapes_wait_in_other_queues_unless_they_are_padded():
    requests = [row(1, 2), row(2, 2), row(3, 3), row(4, 3)]
    version, answers = ask_together(Rules(threads=4), requests)
    assert {batch.shape[1] for batch in version.batches} == {2, 3}
    assert [answer.shape for answer in answers] == [(1, 2), (1, 2), (1, 3), (1, 3)]
    version, answers = ask_together(Rules(threads=1, pad=True), requests)
    assert [batch.shape for batch in version.batches] == [(1, 2), (3, 3)]
    assert version.batches[1].tolist() == [[2, 2, 2], [3, 3, 3], [4, 4, 4]]
    assert answers[1].shape == (1, 3)


@contextlib.contextmanager
def busy(together, version):
    """While this block lasts, a version runs."""
    long = threading.Thread(target=together.run, args=(version, FEEDS, FETCHES, [row(1)]))
    long.start()
    until_there(together, version, 1)
    yield
    version.go.set()
    long.join()


def overdue(together, version):
    """A request waits in vain, and is told."""
    with pytest.raises(RefusedError, match="timeout exceeded while waiting in batching queue") as error:
        together.run(version, FEEDS, FETCHES, [row(2)], time.monotonic() + 0.05)
    assert error.value.code.name == "RESOURCE_EXHAUSTED"


def test_all_queues_of_all_versions_share_the_threads():
    slots, lock, now, most = Slots(2), threading.Lock(), [0], [0]

    class Slow(Version):
        def answer(self, feeds, fetches, arrays, until):
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.02)
            with lock:
                now[0] -= 1
            return [arrays[0]]

    versions = [(Batching(Rules(threads=2), slots=slots), Slow()) for _ in range(3)]
    asking = [
        threading.Thread(target=together.run, args=(version, FEEDS, (fetch,), [row(1, width)]))
        for together, version in versions
        for fetch in (*FETCHES, "other:0")
        for width in (2, 3, 4)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert most == [2]


def test_slots_go_to_who_waited_longest():
    slots, order = Slots(1), []
    assert slots.acquire(0)

    def wait(number, timeout):
        if slots.acquire(timeout):
            order.append(number)
            slots.release()

    waiting = [threading.Thread(target=wait, args=(number, -1)) for number in (0, 2)]
    waiting[0].start()
    until(lambda: len(slots._waiting) == 1)
    wait(1, 0.05)  # its time is over
    waiting[1].start()
    until(lambda: len(slots._waiting) == 2)
    slots.release()
    for thread in waiting:
        thread.join()
    assert order == [0, 2]


def test_who_waits_for_a_slot_in_vain_is_told():
    slots, idle = Slots(1), Version(0)
    one, other = (Batching(Rules(threads=1), slots=slots) for _ in range(2))
    with busy(one, Version()):
        overdue(other, idle)
    assert not idle.batches
    assert other.run(idle, FEEDS, FETCHES, [row(3)], time.monotonic() + 60)[0][0].tolist() == [[6, 6]]


def test_large_requests():
    large = np.arange(9, dtype=np.float32)[:, None]
    _, (refused,) = ask_together(Rules(largest=8, run_largest=8), [large], Version(0))
    assert str(refused) == "Task size 9 is larger than maximum input batch size 8"
    _, (refused,) = ask_together(Rules(largest=8, run_largest=4, split=True), [large], Version(0))
    assert str(refused) == "Task size 9 is larger than maximum input batch size 8"  # as upstream, which splits less
    version, (answer,) = ask_together(Rules(largest=9, run_largest=4, split=True), [large], Version(0))
    assert version.sizes == [4, 4, 1]
    assert answer[:, 0].tolist() == [2.0 * index for index in range(9)]


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ([], "must have at least one input tensor"),
        ([np.float32(1)], "must have at least one dimension"),
        ([np.ones(2), np.ones(3)], "must have equal 0th-dimension size"),
    ],
)
def test_what_cannot_be_batched(arrays, text):
    with pytest.raises(RefusedError, match=text):
        Batching(Rules()).run(Version(), FEEDS, FETCHES, arrays)


def test_outputs_must_have_a_row_for_each_example():
    class Sums(Version):
        def answer(self, feeds, fetches, arrays, until):
            return [arrays[0].sum(0)]

    with pytest.raises(RefusedError, match="0th dimension does not equal the sum") as error:
        Batching(Rules()).run(Sums(), FEEDS, FETCHES, [np.ones((3, 2), np.float32)])
    assert error.value.code.name == "FAILED_PRECONDITION"


def test_a_full_queue_and_a_deadline_refuse():
    version, together = Version(), Batching(Rules(threads=1, waiting=1, largest=2, run_largest=2))
    asking = [threading.Thread(target=together.run, args=(version, FEEDS, FETCHES, [row(1)])) for _ in range(3)]
    for count, thread in enumerate(asking, 1):
        thread.start()
        until_there(together, version, count)
    with pytest.raises(RefusedError, match="batch scheduling queue to which this task was submitted is full") as error:
        together.run(version, FEEDS, FETCHES, [row(2)])
    assert error.value.code.name == "UNAVAILABLE"
    version.go.set()
    for thread in asking:
        thread.join()
    with busy(together, version := Version()):
        overdue(together, version)


@pytest.mark.parametrize(("seconds", "most"), [((200, 300), 300), ((200, None), math.inf)])
def test_a_batch_may_take_what_its_most_patient_request_may(seconds, most):
    version, together, now = Version(), Batching(Rules(threads=1)), time.monotonic()
    threads = [threading.Thread(target=together.run,
                                args=(version, FEEDS, FETCHES, [row(1)], None if one is None else now + one))
               for one in (100, *seconds)]  # fmt: skip
    for count, thread in enumerate(threads, 1):
        thread.start()
        until_there(together, version, count)
    version.go.set()
    for thread in threads:
        thread.join()
    assert version.limits == [now + 100, now + most]


def test_rules_of_a_file():
    text = """max_batch_size { value: 32 } batch_timeout_micros { value: 2000 } num_batch_threads { value: 3 }
              max_enqueued_batches { value: 7 } allowed_batch_sizes: 8 allowed_batch_sizes: 32
              pad_variable_length_inputs: true"""

    def read(text):
        found = text_format.Parse(text, protocol.BatchingParameters(), descriptor_pool=protocol.pool)
        return batching.rules(found, threads=2)

    assert read(text) == Rules(32, 0.002, 7, 3, (8, 32), True, False, 32)
    assert read("") == Rules(1000, 0.0, 10, 2, (), False, False, 1000)  # as TensorFlow Serving's
    split = "enable_large_batch_splitting { value: true } max_execution_batch_size { value: 16 }"
    assert read(f"max_batch_size {{ value: 64 }} {split}").run_largest == 16
    with pytest.raises(ValueError, match=r"allowed_batch_sizes \[4, 2\] must rise"):
        read("allowed_batch_sizes: 4 allowed_batch_sizes: 2")
    with pytest.raises(ValueError, match=r"end in the largest batch, 1000"):
        read("allowed_batch_sizes: 4")
