"""generative.write: tokens, the baseline, writing with a cache against the plain network, any prompt, any text."""

import dataclasses
import functools
import os
import re
import time
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from apps.generative import write
from shared import export
from shared.data import corpus
from shared.metrics import language
from shared.serving import ask, checking, client, load
from shared.serving.flags import Flags
from shared.serving.server import Server

LINES = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer é…\n"
SMALL = write.Config(batch=2, context=8, layers=2, heads=2, width=16, seed=3)


def settings(count=1, **changes):
    """A request without its prompt, the same for each of `count` rows."""
    given = {"max_tokens": 5, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 1, **changes}
    types = {"temperature": tf.float32, "top_p": tf.float32, "seed": tf.int64}
    return {name: tf.fill([count], tf.cast(value, types.get(name, tf.int32))) for name, value in given.items()}


@functools.cache
def made(tokens="characters", history=3):
    """Splits of a small text, and a network whose weights are all random: a fresh one finds all tokens equal."""
    config = dataclasses.replace(SMALL, tokens=tokens, vocabulary=40, history=history)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "_read", lambda config: (LINES * 20, {"data": "lines", "protocol": "the last tenth"}))
        splits = write.load(config)
    keras.utils.set_random_seed(5)
    model = write.build(config, splits)
    random = np.random.default_rng(7)
    model.set_weights([random.normal(0, 0.5, weight.shape) for weight in model.get_weights()])
    return config, splits, model, write.Endpoint(config, model, splits)


@pytest.mark.parametrize("xla", [False, True])
def test_a_batch_that_is_learned_in_parts_is_learned_as_a_whole(xla):
    config = dataclasses.replace(SMALL, batch=3, threads=0)
    _, splits, _, _ = made()
    ids = np.random.default_rng(1).integers(1, len(splits.names), [4, 3, 9], dtype=np.int32)
    learned = {}
    for sizes in ([3], [1, 2]):
        keras.utils.set_random_seed(5)
        model = write.build(config, splits)
        # Of other optimizers, rounding decides about small steps.
        model.compile(keras.optimizers.SGD(0.5), model.loss, jit_compile=xla and len(sizes) == 1)
        if len(sizes) > 1:
            model.train_step = write._in_parts(model, sizes, xla=xla)
        losses = [model.train_on_batch(batch[:, :-1], batch[:, 1:]) for batch in ids]
        learned[len(sizes)] = [losses, *model.get_weights()]
    for whole, parts in zip(learned[1], learned[2], strict=True):
        np.testing.assert_allclose(whole, parts, atol=1e-5)


def test_how_a_batch_is_cut(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    sizes = {(batch, threads): write._sizes(dataclasses.replace(SMALL, batch=batch, threads=threads))
             for batch, threads in ((16, 1), (6, 1), (2, 1), (16, 2), (16, 8), (16, 0))}  # fmt: skip
    assert sizes == {(16, 1): [4, 4, 4, 4], (6, 1): [2, 2, 1, 1], (2, 1): [1, 1], (16, 2): [8, 8], (16, 8): [16],
                     (16, 0): [16]}  # fmt: skip
    for changes in ({"backbone": "preset"}, {"strategy": "mirrored"}, {"strategy": "multiworker"}):
        config = dataclasses.replace(SMALL, **changes)
        assert (write._sizes(config), config.threads) == ([2], 0)


# Tokens.


def test_longest_match_by_hand():
    tokens = write.Tokens([b"a", b"b", b"ab", b"abc", "é".encode()])
    found = tokens(tf.constant(["abcab", "", "aab", "xaé", "cab"]))
    assert found.to_list() == [[4, 3], [], [1, 3], [0, 1, 5], [0, 3]]
    assert tokens.names == ("\ufffd", "a", "b", "ab", "abc", "é")
    assert list(tokens.characters) == [1, 1, 1, 2, 3, 1]
    assert tokens.text(tf.constant([[4, 5], [1, 1]])).numpy().tolist() == ["abcé".encode(), b"aa"]
    assert tokens(tf.constant([], tf.string)).shape[0] == 0


@pytest.mark.parametrize("tokens", ["characters", "bytes", "subwords"])
def test_text_survives_its_tokens(tokens):
    _, splits, _, _ = made(tokens)
    ids = splits.preprocess(tf.constant([LINES]))
    assert splits.preprocess.text(ids.values).numpy().decode() == LINES
    assert splits.preprocess.characters[ids.values.numpy()].sum() == len(LINES)
    count = {"characters": len(LINES), "bytes": len(LINES.encode())}
    assert len(ids.values) == count.get(tokens, len(ids.values))
    if tokens == "subwords":
        assert len(ids.values) < 0.8 * len(LINES)
        assert len(splits.names) <= 41


def test_half_a_character_is_told_as_such():
    tokens = write.Tokens([bytes([code]) for code in range(256)])
    half = tokens(tf.constant(["né"])).values[:-1]
    assert tokens.text(half).numpy().decode() == "n\ufffd"


def test_byte_pairs_by_hand():
    # Pairs: "lo" and "ow" 5 times each, of which the greater in the order of the alphabet goes first, then "low".
    assert write._byte_pairs("low low low lower lower", 2) == ["ow", "low"]
    assert write._byte_pairs("ab", 5) == []  # no pair is there twice


# The stream.


def test_windows_are_a_function_of_the_step_and_the_next_token_is_the_target():
    config, splits, _, _ = made()
    first, again, other = (next(iter(splits.stream(step))) for step in (4, 4, 5))
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])
    assert first[0].shape == (config.batch, config.context)
    np.testing.assert_array_equal(first[0][:, 1:], first[1][:, :-1])
    text = (LINES * 20)[: int(0.9 * len(LINES * 20))]
    assert all(row.decode() in text for row in splits.preprocess.text(first[0]).numpy())


