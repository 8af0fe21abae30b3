"""nlp.classify as a user meets it: any text, bad input, its models in other projects."""

import json
import os
import re
import shutil
import types
from pathlib import Path

import forks
import keras
import numpy as np
import pytest
import safetensors.numpy
import scipy.sparse
import scipy.special
import tensorflow as tf
from conftest import WORDS, tabled
from keras import ops

from apps.nlp import classify

SMALL = ("--networks=1", "--width=8", "--filters=8", "--batch=16", "--epochs=2", "--rare=1")


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A folder with what a training on the table exported and, in `said`, printed."""
    folder = tmp_path_factory.mktemp("learnt")
    words = ("train", "nlp.classify", f"--data={tabled(folder)}", *SMALL)
    said = folder / "said"
    assert forks.ended(forks.start(forks.cornucopia, *words, folder=folder, out=said)) == 0, said.read_text()
    return folder


def test_table_to_served_answer(learnt, table, cornucopia, forked, python, serving, tmp_path):
    shutil.copytree(learnt / "saved_models", tmp_path / "saved_models")
    said = (learnt / "said").read_text()
    assert "audit      train 51  validation 3  test 6  in 2 classes" in said
    assert re.search(r"accuracy +1\.0000", said)  # money and food are easy to tell apart

    with serving() as address:

        def ask(text, expect=0):
            return cornucopia("ask", "nlp.classify", f"--text={text}", f"--address={address}", expect=expect)

        answer = ask("Where is my BANK card?").stdout
        assert re.search(r"^label +money$", answer, re.MULTILINE)
        assert re.search(r"^score +0\.\d+$", answer, re.MULTILINE)
        assert re.search(r"top 2 +0\.\d+ +food", answer)
        # What was never seen gets an answer; what says nothing is refused.
        for text in ("🙂🙃", "überweisung", "soup " * 10_000, "x" * 50_000):
            assert re.search(r"^label +(money|food)$", ask(text).stdout, re.MULTILINE), text[:20]
        for text in ("", " \t\n"):
            refused = ask(text, expect=2).stderr
            assert "the server refuses (INVALID_ARGUMENT)" in refused
            assert "text is empty" in refused

    # The network opens in a project that has none of the suite, and the saved version is measured on other data.
    extra = tmp_path / "saved_models" / "nlp.classify" / "1" / "assets.extra"
    python(
        "import sys, keras, numpy as np\n"
        "model = keras.saving.load_model(sys.argv[1])\n"
        "tokens = {name: np.zeros([2, 3, 16] if name == 'letters' else [2, 3], int) for name in model.input}\n"
        "scores = model.predict(tokens, verbose=0)\n"
        "assert scores.shape == (2, 2) and np.isfinite(scores).all()\n",
        str(extra / "model.keras"),
    )
    taught = os.path.relpath(learnt / "table.csv", tmp_path)
    done = forked("evaluate", "nlp.classify", f"--data={taught}")  # of its own data what it did not learn
    report = json.loads((extra / "metrics.json").read_text())
    accuracy = report["test"]["accuracy"]
    assert f"{report['protocol']}\n           accuracy           {accuracy['value']:.4f}" in done.stdout
    assert "warning" not in done.stdout
    rows = (learnt / "table.csv").read_text()
    (learnt / "table.csv").write_text(rows.replace("number 1,", "numbers 1,"))
    done = forked("evaluate", "nlp.classify", f"--data={taught}")
    (learnt / "table.csv").write_text(rows)
    assert "warning    the data changed, so the model may have learned some of its test part" in done.stdout
    settings = json.loads((extra / "config.json").read_text())
    settings["config"] |= {"examples": 5, "folds": 3}  # what part of its own data it learned from
    (extra / "config.json").write_text(json.dumps(settings))
    table = table.rename(tmp_path / "other.csv")
    done = forked("evaluate", "nlp.classify", f"--data={table}")
    assert "all of it" in done.stdout
    assert "audit      test 60  in 2 classes of the model's 2\n" in done.stdout
    assert re.search(r"accuracy +(1\.0000|0\.9)", done.stdout)
    texts = [line for line in table.read_text().splitlines() if line.endswith(",food")]
    single = next(line for line in table.read_text().splitlines() if line.endswith(",money"))
    table.write_text("\n".join(["text,label,split", f"{single},train", *(f"{line},test" for line in texts)]))
    done = forked("evaluate", "nlp.classify", f"--data={table}")  # of one class's test part
    assert f"audit      test {len(texts)}  in 1 classes of the model's 2\n" in done.stdout
    assert "other.csv: its test split" in done.stdout
    assert re.search(r"accuracy +(1\.0000|0\.9)", done.stdout)
    table.write_text(table.read_text().replace(",food", ",meals"))
    done = forked("evaluate", "nlp.classify", f"--data={table}", expect=2)
    assert "are not the model's ['food', 'money']" in done.stderr


def test_folds_test_every_text_once_and_go_on_where_they_broke(table, forked, tmp_path):
    flags = ("train", "nlp.classify", f"--data={table}", *SMALL, "--epochs=1", "--folds=2", "--name=crossed")
    done = forked(*flags)
    assert "test       mean of 2-fold cross-validation, stratified" in done.stdout
    assert done.stdout.count("fold       ") == 1
    assert done.stdout.count("test       part ") == 2
    config = classify.Config(data=str(table), folds=2)
    parts = [classify._rows(fold)["test"] for fold in classify.folds(config).configs.values()]
    assert sorted(np.concatenate(parts)) == list(range(60))
    for checkpoint in (tmp_path / "runs" / "crossed" / "fold-1").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # as if it had been killed in there
    again = forked(*flags, "--resume")
    shown = [re.findall(r"accuracy +\d\.\d+ .*", run.stdout)[-1] for run in (done, again)]
    assert shown[0] == shown[1]
    assert again.stdout.count("1 of 1 epochs are done") == 1


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (lambda path: None, ["--data=nowhere"], "nowhere does not exist; expected a folder or an archive"),
        (lambda path: None, ["--data=fashion-mnist"], "fashion-mnist holds no labelled texts; nlp.classify takes mr,"),
        (lambda path: None, ["--batch=500"], "51 training examples do not fill one batch of 500: use --batch=51"),
        (lambda path: path.write_text("text,label\na,x\n,y\n"), [], "text 2: no text"),
        (lambda path: path.write_text("text,label\na,x\nb,x\nc,x\nd,y\n"), [], "class y has too few texts"),
        (lambda path: None, ["--folds=40"], "class food has too few texts; have 40 or more"),
        (lambda path: None, ["--folds=1"], "--folds=1"),
        (lambda path: None, ["--folds=3", "--fold=3"], "--fold=3: there are 3 parts, counted from 0"),
        (lambda path: None, ["--examples=1"], "--examples=1 leaves nothing to validate on"),
    ],
)
def test_bad_input_ends_in_advice(table, mistaken, spoil, flags, message):
    spoil(table)
    said = mistaken("train", "nlp.classify", f"--data={table}", *SMALL, *flags)
    assert message in said.err.replace("\n", " ")


def test_tokens_do_not_depend_on_the_batch():
    strings = ["Short one", "a much longer text, with more words than the other", "Ünïcode 🙂 — café"]
    together = classify._of_ngrams(tf.constant(strings))
    for row, string in enumerate(strings):
        alone = classify._of_ngrams(tf.constant([string]))
        for name, tokens in alone.items():
            width = tokens.shape[1]
            np.testing.assert_array_equal(together[name][row, :width], tokens[0], err_msg=name)
            assert not np.any(together[name][row, width:]), name


def test_tokens_by_hand():
    tokens = {name: value.numpy()[0] for name, value in classify._of_ngrams(tf.constant(["No, no!"])).items()}
    words = tf.strings.to_hash_bucket_fast(["^", "no", ",", "no", "!"], 2**62).numpy() + 1
    np.testing.assert_array_equal(tokens["words"], words)
    # Nine different phrases of "^ no , no !" up to three words long: 4 words, 4 pairs, 3 triples.
    phrases = ["^", "no", ",", "!", "^ no", "no ,", ", no", "no !", "^ no ,", "no , no", ", no !"]
    expected = np.sort(tf.strings.to_hash_bucket_fast(phrases, 2**62).numpy() + 1)[::-1]
    np.testing.assert_array_equal(tokens["phrases"][tokens["phrases"] > 0], expected)
    np.testing.assert_array_equal(tokens["letters"][1][:3], [ord("N") % 255 + 1, ord("o") % 255 + 1, 0])
    upper, lower = (classify._of_ngrams(tf.constant([text])) for text in ("ÄRGER", "ärger"))
    np.testing.assert_array_equal(upper["words"], lower["words"])
    assert not np.array_equal(upper["letters"], lower["letters"])


def test_bytes_that_are_no_text_are_read_as_far_as_they_go():
    tokens = classify._of_ngrams(tf.constant([b"caf\xe9 au lait", b"\xff\xfe"]))
    assert np.count_nonzero(tokens["words"][0]) == 5  # ^ caf U+FFFD au lait
    assert np.count_nonzero(tokens["words"][1]) == 3
    assert classify._of_ngrams(tf.constant([], tf.string))["words"].shape[0] == 0


def test_counts_and_log_count_ratios_by_hand():
    grams = tf.constant([[7, 5, 0], [5, 0, 0], [7, 9, 0], [9, 0, 0]], tf.int64)

    class Two:
        train = tf.data.Dataset.from_tensors(({"phrases": grams}, tf.one_hot([0, 0, 1, 1], 2)))

    known, idf, has = classify._count(classify.Config(rare=2), Two, "phrases")
    np.testing.assert_array_equal(known, [5, 7, 9])
    np.testing.assert_allclose(idf, [1 + np.log(5 / 3)] * 3)  # each is in two texts of four
    np.testing.assert_array_equal(has.toarray(), [[1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]])
    # The first class has 5 twice, 7 once, 9 never; the other the reverse. With one added to each: 3, 2, 1 of 6.
    np.testing.assert_allclose(classify.log_count_ratio(has, np.array([1, 1, 0, 0], bool)), np.log([3, 1, 1 / 3]))
    assert list(classify._count(classify.Config(rare=3), Two, "phrases")[0]) == [5, 7, 9]  # better than none


def test_members_are_weighed_by_how_well_they_fit():
    random = np.random.default_rng(1)
    labels = random.integers(3, size=400)
    truth = np.eye(3)[labels]
    good, noise = truth + 0.6 * random.normal(size=truth.shape), random.normal(size=truth.shape)
    members = np.stack([np.log(np.full(truth.shape, 1 / 3)), good, noise], -1)
    _, sense, nonsense = classify.weigh(members, labels)
    assert sense > 2 > 0.5 > nonsense > 0
    few = classify.weigh(members[:1], labels[:1]) / [1, 2, 2]  # one label tells little
    assert ((few > 0.4) & (few < 2.5)).all()


def test_linear_machines_in_the_graph_equal_scikit_learn(table):
    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    config = classify.Config(data=str(table), rare=1, batch=16)
    splits = classify.load(config)
    model = classify.build(config, splits)
    stacked = keras.Model(model.input, model.get_layer("together").input)
    test = next(tokens for tokens, _ in splits.test)
    margins = stacked(test)[..., 1].numpy()

    found, _ = classify._read(config)
    rows = classify._rows(config)
    texts = np.array([text.lower() for text in found.texts], object)
    phrases = CountVectorizer(analyzer=lambda text: _grams(["^", *text.split()], 3, " "), binary=True)
    pieces = CountVectorizer(analyzer=lambda text: _grams(" ".join(["^", *text.split()]), 5, "", 2), binary=True)
    parts = [make_pipeline(part, TfidfTransformer()) for part in (phrases, pieces)]
    train = scipy.sparse.hstack([part.fit_transform(texts[rows["train"]]) for part in parts], "csr")
    machine = LinearSVC(C=0.5, random_state=1).fit(train, found.labels[rows["train"]])
    expected = machine.decision_function(
        scipy.sparse.hstack([part.transform(texts[rows["test"]]) for part in parts], "csr")
    )
    np.testing.assert_allclose(margins[:, 1], expected, atol=1e-3)
    np.testing.assert_allclose(margins[:, 0], -expected, atol=1e-3)


def test_a_text_in_a_row_with_others_is_as_alone_between_zeros(table):
    config = classify.Config(data=str(table), rare=1, batch=16, networks=1, width=8, filters=64)
    network = classify.build(config, classify.load(config)).get_layer("network")
    for weight in network.weights:  # biases too, so that a convolution that sees nothing is not nothing
        weight.assign(np.random.default_rng(1).normal(size=weight.shape) * (weight.dtype == "float32"))
    tokens = classify._of_ngrams(tf.constant(["soup", "my bank card, the bread and 🙂 dinner", "", "the soup"]))
    tokens = {name: tokens[name] for name in network.input}
    *products, dense = (one for one in network.layers if isinstance(one, keras.layers.Dense))

    def convolved(one, wide, x):
        """What a convolution with the product's weights and offsets finds [batch, place, filter]."""
        kernel = ops.reshape(one.kernel, [wide, x.shape[-1], -1])
        return ops.relu(ops.conv(x, kernel, padding="valid") + one.bias)

    seen, found = keras.Model(network.input, [network.get_layer("seen_0").output, dense.output])(tokens)
    for row, length in enumerate(np.sum(tokens["words"] > 0, 1)):
        x = np.pad(seen.numpy()[row, :length], [[9, 9], [0, 0]])[None]
        most = [ops.max(convolved(one, wide, x), 1) for one, wide in zip(products, (2, 3, 4), strict=True)]
        np.testing.assert_allclose(found[row], dense(ops.concatenate(most, -1))[0], rtol=1e-4, atol=0.01)


