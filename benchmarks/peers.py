"""What races against the suite: other people's libraries, in an environment of their own that knows nothing of ours.

python benchmarks/peers.py PEER DATA.npz SETTINGS, as `benchmarks.races` calls it; prints one line of JSON.

Each takes arrays and settings, and returns the `quality` on the test part, the `seconds` from reading the arrays to a
trained model, the seconds of `processor` in it, and what else there is to say. The libraries' import is not timed.
"""

import itertools
import json
import os
import sys
import time
from importlib import metadata

import numpy as np

# What is tried on validation, the library's defaults among it.
GRIDS = {
    "als": {"factors": (16, 32, 64, 100), "regularization": (0.01, 1.0, 10.0), "alpha": (1.0, 10.0)},
    "bpr": {"factors": (16, 32, 100), "learning_rate": (0.003, 0.01, 0.03), "regularization": (0.01, 0.1)},
}  # fmt: skip


def clock() -> np.ndarray:
    """Seconds of wall time and of this process's and its children's processors; a difference of two is what counts."""
    spent = os.times()
    return np.array([time.perf_counter(), spent.user + spent.system + spent.children_user + spent.children_system])


def implicit(read, settings: dict) -> dict:
    """A factorization by implicit, of a kind in GRIDS: chosen on validation, then fitted to all but the last items.

    Args:
        read: -> `had_validation`, `had_test` [user, item], bool; `took_validation`, `took_test` [user], indices.
        settings: `kind`, `seed`, `threads`.
    """
    import threadpoolctl
    from implicit.cpu.als import AlternatingLeastSquares
    from implicit.cpu.bpr import BayesianPersonalizedRanking
    from scipy.sparse import csr_matrix

    threadpoolctl.threadpool_limits(1, "blas")  # as its documentation asks: its own threads share the work
    grid = GRIDS[settings["kind"]]
    machine = {"als": AlternatingLeastSquares, "bpr": BayesianPersonalizedRanking}[settings["kind"]]

    def score(had, took, values):
        model = machine(**values, num_threads=settings["threads"], random_state=settings["seed"])
        model.fit(csr_matrix(had, dtype=np.float32), show_progress=False)
        return ndcg(np.where(had, -np.inf, model.user_factors @ model.item_factors.T), took)

    begun = time.perf_counter()
    data = read()
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    best = max(points, key=lambda values: score(data["had_validation"], data["took_validation"], values))
    searched = time.perf_counter() - begun
    begun = clock()
    quality = score(data["had_test"], data["took_test"], best)
    seconds, processor = (clock() - begun).tolist()
    told = ", ".join(f"{name} {value:g}" for name, value in best.items())
    return {
        "quality": quality,
        "seconds": seconds,
        "processor": processor,
        "settings": f"{told}; the best of {len(points)} on validation, found in {searched:.0f} s",
        "version": metadata.version("implicit"),
    }


def ndcg(scores: np.ndarray, took: np.ndarray, top: int = 10) -> float:
    """Mean over users; among equal scores the right item comes last, as in `shared.metrics.retrieval`."""
    place = (scores >= scores[np.arange(len(took)), took][:, None]).sum(-1)
    return float(np.where(place <= top, 1 / np.log2(place + 1), 0).mean())


