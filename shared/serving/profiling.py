"""TensorFlow's ProfilerService: what a running server does, for TensorBoard's "capture profile" and its like.

TensorFlow Serving writes a profile below a path that the client names. Here it goes back with the answer, and
TensorFlow's client, which knows servers of either kind, writes it to the same file. So nobody has the server write to a
path of their choice, and the two need no disk in common.
"""

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import tensorflow as tf

from shared.serving.inference import Stages
from shared.serving.protocol import ProfileRequest, ProfileResponse, TerminateRequest, XSpace
from shared.serving.refusal import RefusedError

LOOK = 0.1  # seconds between two looks at whether the client still waits, and the server goes on
LONGEST = 600.0  # seconds of a profile, which grows in memory until it ends


class Profiler:
    """Takes profiles, one at a time; its calls take and give bytes.

    What a client asks for beside the time is not heeded: TensorFlow 2.21 drops it, where Python hands it on.
    """

    def __init__(self):
        self._one, self._stop, self._session, self._closed = threading.Lock(), threading.Event(), "", False

    def profile(self, waits: Callable[[], bool], data: bytes, stages: Stages, until: float | None) -> bytes:
        """Record what TensorFlow does, for as long as is asked, at most `LONGEST`, and while the client `waits`.

        Raises:
            RefusedError: another profile is being taken.
        """
        request = ProfileRequest.FromString(data)
        if not self._one.acquire(blocking=False):
            raise RefusedError(grpc.StatusCode.INTERNAL, "Another profiling session active.")  # both are upstream's
        try:
            self._stop.clear()
            self._session = request.session_id
            with stages.waiting(), tempfile.TemporaryDirectory() as folder:
                self._pause(request.opts.start_timestamp_ns / 1e9 - time.time(), waits)  # hosts may begin together
                tf.profiler.experimental.start(folder)
                try:
                    self._pause(request.opts.duration_ms / 1e3, waits)
                finally:
                    tf.profiler.experimental.stop()
                (path,) = Path(folder).rglob("*.xplane.pb")
                profile = path.read_bytes()
        finally:
            self._one.release()
        reply = ProfileResponse()
        space = reply.xspace if request.emit_xspace else XSpace()
        space.MergeFromString(profile)
        reply.empty_trace = not any(line.events for plane in space.planes for line in plane.lines)
        if not request.emit_xspace:
            reply.tool_data.add(name="xplane.pb", data=profile)
        return reply.SerializeToString()

    def _pause(self, seconds: float, waits: Callable[[], bool]) -> None:
        end = time.monotonic() + min(seconds, LONGEST)
        while (left := end - time.monotonic()) > 0 and waits() and not self._closed:
            if self._stop.wait(min(left, LOOK)):
                return

    def terminate(self, data: bytes, stages: Stages, until: float | None) -> bytes:
        """End a profile before its time; who asked for it gets what there is."""
        if TerminateRequest.FromString(data).session_id == self._session:
            self._stop.set()
        return b""

    def close(self) -> None:
        """End a profile, also one that is about to begin, for the server ends; who asked for it gets what there is."""
        self._closed = True
