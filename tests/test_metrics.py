"""Metrics against numbers worked out by hand, or by a reference library."""

import numpy as np
import pytest
import sklearn.metrics

from shared import metrics
from shared.metrics import classification, speech


def test_interval_of_a_mean_is_the_binomial_one():
    hits = np.repeat([1.0, 0.0], [800, 200])
    found = metrics.measured(np.mean, hits)
    error = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert found.value == pytest.approx(0.8)
    assert found.low == pytest.approx(0.8 - error, abs=0.004)
    assert found.high == pytest.approx(0.8 + error, abs=0.004)


@pytest.mark.parametrize("right", [True, False])
def test_interval_of_a_share_where_all_are_alike_is_the_exact_one(right):
    found = metrics.share(np.full(9, right))
    far = 0.025 ** (1 / 9)  # nine in a row are as rare as that where the share of hits is so
    assert (found.value, found.low, found.high) == pytest.approx((1, far, 1) if right else (0, 0, 1 - far))
    some = np.array([True, True, False])
    assert metrics.share(some) == metrics.measured(np.mean, some.astype(float))


def test_one_example_has_no_interval():
    found = metrics.measured(np.mean, np.array([0.25]))
    assert found.value == 0.25
    assert np.isnan([found.low, found.high]).all()


def test_interval_is_the_same_for_the_same_seed():
    hits = np.random.default_rng(1).random(50).round()
    assert metrics.measured(np.mean, hits) == metrics.measured(np.mean, hits)


def test_accuracy_top_k_and_macro_f1_by_hand():
    scores = np.array(
        [[0.5, 0.3, 0.1, 0.1], [0.2, 0.5, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.6, 0.2, 0.1, 0.1]]
    )
    labels = np.array([0, 1, 1, 3, 2])
    found = classification.classification(labels, scores, top=2)
    assert found["accuracy"].value == pytest.approx(3 / 5)
    assert found["top2_accuracy"].value == pytest.approx(4 / 5)
    # Class 0: one of three chosen is right, all found, F1 1/2. Class 1: 2/3. Class 2: never chosen, 0. Class 3: 1.
    assert found["macro_f1"].value == pytest.approx((1 / 2 + 2 / 3 + 0 + 1) / 4)


def test_macro_f1_equals_scikit_learn():
    random = np.random.default_rng(2)
    labels, chosen = random.integers(0, 7, 500), random.integers(0, 7, 500)
    expected = np.mean([sklearn.metrics.f1_score(labels == name, chosen == name) for name in range(7)])
    assert classification.macro_f1(labels, chosen) == pytest.approx(expected)
    labels, chosen = 3 * labels, np.where(chosen == 5, 20, 3 * chosen)  # classes that nobody names, and one chosen only
    expected = sklearn.metrics.f1_score(labels, chosen, average="macro", zero_division=0)
    assert classification.macro_f1(labels, chosen) == pytest.approx(expected)


def test_calibration_error_by_hand():
    # Two answers at 0.9 of which one is right, two at 0.6, both right: (2 |0.5 - 0.9| + 2 |1 - 0.6|) / 4.
    right, confidence = np.array([1.0, 0.0, 1.0, 1.0]), np.array([0.9, 0.9, 0.6, 0.6])
    assert classification.calibration_error(right, confidence) == pytest.approx(0.4)
    assert classification.calibration_error(np.ones(3), np.ones(3)) == pytest.approx(0)


def test_alarms_by_hand():
    found = speech.alarms(np.array([0.9, 0.5, 0.4, 0.8]), np.array([0.1, 0.6, 0.2, 0.3, 0.49]))
    assert found["false_alarm_rate"].value == pytest.approx(1 / 5)
    assert found["false_rejection_rate"].value == pytest.approx(1 / 4)


def test_logits_are_refused():
    with pytest.raises(ValueError, match="not logits"):
        classification.classification(np.array([0]), np.array([[3.0, -1.0]]))
    with pytest.raises(ValueError, match="finite"):
        classification.classification(np.array([0]), np.array([[np.nan, 1.0]]))


def test_confusion_matrix_is_drawn(tmp_path):
    path = tmp_path / "matrix.png"
    classification.plot_confusion(np.array([0, 1, 1]), np.array([0, 1, 0]), ["$5_$9", "b"], path)
    assert path.read_bytes().startswith(b"\x89PNG")
