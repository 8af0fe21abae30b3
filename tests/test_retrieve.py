"""recommendation.retrieve as a user meets it, and that nothing of the answer leaks into the question."""

import concurrent.futures
import dataclasses
import json
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT

from apps.recommendation import retrieve
from shared import export
from shared.data import ratings
from shared.serving import ask, checking
from shared.serving.client import Client, ServerError
from shared.serving.flags import Flags
from shared.serving.servable import Servable
from shared.serving.server import Server

SMALL = ("--batch=16", "--length=20", "--width=16", "--layers=1", "--epochs=2")


@pytest.fixture
def config(tmp_path):
    config = dataclasses.replace(retrieve.SMOKE, runs=str(tmp_path), name="run", length=4, ahead=2, batch=2)
    config.folder.mkdir()
    return config


def written(config, rows):
    path = config.folder / "mine.csv"
    path.write_text("user,item,timestamp\n" + "".join(f"{user},{item},{time}\n" for user, item, time in rows))
    return dataclasses.replace(config, data=str(path))


def rows(lengths, tie=1):
    return [(user, 10 * user + place, place // tie) for user, length in lengths.items() for place in range(length)]


def names(splits, indices):
    return [splits.names[index] for index in np.ravel(indices) if index >= 0]


def test_last_item_is_the_test_and_the_one_before_validation(config):
    splits = retrieve.load(written(config, rows({1: 8, 2: 3, 3: 2, 4: 4})))  # user 3 has too few to be tested
    for batches, back in ((splits.test, 1), (splits.validation, 2)):
        had, took = retrieve._questions(batches)
        assert names(splits, took) == [str(18 - back), str(23 - back), str(44 - back)]
        for row, (user, length) in enumerate({1: 8, 2: 3, 4: 4}.items()):
            assert names(splits, np.flatnonzero(had[row])) == [str(10 * user + at) for at in range(length - back)]
    learnt = set()
    for x, targets in splits.train:
        learnt |= set(names(splits, x["history"].numpy() - 1)) | set(names(splits, targets.numpy()))
    assert learnt == {"10", "11", "12", "13", "14", "15", "30", "31", "40", "41"}


def test_each_place_foresees_what_follows(config):
    splits = retrieve.load(written(config, rows({1: 9, 2: 9})))
    (x, targets), *_ = splits.train  # seven items to learn from, in windows of four from places 0 and 4
    assert names(splits, x["history"][0] - 1) == ["10", "11", "12", "13"]
    assert names(splits, targets[0, :, 0]) == ["11", "12", "13", "14"]
    assert names(splits, targets[0, :, 1]) == ["12", "13", "14", "15"]
    assert names(splits, x["history"][1] - 1) == ["14", "15"]
    assert names(splits, targets[1, :, 1]) == ["16"]
    assert names(splits, np.flatnonzero(x["before"][1])) == ["10", "11", "12", "13"]


def test_batches_are_a_function_of_the_step_and_shuffle_equal_times_only(config):
    config = dataclasses.replace(written(config, rows({1: 12, 3: 12}, tie=2)), length=12)
    stream = retrieve.load(config).stream
    first, again = (next(iter(stream(3)))[0]["history"].numpy() for _ in range(2))
    np.testing.assert_array_equal(first, again)
    seen = set()
    for (x, _), _ in zip(stream(0), range(20), strict=False):
        for history in x["history"].numpy():
            pairs = np.sort(((history[history > 0][:8] - 1) % 12).reshape(4, 2))
            np.testing.assert_array_equal(pairs, np.arange(8).reshape(4, 2))  # the pairs of one moment, in order
            seen.add(tuple(history))
    assert len(seen) > 4


def test_served_answers_are_the_measured_ones(config, tmp_path):
    """A client that tells the histories of the test gets lists with exactly the measured hit rate."""
    config = dataclasses.replace(config, length=20, batch=64, epochs=1)
    splits = retrieve.load(config)
    model = retrieve.build(config, splits)
    retrieve.train(config, model, splits)
    measured = retrieve.measure(config, model, splits)
    endpoint = retrieve.Endpoint(config, model, splits)
    tf.saved_model.save(endpoint, str(tmp_path / "1"), signatures=endpoint.__call__)
    serve = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    taken = ratings.read(config.folder / "u.data")
    pieces = [taken.items[begin : end - 1] for begin, end in zip(taken.starts, taken.starts[1:], strict=False)]
    targets = [taken.item_names[taken.items[end - 1]].encode() for end in taken.starts[1:]]
    history = np.full([len(pieces), max(map(len, pieces))], b"", object)
    for row, piece in enumerate(pieces):
        history[row, : len(piece)] = [taken.item_names[item].encode() for item in piece]
    answer = serve(user=tf.constant([""] * len(pieces)), history=tf.constant(history))
    lists = answer["top_items"].numpy()
    hits = [target in shown for target, shown in zip(targets, lists, strict=True)]
    assert np.mean(hits) == pytest.approx(measured["hr@10"].value, abs=1e-9)
    assert measured["hr@10"].value > 0.3
    for shown, row in zip(lists, history, strict=True):
        assert not set(shown) & set(row)

    known, stranger, both, nobody = (
        {key: value.numpy()[0] for key, value in serve(user=tf.constant([user]), history=tf.constant([items])).items()}
        for user, items in (("7", [""]), ("who", ["1", "2", "what"]), ("7", ["1"]), ("who", [""]))
    )
    assert (known["basis"], known["unknown"]) == (b"history", 0)
    assert (stranger["basis"], stranger["unknown"]) == (b"history", 2)
    assert (nobody["basis"], nobody["unknown"]) == (b"popularity", 1)
    assert not set(known["top_items"]) & set(history[6])
    assert b"1" not in both["top_items"]
    popularity = retrieve._questions(splits.test)[0].mean(0)
    np.testing.assert_allclose(nobody["top_scores"], np.sort(popularity)[::-1][:10], rtol=1e-5)
    assert serve(user=tf.constant([], tf.string), history=tf.zeros([0, 0], tf.string))["top_items"].shape == [0, 10]
    everything = serve(user=tf.constant([""]), history=tf.constant([taken.item_names]))  # nothing is left
    assert np.isneginf(everything["top_scores"]).all()
    assert set(everything["top_items"].numpy().ravel()) == {b""}
    two = serve(user=tf.constant([""]), history=tf.constant([taken.item_names[2:]]))
    assert set(two["top_items"].numpy()[0]) == {b"", *(name.encode() for name in taken.item_names[:2])}
    assert (two["top_labels"].numpy() == b"").sum() == 8


def test_of_very_many_items_popularity_alone_is_the_baseline(config, monkeypatch, capsys):
    splits = retrieve.load(config)
    retrieve.baseline(config, splits)
    both = capsys.readouterr().out
    monkeypatch.setattr(retrieve, "LARGE", len(splits.names) - 1)
    monkeypatch.setattr(np.linalg, "inv", None)
    found = retrieve.baseline(config, splits)
    said = capsys.readouterr().out
    assert "baseline   EASE, penalty" in both
    assert said == both.splitlines(keepends=True)[-2]  # before EASE
    assert f"popularity: ndcg@10 {found['ndcg@10'].value:.4f}" in said


@pytest.mark.parametrize("block", [7, 100_000])  # many blocks, the last not full and smaller than an answer; one
def test_streaming_index_is_exact_and_served(config, tmp_path, monkeypatch, block):
    monkeypatch.setattr(retrieve, "BLOCK", block)
    splits = retrieve.load(config)
    assert len(splits.names) % 7 not in (0, 6)
    model = retrieve.build(config, splits)
    model.get_layer("linear").set_weights([np.random.default_rng(1).normal(size=2 * [len(splits.names)])])
    user = tf.constant(["1", "2", "", "nobody"])
    history = tf.constant([["", ""], ["3", ""], ["5", "6"], ["", ""]])
    brute = retrieve.Endpoint(config, model, splits)(user, history)
    endpoint = retrieve.Endpoint(dataclasses.replace(config, index="streaming"), model, splits)
    export.save(endpoint, tmp_path / "1", {"serving_default": endpoint.__call__})
    version = Servable("retrieve", 1, tmp_path / "1")
    asked = version.bind("serving_default", {"user": user.numpy(), "history": history.numpy()})

    def ask():
        return dict(zip(version.outputs["serving_default"], version.run(*asked), strict=True))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # requests at the same time are nothing to one another
        answers = [future.result() for future in [pool.submit(ask) for _ in range(40)]]
    for answer in (endpoint(user, history), *answers):
        for name, wanted in brute.items():
            if name == "top_scores":
                np.testing.assert_allclose(answer[name], wanted, rtol=1e-5)
            else:
                np.testing.assert_array_equal(answer[name], wanted)
    # An empty batch, too.
    assert endpoint(tf.constant([], tf.string), tf.zeros([0, 0], tf.string))["top_items"].shape == [0, 10]


def test_user_and_history_may_be_left_out(config, tmp_path, capsys):
    splits = retrieve.load(config)
    endpoint = retrieve.Endpoint(config, retrieve.build(config, splits), splits)
    name = "recommendation.retrieve"
    export.save(endpoint, tmp_path / "models" / name / "1", {"serving_default": endpoint.__call__})
    users, histories = np.array([b"1", b"2", b"nobody"], object), np.array([[b"3", b""], [b"5", b"6"]], object)
    none = np.array([b""], object)
    with Server(Flags(models=str(tmp_path / "models"), port=-1, rest_api_port=-1)) as server:
        for address in (server.address, f"http://{server.rest_address}"):
            with Client(address) as asking:
                for left, whole in (
                    ({"user": users}, {"user": users, "history": none.repeat(3)[:, None]}),
                    ({"history": histories}, {"user": none.repeat(2), "history": histories}),
                    ({}, {"user": none, "history": none[:, None]}),
                ):
                    checking.compare(asking.predict(name, whole), asking.predict(name, left))
                with pytest.raises(ServerError, match="Incompatible shapes"):
                    asking.predict(name, {"user": users, "history": histories})
            for sent, basis in (({"user": "1"}, "history"), ({"history": "5,6"}, "history"), ({}, "popularity")):
                ask.ask(name, sent, address=address)
                assert f"basis      {basis}\n" in capsys.readouterr().out


def test_folder_to_answer_and_bad_data(forked, mistaken, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "u.data").write_text(retrieve.made_up(3))
    (tmp_path / "mine" / "u.item").write_text("1|The First (1995)|\n")
    done = forked("train", "recommendation.retrieve", "--data=mine", *SMALL)
    assert re.search(r"audit +[\d,]+ interactions of 200 users with \d+ items", done.stdout)
    assert "baseline   popularity: ndcg@10" in done.stdout
    assert "baseline   EASE, penalty" in done.stdout
    version = tmp_path / "saved_models" / "recommendation.retrieve" / "1"
    report = json.loads((version / "assets.extra" / "metrics.json").read_text())
    assert report["test"]["ndcg@10"]["value"] > report["baseline"]["ndcg@10"]["value"]
    again = forked("evaluate", "recommendation.retrieve", "--data=mine")
    value = f"{report['test']['ndcg@10']['value']:.4f}"
    assert re.search(rf"ndcg@10 +{value}", again.stdout)

    with checking.serving(tmp_path / "mine", "recommendation.retrieve", version) as server:
        ask.ask("recommendation.retrieve", {"user": "stranger", "history": ""}, address=server.address)
        printed = capsys.readouterr().out
        assert "basis      popularity" in printed
        assert "The First (1995)" in printed
        ask.ask("recommendation.retrieve", {"user": "", "history": "1, 2,no such item"}, address=server.address)
        printed = capsys.readouterr().out
        assert "basis      history" in printed
        assert "unknown    1" in printed
        assert "The First (1995)" not in printed

    for text, message in (
        ("user,item\n1,1\n1,2\n", "no user has three items"),
        ("user,item\n1,1\n1,2\n1,3\n1,4\n", "training examples do not fill one batch"),
    ):
        (tmp_path / "few.csv").write_text(text)
        assert message in mistaken("train", "recommendation.retrieve", "--data=few.csv", *SMALL).err
    refused = mistaken("train", "recommendation.retrieve", "--data=fashion-mnist").err
    assert "fashion-mnist holds no ratings; expected ml-100k" in refused
    refused = mistaken("train", "recommendation.retrieve", "--index=scann").err
    assert "--index=scann cannot run: ScaNN 1.4.2, the latest, is built for TensorFlow 2.20" in refused


def test_loss_leaves_out_what_the_user_had(config):
    config = dataclasses.replace(written(config, rows({1: 9, 2: 9})), ahead=1)
    splits = retrieve.load(config)
    model = retrieve.build(config, splits)
    x, targets = next(iter(splits.train))
    queries = tf.random.stateless_normal([*x["history"].shape, config.width], [1, 1])
    found = model.compute_loss(x=x, y=targets, y_pred={"queries": queries})
    vectors, expected = retrieve._vectors(model).numpy(), []
    for row, place in np.argwhere(targets.numpy()[:, :, 0] >= 0):
        logits = vectors @ queries.numpy()[row, place]
        had = np.flatnonzero(x["before"].numpy()[row]).tolist() + (x["history"].numpy()[row, : place + 1] - 1).tolist()
        logits[had] = -np.inf
        expected.append(np.log(np.exp(logits).sum()) - logits[targets[row, place, 0]])
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-5)


def test_a_compiled_step_is_the_same_step(config, monkeypatch):
    config = dataclasses.replace(written(config, rows({1: 9, 2: 9})), dropout=0.0, linear=0)
    splits = retrieve.load(config)

    def learned():
        keras.utils.set_random_seed(1)
        model = retrieve.build(config, splits)
        model.fit(splits.stream(0), steps_per_epoch=3, shuffle=False, verbose=0)
        return model.jit_compile, model.get_weights()

    plain = learned()
    monkeypatch.setattr(retrieve, "MANY", 1)
    compiled = learned()
    assert (plain[0], compiled[0]) == (False, True)
    for one, other in zip(plain[1], compiled[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_sampled_loss_is_corrected_for_frequency_and_accidental_hits(config):
    config = dataclasses.replace(written(config, [*rows({1: 9}), *((2, 10 + at, at) for at in range(9))]),
                                 loss="sampled", ahead=1)  # fmt: skip
    splits = retrieve.load(config)
    model = retrieve.build(config, splits)
    x, targets = next(iter(splits.train))
    queries = tf.random.stateless_normal([*x["history"].shape, config.width], [1, 1])
    found = model.compute_loss(x=x, y=targets, y_pred={"queries": queries})

    counts = np.ones(9)
    for _, following in splits.train:
        np.add.at(counts, following.numpy()[following.numpy() >= 0], 1)
    real = targets.numpy()[:, :, 0] >= 0
    chosen, asked = targets.numpy()[:, :, 0][real], queries.numpy()[real]
    logits = asked @ retrieve._vectors(model).numpy()[chosen].T - np.log(counts / counts.sum())[chosen]
    same = (chosen[:, None] == chosen) & ~np.eye(len(chosen), dtype=bool)
    logits[same] = -np.inf
    expected = np.log(np.exp(logits).sum(-1)) - np.diag(logits)
    assert float(found) == pytest.approx(expected.mean(), rel=1e-4)


def test_sampled_loss_learns(forked):
    done = forked("train", "recommendation.retrieve", "--loss=sampled", "--linear=0", "--rate=0.01",
                      "--index=streaming", *SMALL)  # fmt: skip
    losses = [float(value) for value in re.findall(r"val_loss ([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0]
    assert "over gRPC equal the model in memory" in done.stdout


def test_ease_is_the_regression_without_the_diagonal():
    had = np.random.default_rng(1).random((40, 6)) < 0.4
    scores = retrieve._ease(had, 5.0)
    x = had.astype(float)
    for item in range(6):
        others = np.delete(x, item, axis=1)
        weights = np.linalg.solve(others.T @ others + 5 * np.eye(5), others.T @ x[:, item])
        np.testing.assert_allclose(
            scores[:, item][~had[:, item]], (others @ weights)[~had[:, item]], rtol=1e-3, atol=1e-4
        )
    assert np.isneginf(scores[had]).all()


def test_no_other_process_sees_the_keras_flag():
    """Only recommendation has Keras 2 as tf.keras; a process that it starts, and every other task, has Keras 3."""
    holders = [path for folder in ("apps", "shared") for path in ROOT.glob(f"{folder}/**/*.py")
               if "LEGACY_KERAS" in path.read_text()]  # fmt: skip
    assert holders == [ROOT / "apps" / "recommendation" / "__init__.py"]
    look = (
        "import os, tensorflow as tf\n"
        "print(tf.keras.Model.__module__.split('.')[0], 'TF_USE_LEGACY_KERAS' in os.environ)"
    )
    code = (
        "import subprocess, sys\n"
        "from shared import command\n"
        "command._import('recommendation.retrieve')\n"  # as the command does it: TensorFlow first
        "import keras\n"
        "print(keras.Model.__module__.split('.')[0], keras.version()[0])\n"
        f"look = {look!r}\n"
        "exec(look, {})\n"
        "subprocess.run([sys.executable, '-c', look], check=True)\n"
    )
    done = subprocess.run([sys.executable, "-u", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["keras 3", "tf_keras False", "keras False"]
    assert keras.version().startswith("3.")