def test_every_token_is_foretold_once_and_no_part_reaches_into_another():
    _, splits, _, _ = made()
    parts = [np.concatenate([y.numpy().ravel() for _, y in part]) for part in (splits.train, splits.validation)]
    test = np.concatenate([y.numpy().ravel() for _, y in splits.test])
    text, cut = LINES * 20, int(0.9 * len(LINES * 20))
    spelled = [splits.preprocess.text(part).numpy().decode() for part in (*parts, test)]
    assert spelled[1] + spelled[0] == text[1:cut]  # validation is the beginning
    assert spelled[2] == text[cut + 1 :]


# The baseline and the metric.


def test_witten_bell_by_hand():
    letters = {"a": 0, "b": 1}
    train, test = (np.array([letters[one] for one in text]) for text in ("aabab", "ab"))
    # Alone: a (3 + 2/2) / 7 = 4/7, b 3/7. After b, followed once, by a: (1 + 4/7) / 2. After a, by a once and by b
    # twice: (2 + 2 * 3/7) / 5.
    found = write.witten_bell(train, test, order=2)
    np.testing.assert_allclose(found, [(1 + 4 / 7) / 2, (2 + 2 * 3 / 7) / 5])
    np.testing.assert_allclose(write.witten_bell(train, test, order=1), [4 / 7, 3 / 7])


def test_witten_bell_shares_sum_to_one_after_any_history():
    random = np.random.default_rng(1)
    train = random.integers(0, 3, 60)
    total = sum(write.witten_bell(np.append(train, 0), np.array([0, 1, symbol]), order=3)[-1] for symbol in range(3))
    assert total == pytest.approx(1)


def test_loss_by_hand():
    found = language.loss(np.array([3.0, 1.0, 2.0]), np.array([2, 1, 1]))
    assert found.value == pytest.approx(6 / 4)
    assert found.low <= found.value <= found.high
    with pytest.raises(ValueError, match="no characters to measure on, in 1 windows"):
        language.loss(np.array([1.0]), np.array([0]))


