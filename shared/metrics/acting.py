"""How well a policy acts, over several trainings."""

import json
from pathlib import Path

import numpy as np
import scipy.stats


def interquartile_mean(values: np.ndarray) -> float:
    """The mean of the middle half of the trainings' results [training] (Agarwal et al. 2021; as in rliable)."""
    return float(scipy.stats.trim_mean(values, 0.25))


def plot_seeds(folder: Path, steps: int) -> None:
    """Draw the tried returns over environment steps of a run and of those with other seeds below it, as `seeds.png`.

    Args:
        folder: of the run, with `checkpoint-N/state.json` in it and in its sub-folders `seed-N`.
        steps: of the environments, in each run.
    """
    from matplotlib.figure import Figure

    root = folder.parent if (folder.parent / "config.json").exists() else folder
    states = [*root.glob("checkpoint-*/state.json"), *sorted(root.glob("seed-*/checkpoint-*/state.json"))]
    curves = [json.loads(state.read_text())["history"]["val_return"] for state in states]
    length = max(len(curve) for curve in curves)
    curves = np.array([curve for curve in curves if len(curve) == length])
    at = np.linspace(0, steps, length + 1)[1:]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        axes.plot(at, curve, color="tab:blue", alpha=0.35, linewidth=1)
    axes.plot(at, [interquartile_mean(column) for column in curves.T], label="interquartile mean")
    axes.fill_between(at, curves.min(0), curves.max(0), alpha=0.15, label=f"lowest to highest of {len(curves)}")
    axes.set(xlabel="environment steps", ylabel="return, greedy policy")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(root / "seeds.png", dpi=120)
