"""From a trained model to a version that TensorFlow Serving, or a Keras program elsewhere, runs as it is.

`write` puts a candidate beside the versions, under a name that no server reads. It becomes a version, by renaming,
only in `publish`, after its served answers have been compared with the model in memory.
"""

import contextlib
import dataclasses
import fcntl
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from shared.run import Config


def write(endpoint: tf.Module, config: Config, task_name: str, request: Mapping[str, np.ndarray]) -> Path:
    """Save an endpoint as a candidate: SavedModel, warm-up requests, config; return its folder.

    Raises:
        OSError: the disk refuses; nothing is left behind.
    """
    base = Path(config.saved_models) / task_name
    base.mkdir(parents=True, exist_ok=True)
    candidate = Path(tempfile.mkdtemp(prefix=".candidate-", dir=base))
    candidate.chmod(0o755)  # a server may run as another user
    with removed_on_failure(candidate):
        # An endpoint that answers more than one kind of request names them all: signature -> function.
        signatures = getattr(endpoint, "signatures", {"serving_default": endpoint.__call__})
        save(endpoint, candidate, signatures)
        extra = candidate / "assets.extra"
        extra.mkdir()
        _write_warm_up(extra / "tf_serving_warmup_requests", task_name, request)
        settings = {"task": task_name, "config": dataclasses.asdict(config)}
        (extra / "config.json").write_text(json.dumps(settings, indent=1))
    return candidate


@contextlib.contextmanager
def removed_on_failure(candidate: Path) -> Iterator[None]:
    """What fails within this block leaves no candidate behind."""
    try:
        yield
    except BaseException:
        shutil.rmtree(candidate, ignore_errors=True)
        raise


def save(
    endpoint: tf.Module, folder: Path, signatures: Mapping[str, tf.types.experimental.PolymorphicFunction]
) -> None:
    """Write an endpoint's functions, each with an input signature, as a SavedModel that TensorFlow Serving restores.

    Where the endpoint has `defaults`, a map of inputs to values of one example, a Predict request over gRPC may leave
    these inputs of serving_default out.

    Raises:
        ValueError: a default is of no input, or an input without one comes after it.
    """
    saved = {name: function.get_concrete_function() for name, function in signatures.items()}
    state = _state(endpoint, saved.values())
    if defaults := getattr(endpoint, "defaults", None):
        specs = signatures["serving_default"].input_signature
        saved["serving_default"] = _with_defaults(saved["serving_default"], specs, defaults)
    tf.saved_model.save(state, str(folder), signatures=saved)


def _with_defaults(
    function: tf.types.experimental.ConcreteFunction, inputs: Sequence[tf.TensorSpec], defaults: Mapping[str, Any]
) -> tf.types.experimental.PolymorphicFunction:
    """A function whose arguments have batches of one for defaults: these TensorFlow writes into the signature."""
    specs = {spec.name: spec for spec in inputs}
    if unknown := sorted(set(defaults) - set(specs)):
        raise ValueError(f"there are defaults of {', '.join(unknown)}; expected of {', '.join(specs)} alone")

    def call(*given):
        return function(*given)

    none, kind = inspect.Parameter.empty, inspect.Parameter.POSITIONAL_OR_KEYWORD
    values = {name: tf.constant([value], specs[name].dtype) for name, value in defaults.items()}
    arguments = [inspect.Parameter(name, kind, default=values.get(name, none)) for name in specs]
    call.__signature__ = inspect.Signature(arguments)
    return tf.function(call, input_signature=inputs, autograph=False)


def publish(
    candidate: Path, *, model: keras.Model, task: ModuleType, report: Mapping[str, Any], about: Mapping[str, str]
) -> Path:
    """Add archive, metrics and model card to a candidate, and make it the next version; return its folder."""
    extra = candidate / "assets.extra"
    with removed_on_failure(candidate):
        model.save(extra / "model.keras")
        (extra / "metrics.json").write_text(json.dumps(report, indent=1))
        (extra / "card.md").write_text(card(model, task, report, about))
        while True:
            version = candidate.parent / str(max([0, *versions(candidate.parent)]) + 1)
            try:
                # Fails where another run has just published that number: a folder in use is never replaced.
                candidate.rename(version)
            except OSError:
                if not version.exists():
                    raise
            else:
                list_models(candidate.parent.parent)
                return version


