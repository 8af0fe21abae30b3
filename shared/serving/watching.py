"""What a server counts, in Prometheus's text format under TensorFlow Serving's names, and more of its own.

prometheus_client would append `_total` and `_created` to names that dashboards of TensorFlow Serving ask for as they
are.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from shared.serving.inference import Stages

MICROSECONDS = [10 * 1.8**power for power in range(33)]  # TensorFlow Serving's buckets
WAITS = [100 * 1.2**power for power in range(52)]
SIZES = [2.0**power for power in range(17)]
PREFIX = ":tensorflow:serving:"
OWN = ":cornucopia:serving:"
STAGES = ("decode", "queue", "run", "encode")


class Histogram:
    """Counts of values up to each bound, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: list[float]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class _Line:
    """What is counted of one model, call and transport."""

    __slots__ = ("batch", "examples", "latency", "lock", "runtime", "stages", "statuses")

    def __init__(self):
        self.lock = threading.Lock()
        self.statuses: dict[str, int] = {}
        self.latency, self.runtime = Histogram(MICROSECONDS), Histogram(MICROSECONDS)
        self.examples, self.batch = Histogram(SIZES), Histogram(SIZES)
        self.stages = {name: Histogram(MICROSECONDS) for name in STAGES}


class Metrics:
    """Counts requests and what they cost; `text` is what Prometheus reads."""

    def __init__(self):
        self._lines: dict[tuple[str, str, str], _Line] = {}
        self._warm_ups: dict[str, Histogram] = {}
        self._batches, self._waits = 0, Histogram(WAITS)
        self._lock = threading.Lock()

    def request(self, model: str, entrypoint: str, status: str, seconds: float, stages: Stages) -> None:
        """Count a request that came over a transport and ended with a status after some seconds."""
        key = (model, stages.api, entrypoint)
        line = self._lines.get(key)
        if line is None:
            with self._lock:
                line = self._lines.setdefault(key, _Line())
        with line.lock:
            line.statuses[status] = line.statuses.get(status, 0) + 1
            if status == "OK":  # as TensorFlow Serving: a refusal is fast, and would make the rest look so
                line.latency.add(seconds * 1e6)
            if stages.batch:
                line.runtime.add(stages.run * 1e6)
                line.batch.add(stages.batch)
                for name, histogram in line.stages.items():
                    histogram.add(getattr(stages, name) * 1e6)
            if stages.examples:
                line.examples.add(stages.examples)

    def warm_up(self, model: str, seconds: float) -> None:
        """Count the warm-up of a version."""
        with self._lock:
            self._warm_ups.setdefault(model, Histogram(MICROSECONDS)).add(seconds * 1e6)

    def batch(self, waits: Sequence[float]) -> None:
        """Count a batch that runs, and the seconds that each of its requests waited for that."""
        with self._lock:
            self._batches += 1
            for seconds in waits:
                self._waits.add(seconds * 1e6)

    def value(self, path: str) -> int:
        """A counter by TensorFlow's path of it, e.g. `/tensorflow/serving/request_count`; 0 where there is none."""
        lines = list(self._lines.values())
        if path == "/tensorflow/serving/request_count":
            return sum(sum(line.statuses.values()) for line in lines)
        if path == "/tensorflow/serving/request_example_count_total":
            return int(sum(line.examples.sum for line in lines))
        if path == "/tensorflow/serving/batching_session/wrapped_run_count":
            return self._batches
        return 0

    def text(self, gauges: dict[str, float]) -> str:
        """Everything counted, and gauges of the moment by name, in Prometheus's text format."""
        lines = sorted(self._lines.items())
        statuses: dict[tuple[str, str], int] = {}
        for (model, _, _), line in lines:
            for status, count in dict(line.statuses).items():
                statuses[model, status] = statuses.get((model, status), 0) + count
        out = [f"# TYPE {PREFIX}request_count counter"]
        out += [f"{PREFIX}request_count{_labels(model_name=model, status=status)} {count}"
                for (model, status), count in sorted(statuses.items())]  # fmt: skip

        def histograms(name: str, found: Iterable[tuple[dict[str, str], Histogram]]) -> None:
            out.append(f"# TYPE {name} histogram")
            for labels, histogram in found:
                if any(histogram.counts):  # what was only refused has none
                    out.extend(_buckets(name, labels, histogram))

        def of(attribute: str, **more: str) -> Iterator[tuple[dict[str, str], Histogram]]:
            for (model, api, _), line in lines:
                yield {"model_name": model, "API": api, **more}, getattr(line, attribute)

        histograms(f"{PREFIX}request_latency", (
            ({"model_name": model, "API": api, "entrypoint": entrypoint}, line.latency)
            for (model, api, entrypoint), line in lines))  # fmt: skip
        merged = _merged(of("runtime", runtime="TF1"))
        histograms(f"{PREFIX}runtime_latency", merged)
        counts = _merged(({"model": labels["model_name"]}, histogram) for labels, histogram in of("examples"))
        histograms(f"{PREFIX}request_example_counts", counts)
        out.append(f"# TYPE {PREFIX}request_example_count_total counter")
        out += [f"{PREFIX}request_example_count_total{_labels(**labels)} {int(one.sum)}" for labels, one in counts
                if one.sum]  # fmt: skip
        warmed = [({"model_path": name, "status": "OK"}, one) for name, one in sorted(self._warm_ups.items())]
        histograms(f"{PREFIX}model_warmup_latency", warmed)
        # A batching session's thread pool has no name in TensorFlow Serving either.
        waits = [({"thread_pool_name": ""}, self._waits)] if self._batches else []
        histograms(f"{PREFIX}batching_session:queuing_latency", waits)
        out.append(f"# TYPE {PREFIX}batching_session:wrapped_run_count counter")
        out += [f"{PREFIX}batching_session:wrapped_run_count{{}} {self._batches}"] if self._batches else []
        histograms(f"{OWN}batch_size", _merged(of("batch")))
        histograms(f"{OWN}stage_latency", _merged(
            ({"model_name": model, "API": api, "stage": stage}, histogram)
            for (model, api, _), line in lines for stage, histogram in line.stages.items()))  # fmt: skip
        for name, value in gauges.items():
            out += [f"# TYPE {OWN}{name} gauge", f"{OWN}{name} {value:g}"]
        return "\n".join(out) + "\n"


def _merged(found: Iterable[tuple[dict[str, str], Histogram]]) -> list[tuple[dict[str, str], Histogram]]:
    """One histogram for each set of labels."""
    merged: dict[tuple, Histogram] = {}
    for labels, histogram in found:
        one = merged.setdefault(tuple(labels.items()), Histogram(histogram.bounds))
        one.counts = [a + b for a, b in zip(one.counts, histogram.counts, strict=True)]
        one.sum += histogram.sum
    return [(dict(labels), histogram) for labels, histogram in merged.items()]


def _buckets(name: str, labels: dict[str, str], histogram: Histogram) -> Iterator[str]:
    counts, total = list(histogram.counts), 0
    for bound, count in zip([*histogram.bounds, float("inf")], counts, strict=True):
        total += count
        limit = "+Inf" if bound == float("inf") else f"{bound:g}"
        yield f"{name}_bucket{_labels(**labels, le=limit)} {total}"
    yield f"{name}_sum{_labels(**labels)} {histogram.sum:.10g}"
    yield f"{name}_count{_labels(**labels)} {total}"


def _labels(**labels: str) -> str:
    escaped = [(name, text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n"))
               for name, text in labels.items()]  # fmt: skip
    return "{" + ",".join(f'{name}="{text}"' for name, text in escaped) + "}"