def test_measured_loss_is_that_of_the_network(tmp_path):
    config, splits, model, _ = made()
    nats = [
        keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True).numpy().ravel()
        for x, y in splits.test
    ]
    config = dataclasses.replace(config, runs=str(tmp_path))
    found = write.measure(config, model, splits)
    assert found["loss"].value == pytest.approx(np.concatenate(nats).mean(), rel=1e-4)

    # `sliding_loss`, token by token: each is foretold from at least `context` tokens before it, where there are any.
    ids, after = (np.concatenate([part.numpy().ravel() for part in parts]) for parts in zip(*splits.test, strict=True))
    window, nats = config.context, []
    for place in range(len(ids)):
        begin = max(0, place // window - 1) * window
        logits = model(ids[None, begin : place + 1])[0, -1]
        nats.append(keras.losses.sparse_categorical_crossentropy(after[place], logits, from_logits=True))
    assert found["sliding_loss"].value == pytest.approx(np.mean(nats), rel=1e-4)
    assert abs(found["sliding_loss"].value - found["loss"].value) > 1e-3


# The network.


def test_network_sees_the_past_only_and_the_distance_alone():
    config, splits, model, _ = made(history=1)
    random = np.random.default_rng(1)
    ids = random.integers(1, len(splits.names), [1, 30])
    changed = ids.copy()
    changed[0, 20] = ids[0, 20] % (len(splits.names) - 1) + 1
    before, after = model(ids).numpy()[0], model(changed).numpy()[0]
    np.testing.assert_allclose(before[:20], after[:20], atol=1e-5)
    assert (np.abs(before[20:] - after[20:]).max(-1) > 1e-3).all()
    reach = config.layers * (config.context - 1) + 1
    np.testing.assert_allclose(model(ids[:, -reach:]).numpy()[0, -1], before[-1], atol=1e-4)


def test_a_network_that_learned_in_bfloat16_is_served_in_float32():
    config, splits, model, _ = made()
    config = dataclasses.replace(config, dropout=0.1)
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        coarse = write.build(config, splits)
        coarse.fit(splits.stream(0), steps_per_epoch=2, shuffle=False, verbose=0)
        coarse.set_weights([*model.get_weights(), *coarse.get_weights()[len(model.get_weights()) :]])
        ids = splits.preprocess(tf.constant([LINES])).to_tensor()
        assert np.abs(coarse(ids) - model(ids)).max() > 1e-3
        np.testing.assert_array_equal(write.Endpoint(config, coarse, splits).model(ids), model(ids))
    finally:
        keras.mixed_precision.set_global_policy("float32")


# Writing.


@pytest.mark.parametrize("tokens", ["characters", "subwords"])
@pytest.mark.parametrize("asked", [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 12, "top_p": 0.95}])
def test_writing_with_the_cache_equals_the_plain_network_token_by_token(tokens, asked):
    config, splits, model, endpoint = made(tokens)
    prompts = ["To be", "", "Whether 'tis nobler in the mind to suffer", "é"]
    given = settings(4, max_tokens=4 * config.context, **asked)  # the ring goes round some times
    answer = endpoint(tf.constant(prompts), **given)

    for row, prompt in enumerate(prompts):
        ids = splits.preprocess(tf.constant(["\n", prompt])).values.numpy().tolist()
        draws = tf.random.stateless_uniform([write.MOST], [1, 0])
        nats = []
        for place in range(4 * config.context):
            logits = model(np.array([ids]))[:, -1]
            one = {name: value[:1] for name, value in given.items() if name in ("temperature", "top_k", "top_p")}
            choose = write.chooser(**one, written=splits.preprocess.written)
            ids.append(int(choose(logits, draws[place : place + 1])[0]))
            nats.append(float(tf.nn.log_softmax(logits)[0, ids[-1]]))
            assert splits.preprocess.pieces[ids[-1]] == answer["tokens"][row, place], (prompt, place)
        assert float(answer["log_probability"][row]) == pytest.approx(np.mean(nats), abs=1e-4)
        assert splits.preprocess.text(ids[-4 * config.context :]) == answer["text"][row]


def test_an_answer_depends_on_its_own_row_alone():
    _, _, _, endpoint = made()
    prompts = tf.constant(["To", "Whether 'tis", "be"])
    asked = {name: tf.stack([value, value, value]) for name, value in {k: v[0] for k, v in settings().items()}.items()}
    asked |= {"max_tokens": tf.constant([3, 9, 0]), "seed": tf.constant([4, 5, 6], tf.int64)}
    together = endpoint(prompts, **asked)
    for row in range(3):
        alone = endpoint(prompts[row : row + 1], **{name: value[row : row + 1] for name, value in asked.items()})
        assert alone["text"][0] == together["text"][row]
        assert float(alone["log_probability"][0]) == pytest.approx(float(together["log_probability"][row]), abs=1e-5)
    assert together["tokens"].shape == [3, 9]
    assert together["text"][2] == b""
    assert tf.strings.reduce_join(together["tokens"], -1).numpy().tolist() == together["text"].numpy().tolist()
    other = endpoint(prompts, **{**asked, "seed": tf.constant([4, 50, 6], tf.int64)})
    assert other["text"][0] == together["text"][0]
    assert other["text"][1] != together["text"][1]


def test_choice_by_hand():
    logits = tf.math.log([[0.0001, 0.5, 0.1, 0.3, 0.0999]])  # id 0 is never written

    def chosen(draw, temperature=1.0, top_k=0, top_p=1.0):
        at = [tf.constant([value]) for value in (temperature, top_k, top_p)]
        return int(write.chooser(*at, tf.range(5) > 0)(logits, tf.constant([draw]))[0])

    assert [chosen(draw) for draw in (0.0, 0.49, 0.51, 0.79, 0.81, 0.89, 0.91, 0.9999999)] == [1, 1, 3, 3, 2, 2, 4, 4]
    assert [chosen(draw, temperature=0.0) for draw in (0.0, 0.9999999)] == [1, 1]
    assert [chosen(draw, top_k=2) for draw in (0.6, 0.64, 0.9999999)] == [1, 3, 3]  # of 0.5 and 0.3, 1 has 0.625
    assert [chosen(draw, top_p=0.7) for draw in (0.6, 0.64, 0.9999999)] == [1, 3, 3]  # 0.5 is not enough, 0.8 is
    assert chosen(0.9999999, top_p=0.4) == 1  # the most probable always stays
    assert chosen(0.9999999, temperature=0.01) == 1
    assert chosen(0.0, temperature=0.0) == 1


