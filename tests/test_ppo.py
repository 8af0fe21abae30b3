"""rl.ppo as a user meets it: environments of every kind, returns and advantages worked out by hand, refusals."""

import dataclasses
import json
import re
import shutil
import sys
import types

import grpc
import gymnasium
import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from apps.rl import ppo
from shared import training
from shared.metrics import acting
from shared.serving.client import Client, ServerError

SMALL = dataclasses.replace(ppo.SMOKE, name="small")


class Counting(gymnasium.Env):
    """Shows how many steps an episode has had; worth 1 a step; terminated after 3 steps, or truncated after 2."""

    observation_space = gymnasium.spaces.Box(0, 10, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2, start=5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        return np.full(1, self.steps, np.float32), 1.0, self.steps == 3, False, {}


@pytest.fixture
def counting():
    ppo.World.of.cache_clear()
    for name, limit in (("Counting-v1", None), ("CountingLimited-v1", 2)):
        gymnasium.register(name, Counting, max_episode_steps=limit)
    yield
    for name in ("Counting-v1", "CountingLimited-v1"):
        del gymnasium.registry[name]
    ppo.World.of.cache_clear()


def test_advantages_by_hand():
    rewards = tf.constant([[1.0], [2.0], [3.0]])
    values = tf.constant([[0.5], [1.0], [1.5], [2.0]])
    no = tf.constant([[False]] * 3)
    second = tf.constant([[False], [True], [False]])

    def found(terminated, truncated):
        return ppo.advantage(rewards, values, terminated, truncated, discount=0.9, trace=0.5).numpy()[:, 0]

    # Surprises: 1 + .9 * 1 - .5 = 1.4;  2 + .9 * 1.5 - 1 = 2.35;  3 + .9 * 2 - 1.5 = 3.3. Traces decay by .45.
    np.testing.assert_allclose(found(no, no), [1.4 + 0.45 * (2.35 + 0.45 * 3.3), 2.35 + 0.45 * 3.3, 3.3], rtol=1e-6)
    # Terminated after the second step: nothing is worth anything behind it. 2 - 1 = 1.
    np.testing.assert_allclose(found(second, no), [1.4 + 0.45 * 1, 1, 3.3], rtol=1e-6)
    # Truncated there: what its last observation is worth still counts, what came after does not.
    np.testing.assert_allclose(found(no, second), [1.4 + 0.45 * 2.35, 2.35, 3.3], rtol=1e-6)


def test_advantages_with_a_full_trace_are_returns_less_values():
    random = np.random.default_rng(1)
    rewards, values = random.normal(size=(6, 2)), random.normal(size=(7, 2))
    terminated = np.zeros((6, 2), bool)
    terminated[3, 0] = terminated[5, 1] = True
    found = ppo.advantage(
        *(tf.constant(part, tf.float32) for part in (rewards, values)), tf.constant(terminated),
        tf.zeros([6, 2], tf.bool), discount=0.9, trace=1.0,
    )  # fmt: skip
    for side in range(2):
        for time in range(6):
            total, share = 0.0, 1.0
            for later in range(time, 6):
                total += share * rewards[later, side]
                share *= 0.9
                if terminated[later, side]:
                    break
            else:
                total += share * values[6, side]
            assert found[time, side].numpy() == pytest.approx(total - values[time, side], rel=1e-4, abs=1e-5)


def test_moments_of_parts_are_those_of_the_whole():
    random = np.random.default_rng(1)
    parts = [random.normal(number, number + 1, (50 * (number + 1), 3)).astype(np.float32) for number in range(3)]
    count, mean, variance = 0.0, tf.zeros(3), tf.zeros(3)
    for part in parts:
        count, mean, variance = ppo.merge(count, mean, variance, tf.constant(part))
    whole = np.concatenate(parts)
    assert count == len(whole)
    np.testing.assert_allclose(mean, whole.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, whole.var(0), rtol=1e-5)


def test_gradients_are_shortened_as_by_keras():
    random = np.random.default_rng(1)
    gradients = [tf.constant(random.normal(size=size), tf.float32) for size in ([3, 4], [4], [1])]
    optimizer = keras.optimizers.Adam(global_clipnorm=0.5)
    for scale in (1.0, 0.01, 1e38):  # too long, short enough, and longer than a float32 holds
        scaled = [scale * gradient for gradient in gradients]
        for want, have in zip(optimizer._clip_gradients(scaled), ppo.shortened(scaled, 0.5), strict=True):
            np.testing.assert_allclose(have, want, rtol=1e-6)  # NaN, of the last, equals NaN here
    assert np.isnan(have).all()


def test_each_pass_learns_from_each_step_once_and_gains_are_of_chosen_steps_alone(tmp_path):
    config = dataclasses.replace(SMALL, passes=2, runs=str(tmp_path), saved_models=str(tmp_path))
    learner = ppo.Learner(config, ppo.build(config, ppo.load(config)))
    count, size = config.batch, config.batch // config.minibatches
    chosen = np.arange(count) % 3 > 0
    rows = {"number": tf.range(count), "advantage": tf.random.normal([count], seed=1), "chosen": tf.constant(chosen)}
    found = {name: value.numpy() for name, value in learner._minibatches(rows, tf.constant(7)).items()}
    assert found["number"].shape == (2 * config.minibatches, size)
    passes = found["number"].reshape(2, count)
    assert (np.sort(passes) == np.arange(count)).all()
    assert (passes[0] != passes[1]).any()
    for number, share, gain in zip(found["number"], found["share"], found["gain"], strict=True):
        taken = chosen[number]
        np.testing.assert_allclose(share, taken / taken.sum(), rtol=1e-6)
        advantages = rows["advantage"].numpy()[number]
        wanted = (advantages - advantages[taken].mean()) / advantages[taken].std()
        np.testing.assert_allclose(gain, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "length"), [("Counting-v1", 3), ("CountingLimited-v1", 2)])
