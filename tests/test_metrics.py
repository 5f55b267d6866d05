"""sccvae.metrics against independent references."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse, stats
from sklearn.datasets import load_iris
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from sccvae import metrics


@pytest.fixture(scope="module")
def iris():
    data = load_iris()
    return data.data, data.target_names[data.target]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_import_is_light():
    code = "import sys, sccvae.metrics; print([m for m in ('torch', 'scvi', 'sklearn', 'anndata') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# knn_accuracy


@pytest.mark.parametrize("k", [1, 4])
def test_knn_accuracy_leave_one_out_is_sklearns(iris, k):
    # Jitter: iris has points at equal distances, whose order is arbitrary.
    z = iris[0] + np.random.default_rng(1).normal(scale=0.3, size=iris[0].shape)
    expected = cross_val_score(KNeighborsClassifier(k), z, iris[1], cv=LeaveOneOut()).mean()
    assert metrics.knn_accuracy(z, iris[1], n_neighbors=k) == pytest.approx(expected)


def test_knn_accuracy_with_test_set_is_sklearns(iris, rng):
    z = iris[0] + rng.normal(scale=0.3, size=iris[0].shape)
    train = rng.random(len(z)) < 0.6
    fitted = KNeighborsClassifier(7).fit(z[train], iris[1][train])
    accuracy = metrics.knn_accuracy(z[train], iris[1][train], z[~train], iris[1][~train], n_neighbors=7)
    assert accuracy == pytest.approx(fitted.score(z[~train], iris[1][~train]))


def test_knn_accuracy_excludes_self_even_among_duplicates():
    z = np.zeros((4, 2))
    assert metrics.knn_accuracy(z, ["a", "b", "b", "b"], n_neighbors=3) == 0.75


def test_knn_accuracy_of_label_unseen_in_training_is_zero():
    z = np.arange(6.0)[:, None]
    assert metrics.knn_accuracy(z, ["a"] * 6, z, ["b"] * 6, n_neighbors=2) == 0


def test_labels_may_be_a_categorical_series(iris):
    labels = pd.Series(iris[1], index=[f"cell{i}" for i in range(len(iris[1]))], dtype="category")
    assert metrics.knn_accuracy(iris[0], labels) == metrics.knn_accuracy(iris[0], iris[1])


def test_knn_accuracy_errors(iris):
    z, labels = iris
    with pytest.raises(ValueError, match="belong together"):
        metrics.knn_accuracy(z, labels, z_test=z)
    with pytest.raises(ValueError, match=r"labels must have one entry for each of the 150 points.*\(149,\)"):
        metrics.knn_accuracy(z, labels[1:])
    with pytest.raises(ValueError, match="n_neighbors=150 must be from 1 to 149"):
        metrics.knn_accuracy(z, labels, n_neighbors=150)
    with pytest.raises(ValueError, match="n_neighbors=0"):
        metrics.knn_accuracy(z, labels, n_neighbors=0)
    with pytest.raises(ValueError, match=r"z must be finite, but 12 of its 150 rows hold NaN"):
        metrics.knn_accuracy(np.where(z > 7, np.nan, z), labels)
    with pytest.raises(ValueError, match="z must be"):
        metrics.knn_accuracy(z[:, 0], labels)


@pytest.mark.parametrize("missing", [None, np.nan, "NA"])
def test_missing_labels_are_named(iris, missing):
    labels = iris[1].astype(object)
    labels[[3, 5]] = pd.NA if missing == "NA" else missing
    with pytest.raises(ValueError, match="labels has 2 missing entries"):
        metrics.knn_accuracy(iris[0], labels)


# batch_mixing


def _mean_entropy(neighbors, batch):
    entropies = []
    for row in neighbors:
        share = [np.mean(batch[row] == b) for b in set(batch[row])]
        entropies.append(-sum(p * np.log(p) for p in share))
    return np.mean(entropies)


@pytest.mark.parametrize("sizes", [(60, 60), (100, 15, 5)])
def test_batch_mixing_is_observed_over_random_entropy(rng, sizes):
    batch = np.repeat([f"b{i}" for i in range(len(sizes))], sizes)
    z = rng.normal(size=(len(batch), 3)) + (batch == "b1")[:, None]
    distance = np.linalg.norm(z[:, None] - z[None], axis=2) + np.diag([np.inf] * len(z))
    neighbors = np.argsort(distance, axis=1)[:, :10]
    # Dealing the batches again leaves the neighbourhoods alone: a Monte Carlo estimate of the expectation
    at_random = np.mean([_mean_entropy(neighbors, rng.permutation(batch)) for _ in range(100)])
    expected = _mean_entropy(neighbors, batch) / at_random
    assert metrics.batch_mixing(z, batch, n_neighbors=10) == pytest.approx(expected, rel=0.02)


def test_batch_mixing_ends_of_the_scale(rng):
    batch = np.repeat(["a", "b"], [300, 100])
    z = rng.normal(size=(400, 4))
    assert metrics.batch_mixing(z + 100 * (batch == "a")[:, None], batch) == 0
    scores = [metrics.batch_mixing(z, rng.permutation(batch)) for _ in range(30)]
    assert np.mean(scores) == pytest.approx(1, abs=0.01)


def test_batch_mixing_expectation_is_exact_without_the_cell_itself(rng):
    # All five others are neighbours, however the batches are dealt: observed and expected must be equal
    assert metrics.batch_mixing(rng.normal(size=(6, 2)), list("aaaabc"), n_neighbors=5) == pytest.approx(1, rel=1e-12)


def test_batch_mixing_errors(rng):
    z = rng.normal(size=(20, 2))
    with pytest.raises(ValueError, match="All 20 cells are of one batch, a:"):
        metrics.batch_mixing(z, ["a"] * 20)
    for k in (1, 30):  # a single neighbour is never mixed
        with pytest.raises(ValueError, match=f"n_neighbors={k} must be from 2 to 19"):
            metrics.batch_mixing(z, ["a", "b"] * 10, n_neighbors=k)


# label_silhouette


def test_label_silhouette_against_the_definition(rng):
    labels = np.repeat(["a", "b", "c"], [10, 20, 15])
    z = rng.normal(size=(45, 2)) + 2 * (labels == "b")[:, None]
    distance = np.linalg.norm(z[:, None] - z[None], axis=2)
    widths = []
    for i, own in enumerate(labels):
        inside = distance[i, labels == own].sum() / (np.sum(labels == own) - 1)
        outside = min(distance[i, labels == other].mean() for other in set(labels) - {own})
        widths.append((outside - inside) / max(inside, outside))
    assert metrics.label_silhouette(z, labels) == pytest.approx((np.mean(widths) + 1) / 2)


def test_label_silhouette_errors(rng):
    z = rng.normal(size=(5, 2))
    for labels in (["a"] * 5, list("abcde")):
        with pytest.raises(ValueError, match="A silhouette needs"):
            metrics.label_silhouette(z, labels)


# principal_angles


def test_principal_angles_of_known_planes():
    angle = np.deg2rad(30)
    a = np.eye(5)[:, :2]
    b = np.zeros((5, 2))
    b[0, 0] = 1
    b[1, 1], b[2, 1] = np.cos(angle), np.sin(angle)
    np.testing.assert_allclose(metrics.principal_angles(a, b @ [[2, 1], [0, -3]]), [0, 30], atol=1e-9)
    np.testing.assert_allclose(metrics.principal_angles(a, np.eye(5)[:, 3:]), [90, 90])
    assert metrics.principal_angles(a, b[:, :1]).shape == (1,)


def test_principal_angles_from_cosines(rng):
    a, b = rng.normal(size=(10, 3)), rng.normal(size=(10, 4))
    cosines = np.linalg.svd(np.linalg.qr(a)[0].T @ np.linalg.qr(b)[0], compute_uv=False)
    np.testing.assert_allclose(metrics.principal_angles(a, b), np.rad2deg(np.arccos(cosines)), rtol=1e-6)


def test_principal_angles_of_transposed_input():
    with pytest.raises(ValueError, match="transposed"):
        metrics.principal_angles(np.eye(5)[:, :2], np.eye(5)[:2])


# expression


def test_gene_correlation_is_numpys(rng):
    x = rng.poisson(2, size=(50, 6)).astype(np.float32)
    y = x + rng.normal(size=x.shape)
    x[:, 2], y[:, 4] = 0, 0.1  # the mean of 50 times 0.1 is not 0.1 in floating point
    expected = [np.corrcoef(x[:, g], y[:, g])[0, 1] if g not in (2, 4) else np.nan for g in range(6)]
    np.testing.assert_allclose(metrics.gene_correlation(x, y), expected, rtol=1e-6)
    np.testing.assert_allclose(metrics.gene_correlation(sparse.csr_matrix(x), y), expected, rtol=1e-6)
    assert np.nanmax(metrics.gene_correlation(x, x)) <= 1


def test_r_squared_of_means_is_numpys(rng):
    x, y = rng.gamma(2, size=(30, 8)), rng.gamma(2, size=(40, 8))
    expected = np.corrcoef(x.mean(0), y.mean(0))[0, 1] ** 2
    assert metrics.r_squared_of_means(x, y) == pytest.approx(expected)
    assert metrics.r_squared_of_means(sparse.csr_matrix(x), 3 * x + 1) == pytest.approx(1)
    assert np.isnan(metrics.r_squared_of_means(x, np.ones((2, 8))))


def test_expression_errors(rng):
    x = rng.normal(size=(5, 3))
    with pytest.raises(ValueError, match="same cells and genes"):
        metrics.gene_correlation(x, x[:4])
    with pytest.raises(ValueError, match="same genes"):
        metrics.r_squared_of_means(x, x[:, :2])
    with pytest.raises(ValueError, match="y must be a finite matrix"):
        metrics.gene_correlation(x, np.full((5, 3), np.inf))
    with pytest.raises(ValueError, match="x must be a finite matrix"):
        metrics.gene_correlation(x[0], x)


@pytest.mark.parametrize("place", range(3))
def test_scores_refuse_an_anndata_at_once(rng, place):
    given = [rng.normal(size=(5, 3)) for _ in range(3)]
    given[place] = AnnData(given[place])
    name = ("predicted", "real", "control")[place]
    with pytest.raises(TypeError, match=rf"{name} is an AnnData.*: give adata\.X or a layer"):
        metrics.perturbation_scores(*given, n=2)


def test_top_de_genes_by_ranks():
    """Against the normal approximation of the rank-sum test with its correction for ties, gene by gene."""
    rng = np.random.default_rng(0)
    mean = rng.uniform(0.5, 3, 40)
    change = np.where(np.arange(40) < 8, 3.0, 1.0)
    change[3] = 0.2  # one goes down
    x, control = rng.poisson(mean * change, (60, 40)), rng.poisson(mean, (50, 40))
    z = []
    for gene in range(40):
        both = np.concatenate([x[:, gene], control[:, gene]])
        ranks = stats.rankdata(both)
        variance = 60 * 50 / 12 * 111 * stats.tiecorrect(ranks)
        z.append(abs(ranks[:60].sum() - 60 * 111 / 2) / np.sqrt(variance))
    wanted = np.argsort(-np.array(z))
    assert metrics.top_de_genes(sparse.csr_matrix(x), control, 8).tolist() == wanted[:8].tolist()
    assert set(wanted[:8]) == set(range(8))


def test_de_overlap_and_scores_by_hand():
    from sccvae.metrics import de_overlap, perturbation_scores, r_squared_of_means, top_de_genes

    rng = np.random.default_rng(1)
    control = rng.normal(size=(30, 20))
    real, predicted = rng.normal(size=(30, 20)), rng.normal(size=(40, 20))
    real[:, :4] += 9
    predicted[:, 2:6] += 9  # finds 2 and 3
    control[:, 19] = real[:, 19] = predicted[:, 19] = 1.0  # constant: never among the top
    assert de_overlap(predicted, real, control, 4) == 0.5
    scores = perturbation_scores(predicted, real, control, 4)
    assert scores["de_overlap"] == 0.5
    assert scores["r2"] == r_squared_of_means(predicted, real)
    np.testing.assert_allclose(scores["r2_top"], r_squared_of_means(predicted[:, :4], real[:, :4]))
    assert 19 not in top_de_genes(real, control, 19)
    for wrong in (0, 21):
        with pytest.raises(ValueError, match=f"n={wrong} be from 1"):
            top_de_genes(real, control, wrong)
    with pytest.raises(ValueError, match="must have the same genes"):
        top_de_genes(real, control[:, 1:])
