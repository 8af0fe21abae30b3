"""How well scores tell words from sounds that hold none."""

import numpy as np

from shared.metrics import Measured, share


def alarms(words: np.ndarray, others: np.ndarray, *, threshold: float = 0.5) -> dict[str, Measured]:
    """What a program would do that takes a score of at least `threshold` for a word.

    Args:
        words: best scores of recordings that hold a word, [recording].
        others: best scores of sounds that hold none, [sound].

    Returns:
        `false_alarm_rate`, the share of `others` taken for a word; `false_rejection_rate`, the share of `words` not.
    """
    return {
        "false_alarm_rate": share(others >= threshold),
        "false_rejection_rate": share(words < threshold),
    }