def test_parts_of_an_explanation_sum_to_what_the_score_gained(learnt, forked, tmp_path):
    shutil.copytree(learnt / "saved_models", tmp_path / "saved_models")
    model = keras.saving.load_model(tmp_path / "saved_models/nlp.classify/1/assets.extra/model.keras")
    for text in ("the bank and my Card, dinner", "soup", "soup soup bank 🙂", "nothing known here"):
        label, gain, parts = classify.explain(model, text)
        assert sum(value for _, value in parts) == pytest.approx(gain, abs=0.002), text
        scores = model(classify._of_ngrams(tf.constant([text])))[0].numpy()
        assert label == scores.argmax()
        assert [word for word, _ in parts] == ["^", *re.findall(r"\w+|[^\w\s]", text)]
    parts = dict(classify.explain(model, "the bank and my dinner number")[2])
    label = classify.explain(model, "the bank and my dinner number")[0]
    ours, others = ("bank", "dinner") if label else ("dinner", "bank")  # classes: food, money
    assert parts[ours] > 0 > parts[others]
    assert max(parts, key=parts.get) == ours

    done = forked("explain", "nlp.classify", "--text=my bank card", env={"FORCE_COLOR": ""})
    assert "label      money" in done.stdout
    gain, total = re.search(r"gain +(\S+) of its score .* sum to (\S+)", done.stdout).groups()
    assert float(gain) == pytest.approx(float(total), abs=0.003)
    assert "^ my bank card\n" in done.stdout
    done = forked("explain", "nlp.classify", "--text=my bank card", env={"FORCE_COLOR": "1"})
    assert "bank\033[0m" in done.stdout
    with pytest.raises(ValueError, match="the text is empty; give words"):
        classify.explain(model, " \n")
    done = forked("explain", "vision.classify", "--text=x", expect=2)
    assert "vision.classify does not explain its answers" in done.stderr


