"""How well a model foretells text."""

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