def test_any_prompt_is_answered_and_any_bad_setting_refused():
    _, _, _, endpoint = made()
    odd = ["", "\n\n", "🦜🦜 to", "to be " * 10_000, "\x00"]
    answer = endpoint(tf.constant(odd), **settings(5))
    assert answer["unknown"].numpy().tolist() == [0, 0, 8, 0, 1]
    same = endpoint(tf.constant([" to", ("to be " * 10_000)[-100:]]), **settings(2))
    assert answer["text"][2] == same["text"][0]  # what cannot be read is passed over
    assert answer["text"][3] == same["text"][1]  # what no layer can see makes no difference
    assert endpoint(tf.constant([], tf.string), **settings(0))["tokens"].shape == [0, 0]
    for wrong, message in [
        ({"max_tokens": -1}, "max_tokens must be 0 to 4096"), ({"max_tokens": 5000}, "max_tokens must be"),
        ({"temperature": -0.1}, "temperature must be"), ({"temperature": float("nan")}, "temperature must be"),
        ({"top_k": -1}, "top_k must be"), ({"top_p": 0.0}, "top_p must be"), ({"top_p": 1.1}, "top_p must be"),
    ]:  # fmt: skip
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            endpoint(tf.constant(["to"]), **settings(**wrong))


# Scoring.


def test_scores_are_those_of_the_network_and_of_what_it_writes():
    config, splits, model, endpoint = made()
    texts = ["To be", "", "so that 🦜", "t"]  # none is longer than a window
    scored = endpoint.score(tf.constant(texts))
    assert scored["unknown"].numpy().tolist() == [0, 0, 4, 0]
    for row, text in enumerate(texts):
        ids = splits.preprocess(tf.constant(["\n" + text])).values
        ids = ids[ids > 0]
        gained = tf.gather(tf.nn.log_softmax(model(ids[None])[0, :-1]), ids[1:], axis=1, batch_dims=1)
        assert int(scored["tokens"][row]) == len(gained)
        mean = float(tf.reduce_mean(gained)) if len(gained) else 0
        assert float(scored["log_probability"][row]) == pytest.approx(mean, abs=1e-4)

    written = endpoint(tf.constant([""]), **settings(max_tokens=config.context))
    again = endpoint.score(written["text"])
    assert float(again["log_probability"][0]) == pytest.approx(float(written["log_probability"][0]), abs=1e-4)


def test_long_texts_are_scored_window_by_window():
    config, splits, model, endpoint = made()
    text = LINES * 3
    ids = splits.preprocess(tf.constant(["\n" + text])).values.numpy()
    gained = []
    for at in range(0, len(ids) - 1, config.context):
        begin = max(0, at - config.context)
        shares = tf.nn.log_softmax(model(ids[None, begin : at + config.context])[0]).numpy()
        targets = ids[at + 1 : at + 1 + config.context]
        gained += [shares[at - begin + place, target] for place, target in enumerate(targets)]
    scored = endpoint.score(tf.constant(["to", text]))
    assert scored["tokens"].numpy().tolist() == [2, len(text)]
    assert float(scored["log_probability"][1]) == pytest.approx(np.mean(gained), abs=1e-4)
    assert float(endpoint.score(tf.constant(["to"]))["log_probability"][0]) == pytest.approx(
        float(scored["log_probability"][0]), abs=1e-4
    )


def test_both_signatures_are_served(tmp_path, capsys):
    config, splits, _, endpoint = made()
    config = dataclasses.replace(config, saved_models=str(tmp_path))
    folder = export.write(endpoint, config, "generative.write", splits.request)
    (tmp_path / "tree").mkdir()
    with (
        checking.serving(tmp_path / "tree", "generative.write", folder) as running,
        client.Client(running.address) as asking,
    ):
        answer = asking.predict("generative.write", splits.request)
        scored = asking.predict("generative.write", {"text": np.array([b"To be"], object)}, signature="score")
        assert set(asking.inputs("generative.write", signature="score")) == {"text"}
        ask.ask("generative.write", {"text": "To be"}, address=running.address, signature="score")
        assert "tokens     5" in capsys.readouterr().out
        with pytest.raises(ValueError, match="has no signature sing; one of score, serving_default"):
            ask.ask("generative.write", {"text": "To be"}, address=running.address, signature="sing")
    assert answer["text"].tolist() == endpoint(**splits.request)["text"].numpy().tolist()
    expected = endpoint.score(tf.constant(["To be"]))["log_probability"]
    np.testing.assert_allclose(scored["log_probability"], expected, atol=1e-4)