def test_a_preset_is_read_with_its_own_tokenizer(tmp_path):
    import keras_hub

    words = [word for part in WORDS.values() for word in part] + ["the", "and", "my", "number", "##s", "1", "##2"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32, "max_sequence_length": 64}
    folder = tmp_path / "backbone"
    keras_hub.models.BertBackbone(vocabulary_size=len(vocabulary), **sizes).save_to_preset(folder)
    keras_hub.tokenizers.BertTokenizer(vocabulary=vocabulary, lowercase=True).save_to_preset(folder)
    tokens = classify._of_backbone(str(folder), 12)(tf.constant(["The CARDS, my Card", "soup"]))
    card, cls, sep, unknown = (vocabulary.index(word) for word in ("card", "[CLS]", "[SEP]", "[UNK]"))
    s, the, my = (vocabulary.index(word) for word in ("##s", "the", "my"))
    np.testing.assert_array_equal(tokens["token_ids"][0], [cls, the, card, s, unknown, my, card, sep, 0, 0, 0, 0])
    np.testing.assert_array_equal(tokens["padding_mask"][1], [1, 1, 1] + [0] * 9)

    config = classify.Config(backbone=str(folder), length=12)
    network = classify._encoder(config, types.SimpleNamespace(names=("food", "money")))
    expected = keras_hub.models.BertBackbone.from_preset(str(folder))(tokens)["sequence_output"]
    np.testing.assert_allclose(network.get_layer("backbone")(tokens), expected, atol=1e-6)


