"""Readers of ratings, and the metrics of a ranking against numbers worked by hand or by scikit-learn."""

import os
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics

from shared.data import named, ratings
from shared.metrics import retrieval

# User 7 takes 30 and 4 at one moment, in this order, after 12, and then 12 again; user 10 takes 4.
MOVIELENS = "7\t30\t5\t200\n10\t4\t1\t50\n7\t12\t3\t100\n7\t4\t4\t200\n7\t12\t2\t300\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("u.data", MOVIELENS),
        ("ratings.dat", MOVIELENS.replace("\t", "::")),
        ("mine.csv", "user,item,rating,timestamp\n" + MOVIELENS.replace("\t", ",")),
        ("ratings.csv", "\ufeffuserId,movieId,rating,timestamp\n" + MOVIELENS.replace("\t", ",") + "\n"),
        ("mine.tsv", "timestamp\titem\tuser\n200\t30\t7\n50\t4\t10\n100\t12\t7\n200\t4\t7\n300\t12\t7\n"),
        ("mine.csv", "user,item\n7,12\n7,30\n10,4\n7,4\n7,12\n"),
    ],
)
def test_formats_say_the_same(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    taken = ratings.read(tmp_path / name)
    assert taken.user_names == ("7", "10")  # by their value
    assert taken.item_names == ("4", "12", "30")
    assert list(taken.starts) == [0, 3, 4]
    assert [taken.item_names[item] for item in taken.items] == ["12", "30", "4", "4"]
    assert taken.repeated == 1
    if "timestamp" in text or "csv" not in name:
        assert list(taken.times) == [100, 200, 200, 50]


def test_folder_and_titles(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no u\.data, ratings\.dat or ratings\.csv is in"):
        ratings.read(tmp_path)
    (tmp_path / "u.data").write_text(MOVIELENS)
    assert len(ratings.read(tmp_path).items) == 4
    assert ratings.titles(tmp_path) == {}
    (tmp_path / "u.item").write_bytes("12|Misérables, Les (1995)|x\n".encode("latin-1"))
    assert ratings.titles(tmp_path) == {"12": "Misérables, Les (1995)"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("u.data", "1\t2\t3\n", r"line 1: expected user, item, rating and timestamp with tabs or ::"),
        ("u.data", MOVIELENS + "1\t\t3\t4\n", "line 6: the item is empty"),
        ("u.data", "1\t2\t3\tnoon\n", "line 1: expected a number as timestamp, found 'noon'"),
        ("u.data", "1\t2\t3\tnan\n", "line 1: no finite timestamp"),
        ("u.data", "", "holds no interaction"),
        ("a.csv", "user,film\n1,2\n", r"expected a first line that names user and item .*found user,film"),
        ("a.csv", "", "found an empty file"),
        ("a.csv", "user,item\n1,2\n1\n", "line 3: 1 fields, the first line names 2"),
        ("a.csv", b"user,item\n1,\xe9t\xe9\n", "is not UTF-8"),
    ],
)
def test_a_bad_file_is_told(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        ratings.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        ratings.read(tmp_path / "nowhere")


def test_ranking_by_hand():
    scores = np.array([[3.0, 2.0, 1.0, -np.inf], [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 0.0, -np.inf]])
    targets = np.array([1, 3, 0])  # at places 2, 1, and 2, for an equal score stands before it
    popularity = np.array([0.5, 0.25, 0.125, 0.125])
    assert list(retrieval.ranks(scores, targets)) == [2, 1, 2]
    found = retrieval.retrieval(scores, targets, popularity, top=1)
    assert found["ndcg@1"].value == pytest.approx(1 / 3)
    assert found["mrr"].value == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    assert found["coverage@1"].value == pytest.approx(2 / 4)  # items 0 and 3 are seen
    assert found["popularity_bias@1"].value == pytest.approx((0.5 + 0.125 + 0.5) / (0.25 + 0.125 + 0.5))
    found = retrieval.retrieval(scores, targets, popularity, top=2)
    assert found["hr@2"].value == 1
    assert found["ndcg@2"].value == pytest.approx((1 / np.log2(3) + 1 + 1 / np.log2(3)) / 3)


def test_ndcg_equals_scikit_learn():
    random = np.random.default_rng(1)
    scores, targets = random.random((50, 40)), random.integers(0, 40, 50)
    found = retrieval.retrieval(scores, targets, np.ones(40))
    assert found["ndcg@10"].value == pytest.approx(sklearn.metrics.ndcg_score(np.eye(40)[targets], scores, k=10))


def test_a_constant_earns_nothing_and_nonsense_is_refused():
    constant = retrieval.retrieval(np.zeros((5, 20)), np.arange(5), np.ones(20))
    assert constant["ndcg@10"].value == constant["hr@10"].value == 0
    with pytest.raises(ValueError, match="NaN"):
        retrieval.retrieval(np.array([[np.nan, 1.0]]), np.array([1]), np.ones(2))
    with pytest.raises(ValueError, match="among the excluded"):
        retrieval.retrieval(np.array([[-np.inf, 1.0]]), np.array([0]), np.ones(2))


@pytest.mark.skipif(not Path(os.environ.get("CORNUCOPIA_DATA", "/nowhere")).is_dir(), reason="no public data here")
def test_movielens_has_its_published_size():
    path = named.find("ml-100k")["u.data"]
    taken = ratings.read(path)
    assert (len(taken.user_names), len(taken.item_names), len(taken.items)) == (943, 1_682, 100_000)
    assert np.diff(taken.starts).min() == 20
    assert taken.repeated == 0
    assert set(ratings.titles(path.parent)) == set(taken.item_names)
