"""Reinforcement learning: learn to act in an environment by proximal policy optimisation (Schulman et al. 2017).

Data      the name of a Gymnasium environment with vector observations and discrete or continuous actions
Model     one small network for the policy and one for the value, over observations that it normalises itself
Endpoint  observation -> action, probabilities (continuous actions: mean, deviation), value
"""

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from typing import Literal

import gymnasium
import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from shared import data, metrics, run, training
from shared.metrics import acting


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
    data: str = ""  # Gymnasium's name of an environment; empty: CartPole-v1
    steps: int = 0  # of the environments to learn from, whole rounds of them; 0: as many as in KNOWN, else 1,000,000
    epochs: int = 10  # parts of the training; after each, the policy is tried on episodes of its own
    environments: int = 16  # side by side
    simulator: Literal["auto", "gymnasium", "envpool"] = "auto"  # auto: EnvPool for Acrobot-v1, if installed
    batch: int = 2048  # steps between two updates, all environments together
    passes: int = 10  # over those steps at an update
    minibatches: int = 8  # that each pass is cut into
    width: int = 64  # of the two hidden layers of each network
    rate: float = 1e-3  # learning rate at the beginning; it falls to zero in a straight line
    discount: float = 0.999  # of the reward one step on
    trace: float = 0.98  # lambda of the generalised advantage estimate: how far it trusts rewards, not the value
    clip_range: float = 0.2  # how far an update may move the probability of an action, as a share
    entropy: float = 0.01  # worth of a nat of the policy's entropy at the beginning; it falls as the learning rate does
    # Processors that one operation may take; 1: also one operation at a time, on the one CPU, for handing such small
    # ones over takes longer than they do; 0: all.
    threads: int = 1
    xla: bool = True  # compile the update: it takes some seconds, and then half the time
    seeds: int = 1  # how many trainings, each by its own seed; their interquartile mean is the result


SMOKE = Config(steps=2_048, epochs=2, width=8, batch=256, environments=4, xla=False)
EXPECT = {"": {"return": 475.0}, "Acrobot-v1": {"return": -80.0}, "LunarLander-v3": {"return": 240.0}}

# Environment -> steps to learn from, and what PPO is published to reach, by RL Baselines3 Zoo (benchmark.md).
KNOWN = {
    "CartPole-v1": (100_000, "500.0 (RL Baselines3 Zoo, one run of 100,000 steps)"),
    "Acrobot-v1": (1_000_000, "-73.5 (RL Baselines3 Zoo, one run of 1,000,000 steps)"),
    "LunarLander-v3": (1_000_000, "242.1 (RL Baselines3 Zoo, one run of 1,000,000 steps on LunarLander-v2)"),
}
POOLED = ("Acrobot-v1",)  # environments that EnvPool steps faster and just as Gymnasium does (CONTRIBUTING.md)
LONGEST = 0.5  # gradient, of all weights together; --clip sets another
TRIED, TESTED = 100, 100  # episodes after each epoch, and in the end
TRY, TEST, RANDOM = 1_000_000, 2_000_000, 3_000_000  # their seeds; training draws its own by the run's seed


def load(config: Config) -> data.Splits:
    if config.threads == 1 and config.strategy in ("auto", "one") and not tf.config.list_physical_devices("GPU"):
        with contextlib.suppress(RuntimeError):  # TensorFlow is at work in this process already: it stays as it is
            tf.config.threading.set_inter_op_parallelism_threads(1)
    world = World.of(config)
    steps, published = KNOWN.get(world.name, (1_000_000, ""))
    rounds = (config.steps or steps) // config.batch // config.epochs
    if rounds < 1:
        raise ValueError(
            f"--steps={config.steps or steps} are too few for {config.epochs} epochs with --batch={config.batch}"
        )
    stepped = "EnvPool" if pooled(config, world) else "Gymnasium"
    run.say("world", f"{world.name}: {world.size} numbers observed, {world.described}, episodes of {world.limit:,} "
            f"steps at most; learned from in {stepped}")  # fmt: skip
    # A batch has a row for each environment, so that a strategy can share it out.
    begun = [tf.data.Dataset.from_tensors(np.full(config.environments, seed)) for seed in (config.seed, TRY, TEST)]
    random = Play(world, 8)
    random.reset(RANDOM)
    for _ in range(5):
        random.step(world.random(np.random.default_rng(1), 8))
    return data.Splits(
        stream=lambda first: tf.data.Dataset.range(first, np.iinfo(np.int64).max).map(
            lambda step: tf.fill([config.environments], step)
        ),
        steps=rounds,
        train=begun[0],
        validation=begun[1],
        test=begun[2],
        preprocess=lambda observation: tf.cast(observation, tf.float32),
        names=world.actions,
        request={"observation": random.observation},
        about={
            "data": world.name,
            "protocol": f"{TESTED} greedy episodes that begin as no other did, after "
            f"{rounds * config.epochs * config.batch:,} steps",
            "licence": "MIT (Gymnasium)",
            "source": "https://github.com/Farama-Foundation/Gymnasium",
            "citation": "Towers et al. 2024, Gymnasium: A Standard Interface for Reinforcement Learning Environments",
            "published return": published,
            "limits": "It has learned to act in this environment alone, as it is simulated; what it does where "
            "training never came is untested.",
        },
    )


