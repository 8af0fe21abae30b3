"""Requests that a server recorded, to be sent again, and what became of their answers.

A log is what `cornucopia serve --request_log` writes, or any TFRecord file of PredictionLog records.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from shared.serving import protocol, tensors
from shared.serving.records import records

METHODS = {"predict_log": "Predict", "classify_log": "Classify", "regress_log": "Regress",
           "multi_inference_log": "MultiInference"}  # fmt: skip
CLOSE = {"rtol": 1e-3, "atol": 1e-5, "equal_nan": True}  # how near floats are that count as equal


@dataclass(frozen=True)
class Recorded:
    """A request as bytes, and the reply that was recorded with it, where one was."""

    method: str
    body: bytes
    reply: Any


def read(path: Path, model: str) -> list[Recorded]:
    """The requests of a log, each now to the newest version of such a model.

    Raises:
        ValueError: the file is no such log, or one without requests.
        OSError: it cannot be read.
    """
    found = []
    for record in records(path):
        try:
            log = protocol.PredictionLog.FromString(record)
        except DecodeError as error:
            raise ValueError(f"record {len(found)} of {path} is no PredictionLog") from error
        kind = log.WhichOneof("log_type")
        if kind not in METHODS:
            raise ValueError(f"record {len(found)} of {path} is a {kind}, not one of {', '.join(METHODS)}")
        request, reply = getattr(log, kind).request, getattr(log, kind).response
        for asked in request.tasks if kind == "multi_inference_log" else [request]:
            asked.model_spec.name = model
            asked.model_spec.ClearField("version_choice")
        found.append(Recorded(METHODS[kind], request.SerializeToString(), reply if reply.ByteSize() else None))
    if not found:
        raise ValueError(f"{path} holds no request")
    return found


def compared(recorded: Sequence[Recorded], answers: Mapping[int, bytes]) -> str:
    """In a sentence, how many of the answers, by the number of their request, equal those recorded."""
    pairs = [(recorded[number].reply, answer) for number, answer in answers.items() if recorded[number].reply]
    equal = sum(_equal(_arrays(type(reply).FromString(answer)), _arrays(reply)) for reply, answer in pairs)
    parts = [f"{equal} of {len(pairs)} ({100 * equal / max(1, len(pairs)):.1f} %) equal those recorded"]
    if without := sum(one.reply is None for one in recorded):
        parts.append(f"{without} recorded without an answer")
    if missing := len(recorded) - len(answers):
        parts.append(f"{missing} requests without an answer now")
    return "; ".join(parts)


def _arrays(reply: Any) -> dict[Any, np.ndarray]:
    """What a reply says, without who said it."""
    if isinstance(reply, protocol.PredictResponse):
        return {alias: tensors.from_proto(proto) for alias, proto in reply.outputs.items()}
    found: dict[Any, np.ndarray] = {}
    several = isinstance(reply, protocol.MultiInferenceResponse)
    for number, one in enumerate(reply.results if several else [reply.result]):
        result = getattr(one, one.WhichOneof("result")) if several else one
        if result.DESCRIPTOR.name == "RegressionResult":
            found[number] = np.array([entry.value for entry in result.regressions], np.float32)
            continue
        for place, row in enumerate(result.classifications):
            found[number, place, "labels"] = np.array([entry.label for entry in row.classes], object)
            found[number, place, "scores"] = np.array([entry.score for entry in row.classes], np.float32)
    return found


def _equal(now: dict[Any, np.ndarray], then: dict[Any, np.ndarray]) -> bool:
    return now.keys() == then.keys() and all(_alike(now[name], then[name]) for name in now)


def _alike(now: np.ndarray, then: np.ndarray) -> bool:
    if now.dtype != then.dtype or now.shape != then.shape:
        return False
    if now.dtype.kind not in "fcV":  # V is bfloat16
        return np.array_equal(now, then)
    wide = np.complex128 if now.dtype.kind == "c" else np.float64
    return np.allclose(now.astype(wide), then.astype(wide), **CLOSE)