def list_models(folder: Path) -> None:
    """Write `models.config`, by which TensorFlow Serving serves every model of a folder.

    Its base paths are absolute, as TensorFlow Serving wants them; a container mounts the folder at the same path.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)  # of runs that publish at once each lists what the one before added
        names = sorted(base.name for base in folder.iterdir() if base.is_dir() and versions(base))
        lines = [f'  config {{ name: "{name}" base_path: "{(folder / name).absolute()}" model_platform: "tensorflow" }}'
                 for name in names]  # fmt: skip
        part = folder / f".models.config-{os.getpid()}"
        part.write_text("\n".join(["model_config_list {", *lines, "}"]) + "\n")
        part.rename(folder / "models.config")
    finally:
        os.close(lock)


def versions(base: Path) -> dict[int, Path]:
    """Number -> folder of the versions below a model's folder, rising; as for TensorFlow Serving, 00003 is 3."""
    numbered = [child for child in sorted(base.glob("*")) if child.name.isdecimal() and child.is_dir()]
    found = {int(child.name): child for child in numbered if int(child.name) < 2**63}  # TensorFlow Serving reads int64
    return dict(sorted(found.items()))


def _state(endpoint: tf.Module, functions: Iterable[tf.types.experimental.ConcreteFunction]) -> tf.Module:
    """What an endpoint's functions use: TensorFlow's variables and tables, and nothing of Keras's.

    A Keras variable saved as such becomes two in the graph, of which TensorFlow Serving restores the one that the
    functions do not read (Keras 3.15, `_export_to_saved_model_graph`). Nor does a server need an optimizer's state.
    """
    parts = tf.train.TrackableView(endpoint).descendants()
    parts = [part.value if isinstance(part, keras.Variable) else part for part in parts]
    used = {id(variable) for function in functions for variable in function.graph.variables}
    state = tf.Module()
    state.variables_used = [part for part in parts if used & {id(one) for one in _copies(part)}]
    state.resources = [part for part in parts if isinstance(part, tf.saved_model.experimental.TrackableResource)]
    return state


def _copies(part: Any) -> list[Any]:
    """A part of an endpoint itself and, of a variable that lies on several devices, those that functions there read."""
    components = getattr(part, "values", ())
    return [part, *(components if isinstance(components, tuple) else ())]


def _write_warm_up(path: Path, task_name: str, request: Mapping[str, np.ndarray]) -> None:
    from shared.serving import client
    from shared.serving.protocol import PredictionLog

    count = len(next(iter(request.values())))
    with tf.io.TFRecordWriter(str(path)) as writer:
        for rows in (1, count):
            message = client.request(task_name, {name: value[:rows] for name, value in request.items()})
            log = PredictionLog()
            log.predict_log.request.CopyFrom(message)
            writer.write(log.SerializeToString())


def card(model: keras.Model, task: ModuleType, report: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """A model card (Mitchell et al. 2019) in Markdown, from what the run measured."""
    lines = [f"# {report['task']}", "", (task.__doc__ or "").strip().split("\n")[0], "", "## Results", ""]
    drawn = "folds" if report["folds"] else "test examples"
    lines += [f"Protocol: {report['protocol']}. Intervals: 95 %, bootstrap over the {drawn}.", ""]
    lines += ["Where all or none of the test examples are right, the interval is exact.", ""] * (not report["folds"])
    lines += ["| metric | this model | baseline | published |", "| --- | --- | --- | --- |"]
    for metric, value in report["test"].items():
        beside = report["baseline"].get(metric)
        lines.append(f"| {metric} | {_cell(value)} | {_cell(beside)} | {about.get(f'published {metric}', '')} |")
    if report["folds"]:
        own = ", ".join(f"{metric} {_cell(value)}" for metric, value in report["served_model"].items())
        lines += ["", f"These are of all folds. The model that is served here, {about['protocol']}: {own}."]
    lines += ["", "## Data", ""]
    lines += [f"* {key}: {value}" for key, value in about.items() if not key.startswith("published") and value]
    cost = report["cost"]
    lines += ["", "## Model and cost", ""]
    lines += [f"* {model.count_params():,} parameters; `model.keras` opens with `keras.saving.load_model`"]
    lines += [f"* trained for {cost['epochs']} epochs, of which {cost['best_epoch']} was best on validation"]
    lines += [f"* {cost['train_seconds'] / 60:.1f} minutes, {cost['examples_per_second']:,.0f} examples/s, "
              f"peak memory {cost['peak_bytes'] / 2**30:.2f} GiB"]  # fmt: skip
    lines += ["", "## Limits", "", about.get("limits", "")]
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, float] | None) -> str:
    return f"{value['value']:.4f} ({value['low']:.4f}-{value['high']:.4f})" if value else ""
