"""The command `cornucopia`.

A task's flags are read from the head of its file, up to and with its Config, so that `list`, `--help` and a wrong
flag are answered without importing TensorFlow.
"""

import ast
import contextlib
import dataclasses
import gc
import importlib
import os
import platform
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import tyro

from shared import run

APPS = Path(importlib.util.find_spec("apps").origin).parent
USAGE = """usage: cornucopia COMMAND [TASK] [flags]

  list                    the tasks, one line each
  train TASK [flags]      raw data to a served answer: train, measure, export, serve, ask
  launch TASK [flags]     train in several processes of this machine: --workers=2
  tune TASK [flags]       search the fields that the task marks with a range: --trials=20 --method=bayesian --workers=2
  evaluate TASK [flags]   measure a saved version on other data (--data=PATH), or anew on its own
  ask TASK --INPUT=VALUE  one raw request to a running server (image and audio: a file; else the value itself)
  load TASK [flags]       load a running server: throughput, latency, and where the time of a request goes
                          (ask and load: --address=HOST:PORT for gRPC, http://HOST:PORT for REST)
  explain TASK --text=T   which parts of a text a saved model's answer rests on
  data-service [flags]    make training batches for trainings elsewhere, which read them with --data-service
  serve [flags]           serve models over TensorFlow Serving's protocols, with tensorflow_model_server's flags

cornucopia COMMAND [TASK] --help tells the flags."""


@dataclasses.dataclass(frozen=True)
class Server:
    address: str = "127.0.0.1:8500"  # HOST:PORT for gRPC; http://HOST:PORT or https://HOST:PORT for REST
    token: str = ""  # sent as "authorization: Bearer TOKEN"
    # for TLS, files in PEM: ROOT, against which the server's certificate is checked, or ROOT,KEY,CERTIFICATE where the
    # server asks who calls
    certificate: str = ""


@dataclasses.dataclass(frozen=True)
class Ask(Server):
    """One raw request to a running server. All other flags, as --NAME=VALUE, are inputs of the signature; an input
    that is named as a flag here cannot be given.
    """

    signature: str = "serving_default"  # of the model
    version: int = 0  # of the model; 0: the newest
    label: str = ""  # of a version, as the server's configuration names it
    timeout: float = 60.0  # seconds that the answer may take
    top: int = 0  # how many of a list of best answers to show; 0: all


@dataclasses.dataclass(frozen=True)
class Load(Server):
    """Load a running server and tell how much it bears. All other flags, as --NAME=VALUE, are inputs of the signature;
    without any, the model's warm-up request is sent, or zeros. Exit code 1: a request failed.
    """

    signature: str = ""  # of the model; empty: serving_default
    concurrency: int = 8  # callers that each wait for their answer before they ask again
    seconds: float = 10.0  # of which the first tenth, at most 1, is not counted
    rate: float = 0.0  # requests a second, sent when they are due whatever the server does; 0: callers as above
    batch: int = 1  # examples of one request: the same, repeated
    saved_models: str = "saved_models"  # folder of exported versions, for the warm-up request
    # a log of `cornucopia serve --request_log`: its requests are sent, and the answers compared with those recorded
    requests: str = ""


@dataclasses.dataclass(frozen=True)
class Launch:
    """Train a task in several processes of this machine. All other flags are the task's."""

    workers: int = 2  # processes
    name: str = ""  # of the run; empty: the task's name and the time
    runs: str = "runs"  # folder for logs, checkpoints and pictures of runs


@dataclasses.dataclass(frozen=True)
class DataService:
    """Make training batches for trainings elsewhere: a dispatcher, and workers. SIGTERM and Ctrl-C end it.

    It listens on every interface of the machine, without encryption, and runs whatever pipeline it is sent: keep its
    ports within a network that you trust.
    """

    host: str = "127.0.0.1"  # name or address by which trainings and other workers reach this machine
    port: int = 5050  # of the dispatcher; 0: any free one
    workers: int = 1  # to run in this process; each uses all cores; 0: the dispatcher alone
    worker_port: int = 0  # of the first worker, the others on the ports after it; 0: any free ones
    dispatcher: str = ""  # HOST:PORT of a dispatcher elsewhere, which the workers join; empty: one runs here