def test_what_is_left_out_has_its_default(tmp_path, capsys):
    _, _, _, endpoint = made()
    assert endpoint.defaults == {"max_tokens": 200, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 0}
    export.save(endpoint, tmp_path / "generative.write" / "1", endpoint.signatures)
    name, prompts = "generative.write", np.array([b"To be", b"", "é".encode()], object)
    given = settings(3, max_tokens=200, temperature=0.8, seed=0)
    expected = endpoint(tf.constant(prompts), **given)["text"].numpy().tolist()
    with Server(Flags(models=str(tmp_path), port=-1, rest_api_port=-1)) as server:
        for address in (server.address, f"http://{server.rest_address}"):
            with client.Client(address) as asking:
                assert asking.defaults(name)["temperature"].tolist() == [np.float32(0.8)]
                assert asking.defaults(name, signature="score") == {}
                for batch in (None, 2):
                    assert asking.predict(name, {"prompt": prompts}, batch=batch)["text"].tolist() == expected
                everything = {"prompt": prompts, **{key: value.numpy() for key, value in given.items()}}
                assert asking.predict(name, everything)["text"].tolist() == expected
                some = asking.predict(name, {"prompt": prompts, "max_tokens": [3], "seed": [0, 1, 2]})
                assert some["tokens"].shape == (3, 3)
                with pytest.raises(client.ServerError, match="Incompatible shapes"):
                    asking.predict(name, {"prompt": prompts, "seed": [1, 2]})
                with pytest.raises(client.ServerError, match="prompt"):
                    asking.predict(name, {"max_tokens": [3]})
            ask.ask(name, {"prompt": "To be"}, address=address)
            assert expected[0].decode().splitlines()[0] in capsys.readouterr().out
            with pytest.raises(ValueError, match=r"\[--max_tokens=VALUE\] --prompt=VALUE .*; prompt is missing$"):
                ask.ask(name, {"seed": "1"}, address=address)
            assert load.load(name, {"prompt": "To be"}, address=address, seconds=0.2, batch=2, concurrency=1)
            assert "errors     none" in capsys.readouterr().out


def test_defaults_that_fit_no_inputs(tmp_path, monkeypatch):
    _, _, _, endpoint = made()
    for defaults, message in (({"length": 1}, "defaults of length; expected of prompt, max_tokens"),
                              ({"prompt": ""}, "non-default argument follows")):  # fmt: skip
        monkeypatch.setattr(write.Endpoint, "defaults", defaults)
        with pytest.raises(ValueError, match=message):
            export.save(endpoint, tmp_path / "1", endpoint.signatures)


# Backbones.