def test_rollout_of_a_world_known_by_heart(counting, name, length):
    config = dataclasses.replace(SMALL, data=name)
    world = ppo.World.of(config)
    assert (world.count, world.first, world.actions) == (2, 5, ("5", "6"))
    play = ppo.Play(world, 4)
    play.reset(1)
    splits = ppo.load(config)
    network = ppo.build(config, splits)
    played = {name: value.numpy() for name, value in ppo.roll(network, play, tf.zeros([8, 4, 2])).items()}
    period = length + 1  # the step in which an environment begins anew is nobody's
    steps = np.arange(8) % period
    np.testing.assert_array_equal(played["observation"][:8, 0, 0], steps)
    ended = steps == length - 1
    np.testing.assert_array_equal(played["terminated"][:, 0], ended if length == 3 else np.zeros(8, bool))
    np.testing.assert_array_equal(played["truncated"][:, 0], ended if length == 2 else np.zeros(8, bool))
    np.testing.assert_array_equal(played["chosen"][:, 0], steps != length)
    np.testing.assert_array_equal(played["reward"][:, 0], (steps != length).astype(float))
    np.testing.assert_array_equal(played["total"][:, 0], (steps + 1) % period)
    totals, lengths = ppo.first_episodes(played)
    np.testing.assert_array_equal(totals, [length] * 4)
    np.testing.assert_array_equal(lengths, [length] * 4)
    play.reset(1)
    once = ppo.roll(network, play, tf.zeros([8, 4, 2]), once=True)
    assert {part: value.shape[0] for part, value in once.items()} == {
        part: length + (part == "observation") for part in played
    }
    for part, whole in zip(ppo.first_episodes(once), (totals, lengths), strict=True):
        np.testing.assert_array_equal(part, whole)
    play.reset(1)
    totals, lengths, seen = ppo.episodes(play, lambda seen: np.zeros(4, int))
    np.testing.assert_array_equal(totals, [length] * 4)
    np.testing.assert_array_equal(lengths, [length] * 4)
    assert len(seen) == 4 * length


def test_value_of_a_world_known_by_heart(counting, tmp_path):
    # With a discount of a half, the first of three steps is worth 1 + 1/2 + 1/4, and the third 1.
    changes = {"data": "Counting-v1", "steps": 25_600, "discount": 0.5, "rate": 0.01, "entropy": 0.0}
    config = dataclasses.replace(SMALL, **changes, runs=str(tmp_path), saved_models=str(tmp_path), name="")
    config = training.begin("rl.ppo", config)
    splits = ppo.load(config)
    network = ppo.build(config, splits)
    ppo.train(config, network, splits)
    value = network(tf.constant([[0.0], [1.0], [2.0]]))["value"]
    np.testing.assert_allclose(value, [1.75, 1.5, 1.0], atol=0.1)


