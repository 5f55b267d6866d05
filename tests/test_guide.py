"""The guide: neighbour graph, communities, and labels that spread along the graph."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import entropy
from sklearn.metrics import adjusted_rand_score

from sccvae.train.guide import (
    COARSE,
    RESOLUTIONS,
    Communities,
    Guide,
    by_size,
    grouped,
    medoid,
    neighbor_graph,
    principal_components,
)
from sccvae.train.mixture import _guide

SIZES = [60, 50, 40, 30, 20]


def make_blobs(sizes=SIZES, distance=20.0, seed=0):
    """Normal blobs at the corners of a simplex, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return distance * np.eye(len(sizes))[labels] + rng.normal(size=(len(labels), len(sizes))), labels


@pytest.fixture(scope="module")
def blobs():
    z, labels = make_blobs()
    return neighbor_graph(z), labels


# The graph


@pytest.mark.parametrize(("n", "k"), [(40, 5), (40, 15), (6, 15)])
def test_neighbor_graph_is_that_by_brute_force(n, k):
    z = np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32)
    graph = neighbor_graph(z, k)
    assert graph.format == "csr"
    distance = ((z[:, None] - z[None]) ** 2).sum(-1)
    near = [set(np.argsort(row)[: min(k, n - 1) + 1].tolist()) for row in distance]
    wanted = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j and (j in near[i] or i in near[j]):
                wanted[i, j] = len(near[i] & near[j]) / len(near[i] | near[j])
    np.testing.assert_allclose(graph.toarray(), wanted, rtol=1e-12)
    assert (graph != graph.T).nnz == 0
    assert (graph.diagonal() == 0).all()
    assert graph.data.min() > 0
    assert graph.data.max() <= 1


def test_neighbor_graph_of_few_points():
    assert neighbor_graph(np.zeros((1, 2))).nnz == 0
    assert neighbor_graph(np.array([[0.0], [1.0]])).toarray().tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("counts", [True, False])
def test_principal_components_and_what_they_are_of_is_left_alone(counts, monkeypatch):
    x = np.random.default_rng(0).poisson(0.5, (60, 20)).astype(np.float32)
    library = x.sum(1, keepdims=True) + 1 if counts else None
    y = np.log1p(x * (np.median(library) / library)) if counts else x
    u, s, _ = np.linalg.svd(y - y.mean(0), full_matrices=False)
    rows, dense = sparse.csr_matrix(x), x.copy()
    for given, most in ((rows, np.inf), (dense, np.inf), (rows, 0)):  # too many to be made dense
        monkeypatch.setattr("sccvae.train.guide.MOST_DENSE", most)
        z = principal_components(given, library, 5)
        assert z.dtype == np.float32
        np.testing.assert_allclose(np.abs(z), np.abs(u * s)[:, :5], atol=0.05)
    assert (dense == x).all()
    assert (rows.toarray() == x).all()


# Communities


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_communities_are_merged_to_the_wanted_number(blobs, k):
    """Whole blobs only: fewer clusters than blobs join them, as no resolution can where no edge runs between."""
    graph, labels = blobs
    guide = Communities(graph).with_clusters(k)
    assert guide.n_clusters == k
    assert guide.labels.dtype == np.int64
    assert set(guide.labels) == set(range(k))
    for blob in range(5):
        assert len(set(guide.labels[labels == blob])) == 1
    if k == 5:
        assert (guide.labels == labels).all()  # numbered by size


@pytest.mark.parametrize("k", [7, 9])
def test_more_clusters_than_blobs(blobs, k):
    graph, labels = blobs
    guide = Communities(graph).with_clusters(k)
    assert guide.n_clusters == k
    for cluster in range(k):
        assert len(set(labels[guide.labels == cluster])) == 1


def test_merging_joins_what_hangs_together():
    """Two pairs of blobs that touch, far from each other: four clusters become those two pairs."""
    z, labels = make_blobs([50, 50, 50, 50], distance=3.5)
    z[labels >= 2] += 100
    guide = Communities(neighbor_graph(z)).with_clusters(4)
    assert adjusted_rand_score(labels, guide.labels) > 0.9
    merged = Communities(neighbor_graph(z)).merged(guide, 2)
    assert merged.n_clusters == 2
    assert adjusted_rand_score(labels >= 2, merged.labels) == 1


def test_fewer_clusters_than_wanted_where_there_are_no_more(blobs):
    guide = Communities(blobs[0]).with_clusters(100)  # of 200 cells: a cluster has at least five
    assert 5 < guide.n_clusters <= 40


@pytest.mark.parametrize("sizes", [SIZES, [40] * 6, [30] * 8, [900, 20, 20], [600]])
def test_the_number_of_blobs_is_found(sizes):
    """Leiden alone parts the large ones."""
    z, labels = make_blobs(sizes)
    guide = Communities(neighbor_graph(z), z=z).separate()
    assert guide.n_clusters == len(sizes)
    assert adjusted_rand_score(labels, guide.labels) == 1
    if sizes[0] > 100:
        assert Communities(neighbor_graph(z)).separate().n_clusters > len(sizes)


