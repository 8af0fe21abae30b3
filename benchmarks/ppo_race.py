"""rl.ppo against Stable-Baselines3's PPO: environment steps per second of training and what is reached, in one run.

python -m benchmarks.ppo_race [--environments CartPole-v1 LunarLander-v3] [--repeats 3]

The peer runs with RL Baselines3 Zoo's published settings, in an environment of its own (`.venv-peers`, made where it
is missing), on the same Gymnasium, with as many steps but for what fills no round. The two take turns; the medians
count. The clock runs while they learn, ours also while XLA compiles; not while policies are tried out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PEERS = Path(".venv-peers")
PACKAGES = ("torch", "stable-baselines3", "gymnasium[box2d,classic-control]")

# hyperparams/ppo.yml of DLR-RM/rl-baselines3-zoo; `lin` falls to zero in a straight line.
ZOO = {
    "CartPole-v1": {"n_envs": 8, "n_timesteps": 100_000, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8,
                    "gamma": 0.98, "n_epochs": 20, "ent_coef": 0.0, "learning_rate": "lin 0.001",
                    "clip_range": "lin 0.2"},
    "Acrobot-v1": {"normalize": True, "n_envs": 16, "n_timesteps": 1_000_000, "n_steps": 256, "gae_lambda": 0.94,
                   "gamma": 0.99, "n_epochs": 4, "ent_coef": 0.0},
    "LunarLander-v3": {"n_envs": 16, "n_timesteps": 1_000_000, "n_steps": 1024, "batch_size": 64, "gae_lambda": 0.98,
                       "gamma": 0.999, "n_epochs": 4, "ent_coef": 0.01},
}  # fmt: skip

PEER = """
import json, sys, time
import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
name, settings, steps, seed = json.loads(sys.argv[1])
normalize = settings.pop("normalize", False)
world = make_vec_env(name, settings.pop("n_envs"), seed=seed)
if normalize:
    world = VecNormalize(world, gamma=settings["gamma"])
settings.pop("n_timesteps")
for key, value in settings.items():
    if str(value).startswith("lin"):
        settings[key] = lambda left, start=float(value.split()[1]): left * start
model = PPO("MlpPolicy", world, device="cpu", seed=seed, **settings)
begun = time.perf_counter()
model.learn(steps)
seconds = time.perf_counter() - begun
trial = make_vec_env(name, 10, seed=2_000_000)
if normalize:
    trial = VecNormalize(trial, training=False, norm_reward=False)
    trial.obs_rms = world.obs_rms
value, _ = evaluate_policy(model, trial, n_eval_episodes=100, deterministic=True)
print(json.dumps({"speed": model.num_timesteps / seconds, "return": float(value), "seconds": seconds}))
"""


def peer(name: str, steps: int, seed: int) -> dict[str, float]:
    command = [PEERS / "bin" / "python", "-W", "ignore", "-c", PEER, json.dumps([name, ZOO[name], steps, seed])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def ours(name: str, steps: int, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "rl.ppo", f"--data={name}", f"--steps={steps}", f"--seed={seed}", f"--runs={folder}/runs",
                 f"--saved-models={folder}/saved"]  # fmt: skip
        subprocess.run([Path(sys.executable).with_name("cornucopia"), *words], check=True, capture_output=True)
        (path,) = Path(folder).glob("saved/rl.ppo/1/assets.extra/metrics.json")
        report = json.loads(path.read_text())
    cost = report["cost"]
    return {
        "speed": cost["examples_per_second"],
        "return": report["test"]["return"]["value"],
        "seconds": cost["train_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", nargs="+", choices=ZOO, default=["CartPole-v1", "LunarLander-v3"])
    parser.add_argument("--steps", type=int, help="of each training; else as many as the peer's settings say")
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    if not (PEERS / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
        subprocess.run([PEERS / "bin" / "python", "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    print("| environment, steps | | steps/s | ratio | minutes | return, 100 greedy episodes, by run |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in flags.environments:
        steps = flags.steps or ZOO[name]["n_timesteps"]
        found = {"Stable-Baselines3": [], "rl.ppo": []}
        for seed in range(1, flags.repeats + 1):
            found["Stable-Baselines3"].append(peer(name, steps, seed))
            found["rl.ppo"].append(ours(name, steps, seed))
        medians = {who: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
                   for who, runs in found.items()}  # fmt: skip
        for who, median in medians.items():
            ratio = median["speed"] / medians["Stable-Baselines3"]["speed"]
            returns = ", ".join(f"{one['return']:.1f}" for one in found[who])
            print(f"| {name}, {steps:,} | {who} | {median['speed']:,.0f} | {ratio:.2f} | {median['seconds'] / 60:.1f} "
                  f"| {returns} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