def test_an_episode_without_end_is_cut_off_at_the_limit():
    no = tf.zeros([3, 2], tf.bool)
    total = tf.constant([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]])
    ended = tf.constant([[False, True], [False, False], [False, False]])
    totals, lengths = ppo.first_episodes({"terminated": no, "truncated": ended, "total": total})
    np.testing.assert_array_equal(totals, [3, 5])
    np.testing.assert_array_equal(lengths, [3, 1])


@pytest.mark.parametrize("precision", ["mixed_bfloat16"])
def test_any_precision_learns(tmp_path, precision):
    config = dataclasses.replace(SMALL, precision=precision, runs=str(tmp_path), saved_models=str(tmp_path), name="")
    config = training.begin("rl.ppo", config)
    splits = ppo.load(config)
    assert ppo.train(config, ppo.build(config, splits), splits)["epochs"] == 2


def test_a_compiled_update_is_the_plain_one(tmp_path):
    learnt = []
    for xla in (False, True):
        changes = {"xla": xla, "epochs": 1, "runs": str(tmp_path), "saved_models": str(tmp_path), "name": ""}
        config = training.begin("rl.ppo", dataclasses.replace(SMALL, **changes))
        splits = ppo.load(config)
        learner = ppo.Learner(config, ppo.build(config, splits))
        learner.compile(learner.network.optimizer, jit_compile=False)
        for play, _ in learner.plays.values():
            play.reset(1)
        rows, _ = learner._prepare(learner._play(tf.zeros([1], tf.int64)))
        told = learner._learn(learner._minibatches(rows, tf.zeros([], tf.int32)))
        learnt.append([told.numpy(), *learner.network.get_weights()])
    assert learnt[0][0][1] > 0.5  # nats of two actions
    for plain, compiled in zip(*learnt, strict=True):
        np.testing.assert_allclose(plain, compiled, rtol=1e-3, atol=1e-4)


def test_interquartile_mean_by_hand():
    assert acting.interquartile_mean(np.array([1.0, 100, 2, 3, -50])) == 2  # of five the middle three
    assert acting.interquartile_mean(np.array([4.0, 1, 2, 3])) == 2.5
    assert acting.interquartile_mean(np.array([7.0])) == 7


def test_a_policy_that_balances_is_served(cornucopia, forked, serving, tmp_path):
    done = forked("train", "rl.ppo", "--steps=20480", "--epochs=2")
    value = float(re.search(r"\n +return +(\S+)", done.stdout)[1])
    assert value > 400  # of 500; at random it is about 22
    run = next((tmp_path / "runs").glob("rl.ppo-*"))
    for picture in ("policy.gif", "learning_curve.png", "seeds.png"):
        assert (run / picture).stat().st_size > 1_000
    with serving() as address:
        with Client(address) as client:
            environment = gymnasium.make("CartPole-v1")
            seen, _ = environment.reset(seed=77)
            for steps in range(1, 201):  # noqa: B007
                answer = client.predict("rl.ppo", {"observation": seen[None]})
                seen, _, terminated, truncated, _ = environment.step(int(answer["action"][0]))
                if terminated or truncated:
                    break
            assert steps == 200
            assert answer["probabilities"].sum() == pytest.approx(1, abs=1e-5)
            for wrong in ([[np.nan, 0, 0, 0]], [[np.inf, 0, 0, 0]], [[0.0, 0, 0]], [0.0, 0, 0, 0]):
                with pytest.raises(ServerError) as refused:
                    client.predict("rl.ppo", {"observation": np.array(wrong, np.float32)})
                assert refused.value.code == grpc.StatusCode.INVALID_ARGUMENT
        done = forked("evaluate", "rl.ppo")
        assert re.search(r"return +[45]\d\d\.", done.stdout)
        answer = cornucopia("ask", "rl.ppo", "--observation=0,0,0.1,0.2", f"--address={address}").stdout
        assert re.search(r"^action +1$", answer, re.MULTILINE)  # it falls to the right: push there
        assert re.search(r"^value +\d", answer, re.MULTILINE)


