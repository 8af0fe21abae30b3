"""Text generation: go on from a prompt, or say how probable a text is.

Data      a text file, or a folder or archive of *.txt files; `tinyshakespeare`
Model     a decoder-only transformer from scratch over characters, bytes or subwords; rotary positions, pre-norm;
          or a pretrained one, a KerasHub preset that is learned further, all of it or by LoRA (--backbone)
Endpoint  prompt, max_tokens, temperature, top_k, top_p, seed -> text, tokens, log_probability, unknown; all but the
          prompt may be left out
          signature `score`: text -> log_probability, tokens, unknown
"""

import collections
import dataclasses
import functools
import itertools
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from shared import data, metrics, run, training
from shared.data import corpus, named
from shared.metrics import language


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
    tokens: Literal["characters", "bytes", "subwords"] = "characters"  # what the network reads and writes
    vocabulary: int = 512  # how many subwords there are, the text's characters among them
    context: int = 128  # how many tokens a layer looks back on, and the length of a training window
    layers: int = 3  # blocks, each of attention and a feed-forward network
    heads: int = 3  # of each attention
    width: int = 96  # of the stream that the blocks add to
    history: int = 4  # how many of the newest tokens the network's input tells of at each place
    dropout: float = 0.0  # share of what the input and each block add to the stream that training drops
    # Folder of a KerasHub preset to go on from: a causal language model whose tokens are made of bytes, as those of
    # GPT-2, OPT and Llama 3 are; of the fields above it heeds --context alone.
    backbone: str = ""
    lora: int = 0  # with a backbone: rank of what is added to the attention's matrices and alone learns; 0: all learns
    epochs: int = 3  # passes over the training text
    batch: int = 16  # windows in a step
    optimizer: Literal["muon", "adamw"] = "muon"  # AdamW takes less time a step, Muon fewer steps; backbones take AdamW
    rate: float = 0.0  # peak learning rate; 0: 0.008, for AdamW 0.003, with a backbone 0.0001, by LoRA 0.001
    decay: float = 0.1  # weight decay; with Muon of its matrices alone
    # Processors that one operation may take; each step's batch is cut up for them; 0: all, uncut, as backbones and many
    # devices learn.
    threads: int = 1
    # Compile the step, or where parts of a batch learn side by side its update alone; see CONTRIBUTING.md.
    xla: bool = False
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "auto"  # see CONTRIBUTING.md

    def __post_init__(self):
        if self.backbone or self.strategy in ("mirrored", "multiworker"):
            object.__setattr__(self, "threads", 0)  # batches are not cut up there, so each operation needs all
        super().__post_init__()


SMOKE = Config(epochs=1, batch=32, context=32, layers=1, heads=2, width=16)
EXPECT = {"": {"loss": 1.41}, "tinyshakespeare": {"loss": 1.555}}
NAMED = ("tinyshakespeare",)
MOST = 4096  # tokens that one request may ask for