@dataclasses.dataclass(frozen=True)
class World:
    """What is to be known of an environment before anything is built."""

    name: str
    size: int  # numbers in an observation
    count: int  # actions to choose from, or numbers in a continuous one
    discrete: bool
    first: int  # the lowest number of a discrete action
    low: tuple[float, ...] = ()  # of continuous actions
    high: tuple[float, ...] = ()
    limit: int = 10_000  # steps after which an episode is cut off

    @staticmethod
    @functools.cache
    def of(config: Config) -> "World":
        """ValueError where there is no such environment, or one that this task cannot learn."""
        name = config.data or "CartPole-v1"
        try:
            environment = gymnasium.make(name)
        except gymnasium.error.Error as error:
            raise ValueError(
                f"--data={name} is no environment here ({error}); expected a name that gymnasium.make takes, e.g. "
                f"{', '.join(KNOWN)}"
            ) from error
        seen, acts, limit = environment.observation_space, environment.action_space, environment.spec.max_episode_steps
        environment.close()
        if not isinstance(seen, gymnasium.spaces.Box) or len(seen.shape) != 1:
            raise ValueError(f"{name} shows {seen}; rl.ppo learns from vectors of numbers only")
        common = {"name": name, "size": seen.shape[0], "limit": limit or 10_000}
        if isinstance(acts, gymnasium.spaces.Discrete):
            return World(**common, count=int(acts.n), discrete=True, first=int(acts.start))
        if isinstance(acts, gymnasium.spaces.Box) and len(acts.shape) == 1:
            bounds = {"low": tuple(acts.low.tolist()), "high": tuple(acts.high.tolist())}
            return World(**common, count=acts.shape[0], discrete=False, first=0, **bounds)
        raise ValueError(f"{name} is acted on by {acts}; rl.ppo knows discrete actions and vectors of numbers")

    @property
    def described(self) -> str:
        return f"{self.count} actions" if self.discrete else f"{self.count} numbers to act by"

    @property
    def actions(self) -> tuple[str, ...]:
        return tuple(str(self.first + number) for number in range(self.count))

    @property
    def scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Middle and half of the span of continuous actions; where it has no end, they stay as they are."""
        low, high = np.array(self.low, np.float32), np.array(self.high, np.float32)
        bounded = np.isfinite(low) & np.isfinite(high)
        low, high = np.where(bounded, low, -1), np.where(bounded, high, 1)
        return (low + high) / 2, (high - low) / 2

    def turn(self, chosen, clip: Callable = np.clip):
        """What the environment takes, from the index of an action [batch] or numbers around 0 [batch, number]."""
        if self.discrete:
            return chosen + self.first
        middle, half = self.scale
        return clip(middle + half * chosen, np.array(self.low, np.float32), np.array(self.high, np.float32))

    def random(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Choices of nobody: any action alike."""
        if self.discrete:
            return generator.integers(self.count, size=count)
        return generator.uniform(-1, 1, (count, self.count)).astype(np.float32)