def test_continuous_actions_stay_in_their_bounds(forked, serving):
    flags = ("--steps=4096", "--epochs=2", "--batch=256", "--environments=4", "--width=8", "--no-xla")
    forked("train", "rl.ppo", "--data=Pendulum-v1", *flags)
    with serving() as address, Client(address) as client:
        seen = np.array([[1, 0, 0], [-1, 0, 8], [1000, -1000, 1000]], np.float32)
        answer = client.predict("rl.ppo", {"observation": seen})
    assert answer["action"].shape == (3, 1)
    assert (np.abs(answer["action"]) <= 2).all()
    assert (answer["deviation"] > 0).all()


def test_observations_are_normalised_by_what_was_seen(counting, tmp_path, monkeypatch):
    changes = {
        "data": "CountingLimited-v1",
        "steps": 1_280,
        "epochs": 1,
        "runs": str(tmp_path),
        "saved_models": str(tmp_path),
    }
    config = training.begin("rl.ppo", dataclasses.replace(SMALL, **changes, name=""))
    seen, step = [], ppo.Play.step

    def watched(self, chosen):
        told = step(self, chosen)
        if self.count == config.environments:  # those to learn in
            seen.append(told[0])
        return told

    splits = ppo.load(config)
    network = ppo.build(config, splits)
    monkeypatch.setattr(ppo.Play, "step", watched)
    ppo.train(config, network, splits)
    network.save(tmp_path / "model.keras")
    network = keras.saving.load_model(tmp_path / "model.keras")
    normal, seen = network.get_layer("normal"), np.concatenate(seen)
    assert len(seen) == 1_280
    np.testing.assert_allclose(normal.moving_mean, seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(normal.moving_variance, seen.var(0), rtol=1e-5)

    def served(name):
        endpoint = ppo.Endpoint(config, network, splits)
        tf.saved_model.save(endpoint, str(tmp_path / name), signatures=endpoint.signatures)
        serve = tf.saved_model.load(str(tmp_path / name)).signatures["serving_default"]
        return serve(observation=tf.constant([[0.0], [1.0], [2.0]]))["value"].numpy()

    first = served("first")
    mean, variance = normal.moving_mean.numpy(), normal.moving_variance.numpy()
    normal.moving_mean.assign(mean + 1)  # then 1 is what 0 was
    np.testing.assert_allclose(served("moved")[1:], first[:2], rtol=1e-4)
    normal.moving_mean.assign(mean)
    normal.moving_variance.assign(4 * variance)  # then differences are half of what they were
    wider = network(mean + 2 * (np.array([[0.0], [1.0], [2.0]], np.float32) - mean))["value"]
    np.testing.assert_allclose(wider, first, rtol=1e-4)
    assert np.abs(served("wide") - first).max() > 1e-3 * np.abs(first).max()


def test_several_seeds_to_one_result(forked, tmp_path, monkeypatch):
    flags = ("--seeds=2", "--steps=512", "--epochs=2", "--width=8", "--batch=256", "--environments=4", "--no-xla")
    done = forked("train", "rl.ppo", *flags)
    assert "test       interquartile mean over 2 trainings by other seeds, each 100 greedy episodes\n" in done.stdout
    (run,) = (tmp_path / "runs").glob("rl.ppo-*")
    assert [path.name for path in run.glob("seed-*")] == ["seed-2"]  # the run itself has seed 1
    report = json.loads((run / "metrics.json").read_text())
    folds = {name: fold["test"]["return"] for name, fold in report["folds"].items()}
    assert list(folds) == ["seed-1", "seed-2"]
    assert folds["seed-1"] != folds["seed-2"]
    # As rliable.metrics.aggregate_iqm: scipy.stats.trim_mean(scores, proportiontocut=0.25, axis=None).
    expected = scipy.stats.trim_mean(list(folds.values()), proportiontocut=0.25, axis=None)
    assert report["test"]["return"]["value"] == pytest.approx(expected, rel=1e-6)
    assert ppo.folds(dataclasses.replace(SMALL, seeds=4)).statistic(np.array([1.0, 100, 2, 3])) == 2.5

    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: drawn.append((self, path)))
    assert (run / "seeds.png").stat().st_size > 1_000
    acting.plot_seeds(run / "seed-2", 512)
    ((figure, path),) = drawn
    assert path == run / "seeds.png"
    *curves, middle = (line.get_ydata() for line in figure.axes[0].lines)
    states = [folder / "checkpoint-2" / "state.json" for folder in (run, run / "seed-2")]
    tried = [json.loads(state.read_text())["history"]["val_return"] for state in states]
    np.testing.assert_allclose(curves, tried)
    np.testing.assert_allclose(middle, np.mean(tried, 0))