def hugging_face(folder, *, prefix="", more=()):
    """Write a tiny BERT as Hugging Face's `save_pretrained` does; return its weights by name, without the prefix.

    A BertModel's names have no prefix; in a model for a purpose they begin with `bert.`, and the purpose's own follow.
    """
    words = ["solve", "a", "system", "of", "linear", "equation", "##s", "cafe", ",", *more]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *[f"##{one}" for one in letters]]
    vocabulary = list(dict.fromkeys(vocabulary))
    config = {
        "architectures": ["BertForPreTraining" if prefix else "BertModel"], "model_type": "bert",
        "vocab_size": len(vocabulary), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 64, "type_vocab_size": 2, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pad_token_id": 0,
    }  # fmt: skip
    sizes = {"pooler.dense": (16, 16)}
    for n in range(2):
        block = f"encoder.layer.{n}"
        sizes |= {f"{block}.attention.self.{part}": (16, 16) for part in ("query", "key", "value")}
        sizes |= {f"{block}.attention.output.dense": (16, 16), f"{block}.attention.output.LayerNorm": (16,),
                  f"{block}.intermediate.dense": (32, 16), f"{block}.output.dense": (16, 32),
                  f"{block}.output.LayerNorm": (16,)}  # fmt: skip
    shapes = {f"embeddings.{name}_embeddings.weight": (count, 16)
              for name, count in (("word", len(vocabulary)), ("position", 64), ("token_type", 2))}  # fmt: skip
    for name, size in {"embeddings.LayerNorm": (16,), **sizes}.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    random = np.random.default_rng(3)
    weights = {name: random.normal(0, 0.3, size).astype(np.float32) for name, size in shapes.items()}
    own = {"cls.seq_relationship.weight": np.ones((2, 16), np.float32)} if prefix else {}

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": True, "model_max_length": 64, "tokenizer_class": "BertTokenizer"})
    )
    saved = {**{prefix + name: value for name, value in weights.items()}, **own}
    safetensors.numpy.save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def bert(weights, token_ids):
    """What BERT (Devlin et al. 2018) makes of one text's token ids: a vector for each, [token, width]."""

    def dense(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    tables = [weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")]
    x = norm(tables[0][token_ids] + tables[1][: len(token_ids)] + tables[2][0], "embeddings.LayerNorm")
    for n in range(2):
        block = f"encoder.layer.{n}"
        parts = [dense(x, f"{block}.attention.self.{part}") for part in ("query", "key", "value")]
        query, key, value = (part.reshape(-1, 2, 8).swapaxes(0, 1) for part in parts)  # [head, token, size]
        shares = scipy.special.softmax(query @ key.swapaxes(1, 2) / 8**0.5, -1)
        attended = dense((shares @ value).swapaxes(0, 1).reshape(-1, 16), f"{block}.attention.output.dense")
        x = norm(x + attended, f"{block}.attention.output.LayerNorm")
        y = dense(x, f"{block}.intermediate.dense")
        x = norm(x + dense(y * scipy.special.ndtr(y), f"{block}.output.dense"), f"{block}.output.LayerNorm")
    return x


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_hugging_face_checkpoint_is_read_as_it_is(tmp_path, prefix):
    weights = hugging_face(tmp_path / "checkpoint", prefix=prefix)
    config = classify.Config(backbone=str(tmp_path / "checkpoint"), length=12)
    texts = tf.constant(["Solve equations, CAFÉ 🙂 ab", "system"])
    tokens = classify._of_backbone(config.backbone, config.length)(texts)
    # Places in vocab.txt: 2 [CLS], 5 solve, 10 equation, 11 ##s, 13 the comma, 12 cafe, 1 [UNK], 6 a, ##b, 3 [SEP].
    b = 14 + 25 + 1  # behind the words the letters but a, which is a word, and ##a
    np.testing.assert_array_equal(tokens["token_ids"][0], [2, 5, 10, 11, 13, 12, 1, 6, b, 3, 0, 0])
    np.testing.assert_array_equal(tokens["token_ids"][1], [2, 7, 3] + [0] * 9)
    np.testing.assert_array_equal(tokens["padding_mask"][0], [1] * 10 + [0] * 2)

    network = classify._encoder(config, types.SimpleNamespace(names=("yes", "no")))
    vectors = network.get_layer("backbone")(tokens).numpy()
    for row, count in enumerate([10, 3]):
        expected = bert(weights, tokens["token_ids"][row, :count].numpy())
        np.testing.assert_allclose(vectors[row, :count], expected, atol=1e-4)


def test_a_hugging_face_checkpoint_learns_on_and_is_served(table, cornucopia, forked, serving, tmp_path):
    hugging_face(tmp_path / "checkpoint", more=[word for part in WORDS.values() for word in part])
    flags = (f"--data={table}", "--backbone=checkpoint", "--length=32", "--batch=16", "--epochs=6", "--rate=0.01")
    done = forked("train", "nlp.classify", *flags)
    assert "6 answers over gRPC equal the model in memory" in done.stdout
    assert re.search(r"accuracy +1\.0000", done.stdout)
    assert "Warning" not in done.stderr
    with serving() as address:  # in a process that has not loaded TensorFlow Text
        answer = cornucopia("ask", "nlp.classify", "--text=dinner and soup 🙂", f"--address={address}").stdout
    assert re.match(r"label +food\nscore +(0\.\d+)\ntop 1 +\1  food\n", answer)
    done = forked("explain", "nlp.classify", "--text=soup", expect=2)
    assert "only networks from scratch are explained" in done.stderr


@pytest.mark.parametrize(("made", "message"), [(False, "is no folder"), (True, "holds no config.json")])
def test_a_backbone_that_is_none(tmp_path, made, message):
    if made:
        (tmp_path / "none").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        classify._of_backbone(str(tmp_path / "none"), 8)


def _grams(symbols, longest, between, shortest=1):
    sizes = range(shortest, longest + 1)
    return [between.join(symbols[at : at + size]) for size in sizes for at in range(len(symbols) - size + 1)]


@pytest.mark.skipif(not Path(os.environ.get("CORNUCOPIA_DATA", "/nowhere")).is_dir(), reason="no public data here")
def test_public_data_sets_have_their_published_sizes():
    sizes = {"mr": (10_662, 2), "sst2": (6_920 + 872 + 1_821, 2), "trec": (5_952, 6), "banking77": (13_083, 77)}
    for name, (count, classes) in sizes.items():
        found, about = classify._read(classify.Config(data=name))
        assert (len(found.texts), len(found.names)) == (count, classes), name
        assert about["published accuracy"]
    rows = classify._rows(classify.Config(data="sst2"))
    assert [len(rows[split]) for split in ("train", "validation", "test")] == [6_920, 872, 1_821]
    assert len(classify._read(classify.Config(data="trec", labels="fine"))[0].names) == 50
    configs = classify.folds(classify.Config(data="mr", folds=10)).configs.values()
    folds = [classify._rows(config)["test"] for config in configs]
    assert sorted(np.concatenate(folds)) == list(range(10_662))
