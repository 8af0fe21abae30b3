"""The check that ends every run: does the served answer equal the model in memory?"""

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf

from shared.serving.ask import shorten
from shared.serving.client import Client
from shared.serving.flags import Flags
from shared.serving.server import Server

TOLERANCE = 1e-4  # of numbers, absolute and relative: a loaded graph may be fused otherwise than the one in memory


def check(folder: Path, endpoint: tf.Module, name: str, request: Mapping[str, np.ndarray]) -> dict[str, float | str]:
    """Serve a version, ask it over gRPC, and compare with the endpoint in memory.

    Returns:
        `answers` that were compared, the `largest_difference` between numbers, the median `milliseconds` of a request
        with one example, and the first `answer` as a person reads it.

    Raises:
        ValueError: an output differs; says which, by how much.
    """
    expected = {
        key: value.numpy() for key, value in endpoint(**{k: tf.constant(v) for k, v in request.items()}).items()
    }
    one = {key: value[:1] for key, value in request.items()}
    with (
        tempfile.TemporaryDirectory() as tree,
        serving(Path(tree), name, folder) as server,
        Client(server.address) as client,
    ):
        served = client.predict(name, request)
        times = []
        for _ in range(20):
            begun = time.perf_counter()
            client.predict(name, one)
            times.append(time.perf_counter() - begun)
    largest = compare(expected, served)
    return {
        "answers": len(next(iter(served.values()))),
        "largest_difference": largest,
        "milliseconds": 1000 * statistics.median(times),
        "answer": shorten({key: value[0] for key, value in served.items()}),
    }


def serving(tree: Path, name: str, folder: Path) -> Server:
    """A server of one version, whatever its folder is called, as the first of its model; `tree` is an empty folder."""
    (tree / name).mkdir()
    (tree / name / "1").symlink_to(folder.absolute())
    return Server(Flags(models=str(tree), port=-1, max_num_load_retries=0))


def compare(expected: Mapping[str, np.ndarray], served: Mapping[str, np.ndarray]) -> float:
    """The largest difference between numbers of two answers; ValueError where they are not the same answer."""
    if set(expected) != set(served):
        raise ValueError(f"the server answers {sorted(served)}, the model in memory {sorted(expected)}")
    largest = 0.0
    for key, want in expected.items():
        have = served[key]
        if want.shape != have.shape:
            raise ValueError(f"served {key} has shape {have.shape}, in memory {want.shape}")
        if want.dtype.kind == "f":
            if not np.allclose(want, have, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
                raise ValueError(f"served {key} differs from the model in memory by {np.nanmax(np.abs(want - have))}")
            largest = max(largest, float(np.nanmax(np.abs(want - have), initial=0)))
        elif not (want == have).all():
            raise ValueError(f"served {key} differs from the model in memory: {have[want != have][:3]} is not "
                             f"{want[want != have][:3]}")  # fmt: skip
    return largest