def test_a_broken_run_goes_on_to_the_same_policy(tmp_path, monkeypatch):
    """Also on two devices: what goes on there equals the run on one that nothing broke off."""
    monkeypatch.setattr(ppo, "TRIED", 6)

    class KilledError(Exception):
        pass

    def learn(name, *, strategy="one", resume=False, stop=None):
        # Pendulum's environments each have a seed of their own; CartPole's draw from one generator.
        changes = {"data": "Pendulum-v1", "epochs": 2, "passes": 2, "strategy": strategy, "resume": resume,
                   "checkpoint_every": 1}  # fmt: skip
        config = dataclasses.replace(SMALL, **changes, runs=str(tmp_path), saved_models=str(tmp_path), name=name)
        config = training.begin("rl.ppo", config)
        splits = ppo.load(config)
        with training.strategy(strategy).scope():
            network = ppo.build(config, splits)
        with monkeypatch.context() as patch:
            if stop is not None:
                reset = ppo.Play.reset
                begun = []

                def until(self, seed):
                    begun.extend([seed] * (self.count != ppo.TRIED))
                    if len(begun) > stop:
                        raise KilledError
                    reset(self, seed)

                patch.setattr(ppo.Play, "reset", until)
            ppo.train(config, network, splits)
        return network

    def past(name):  # of all epochs, also where the best was before the break
        return json.loads((tmp_path / name / "checkpoint-2" / "state.json").read_text())["history"]

    whole = learn("whole")
    with pytest.raises(KilledError):
        learn("one", stop=1)
    # Where the environments are within an epoch no checkpoint holds, so none is of the middle of one.
    assert [path.name for path in (tmp_path / "one").glob("checkpoint-*")] == ["checkpoint-1"]
    shutil.copytree(tmp_path / "one", tmp_path / "mirrored")
    for strategy, within in (("one", 0), ("mirrored", 1e-5)):
        resumed = learn(strategy, strategy=strategy, resume=True)
        for want, have in zip(whole.get_weights(), resumed.get_weights(), strict=True):
            np.testing.assert_allclose(want, have, rtol=within, atol=within, err_msg=strategy)
        for name, curve in past("whole").items():  # NaN, where no episode ended, equals NaN here
            told = f"{name}, {strategy}"
            np.testing.assert_allclose(past(strategy)[name], curve, rtol=within, atol=within, err_msg=told)


