"""Text classification: say what a text is about, or how it is meant.

Data      a folder or archive with one sub-folder of .txt files a class; a CSV or TSV table (`text`, `label`); lines in
          .pos and .neg files; `COARSE:fine text` lines; `mr`, `sst2`, `trec`, `banking77`
Model     linear machines over word and character n-grams and convolutions over words and their letters, which answer
          together in one graph; or a pretrained encoder that is learned further (--backbone)
Endpoint  text (UTF-8) -> label, score, all labels with their scores, best first
"""

import ast
import dataclasses
import functools
import importlib.util
import json
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from shared import data, metrics, run, training
from shared.answers import ranked
from shared.data import named, tables, texts
from shared.data.audit import audit
from shared.data.divide import whole
from shared.metrics import classification


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
    PART: ClassVar = ("folds", "fold", "examples")
    epochs: int = 10  # passes over the training examples
    batch: int = 64  # examples in a step, over all devices together
    labels: Literal["coarse", "fine"] = "coarse"  # of labels COARSE:fine the first part, or both
    folds: int = 0  # cross-validate with so many parts, as is the custom with mr: ten; 0: measure by one test part
    fold: int = 0  # which part is the test part
    examples: int = 0  # of each class to learn from, as the seed draws them; 0: all
    backbone: str = ""  # folder of a KerasHub encoder preset or a Hugging Face checkpoint; empty: learn from scratch
    length: int = 128  # tokens of a text that a backbone reads
    rate: float = 0.0  # peak learning rate; 0: 0.003, with a backbone 0.0001
    smoothing: float = 0.1  # share of the target that is spread over all classes
    rare: int = 0  # n-grams that fewer training texts have are left out; 0: 1 where there are under 4,000, else 2
    networks: int = 2  # convolutional networks, alike but for their first weights
    width: Annotated[int, run.Range(32, 256, step=32)] = 128  # numbers that stand for a word in a convolutional network
    filters: Annotated[int, run.Range(32, 256, step=32)] = 128  # of each length of convolution
    # Share of the words' numbers that training hides from the convolutions.
    forget: Annotated[float, run.Range(0.0, 0.6)] = 0.3
    dropout: Annotated[float, run.Range(0.0, 0.7)] = 0.5  # share of what the convolutions found that training hides

    def __post_init__(self):
        if self.folds == -1:  # the default of versions that were saved earlier
            object.__setattr__(self, "folds", 0)
        super().__post_init__()


SMOKE = Config(epochs=1, networks=1, width=8, filters=8)
EXPECT = {
    "": {"accuracy": 0.86},
    "mr": {"accuracy": 0.78},
    "trec": {"accuracy": 0.905},
    "sst2": {"accuracy": 0.83},
    "banking77": {"accuracy": 0.918},
}

NAMED = ("mr", "sst2", "trec", "banking77")
NGRAMS = ("phrases", "pieces")
WORDS, LETTERS = 400, 16  # of a text, of a word: what is longer is cut
CHARACTERS = 2000  # of a text, that become n-grams


def load(config: Config) -> data.Splits:
    found, about = _read(config)
    rows = _rows(config)
    return _splits(config, found, rows, about, audited=tuple(rows) if config.fold == 0 else ())


def load_other(config: Config, names: Sequence[str]) -> data.Splits:
    """Other texts, to measure a saved model of the classes `names` on."""
    return _splits(config, *whole(*_read(config), names), audited=("test",))


