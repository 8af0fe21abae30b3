"""The start of a run: its folder, its seed, its precision, its devices."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import keras
import tensorflow as tf

from shared import data_service
from shared.run import Config, say
from shared.training import workers

# What may differ between a run and the one that goes on with it.
FREE = (
    "resume", "name", "runs", "saved_models", "checkpoint_every", "max_hours", "max_cost", "price_per_hour", "watts",
    "strategy", "threads", "data_service",
)  # fmt: skip


def begin(task_name: str, config: Config) -> Config:
    """Make or find the run's folder, then seed everything; return the config with the run's name.

    Raises:
        FileNotFoundError: there is no run to go on with.
        ValueError: the run to go on with had other settings; says which.
        ConnectionError: the data service cannot be reached.
        OSError: a folder cannot be written to, said before any work is done.
    """
    if config.max_cost and not config.price_per_hour:
        raise ValueError("--max-cost needs --price-per-hour: what an hour of this machine costs")
    if config.strategy == "auto" and workers.configured():
        config = dataclasses.replace(config, strategy="multiworker")
    if config.strategy == "multiworker" and not config.name:
        raise ValueError("many workers need one name for their run: give --name, the same to each")
    if config.threads:
        with contextlib.suppress(RuntimeError):  # TensorFlow is at work in this process already: it stays as it is
            tf.config.threading.set_intra_op_parallelism_threads(config.threads)
    if config.strategy == "multiworker":
        strategy("multiworker")  # before anything else of TensorFlow
    if config.data_service:
        data_service.check(config.data_service)
    name = config.name or (_newest(task_name, Path(config.runs)) if config.resume else _fresh(task_name, config))
    config = dataclasses.replace(config, name=name)
    for folder in (config.folder, Path(config.saved_models)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{os.getpid()}"
            probe.write_bytes(b"\0" * 4096)
            probe.unlink()
        except OSError as error:
            raise OSError(f"cannot write to {folder}: {error.strerror}; make room or name another folder") from error
    if workers.chief():
        _record(task_name, config)
    say("run", f"{config.folder}{' (going on)' if config.resume else ''}")

    keras.utils.set_random_seed(config.seed)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.mixed_precision.set_global_policy(_fastest() if config.precision == "auto" else config.precision)
    return config


@contextlib.contextmanager
def beginning(config: Config) -> Iterator[None]:
    """Loading and building: where they refuse, no folder of a new run stays, with its settings alone."""
    try:
        yield
    except Exception:
        found = {one.name for one in config.folder.glob("*")}
        if workers.chief() and not config.resume and found == {"config.json"}:
            shutil.rmtree(config.folder, ignore_errors=True)
        raise


def _record(task_name: str, config: Config) -> None:
    """Write down a new run's settings; of one that goes on, check that they are the same."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}
    record = config.folder / "config.json"
    if config.resume:
        if not record.exists():
            raise FileNotFoundError(f"there is no run in {config.folder} to go on with; leave out --resume")
        before = json.loads(record.read_text())["config"]
        changed = [f"{key} was {before.get(key)!r}, is {value!r}" for key, value in settings.items()
                   if before.get(key) != value]  # fmt: skip
        if changed:
            told = f"run {config.name} had other settings ({'; '.join(changed)}): give the same, or no --resume"
            raise ValueError(told)
    elif record.exists():
        raise ValueError(f"{config.folder} holds a run already: add --resume to go on with it, or choose another name")
    else:
        record.write_text(json.dumps({"task": task_name, "config": settings}, indent=1))


def _fastest() -> str:
    """The fastest precision that trains like float32 on this machine."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        able = all(
            tf.config.experimental.get_device_details(gpu).get("compute_capability", (0,))[0] >= 8 for gpu in gpus
        )
    else:
        info = Path("/proc/cpuinfo")
        able = info.exists() and bool({"avx512_bf16", "amx_bf16"} & set(info.read_text().split()))
    return "mixed_bfloat16" if able else "float32"


@functools.cache
def strategy(name: str = "auto") -> tf.distribute.Strategy:
    """The devices to train on; cached, for a second mirrored strategy in one process aborts on CPU.

    Args:
        name: "one" device, "mirrored" over all GPUs, or without GPUs over all logical CPUs, or "auto": mirrored
            where there is more than one GPU, "multiworker": all devices of all processes in TF_CONFIG or Slurm.
    """
    if name == "multiworker":
        return workers.join()
    gpus = tf.config.list_logical_devices("GPU")
    if name == "mirrored" or (name == "auto" and len(gpus) > 1):
        workers.mend()
        devices = gpus or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    return tf.distribute.get_strategy()


def _fresh(task_name: str, config: Config) -> str:
    name = stamp = f"{task_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    again = 1
    while (Path(config.runs) / name).exists():
        again += 1
        name = f"{stamp}-{again}"
    return name


def _newest(task_name: str, runs: Path) -> str:
    # By the time a run began: config.json is written once.
    found = sorted(runs.glob("*/config.json"), key=lambda record: record.stat().st_mtime)
    mine = [record.parent.name for record in found if json.loads(record.read_text())["task"] == task_name]
    if not mine:
        raise FileNotFoundError(f"no run of {task_name} is in {runs} to go on with; leave out --resume")
    return mine[-1]
