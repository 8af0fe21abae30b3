"""Who may ask, how much and how often; and the log of what was asked."""

import hmac
import os
import random
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc

from shared.serving.protocol import PredictionLog
from shared.serving.refusal import RefusedError


class Gate:
    """Lets requests in; what it lets in, `leave` lets out again."""

    def __init__(self, *, token: str = "", rate: float = 0.0, most: int = 0):
        """Ask for a bearer token where one is given; admit `rate` requests a second and `most` at a time, 0: any."""
        self.set(token=token, rate=rate, most=most)
        self._lock = threading.Lock()
        self._inside, self._left, self._at = 0, max(1.0, rate), time.monotonic()

    def set(self, *, token: str, rate: float, most: int) -> None:
        """Change what is asked for; requests that are inside stay."""
        self.asks = bool(token)  # for one
        self._expected = f"Bearer {token}".encode() if token else b""
        self._rate, self._most = rate, most
        self.open = not (token or rate or most)

    def check(self, authorization: str) -> None:
        """Look at what a request has in its `authorization` header; RefusedError where that is not the token."""
        if self._expected and not hmac.compare_digest(authorization.encode(errors="replace"), self._expected):
            raise RefusedError(
                grpc.StatusCode.UNAUTHENTICATED, "a valid bearer token is needed: authorization: Bearer …"
            )

    def enter(self, authorization: str) -> None:
        """Let a request in that has the token, and that the limits admit; RefusedError where it may not."""
        self.check(authorization)
        with self._lock:
            if self._most and self._inside >= self._most:
                text = f"{self._inside} requests are being answered, and no more are taken; try again"
                raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            if self._rate:
                now = time.monotonic()
                # Tokens in a bucket that holds a second's worth, so that a short burst passes.
                self._left = min(max(1.0, self._rate), self._left + (now - self._at) * self._rate)
                self._at = now
                if self._left < 1:
                    text = f"more than {self._rate:g} requests a second; try again"
                    raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
                self._left -= 1
            self._inside += 1

    def leave(self) -> None:
        """A request that was let in has its answer."""
        with self._lock:
            self._inside -= 1


class Recorder:
    """Writes a sample of the requests as PredictionLog records, which serve as warm-up or as an evaluation set.

    Each model has a file of its own, for what is a request to one is none to another.
    """

    def __init__(self, prefix: str, rate: float):
        """Write that share of the requests to `PREFIX-MODEL-TIME.tfrecord`; OSError where the folder is not to be had.

        The file of a model is there from its first record on.
        """
        import tensorflow as tf

        folder = Path(f"{prefix}-").parent
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written to, so there can be no log of requests")
        self.prefix, self._rate, self._lock = prefix, rate, threading.Lock()
        # To the microsecond: the writer would empty the file of another that began in the same second.
        self._began = f"{datetime.now():%Y%m%d-%H%M%S-%f}"
        self._open, self._closed = tf.io.TFRecordWriter, False
        self._writers: dict[str, Any] = {}  # by model
        self._random = random.Random()

    def wants(self) -> bool:
        """Whether the next request belongs to the sample."""
        return self._random.random() < self._rate

    def write(self, kind: str, request: bytes, reply: bytes) -> None:
        """Write a request and its reply; `kind` is the field of PredictionLog: predict_log, classify_log, …"""
        record = PredictionLog()
        log = getattr(record, kind)
        log.request.MergeFromString(request)
        log.response.MergeFromString(reply)
        spec = log.request.tasks[0].model_spec if kind == "multi_inference_log" else log.request.model_spec
        with self._lock:
            if self._closed:
                raise OSError("it is closed")
            if spec.name not in self._writers:
                model = quote(spec.name, safe="")
                self._writers[spec.name] = self._open(f"{self.prefix}-{model}-{self._began}.tfrecord")
            writer = self._writers[spec.name]
            writer.write(record.SerializeToString())
            writer.flush()

    def close(self) -> None:
        """Finish the files."""
        with self._lock:
            self._closed = True
            for writer in self._writers.values():
                writer.close()
