"""Classes from a few labels: spread, named clusters, the core."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from test_guide import SIZES, make_blobs

from sccvae.train.few_labels import classes_from_few, core, mean_recall, named_after, spread
from sccvae.train.guide import neighbor_graph
from sccvae.train.passes import some_of_each


@pytest.fixture(scope="module")
def blobs():
    z, labels = make_blobs()
    return neighbor_graph(z), labels


def test_spread_fills_the_components_of_the_graph(blobs):
    graph, labels = blobs
    known = np.full(len(labels), -1)
    for blob, new in [(0, 1), (2, 0), (4, 2)]:
        known[np.flatnonzero(labels == blob)[0]] = new
    heat = spread(graph, known, 3)
    assert heat.shape == (len(labels), 3)
    for blob, new in [(0, 1), (2, 0), (4, 2)]:
        np.testing.assert_allclose(heat[labels == blob], np.eye(3)[[new]].repeat(SIZES[blob], 0), atol=1e-12)
    assert (heat[(labels == 1) | (labels == 3)] == 0).all()  # nothing leads there


def test_known_labels_stay_and_rows_sum_to_one():
    z = np.random.default_rng(0).normal(size=(80, 2))
    graph = neighbor_graph(z)
    known = np.full(80, -1)
    known[:10] = np.arange(10) % 3
    heat = spread(graph, known, 4)
    assert (heat[:10] == np.eye(4)[known[:10]]).all()
    np.testing.assert_allclose(heat.sum(1), 1)
    assert (heat[:, 3] == 0).all()  # no cell has that label
    assert heat.min() >= 0


def test_spread_along_a_chain():
    """Labels at both ends: every cell of the path takes the nearer one."""
    n = 9
    path = sparse.diags([np.ones(n - 1), np.ones(n - 1)], [-1, 1]).tocsr()
    known = np.full(n, -1)
    known[0], known[-1] = 0, 1
    heat = spread(path, known, 2)
    assert (heat[: n // 2].argmax(1) == 0).all()
    assert (heat[n // 2 + 1 :].argmax(1) == 1).all()
    np.testing.assert_allclose(heat[n // 2], 0.5)
    np.testing.assert_allclose(heat, heat[::-1, ::-1])


def test_core_leaves_out_what_lies_between():
    z, labels = make_blobs([60, 60], distance=2.0)
    graph = neighbor_graph(z)
    found = core(graph, labels, 2)
    votes = np.stack([graph @ (labels == k) for k in range(2)], 1)
    share = votes[np.arange(120), labels] / votes.sum(1)
    assert (found == np.where(share >= 0.8, labels, -1)).all()
    assert 0 < (found < 0).sum() < 60
    assert (core(graph, labels, 2, agreement=0.0) == labels).all()


def test_core_keeps_separate_clusters_and_gives_no_new_labels(blobs):
    graph, labels = blobs
    some = np.where(np.arange(len(labels)) % 10 == 0, -1, labels)
    found = core(graph, some, 5, agreement=0.5)
    assert (found[some < 0] == -1).all()
    assert (found[some >= 0] == some[some >= 0]).mean() > 0.95


def test_core_leaves_no_cluster_without_a_label():
    z, labels = make_blobs([60, 60])
    labels[::7] = 2  # scattered: no neighbours agree
    found = core(neighbor_graph(z), labels, 3)
    assert (found[labels == 2] == 2).all()


# Which way


def some_labels(labels, per_class, seed=0):
    rng = np.random.default_rng(seed)
    known = np.full(len(labels), -1)
    for k in np.unique(labels):
        cells = rng.choice(np.flatnonzero(labels == k), per_class, replace=False)
        known[cells] = k
    return known


def test_clusters_are_named_after_most_of_their_known_cells():
    clusters = np.array([0, 0, 0, 1, 1, 2, -1])
    known = np.array([1, 1, 0, -1, 0, -1, 1])
    assert named_after(clusters, known, 2).tolist() == [1, 1, 1, 0, 0, -1, -1]


@pytest.mark.parametrize("per_class", [1, 2, 10])
def test_classes_of_blobs_from_few(blobs, per_class):
    graph, labels = blobs
    found, recall = classes_from_few(graph, some_labels(labels, per_class), len(SIZES))
    assert (found == labels).all()
    assert recall == (per_class > 1)  # a single label cannot be held back


def test_few_labels_name_clusters_where_spreading_errs(monkeypatch):
    """Where spreading finds nothing, the clusters are taken."""
    z, labels = make_blobs([300, 300], distance=4.0)
    graph = neighbor_graph(z)
    known = some_labels(labels, 5)
    used = []
    monkeypatch.setattr("sccvae.train.few_labels.spread", lambda *args, **options: used.append(1) or np.zeros((600, 2)))
    found, _ = classes_from_few(graph, known, 2)
    assert used
    assert (found == labels).mean() > 0.97


def test_a_class_without_a_cluster_is_not_lost():
    """Three classes in two clusters: named clusters would know two of them."""
    z, labels = make_blobs([200, 200])
    classes = np.where((labels == 1) & (z[:, 0] > np.median(z[labels == 1, 0])), 2, labels)
    found, _ = classes_from_few(neighbor_graph(z), some_labels(classes, 20), 3)
    assert set(found) == {0, 1, 2}
    assert (found == classes).mean() > 0.75


def test_held_back_labels_choose_the_best_way(caplog):
    z, labels = make_blobs([60, 60])
    with caplog.at_level("INFO", "sccvae.train.few_labels"):
        classes_from_few(neighbor_graph(z), some_labels(labels, 6), 2)
    assert "recall of held-back labels: {'spread 0.9': 1.0, 'spread 0.99': 1.0, 'named clusters': 1.0}" in caplog.text


def test_recall_counts_small_classes_as_much():
    classes, found = np.array([0] * 98 + [1, 1]), np.array([0] * 98 + [1, -1])
    assert mean_recall(classes, found) == 0.75


def test_a_draw_has_cells_of_each_class():
    rows = np.arange(1_000) * 3
    classes = np.repeat([0, 1, 2], [990, 7, 3])
    some = some_of_each(rows, classes, 100, 0, each=5)
    assert len(some) == len(np.unique(some)) == 100
    assert (np.diff(some) > 0).all()
    assert np.bincount(classes[some // 3]).tolist()[2] == 3
    assert np.bincount(classes[some // 3]).tolist()[1] >= 5
    assert np.array_equal(some_of_each(rows, classes, 1_000, 0), rows)
    assert set(classes[some_of_each(rows, classes, 4, 0) // 3]) == {0, 1, 2}