def preset(folder, kind="GPT2", extra=3, layers=2):
    """Write a KerasHub preset of a tiny network with all bytes for tokens, some pairs and marks, and random weights;
    it has some outputs more than there are tokens.
    """
    import keras_hub

    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves (GPT-2's table)
    letters = [chr(code) for code in letters] + [chr(256 + rest) for rest in range(256 - len(letters))]
    merges = ["t h", "th e", "Ġ the", "i n", "e r", "o u", "Ġ t"]
    marks = ["<|endoftext|>", "<s>", "</s>", "<pad>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>",
             "<|start_header_id|>", "<|end_header_id|>"]  # fmt: skip
    vocabulary = {token: at for at, token in enumerate([*letters, *marks, *(pair.replace(" ", "") for pair in merges)])}
    names = {part: getattr(keras_hub.models, kind + part)
             for part in ("Backbone", "CausalLM", "Tokenizer", "CausalLMPreprocessor")}  # fmt: skip
    sizes = {"num_layers": layers, "hidden_dim": 16, "intermediate_dim": 32, "vocabulary_size": len(vocabulary) + extra}
    sizes |= {"num_query_heads": 4, "num_key_value_heads": 2} if kind == "Llama3" else {"num_heads": 2}
    sizes |= {} if kind == "Llama3" else {"max_sequence_length": 64}
    backbone = names["Backbone"](**sizes)
    random = np.random.default_rng(7)
    for weight in backbone.weights:
        weight.assign(random.normal(0, 0.4, weight.shape))
    own = names["CausalLMPreprocessor"](names["Tokenizer"](vocabulary=vocabulary, merges=merges), sequence_length=32)
    names["CausalLM"](backbone, own).save_to_preset(folder)
    return str(folder)


def from_backbone(tmp_path, kind="GPT2", **changes):
    (tmp_path / "lines.txt").write_text(LINES * 20)
    config = write.Config(data=str(tmp_path / "lines.txt"), backbone=preset(tmp_path / kind, kind), context=16, batch=4)
    config = dataclasses.replace(config, **changes)
    splits = write.load(config)
    return config, splits, write.build(config, splits)


def test_a_backbones_tokens_are_those_of_its_tokenizer(tmp_path):
    import keras_hub

    texts = ["the thing in the house\n\n  and é 🙂", "", " \n", "  the", "a\t\tb  ", "they'll: 12 34"]
    tokens = write._of_backbone(preset(tmp_path / "preset"))
    own = keras_hub.models.CausalLMPreprocessor.from_preset(str(tmp_path / "preset")).tokenizer
    assert tokens(tf.constant(texts)).to_list() == own(texts)  # by a library outside the graph
    for text in [*texts, "a mark, <|endoftext|>, is text where a text spells it"]:
        ids, unknown = tokens.read(tf.constant([text]))
        assert tokens.text(ids.values).numpy().decode() == text
        assert tokens.characters[ids.values.numpy()].sum() == len(text)
        assert not tf.reduce_any(~tf.gather(tokens.written, ids.values))
        assert unknown[0] == 0
    assert tokens.text(tokens(tf.constant([b"caf\xe9"])).values).numpy().decode() == "caf\ufffd"
    ids, unknown = tokens.read(tf.constant(["a\x00b", "६ six"]))
    assert tokens.text(ids.to_tensor()[0, :2]) == b"ab"
    assert unknown.numpy().tolist() == [1, 3]
    assert tokens.start.numpy().tolist() == [own.token_to_id("<|endoftext|>")]


@pytest.mark.parametrize("kind", ["GPT2", "OPT", "Llama3"])
def test_a_backbone_writes_with_its_cache_as_without_token_by_token(tmp_path, kind):
    config, splits, model = from_backbone(tmp_path, kind)
    endpoint = write.Endpoint(config, model, splits)
    asked = {"max_tokens": [20, 9, 0, 13], "temperature": [0, 0.9, 1, 1.2], "top_k": [0, 12, 0, 0],
             "top_p": [1, 0.95, 1, 0.8], "seed": [1, 2, 3, 4]}  # fmt: skip
    types = {name: value.dtype for name, value in settings().items()}
    given = {name: tf.cast(values, types[name]) for name, values in asked.items()}
    prompts = ["To be", "", "thé 🙂", LINES]  # of the last there is room for a part
    plain = tf.function(model, input_signature=[tf.TensorSpec([None, None], tf.int32)])
    answer = endpoint(tf.constant(prompts), **given)
    for row, prompt in enumerate(prompts):
        count = asked["max_tokens"][row]
        ids = [*splits.preprocess.start.numpy(), *splits.preprocess(tf.constant([prompt])).values.numpy()]
        ids = ids[-(endpoint.span - count) :]
        draws = tf.random.stateless_uniform([write.MOST], [asked["seed"][row], 0])
        nats = []
        for place in range(count):
            logits = plain(np.array([ids], np.int32))[:, -1]
            one = {name: given[name][row : row + 1] for name in ("temperature", "top_k", "top_p")}
            choose = write.chooser(**one, written=splits.preprocess.written)
            ids.append(int(choose(logits, draws[place : place + 1])[0]))
            nats.append(float(tf.nn.log_softmax(logits)[0, ids[-1]]))
            assert splits.preprocess.pieces[ids[-1]] == answer["tokens"][row, place], (prompt, place)
        assert float(answer["log_probability"][row]) == pytest.approx(np.mean(nats) if nats else 0, abs=1e-4)
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"max_tokens must be 0 to {endpoint.most}"):
        endpoint(tf.constant(["to"]), **settings(max_tokens=endpoint.most + 1))


def test_lora_changes_its_own_weights_alone_and_is_served(tmp_path):
    config, splits, model = from_backbone(tmp_path, lora=2)
    before = {weight.path: weight.numpy() for weight in model.weights}
    model.fit(splits.stream(0), steps_per_epoch=3, shuffle=False, verbose=0)
    changed = {weight.path for weight in model.weights if not np.array_equal(before[weight.path], weight.numpy())}
    assert changed == {path for path in before if "lora" in path}
    assert len(changed) == 2 * 2 * 2  # of two layers the queries and the values, two factors each
    endpoint = write.Endpoint(config, model, splits)
    ids = splits.preprocess(tf.constant([LINES])).to_tensor()[:, :60]
    np.testing.assert_allclose(endpoint.model(ids), model(ids), atol=1e-5)
    assert not any("lora" in weight.path for weight in endpoint.model.weights)
    scored = endpoint.score(tf.constant(["To be", ""]))
    gained = tf.nn.log_softmax(model(endpoint._read(tf.constant(["To be"]))[0].to_tensor())[0])
    ids = splits.preprocess(tf.constant(["To be"])).values
    expected = tf.reduce_mean(tf.gather(gained[:-1], ids, axis=1, batch_dims=1))
    assert float(scored["log_probability"][0]) == pytest.approx(float(expected), abs=1e-4)