class Play:
    """Environments side by side. One whose episode has ended begins anew in its next step, which nobody chose."""

    def __init__(self, world: World, count: int, *, pool: bool = False):
        self.world, self.count, self.pool = world, count, pool
        if not pool:
            self.environments = gymnasium.make_vec(world.name, count)

    def reset(self, seed: int) -> None:
        observation = self._anew(seed) if self.pool else self.environments.reset(seed=seed)[0]
        self.observation = self._checked(observation)
        self.ended = np.zeros(self.count, bool)
        self.total = np.zeros(self.count, np.float32)

    def _anew(self, seed: int) -> np.ndarray:
        """EnvPool's environments take a seed when they are made, and none when they are reset."""
        import envpool

        with warnings.catch_warnings():  # of the bounds in which it says observations lie; nothing here reads them
            warnings.filterwarnings("ignore", ".*precision lowered", UserWarning)
            self.environments = envpool.make(self.world.name, env_type="gymnasium", num_envs=self.count, seed=seed)
            return self.environments.reset()[0]

    def begin(self) -> np.ndarray:
        """The observation to go on from; from here on, what `act` does is recorded."""
        self.record = []
        self.begun, self.over = self.observation, np.zeros(self.count, bool)
        return self.observation

    def act(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is observed after these choices, and whether every environment has ended an episode of the record."""
        self.record.append((chosen.copy(), *self.step(chosen)))  # the graph may use the array again
        self.over |= self.ended
        return self.observation, self.over.all()

    def recorded(self, last: np.ndarray) -> list[np.ndarray]:
        """Observations up to the last [time + 1, environment, number]; choices and what `step` told [time, …].

        The graph runs this when it has the last one.
        """
        chosen, observed, *told = (np.stack(values) for values in zip(*self.record, strict=True))
        return [np.concatenate([self.begun[None], observed]), chosen, *told]

    def step(self, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
        """Observation, reward, terminated, truncated, whether the step was chosen, and the episode's sum of rewards."""
        observation, reward, terminated, truncated, _ = self.environments.step(self.world.turn(chosen))
        chosen_by_policy = ~self.ended
        self.observation = self._checked(observation)
        self.total = np.where(self.ended, 0, self.total + reward).astype(np.float32)
        self.ended = terminated | truncated
        return self.observation, reward.astype(np.float32), terminated, truncated, chosen_by_policy, self.total

    def _checked(self, observation: np.ndarray) -> np.ndarray:
        if not np.isfinite(observation).all():
            raise FloatingPointError(f"{self.world.name} shows numbers that are not finite: {observation}")
        return observation.astype(np.float32)


def pooled(config: Config, world: World) -> bool:
    """Whether EnvPool steps the environments to learn from. Policies are tried and measured in Gymnasium's, always."""
    if config.simulator == "gymnasium" or (config.simulator == "auto" and world.name not in POOLED):
        return False
    try:
        import envpool

        lacking = "" if world.name in envpool.list_all_envs() else f"EnvPool {envpool.__version__} has no {world.name}"
    except ImportError:
        lacking = "EnvPool is not installed (pip install 'cornucopia-suite[envpool]')"
    if lacking and config.simulator == "envpool":
        raise ValueError(f"--simulator=envpool: {lacking}; without --simulator, Gymnasium steps them")
    return not lacking


TOLD = {"reward": tf.float32, "terminated": tf.bool, "truncated": tf.bool, "chosen": tf.bool, "total": tf.float32}


def build(config: Config, splits: data.Splits) -> keras.Model:
    """Observation [batch, number] -> policy (logits, or mean and log deviation) [batch, number], value [batch]."""
    if config.batch % config.environments or config.batch % config.minibatches:
        raise ValueError(
            f"--batch={config.batch} must be a multiple of --environments={config.environments} and of "
            f"--minibatches={config.minibatches}"
        )
    devices = tf.distribute.get_strategy().num_replicas_in_sync
    if config.environments % devices or config.batch // config.minibatches % devices:
        raise ValueError(
            f"{devices} devices cannot share --environments={config.environments} and minibatches of "
            f"{config.batch // config.minibatches} steps alike: make both multiples of {devices}"
        )
    world = World.of(config)
    observation = keras.Input([world.size], name="observation")
    dense = functools.partial(layers.Dense, dtype="float32")  # too small to gain from less, whatever the precision
    # It does not learn by itself: its two statistics are of all observations so far, and `Learner` keeps them.
    seen = layers.BatchNormalization(
        center=False, scale=False, epsilon=1e-8, trainable=False, dtype="float32", name="normal"
    )
    x = ops.clip(seen(observation, training=False), -10, 10)

    def network(x, count, gain, name):
        for _ in range(2):
            x = dense(config.width, "tanh", kernel_initializer=keras.initializers.Orthogonal(2**0.5))(x)
        return dense(count, kernel_initializer=keras.initializers.Orthogonal(gain), name=name)(x)

    policy = network(x, world.count, 0.01, "policy")
    if not world.discrete:
        deviation = dense(world.count, kernel_initializer="zeros", name="log_deviation")  # its bias alone
        policy = ops.concatenate([policy, deviation(ops.zeros_like(x))], -1)
    # Rewards are learned in units of their spread; so that the value is in the environment's, it is scaled back.
    unit = dense(1, use_bias=False, kernel_initializer="ones", trainable=False, name="unit")
    value = unit(network(x, 1, 1.0, "value"))
    model = keras.Model(observation, {"policy": policy, "value": value[:, 0]}, name="actor_critic")
    updates = config.epochs * splits.steps * config.passes * config.minibatches
    rate = keras.optimizers.schedules.PolynomialDecay(config.rate, updates, end_learning_rate=0.0)
    longest = LONGEST if devices > 1 else None  # else `Learner` shortens gradients
    model.compile(keras.optimizers.Adam(rate, epsilon=1e-5, global_clipnorm=longest), jit_compile=False)
    return model


def train(config: Config, model: keras.Model, splits: data.Splits) -> dict[str, float]:
    with training.strategy(config.strategy).scope():
        learner = Learner(config, model)
        learner.compile(model.optimizer, jit_compile=False)
    cost = training.fit(config, learner, splits, callbacks=(learner.anew(),), whole=True)
    if training.workers.chief():
        acting.plot_seeds(config.folder, config.epochs * splits.steps * config.batch)
    return cost


class Learner(keras.Model):
    """A step of its training is a round: all environments are played for some steps, then the policy learns from them.

    Rollout and update are one graph, from which Python is called for the environments alone; XLA compiles the update.
    Of many devices each plays its share of the environments and is told what the others' did. So statistics and
    advantages are of the whole; of each minibatch a device takes its part, and the gradients are added up.
    """

    def __init__(self, config: Config, model: keras.Model):
        super().__init__(name=model.name)
        self.config, self.world, self.network = config, World.of(config), model
        strategy, pool = self.distribute_strategy, pooled(config, self.world)
        self.share = config.environments // strategy.num_replicas_in_sync
        here = strategy.experimental_distribute_values_from_function(lambda context: context.replica_id_in_sync_group)
        # Environments to learn in and to be tried in, of each device of this process.
        self.plays = {number: (Play(self.world, self.share, pool=pool), Play(self.world, TRIED))
                      for number in strategy.experimental_local_results(here)}  # fmt: skip
        self.seen = self.add_weight(name="seen", initializer="zeros", trainable=False)  # observations
        self.returned = self.add_weight([config.environments], name="returned", initializer="zeros", trainable=False)
        self.returns = self.add_weight([3], name="returns", initializer="zeros", trainable=False)  # count, mean, var
        self.followed = {name: keras.metrics.Mean(name) for name in ("loss", "return", "entropy", "divergence")}
        # Autograph would take as long as all the rest of the tracing.
        self._learn = tf.function(self._update, jit_compile=config.xla, autograph=False)
        self.built = True

    def anew(self) -> keras.callbacks.Callback:
        """At an epoch's begin all environments begin anew, so that a resumed run sees what an unbroken one saw."""

        def begin(epoch, logs=None):
            seed = int(np.random.SeedSequence([self.config.seed, epoch]).generate_state(1)[0]) % TRY
            for number, (play, _) in self.plays.items():
                play.reset(seed + number * self.share)  # each environment has its own seed, counted on from there

        def begin_trial(logs):
            for _, trial in self.plays.values():
                trial.reset(TRY)

        return keras.callbacks.LambdaCallback(on_epoch_begin=begin, on_test_begin=begin_trial)

    def train_step(self, steps):
        """A round on one device."""
        rows, after = self._prepare(self._play(steps))
        told = self._learn(self._minibatches(rows, tf.cast(steps[0], tf.int32)))
        for name, value in zip(("loss", "entropy", "divergence"), tf.unstack(told), strict=True):
            self.followed[name].update_state(value)
        for variable, value in zip(self._statistics, after, strict=True):
            variable.assign(value)
        return self._told()

    def make_train_function(self, force=False):
        strategy = self.distribute_strategy
        if strategy.num_replicas_in_sync == 1 or (self.train_function and not force):
            super().make_train_function(force)
            return
        gradients = tf.function(self._gradients, jit_compile=self.config.xla, autograph=False)

        def play(steps):  # truth values as 0 and 1, for collectives carry no others
            return {name: tf.cast(value, tf.int32) if value.dtype == tf.bool else value
                    for name, value in self._play(steps).items()}  # fmt: skip

        def gathered(values):
            time, _, *shape = strategy.experimental_local_results(values)[0].shape
            return tf.ensure_shape(strategy.gather(values, axis=1), [time, self.config.environments, *shape])

        def learn(rows):
            count = rows["share"].shape[0] // strategy.num_replicas_in_sync
            first = device() * count
            found, told = gradients({name: row[first : first + count] for name, row in rows.items()})
            self.optimizer.apply(found, self.network.trainable_variables)
            for name, value in zip(("loss", "entropy", "divergence"), tf.unstack(told), strict=True):
                self.followed[name].update_state(value * strategy.num_replicas_in_sync)

        def train(batches):
            """A round on many: the loop stands around the devices, for inside of one it could not wait for others."""
            steps = next(batches)
            played = strategy.run(play, args=(steps,))
            rows, after = self._prepare({name: gathered(values) for name, values in played.items()})
            step = tf.cast(strategy.experimental_local_results(steps)[0][0], tf.int32)
            rows = self._minibatches(rows, step)
            for turn in tf.range(rows["share"].shape[0]):
                strategy.run(learn, args=({name: row[turn] for name, row in rows.items()},))
            for variable, value in zip(self._statistics, after, strict=True):  # other processors may round otherwise
                variable.assign(strategy.reduce("MEAN", value, axis=None))
            return self._told()

        self.train_function = tf.function(train)

    def test_step(self, seed):
        noise = tf.zeros([self.world.limit, TRIED, self.world.count])
        value = tf.reduce_mean(first_episodes(roll(self.network, self.plays[device()][1], noise, once=True))[0])
        return {"loss": -value, "return": value}  # the best epoch is the one with the lowest loss

    def _play(self, steps):
        """What `roll` tells of this device's environments."""
        config, world, first = self.config, self.world, device() * self.share
        shape = [config.batch // config.environments, config.environments, world.count]
        uniform = tf.random.stateless_uniform(shape, [config.seed, tf.cast(steps[0], tf.int32)], 1e-7, 1)
        uniform = uniform[:, first : first + self.share]
        noise = -tf.math.log(-tf.math.log(uniform)) if world.discrete else tf.math.ndtri(uniform)
        played = roll(self.network, self.plays[device()][0], noise)
        ended = (played["terminated"] | played["truncated"]) & played["chosen"]
        self.followed["return"].update_state(played["total"], sample_weight=ended)
        return played

    def _told(self):
        logs = {name: metric.result() for name, metric in self.followed.items()}
        none = tf.equal(self.followed["return"].count, 0.0)  # no episode has ended yet
        return logs | {"return": tf.where(none, np.nan, logs["return"])}

    def _update(self, rows):
        """Learn minibatch after minibatch; return means of loss, entropy, divergence.

        With `xla` this alone is compiled: here a round spends its time, and XLA takes 50 ms for each operation more.
        """
        count = rows["share"].shape[0]

        def learn(turn, totals):
            gradients, told = self._gradients({name: row[turn] for name, row in rows.items()})
            gradients = shortened(gradients, self.config.clip or LONGEST)
            self.optimizer.apply(gradients, self.network.trainable_variables)
            return turn + 1, totals + told

        return tf.while_loop(lambda turn, _: turn < count, learn, (0, tf.zeros([3])))[1] / count

    def _minibatches(self, rows, step):
        """What is learned from a round's steps in all passes, [minibatch, step, …]."""
        config = self.config
        drawn = tf.random.stateless_uniform([config.passes, config.batch], tf.stack([config.seed + 1, step]))
        order = tf.reshape(tf.argsort(drawn), [config.passes * config.minibatches, -1])
        rows = {name: tf.gather(row, order) for name, row in rows.items()}
        weight = tf.cast(rows.pop("chosen"), tf.float32)
        share = weight / tf.maximum(tf.reduce_sum(weight, -1, keepdims=True), 1)
        advantages = rows.pop("advantage")
        gain = advantages - tf.reduce_sum(share * advantages, -1, keepdims=True)
        spread = tf.sqrt(tf.reduce_sum(share * tf.square(gain), -1, keepdims=True))
        return {**rows, "share": share, "gain": gain / (spread + 1e-8)}

    def _prepare(self, played):
        """What is to be learned from, [time * environment, …], and what `_statistics` are after this round."""
        config, network = self.config, self.network
        time, side = played["reward"].shape
        observed = played["observation"]  # [time + 1, environment, number]
        outputs = network(tf.reshape(observed, [-1, self.world.size]), training=False)
        returned, *returns = self._returns(played)
        unit = tf.maximum(tf.sqrt(returns[2]), 1e-4)  # the spread of returns so far: rewards are learned in it
        values = tf.reshape(outputs["value"], [time + 1, side]) / network.get_layer("unit").kernel[0, 0]
        advantages = advantage(
            played["reward"] / unit, values, played["terminated"], played["truncated"],
            discount=config.discount, trace=config.trace,
        )  # fmt: skip
        count = config.batch
        policy = tf.reshape(outputs["policy"], [-1, outputs["policy"].shape[-1]])[:count]
        rows = {
            "observation": tf.reshape(observed[:-1], [count, -1]),
            "choice": tf.reshape(played["choice"], [count, *played["choice"].shape[2:]]),
            "advantage": tf.reshape(advantages, [count]),
            "aim": tf.reshape(advantages + values[:-1], [count]),
            "chosen": tf.reshape(played["chosen"], [count]),
        }
        rows["before"] = self._probability(policy, rows["choice"])[0]
        seen, normal = tf.convert_to_tensor(self.seen), network.get_layer("normal")
        moments = (tf.convert_to_tensor(variable) for variable in (normal.moving_mean, normal.moving_variance))
        seen = merge(seen, *moments, tf.reshape(observed[1:], [count, -1]))
        return rows, (returned, tf.stack(returns), *seen, tf.reshape(unit, [1, 1]))

    @property
    def _statistics(self):
        normal, unit = self.network.get_layer("normal"), self.network.get_layer("unit")
        return self.returned, self.returns, self.seen, normal.moving_mean, normal.moving_variance, unit.kernel

    def _gradients(self, rows):
        """Of the loss of some rows of a minibatch, each with its share: gradients; loss, entropy, divergence."""
        config = self.config

        def mean(values):
            return tf.reduce_sum(values * rows["share"])

        with tf.GradientTape() as tape:
            outputs = self.network(rows["observation"], training=False)
            now, entropy = self._probability(outputs["policy"], rows["choice"])
            ratio = tf.exp(now - rows["before"])
            clipped = tf.clip_by_value(ratio, 1 - config.clip_range, 1 + config.clip_range)
            of_policy = -mean(tf.minimum(ratio * rows["gain"], clipped * rows["gain"]))  # Schulman et al. 2017, eq. 7
            value = outputs["value"] / tf.stop_gradient(self.network.get_layer("unit").kernel[0, 0])
            of_value = 0.5 * mean(tf.square(value - rows["aim"]))
            worth = config.entropy * self.optimizer.learning_rate / config.rate
            loss = of_policy + 0.5 * of_value - worth * mean(entropy)
        gradients = tape.gradient(loss, self.network.trainable_variables)
        return gradients, tf.stack([loss, mean(entropy), mean(ratio - 1 - tf.math.log(ratio))])

    def _probability(self, policy, choice):
        """Log-probability of what was chosen, and the policy's entropy, each [batch]."""
        if self.world.discrete:
            logs = tf.nn.log_softmax(policy)
            return tf.reduce_sum(tf.one_hot(choice, self.world.count) * logs, -1), -tf.reduce_sum(
                tf.exp(logs) * logs, -1
            )
        middle, deviation = tf.split(policy, 2, -1)
        square = tf.square((choice - middle) / tf.exp(deviation))
        log = -0.5 * (square + np.log(2 * np.pi)) - deviation
        return tf.reduce_sum(log, -1), tf.reduce_sum(deviation + 0.5 * np.log(2 * np.pi * np.e), -1)

    def _returns(self, played):
        """Discounted sums of rewards: now, [environment]; count, mean and variance of all so far."""
        going = 1 - tf.cast(played["terminated"] | played["truncated"], tf.float32)
        before = tf.concat([tf.ones_like(going[:1]), going[:-1]], 0)  # what is carried over has ended already
        sums = accumulated(played["reward"], self.config.discount * before, tf.convert_to_tensor(self.returned))
        return sums[-1] * going[-1], *merge(*tf.unstack(tf.convert_to_tensor(self.returns)), tf.reshape(sums, [-1]))


def device() -> int:
    """The number of the device that this is traced for, among all that learn."""
    return int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))


