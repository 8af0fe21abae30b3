"""Which versions are served, without a server: versions here are empty folders, and what loads them is the test's."""

import shutil

import pytest
from conftest import until

from shared.serving.models import END, LOADING, ModelConfig, Models
from shared.serving.protocol import ModelServerConfig, ModelSpec
from shared.serving.refusal import RefusedError


class Version:
    """What answers, as far as `Models` looks at it."""

    def detach(self):
        return lambda: None


def load(name, number, folder):
    if (folder / "bad").exists():
        raise ValueError(f"{name} is bad")
    return Version()


def configured(root, *names):
    config = ModelServerConfig()
    for name in names:
        config.model_config_list.config.add(name=name, base_path=str(root / name), model_platform="tensorflow")
    return config


@pytest.fixture
def models(tmp_path):
    """Models that look at the disk when they are told to; `a` answers, `b` is bad."""
    (tmp_path / "a" / "1").mkdir(parents=True)
    (tmp_path / "b" / "1" / "bad").mkdir(parents=True)
    models = Models(configured(tmp_path, "a"), load, poll=-1, retry_seconds=60)
    models.refresh()
    models.wait(timeout=20)
    yield models
    models.stop()


def ended(models, name):
    return [one.state for one in models.status(ModelSpec(name=name)).model_version_status] == [END]


def test_what_failed_is_told_as_tensorflow_serving_tells_it(tmp_path, models):
    why = "did not become available: {{{name: b version: 1} due to error: UNKNOWN: b is bad}, }"
    models._retries = 0
    with pytest.raises(RefusedError) as error:
        models.configure(configured(tmp_path, "a", "b"))
    assert str(error.value) == f"1 model(s) {why}"
    first = Models(configured(tmp_path, "b"), load, retries=0)
    with pytest.raises(RefusedError) as error:
        first.wait()
    assert str(error.value) == f"1 servable(s) {why}"
    first.stop()


def test_a_request_reads_once_what_a_swap_replaces(models):
    class Swapped:
        """Each of its values is there when it is read first, and gone when it is read again."""

        def __init__(self, **values):
            self._values = values

        def __getattr__(self, name):
            return self._values.pop(name, {} if name == "labels" else None)

    version = Version()
    models._models = {"a": Swapped(latest=version)}
    assert models.find(ModelSpec(name="a")) is version
    models._models = {"a": Swapped(labels={"stable": 1}, served={1: version})}
    assert models.find(ModelSpec(name="a", version_label="stable")) is version


@pytest.mark.parametrize("path", ["gs://models/m", "/models/s3://m"])
def test_what_is_no_folder_is_refused_and_changes_nothing(tmp_path, models, path):
    config = configured(tmp_path, "a")
    config.model_config_list.config.append(ModelConfig(name="far", base_path=path, model_platform="tensorflow"))
    with pytest.raises(RefusedError, match=f"Model far has base_path {path}, but this server reads no URIs"):
        models.configure(config, timeout=2)
    assert list(models.served()) == ["a"]


@pytest.mark.parametrize("by", ["disk", "configuration"])
def test_a_version_that_goes_while_it_waits_for_its_next_try_ends(tmp_path, models, by):
    models.configure(configured(tmp_path, "a", "b"), awaited=False)
    version = models._models["b"].versions[1]
    until(lambda: version.again_at)
    assert version.state == LOADING
    if by == "disk":
        shutil.rmtree(tmp_path / "b" / "1")
        models.refresh()
    else:
        models.configure(configured(tmp_path, "a"))
    assert ended(models, "b")
    # What comes back in its place is a new one.
    shutil.rmtree(tmp_path / "b" / "1" / "bad", ignore_errors=True)
    (tmp_path / "b" / "1").mkdir(exist_ok=True)
    models.configure(configured(tmp_path, "a", "b"))
    models.wait(timeout=20)
    assert models.find(ModelSpec(name="b"))


def test_nothing_is_loaded_after_the_end(tmp_path, models):
    models.stop()
    (tmp_path / "a" / "2").mkdir()
    models.refresh()
    assert list(models.served()["a"]) == [1]
