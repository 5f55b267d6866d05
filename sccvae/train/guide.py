"""The guide: first labels for a mixture, from a graph clustering (kNN + Leiden) of a latent space."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import igraph
import numpy as np
from scipy import sparse
from scipy.special import entr
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

from sccvae.train.valleys import united

logger = logging.getLogger(__name__)

#: Cells that the graph holds at most; the others stay without a guide and are clustered by the model.
MAX_CELLS = 60_000
#: Resolutions at which so many clusters as wanted are looked for, one after the other, and how many of them where
#: valleys must part these: at finer ones chance makes valleys. The first serves where the number is not known.
RESOLUTIONS, COARSE = tuple(0.7 * 1.25**i for i in range(13)), 7
#: Random orders that are tried at most, and cells of all of them together.
MOST_ORDERS, ORDERS_CELLS = 5, 200_000
#: For blocks: communities for each of them at least, resolutions that have so many, random starts.
PIECES, PARTITIONS, STARTS = 3, 3, 20
#: A cluster of fewer cells than this, or than this share of them, is no component: its cells get no label.
MIN_CELLS, MIN_SHARE = 5, 0.002
#: Values from which on a sparse matrix is not made dense for its principal components (2 GB).
MOST_DENSE = 500_000_000


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


def joint_graph(views: list[np.ndarray]) -> sparse.csr_matrix:
    """The sum of the graphs of several views of the same cells, each (n, d): where one view errs, others may not."""
    return sum((neighbor_graph(z) for z in views[1:]), neighbor_graph(views[0]))


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
    n = min(n, *(side - 1 for side in x.shape))
    own = sparse.issparse(x)  # made dense here: centred in place
    if own and np.prod(x.shape) > MOST_DENSE:
        return PCA(n, svd_solver="arpack", random_state=0).fit_transform(x.astype(np.float32)).astype(np.float32)
    x = np.asarray(x.toarray() if own else x, dtype=np.float32)
    return PCA(n, copy=not own, svd_solver="randomized", random_state=0).fit_transform(x)


class Communities:
    """Leiden communities of a graph at any resolution.

    Parameters
    ----------
    graph
        As from :func:`neighbor_graph`.
    seed
        Of Leiden's random order.
    z
        Coordinates of the cells, (n, d): communities between which their density has no valley are then one cluster.
        Leiden parts what is many into many, however it lies.
    """

    def __init__(self, graph: sparse.csr_matrix, seed: int = 0, z: np.ndarray | None = None) -> None:
        upper = sparse.triu(graph, 1).tocoo()
        self.edges = np.column_stack([upper.row, upper.col])
        self.graph = igraph.Graph(n=graph.shape[0], edges=self.edges)
        self.weights = upper.data
        self.seed = seed
        self.z = z
        self._found: dict[tuple[float, int | None], Guide] = {}
        self._apart: dict[tuple[float, int | None], Guide] = {}

    @classmethod
    def of(cls, views: list[np.ndarray], seed: int = 0, beside: Sequence[np.ndarray] = ()) -> Communities:
        """Of the graph of several views of the cells; valleys are looked for in these and in what lies beside them."""
        z = np.hstack([view / max(view.std(0).max(), 1e-6) for view in (*views, *beside)])
        return cls(joint_graph(views), seed, z)

    def at(self, resolution: float, seed: int | None = None) -> Guide:
        """Communities by modularity (Traag et al. 2019), the largest first; tiny ones get no label."""
        if (resolution, seed) not in self._found:
            self._found[resolution, seed] = self._leiden(resolution, seed)
        return self._found[resolution, seed]

    def apart(self, resolution: float, seed: int | None = None) -> Guide:
        """The same, those united that no valley parts."""
        if (resolution, seed) not in self._apart:
            self._apart[resolution, seed] = self._united(self.at(resolution, seed))
        return self._apart[resolution, seed]

    def _leiden(self, resolution: float, seed: int | None) -> Guide:
        igraph.set_random_number_generator(random.Random(self.seed if seed is None else seed))
        try:
            found = self.graph.community_leiden(
                "modularity", weights=self.weights, resolution=resolution, n_iterations=3
            )
        finally:
            igraph.set_random_number_generator(random)
        return by_size(np.asarray(found.membership))

    def _united(self, guide: Guide, **until: float) -> Guide:
        """With clusters united, the highest valley between them first."""
        if self.z is None:
            return guide
        return by_size(united(guide.labels, self.z, self._links(guide) > 0, **until))

    def _fewer(self, guide: Guide, n_clusters: int) -> Guide:
        """So many, though no valley need part them."""
        return self.merged(self._united(guide, deep=0, n_clusters=n_clusters), n_clusters)

    def _links(self, guide: Guide) -> np.ndarray:
        """Weight of all edges between each two clusters, (K, K) symmetric."""
        ends = guide.labels[self.edges]
        inside = (ends >= 0).all(1)
        links = np.zeros((guide.n_clusters, guide.n_clusters))
        np.add.at(links, tuple(ends[inside].T), self.weights[inside])
        return links + links.T

    @property
    def _orders(self) -> range:
        """Seeds of the random orders that are tried."""
        n = int(np.clip(ORDERS_CELLS // self.graph.vcount(), 1, MOST_ORDERS))
        return range(self.seed, self.seed + n)

    def separate(self) -> Guide:
        """As many clusters as valleys part; of several random orders, those that the others agree with most."""
        guides = [self.apart(RESOLUTIONS[0], seed) for seed in self._orders]
        logger.info("Clusters that valleys part, in several random orders: %s", [guide.n_clusters for guide in guides])
        return medoid(guides, guides)

    def with_clusters(self, n_clusters: int, like: Guide | None = None) -> Guide:
        """So many clusters: of those that valleys part, at a resolution that has enough of them, the closest merged.

        If valleys do not part so many: of the communities, those united that valleys part least. Another random order
        may find others: of several, those most like a guide; or else most like the other ones.
        """
        for find, resolutions, fewer in (
            (self.apart, RESOLUTIONS[:COARSE], self.merged),
            (self.at, RESOLUTIONS, self._fewer),
        ):
            guides, start = [], 0
            for seed in self._orders:
                tried = ((i, find(resolutions[i], seed)) for i in range(start, len(resolutions)))
                i, guide = next((each for each in tried if each[1].n_clusters >= n_clusters), (0, None))
                if guide is not None:
                    guides.append(fewer(guide, n_clusters))
                elif not guides:  # nor would other orders
                    break
                if len(guides) == 1:  # another order needs much the same resolution
                    start = max(i - 1, 0)
            if guides:
                return medoid(guides, guides if like is None else [like])
        return find(resolutions[-1], self.seed)  # the cells do not fall into so many

    def even(self, n_clusters: int) -> Guide | None:
        """So many clusters of much the same size, or None if the cells do not fall into so many.

        Of communities at several resolutions and in several orders, the closest merged, those of highest modularity.
        """
        found = (self.at(resolution, seed) for seed in self._orders for resolution in RESOLUTIONS[:COARSE])
        guides = (self.merged(guide, n_clusters) for guide in found)
        return max((g for g in guides if g.n_clusters == n_clusters), key=self._modularity, default=None)

    def _modularity(self, guide: Guide) -> float:
        """Newman and Girvan 2004; cells without a cluster are one of their own."""
        labels = np.where(guide.labels < 0, guide.n_clusters, guide.labels)
        return self.graph.modularity(labels, weights=self.weights)

    def blocks(self, n_clusters: int, like: Guide | None = None) -> Guide | None:
        """So many clusters, rather of even sizes too, or None if the cells do not fall into so many.

        Fine communities are grouped as a block model has it (:func:`grouped`): as each edge counts, it parts what is
        many where valleys would not. Of several resolutions and random orders the guide most like another guide; or
        else most like the other ones.
        """
        guides = []
        for seed in self._orders:
            fine = (self.at(resolution, seed) for resolution in RESOLUTIONS)
            enough = list(islice((guide for guide in fine if guide.n_clusters >= PIECES * n_clusters), PARTITIONS))
            for pieces in enough or [self.at(RESOLUTIONS[-1], seed)]:
                if pieces.n_clusters >= n_clusters:
                    group = grouped(self._links(pieces), n_clusters, self.seed)
                    guides.append(by_size(np.where(pieces.labels >= 0, group[pieces.labels], -1)))
        return medoid(guides, guides if like is None else [like]) if guides else None

    def merged(self, guide: Guide, n_clusters: int) -> Guide:
        """Merge the two clusters with most links, against what chance would link, until so many are left."""
        n = guide.n_clusters
        if n <= n_clusters:
            return guide
        links = self._links(guide)
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


def grouped(links: np.ndarray, n_groups: int, seed: int = 0) -> np.ndarray:
    """Group the nodes of a small graph so that the group at one end of an edge tells most about that at the other.

    This mutual information is, for each edge, the log-likelihood of a degree-corrected block model with its best
    parameters. Nodes move to the group that raises it most until none does, from several random starts.

    Parameters
    ----------
    links
        Weights between each two nodes, within one on the diagonal, (n, n) symmetric.
    n_groups
        How many, none empty; ``n`` at most.
    seed
        Of the starts.

    Returns
    -------
    Group of each node, (n,) int64.

    References
    ----------
    Karrer and Newman 2011, Stochastic blockmodels and community structure in networks, Physical Review E 83.
    """
    links = links / links.sum()
    degree = links.sum(1)
    rng = np.random.default_rng(seed)
    best, most = np.zeros(len(links), dtype=np.int64), -np.inf
    for _ in range(STARTS):
        group, moved = rng.permutation(np.arange(len(links)) % n_groups), True
        while moved:
            moved = False
            for node in rng.permutation(len(links)):
                if (group == group[node]).sum() == 1:
                    continue
                one_hot = np.eye(n_groups)[group]
                one_hot[node] = 0
                joint, to = one_hot.T @ links @ one_hot, links[node] @ one_hot
                own, margin = joint.diagonal(), joint.sum(1) + to
                # What the node brings to each group: to its row and column, but the diagonal once, and to the margins.
                gain = 2 * (entr(joint) - entr(joint + to)).sum(1)
                gain += 2 * entr(own + to) - entr(own) - entr(own + 2 * to + links[node, node])
                gain += 2 * (entr(margin + degree[node]) - entr(margin))
                if gain.max() > gain[group[node]] + 1e-12:
                    group[node], moved = gain.argmax(), True
        one_hot = np.eye(n_groups)[group]
        joint = one_hot.T @ links @ one_hot
        told = 2 * entr(joint.sum(1)).sum() - entr(joint).sum()
        if told > most:
            best, most = group, told
    return best


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
