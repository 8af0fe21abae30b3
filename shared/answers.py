"""Answers that more than one kind of model gives."""

import tensorflow as tf


def ranked(names: tf.Tensor, scores: tf.Tensor, *, most: int = 5) -> dict[str, tf.Tensor]:
    """What a classifier answers.

    Args:
        names: of the classes, [class], string.
        scores: of each, [batch, class].
        most: how many to list.

    Returns:
        `label` and `score` of the best class, [batch]; `top_labels` and `top_scores` of the best `most`, best first,
        [batch, place].
    """
    top = tf.math.top_k(scores, k=min(most, names.shape[0]))
    labels = tf.gather(names, top.indices)
    return {"label": labels[:, 0], "score": top.values[:, 0], "top_labels": labels, "top_scores": top.values}
