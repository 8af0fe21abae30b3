"""Learning: where it runs, `fit` with all that guards and watches it, and what it cost."""

from shared.training.cost import describe, peak_bytes
from shared.training.fitting import best_score, cosine, fit
from shared.training.start import FREE, begin, beginning, strategy

__all__ = ["FREE", "begin", "beginning", "best_score", "cosine", "describe", "fit", "peak_bytes", "strategy"]