def load(config: Config) -> data.Splits:
    text, about = _read(config)
    cut = int(0.9 * len(text))  # as nanoGPT does
    tokens = _of_backbone(config.backbone) if config.backbone else Tokens(_vocabulary(config, text, learned=text[:cut]))
    (learned, _), (test, unknown) = (_encode(tokens, part) for part in (text[:cut], text[cut:]))
    window = config.context
    # The beginning of what may be learned from: its end is of one piece with the test, which shares its names.
    held = config.batch * window * max(1, round(0.03 * len(learned) / (config.batch * window)))
    train, validation = learned[held:], learned[: held + 1]
    count = (len(train) - window - 1) // window
    if count < config.batch or len(test) < window + 2:
        raise ValueError(
            f"a text of {len(text):,} characters is too short for --batch={config.batch} and --context={window}; "
            f"expected some {max(3 * config.batch, 20) * window:,} or more"
        )
    passes = max(1, 250 * config.batch // count)  # an epoch of a short text takes some
    ids = tf.constant(train)

    def read(indices, step):
        """Windows that tile the text, all moved by a number of tokens that each step draws anew."""
        moved = tf.random.stateless_uniform([], [config.seed, tf.cast(step, tf.int32)], 0, window, tf.int64)
        at = (indices * window + moved)[:, None] + tf.range(window + 1, dtype=tf.int64)
        found = tf.ensure_shape(tf.gather(ids, at), [config.batch, window + 1])
        return found[:, :-1], found[:, 1:]

    lines, known = set(text[cut:].splitlines()), set(text[:cut].splitlines())
    run.say("audit", f"train {len(train):,}  validation {len(validation):,}  test {len(test):,} tokens, of "
            f"{len(tokens.names):,} kinds; {sum(line in known for line in lines if len(line) > 20)} of the test's "
            f"{sum(len(line) > 20 for line in lines):,} long lines are also in train")  # fmt: skip
    return data.Splits(
        stream=data.stream(count, batch=config.batch, seed=config.seed, read=read),
        steps=passes * (count // config.batch),
        train=_windows(train, config),
        validation=_windows(validation, config),
        test=_windows(test, config),
        preprocess=tokens,
        names=tokens.names,
        request=_request(text[cut:]),
        about={
            **about,
            "backbone": Path(config.backbone).name,
            "protocol": _protocol(config, about["protocol"], text[cut:], unknown),
        },
    )  # fmt: skip


def load_other(config: Config, names: Sequence[str]) -> data.Splits:
    """Another text, to measure a saved model on: in the model's own tokens, what it cannot read passed over."""
    text, about = _read(config)
    part = "all of it"
    if config.data in NAMED:
        text, part = text[int(0.9 * len(text)) :], about["protocol"]
    if config.backbone:
        tokens = _of_backbone(config.backbone)
    elif config.tokens == "bytes":
        tokens = Tokens(_vocabulary(config, "", learned=""))
    else:
        tokens = Tokens([name.encode() for name in names[1:]])
    ids, unknown = _encode(tokens, text)
    if len(ids) < 2:
        raise ValueError(f"the model can read {len(ids)} tokens of {about['data']}; give a longer text in its alphabet")
    test = _windows(ids, dataclasses.replace(config, batch=32))
    return data.Splits(
        stream=lambda step: test.repeat(),
        steps=len(test),
        train=test.take(0),
        validation=test.take(0),
        test=test,
        preprocess=tokens,
        names=tokens.names,
        request=_request(text),
        about={**about, "protocol": _protocol(config, part, text, unknown)},
    )


def _protocol(config: Config, part: str, text: str, unknown: int) -> str:
    told = f"{part}, {len(text):,} characters in windows of {config.context} tokens"
    return told + (f"; {unknown:,} bytes that no token of the model fits were passed over" if unknown else "")


def _read(config: Config) -> tuple[str, dict[str, str]]:
    limits = "It writes what looks like its training text; nothing that it says is meant or checked. What it cannot "
    limits += "read (`unknown`) it passes over."
    if not config.data:
        from pydoc_data.topics import topics

        about = {"data": "python-reference", "protocol": "the last tenth", "licence": "PSF License Agreement",
                 "source": "the Python language reference that ships with Python (pydoc_data.topics), its beginning",
                 "limits": limits}  # fmt: skip
        return "\n\n".join(topics[name] for name in sorted(topics))[:220_000], about
    if config.data in NAMED:
        text, _ = corpus.read(named.find(config.data)["input.txt"], on_error="fail")
        protocol = "validation (nanoGPT's): the last tenth"
        about = {**named.about(config.data), "protocol": protocol, "limits": limits}
        return text, about
    if config.data in named.DATASETS:
        raise ValueError(f"{config.data} is no running text; expected {', '.join(NAMED)}, or the path of a text")
    text, unreadable = corpus.read(Path(config.data), on_error=config.on_error)
    for line in unreadable:
        run.say("", f"left out {line}")
    return text, {"data": config.data, "protocol": "the last tenth", "limits": limits}


def _encode(tokens: "Tokens", text: str, chunk: int = 1 << 21) -> tuple[np.ndarray, int]:
    """Token ids of a long text, a chunk of its characters at a time, and how many bytes no token fits."""
    parts = [tokens.read(tf.constant([text[at : at + chunk].encode()])) for at in range(0, len(text), chunk)]
    return np.concatenate([ids.values.numpy() for ids, _ in parts]), sum(int(unknown[0]) for _, unknown in parts)


def _windows(ids: np.ndarray, config: Config) -> tf.data.Dataset:
    """(tokens, the tokens that come next) in windows side by side; the last one may be shorter."""
    whole = (len(ids) - 1) // config.context * config.context
    inputs, targets = (part.reshape(-1, config.context) for part in (ids[:whole], ids[1 : whole + 1]))
    rest = tf.data.Dataset.from_tensors((ids[None, whole:-1], ids[None, whole + 1 :]))
    batches = data.in_order(inputs, targets, batch=config.batch)
    return batches if whole == len(ids) - 1 else batches.concatenate(rest)


def _request(text: str, count: int = 8) -> dict[str, np.ndarray]:
    """Beginnings of some lines, each to be gone on with in another way."""
    lines = [line for line in text.splitlines() if line.strip()][:count]
    prompts = [line[: 3 * (place + 1)] for place, line in enumerate((lines * count)[:count])]
    return {
        "prompt": np.array([prompt.encode() for prompt in prompts], object),
        "max_tokens": np.arange(10, 10 + count, dtype=np.int32),
        "temperature": np.linspace(0, 1, count, dtype=np.float32),
        "top_k": np.array([0, 5] * (count // 2), np.int32),
        "top_p": np.linspace(1, 0.8, count, dtype=np.float32),
        "seed": np.arange(count, dtype=np.int64),
    }


def _vocabulary(config: Config, text: str, *, learned: str) -> list[bytes]:
    if config.tokens == "bytes":
        return [bytes([code]) for code in range(256)]
    characters = sorted(set(text))  # of all of it, as nanoGPT does: nothing but the alphabet is taken from the test
    if config.tokens == "subwords" and len(characters) >= config.vocabulary:
        raise ValueError(f"--vocabulary={config.vocabulary} has no room for subwords: the text has "
                         f"{len(characters):,} characters, each a token; give more, or leave --tokens out")  # fmt: skip
    more = _byte_pairs(learned, config.vocabulary - len(characters)) if config.tokens == "subwords" else []
    return [token.encode() for token in [*characters, *more]]


def _byte_pairs(text: str, count: int) -> list[str]:
    """Byte-pair encoding (Sennrich et al. 2016): the most frequent pair of neighbours in words becomes a token."""
    found = collections.Counter(re.findall(r" ?\w+|[^\w\s]+|\s+", text))
    words, counts = [list(word) for word in found], list(found.values())
    pairs, where = collections.Counter(), collections.defaultdict(set)
    for index, word in enumerate(words):
        for pair in itertools.pairwise(word):
            pairs[pair] += counts[index]
            where[pair].add(index)
    made = []
    while len(made) < count and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        if "".join(best) not in made:
            made.append("".join(best))
        for index in where.pop(best):
            word, merged = words[index], []
            for pair in itertools.pairwise(word):
                pairs[pair] -= counts[index]
            for piece in word:
                merged.append(piece)
                if tuple(merged[-2:]) == best:
                    merged[-2:] = ["".join(best)]
            for pair in itertools.pairwise(merged):
                pairs[pair] += counts[index]
                where[pair].add(index)
            words[index] = merged
        del pairs[best]
    return made


class Tokens(tf.Module):
    """Text to token ids and back, inside the graph: at each place the longest token that fits.

    Characters, bytes and subwords differ only in the vocabulary. Id 0 is what no token fits, one id a byte.
    """

    unknown = 0

    def __init__(self, vocabulary: Sequence[bytes]):
        super().__init__()
        pieces = ["\ufffd".encode(), *vocabulary]
        self.names = tuple(piece.decode(errors="backslashreplace") for piece in pieces)
        self.pieces = tf.constant(pieces)
        self.written = tf.range(len(pieces)) > 0  # tokens that may be written
        self.longest = max(len(piece) for piece in vocabulary)
        # How many characters a token spells: the bytes in it that begin one.
        self.characters = np.array([1] + [sum(code & 0xC0 != 0x80 for code in piece) for piece in vocabulary])
        # A tree of bytes: node 0 is the root, node 1 the end of every way that leads to no token.
        following, endings = [[1] * 257, [1] * 257], [0, 0]  # code 256 stands behind the end of a text
        for index, piece in enumerate(vocabulary, start=1):
            node = 0
            for code in piece:
                if following[node][code] == 1:
                    following[node][code] = len(following)
                    following.append([1] * 257)
                    endings.append(0)
                node = following[node][code]
            endings[node] = index
        self.following, self.endings = tf.constant(np.ravel(following), tf.int32), tf.constant(endings)
        self.start = self(tf.constant(["\n"])).values[:1]  # every text is read as the beginning of a line

    def __call__(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Token ids of texts [batch], as int32 [batch, (token)]."""
        sizes = tf.strings.length(texts)
        size = tf.maximum(tf.reduce_max(sizes), 1)
        inside = tf.range(size) < sizes[:, None]
        codes = tf.cast(tf.io.decode_raw(texts, tf.uint8, fixed_length=size), tf.int32)
        codes = tf.pad(tf.where(inside, codes, 256), [[0, 0], [0, self.longest]], constant_values=256)
        node = best = tf.zeros_like(codes[:, :size])
        length = tf.ones_like(node)
        for step in range(self.longest):  # from all places at once, as if a token began at each
            node = tf.gather(self.following, 257 * node + codes[:, step : step + size])
            found = tf.gather(self.endings, node)
            best, length = tf.where(found > 0, found, best), tf.where(found > 0, step + 1, length)

        # A token begins at place 0, and where one ends. Each round doubles how many tokens on from a place are marked.
        behind = tf.fill([tf.size(sizes), 1], size)  # the place behind a text leads to itself
        jump = tf.concat([tf.minimum(tf.range(size) + length, size), behind], 1)
        starts = tf.range(tf.size(sizes))[:, None] * (size + 1)
        jump = tf.reshape(jump + starts, [-1])
        begins = tf.reshape(tf.zeros_like(starts) + tf.one_hot(0, size + 1, dtype=tf.int32), [-1])
        done = tf.constant(1)
        while done <= size:
            begins = tf.maximum(begins, tf.math.unsorted_segment_max(begins, jump, tf.size(jump)))
            jump, done = tf.gather(jump, jump), 2 * done
        return tf.ragged.boolean_mask(best, (tf.reshape(begins, [-1, size + 1])[:, :size] > 0) & inside)

    def read(self, texts: tf.Tensor) -> tuple[tf.RaggedTensor, tf.Tensor]:
        """Token ids of texts [batch], as int32 [batch, (token)], and of each text how many bytes no token fits."""
        ids = self(texts)
        known = ids > self.unknown
        return tf.ragged.boolean_mask(ids, known), tf.reduce_sum(tf.cast(~known, tf.int32), axis=1)

    def text(self, ids: tf.Tensor) -> tf.Tensor:
        """What token ids [..., token] spell, as strings [...]."""
        return self.whole(tf.strings.reduce_join(tf.gather(self.pieces, ids), axis=-1))

    def whole(self, texts: tf.Tensor) -> tf.Tensor:
        """Valid UTF-8, even where a text ends within a character."""
        return tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")


class BytePairs(Tokens):
    """A backbone's own tokenizer, inside the graph. Id -1 is what no token fits; what marks a text's end is no token.

    A text that spells such a mark is read as the letters that it is: marks are for programs, not for who writes.
    """

    unknown = -1
    lost = r"[\x00६]"  # KerasHub's tokenizer has uses of its own for these

    def __init__(self, tokenizer):
        tf.Module.__init__(self)
        tokenizer.unsplittable_tokens = []
        del tokenizer.cache  # else it would still be exported
        tokenizer.cache = _Forgetful()
        self.tokenizer = tokenizer
        marks = set(tokenizer.special_token_ids)
        spelled = tf.function(tokenizer.detokenize)(tf.range(tokenizer.vocabulary_size())[:, None]).numpy()
        pieces = [b"" if token in marks else piece for token, piece in enumerate(spelled)]
        self.names = tuple(piece.decode(errors="backslashreplace") for piece in pieces)
        self.pieces = tf.constant(pieces)
        self.written = self.pieces != b""
        self.characters = np.array([sum(code & 0xC0 != 0x80 for code in piece) for piece in pieces])
        start = getattr(tokenizer, "start_token_id", None)  # some have none, and learned texts that follow an end
        self.start = tf.constant([tokenizer.end_token_id if start is None else start])

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def __call__(self, texts):
        return self.tokenizer(tf.strings.regex_replace(self.whole(texts), self.lost, ""))

    def read(self, texts):
        ids, unknown = super().read(texts)
        texts = self.whole(texts)
        lost = tf.strings.length(texts) - tf.strings.length(tf.strings.regex_replace(texts, self.lost, ""))
        return ids, unknown + lost


class _Forgetful:
    """Stands in for the table where KerasHub's tokenizer keeps all words that it met: a server's would grow for ever.

    The tokenizer looks words up, inserts those that it did not find, and looks all up again.
    """

    found = None

    def lookup(self, words):
        found, self.found = self.found, None
        return tf.fill(tf.shape(words), "") if found is None else found

    def insert(self, words, found):
        self.found = found


@functools.cache
def _of_backbone(folder: str) -> BytePairs:
    """The tokens of a backbone.

    Raises:
        FileNotFoundError, ValueError: no backbone is in the folder, or one of another kind.
    """
    import keras_hub

    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"--backbone={folder} holds no config.json; expected a folder that save_to_preset made")
    taken = "expected the preset of a causal language model whose tokens are bytes, such as GPT-2, OPT or Llama 3"
    try:
        tokenizer = keras_hub.models.CausalLMPreprocessor.from_preset(folder).tokenizer
    except ValueError as error:
        raise ValueError(f"--backbone={folder} writes no text ({error}); {taken}") from error
    if not isinstance(tokenizer, keras_hub.tokenizers.BytePairTokenizer):
        raise ValueError(f"--backbone={folder} has a {type(tokenizer).__name__}; {taken}")
    return BytePairs(tokenizer)


def build(config: Config, splits: data.Splits) -> keras.Model:
    if config.lora and not config.backbone:
        raise ValueError(f"--lora={config.lora} is for a backbone; give --backbone=FOLDER, or leave it out")
    if config.width % (2 * config.heads):
        raise ValueError(f"--width={config.width} must be a multiple of twice --heads={config.heads}")
    if config.backbone:
        model = _pretrained(config, len(splits.names), dtype=keras.config.dtype_policy().name)
        _check_cache(model.get_layer("causal"), config.backbone)
        if config.lora:
            _adapt(model, rank=config.lora)
    else:
        model = _connected(config, _layers(config, len(splits.names)))
    muon = config.optimizer == "muon" and not config.backbone
    usual = 0.008 if muon else 0.003
    if config.backbone:
        usual = 1e-3 if config.lora else 1e-4
    rate = training.cosine(config, splits, rate=config.rate or usual)
    if muon:
        # It orthogonalises the updates of matrices inside the network; tables, scales and logits go by Adam.
        optimizer = keras.optimizers.Muon(
            rate, weight_decay=config.decay, adam_weight_decay=0.0, adam_beta_2=0.98, exclude_layers=["logits"]
        )
    else:
        optimizer = keras.optimizers.AdamW(rate, weight_decay=config.decay, beta_2=0.98)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    sizes = _sizes(config)
    model.compile(optimizer, loss, jit_compile=config.xla and len(sizes) == 1)
    if len(sizes) > 1:
        model.train_step = _in_parts(model, sizes, xla=config.xla)
    return model


def _sizes(config: Config) -> list[int]:
    """Of the parts of a batch that learn at once, each on as many processors as one operation may take."""
    alone = not tf.config.list_physical_devices("GPU") and tf.distribute.get_strategy().num_replicas_in_sync == 1
    parts = os.cpu_count() // config.threads if config.threads and alone else 1
    return [len(part) for part in np.array_split(np.arange(config.batch), min(max(1, parts), config.batch))]


def _in_parts(model: keras.Model, sizes: list[int], *, xla: bool):
    """A training step that learns parts of a batch, of so many windows each, side by side; `xla` compiles the update.

    TensorFlow shares one operation after the other out over all processors, which costs small ones more than it saves.
    """

    def gradients(token_ids, targets):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(token_ids, targets, model(token_ids, training=True))
            scaled = model.optimizer.scale_loss(loss)
        found = tape.gradient(scaled, [variable.value for variable in model.trainable_variables])
        return loss, [tf.convert_to_tensor(gradient) for gradient in found]

    @tf.function(jit_compile=xla)
    def update(*found):
        means = [tf.tensordot(shares, tf.stack(parts), 1) for parts in zip(*found, strict=True)]
        model.optimizer.apply(means, model.trainable_variables)

    shares = np.divide(sizes, sum(sizes), dtype=np.float32)

    def step(batch):
        token_ids, targets, _ = keras.utils.unpack_x_y_sample_weight(batch)
        parts = zip(tf.split(token_ids, sizes), tf.split(targets, sizes), strict=True)
        losses, found = zip(*(gradients(*part) for part in parts), strict=True)
        update(*found)
        model.metrics[0].update_state(tf.tensordot(shares, tf.stack(losses), 1))
        return model.get_metrics_result()

    return step


def _pretrained(config: Config, count: int, **options) -> keras.Model:
    """A backbone on whole texts, as `_connected` is: token ids [batch, time] -> logits [batch, time, token]."""
    import keras_hub

    options |= {"preprocessor": None, "compile": False, "name": "causal"}
    causal = keras_hub.models.CausalLM.from_preset(config.backbone, **options)
    if config.context > _span(causal):
        raise ValueError(f"--context={config.context}: the backbone reads {_span(causal)} tokens at most")
    token_ids = keras.Input([None], dtype="int32", name="token_ids")
    logits = causal({"token_ids": token_ids, "padding_mask": ops.ones_like(token_ids)})
    # A preset may have more outputs than tokens, to a round number.
    return keras.Model(token_ids, ops.cast(logits[..., :count], "float32"), name="pretrained")


def _check_cache(causal, folder: str) -> None:
    """ValueError where a backbone answers otherwise with its cache than without: of some kinds KerasHub's do (0.32)."""
    ids = np.arange(1, 9, dtype=np.int32)[None]
    plain = ops.convert_to_numpy(ops.cast(causal({"token_ids": ids, "padding_mask": np.ones_like(ids)}), "float32"))
    _, cache = causal._build_cache(ids)
    steps = [causal.call_with_cache(ids[:, at : at + 1], cache, at)[0] for at in range(8)]
    far = np.abs(ops.convert_to_numpy(ops.cast(ops.concatenate(steps, 1), "float32")) - plain).max() / plain.std()
    if far > 0.1:  # bfloat16 alone makes a hundredth
        raise ValueError(f"--backbone={folder}: KerasHub's {type(causal).__name__} answers otherwise with its cache "
                         f"than without, by {far:.0%}; take another kind, such as GPT-2, OPT or Llama 3")  # fmt: skip


def _adapt(model: keras.Model, *, rank: int) -> None:
    """Low-rank adaptation (Hu et al. 2021) of the backbone's queries and values; nothing else learns."""
    causal = model.get_layer("causal")
    causal.backbone.enable_lora(rank)
    for layer in causal._flatten_layers():
        if getattr(layer, "lora_enabled", False) and layer.bias is not None:
            layer.bias.trainable = False  # KerasHub lets it learn
    if not model.trainable_variables:
        raise ValueError(f"--lora={rank}: {type(causal).__name__} has no layers that KerasHub adapts; leave it out")


def _span(causal) -> int:
    """How many tokens a backbone reads at most; one that tells positions by rotation has no end, but takes its time."""
    return getattr(causal.backbone, "max_sequence_length", 2 * MOST)


def _connected(config: Config, layers: dict[str, keras.layers.Layer]) -> keras.Model:
    """The network on whole texts: token ids [batch, time] -> logits [batch, time, token] of what comes next."""
    token_ids = keras.Input([None], dtype="int32", name="token_ids")
    x = layers["token_embedding"](token_ids)
    for n in range(1, config.history):
        x = x + layers[f"earlier_embedding_{n}"](ops.pad(token_ids, [[0, 0], [n, 0]])[:, :-n])

    x = layers[f"dropout_{2 * config.layers}"](x)
    positions = ops.cumsum(ops.ones_like(token_ids[:1, :]), axis=1) - 1  # [1, time]
    back = positions[:, None, :, None] - positions[:, None, None, :]
    seen = ops.logical_and(back >= 0, back < config.context)  # [1, 1, time, time]
    cosine, sine = (ops.cast(part[:, None], x.dtype) for part in _turns(config, positions))  # [1, 1, time, size]
    for n in range(config.layers):
        y = layers[f"queries_keys_values_{n}"](ops.rms_normalization(x))
        parts = ops.split(y, 3 * config.heads, axis=-1)
        values = ops.stack(parts[2 * config.heads :], axis=1)  # [batch, head, time, size]
        y = ops.rms_normalization(ops.stack(parts[: 2 * config.heads], axis=1))
        y = y * cosine + ops.concatenate(ops.split(y, 2, axis=-1)[::-1], axis=-1) * sine
        queries, keys = ops.split(y, 2, axis=1)
        products = ops.matmul(queries, ops.swapaxes(keys, -1, -2))
        shares = ops.softmax(ops.where(seen, products, -1e9))  # [batch, head, time, key]
        y = ops.concatenate(ops.unstack(ops.matmul(shares, values), axis=1), axis=-1)  # [batch, time, width]
        x = x + layers[f"dropout_{2 * n}"](layers[f"attended_{n}"](y))
        y = ops.square(ops.relu(layers[f"wide_{n}"](ops.rms_normalization(x))))
        x = x + layers[f"dropout_{2 * n + 1}"](layers[f"narrow_{n}"](y))
    return keras.Model(token_ids, layers["logits"](ops.rms_normalization(x)), name="transformer")


def _layers(config: Config, count: int, *, dtype: str | None = None) -> dict[str, keras.layers.Layer]:
    """Everything with weights, by name, so that training and writing with a cache use the very same."""
    table = functools.partial(keras.layers.Embedding, output_dim=config.width, dtype=dtype)
    dense = functools.partial(keras.layers.Dense, use_bias=False, dtype=dtype)
    width, blocks = config.width, range(config.layers)
    layers = [
        table(count, embeddings_initializer="random_normal", name="token_embedding"),
        *[table(count, embeddings_initializer="zeros", name=f"earlier_embedding_{n}")
          for n in range(1, config.history)],
        *[dense(3 * width, name=f"queries_keys_values_{n}") for n in blocks],
        *[dense(width, kernel_initializer="zeros", name=f"attended_{n}") for n in blocks],
        *[dense(4 * width, name=f"wide_{n}") for n in blocks],
        *[dense(width, kernel_initializer="zeros", name=f"narrow_{n}") for n in blocks],
        *[keras.layers.Dropout(config.dropout, dtype=dtype, name=f"dropout_{n}") for n in range(2 * config.layers + 1)],
        keras.layers.Dense(count, dtype="float32", kernel_initializer="zeros", name="logits"),
    ]  # fmt: skip
    return {layer.name: layer for layer in layers}


def _turns(config: Config, positions):
    """Cosines and sines [..., size of a head] that turn queries and keys by their positions (Su et al. 2021).

    The product of a query and a key then depends on their distance alone. Both have unit variance before and shrink
    here, so that their product is what division by sqrt(size) makes it.
    """
    size = config.width // config.heads
    turns = np.tile(10_000.0 ** (-np.arange(size // 2, dtype=np.float32) * 2 / size), 2)
    angles = ops.cast(positions, "float32")[..., None] * turns
    signs = np.repeat([-1, 1], size // 2).astype(np.float32)
    return ops.cos(angles) * size**-0.25, ops.sin(angles) * (signs * size**-0.25)


train = training.fit


def _as_served(config: Config, model: keras.Model) -> keras.Model:
    """The network in float32, whatever it learned in: a token at a time, less precision is slower and no better."""
    if config.backbone:
        twin = _pretrained(config, model.output_shape[-1], dtype="float32", load_weights=False)
        with tempfile.TemporaryDirectory() as folder:  # what LoRA learned goes into the matrices on the way
            model.get_layer("causal").save_weights(f"{folder}/.weights.h5")
            twin.get_layer("causal").load_weights(f"{folder}/.weights.h5")
        return twin
    twin = _connected(config, _layers(config, model.output_shape[-1], dtype="float32"))
    twin.set_weights(model.get_weights())
    return twin


def measure(config: Config, model: keras.Model, splits: data.Splits) -> dict[str, metrics.Measured]:
    """Loss in windows that begin with nothing to look back on, and `sliding_loss` as `score` reads a longer text."""
    model, window = _as_served(config, model), config.context
    half = min(window, _span(model.get_layer("causal")) // 2) if config.backbone else window

    @tf.function(reduce_retracing=True)
    def answer(token_ids, targets):
        logits = model(token_ids, training=False)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)

    pairs = [(ids.numpy().ravel(), after.numpy().ravel()) for ids, after in splits.test]
    ids, after = (np.concatenate(part) for part in zip(*pairs, strict=True))

    def nats(length, new):
        """Of each token, in order: windows of so many tokens, of which so many are new and only those count."""
        begin = np.arange(0, max(1, len(ids) - (length - new)), new)
        places = np.minimum(begin[:, None] + np.arange(length), len(ids) - 1)
        at_once = max(1, len(pairs[0][0]) // length)  # rows of as many tokens as a batch has
        parts = np.array_split(places, -(-len(places) // at_once))
        rows = np.concatenate([answer(ids[part], after[part]).numpy() for part in parts])
        return np.concatenate([rows[0, :-new], rows[:, -new:].ravel()])[: len(ids)]

    each = nats(window, window)
    whole = len(each) // window * window
    language.plot_places(each[:whole].reshape(-1, window) if whole else each[None], config.folder / "places.png")
    starts = np.arange(0, len(each), window)
    characters = np.add.reduceat(splits.preprocess.characters[after], starts)
    found = {"loss": each, "sliding_loss": nats(2 * half, half)}
    return {name: language.loss(np.add.reduceat(each, starts), characters) for name, each in found.items()}


def baseline(config: Config, splits: data.Splits) -> dict[str, metrics.Measured]:
    """An interpolated 5-gram model of characters."""

    def characters(batches):
        ids = np.concatenate([targets.numpy().ravel() for _, targets in batches])
        return np.array([ord(character) for character in splits.preprocess.text(ids).numpy().decode()])

    nats = -np.log(witten_bell(characters(splits.train), characters(splits.test), order=5))
    starts = np.arange(0, len(nats), config.context)
    found = language.loss(np.add.reduceat(nats, starts), np.diff([*starts, len(nats)]))
    return {"loss": found, "sliding_loss": found}  # it looks back on what was before, wherever a window begins


def witten_bell(train: np.ndarray, test: np.ndarray, *, order: int) -> np.ndarray:
    """Probability of each symbol of `test` after those before it (Witten & Bell 1991; Chen & Goodman 1998, 2.5).

    P(w | h) = (c(h w) + t(h) P(w | shorter h)) / (c(h) + t(h)), where t(h) is how many kinds of symbols follow h; the
    shortest of all is uniform. Counts are of `train`, the symbols before the first of `test` are the last of `train`.
    """
    kinds, symbols = np.unique(np.concatenate([train, test]), return_inverse=True)
    learned = np.arange(len(symbols)) < len(train)
    history = np.zeros(len(symbols), np.int64)  # a number for the symbols before each
    shares = np.full(len(symbols), 1 / len(kinds))
    for _ in range(order):
        _, first, both = np.unique(history * len(kinds) + symbols, return_index=True, return_inverse=True)
        together = np.bincount(both[learned], minlength=len(first))
        alone = np.bincount(history[learned], minlength=history.max() + 1)[history]
        followers = np.bincount(history[first][together > 0], minlength=history.max() + 1)[history]
        found = (together[both] + followers * shares) / np.maximum(alone + followers, 1)
        shares = np.where(alone > 0, found, shares)
        history = np.concatenate([[len(first)], both[:-1]])
    return shares[~learned]


class Endpoint(tf.Module):
    def __init__(self, config: Config, model: keras.Model, splits: data.Splits):
        super().__init__()
        self.config, self.model, self.tokens = config, _as_served(config, model), splits.preprocess
        self.layers = {layer.name: layer for layer in self.model.layers}
        self.span = _span(self.layers["causal"]) if config.backbone else 2 * MOST
        self.most = min(MOST, self.span - 1)

    @property
    def signatures(self):
        return {"serving_default": self.__call__, "score": self.score}

    @property
    def defaults(self):
        return {"max_tokens": min(200, self.most), "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 0}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, name="prompt"),
            tf.TensorSpec([None], tf.int32, name="max_tokens"),
            tf.TensorSpec([None], tf.float32, name="temperature"),  # 0: always the most probable token
            tf.TensorSpec([None], tf.int32, name="top_k"),  # choose among so many only; 0: among all
            tf.TensorSpec([None], tf.float32, name="top_p"),  # among the fewest that have this probability together
            tf.TensorSpec([None], tf.int64, name="seed"),
        ]
    )
    def __call__(self, prompt, max_tokens, temperature, top_k, top_p, seed):
        inputs = [prompt, max_tokens, temperature, top_k, top_p, seed]
        batch = functools.reduce(tf.broadcast_dynamic_shape, [tf.shape(one) for one in inputs])
        prompt, max_tokens, temperature, top_k, top_p, seed = (tf.broadcast_to(one, batch) for one in inputs)
        check = tf.debugging.Assert
        most = self.most
        check(tf.reduce_all((max_tokens >= 0) & (max_tokens <= most)), [f"max_tokens must be 0 to {most}"])
        check(tf.reduce_all((temperature >= 0) & (temperature < 1e6)), ["temperature must be 0 or more"])
        check(tf.reduce_all(top_k >= 0), ["top_k must be 0, for all tokens, or more"])
        check(tf.reduce_all((top_p > 0) & (top_p <= 1)), ["top_p must be above 0, and 1 at most"])
        read, unknown = self._read(prompt)
        read = self._newest(read, max_tokens)
        lengths = tf.cast(read.row_lengths(), tf.int32)
        total = tf.maximum(tf.reduce_max(lengths + max_tokens), 1)
        ids = tf.transpose(read.to_tensor(shape=tf.stack([-1, total])))  # [time, batch]
        # Drawn for a row by its own seed, so that an answer does not depend on what else is in the batch.
        draws = tf.map_fn(
            lambda one: tf.random.stateless_uniform([MOST], tf.stack([one, 0])), seed,
            fn_output_signature=tf.TensorSpec([MOST], tf.float32),
        )  # fmt: skip

        first, cache, step = self._begin(ids, lengths)
        choose = chooser(temperature, top_k, top_p, self.tokens.written)

        def body(time, ids, nats, cache):
            logits, cache = step(ids, time, cache)
            following = time + 1
            draw = tf.gather(draws, tf.clip_by_value(following - lengths, 0, MOST - 1), axis=1, batch_dims=1)
            chosen = choose(logits, draw)
            gained = tf.gather(tf.nn.log_softmax(logits), chosen, axis=1, batch_dims=1)
            given = following < lengths
            newest = tf.where(given, tf.gather(ids, following), chosen)
            ids = tf.tensor_scatter_nd_update(ids, tf.reshape(following, [1, 1]), newest[None])
            counts = ~given & (following < lengths + max_tokens)
            return following, ids, nats + tf.where(counts, gained, 0.0), cache

        state = (first, ids, tf.zeros_like(temperature), cache)
        _, ids, nats, _ = tf.while_loop(lambda time, *_: time + 1 < total, body, state)
        at = tf.range(tf.maximum(tf.reduce_max(max_tokens), 0))  # [token]
        places = tf.minimum(lengths[:, None] + at, total - 1)
        written = tf.gather(tf.transpose(ids), places, axis=1, batch_dims=1)
        tokens = tf.where(at < max_tokens[:, None], tf.gather(self.tokens.pieces, written), b"")  # [batch, token]
        return {
            "text": self.tokens.whole(tf.strings.reduce_join(tokens, axis=-1)),
            "tokens": tokens,
            "log_probability": nats / tf.maximum(tf.cast(max_tokens, tf.float32), 1),  # mean, of what was written
            "unknown": unknown,  # bytes of the prompt that no token fits; they were passed over
        }

    def _read(self, texts):
        """Token ids [batch, (token)] after one for the beginning, and how many bytes of each text no token fits."""
        ids, unknown = self.tokens.read(texts)
        begin = tf.repeat(self.tokens.start[None], tf.size(texts), axis=0)
        return tf.concat([begin, ids], axis=1), unknown

    def _newest(self, read, max_tokens):
        """Of prompts [batch, (token)] as many of the newest tokens as make a difference, or have room."""
        if self.config.backbone:
            room = self.span - max_tokens
        else:  # no layer looks further back than `context` tokens, so the last one sees nothing beyond this
            room = self.config.layers * self.config.context + self.config.history
        lengths = tf.cast(read.row_lengths(), tf.int32)
        return tf.gather(read, tf.ragged.range(tf.maximum(lengths - room, 0), lengths), batch_dims=1)

    def _begin(self, ids, lengths):
        """How writing after prompts of some lengths [batch] begins, where ids [time, batch] are to be.

        Returns:
            The time whose token comes to the network first, the cache of what came before, and a function: ids, time,
            cache -> logits [batch, token] after the ids up to and with that time, and the cache with what it added.
        """
        if self.config.backbone:
            causal = self.layers["causal"]

            def step(ids, time, cache):
                logits, _, cache = causal.call_with_cache(ids[time][:, None], cache, time)
                return logits[:, 0, : len(self.tokens.names)], cache

            # All at once, also what stands in the places to come: that is written over before it is looked at.
            return tf.reduce_min(lengths) - 1, causal._build_cache(tf.transpose(ids))[1], step

        batch, heads, span = tf.size(lengths), self.config.heads, self.config.context
        size = self.config.width // heads
        empty = tf.zeros([span, batch, heads, size])
        return tf.constant(0), [empty] * 2 * self.config.layers, self._stepper(tf.shape(ids)[0])

    def _stepper(self, total):
        """What `_connected` does, for one token after the other, up to `total`: in few operations, for each takes its
        time, however small it is.

        The cache is a ring: the newest token takes the place of the one that lies `context` back.
        """
        config, layers = self.config, self.layers
        size, slots = config.width // config.heads, tf.range(config.context)
        names = ["token_embedding", *[f"earlier_embedding_{n}" for n in range(1, config.history)]]
        tables = tf.concat([layers[name].embeddings for name in names], 0)
        back = np.arange(config.history)[:, None]
        weights = {name: tf.convert_to_tensor(one.kernel) for name, one in layers.items() if hasattr(one, "kernel")}
        bias = tf.convert_to_tensor(layers["logits"].bias)
        cosines, sines = _turns(config, tf.range(total))  # [time, size]

        def norm(x):
            return x * tf.math.rsqrt(tf.reduce_mean(tf.square(x), -1, keepdims=True) + keras.config.epsilon())

        def step(ids, time, cache):
            recent = tf.gather(ids, tf.maximum(time - back[:, 0], 0))  # [history, batch]
            recent = tf.where(time >= back, recent, 0) + back * len(self.tokens.names)
            x = tf.reduce_sum(tf.gather(tables, recent), 0)  # [batch, width]
            cosine, sine = tf.gather(cosines, time), tf.gather(sines, time)
            slot = tf.reshape(time % config.context, [1, 1])
            unseen = tf.reshape(tf.where(slots <= time, 0.0, -1e9), [-1, 1, 1])
            renewed = []
            for n in range(config.layers):
                y = tf.reshape(norm(x) @ weights[f"queries_keys_values_{n}"], [-1, 3 * config.heads, size])
                y, values = tf.split(y, [2 * config.heads, config.heads], 1)
                y = norm(y)
                y = y * cosine + tf.concat(tf.split(y, 2, -1)[::-1], -1) * sine
                queries, keys = tf.split(y, 2, 1)
                keys = tf.tensor_scatter_nd_update(cache[2 * n], slot, keys[None])  # [slot, batch, head, size]
                values = tf.tensor_scatter_nd_update(cache[2 * n + 1], slot, values[None])
                renewed += [keys, values]
                # For one query, products and sums are faster than matrices. None is above sqrt(size): it has an exp.
                shares = tf.exp(tf.reduce_sum(queries * keys, -1) + unseen)[..., None]
                y = tf.reduce_sum(shares * values, 0) / tf.reduce_sum(shares, 0)  # [batch, head, size]
                x = x + tf.reshape(y, [-1, config.width]) @ weights[f"attended_{n}"]
                x = x + tf.square(tf.nn.relu(norm(x) @ weights[f"wide_{n}"])) @ weights[f"narrow_{n}"]
            return tf.nn.bias_add(norm(x) @ weights["logits"], bias), renewed

        return step

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def score(self, text):
        read, unknown = self._read(text)
        counts = tf.cast(read.row_lengths(), tf.int32) - 1
        window = min(self.config.context, self.span // 2)
        windows = tf.maximum((tf.reduce_max(counts) + window - 1) // window, 1)
        ids = read.to_tensor(shape=tf.stack([-1, windows * window + 1]))
        # Windows side by side, each but the first with the one before it to look back on.
        first = self.model(ids[:, :window], training=False)
        pairs = tf.signal.frame(ids[:, :-1], 2 * window, window)  # [batch, windows - 1, 2 * window]
        later = self.model(tf.reshape(pairs, [-1, 2 * window]), training=False)[:, window:]
        logits = tf.concat([first, tf.reshape(later, [tf.size(counts), (windows - 1) * window, later.shape[-1]])], 1)
        gained = -tf.nn.sparse_softmax_cross_entropy_with_logits(ids[:, 1:], logits)
        gained = tf.where(tf.range(windows * window) < counts[:, None], gained, 0.0)
        total = tf.reduce_sum(gained, -1)
        return {
            "log_probability": total / tf.maximum(tf.cast(counts, tf.float32), 1),
            "tokens": counts,
            "unknown": unknown,
        }


def chooser(temperature, top_k, top_p, written):
    """A function: logits [batch, token], draws [batch] from 0 to 1 -> a token id a row, by its own settings [batch].

    The `top_k` most probable tokens stay (0: all); of them the fewest that reach `top_p` together (nucleus sampling,
    Holtzman et al. 2020). Temperature 0 takes the most probable. Only tokens that `written` [token] tells are chosen.
    """
    rank = tf.range(tf.size(written))
    stays = (rank < top_k[:, None]) | (top_k[:, None] == 0)
    stays &= (rank == 0) | (temperature[:, None] > 0)
    cold = 1 / tf.maximum(temperature, 1e-6)[:, None]

    def choose(logits, draw):
        ranked = tf.math.top_k(tf.where(written, logits, logits.dtype.min), k=logits.shape[-1])
        shares = tf.where(stays, tf.exp((ranked.values - ranked.values[:, :1]) * cold), 0.0)  # of the first one's
        before = tf.cumsum(shares, axis=-1, exclusive=True)
        shares = tf.where(before < top_p[:, None] * tf.reduce_sum(shares, -1, keepdims=True), shares, 0.0)
        reached = tf.cumsum(shares, axis=-1)
        place = tf.reduce_sum(tf.cast(reached <= draw[:, None] * reached[:, -1:], tf.int32), -1)
        return tf.gather(ranked.indices, tf.minimum(place, logits.shape[-1] - 1), axis=1, batch_dims=1)

    return choose
