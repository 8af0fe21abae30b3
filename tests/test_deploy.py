"""What stands in deploy/, checked without a cluster: manifests against their schemas, scripts by running them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT

from shared.serving import flags

DEPLOY = ROOT / "deploy"


@pytest.mark.parametrize("version", ["1.29", "1.34"])
def test_manifests_fit_their_schemas(version):
    documents = list(yaml.safe_load_all((DEPLOY / "train-job.yaml").read_text()))
    assert [one["kind"] for one in documents] == ["Service", "Job"]
    for one in documents:
        kubernetes_validate.validate(one, version, strict=True)
    service, job = documents
    pod = job["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]  # gives pods the names that worker.sh makes
    environment = {one["name"]: one["value"] for one in pod["spec"]["containers"][0]["env"]}
    assert int(environment["WORKERS"]) == job["spec"]["completions"] == job["spec"]["parallelism"]


def test_compose_starts_a_server_with_flags_that_it_knows():
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["serving"]
    assert service["entrypoint"] == ["tensorflow_model_server"]
    assert service["init"]  # else it would not hear SIGTERM
    known = set(flags.Flags.__dataclass_fields__)
    assert {word.removeprefix("--").partition("=")[0] for word in service["command"]} <= known


@pytest.mark.parametrize("script", ["worker.sh", "train.sbatch"])
def test_scripts_are_clean(script):
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), DEPLOY / script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def stand_in(tmp_path):
    """A program that writes down how it was called, in place of cornucopia or srun."""
    log = tmp_path / "called"

    def make(name):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {log}\nprintf "%s" "$TF_CONFIG" > {log}.config\n')
        path.chmod(0o755)
        return {**os.environ, "PATH": f"{path.parent}:{os.environ['PATH']}"}, log

    return make


def record_a_run(folder):
    """What `run-1` leaves at its very start, before any checkpoint: a second start has to say --resume."""
    (folder / "runs" / "run-1").mkdir(parents=True)
    (folder / "runs" / "run-1" / "config.json").write_text("{}")


def test_a_worker_knows_all_workers_and_goes_on(tmp_path, stand_in):
    environment, log = stand_in("cornucopia")
    environment |= {"FOLDER": str(tmp_path), "WORKERS": "3", "TASK": "vision.classify", "JOB_COMPLETION_INDEX": "2",
                    "FLAGS": "--data=/data/a --name=run-1"}  # fmt: skip
    subprocess.run(["bash", DEPLOY / "worker.sh"], env=environment, check=True)
    wanted = ["train", "vision.classify", "--strategy=multiworker", "--data=/data/a", "--name=run-1"]
    assert log.read_text().split() == wanted
    config = json.loads(log.with_suffix(".config").read_text())
    assert config["task"] == {"type": "worker", "index": 2}
    assert config["cluster"]["worker"] == [f"cornucopia-train-{index}.cornucopia-train:2222" for index in range(3)]
    record_a_run(tmp_path)
    subprocess.run(["bash", DEPLOY / "worker.sh"], env=environment, check=True)
    assert log.read_text().split() == [*wanted, "--resume"]


def test_slurm_starts_a_worker_a_host(tmp_path, stand_in):
    environment, log = stand_in("srun")
    words = ["bash", DEPLOY / "train.sbatch", "vision.classify", "--name=run-1", "--data=a b"]
    subprocess.run(words, env=environment, check=True, cwd=tmp_path)
    program = [".venv/bin/cornucopia", "train", "vision.classify", "--strategy=multiworker"]
    assert log.read_text().splitlines() == [*program, "--name=run-1", "--data=a b"]
    record_a_run(tmp_path)
    subprocess.run(words, env=environment, check=True, cwd=tmp_path)
    assert log.read_text().splitlines() == [*program, "--name=run-1", "--data=a b", "--resume"]
    done = subprocess.run(words[:3], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "give --name" in done.stderr
