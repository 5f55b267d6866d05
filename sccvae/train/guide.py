"""The guide: first labels for a mixture, from a graph clustering (kNN + Leiden) of a latent space."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

import igraph
import numpy as np
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

logger = logging.getLogger(__name__)

#: Cells that the graph holds at most; the others stay without a guide and are clustered by the model.
MAX_CELLS = 60_000
#: Resolutions searched for a number of clusters, and trials of the search.
RESOLUTIONS, TRIALS = (0.005, 10.0), 14
#: Another random order is searched about the resolution found, so far on a logarithmic scale, and fewer times.
NEAR, NEAR_TRIALS = 0.25, 3
#: Random orders that are tried at most, and cells of all of them together.
MOST_ORDERS, ORDERS_CELLS = 10, 100_000
#: A cluster of fewer cells than this, or than this share of them, is no component: its cells get no label.
MIN_CELLS, MIN_SHARE = 5, 0.002


@dataclass
class Guide:
    """Labels for cells, some without.

    Attributes
    ----------
    labels
        Cluster of each cell, (n,) int64; -1 for none.
    n_clusters
        Number of clusters.
    recall
        Of held-back labels, mean over classes, where labels were spread; else NaN.
    """

    labels: np.ndarray
    n_clusters: int
    recall: float = float("nan")


def neighbor_graph(z: np.ndarray, n_neighbors: int = 15) -> sparse.csr_matrix:
    """Nearest-neighbour graph, an edge weighing the share of neighbours that its ends have in common (Jaccard).

    Parameters
    ----------
    z
        Coordinates, (n, d).
    n_neighbors
        Neighbours of each cell besides itself.

    Returns
    -------
    Symmetric (n, n) CSR of weights in (0, 1], without a diagonal.

    References
    ----------
    Levine et al. 2015, PhenoGraph, Cell 162.
    """
    k = min(n_neighbors, len(z) - 1) + 1
    nearest = NearestNeighbors(n_neighbors=k).fit(z).kneighbors_graph(z).tocsr()
    shared = (nearest @ nearest.T).multiply(nearest).tocsr()
    shared.data = shared.data / (2 * k - shared.data)
    shared.setdiag(0)
    shared.eliminate_zeros()
    return shared.maximum(shared.T).tocsr()


def principal_components(x: np.ndarray | sparse.spmatrix, library: np.ndarray | None, n: int = 50) -> np.ndarray:
    """Principal components, of log-normalised counts if ``library`` is given: a second view of the cells.

    Parameters
    ----------
    x
        Values, (n, G).
    library
        Library sizes, (n, 1), or None for values that are no counts.
    n
        Most components.

    Returns
    -------
    (n, components) float32.
    """
    if library is not None:
        scale = np.median(library) / library
        x = x.multiply(scale).tocsr() if sparse.issparse(x) else x * scale
        x = x.log1p() if sparse.issparse(x) else np.log1p(x)
    x = x.toarray() if sparse.issparse(x) else x
    n = min(n, *(side - 1 for side in x.shape))
    return PCA(n, svd_solver="randomized", random_state=0).fit_transform(np.asarray(x, dtype=np.float32))


class Communities:
    """Leiden communities of a graph at any resolution.

    Parameters
    ----------
    graph
        As from :func:`neighbor_graph`.
    seed
        Of Leiden's random order.
    """

    def __init__(self, graph: sparse.csr_matrix, seed: int = 0) -> None:
        upper = sparse.triu(graph, 1).tocoo()
        self.graph = igraph.Graph(n=graph.shape[0], edges=np.column_stack([upper.row, upper.col]))
        self.weights = upper.data
        self.seed = seed
        self._found: dict[tuple[float, int | None], Guide] = {}

    def at(self, resolution: float, seed: int | None = None) -> Guide:
        """Communities by modularity (Traag et al. 2019), the largest first; tiny ones get no label."""
        if (resolution, seed) not in self._found:
            self._found[resolution, seed] = self._leiden(resolution, seed)
        return self._found[resolution, seed]

    def _leiden(self, resolution: float, seed: int | None) -> Guide:
        igraph.set_random_number_generator(random.Random(self.seed if seed is None else seed))
        try:
            found = self.graph.community_leiden(
                "modularity", weights=self.weights, resolution=resolution, n_iterations=3
            )
        finally:
            igraph.set_random_number_generator(random)
        return by_size(np.asarray(found.membership))

    def with_clusters(self, n_clusters: int, like: Guide | None = None) -> Guide:
        """Communities at a resolution that gives ``n_clusters`` of them; else the next more, the closest merged.

        Another random order may find others: of several, those most like a guide; or else most like the other ones.
        """
        orders = int(np.clip(ORDERS_CELLS // self.graph.vcount(), 1, MOST_ORDERS))
        at, found = self._search(n_clusters, None, np.log(0.5), *np.log(RESOLUTIONS), TRIALS)
        guides = [found]
        for seed in range(self.seed + 1, self.seed + orders):
            near = (at - NEAR, at + NEAR)  # another order needs much the same resolution
            guides.append(self._search(n_clusters, seed, at, *near, NEAR_TRIALS)[1])
        guides = [guide for guide in guides if guide.n_clusters == found.n_clusters]
        return medoid(guides, guides if like is None else [like])

    def _search(
        self, n_clusters: int, seed: int | None, at: float, low: float, high: float, trials: int
    ) -> tuple[float, Guide]:
        """Halve an interval of log-resolutions, begun ``at`` one: the last looked at that serves, and its guide."""
        best = None
        for _ in range(trials):
            guide = self.at(float(np.exp(at)), seed)
            if guide.n_clusters >= n_clusters:
                high = at
                if best is None or guide.n_clusters < best[1].n_clusters:
                    best = at, guide
                if guide.n_clusters == n_clusters:
                    return best
            else:
                low = at
            at = (low + high) / 2
        if best is None:
            return at, guide  # the cells do not fall into that many
        return best[0], self.merged(best[1], n_clusters)

    def stable(self, resolutions: tuple[float, ...] = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)) -> Guide:
        """Communities at the resolution where other random orders find the same ones; among equals the finest.

        None is above 1, where most tools begin: finer ones are as stable at times (zheng: 14 clusters of 10 types).
        """
        found = []
        for resolution in resolutions:
            guides = [self.at(resolution, self.seed + i) for i in range(3)]
            agreement = np.mean([adjusted_rand_score(guides[0].labels, g.labels) for g in guides[1:]])
            found.append((agreement, guides[0]))
            logger.info("resolution %g: %d clusters, stability %.3f", resolution, guides[0].n_clusters, agreement)
        best = max(agreement for agreement, _ in found)
        return max(
            (guide for agreement, guide in found if agreement >= best - 0.02), key=lambda guide: guide.n_clusters
        )

    def merged(self, guide: Guide, n_clusters: int) -> Guide:
        """Merge the two clusters with most links, against what chance would link, until so many are left."""
        n = guide.n_clusters
        if n <= n_clusters:
            return guide
        ends = guide.labels[np.asarray(self.graph.get_edgelist())]
        inside = (ends >= 0).all(1)
        links = np.zeros((n, n))
        np.add.at(links, tuple(ends[inside].T), np.asarray(self.weights)[inside])
        links += links.T
        group = np.arange(n)
        while len(links) > n_clusters:
            degree = links.sum(1) + 1e-9
            against_chance = links / np.outer(degree, degree)
            np.fill_diagonal(against_chance, -1)
            i, j = sorted(np.unravel_index(against_chance.argmax(), links.shape))
            links[i] += links[j]
            links[:, i] += links[:, j]
            links = np.delete(np.delete(links, j, 0), j, 1)
            group = np.where(group == j, i, np.where(group > j, group - 1, group))
        return by_size(np.where(guide.labels >= 0, group[guide.labels], -1))


def medoid(guides: list[Guide], others: list[Guide]) -> Guide:
    """The guide that others agree with most (adjusted Rand index), the first of equals.

    Parameters
    ----------
    guides, others
        Of the same cells, one or more.

    Returns
    -------
    One of ``guides``.
    """
    agreement = [[adjusted_rand_score(a.labels, b.labels) for b in others] for a in guides]
    return guides[int(np.sum(agreement, axis=1).argmax())]


def by_size(labels: np.ndarray) -> Guide:
    """Number clusters from the largest on; tiny ones, and what had a negative label, get -1.

    Parameters
    ----------
    labels
        Any whole numbers, (n,).

    Returns
    -------
    A guide.
    """
    names, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    keep = (names >= 0) & (counts >= max(MIN_CELLS, MIN_SHARE * len(labels)))
    if not keep.any():
        keep = names >= 0
    order = np.argsort(-np.where(keep, counts, -1), kind="stable")
    rank = np.full(len(names), -1)
    rank[order[: keep.sum()]] = np.arange(keep.sum())
    return Guide(rank[inverse].astype(np.int64), int(keep.sum()))
