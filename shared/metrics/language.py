"""How well a model foretells text."""

from pathlib import Path

import numpy as np

from shared.metrics import Measured, measured


def loss(nats: np.ndarray, characters: np.ndarray) -> Measured:
    """Cross-entropy in nats per character, whatever the tokens are, with the interval over windows of text.

    Args:
        nats: minus the sum of the log-probabilities of a window's tokens, [window].
        characters: how many characters those tokens spell, [window]; ValueError where there are none at all.
    """
    if not np.sum(characters) > 0:
        raise ValueError(f"no characters to measure on, in {len(nats)} windows; give a longer text")
    return measured(lambda nats, characters: np.sum(nats) / np.sum(characters), nats, characters)


def plot_places(nats: np.ndarray, path: Path) -> None:
    """Draw what a token costs by how many tokens of its window stand before it, as a PNG.

    Args:
        nats: minus the log-probability of each token, [window, place].
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(1, nats.shape[1] + 1), nats.mean(0), ".", markersize=3)
    axes.set(xscale="log", xlabel="place of the token in its window", ylabel="nats per token")
    axes.set_title(f"mean of {len(nats):,} windows: {nats.mean():.3f}")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