def test_environments_of_a_pool_are_learned_from_alike(tmp_path, monkeypatch):
    """EnvPool's interface in front of Gymnasium's environments: the seed at the making, none at a reset."""

    class Pool:
        def __init__(self, name, *, env_type, num_envs, seed):
            assert env_type == "gymnasium"
            self.inside, self.seed = gymnasium.make_vec(name, num_envs), seed
            made.append(seed)

        def reset(self, *, seed=None):
            assert seed is None
            return self.inside.reset(seed=self.seed)

        def step(self, action):
            return self.inside.step(action)

    made = []
    module = types.SimpleNamespace(__version__="0", make=Pool, list_all_envs=lambda: ["Acrobot-v1", "CartPole-v1"])
    monkeypatch.setitem(sys.modules, "envpool", module)
    learnt = {}
    for simulator in ("gymnasium", "envpool"):
        changes = {"simulator": simulator, "runs": str(tmp_path), "saved_models": str(tmp_path)}
        config = training.begin("rl.ppo", dataclasses.replace(SMALL, **changes, name=""))
        splits = ppo.load(config)
        network = ppo.build(config, splits)
        made.clear()
        ppo.train(config, network, splits)
        assert len(set(made)) == (0 if simulator == "gymnasium" else config.epochs)
        learnt[simulator] = network.get_weights()
    for want, have in zip(*learnt.values(), strict=True):
        np.testing.assert_array_equal(want, have)

    def pooled(**changes):
        config = dataclasses.replace(SMALL, **changes)
        return ppo.pooled(config, ppo.World.of(config))

    assert pooled(simulator="envpool")
    assert pooled(data="Acrobot-v1", simulator="auto")
    assert not pooled(simulator="auto")  # of CartPole-v1, Gymnasium's own are faster
    with pytest.raises(ValueError, match="EnvPool 0 has no Pendulum-v1; without --simulator, Gymnasium"):
        pooled(data="Pendulum-v1", simulator="envpool")
    monkeypatch.setitem(sys.modules, "envpool", None)  # as where it is not installed
    assert not pooled(data="Acrobot-v1", simulator="auto")
    with pytest.raises(ValueError, match="EnvPool is not installed"):
        pooled(simulator="envpool")


@pytest.mark.parametrize("name", ["CartPole-v1", "Acrobot-v1"])
def test_envpool_steps_as_gymnasium_does(name):
    pytest.importorskip("envpool", reason="EnvPool is an extra that make leaves out: pip install '.[envpool]'")
    world = ppo.World.of(dataclasses.replace(SMALL, data=name))
    random = np.random.default_rng(1)
    choices = [world.random(random, 4) for _ in range(1200)]
    play = ppo.Play(world, 4, pool=True)

    def played(seed):
        play.reset(seed)
        first = (play.observation, *(np.zeros(4),) * 2, *(np.zeros(4, bool),) * 2, play.total)
        return [first, *(play.step(choice) for choice in choices)]

    whole = played(3)
    for want, have in zip(whole, played(3), strict=True):
        for part, again in zip(want, have, strict=True):
            np.testing.assert_array_equal(part, again)
    assert any((want[0] != have[0]).any() for want, have in zip(whole, played(4), strict=True))

    inside = gymnasium.make(name).unwrapped
    inside.reset(seed=1)
    length, ends = np.zeros(4, int), set()
    for before, choice, after in zip(whole, choices, whole[1:], strict=False):
        observation, reward, terminated, truncated, chosen, _ = after
        for side in range(4):
            seen = before[0][side].astype(float)
            if not chosen[side]:  # it began anew
                assert (reward[side], terminated[side], truncated[side], length[side]) == (0, False, False, 0)
                assert np.abs(observation[side] - inside.reset()[0]).max() < 0.5
                continue
            inside.state = seen if len(seen) == 4 else [*np.arctan2(seen[1:4:2], seen[:4:2]), *seen[4:]]
            inside.steps_beyond_terminated = None
            expected, worth, over, _, _ = inside.step(int(choice[side]))
            np.testing.assert_allclose(observation[side], expected, atol=1e-5)
            assert (reward[side], terminated[side]) == (worth, over)
            length[side] += 1
            assert truncated[side] == (length[side] == world.limit and not over)
            ends |= {"terminated"} if over else {"truncated"} if truncated[side] else set()
            length[side] *= not (over or truncated[side])
    assert ends == ({"terminated"} if name == "CartPole-v1" else {"truncated"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "NoSuchWorld-v0"}, "--data=NoSuchWorld-v0 is no environment here"),
        ({"data": "FrozenLake-v1"}, "FrozenLake-v1 shows Discrete"),
        ({"steps": 100}, "--steps=100 are too few for 2 epochs with --batch=256"),
        ({"environments": 7}, "--batch=256 must be a multiple of --environments=7"),
    ],
)
def test_bad_input_ends_in_advice(changes, message):
    config = dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        ppo.build(config, ppo.load(config))


def test_devices_that_cannot_share_alike_are_told_so():
    config = dataclasses.replace(SMALL, environments=1)
    splits = ppo.load(config)
    told = "2 devices cannot share --environments=1"
    with training.strategy("mirrored").scope(), pytest.raises(ValueError, match=told):
        ppo.build(config, splits)
