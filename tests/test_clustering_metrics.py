"""sccvae.metrics for clusters: against tables counted by hand, all permutations, and scikit-learn."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from sccvae import metrics

LABELS = ["a", "a", "a", "b", "b", "c", "c", "c", "c", "c"]
CLUSTERS = [2, 2, 7, 7, 7, 2, 9, 9, 9, 7]
TABLE = [[2, 1, 0], [0, 2, 0], [1, 1, 3]]


def random_labels(seed, n=60, k=4, m=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(k, size=n)
    return labels, np.where(rng.random(n) < 0.5, labels * 3 % 7, rng.integers(m, size=n))


def test_contingency_by_hand():
    table = metrics.contingency(LABELS, CLUSTERS)
    assert table.dtype == np.int64
    assert table.tolist() == TABLE
    assert metrics.contingency(CLUSTERS, LABELS).tolist() == np.transpose(TABLE).tolist()
    assert metrics.contingency(["x"], [0]).tolist() == [[1]]


@pytest.mark.parametrize("seed", range(3))
def test_contingency_is_sklearns(seed):
    labels, clusters = random_labels(seed)
    assert (metrics.contingency(labels, clusters) == contingency_matrix(labels, clusters)).all()


def test_accuracies_by_hand():
    assert metrics.hungarian_accuracy(LABELS, CLUSTERS) == pytest.approx(7 / 10)  # 2 + 2 + 3
    assert metrics.majority_accuracy(LABELS, CLUSTERS) == pytest.approx(7 / 10)
    # Cluster 1 is half a: a match is one to one, a name is not.
    assert metrics.hungarian_accuracy(list("aaabb"), [0, 0, 1, 1, 2]) == pytest.approx(3 / 5)
    assert metrics.majority_accuracy(list("aaabb"), [0, 0, 1, 1, 2]) == pytest.approx(4 / 5)


def test_greedy_matching_is_not_enough():
    """The largest entry (5) must not be taken: 4 + 4 is more than 5 + 0."""
    labels = ["a"] * 9 + ["b"] * 4
    clusters = [0] * 5 + [1] * 4 + [0] * 4
    assert metrics.contingency(labels, clusters).tolist() == [[5, 4], [4, 0]]
    assert metrics.hungarian_accuracy(labels, clusters) == pytest.approx(8 / 13)


@pytest.mark.parametrize("seed", range(5))
def test_hungarian_accuracy_is_the_best_of_all_matches(seed):
    labels, clusters = random_labels(seed)
    table = contingency_matrix(labels, clusters)
    k = max(table.shape)
    square = np.zeros((k, k))
    square[: table.shape[0], : table.shape[1]] = table
    best = max(square[np.arange(k), list(order)].sum() for order in permutations(range(k)))
    assert metrics.hungarian_accuracy(labels, clusters) == pytest.approx(best / len(labels))
    assert metrics.hungarian_accuracy(clusters, labels) == pytest.approx(best / len(labels))


def test_names_of_clusters_do_not_matter():
    labels, clusters = random_labels(0)
    wanted = metrics.clustering(labels, clusters)
    names = np.array(list("zyxwvutsr"))
    series = pd.Series(names[clusters], index=[f"cell{i}" for i in range(len(clusters))], dtype="category")
    assert metrics.clustering(pd.Series(labels), series) == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(3))
def test_all_measures(seed):
    labels, clusters = random_labels(seed)
    found = metrics.clustering(labels, clusters)
    assert list(found) == ["hungarian", "majority", "nmi", "ari", "n_clusters"]
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(labels, clusters))
    assert found["ari"] == pytest.approx(adjusted_rand_score(labels, clusters))
    assert found["hungarian"] == metrics.hungarian_accuracy(labels, clusters)
    assert found["majority"] == metrics.majority_accuracy(labels, clusters)
    assert found["hungarian"] <= found["majority"]
    assert found["n_clusters"] == len(set(clusters.tolist()))


def test_extremes():
    labels = np.repeat(np.arange(3), 5)
    assert metrics.clustering(labels, 2 - labels) == {
        "hungarian": 1.0, "majority": 1.0, "nmi": pytest.approx(1.0), "ari": 1.0, "n_clusters": 3,
    }  # fmt: skip
    alone = metrics.clustering(labels, np.arange(15))
    assert alone["majority"] == 1
    assert alone["hungarian"] == pytest.approx(3 / 15)
    together = metrics.clustering(labels, np.zeros(15))
    assert together == {
        "hungarian": pytest.approx(1 / 3), "majority": pytest.approx(1 / 3), "nmi": pytest.approx(0.0),
        "ari": pytest.approx(0.0), "n_clusters": 1,
    }  # fmt: skip


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA])
@pytest.mark.parametrize("kind", ["object", "category"])
def test_missing_entries_are_counted(missing, kind):
    labels = pd.Series(["a", missing, "b", missing], dtype=kind)
    for function in (metrics.contingency, metrics.hungarian_accuracy, metrics.majority_accuracy, metrics.clustering):
        with pytest.raises(ValueError, match="labels has 2 missing entries: drop these points or name them"):
            function(labels, [0, 0, 1, 1])
        with pytest.raises(ValueError, match="clusters has 2 missing entries"):
            function([0, 0, 1, 1], labels)
        with pytest.raises(ValueError, match="clusters has 1 missing entries"):
            function([0, 0], [0.0, np.nan])


@pytest.mark.parametrize(("labels", "clusters"), [([0, 1], [0]), ([], []), ([[0, 1]], [[0, 1]])])
def test_errors(labels, clusters):
    for function in (metrics.contingency, metrics.hungarian_accuracy, metrics.majority_accuracy, metrics.clustering):
        with pytest.raises(ValueError, match="one value of each for every cell is needed"):
            function(labels, clusters)