def test_a_backbone_from_a_preset_to_a_served_answer_and_another_text(tmp_path, cornucopia, forked, serving):
    preset(tmp_path / "preset", layers=1)
    (tmp_path / "lines.txt").write_text(LINES * 20)
    flags = ("--backbone=preset", "--data=lines.txt", "--lora=2", "--context=16", "--batch=4", "--epochs=1")
    done = forked("train", "generative.write", *flags)
    assert "8 answers over gRPC equal the model in memory" in done.stdout
    graph = (tmp_path / "saved_models" / "generative.write" / "1" / "saved_model.pb").read_bytes()
    assert b"MutableHashTable" not in graph  # nothing that grows with what a server is sent
    with serving() as address:
        words = ("--prompt=To be 🙂", "--max-tokens=7", "--temperature=0", "--top-k=0", "--top-p=1", "--seed=1")
        done = cornucopia("ask", "generative.write", *words, f"--address={address}")
        assert re.search(r"^unknown +0$", done.stdout, re.MULTILINE)
    (tmp_path / "other.txt").write_text("Sein oder Nichtsein, das ist hier die Frage. 🙂\n" * 3)
    done = forked("evaluate", "generative.write", "--data=other.txt")
    assert "version 1 on other.txt: all of it, 141 characters in windows of 16 tokens\n" in done.stdout
    assert "Warning" not in done.stderr


def test_backbones_that_are_not_taken(tmp_path):
    import keras_hub

    with pytest.raises(FileNotFoundError, match=r"--backbone=.*nowhere holds no config\.json; expected a folder"):
        write._of_backbone(str(tmp_path / "nowhere"))
    sizes = {"num_layers": 1, "num_heads": 1, "hidden_dim": 4, "intermediate_dim": 4}
    keras_hub.models.BertBackbone(vocabulary_size=9, **sizes).save_to_preset(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"(?s)encoder writes no text.*expected the preset of a causal language model"):
        write._of_backbone(str(tmp_path / "encoder"))
    with pytest.raises(ValueError, match=r"GPTNeoXCausalLM answers otherwise with its cache than without, by"):
        from_backbone(tmp_path, "GPTNeoX")
    with pytest.raises(ValueError, match="--context=65: the backbone reads 64 tokens at most"):
        from_backbone(tmp_path, context=65, batch=1)
    with pytest.raises(ValueError, match="--lora=2 is for a backbone; give --backbone=FOLDER"):
        write.build(dataclasses.replace(SMALL, lora=2), made()[1])


# Texts of other people.


@pytest.mark.parametrize("tokens", ["characters", "bytes", "subwords"])
def test_a_saved_model_is_measured_on_another_text_in_its_own_tokens(tmp_path, tokens):
    config, splits, model, endpoint = made(tokens)
    text = "To sleep, perchance to dream ß 🙂 aye!"
    (tmp_path / "other.txt").write_text(text)
    other = write.load_other(dataclasses.replace(config, data=str(tmp_path / "other.txt")), splits.names)
    assert other.names == splits.names
    known = endpoint._read(tf.constant([text]))[0].values.numpy()[1:]
    ids = np.concatenate([token_ids.numpy().ravel() for token_ids, _ in other.test])
    np.testing.assert_array_equal(ids, known[:-1])  # the endpoint passes over the same
    told = f"all of it, {len(text)} characters in windows of 8 tokens"
    if tokens != "bytes":
        told += "; 12 bytes that no token of the model fits were passed over"  # p, p, c, c, ß, 🙂, y, !
    assert other.about["protocol"] == told
    config = dataclasses.replace(config, runs=str(tmp_path))
    nats = -float(write.measure(config, model, other)["loss"].value)
    assert -12 < nats < 0
    assert (tmp_path / "places.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.txt").write_text("ß")
    if tokens != "bytes":
        with pytest.raises(ValueError, match=r"the model can read 0 tokens of .*other\.txt; give a longer text in its"):
            write.load_other(dataclasses.replace(config, data=str(tmp_path / "other.txt")), splits.names)


