"""What both transports share: the models, what answers from them, and what lets in, counts and records."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shared.serving.gate import Gate, Recorder
from shared.serving.inference import Inference
from shared.serving.models import Models
from shared.serving.watching import Metrics

log = logging.getLogger("cornucopia.serve")


@dataclass
class Core:
    """The parts of a server behind its transports."""

    models: Models
    inference: Inference
    metrics: Metrics
    gate: Gate
    recorder: Recorder | None = None
    access: Callable[..., None] | None = None  # writes a line of the access log
    as_content: bool = False  # whether answers carry tensor_content in place of typed fields
    started: float = field(default_factory=time.time)

    def sample(self) -> Recorder | None:
        """Where the next request is to be recorded; None where it is not."""
        recorder = self.recorder  # read once: new flags may replace it at any moment
        return recorder if recorder is not None and recorder.wants() else None

    def record(self, recorder: Recorder, kind: str, request: bytes, reply: bytes) -> None:
        """Write a request to a record; a disk that refuses ends the recording, not the answer."""
        try:
            recorder.write(kind, request, reply)
        except Exception as error:  # OSError and TensorFlow's own
            if self.recorder is recorder:  # else new flags have closed it meanwhile
                log.error("recording ends, the files %s-… cannot be written: %s", recorder.prefix, error)
                self.recorder = None