def shortened(gradients, most):
    """As by Keras's `global_clipnorm`, which takes the norm of each by itself: XLA would make 15 operations more."""
    norm = tf.norm(tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], 0))
    share = most / tf.maximum(norm, most) + (norm - norm)  # a norm that is not finite makes all NaN, and ends the run
    return [gradient * share for gradient in gradients]


def merge(count, mean, variance, rows):
    """Count, mean and variance of more rows than before (Chan et al. 1979)."""
    more = tf.cast(tf.shape(rows)[0], tf.float32)
    total = count + more
    new, spread = tf.nn.moments(rows, 0)
    apart = new - mean
    variance = (count * variance + more * spread + tf.square(apart) * count * more / total) / total
    return total, mean + apart * more / total, variance


def advantage(rewards, values, terminated, truncated, *, discount: float, trace: float):
    """Generalised advantages [time, environment] (Schulman et al. 2016, equation 16).

    An episode that terminated is worth nothing more. One that was truncated would have gone on: what its last
    observation is worth counts, but nothing behind it.

    Args:
        rewards, terminated, truncated: of each step, [time, environment].
        values: of the observations before each step and after the last, [time + 1, environment].
    """
    terminated, ended = tf.cast(terminated, tf.float32), tf.cast(terminated | truncated, tf.float32)
    surprise = rewards + discount * (1 - terminated) * values[1:] - values[:-1]
    return accumulated(surprise, discount * trace * (1 - ended), tf.zeros_like(values[0]), reverse=True)