def _splits(config, found: texts.Texts, rows, about, *, audited: tuple[str, ...]) -> data.Splits:
    if audited:
        parts = {split: ([found.texts[row] for row in rows[split]], found.labels[rows[split]]) for split in audited}
        audit(parts, found.names, unreadable=found.unreadable)
    targets = tf.one_hot(found.labels, len(found.names))
    smooth = targets * (1 - config.smoothing) + config.smoothing / len(found.names)
    tokenise = _of_backbone(config.backbone, config.length) if config.backbone else _tokenise
    parts = [tokenise(tf.constant(found.texts[at : at + 1000])) for at in range(0, len(found.texts), 1000)]
    tokens = {name: tf.concat([part[name] for part in parts], 0) for name in parts[0]}
    train = tf.constant(rows["train"])

    def pick(at, names):
        return _pad({name: tf.gather(tokens[name], at) for name in names})

    def read(indices, step):
        at = tf.gather(train, indices)
        return pick(at, [name for name in tokens if name not in NGRAMS]), tf.gather(smooth, at)

    def in_order(split):
        batches = data.in_order(rows[split], batch=250)
        return batches.map(lambda at: (pick(at, tokens), tf.gather(targets, at)), num_parallel_calls=2).prefetch(2)

    lengths = None  # a backbone computes what fills a batch up, too; a row of words for convolutions has no such
    if config.backbone:
        lengths = tokens["padding_mask"].numpy().sum(1)[rows["train"]]
    least = 40 if config.backbone else 80  # steps of an epoch: of a small set, it takes some passes
    passes = max(1, least * config.batch // len(rows["train"]))
    return data.Splits(
        stream=data.stream(len(rows["train"]), batch=config.batch, seed=config.seed, read=read, lengths=lengths),
        steps=passes * (len(rows["train"]) // config.batch),
        train=in_order("train"),
        validation=in_order("validation"),
        test=in_order("test"),
        preprocess=lambda text: _pad(tokenise(text)),
        names=found.names,
        request={"text": np.array([found.texts[row].encode() for row in rows["test"][:8]], object)},
        about=about,
    )


@functools.cache
def _read(config: Config) -> tuple[texts.Texts, dict[str, str]]:
    about = {"data": config.data or "scipy-docstrings", "limits": "Every text gets one of the classes, also one in "
             f"another language or on another matter. Of a text the first {WORDS} words count."}  # fmt: skip
    fine = config.labels == "fine"
    if not config.data:
        import scipy

        found = texts.labelled(_docstrings(), path="SciPy's documentation")
        about |= {"source": f"summaries in SciPy {scipy.__version__}: which part do they document?",
                  "licence": "BSD-3-Clause"}  # fmt: skip
    elif config.data in NAMED:
        found = texts.labelled(_published(config.data, fine=fine), path=config.data)
        about |= named.about(config.data)
    elif config.data in named.DATASETS:
        raise ValueError(f"{config.data} holds no labelled texts; nlp.classify takes {', '.join(NAMED)}, or a path")
    else:
        found = texts.read(Path(config.data), fine=fine, on_error=config.on_error)
    if config.folds:
        protocol = f"part {config.fold + 1} of {config.folds}, stratified"
    elif "test" in found.splits:
        protocol = "official test split" if config.data in NAMED else "its test split"
    else:
        protocol = "every tenth as the seed draws them, stratified"
    if config.examples:
        protocol += f", learned from {config.examples} texts of each class"
    return found, {**about, "protocol": protocol}


def _published(name: str, *, fine: bool) -> list[tuple[str, str, str]]:
    """(text, label, split) of a public data set in its published form."""
    files = named.find(name)
    if name == "mr":
        signs = {"rt-polarity.neg": "negative", "rt-polarity.pos": "positive"}
        return [(text, sign, "") for file, sign in signs.items() for text in texts.lines(files[file])]
    if name == "sst2":
        signs = {"0": "negative", "1": "positive"}
        parts = {"train.tsv": "train", "dev.tsv": "validation", "test.tsv": "test"}
        pairs = [(line.split("\t"), part) for file, part in parts.items() for line in texts.lines(files[file])]
        return [(text, signs[label], part) for (text, label), part in pairs]
    if name == "trec":
        parts = {"train_5500.label": "train", "TREC_10.label": "test"}
        return [(*row, part) for file, part in parts.items()
                for row in texts.questions(files[file], fine=fine, encoding="latin-1")]  # fmt: skip
    parts = {"train.csv": "train", "test.csv": "test"}
    return [(*row, part) for file, part in parts.items() for row in tables.read(files[file], ("text", "category"))]


def _docstrings() -> list[tuple[str, str, str]]:
    """The first paragraph of each documented function and class in eight parts of SciPy, read without importing it."""
    root = Path(importlib.util.find_spec("scipy").origin).parent
    rows = {}
    for part in ("integrate", "interpolate", "linalg", "ndimage", "optimize", "signal", "spatial", "stats"):
        for path in sorted((root / part).rglob("*.py")):
            if "tests" in path.relative_to(root).parts:
                continue
            for node in _statements(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and (told := ast.get_docstring(node)):
                    text = " ".join(told.split("\n\n")[0].split())
                    if len(text.split()) > 2:
                        rows.setdefault(text, (text, part, ""))  # what several functions say counts once
    return list(rows.values())


def _statements(module: ast.Module) -> Iterator[ast.AST]:
    """What `ast.walk` gives but for expressions, which hold no definition and are most of a file."""
    todo = deque([module])
    while todo:
        yield (node := todo.popleft())
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            todo.extend(getattr(node, part, ()))


def _rows(config: Config) -> dict[str, np.ndarray]:
    """Rows of each split: the data's own, else a stratified tenth to test; a twentieth of the rest to validate."""
    from sklearn.model_selection import StratifiedKFold, train_test_split

    if config.folds == 1:
        raise ValueError(f"--folds={config.folds} leaves nothing to learn from; give 2 or more, or 0 for no folds")
    parts = config.folds
    if not 0 <= config.fold < max(parts, 1):
        raise ValueError(f"--fold={config.fold}: there are {parts} parts, counted from 0; see --folds")
    if config.examples == 1:
        raise ValueError("--examples=1 leaves nothing to validate on; give 2 or more, or 0 for all")
    found, _ = _read(config)
    names, labels, everything = found.names, found.labels, np.arange(len(found.labels))
    few = [names[index] for index, count in enumerate(np.bincount(labels)) if count < max(3, parts)]
    if few:
        raise ValueError(f"class {few[0]} has too few texts; have {max(3, parts)} or more, or remove the class")

    def hold_out(rows, share):
        count = max(len(names), round(share * len(rows)))
        if len(rows) - count < len(names):
            raise ValueError(f"{len(rows)} texts in {len(names)} classes are too few to split: have three a class")
        return train_test_split(rows, test_size=count, stratify=labels[rows], random_state=config.seed)

    rows = {split: everything[found.splits == split] for split in ("validation", "test")}
    rows["train"] = np.setdiff1d(everything, np.concatenate([rows["validation"], rows["test"]]))
    if parts:
        folds = StratifiedKFold(parts, shuffle=True, random_state=config.seed).split(labels, labels)
        rows["train"], rows["test"] = list(folds)[config.fold]
        rows["validation"] = rows["train"][:0]
    if not len(rows["test"]):
        rows["train"], rows["test"] = hold_out(rows["train"], 0.1)
    if config.examples:
        random = np.random.default_rng(config.seed)
        of_class = [random.permutation(rows["train"][labels[rows["train"]] == index]) for index in range(len(names))]
        rows["train"] = np.concatenate([mine[: config.examples] for mine in of_class])
        rows["validation"] = rows["train"][:0]
    if not len(rows["validation"]):
        rows["train"], rows["validation"] = hold_out(rows["train"], 0.05)
    return {split: np.sort(rows[split]) for split in ("train", "validation", "test")}


@functools.cache
def _of_backbone(folder: str, length: int):
    """A backbone's own tokenizer: texts [batch], string -> token ids, segments, mask, each [batch, length]."""
    import keras_hub

    own = keras_hub.models.TextClassifierPreprocessor.from_preset(_folder(folder), sequence_length=length)
    settings = Path(folder) / "tokenizer_config.json"  # of a Hugging Face checkpoint
    if settings.is_file() and hasattr(own.tokenizer, "strip_accents"):
        # Left unsaid, accents go where capitals do; KerasHub (0.32) keeps them, and the words would be unknown.
        stripped = json.loads(settings.read_text()).get("strip_accents")
        own.tokenizer.strip_accents = own.tokenizer.lowercase if stripped is None else stripped

    def tokenise(text):
        clean = tf.strings.unicode_transcode(text, "UTF-8", "UTF-8")  # what is no UTF-8 becomes U+FFFD
        tokens = own(clean)
        return {name: tf.cast(tokens.get(name, tf.zeros_like(tokens["token_ids"])), tf.int32)
                 for name in ("token_ids", "segment_ids", "padding_mask")}  # fmt: skip

    tokenise.own = own
    return tokenise


def _folder(path: str) -> str:
    """ValueError or FileNotFoundError where no backbone is in the folder."""
    if not Path(path).is_dir():
        raise FileNotFoundError(
            f"--backbone={path} is no folder; expected one that save_to_preset made, or a Hugging Face checkpoint with "
            f"config.json, model.safetensors and the tokenizer's files"
        )
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"--backbone={path} holds no config.json, so it is neither a KerasHub preset nor a Hugging "
                         f"Face checkpoint")  # fmt: skip
    return path


def _of_ngrams(text: tf.Tensor) -> dict[str, tf.Tensor]:
    """Texts [batch], string -> what the networks from scratch take. For training and serving."""
    return _pad(_tokenise(text))


def _tokenise(text: tf.Tensor) -> dict[str, tf.RaggedTensor]:
    """Texts [batch] -> hashes [batch, (any)] of words, of phrases of one to three words, of pieces of two to five
    characters; and the code points of each word's letters, [batch, (word), (letter)].
    """
    cased = _split(text)
    words = tf.strings.lower(cased, encoding="utf-8")
    phrases = tf.strings.ngrams(words, [1, 2, 3])
    characters = tf.strings.unicode_split(tf.strings.reduce_join(words, -1, separator=" "), "UTF-8")[:, :CHARACTERS]
    pieces = tf.strings.ngrams(characters, [2, 3, 4, 5], separator="")
    letters = tf.strings.unicode_decode(cased, "UTF-8")[:, :, :LETTERS]
    return {"words": _hash(words), "phrases": _hash(phrases), "pieces": _hash(pieces), "letters": letters}


def _split(text: tf.Tensor) -> tf.RaggedTensor:
    """Words and signs of texts [batch], after a mark: where a phrase stands at a text's beginning, it says so."""
    clean = tf.strings.unicode_transcode(text, "UTF-8", "UTF-8")  # what is no UTF-8 becomes U+FFFD
    spaced = tf.strings.regex_replace(clean, r"([^\p{L}\p{N}\s])", r" \1 ")
    return tf.concat([tf.fill([tf.shape(text)[0], 1], "^"), tf.strings.split(spaced)[:, :WORDS]], 1)


def _hash(strings: tf.RaggedTensor) -> tf.RaggedTensor:
    """Numbers that two strings share about never, and that are not 0, which stands for nothing."""
    return tf.ragged.map_flat_values(lambda flat: tf.strings.to_hash_bucket_fast(flat, 2**62) + 1, strings)


def _pad(tokens: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Tokens with zeros behind, so that a batch is a rectangle, no longer than its longest text."""
    if "padding_mask" in tokens:
        longest = tf.reduce_max(tf.reduce_sum(tokens["padding_mask"], 1))
        return {name: rows[:, :longest] for name, rows in tokens.items()}
    padded = {name: rows.to_tensor() for name, rows in tokens.items() if name != "letters"}
    letters = tokens["letters"].to_tensor(shape=[None, None, LETTERS])
    padded["letters"] = tf.where(letters > 0, letters % 255 + 1, 0)
    for name in NGRAMS:  # one that comes twice in a text counts once
        if name in padded:
            ordered = tf.sort(padded[name], direction="DESCENDING")
            again = tf.concat([tf.zeros_like(ordered[:, :1], tf.bool), ordered[:, 1:] == ordered[:, :-1]], 1)
            padded[name] = tf.where(again, tf.zeros_like(ordered), ordered)
    return padded


def build(config: Config, splits: data.Splits) -> keras.Model:
    """Two models in one: `network`, which `train` fits, and around it what is served."""
    network = _encoder(config, splits) if config.backbone else _convolutions(config, splits)
    inputs = {name: keras.Input(part.shape[1:], dtype=part.dtype, name=name) for name, part in network.input.items()}
    members = ops.log(ops.maximum(network(inputs), 1e-9))[..., None]  # [batch, class, member]
    if not config.backbone:
        inputs |= {name: keras.Input([None], dtype="int64", name=name) for name in NGRAMS}
        members = ops.concatenate([members, _machines(config, splits, inputs)], -1)
    # How much each member counts is found after training, on validation; until then only the network does.
    weights = keras.initializers.Constant(np.eye(members.shape[-1])[:, :1])
    together = layers.Dense(1, use_bias=False, kernel_initializer=weights, dtype="float32", name="together")
    scores = ops.softmax(together(members)[..., 0])
    model = keras.Model(inputs, scores, name="together")
    rate = training.cosine(config, splits, rate=config.rate or (1e-4 if config.backbone else 3e-3))
    # The network's own answers are geometric means of its members', which do not sum to one: their divergence from
    # the target is the mean of the members' own, so that each learns by itself (Webb et al. 2019).
    network.compile(keras.optimizers.AdamW(rate, weight_decay=0.01 if config.backbone else 0.0), "kl_divergence",
                    metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")])  # fmt: skip
    return model


def _encoder(config: Config, splits: data.Splits) -> keras.Model:
    """A pretrained encoder, the mean of its vectors, and a layer that is new."""
    import keras_hub

    backbone = keras_hub.models.Backbone.from_preset(_folder(config.backbone), dtype=keras.config.dtype_policy().name)
    names = ("token_ids", "segment_ids", "padding_mask")
    inputs = {name: keras.Input([None], dtype="int32", name=name) for name in names}
    if isinstance(backbone.output, dict):  # a pooler that nobody asks would not learn, and Keras would warn
        backbone = keras.Model(backbone.input, backbone.output["sequence_output"], name="backbone")
    vectors = backbone({name: inputs[name] for name in backbone.input})
    shown = ops.cast(inputs["padding_mask"], vectors.dtype)[..., None]
    x = ops.sum(vectors * shown, 1) / ops.maximum(ops.sum(shown, 1), 1)
    x = layers.Dropout(0.1)(x)
    return keras.Model(inputs, layers.Dense(len(splits.names), "softmax", dtype="float32")(x), name="network")


def _machines(config: Config, splits: data.Splits, inputs: dict):
    """Margins [batch, class, machine] of two linear support-vector machines: on TF-IDF, and on naive Bayes ratios.

    The second is Wang & Manning's (2012). Both see the same n-grams, those of a kind with a length of one together.
    What a machine has learned stands in a table: a row for each n-gram, with its weight for each class, and its share
    in the length.
    """
    import scipy.sparse.linalg
    from sklearn.svm import LinearSVC

    count, labels = len(splits.names), np.concatenate([np.argmax(targets, -1) for _, targets in splits.train])
    grams, idf, has = {}, {}, {}
    for name in NGRAMS:
        grams[name], idf[name], has[name] = _count(config, splits, name)
    sizes = [len(grams[name]) for name in NGRAMS]

    def unit(rows):
        return rows.multiply(1 / np.maximum(scipy.sparse.linalg.norm(rows, axis=1), 1e-6)[:, None])

    def learn(features, wanted):
        """Weights [gram, class] and offsets [class]."""
        machine = LinearSVC(C=0.5, random_state=config.seed).fit(features, wanted)
        weights, offset = machine.coef_, machine.intercept_
        if len(weights) == 1:  # of two classes, the second's alone
            weights, offset = np.concatenate([-weights, weights]), np.concatenate([-offset, offset])
        return weights.T, offset

    weighted = scipy.sparse.hstack([unit(has[name].multiply(idf[name])) for name in NGRAMS], "csr")
    weights, offset = learn(weighted, labels)
    present = scipy.sparse.hstack([unit(has[name]) for name in NGRAMS], "csr")
    having = scipy.sparse.hstack([has[name] for name in NGRAMS], "csr")
    bayes = []
    for index in range(count):
        ratio = log_count_ratio(having, labels == index)
        sign, own = learn(present.multiply(ratio).tocsr(), labels == index)
        bayes.append((ratio * sign[:, 1], own[1]))
    bayes, bayes_offset = (np.stack(part, -1) for part in zip(*bayes, strict=True))

    found = [0.0, 0.0]
    begin = 0
    for name, size in zip(NGRAMS, sizes, strict=True):
        rows = slice(begin, begin + size)
        begin += size
        lookup = layers.IntegerLookup(mask_token=0, name=name[:-1])
        lookup.set_vocabulary(grams[name])
        table = np.concatenate([weights[rows] * idf[name][:, None], idf[name][:, None] ** 2, bayes[rows],
                                np.ones([size, 1])], 1)  # fmt: skip
        table = np.concatenate([np.zeros([2, table.shape[1]]), table]).astype(np.float32)
        summed = ops.sum(
            layers.Embedding(
                *table.shape, trainable=False, weights=[table], dtype="float32", name=f"{name[:-1]}_table"
            )(lookup(inputs[name])),
            1,
        )
        for at in range(2):
            part = summed[:, at * (count + 1) : (at + 1) * (count + 1)]
            found[at] += part[:, :count] / ops.sqrt(ops.maximum(part[:, count:], 1e-6))
    margins = [found[0] + offset.astype(np.float32), found[1] + bayes_offset.astype(np.float32)]
    return layers.Identity(dtype="float32", name="margins")(ops.stack(margins, -1))


def _count(config: Config, splits: data.Splits, name: str):
    """The training texts' n-grams of a kind, their inverse document frequencies, and who has them [text, gram]."""
    import scipy.sparse

    grams, rows, total = [], [], 0
    for tokens, _ in splits.train:
        text, place = np.nonzero(tokens[name])
        grams.append(tokens[name].numpy()[text, place])
        rows.append(total + text)
        total += len(tokens[name])
    known, index = np.unique(np.concatenate(grams), return_inverse=True)
    has = scipy.sparse.csr_array(
        (np.ones(len(index)), (np.concatenate(rows).astype(np.int32), index.astype(np.int32))),
        shape=(total, len(known)),
    )
    having = has.sum(0)
    often = having >= (config.rare or (1 if total < 4_000 else 2))
    if not often.any():
        often[:] = True
    return known[often], 1 + np.log((1 + total) / (1 + having[often])), has[:, np.flatnonzero(often)]


def log_count_ratio(has, mine: np.ndarray) -> np.ndarray:
    """How much more often a class's texts have each n-gram than others do (Wang & Manning 2012, equation 2).

    Args:
        has: which texts have which n-grams, sparse, [text, gram].
        mine: which texts are of the class, [text].
    """
    ours, others = has[mine].sum(0) + 1, has[~mine].sum(0) + 1
    return np.log((ours / ours.sum()) / (others / others.sum()))


def _convolutions(config: Config, splits: data.Splits) -> keras.Model:
    """Convolutions over words (Kim 2014) that are also known by their letters (Ma & Hovy 2016)."""
    words = keras.Input([None], dtype="int64", name="words")
    letters = keras.Input([None, LETTERS], dtype="int32", name="letters")
    known = layers.IntegerLookup(mask_token=0, name="word")
    kinds = np.unique(np.concatenate([np.unique(tokens["words"]) for tokens, _ in splits.train]))
    known.set_vocabulary(kinds[kinds > 0])
    index = known(words)
    # Most words of a batch come more than once, and the nothing that fills it up comes most: each is spelled once.
    powers = np.cumprod(np.full(LETTERS, 0x1E3779B97F4A7C15))
    spelled = ops.sum(ops.cast(letters, "int64") * powers, -1)  # a number that two spellings share about never
    _, first, which = ops.unique(spelled, sorted=False, return_index=True, return_inverse=True)
    spellings = ops.take(ops.reshape(letters, [-1, LETTERS]), first, axis=0)
    # Convolutions read a batch as one row of words without what fills it up, each text between zeros, two on each side:
    # no convolution reaches from one text into another, and one at least sees nothing, in the shortest text as well.
    inside = ops.pad(words > 0, [[0, 0], [4, 0]], constant_values=True)
    places, text = ops.nonzero(ops.reshape(inside, [-1]))[0], ops.nonzero(inside)[0]
    spread = keras.initializers.RandomUniform(-0.25, 0.25)

    def member(number):
        of_letters = layers.Embedding(256, 16, embeddings_initializer=spread)(spellings)  # [spelling, letter, 16]
        of_letters = layers.Conv1D(config.width // 2, 3, padding="same", activation="relu")(of_letters)
        of_words = layers.Embedding(known.vocabulary_size(), config.width, embeddings_initializer=spread)(index)
        x = layers.Concatenate()([of_words, ops.take(ops.max(of_letters, axis=1), which, axis=0)])
        x = layers.Identity(name=f"seen_{number}")(x * ops.cast(words > 0, x.dtype)[..., None])
        x = ops.reshape(ops.pad(x, [[0, 0], [2, 2], [0, 0]]), [-1, x.shape[-1]])
        x = layers.Dropout(config.forget)(ops.take(x, places, axis=0))
        beside = {at: ops.roll(x, -at, axis=0) for at in (-1, 0, 1, 2)}  # round the ends there are zeros
        found = [layers.Dense(config.filters, "relu")(ops.concatenate([beside[at] for at in window], axis=-1))
                 for window in ((0, 1), (-1, 0, 1), (-1, 0, 1, 2))]  # fmt: skip
        x = ops.segment_max(ops.concatenate(found, axis=-1), text, sorted=True)
        x = layers.Dropout(config.dropout)(x)
        return ops.log_softmax(layers.Dense(len(splits.names), dtype="float32")(x))

    scores = ops.exp(ops.mean(ops.stack([member(number) for number in range(config.networks)]), axis=0))
    return keras.Model({"words": words, "letters": letters}, scores, name="network")


def train(config: Config, model: keras.Model, splits: data.Splits) -> dict[str, float]:
    """Fit the network, then find on validation how much it and the linear machines count."""
    network = model.get_layer("network")
    own = splits.validation.map(lambda tokens, targets: ({name: tokens[name] for name in network.input}, targets))
    cost = training.fit(config, network, dataclasses.replace(splits, validation=own))
    together = model.get_layer("together")
    answer = tf.function(keras.Model(model.input, together.input), reduce_retracing=True)
    pairs = [(answer(tokens, training=False).numpy(), np.argmax(targets, -1)) for tokens, targets in splits.validation]
    members, labels = (np.concatenate(part) for part in zip(*pairs, strict=True))
    weights = weigh(members, labels)
    together.kernel.assign(weights[:, None])
    run.say("weights", "  ".join(f"{name} {weight:.2f}" for name, weight in
                                 zip(("network", "SVM", "naive Bayes SVM"), weights, strict=False)))  # fmt: skip
    return cost


def weigh(members: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How much each member counts, above 0, so that the softmax of their sum fits the labels (Wolpert 1992).

    With a normal prior on the logarithms, so that a few labels, or some that are all right, move them little.

    Args:
        members: log-probabilities, then margins, [text, class, member].
        labels: [text].
    """
    import scipy.optimize
    import scipy.special

    prior = np.log([1.0, 2.0, 2.0][: members.shape[-1]])

    def loss(logs):
        found = scipy.special.log_softmax(members @ np.exp(logs), axis=1)
        return np.sum((logs - prior) ** 2) - np.sum(found[np.arange(len(labels)), labels])

    return np.exp(scipy.optimize.minimize(loss, prior).x)


def measure(config: Config, model: keras.Model, splits: data.Splits) -> dict[str, metrics.Measured]:
    answer = tf.function(lambda tokens: model(tokens, training=False), reduce_retracing=True)
    pairs = [(np.argmax(targets, -1), answer(tokens).numpy()) for tokens, targets in splits.test]
    labels, scores = (np.concatenate(part) for part in zip(*pairs, strict=True))
    classification.plot_confusion(labels, scores.argmax(-1), splits.names, config.folder / "confusion_matrix.png")
    return classification.classification(labels, scores)


def folds(config: Config) -> run.Folds | None:
    """The runs whose mean is the result: each has another part to test."""
    parts = config.folds
    if not parts:
        return None
    configs = {f"fold-{fold}": dataclasses.replace(config, fold=fold) for fold in range(parts)}
    few = f", learned from {config.examples} texts of each class" if config.examples else ""
    return run.Folds(configs, f"mean of {parts}-fold cross-validation, stratified{few}")


def baseline(config: Config, splits: data.Splits) -> dict[str, metrics.Measured]:
    """A linear SVM on TF-IDF of words, pairs of words and two to five characters."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.svm import LinearSVC

    found, _ = _read(config)
    rows, strings = _rows(config), np.array(found.texts, object)
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
    )
    machine = make_pipeline(features, LinearSVC(random_state=config.seed))
    machine.fit(strings[rows["train"]], found.labels[rows["train"]])
    return classification.decisions(found.labels[rows["test"]], machine.predict(strings[rows["test"]]))


def explain(model: keras.Model, text: str, *, steps: int = 100) -> tuple[int, float, list[tuple[str, float]]]:
    """Which words the answer rests on, by integrated gradients (Sundararajan et al. 2017).

    On the way from a text of nothing to this one, all that its words and n-grams bring grows alike from zero; what an
    n-gram adds is shared by the words that it touches. The words' parts sum to what the score gained on the way.

    Returns:
        The best class, what its score gained, and each word with its part in that. The mark "^" stands for the begin.
    """
    if "margins" not in [layer.name for layer in model.layers]:
        raise ValueError("only networks from scratch are explained; this model has a backbone")
    if not text.strip():
        raise ValueError("the text is empty; give words")
    network = model.get_layer("network")
    seen = [layer for layer in network.layers if layer.name.startswith("seen_")]
    tables = [model.get_layer(f"{name[:-1]}_table") for name in NGRAMS]
    tokens = _of_ngrams(tf.constant([text]))
    vectors = keras.Model(network.input, [layer.output for layer in seen])(
        {name: tokens[name] for name in network.input}
    )
    rows = keras.Model({name: model.input[name] for name in NGRAMS}, [table.output for table in tables])(
        {name: tokens[name] for name in NGRAMS}
    )
    of_network = keras.Model([[layer.output for layer in seen], network.input["words"]], network.output)
    of_machines = keras.Model([table.output for table in tables], model.get_layer("margins").output)
    weights = model.get_layer("together").kernel

    def score(parts):
        words = tf.repeat(tokens["words"], len(parts[0]), 0)
        members = tf.math.log(tf.maximum(of_network([parts[: len(seen)], words]), 1e-9))[..., None]
        members = tf.concat([members, of_machines(parts[len(seen) :])], -1)
        return tf.nn.softmax(tf.matmul(members, weights)[..., 0])

    whole = [tf.cast(part, tf.float32) for part in tf.nest.flatten([vectors, rows])]
    label = int(tf.argmax(score(whole)[0]))
    # Lengths grow with the root of the way: in its square they grow evenly, which a sum of few steps follows better.
    at = (np.arange(steps) + 0.5) / steps
    ways, pace = tf.constant(at**2, tf.float32), tf.constant(2 * at / steps, tf.float32)
    parts = [ways[:, None, None] * part for part in whole]
    with tf.GradientTape() as tape:
        tape.watch(parts)
        found = score(parts)[:, label]
    slopes = tape.gradient(found, parts)
    gained = [tf.einsum("s,stf,tf->t", pace, slope, part[0]).numpy() for slope, part in zip(slopes, whole, strict=True)]

    words, spans = _spans(text)
    by_word = np.sum([part[: len(words)] for part in gained[: len(seen)]], 0)
    for name, part in zip(NGRAMS, gained[len(seen) :], strict=True):
        for gram, value in zip(tokens[name][0].numpy(), part, strict=True):
            for word in spans[name].get(int(gram), []):
                by_word[word] += value / len(spans[name][int(gram)])
    nothing = score([tf.zeros_like(part) for part in whole])[0, label]
    gain = float(score(whole)[0, label] - nothing)
    return label, gain, list(zip(words, by_word.tolist(), strict=True))


def _spans(text: str) -> tuple[list[str], dict[str, dict[int, list[int]]]]:
    """A text's words, and which of them each n-gram touches, by its number; one that comes twice touches them all."""
    words = [word.decode() for word in _split(tf.constant([text]))[0].numpy()]
    lower = [word.decode() for word in tf.strings.lower(words, encoding="utf-8").numpy()]
    letters = [(letter, at) for at, word in enumerate(lower) for letter in (" " if at else "") + word][:CHARACTERS]
    grams = {
        "phrases": [(" ".join(lower[at : at + size]), range(at, at + size))
                    for size in (1, 2, 3) for at in range(len(lower) - size + 1)],
        "pieces": [("".join(letter for letter, _ in letters[at : at + size]), [of for _, of in letters[at : at + size]])
                   for size in (2, 3, 4, 5) for at in range(len(letters) - size + 1)],
    }  # fmt: skip
    spans = {}
    for name, found in grams.items():
        numbers = _hash(tf.RaggedTensor.from_row_lengths([gram for gram, _ in found], [len(found)])).values.numpy()
        spans[name] = {}
        for number, (_, touched) in zip(numbers.tolist(), found, strict=True):
            spans[name].setdefault(number, []).extend(touched)
    return words, spans


class Endpoint(tf.Module):
    def __init__(self, config: Config, model: keras.Model, splits: data.Splits):
        super().__init__()
        self.model, self.preprocess = model, splits.preprocess
        if config.backbone:
            self.tokenizer = _of_backbone(config.backbone, config.length).own  # some keep tables
        self.names = tf.constant(splits.names)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def __call__(self, text):
        blank = tf.equal(tf.strings.length(tf.strings.strip(text)), 0)
        told = tf.debugging.Assert(~tf.reduce_any(blank), ["text is empty at", tf.where(blank)[:, 0], "; send words"])
        with tf.control_dependencies([told]):
            scores = self.model(self.preprocess(text), training=False)
        return ranked(self.names, scores, most=self.names.shape[0])
