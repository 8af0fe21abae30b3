"""Retrieval: say which items a user takes next, among all there are.

Data      MovieLens' u.data or ratings.dat; a CSV with columns user,item and, if there, timestamp; `ml-100k`
Model     a query tower that reads the history in order (a causal transformer) and an item tower, meeting in a dot
          product, beside a linear regression of the next item on the fading history, in closed form; TensorFlow
          Recommenders' sampled loss for large catalogues, and its top-k indices
Endpoint  user, or items just taken, or both -> ten items that the user has not had, with scores; popular ones for a
          stranger; where fewer are left, nothing, "", in their place
"""

import dataclasses
import time
from pathlib import Path
from typing import ClassVar, Literal

import keras
import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

from shared import data, metrics, run, training
from shared.data import named, ratings
from shared.metrics.retrieval import ndcg, plot_popularity, ranks, retrieval


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
    ZERO: ClassVar = (*run.Config.ZERO, "layers", "linear")
    epochs: int = 16  # passes over the histories
    batch: int = 64  # windows of histories in a step, over all devices together
    patience: int = 16  # epochs without a better validation result before training stops
    length: int = 100  # items of a history that the network sees, the latest ones
    width: int = 64  # of the vectors of items and queries
    layers: int = 2  # transformer blocks of the query tower
    heads: int = 2  # of their attention
    dropout: float = 0.3  # share of activations dropped while learning
    ahead: int = 1  # how many of the next items each place learns to foresee
    fading: float = 0.7  # weight of each further one, relative to the one before
    rate: float = 2e-3  # peak learning rate
    loss: Literal["full", "sampled"] = "full"  # softmax over all items, or over the batch's: for over 50,000 items
    index: Literal["brute", "streaming", "scann"] = "brute"  # of the version: scores all items at once, or in blocks
    linear: int = 10_000  # most items for which the linear part is solved; its matrix has the square of them
    fade: float = 10.0  # items after which one weighs a third in the linear part
    stay: float = 0.02  # what an item weighs there for good
    penalty: float = 80.0  # of the linear part's weights, squared


SMOKE = Config(epochs=1, batch=16, length=20, width=16, layers=1)
EXPECT = {"": {"ndcg@10": 0.50}, "ml-100k": {"ndcg@10": 0.104}}
TOP = 10  # items in an answer
BLOCK = 16_384  # items that the streaming index scores at once
LARGE = 20_000  # items of which EASE's matrices are not made any more
MANY = 1_000  # items whose scores are worth compiling by XLA


