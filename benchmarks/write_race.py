"""generative.write against nanoGPT's CPU recipe in PyTorch: loss for time, and tokens per second of the same network.

python -m benchmarks.write_race [--repeats 3]

The peer is nanoGPT's network (GPT-2 with 4 layers, 4 heads, width 128, tied embeddings, no biases) and recipe (block
64, batch 12, 2,000 iterations of AdamW with warm-up and decay) in eager and in compiled PyTorch, written anew from
its description, in an environment of its own (`.venv-peers`). All train on the first 90 % of tinyshakespeare and are
measured on all of the rest. `as wide and as deep` is our network at the peer's sizes and batch, once over the text.
They take turns; medians count. The clock runs while they learn: without validation, with compilation.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.ppo_race import PACKAGES, PEERS
from shared.data import named

PEER = """
import json, math, sys, time
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
path, compiled, iterations, seed = json.loads(sys.argv[1])
layers, heads, width, block, batch = 4, 4, 128, 64, 12
torch.manual_seed(seed)
text = open(path, encoding="utf-8").read()
kinds = {character: number for number, character in enumerate(sorted(set(text)))}
ids = torch.tensor([kinds[character] for character in text])
cut = int(0.9 * len(ids))

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.look, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.wide, self.narrow = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (part.view(b, t, heads, -1).transpose(1, 2) for part in self.look(self.one(x)).split(width, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, width)
        x = x + self.out(y)
        return x + self.narrow(F.gelu(self.wide(self.two(x))))

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(len(kinds), width), nn.Embedding(block, width)
        self.blocks = nn.Sequential(*[Block() for _ in range(layers)])
        self.last, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, len(kinds), bias=False)
        self.head.weight = self.tokens.weight
        for name, weights in self.named_parameters():
            if weights.dim() > 1:
                deep = name.endswith(("out.weight", "narrow.weight"))
                nn.init.normal_(weights, std=0.02 / (math.sqrt(2 * layers) if deep else 1))

    def forward(self, x):
        return self.head(self.last(self.blocks(self.tokens(x) + self.places(torch.arange(x.shape[1])))))

network = Network()
matrices = [weights for weights in network.parameters() if weights.dim() > 1]
others = [weights for weights in network.parameters() if weights.dim() < 2]
groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
step = torch.compile(network) if compiled else network
begun = time.perf_counter()
for turn in range(iterations):
    rate = 1e-3 * (turn + 1) / 101 if turn < 100 else (
        1e-4 + 0.5 * (1 + math.cos(math.pi * (turn - 100) / (iterations - 100))) * 9e-4)
    for group in optimizer.param_groups:
        group["lr"] = rate
    at = torch.randint(cut - block - 1, (batch,))[:, None] + torch.arange(block + 1)
    rows = ids[at]
    loss = F.cross_entropy(step(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
seconds = time.perf_counter() - begun
rest = ids[cut:]
whole = (len(rest) - 1) // block * block
with torch.no_grad():
    inputs, targets = rest[:whole].view(-1, block), rest[1 : whole + 1].view(-1, block)
    losses = [F.cross_entropy(network(x).flatten(0, 1), y.flatten(), reduction="sum").item()
              for x, y in zip(inputs.split(256), targets.split(256))]
print(json.dumps({"loss": sum(losses) / whole, "seconds": seconds, "speed": iterations * batch * block / seconds}))
"""


def peer(path: Path, iterations: int, seed: int, *, compiled: bool) -> dict[str, float]:
    words = [PEERS / "bin" / "python", "-c", PEER, json.dumps([str(path), compiled, iterations, seed])]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def ours(seed: int, *flags: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "generative.write", "--data=tinyshakespeare", f"--seed={seed}", f"--runs={folder}/runs",
                 f"--saved-models={folder}/saved", *flags]  # fmt: skip
        subprocess.run([Path(sys.executable).with_name("cornucopia"), *words], check=True, capture_output=True)
        (path,) = Path(folder).glob("saved/generative.write/1/assets.extra/metrics.json")
        report = json.loads(path.read_text())
        config = json.loads(path.with_name("config.json").read_text())["config"]
    cost = report["cost"]
    return {
        "loss": report["test"]["loss"]["value"],
        "seconds": cost["train_seconds"],
        "speed": cost["examples_per_second"] * config["context"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    path = named.find("tinyshakespeare")["input.txt"]
    if not (PEERS / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
        subprocess.run([PEERS / "bin" / "python", "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    same = ("--layers=4", "--heads=4", "--width=128", "--context=64", "--batch=12", "--history=1",
            "--epochs=1", "--optimizer=adamw", "--rate=0.003", "--precision=float32")  # fmt: skip
    runners = {
        "PyTorch, eager": lambda seed: peer(path, flags.iterations, seed, compiled=False),
        "PyTorch, compiled": lambda seed: peer(path, flags.iterations, seed, compiled=True),
        "generative.write, as wide and as deep": lambda seed: ours(seed, *same),
        "generative.write": ours,
    }
    found = {name: [] for name in runners}
    for seed in range(1, flags.repeats + 1):
        for name, runner in runners.items():
            found[name].append(runner(seed))
            print(f"seed {seed}  {name}  {found[name][-1]}", file=sys.stderr, flush=True)
    medians = {name: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
               for name, runs in found.items()}  # fmt: skip
    print("| | loss, nats per character | seconds | tokens/s | ratio |\n| --- | --- | --- | --- | --- |")
    for name, median in medians.items():
        ratio = median["speed"] / medians["PyTorch, eager"]["speed"]
        print(f"| {name} | {median['loss']:.4f} | {median['seconds']:.1f} | {median['speed']:,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