def accumulated(values, shares, carried, *, reverse=False):
    """Sums [time, …] of each value and a share of the sum before it, `carried` before the first."""
    return tf.scan(lambda sums, now: now[0] + now[1] * sums, (values, shares), carried, reverse=reverse)


@tf.function
def roll(network: keras.Model, play: Play, noise: tf.Tensor, *, once: bool = False) -> dict[str, tf.Tensor]:
    """Play on from where the environments are.

    Args:
        noise: added to the logits, or in deviations to the mean, [time, environment, number]; zeros choose the best.
        once: stop where each environment has ended an episode.

    Returns:
        `observation` [time + 1, environment, number]; `choice` [time, environment, …]; and, [time, environment],
        `reward`, `terminated`, `truncated`, `chosen` (False where an environment began anew), `total` of the episode.
    """
    world, count = play.world, noise.shape[0]
    shape, kind = [play.count, world.size], tf.int64 if world.discrete else tf.float32
    observation = tf.ensure_shape(tf.numpy_function(play.begin, [], tf.float32), shape)
    for time in tf.range(count):
        policy = network(observation, training=False)["policy"]
        if world.discrete:
            choice = tf.argmax(policy + noise[time], -1)
        else:
            choice = policy[:, : world.count] + tf.exp(policy[:, world.count :]) * noise[time]
        observation, over = tf.numpy_function(play.act, [choice], (tf.float32, tf.bool))
        observation = tf.ensure_shape(observation, shape)
        if once and tf.ensure_shape(over, []):
            break
    observed, chosen, *told = tf.numpy_function(play.recorded, [observation], (tf.float32, kind, *TOLD.values()))
    count = None if once else count
    return {
        "observation": tf.ensure_shape(observed, [None if once else count + 1, *shape]),
        "choice": tf.ensure_shape(chosen, [count, play.count, *[world.count] * (not world.discrete)]),
        **{name: tf.ensure_shape(values, [count, play.count]) for name, values in zip(TOLD, told, strict=True)},
    }