def load(config: Config) -> data.Splits:
    if config.index == "scann":
        raise ValueError(
            f"--index=scann cannot run: ScaNN 1.4.2, the latest, is built for TensorFlow 2.20 and does not load in "
            f"{tf.__version__}, nor has TensorFlow Serving its operations unless it is built with them; leave --index "
            f"out, or take --index=streaming where the scores of all items do not fit into memory"
        )
    taken, titles, about = _read(config)
    count = np.diff(taken.starts)
    held = np.flatnonzero(count >= 3)  # these users' last item is for the test, the one before for validation
    if not len(held):
        raise ValueError("no user has three items: one to learn from, one for validation, one for the test")
    learnt = np.where(count >= 3, count - 2, count)
    examples = _Examples(config, taken)

    # A user has as many windows in an epoch as its history needs, each time at other places.
    windows = np.repeat(np.arange(len(count)), np.where(learnt >= 2, -(-(learnt - 1) // config.length), 0))
    passes = max(1, 5 * config.batch // max(len(windows), 1))  # an epoch of a small set takes some
    users_of, learnt_of = data.gather(windows), data.gather(learnt)

    def read(indices, step):
        users = users_of(indices)
        limits = learnt_of(users)
        random = tf.random.stateless_uniform([config.batch, 1 + config.length + config.ahead], [config.seed, step])
        # Starts reach beyond both ends before they are cut, so that the ends are seen as often as the middle.
        furthest = tf.cast(tf.maximum(limits - 1 - config.length, 0), tf.float32)
        start = random[:, 0] * (furthest + config.length) - config.length / 2
        starts = tf.cast(tf.clip_by_value(start, 0, furthest), tf.int64)
        return examples(users, starts, limits, shuffle=random[:, 1:])

    def last(users, limits):
        """The item before a limit as the target of all before it."""
        starts = np.maximum(limits - 1 - config.length, 0)

        def only_last(x, targets):
            place = tf.reduce_sum(tf.cast(targets[:, :, 0] >= 0, tf.int32), -1) - 1
            at_last = tf.one_hot(place, config.length, on_value=True, off_value=False)[:, :, None]
            first = tf.range(targets.shape[-1]) == 0
            return x, tf.where(at_last & first, targets, -1)

        batches = data.in_order(users, starts, limits, batch=config.batch)
        return batches.map(examples).map(only_last)

    def all_windows():
        number = np.arange(len(windows)) - np.searchsorted(windows, windows)
        return data.in_order(windows, number * config.length, learnt[windows], batch=config.batch).map(examples)

    shown = held[:8]
    latest = [taken.items[taken.starts[user] : taken.starts[user + 1] - 1][-config.length :] for user in shown]
    history = np.full([len(shown), max(len(one) for one in latest)], b"", object)
    for row, one in enumerate(latest):
        history[row, : len(one)] = [taken.item_names[item].encode() for item in one]
    user = np.array([taken.user_names[user].encode() for user in shown], object)
    user[::2] = b""  # half the requests tell a history, half a user, and the last neither
    history[1::2] = b""
    user[-1] = b"nobody has this name"
    return data.Splits(
        stream=data.stream(len(windows), batch=config.batch, seed=config.seed, read=read),
        steps=passes * (len(windows) // config.batch),
        train=all_windows(),
        validation=last(held, count[held] - 1),
        test=last(held, count[held]),
        preprocess=Queries(config, taken, titles),
        names=taken.item_names,
        request={"user": user, "history": history},
        about={
            **about,
            "protocol": f"each user's last item by time, {len(held):,} users, ranked among all "
            f"{len(taken.item_names):,} items but those the user had",
        },
    )


def _read(config: Config) -> tuple[ratings.Ratings, dict[str, str], dict[str, str]]:
    limits = "It learns what is rated after what in one service; where the order is arbitrary, it learns that. Items "
    limits += (
        "that nobody took have a vector but no evidence. A served user's history is all of the data, test included."
    )
    if not config.data:
        path = config.folder / "u.data"
        path.write_text(made_up(config.seed))
        about = {"data": "made-up ratings", "limits": limits, "licence": "Apache-2.0",
                 "source": "made by this task from the seed: series watched part by part"}  # fmt: skip
    elif config.data == "ml-100k":
        path, about = named.find(config.data)["u.data"], {**named.about(config.data), "limits": limits}
    elif config.data in named.DATASETS:
        raise ValueError(f"{config.data} holds no ratings; expected ml-100k, or a path to ratings")
    else:
        path, about = Path(config.data), {"data": config.data, "limits": limits}
    taken = ratings.read(path)
    users, items = len(taken.user_names), len(taken.item_names)
    if config.data == "ml-100k" and (users, items, len(taken.items)) != (943, 1682, 100_000):
        raise ValueError(
            f"ml-100k has 943 users, 1,682 items, 100,000 ratings; read {users}, {items}, {len(taken.items)}"
        )
    count = np.diff(taken.starts)
    tied = np.diff(taken.times) == 0
    run.say("audit", f"{len(taken.items):,} interactions of {users:,} users with {items:,} items; a user has "
            f"{count.min():,} to {count.max():,}, half have {int(np.median(count)):,} or more")  # fmt: skip
    run.say("", f"at the same time as the one before: {tied.mean():.1%}; repeated and left out: {taken.repeated:,}; "
            f"users with fewer than three items, who are not tested: {(count < 3).sum():,}")  # fmt: skip
    return taken, ratings.titles(path if path.is_dir() else path.parent), about


def made_up(seed: int) -> str:
    """Ratings in MovieLens' u.data format: users follow the parts of the series that they like, and try others."""
    random = np.random.default_rng(seed)
    series, parts = 40, 5
    liked_by_all = 1 / np.arange(1, series + 1)
    lines = []
    for user in range(1, 201):
        taste = liked_by_all * random.gamma(0.5, size=series)
        seen, time = np.zeros(series, int), 880_000_000 + int(random.integers(10**6))
        for _ in range(random.integers(8, 40)):
            open_ones = taste * (seen < parts)
            if open_ones.sum() == 0:
                break
            chosen = random.choice(series, p=open_ones / open_ones.sum())
            for _ in range(random.integers(1, 4)):  # some parts in a row, seconds apart
                if seen[chosen] < parts:
                    item = 1 + chosen * parts + seen[chosen]
                    seen[chosen] += 1
                    lines.append(f"{user}\t{item}\t{random.integers(1, 6)}\t{time}\n")
                    time += int(random.integers(1, 60))
            time += int(random.integers(3600))
    return "".join(lines)


class _Examples:
    """Windows of histories: (users, starts, limits) [batch] -> ({history, before}, targets).

    history: the items from `start` on that another follows, plus one; zero where there are none, [batch, length].
    before: whether the user had an item before the window, [batch, item].
    targets: the item that follows each, and those after it; -1 from the limit on, [batch, length, ahead].
    """

    def __init__(self, config: Config, taken: ratings.Ratings):
        self.length, self.ahead, self.count = config.length, config.ahead, len(taken.item_names)
        self.first, self.items = tf.constant(taken.starts), tf.constant(taken.items)
        # Numbers the moments at which something was taken; what bears one number came in no known order.
        moments = np.cumsum(np.diff(taken.times, prepend=0) != 0)
        per_user = moments - moments[taken.starts[:-1]].repeat(np.diff(taken.starts))
        self.moments = tf.constant(per_user, tf.float32)

    def __call__(self, users, starts, limits, shuffle=None):
        first = tf.gather(self.first, users)
        place = starts[:, None] + tf.range(self.length + self.ahead, dtype=tf.int64)
        inside = place < limits[:, None]
        at = tf.where(inside, first[:, None] + place, 0)
        taken = tf.where(inside, tf.gather(self.items, at), -1)
        if shuffle is not None:
            key = tf.where(inside, tf.gather(self.moments, at) + shuffle, np.inf)
            taken = tf.gather(taken, tf.argsort(key), batch_dims=1)
        targets = [taken[:, 1 + step : 1 + step + self.length] for step in range(self.ahead)]
        earlier = tf.ragged.range(first, first + starts)
        before = hits(earlier.with_flat_values(tf.gather(self.items, earlier.flat_values)), self.count)
        # What follows nothing is no input: it is the target of the place before.
        history = tf.where(targets[0] >= 0, taken[:, : self.length] + 1, 0)
        return {"history": history, "before": before}, tf.stack(targets, -1)


def hits(items: tf.RaggedTensor, count: int) -> tf.Tensor:
    """Whether each of `count` items is in a row, [row, count]."""
    at = tf.stack([items.value_rowids(), tf.cast(items.flat_values, tf.int64)], -1)
    return tf.scatter_nd(at, tf.ones_like(at[:, 0]), tf.stack([items.nrows(), count])) > 0


class Queries(tf.Module):
    """What a client sends, as the network takes it: names of users and items become the latest items' numbers."""

    def __init__(self, config: Config, taken: ratings.Ratings, titles: dict[str, str]):
        super().__init__()
        self.length, self.count = config.length, len(taken.item_names)
        self.titles = tuple(titles.get(name, name) for name in taken.item_names)
        self.users, self.items = _numbers(taken.user_names), _numbers(taken.item_names)
        self.taken, self.starts = tf.constant(taken.items), tf.constant(taken.starts)

    def __call__(self, user: tf.Tensor, history: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Names [batch], [batch, any] -> latest items [batch, length], had [batch, item], unknown names [batch]."""
        row = self.users.lookup(user)
        begin, end = (tf.where(row >= 0, tf.gather(self.starts, tf.maximum(row + step, 0)), 0) for step in (0, 1))
        stored = tf.ragged.range(begin, end)
        stored = stored.with_flat_values(tf.gather(self.taken, stored.flat_values))
        told = self.items.lookup(history)
        had = tf.gather(hits(stored, self.count), tf.maximum(told, 0), batch_dims=1)
        told_new = tf.ragged.boolean_mask(tf.cast(told, tf.int32), (told >= 0) & ~had)
        taken = tf.concat([stored, told_new], axis=1)
        latest = taken[:, -self.length :].to_tensor(-1, shape=[None, self.length]) + 1
        unknown = tf.cast((row < 0) & (user != ""), tf.int32)
        unknown += tf.reduce_sum(tf.cast((told < 0) & (history != ""), tf.int32), -1)
        return latest, hits(taken, self.count), unknown


def _numbers(names: tuple[str, ...]) -> tf.lookup.StaticHashTable:
    """Each name's index; -1 for a name that is not among them."""
    pairs = tf.lookup.KeyValueTensorInitializer(tf.constant(names), tf.range(len(names), dtype=tf.int64))
    return tf.lookup.StaticHashTable(pairs, default_value=-1)


def build(config: Config, splits: data.Splits) -> keras.Model:
    """Queries [batch, length, width] and the linear part's scores [batch, item]; layer `items` is the item tower."""
    history = keras.Input([config.length], dtype="int32", name="history")
    before = keras.Input([len(splits.names)], dtype="bool", name="before")
    normal = keras.initializers.RandomNormal(stddev=0.02)
    items = keras.layers.Embedding(len(splits.names) + 1, config.width, embeddings_initializer=normal, name="items")
    place = keras.ops.cumsum(keras.ops.ones_like(history), axis=1) - 1
    x = items(history) * config.width**0.5  # [batch, length, width]
    x = x + keras.layers.Embedding(config.length, config.width, name="places")(place)
    x = keras.layers.Dropout(config.dropout)(x)
    for _ in range(config.layers):
        x = _block(config, x, keras.ops.not_equal(history, 0)[:, None, :])
    queries = keras.layers.LayerNormalization(epsilon=1e-6, name="queries")(x)
    outputs = {"queries": queries}
    if len(splits.names) <= config.linear:
        state = _state(config, history, before)
        linear = keras.layers.Dense(
            len(splits.names), use_bias=False, trainable=False, kernel_initializer="zeros", name="linear"
        )
        outputs["linear"] = linear(state)
    model = keras.Model({"history": history, "before": before}, outputs, name="towers")
    model.compile(
        keras.optimizers.Adam(training.cosine(config, splits, rate=config.rate), beta_2=0.98),
        # Among many items it takes a quarter or more off a step on a CPU, among few nothing, and takes time to compile.
        # TensorFlow Recommenders' loss does not compile.
        jit_compile=config.loss == "full"
        and len(splits.names) >= MANY
        and tf.distribute.get_strategy().num_replicas_in_sync == 1,
    )
    # Kept out of the archive, which opens without this file.
    model.compute_loss = _full(config, model) if config.loss == "full" else _sampled(config, model, splits)
    return model


def _block(config: Config, x, mask):
    """Causal self-attention, then two dense layers, each behind a norm (Kang & McAuley 2018, SASRec; pre-norm)."""
    y = keras.layers.LayerNormalization(epsilon=1e-6)(x)
    attention = keras.layers.MultiHeadAttention(config.heads, config.width // config.heads, dropout=config.dropout)
    y = attention(y, y, attention_mask=mask, use_causal_mask=True)
    x = x + keras.layers.Dropout(config.dropout)(y)
    y = keras.layers.LayerNormalization(epsilon=1e-6)(x)
    y = keras.layers.Dropout(config.dropout)(keras.layers.Dense(2 * config.width, activation="gelu")(y))
    return x + keras.layers.Dropout(config.dropout)(keras.layers.Dense(config.width)(y))


def _state(config: Config, history, before):
    """What a user had, the latest the most, [batch, item]."""
    real = keras.ops.cast(keras.ops.not_equal(history, 0), "float32")
    age = keras.ops.sum(real, axis=1, keepdims=True) - keras.ops.cumsum(real, axis=1)
    window = keras.ops.one_hot(history - 1, before.shape[-1])
    fading = keras.ops.einsum("bl,bli->bi", real * keras.ops.exp(-age / config.fade), window)
    had = keras.ops.maximum(keras.ops.cast(before, "float32"), keras.ops.max(window, axis=1))
    return keras.layers.Add(name="state")([fading, config.stay * had])


def _full(config: Config, model: keras.Model):
    """Cross-entropy over all the items that the user has not had, at every place of the history."""

    def loss(x=None, y=None, y_pred=None, sample_weight=None, training=True):
        targets, before = y, tf.cast(x["before"], tf.float32)[:, None, :]
        had = tf.cumsum(tf.one_hot(x["history"] - 1, before.shape[-1]), axis=1) + before
        logits = tf.matmul(y_pred["queries"], _vectors(model), transpose_b=True)  # [batch, length, item]
        whole = tf.reduce_logsumexp(tf.where(had > 0, -1e9, logits), -1)
        weight = tf.cast(targets >= 0, tf.float32) * config.fading ** np.arange(config.ahead, dtype=np.float32)
        surprise = whole[:, :, None] - tf.gather(logits, tf.maximum(targets, 0), batch_dims=2)
        each = tf.reduce_sum(weight * surprise, -1) / tf.maximum(tf.reduce_sum(weight, -1), 1e-6)
        return _mean(each, targets)

    return loss


def _sampled(config: Config, model: keras.Model, splits: data.Splits):
    """TensorFlow Recommenders' in-batch softmax: others' next items as negatives, corrected for their frequency."""
    task = tfrs.tasks.Retrieval(
        tf.keras.losses.CategoricalCrossentropy(from_logits=True, reduction="none"), remove_accidental_hits=True
    )
    counts = np.ones(len(splits.names))
    for _, targets in splits.train:
        found = targets[:, :, 0].numpy()
        counts += np.bincount(found[found >= 0], minlength=len(counts))
    share = tf.constant(counts / counts.sum(), tf.float32)

    @tf.function  # the task's code needs autograph, without which Keras traces
    def compare(queries, targets):
        chosen = tf.maximum(targets, 0)
        real = tf.broadcast_to(targets[None, :] >= 0, [len(targets), len(targets)])
        return task(
            queries, tf.gather(_vectors(model), chosen), candidate_ids=chosen,
            candidate_sampling_probability=tf.gather(share, chosen), score_mask=real, compute_metrics=False,
        )  # fmt: skip

    def loss(x=None, y=None, y_pred=None, sample_weight=None, training=True):
        targets = y[:, :, :1]
        each = compare(tf.reshape(y_pred["queries"], [-1, config.width]), tf.reshape(targets, [-1]))
        return _mean(tf.reshape(each, tf.shape(targets)[:2]), targets)

    return loss


def _vectors(model: keras.Model) -> tf.Tensor:
    """The item tower's vectors, [item, width]; number 0 stands for no item."""
    return tf.convert_to_tensor(model.get_layer("items").embeddings)[1:]


def _mean(each: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Mean over the places that have a target, scaled as Keras expects it of each of several devices."""
    real = tf.cast(targets[:, :, 0] >= 0, tf.float32)
    mean = tf.reduce_sum(each * real) / tf.maximum(tf.reduce_sum(real), 1)
    return mean / tf.distribute.get_strategy().num_replicas_in_sync


def train(config: Config, model: keras.Model, splits: data.Splits) -> dict[str, float]:
    cost = training.fit(config, model, splits)
    begun = time.perf_counter()
    if len(splits.names) <= config.linear:
        _solve(config, model, splits)
    return {**cost, "train_seconds": cost["train_seconds"] + time.perf_counter() - begun}


def _solve(config: Config, model: keras.Model, splits: data.Splits) -> None:
    """Give the linear part its weights: a ridge regression of the next item on the state before it.

    Its share in the answer is chosen on validation, for in training it has seen what it would be judged by.
    """
    count = len(splits.names)
    moment, cross = np.zeros([count, count], np.float32), np.zeros([count, count], np.float32)
    age = np.subtract.outer(np.arange(config.length), np.arange(config.length))
    weights = np.where(age >= 0, np.exp(-np.maximum(age, 0) / config.fade) + config.stay, 0).astype(np.float32)
    for x, targets in splits.train:
        for history, before, following in zip(x["history"].numpy(), x["before"].numpy(), targets.numpy(), strict=True):
            following = following[following[:, 0] >= 0, 0]
            window, earlier = history[: len(following)] - 1, np.flatnonzero(before)
            items = np.concatenate([earlier, window])
            states = np.full([len(window), len(items)], config.stay, np.float32)
            states[:, len(earlier) :] = weights[: len(window), : len(window)]
            share = np.float32(
                len(window) ** -0.5
            )  # a long history says more than a short one, but not as many times more
            moment[np.ix_(items, items)] += share * states.T @ states
            cross[np.ix_(items, following)] += share * states.T
    matrix = np.linalg.solve(moment + config.penalty * np.eye(count, dtype=np.float32), cross)
    layer = model.get_layer("linear")
    layer.set_weights([matrix])
    neural, linear = _parts(model, splits.validation)
    had, targets = _questions(splits.validation)
    unit = neural.std() / max(linear.std(), 1e-9)
    found = {}
    for share in (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        both = np.where(had, -np.inf, (1 - share) * neural + share * unit * linear)
        found[share] = ndcg(ranks(both, targets), top=TOP).mean()
    best = max(found, key=found.get)
    layer.set_weights([matrix * unit * best / (1 - best)])
    run.say("linear", f"share {best}; ndcg@{TOP} on validation by share: "
            + "  ".join(f"{share} {value:.4f}" for share, value in found.items()))  # fmt: skip


def measure(config: Config, model: keras.Model, splits: data.Splits) -> dict[str, metrics.Measured]:
    had, targets = _questions(splits.test)
    asked = np.where(had, -np.inf, sum(_parts(model, splits.test))), targets, had.mean(0)
    plot_popularity(*asked, config.folder / "popularity.png", top=TOP)
    return retrieval(*asked, top=TOP)


def _parts(model: keras.Model, batches: tf.data.Dataset) -> list[np.ndarray]:
    """Scores of the towers and, where there is one, of the linear part, [user, item] each."""

    @tf.function
    def answer(x):
        found = model(x, training=False)
        scores = tf.matmul(_last(found["queries"], x["history"]), _vectors(model), transpose_b=True)
        return [scores, found["linear"]] if "linear" in found else [scores]

    return [np.concatenate(part) for part in zip(*[answer(x) for x, _ in batches], strict=True)]


def _last(queries: tf.Tensor, history: tf.Tensor) -> tf.Tensor:
    """The query vector at the last item of each history, [batch, width]."""
    last = tf.maximum(tf.reduce_sum(tf.cast(history > 0, tf.int32), -1) - 1, 0)
    return tf.gather(queries, last, batch_dims=1)


def _questions(batches: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """What each user had, [user, item], and took next, [user]."""
    had, took = [], []
    for x, targets in batches:
        count = x["before"].shape[-1]
        window = tf.reduce_max(tf.one_hot(x["history"] - 1, count), 1) > 0
        target = tf.reduce_max(targets[:, :, 0], -1)
        had.append((x["before"] | window).numpy())
        took.append(target.numpy())
    return np.concatenate(had), np.concatenate(took)


def baseline(config: Config, splits: data.Splits) -> dict[str, metrics.Measured]:
    """The better on validation of popularity and EASE (Steck 2019), whose penalty is chosen there too; of very many
    items popularity alone.
    """
    had, targets = _questions(splits.validation)
    penalties = (0, 100, 300, 1000) if had.shape[1] <= LARGE else (0,)  # the square of the items in memory, and more
    found = {penalty: ndcg(ranks(_ease(had, penalty), targets), top=TOP).mean() for penalty in penalties}
    best = max(found, key=found.get)
    had, targets = _questions(splits.test)
    result = {}
    for penalty in [one for one in (0, best or 300) if one in penalties]:
        result[penalty] = retrieval(_ease(had, penalty), targets, had.mean(0), top=TOP)
        name = f"EASE, penalty {penalty}" if penalty else "popularity"
        run.say(
            "baseline",
            f"{name}: " + "  ".join(f"{metric} {value.value:.4f}" for metric, value in result[penalty].items()),
        )
    return result[best]


def _ease(had: np.ndarray, penalty: float) -> np.ndarray:
    """Scores of an item-item regression in closed form, without penalty of popularity, [user, item]."""
    x = had.astype(np.float32)
    if not penalty:
        scores = np.tile(x.sum(0), [len(x), 1])
    else:
        inverse = np.linalg.inv(x.T @ x + penalty * np.eye(x.shape[1], dtype=np.float32))
        weights = inverse / -np.diag(inverse)
        np.fill_diagonal(weights, 0)
        scores = x @ weights
    return np.where(had, -np.inf, scores)


class _Streaming(tf.Module):
    """TensorFlow Recommenders' streaming index: exact, and holds the scores of a block of items only.

    Its dataset is made in the graph, for a SavedModel cannot hold one that was made before.
    """

    def __init__(self, vectors: tf.Tensor):
        super().__init__()
        self.vectors = tf.Variable(vectors, trainable=False)
        self.layer = tfrs.layers.factorized_top_k.Streaming(k=TOP, num_parallel_calls=None)

    def __call__(self, query: tf.Tensor, k: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        vectors, count = self.vectors.read_value(), len(self.vectors)

        def block(begin):
            end = tf.minimum(begin + BLOCK, count)
            # Left to number the items itself, the layer counts in a variable that all requests share.
            return tf.range(begin, end), vectors[begin:end]

        blocks = tf.data.Dataset.range(0, count, BLOCK).map(block)
        plain = tf.data.Options()  # rewriting the dataset at each request would take longer than running it
        plain.autotune.enabled = False
        plain.experimental_optimization.apply_default_optimizations = False
        return self.layer.index_from_dataset(blocks.with_options(plain))(query, k=k)


class Endpoint(tf.Module):
    def __init__(self, config: Config, model: keras.Model, splits: data.Splits):
        super().__init__()
        self.queries = splits.preprocess
        outputs, vectors = {"queries": model.get_layer("queries").output}, [_vectors(model)]
        if len(model.outputs) > 1:  # the linear part is a dot product too
            outputs["state"] = model.get_layer("state").output
            vectors.append(tf.transpose(model.get_layer("linear").kernel))
        self.towers = keras.Model(model.input, outputs)
        self.names, self.titles = tf.constant(splits.names), tf.constant(self.queries.titles)
        # One more dimension holds the popularity, which a query without a known item asks for alone.
        popularity = _questions(splits.test)[0].mean(0)
        vectors = tf.concat([*vectors, tf.cast(popularity, tf.float32)[:, None]], -1)
        if config.index == "streaming":
            self.index = _Streaming(vectors)
        else:
            self.index = tfrs.layers.factorized_top_k.BruteForce(k=TOP).index(vectors)

    @property
    def defaults(self):
        return {"user": "", "history": []}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, name="user"),
            tf.TensorSpec([None, None], tf.string, name="history"),
        ]
    )
    def __call__(self, user, history):
        batch = tf.broadcast_dynamic_shape(tf.shape(user), tf.shape(history)[:1])
        user = tf.broadcast_to(user, batch)
        history = tf.broadcast_to(history, tf.concat([batch, tf.shape(history)[1:]], 0))
        latest, had, unknown = self.queries(user, history)
        known = tf.reduce_any(had, -1)
        found = self.towers({"history": latest, "before": had}, training=False)
        query = _last(found["queries"], latest)
        if "state" in found:
            query = tf.concat([query, found["state"]], -1)
        query = tf.concat([tf.where(known[:, None], query, 0), tf.cast(~known, tf.float32)[:, None]], -1)
        most = tf.maximum(tf.reduce_max(tf.reduce_sum(tf.cast(had, tf.int32), -1)), 0)  # of an empty batch, too
        scores, nearest = self.index(query, k=tf.minimum(TOP + most, len(self.names)))
        scores = tf.where(tf.gather(had, nearest, batch_dims=1), -np.inf, scores)
        best = tf.math.top_k(scores, k=min(TOP, len(self.names)))
        items = tf.gather(nearest, best.indices, batch_dims=1)
        left = tf.math.is_finite(best.values)  # who had nearly all is not told to take one again
        return {
            "basis": tf.where(known, "history", "popularity"),
            "unknown": unknown,
            "top_items": tf.where(left, tf.gather(self.names, items), ""),
            "top_labels": tf.where(left, tf.gather(self.titles, items), ""),
            "top_scores": best.values,
        }