def test_evaluate_on_another_alphabet_and_on_the_text_it_learned_from(tmp_path, forked):
    (tmp_path / "lines.txt").write_text(LINES * 20)
    (tmp_path / "other.txt").write_text("Größe: to be 🙂\n" * 20)
    forked("train", "generative.write", "--data=lines.txt", "--epochs=1", "--batch=8", "--context=16", "--layers=1",
               "--heads=2", "--width=16")  # fmt: skip
    done = forked("evaluate", "generative.write", "--data=other.txt")
    told = "on other.txt: all of it, 300 characters in windows of 16 tokens; 180 bytes that no token of the model fits"
    assert told in done.stdout
    done = forked("evaluate", "generative.write", "--data=lines.txt")
    assert "on lines.txt: the last tenth, 176 characters in windows of 16 tokens\n" in done.stdout


def test_corpus_of_files_folders_and_archives(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "b.txt").write_bytes(b"two\r\nlines")
    (tmp_path / "book" / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "book" / "cover.png").write_bytes(b"\x89PNG")
    assert corpus.read(tmp_path / "book", on_error="fail") == ("one\ntwo\nlines", [])
    with zipfile.ZipFile(tmp_path / "book.zip", "w") as archive:
        for name in ("b.txt", "a.txt"):
            archive.write(tmp_path / "book" / name, name)
    assert corpus.read(tmp_path / "book.zip", on_error="fail")[0] == "one\ntwo\nlines"
    assert corpus.read(tmp_path / "book" / "b.txt", on_error="fail")[0] == "two\nlines"
    (tmp_path / "book" / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"(?s)1 of 3 files .* cannot be read.*c\.txt: not UTF-8 .* at byte 3"):
        corpus.read(tmp_path / "book", on_error="fail")
    text, left = corpus.read(tmp_path / "book", on_error="skip")
    assert text == "one\ntwo\nlines"
    assert left[0].startswith("c.txt: not UTF-8")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        corpus.read(tmp_path / "nothing", on_error="fail")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no text below"):
        corpus.read(tmp_path / "none", on_error="fail")
    (tmp_path / "blank").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        corpus.read(tmp_path / "blank", on_error="fail")


@pytest.mark.skipif(not Path(os.environ.get("CORNUCOPIA_DATA", "/nowhere")).is_dir(), reason="no public data here")
def test_shakespeare_has_its_published_size():
    config = write.Config(data="tinyshakespeare")
    text, _ = write._read(config)
    assert (len(text), len(set(text)), text.count("\n")) == (1_115_394, 65, 40_000)
    splits = write.load(config)
    assert "111,540 characters" in splits.about["protocol"]
    assert sum(int((targets >= 0).numpy().sum()) for _, targets in splits.test) == 111_539  # all but the first


def test_data_that_cannot_be_learned_from(tmp_path):
    with pytest.raises(ValueError, match="fashion-mnist is no running text; expected tinyshakespeare, or the path"):
        write.load(dataclasses.replace(SMALL, data="fashion-mnist"))
    (tmp_path / "short.txt").write_text("to be")
    with pytest.raises(ValueError, match="a text of 5 characters is too short for --batch=2 and --context=8"):
        write.load(dataclasses.replace(SMALL, data=str(tmp_path / "short.txt")))
    (tmp_path / "han.txt").write_text("".join(chr(0x4E00 + code) for code in range(600)) * 4)
    with pytest.raises(ValueError, match="--vocabulary=512 has no room for subwords: the text has 600 characters"):
        write.load(dataclasses.replace(SMALL, data=str(tmp_path / "han.txt"), tokens="subwords", vocabulary=512))
    with pytest.raises(ValueError, match="--width=18 must be a multiple of twice --heads=2"):
        write.build(dataclasses.replace(SMALL, width=18), made()[1])


# Speed.


def test_the_cache_pays():
    """512 tokens with the cache, and with the plain network run on all that stands there for each new one."""
    config = write.Config(tokens="bytes", epochs=1)
    _, splits, _, _ = made("bytes")
    model = write.build(config, splits)
    endpoint = write.Endpoint(config, model, splits)
    plain = tf.function(lambda ids: tf.argmax(model(ids)[:, -1], -1, tf.int32), reduce_retracing=True)

    def cached():
        endpoint(tf.constant(["a"]), **settings(max_tokens=512, temperature=0.8))

    def without():
        ids = tf.constant([[1]])
        for _ in range(512):
            ids = tf.concat([ids, plain(ids)[:, None]], 1)

    def seconds(work):
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    seconds(cached)  # traces
    plain(tf.ones([1, 1], tf.int32)), plain(tf.ones([1, 2], tf.int32))
    shares = []
    while len(shares) < 4 and max(shares, default=0) <= 10:  # other work may take the processor from either
        shares.append(seconds(without) / min(seconds(cached) for _ in range(4)))
    print(f"512 tokens: {shares} times as fast with the cache")
    assert max(shares) > 10