def test_one_normal_is_one_cluster():
    """Of few cells valleys are seen by chance."""
    for n, most in [(100, 2), (500, 1), (2000, 1)]:
        z = np.random.default_rng(n).normal(size=(n, 10))
        assert 1 <= Communities(neighbor_graph(z), z=z).separate().n_clusters <= most


def test_so_many_clusters_that_valleys_part():
    """At the resolution that gives three communities Leiden parts the large blob and joins the small ones."""
    z, labels = make_blobs([900, 40, 40], distance=7)
    graph = neighbor_graph(z)
    plain, guide = Communities(graph).with_clusters(3), Communities(graph, z=z).with_clusters(3)
    assert plain.n_clusters == guide.n_clusters == 3
    assert adjusted_rand_score(labels, guide.labels) > 0.99
    assert Communities(graph, z=z).with_clusters(6).n_clusters == 6  # more than valleys part


def test_united_communities_come_by_size():
    z, labels = make_blobs([200, 900], distance=9)
    guide = Communities(neighbor_graph(z), z=z).apart(2.0)
    assert guide.n_clusters == 2
    assert np.mean(guide.labels == 1 - labels) > 0.99


def modularity_of(graph):
    """Newman and Girvan 2004: the share of links within clusters, less what chance gives."""
    degree = np.asarray(graph.sum(1)).ravel() / graph.sum()

    def modularity(labels):
        same = labels[:, None] == labels
        return (graph.toarray() / graph.sum() - np.outer(degree, degree))[same].sum()

    return modularity


def test_even_ones_have_the_highest_modularity(monkeypatch):
    graph = neighbor_graph(np.random.default_rng(0).normal(size=(200, 2)))
    communities = Communities(graph, 3)
    monkeypatch.setattr("sccvae.train.guide.MOST_ORDERS", 2)
    found = communities.even(3)
    assert found.n_clusters == 3
    modularity = modularity_of(graph)
    for resolution in RESOLUTIONS[:COARSE]:
        for seed in (3, 4):
            other = communities.merged(communities.at(resolution, seed), 3)
            if other.n_clusters == 3:
                assert modularity(found.labels) >= modularity(other.labels) - 1e-9
    assert communities.even(200) is None


def told(links, group):
    """What the groups at the two ends of an edge tell of each other, in nats."""
    one_hot = np.eye(group.max() + 1)[group]
    joint = one_hot.T @ links @ one_hot
    return entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.ravel())  # it makes each sum to 1


@pytest.mark.parametrize("n_groups", [2, 3])
def test_groups_tell_most_of_all_partitions(n_groups):
    links = np.random.default_rng(n_groups).random((8, 8)) ** 4
    links = links + links.T
    group = grouped(links, n_groups, seed=1)
    assert len(np.unique(group)) == n_groups
    others = (np.array(g) for g in itertools.product(range(n_groups), repeat=8) if len(set(g)) == n_groups)
    assert max(told(links, other) for other in others) <= told(links, group) + 1e-12


def test_as_many_groups_as_nodes():
    links = np.ones((3, 3)) + np.eye(3)
    assert set(grouped(links, 3)) == {0, 1, 2}