def first_episodes(played: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Sum of rewards and number of steps of each environment's first episode, each [environment]."""
    ended = played["terminated"] | played["truncated"]
    ended = tf.concat([ended[:-1], tf.ones_like(ended[-1:])], 0)  # the last step ends what would go on
    last = tf.argmax(ended, 0)  # the first True
    return tf.gather(tf.transpose(played["total"]), last, batch_dims=1), last + 1


def measure(config: Config, model: keras.Model, splits: data.Splits) -> dict[str, metrics.Measured]:
    world = World.of(config)
    play = Play(world, TESTED)
    play.reset(int(next(iter(splits.test))[0]))
    totals, lengths = first_episodes(roll(model, play, tf.zeros([world.limit, TESTED, world.count]), once=True))
    if training.workers.chief():
        film(config, model)
    return {
        "return": metrics.measured(np.mean, totals.numpy()),
        "episode_length": metrics.measured(np.mean, lengths.numpy().astype(float)),
    }


def film(config: Config, model: keras.Model, most: int = 400) -> None:
    """Draw the beginning of an episode as the policy plays it, every second step, as `policy.gif`."""
    from PIL import Image

    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # no window, no screen
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    world = World.of(config)
    try:
        environment = gymnasium.make(world.name, render_mode="rgb_array")
        observation, _ = environment.reset(seed=TEST)
        frames = [environment.render()]
    except Exception as error:  # a renderer may lack anything; the policy is none the worse
        run.say("film", f"none: {world.name} cannot be drawn here ({error})")
        return
    act = tf.function(lambda seen: model(seen, training=False)["policy"][:, : world.count])
    for step in range(most):
        policy = act(tf.constant(observation[None], tf.float32)).numpy()
        observation, _, terminated, truncated, _ = environment.step(
            world.turn(policy.argmax(-1) if world.discrete else policy)[0]
        )
        if step % 2:
            frames.append(environment.render())
        if terminated or truncated:
            break
    environment.close()
    pictures = [Image.fromarray(frame) for frame in frames]
    for picture in pictures:
        picture.thumbnail((300, 300))
    path = config.folder / "policy.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40, loop=0, optimize=True)
    run.say("film", f"{path}")


def baseline(config: Config, splits: data.Splits) -> dict[str, metrics.Measured]:
    """The better of a policy that acts at random and a linear one found by random search in as many steps."""
    world = World.of(config)
    generator = np.random.default_rng(config.seed)
    play = Play(world, TESTED)
    found = {}
    play.reset(int(next(iter(splits.test))[0]))
    found["random policy"] = episodes(play, lambda seen: world.random(generator, TESTED))[0]
    steps = config.epochs * splits.steps * config.batch
    weights, normal = random_search(world, steps, seed=config.seed)
    play.reset(int(next(iter(splits.test))[0]))
    found["linear policy by random search"] = episodes(play, lambda seen: linear(world, weights, normal(seen)))[0]
    results = {name: metrics.measured(np.mean, totals) for name, totals in found.items()}
    for name, value in results.items():
        run.say("baseline", f"{name}: return {value}")
    return {"return": max(results.values(), key=lambda value: value.value)}


def linear(world: World, weights: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Choices by weights [action, number], or by each environment's own, [environment, action, number]."""
    policy = np.einsum("ban,bn->ba" if weights.ndim == 3 else "an,bn->ba", weights, seen)
    return policy.argmax(-1) if world.discrete else policy.astype(np.float32)


def random_search(world: World, steps: int, *, seed: int) -> tuple[np.ndarray, Callable]:
    """Augmented random search (Mania et al. 2018, V2-t): weights [action, number], and what normalises observations.

    In each round some directions are tried both ways for an episode each; the weights move along the better half.
    """
    directions, better, pace, reach = 8, 4, 0.05, 0.1
    random = np.random.default_rng(seed)
    play = Play(world, 2 * directions)
    weights, used = np.zeros((world.count, world.size)), 0
    count, mean, square = 0, np.zeros(world.size), np.zeros(world.size)

    def normal(seen):
        return (seen - mean) / (np.sqrt(np.maximum(square - mean**2, 0)) + 1e-6) if count > 1 else seen

    while used < steps:
        tries = random.normal(size=(directions, *weights.shape))
        candidates = weights + reach * np.concatenate([tries, -tries])
        play.reset(int(random.integers(TRY)))
        totals, lengths, seen = episodes(play, lambda seen, weights=candidates: linear(world, weights, normal(seen)))
        used += int(lengths.sum())
        share = len(seen) / (count + len(seen))
        mean, square = mean + share * (seen.mean(0) - mean), square + share * ((seen**2).mean(0) - square)
        count += len(seen)
        plus, minus = totals[:directions], totals[directions:]
        best = np.argsort(-np.maximum(plus, minus))[:better]
        spread = np.concatenate([plus[best], minus[best]]).std()
        if spread > 0:
            weights = weights + pace / (better * spread) * np.einsum("d,dan->an", (plus - minus)[best], tries[best])
    return weights, normal


def episodes(play: Play, choose: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of rewards and lengths of each environment's first episode, and the observations in them."""
    going = np.ones(play.count, bool)
    totals, lengths, seen = np.zeros(play.count), np.zeros(play.count, int), []
    for _ in range(play.world.limit):
        seen.append(play.observation[going])
        _, reward, terminated, truncated, _, _ = play.step(choose(play.observation))
        totals += reward * going
        lengths += going
        going &= ~(terminated | truncated)
        if not going.any():
            break
    return totals, lengths, np.concatenate(seen)


def folds(config: Config) -> run.Folds | None:
    """The trainings of several seeds."""
    if config.seeds < 2:
        return None
    seeds = range(config.seed, config.seed + config.seeds)
    configs = {f"seed-{seed}": dataclasses.replace(config, seed=seed) for seed in seeds}
    protocol = f"interquartile mean over {config.seeds} trainings by other seeds, each {TESTED} greedy episodes"
    return run.Folds(configs, protocol, acting.interquartile_mean)


class Endpoint(tf.Module):
    def __init__(self, config: Config, model: keras.Model, splits: data.Splits):
        super().__init__()
        self.model, self.world, self.preprocess = model, World.of(config), splits.preprocess
        spec = tf.TensorSpec([None, self.world.size], tf.float32, name="observation")
        self.answer = tf.function(self._answer, input_signature=[spec])

    @property
    def signatures(self):
        return {"serving_default": self.answer}

    def __call__(self, observation):
        return self.answer(observation)

    def _answer(self, observation):
        finite = tf.reduce_all(tf.math.is_finite(observation))
        told = tf.debugging.Assert(finite, ["observation holds NaN or infinite numbers; send finite ones"])
        with tf.control_dependencies([told]):
            outputs = self.model(self.preprocess(observation), training=False)
        policy = outputs["policy"]
        if self.world.discrete:
            chosen = {"action": self.world.turn(tf.argmax(policy, -1)), "probabilities": tf.nn.softmax(policy)}
        else:
            mean, deviation = tf.split(policy, 2, -1)
            _, half = self.world.scale
            mean = self.world.turn(mean, tf.clip_by_value)
            chosen = {"action": mean, "mean": mean, "deviation": half * tf.exp(deviation)}
        return {**chosen, "value": outputs["value"]}