@dataclasses.dataclass(frozen=True)
class Tune:
    """Search for the best values, by validation, of the fields that a task marks with a range; the defaults are the
    first trial. All other flags are the task's (cornucopia train TASK --help); a marked field that is given stays so.
    """

    trials: int = 20  # in all, those of a search that goes on (--resume --name=NAME) included
    # bayesian: a Gaussian process of what was found; hyperband: many short trials, the best again with more epochs, up
    # to --epochs; random: nothing learned from trials.
    method: Literal["bayesian", "hyperband", "random"] = "bayesian"
    workers: int = 1  # trials at a time, each in a process of its own


@dataclasses.dataclass(frozen=True)
class Explain:
    """Show which parts of a text a saved model's answer rests on."""

    text: str  # what the model is asked
    version: int = 0  # which saved version; 0: the newest
    saved_models: str = "saved_models"  # folder of exported versions


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure a saved version on other data, or anew on its own."""

    # public data set by name, or a path; empty: the set that comes with the suite; left out: the test part of what the
    # version learned from
    data: str | None = None
    version: int = 0  # which saved version; 0: the newest
    saved_models: str = "saved_models"  # folder of exported versions
    runs: str = "runs"  # folder for pictures of the result
    on_error: str = "fail"  # what an unreadable example does: fail or skip


def tasks() -> list[str]:
    """Names of all tasks: `apps/DOMAIN/TASK.py` is DOMAIN.TASK."""
    files = sorted(APPS.glob("*/*.py"))
    return [f"{file.parent.name}.{file.stem}" for file in files if not file.stem.startswith("_")]


def head(task: str) -> type[run.Config]:
    """A task's Config, from the imports and the class alone, without the libraries that the rest of the file needs."""
    path = APPS / task.replace(".", "/")
    tree = ast.parse(path.with_suffix(".py").read_text())
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    used = {node.id for node in ast.walk(config) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    body = []
    for node in tree.body[: tree.body.index(config)]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [name for name in node.names if (name.asname or name.name).split(".")[0] in used]
            if node.names:
                body.append(node)
    # tyro reads the comments behind the fields from the source of the module that a class names.
    module = types.ModuleType(f"_head_of_{task.replace('.', '_')}")
    module.__file__ = str(path.with_suffix(".py"))
    sys.modules[module.__name__] = module
    exec(compile(ast.Module([*body, config], []), module.__file__, "exec"), vars(module))
    return module.Config


def main() -> None:
    """Run the command; a mistake of the user's ends in one line that says what to do, and exit code 2."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return
    command, rest = words[0], words[1:]
    commands = {"list": _list, "train": _train, "launch": _launch, "tune": _tune, "evaluate": _evaluate, "ask": _ask,
                "load": _load, "explain": _explain, "data-service": _data_service, "serve": _serve}  # fmt: skip
    if command not in commands:
        _refuse(f"unknown command {command}; one of {', '.join(commands)}")
    try:
        commands[command](rest)
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        if os.environ.get("CORNUCOPIA_TRACEBACK"):
            raise
        _refuse(f"{error}" if str(error) else repr(error))
    except KeyboardInterrupt:
        more = "; a training run goes on with --resume" if command in ("train", "launch", "tune") else ""
        _refuse(f"interrupted{more}", code=130)


def _refuse(message: str, *, code: int = 2) -> None:
    print(f"cornucopia: {message}", file=sys.stderr)
    raise SystemExit(code)


def _list(words: list[str]) -> None:
    for task in tasks():
        path = (APPS / task.replace(".", "/")).with_suffix(".py")
        print(f"{task:<26} {ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]}")


def _named(words: list[str], command: str) -> tuple[str, list[str]]:
    if words[:1] in (["--help"], ["-h"]):
        print(f"usage: cornucopia {command} TASK [flags]; cornucopia {command} TASK --help tells the flags\n\ntasks: "
              f"{', '.join(tasks())}")  # fmt: skip
        raise SystemExit
    if not words or words[0].startswith("-"):
        _refuse(f"cornucopia {command} needs a task: {', '.join(tasks())}")
    if words[0] not in tasks():
        _refuse(f"unknown task {words[0]}; one of {', '.join(tasks())}")
    return words[0], words[1:]


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep what native libraries write to stderr while they load: shown only where loading fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as notes:
        os.dup2(notes.fileno(), 2)
        try:
            yield
        except BaseException:
            notes.seek(0)
            os.write(kept, notes.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def onednn() -> None:
    """Have TensorFlow, when it is imported, compute by oneDNN, unless the environment says otherwise.

    By itself it does where the processor has AVX-512 VNNI or AMX. Elsewhere that makes training faster, and a server's
    small batches slower (CONTRIBUTING.md).
    """
    if platform.machine() in ("x86_64", "AMD64"):
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


@contextlib.contextmanager
def _lasting() -> Iterator[None]:
    """Leave what is imported here out of every collection of garbage: a million objects that stay to the end."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _without_keras() -> Iterator[None]:
    """Have TensorFlow, when it is imported, pass over Keras, for what runs none.

    It tries to import Keras and does as well without; with what Keras tries to import, scikit-learn and Matplotlib,
    that is a third of the time.
    """
    sys.modules.setdefault("keras", None)  # an import of it fails as if it were not installed
    try:
        yield
    finally:
        if sys.modules["keras"] is None:
            del sys.modules["keras"]


def _load_tensorflow() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    with _hushed(), _lasting():
        import tensorflow as tf

        tf.config.list_physical_devices()  # looks for GPUs, and notes at length where there are none


def _import(task: str) -> types.ModuleType:
    onednn()
    try:
        _load_tensorflow()
        with _lasting():
            return importlib.import_module(f"apps.{task}")
    except ImportError as error:
        domain = task.partition(".")[0]
        raise ImportError(f"{task} needs {error.name}: pip install 'cornucopia-suite[{domain}]'") from error


def _train(words: list[str]) -> None:
    task, words = _named(words, "train")
    flags = tyro.cli(head(task), args=words, prog=f"cornucopia train {task}", description=f"Train {task}.")
    module = _import(task)
    config = module.Config(**dataclasses.asdict(flags))
    run.run(task, module, config)


def _launch(words: list[str]) -> None:
    named = [place for place, word in enumerate(words) if word in tasks()]  # flags may stand before it
    at = (named or [place for place, word in enumerate(words) if not word.startswith("-")] or [0])[0]
    task, words = _named([*words[at : at + 1], *words[:at], *words[at + 1 :]], "launch")
    flags, rest = tyro.cli(Launch, args=words, prog=f"cornucopia launch {task}", return_unknown_args=True)
    if flags.workers < 1:
        _refuse(f"--workers={flags.workers} trains nothing; give 1 or more")
    tyro.cli(head(task), args=rest, prog=f"cornucopia launch {task}")  # a wrong flag is told once, and at once
    from shared import launch

    name = flags.name or f"{task}-{time.strftime('%Y%m%d-%H%M%S')}"
    raise SystemExit(launch.launch(task, rest, workers=flags.workers, runs=flags.runs, name=name))


def _tune(words: list[str]) -> None:
    task, words = _named(words, "tune")
    flags, rest = tyro.cli(Tune, args=words, prog=f"cornucopia tune {task}", return_unknown_args=True)
    if flags.trials < 1 or flags.workers < 1:
        _refuse(f"--trials={flags.trials} --workers={flags.workers} tries nothing; give 1 or more of both")
    kind = head(task)
    config = tyro.cli(kind, args=rest, prog=f"cornucopia tune {task}")
    if not run.marks(kind):
        able = [name for name in tasks() if run.marks(head(name))]
        _refuse(f"{task} marks no field with a range, so there is nothing to tune; {', '.join(able)} do")
    given = {word.partition("=")[0].lstrip("-").removeprefix("no-").replace("-", "_") for word in rest}
    fields = {name: mark for name, mark in run.marks(kind).items() if name not in given}
    if not fields:
        _refuse(f"every field that could be searched is given; leave out one of {', '.join(run.marks(kind))}")
    if not importlib.util.find_spec("keras_tuner"):
        raise ImportError("tune needs keras_tuner: pip install 'cornucopia-suite[tune]'")
    module = _import(task)
    from shared import tuning

    config = module.Config(**dataclasses.asdict(config))
    raise SystemExit(tuning.tune(task, module, config, fields=fields, words=words, **dataclasses.asdict(flags)))


def _evaluate(words: list[str]) -> None:
    task, words = _named(words, "evaluate")
    flags = tyro.cli(Evaluate, args=words, prog=f"cornucopia evaluate {task}")
    run.evaluate(task, _import(task), flags)


def _explain(words: list[str]) -> None:
    task, words = _named(words, "explain")
    flags = tyro.cli(Explain, args=words, prog=f"cornucopia explain {task}")
    module = _import(task)
    if not hasattr(module, "explain"):
        _refuse(f"{task} does not explain its answers; nlp.classify does")
    run.explain(task, module, flags)


def _serve(words: list[str]) -> None:
    from shared.serving import flags

    flags.parse(words)  # a wrong flag is answered before TensorFlow is loaded
    try:
        with _without_keras():
            _load_tensorflow()
        from shared.serving import server
    except ImportError as error:
        raise ImportError(f"serve needs {error.name}: pip install 'cornucopia-suite[serve]'") from error
    try:
        code = server.serve(words)
    except (ValueError, OSError) as error:
        _refuse(str(error), code=255)  # as tensorflow_model_server
    raise SystemExit(code)


def _data_service(words: list[str]) -> None:
    flags = tyro.cli(DataService, args=words, prog="cornucopia data-service")
    if flags.workers < bool(flags.dispatcher):
        _refuse(f"--workers={flags.workers} makes nothing; give 1 or more")
    onednn()  # batches are to be those that the training itself would make
    try:
        with _without_keras():
            _load_tensorflow()
    except ImportError as error:
        raise ImportError(f"data-service needs {error.name}: pip install 'cornucopia-suite[serve]'") from error
    from shared import data_service

    data_service.serve(**dataclasses.asdict(flags))


def _ask(words: list[str]) -> None:
    task, flags, values = _with_inputs(words, "ask", Ask)
    from shared.serving import ask

    options = _options(flags)
    options["version"] = flags.version or None
    options["top"] = flags.top or None
    ask.ask(task, values, **options)


def _load(words: list[str]) -> None:
    task, flags, values = _with_inputs(words, "load", Load)
    from shared.serving import load

    options = _options(flags)
    options["saved_models"] = Path(flags.saved_models)
    if not load.load(task, values, **options):
        raise SystemExit(1)


def _options(flags: Server) -> dict[str, Any]:
    return {**dataclasses.asdict(flags), "certificate": [path for path in flags.certificate.split(",") if path]}


def _with_inputs(words: list[str], command: str, kind: type) -> tuple[str, Any, dict[str, str]]:
    """A model's name, which need not be a task's; the flags of a kind; and all others, as the model's inputs."""
    task, words = (words[0], words[1:]) if words and not words[0].startswith("-") else _named(words, command)
    flags, rest = tyro.cli(kind, args=words, prog=f"cornucopia {command} {task}", return_unknown_args=True)
    values = {}
    for word in rest:
        name, equals, value = word.partition("=")
        if not (name.startswith("--") and equals):
            _refuse(f"cornucopia {command} takes inputs as --NAME=VALUE; {word} is none "
                    f"(cornucopia {command} {task} --help tells the other flags)")  # fmt: skip
        values[name.removeprefix("--").replace("-", "_")] = value
    return task, flags, values