def pytorch(read, settings: dict) -> dict:
    """vision.classify's network, recipe and augmentation in PyTorch; `compiled` or eager.

    Args:
        read: -> `train`, `test` [picture, row, column, channel], uint8; `train_labels`, `test_labels`.
        settings: vision.classify's, and `compiled`, `threads`, `classes`, `weights`, `steps_an_epoch`.
    """
    import math

    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(settings["seed"])
    torch.set_num_threads(settings["threads"])
    width, batch, rate = settings["width"], settings["batch"], settings["rate"]
    steps = settings["epochs"] * settings["steps_an_epoch"]
    low = torch.autocast("cpu", torch.bfloat16, enabled=settings["precision"] == "mixed_bfloat16")

    def convolve(before, channels, side=3, stride=1):
        convolution = nn.Conv2d(before, channels, side, stride, side // 2, bias=False)
        nn.init.kaiming_normal_(convolution.weight)
        return nn.Sequential(convolution, nn.BatchNorm2d(channels, eps=1e-3))

    class Block(nn.Module):
        def __init__(self, before, channels, stride=1):
            super().__init__()
            self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
            self.straight = convolve(before, channels, 1) if before != channels else nn.Identity()
            self.one, self.two = convolve(before, channels, 3, stride), convolve(channels, channels)

        def forward(self, x):
            return functional.relu(self.straight(self.pool(x)) + self.two(functional.relu(self.one(x))))

    class Network(nn.Module):
        def __init__(self, pictures):
            super().__init__()
            self.register_buffer("mean", pictures.mean((0, 2, 3), keepdim=True))
            self.register_buffer("deviation", pictures.std((0, 2, 3), keepdim=True))
            self.blocks = nn.Sequential(
                convolve(pictures.shape[1], width // 2), nn.ReLU(), convolve(width // 2, width, 3, 2), nn.ReLU(),
                Block(width, width), Block(width, 2 * width, 2), Block(2 * width, 2 * width),
            )  # fmt: skip
            self.logits = nn.Linear(2 * width, settings["classes"])
            nn.init.xavier_uniform_(self.logits.weight)
            nn.init.zeros_(self.logits.bias)

        def forward(self, x):
            with low:
                x = self.blocks((x - self.mean) / self.deviation).mean((2, 3))
            return self.logits(x.float())

    def changed(pictures):
        """Mirrored, moved by whole pixels, and some with a patch of noise, each picture by itself."""
        count, _, side, _ = pictures.shape
        most = settings["shift"] * side
        reach = math.ceil(most)
        place = torch.arange(side)
        rows, columns = (place + reach + torch.empty(count, 1).uniform_(-most, most).round().long() for _ in range(2))
        if settings["flip"] == "yes":
            columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
        padded = functional.pad(pictures, [reach] * 4, mode="replicate")
        moved = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
        length = side * torch.empty(2, count, 1).uniform_(0.02, 0.2).sqrt()
        begin = torch.rand(2, count, 1) * (side - length)
        down, across = (place >= begin) & (place < begin + length)
        patch = (down[:, :, None] & across[:, None] & (torch.rand(count, 1, 1) < settings["erase"]))[:, None]
        return torch.where(patch, (255 * torch.randn(moved.shape)).clamp(0, 255), moved)

    begun = clock()
    data = read()
    pictures = torch.from_numpy(data["train"]).permute(0, 3, 1, 2).float()
    labels = torch.from_numpy(data["train_labels"])
    network = Network(pictures).to(memory_format=torch.channels_last)
    count = sum(weights.numel() for weights in network.parameters())
    if count != settings["weights"]:
        raise ValueError(f"expected vision.classify's network of {settings['weights']:,} weights, this has {count:,}")
    kernels = [weights for weights in network.parameters() if weights.dim() == 4]
    others = [weights for weights in network.parameters() if weights.dim() != 4]
    groups = [{"params": kernels, "weight_decay": settings["decay"]}, {"params": others}]
    optimizer = torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True)
    step = torch.compile(network) if settings["compiled"] else network
    rising = max(1, round(0.2 * steps))
    order, first = torch.empty(0, dtype=torch.long), 0.0
    trained = time.perf_counter()
    for turn in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(pictures))
        at, order = order[:batch], order[batch:]
        part = (turn - rising) / max(1, steps - rising)
        for group in optimizer.param_groups:
            group["lr"] = rate * ((turn + 1) / rising if turn < rising else 0.5 + 0.5 * math.cos(math.pi * part))
        logits = step(changed(pictures[at]).contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(logits, labels[at], label_smoothing=settings["smoothing"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        first = first or time.perf_counter() - trained
    speed = steps * batch / (time.perf_counter() - trained)
    seconds, processor = (clock() - begun).tolist()
    network.eval()
    right = 0
    with torch.no_grad():
        test = torch.from_numpy(data["test"]).permute(0, 3, 1, 2).float()
        for x, y in zip(test.split(500), torch.from_numpy(data["test_labels"]).split(500), strict=True):
            scores = network(x).softmax(-1)
            if settings["flip"] == "yes" and settings["mirror"]:
                scores = scores + network(x.flip(3)).softmax(-1)
            right += (scores.argmax(-1) == y).sum().item()
    return {
        "quality": right / len(test),
        "seconds": seconds,
        "processor": processor,
        "speed": speed,
        "settings": f"{settings['precision']}, {settings['epochs']} epochs, first step {first:.1f} s",
        "version": torch.__version__.split("+")[0],
    }


def nanogpt(read, settings: dict) -> dict:
    """The CPU recipe of nanoGPT, written anew from its description; `compiled` or eager.

    GPT-2 with 4 layers, 4 heads, width 128, tied embeddings and no biases; block 64, batch 12, 2,000 iterations of
    AdamW with warm-up and decay, on the first 90 % of the text; measured on all of the rest.

    Args:
        read: -> `text`, its characters' numbers.
        settings: `compiled`, `iterations`, `seed`, `threads`.
    """
    import math

    import torch
    from torch import nn
    from torch.nn import functional

    layers, heads, width, block, batch = 4, 4, 128, 64, 12
    iterations = settings["iterations"]
    torch.manual_seed(settings["seed"])
    torch.set_num_threads(settings["threads"])

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
            self.look, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.wide, self.narrow = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = (part.view(b, t, heads, -1).transpose(1, 2) for part in self.look(self.one(x)).split(width, 2))
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, width)
            x = x + self.out(y)
            return x + self.narrow(functional.gelu(self.wide(self.two(x))))

    class Network(nn.Module):
        def __init__(self, kinds):
            super().__init__()
            self.tokens, self.places = nn.Embedding(kinds, width), nn.Embedding(block, width)
            self.blocks = nn.Sequential(*[Block() for _ in range(layers)])
            self.last, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, kinds, bias=False)
            self.head.weight = self.tokens.weight
            for name, weights in self.named_parameters():
                if weights.dim() > 1:
                    deep = name.endswith(("out.weight", "narrow.weight"))
                    nn.init.normal_(weights, std=0.02 / (math.sqrt(2 * layers) if deep else 1))

        def forward(self, x):
            return self.head(self.last(self.blocks(self.tokens(x) + self.places(torch.arange(x.shape[1])))))

    begun = clock()
    kinds, ids = np.unique(read()["text"], return_inverse=True)
    ids = torch.from_numpy(ids)
    cut = int(0.9 * len(ids))
    network = Network(len(kinds))
    matrices = [weights for weights in network.parameters() if weights.dim() > 1]
    others = [weights for weights in network.parameters() if weights.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    step = torch.compile(network) if settings["compiled"] else network
    first, trained = 0.0, time.perf_counter()
    for turn in range(iterations):
        decayed = 0.5 * (1 + math.cos(math.pi * (turn - 100) / (iterations - 100)))
        rate = 1e-3 * (turn + 1) / 101 if turn < 100 else 1e-4 + decayed * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = rate
        at = torch.randint(cut - block - 1, (batch,))[:, None] + torch.arange(block + 1)
        rows = ids[at]
        loss = functional.cross_entropy(step(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        first = first or time.perf_counter() - trained
    speed = iterations * batch * block / (time.perf_counter() - trained)
    seconds, processor = (clock() - begun).tolist()
    rest = ids[cut:]
    whole = (len(rest) - 1) // block * block
    with torch.no_grad():
        inputs, targets = rest[:whole].view(-1, block), rest[1 : whole + 1].view(-1, block)
        losses = [functional.cross_entropy(network(x).flatten(0, 1), y.flatten(), reduction="sum").item()
                  for x, y in zip(inputs.split(256), targets.split(256), strict=True)]  # fmt: skip
    return {
        "quality": sum(losses) / whole,
        "seconds": seconds,
        "processor": processor,
        "speed": speed,
        "settings": f"float32, {iterations:,} iterations, first step {first:.1f} s",
        "version": torch.__version__.split("+")[0],
    }


# hyperparams/ppo.yml of DLR-RM/rl-baselines3-zoo; `lin` falls to zero in a straight line.
ZOO = {
    "CartPole-v1": {"n_envs": 8, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20,
                    "ent_coef": 0.0, "learning_rate": "lin 0.001", "clip_range": "lin 0.2"},
    "Acrobot-v1": {"normalize": True, "n_envs": 16, "n_steps": 256, "gae_lambda": 0.94, "gamma": 0.99, "n_epochs": 4,
                   "ent_coef": 0.0},
    "LunarLander-v3": {"n_envs": 16, "n_steps": 1024, "batch_size": 64, "gae_lambda": 0.98, "gamma": 0.999,
                       "n_epochs": 4, "ent_coef": 0.01},
}  # fmt: skip


def ppo(read, settings: dict) -> dict:
    """Stable-Baselines3's PPO as RL Baselines3 Zoo sets it; the quality is the return of 100 greedy episodes.

    Args:
        read: nothing is read.
        settings: `data`, the environment's name or empty; `steps` to learn from, `seed`, `threads`.
    """
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(settings["threads"])
    name = settings["data"] or "CartPole-v1"
    zoo = dict(ZOO[name])
    normalize, count = zoo.pop("normalize", False), zoo.pop("n_envs")
    for key, value in zoo.items():
        if str(value).startswith("lin"):
            start = float(value.split()[1])
            zoo[key] = lambda left, start=start: left * start
    begun = clock()
    world = make_vec_env(name, count, seed=settings["seed"])
    if normalize:
        world = VecNormalize(world, gamma=zoo["gamma"])
    model = PPO("MlpPolicy", world, device="cpu", seed=settings["seed"], **zoo)
    trained = time.perf_counter()
    model.learn(settings["steps"])
    speed = model.num_timesteps / (time.perf_counter() - trained)
    seconds, processor = (clock() - begun).tolist()
    trial = make_vec_env(name, 10, seed=2_000_000)
    if normalize:
        trial = VecNormalize(trial, training=False, norm_reward=False)
        trial.obs_rms = world.obs_rms
    value, _ = evaluate_policy(model, trial, n_eval_episodes=100, deterministic=True)
    return {
        "quality": float(value),
        "seconds": seconds,
        "processor": processor,
        "speed": speed,
        "settings": f"{model.num_timesteps:,} steps, RL Baselines3 Zoo's settings",
        "version": metadata.version("stable-baselines3"),
    }


PEERS = {"implicit": implicit, "pytorch": pytorch, "nanogpt": nanogpt, "ppo": ppo}

if __name__ == "__main__":
    peer, path, told = sys.argv[1:]
    print(json.dumps(PEERS[peer](lambda: dict(np.load(path)), json.loads(told))))
