"""Processes that begin with TensorFlow imported, which takes 5 s.

Each is forked from one that has imported it and done nothing else, by the standard library's fork server.
"""

import gc
import multiprocessing
import os
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tensorflow", "keras", "shared.command"])


def start(function, *words, folder: Path, out: Path, err: Path | None = None, env: dict[str, str] | None = None):
    """Begin a process that calls a function in a folder and prints to files; its `multiprocessing.Process`."""
    out.touch()  # for who looks into it before it is there
    process = CONTEXT.Process(target=_within, args=(function, words, folder, out, err or out, env or {}))
    process.start()
    return process


def ended(process) -> int:
    """The exit code of a process, after five minutes that of a kill."""
    process.join(300)
    process.kill()
    process.join()
    return process.exitcode


def cornucopia(*words: str) -> None:
    """The command, as in a process of its own."""
    from shared import command

    sys.argv = ["cornucopia", *words]
    command.main()


def signalled(number: int, run: str, epoch: int, step: int, *words: str) -> None:
    """The command, which sends itself a signal in training: in the run of that name, after so many epochs and steps."""
    from shared.training import fitting

    after, sent = fitting._Keeper.on_train_batch_end, []

    def on_train_batch_end(self, batch, logs=None):
        after(self, batch, logs)
        if not sent and self.config.name == run and (self.epoch, self._before + batch + 1) >= (epoch, step):
            sent.append(number)
            os.kill(os.getpid(), number)

    fitting._Keeper.on_train_batch_end = on_train_batch_end
    cornucopia(*words)


def _within(function, words, folder, out, err, env):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(folder)
    os.environ.update(env)
    gc.freeze()  # as the command does what it imports
    function(*words)