@pytest.fixture(scope="module")
def many_and_few():
    """Eight hundred cells along a bar and a hundred in a square far from it."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.uniform(0, (8, 1), (800, 2)), rng.uniform((20, 0), (21, 1), (100, 2))])


def with_the_few(labels):
    """How many cells are of the cluster that most of the few are of."""
    return (labels == np.bincount(labels[800:] + 1).argmax() - 1).sum()


def test_blocks_part_what_is_many(many_and_few):
    communities = Communities(neighbor_graph(many_and_few), 3)
    found = communities.blocks(2)
    assert found.n_clusters == 2
    assert 300 < with_the_few(found.labels) < 600
    assert communities.blocks(2, like=found).n_clusters == 2
    assert communities.blocks(200) is None


@pytest.mark.parametrize("even", [True, False])
def test_blocks_guide_classes_of_even_sizes(many_and_few, even):
    module = SimpleNamespace(n_components=2)
    none = np.full(900, -1)
    few = with_the_few(_guide([many_and_few], none, None, module, False, 0, even=even).labels)
    assert 300 < few < 600 if even else few == 100
    module.n_components = 6  # more than valleys part
    found = _guide([many_and_few], none, None, module, False, 0, even=even)
    assert (found.labels == Communities.of([many_and_few], 0).with_clusters(6).labels).all()


def test_blocks_find_blobs(blobs):
    graph, labels = blobs
    found = Communities(graph).blocks(len(SIZES))
    got = found.labels >= 0
    assert got.mean() > 0.95  # not those of tiny pieces
    assert adjusted_rand_score(labels[got], found.labels[got]) == 1


def test_same_seed_same_communities_and_random_state_left_alone(blobs):
    z = np.random.default_rng(0).normal(size=(150, 3))
    graph = neighbor_graph(z)
    random.seed(1)
    state = random.getstate()
    a, b = (Communities(graph, seed=3).at(1.0).labels for _ in range(2))
    assert (a == b).all()
    assert random.getstate() == state


def test_higher_resolution_more_communities():
    graph = neighbor_graph(np.random.default_rng(0).normal(size=(300, 2)))
    numbers = [Communities(graph).at(r).n_clusters for r in (0.05, 1.0, 5.0)]
    assert numbers[0] < numbers[1] < numbers[2]


def test_of_several_orders_the_one_that_most_agree_with(blobs, monkeypatch):
    odd, usual = Guide(np.repeat([0, 1], 100), 2), Guide(np.tile([0, 1], 100), 2)
    nearly = Guide(np.where(np.arange(200) == 7, 0, usual.labels), 2)
    few = Guide(np.zeros(200, int), 1)  # an order without so many clusters does not count
    guides = [odd, nearly, usual, usual]
    assert medoid(guides, guides) is usual
    assert medoid(guides, [nearly]) is nearly
    assert medoid([odd], [odd]) is odd

    def at(self, resolution, seed):
        if resolution == 0.7:  # too coarse
            return few
        return {4: odd, 6: few}.get(seed, usual)

    monkeypatch.setattr(Communities, "at", at)
    assert Communities(blobs[0], seed=4).with_clusters(2) is usual
    assert Communities(blobs[0], seed=4).with_clusters(2, like=odd) is odd
    assert Communities(blobs[0], seed=4).with_clusters(2, like=few) is odd  # all agree with it alike: the first
    monkeypatch.setattr("sccvae.train.guide.ORDERS_CELLS", 200)  # one order where there are many cells
    assert Communities(blobs[0], seed=4).with_clusters(2) is odd


def test_the_first_resolution_with_enough_clusters_is_taken(blobs, monkeypatch):
    """Of clusters that valleys part, or else of communities; what is too many is merged."""
    asked = []

    def find(name, most):
        def at(self, resolution, seed):
            asked.append((name, round(resolution, 2)))
            n = min(most, int(4 * resolution))
            return by_size(np.arange(200) % n)

        return at

    monkeypatch.setattr(Communities, "apart", find("apart", 6))
    monkeypatch.setattr(Communities, "at", find("at", 9))
    monkeypatch.setattr("sccvae.train.guide.MOST_ORDERS", 2)
    assert Communities(blobs[0]).with_clusters(6).n_clusters == 6
    assert asked[5:] == [("apart", 1.37), ("apart", 1.71)]  # another order begins one before
    asked.clear()
    monkeypatch.setattr("sccvae.train.guide.MOST_ORDERS", 1)
    assert Communities(blobs[0]).with_clusters(3).n_clusters == 3
    assert asked == [("apart", 0.7), ("apart", 0.88)]
    asked.clear()
    assert Communities(blobs[0]).with_clusters(6).n_clusters == 6
    assert asked == [("apart", 0.7), ("apart", 0.88), ("apart", 1.09), ("apart", 1.37), ("apart", 1.71)]
    asked.clear()
    assert Communities(blobs[0]).with_clusters(8).n_clusters == 8
    assert asked[-1] == ("at", 2.14)
    assert asked[6:9] == [("apart", 2.67), ("at", 0.7), ("at", 0.88)]
    assert Communities(blobs[0]).with_clusters(30).n_clusters == 9  # there are no more


# Sizes


def test_by_size():
    labels = np.array([7] * 6 + [3] * 10 + [9] * 4 + [-1] * 5 + [5] * 6)
    guide = by_size(labels)
    assert guide.n_clusters == 3
    assert guide.labels.dtype == np.int64
    wanted = {3: 0, 5: 1, 7: 2, 9: -1, -1: -1}  # 9 is too small; equals keep their order
    assert guide.labels.tolist() == [wanted[k] for k in labels]


def test_by_size_keeps_small_clusters_where_there_are_no_others():
    guide = by_size(np.array([4, 4, 2, -1]))
    assert guide.labels.tolist() == [0, 0, 1, -1]
    assert guide.n_clusters == 2
    nothing = by_size(np.array([-1, -1]))
    assert nothing.labels.tolist() == [-1, -1]
    assert nothing.n_clusters == 0


def test_by_size_of_many_cells_leaves_out_a_small_share():
    labels = np.repeat([0, 1], [9990, 10])  # 0.1 %
    assert by_size(labels).n_clusters == 1
    assert by_size(np.repeat([0, 1], [9970, 30])).n_clusters == 2


def test_resolutions_that_were_tried_are_remembered(blobs):
    tried = Communities(blobs[0])
    for n in (8, 5, 7, 5, 6):
        assert tried.with_clusters(n).n_clusters == n
    n_tried = len(tried._found)
    tried.with_clusters(7)
    assert len(tried._found) == n_tried
