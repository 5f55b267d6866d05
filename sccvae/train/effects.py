"""What each batch does to each gene, and which cells of the batches are of a kind, before anything is learned."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, svds
from scipy.spatial.distance import pdist
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors

from sccvae.data import CellStore
from sccvae.nn import CellKinds

#: Cells that are looked at, of each batch its share at random.
MOST_CELLS = 5_000
#: Kinds of cells at most, and cells for each at least; principal components that they are found in, and how often: the
#: first time from cells without what neighbours differ by, then without the effects found so far.
KINDS, CELLS_A_KIND, N_COMPONENTS, ROUNDS = 10, 30, 30, 3
#: Neighbours of a cell in another batch, and largest batches that each batch is compared with.
NEIGHBORS, MOST_BATCHES = 20, 10
#: Where cells are moved one by one, neighbours are at most this share of a batch, and three: a small batch has few of a
#: kind. And how often they are moved.
NEIGHBOR_SHARE, FEWEST_NEIGHBORS, MOVES = 0.05, 3, 3
#: Cells may be of one sort if they lie no farther apart than this share of the distance between kinds (median), and
#: than so many times the nearest of the other batch: a type that a treatment changes is nearer to itself than types are
#: to each other, and of what a batch lacks the nearest there is far off.
CLOSE, CLOSEST = 0.7, 2.0
#: Cells around one among which others are looked for; landmarks in a batch at most, and cells for each at least.
NEAREST, LANDMARKS, CELLS_A_LANDMARK = 30, 64, 8
#: Weight of "no effect" against a gene's counts in a batch, as a share of its counts in the average batch: what is rare
#: in a batch, or what only a kind has that the batch has not, says little.
PRIOR = 1 / 400
#: Sweeps of the fit; after ten it moves by less than 1 %.
SWEEPS = 30
#: Shuffles of the batches that tell how alike the shares of kinds would be by chance.
SHUFFLES = 3


def batch_effects(
    store: CellStore, n_batch: int, *, with_kinds: bool = True, depth: float | None = None
) -> tuple[np.ndarray, CellKinds | None]:
    """Log factor by which each batch multiplies each gene, and the kinds of cells.

    Means of batches alone would take a kind of cell that one batch has more of for an effect on the genes of that kind.
    So kinds are found first: by k-means in principal components, after the mean difference of mutual nearest neighbours
    was taken out. The counts of a gene are then a product, Poisson(library size x a factor of the kind x a factor of
    the batch), fitted by its margins (iterative proportional fitting). A kind of a single batch says nothing about it.

    A treatment that changes one type of cell more than the others still parts that type. The kinds that are returned
    are found once more, after each cell was moved by what the mutual nearest neighbours around it differ by, as far as
    they can be of one sort: of types that only one of two batches has, some are nearest to each other, too. Where only
    one batch has cells then, others have none of that sort, whatever their kind: such cells weigh less.

    Parameters
    ----------
    store
        The cells; the batch is their first condition.
    n_batch
        Number of batches.
    with_kinds
        Whether the kinds are wanted.
    depth
        Library size at which cells are compared, that at which the encoder sees them; None for the median.

    Returns
    -------
    (n_batch, G) float32: over all counts a gene's factors have the mean one; a batch without cells has ones. And the
    kinds, None if there are too few cells for two of them, or all are the same.

    References
    ----------
    Haghverdi, Lun, Morgan, Marioni 2018, Nature Biotechnology 36 (mutual nearest neighbours). Deming & Stephan 1940,
    On a least squares adjustment of a sampled frequency table, Annals of Mathematical Statistics.
    """
    rows = store.some_rows(MOST_CELLS)
    x = sparse.csr_array(store.cells.x[rows], dtype=np.float64)
    library, batch = store.cells.library[rows].astype(np.float64), store.cells.codes[rows, 0]
    library = np.maximum(library, 1e-12)
    batches = _members(batch, n_batch)
    n_kinds = int(np.clip(len(rows) // CELLS_A_KIND, 1, KINDS))
    y = x.multiply((depth or np.median(store.cells.library)) / library).tocsr().log1p()
    if n_kinds == 1 or min(x.shape) <= 2 or (y.max(axis=0).toarray() == y.min(axis=0).toarray()).all():
        return _factors(x, library, batches, _members(np.zeros(len(rows), np.int64), 1)).astype(np.float32), None
    added = _between_neighbors(y, batch, n_batch)
    for _ in range(ROUNDS):
        z, _ = _components(y, batches, added)
        kinds = _kinds(z, n_kinds)
        added = _additive(y, batches, kinds)
    effects = _factors(x, library, batches, kinds).astype(np.float32)
    if not with_kinds:
        return effects, None
    z, axes = _components(y, batches, added)
    joined = _joined(z, batch, n_batch, CLOSE * _between_kinds(z, batch, n_batch, _kinds(z, n_kinds)))
    kinds = _kinds(joined, n_kinds)
    if kinds.shape[1] == 1:
        return effects, None
    weight = kinds.toarray() * _shared(joined, batch, n_batch, kinds)[:, None]
    return effects, _landmarks(y @ axes, batch, n_batch, weight, axes, _overlap(batch, n_batch, kinds))


def _members(group: np.ndarray, n: int) -> sparse.csr_array:
    """Which cell is in which group, (cells, n) of zeros and ones."""
    return sparse.csr_array((np.ones(len(group)), group, np.arange(len(group) + 1)), shape=(len(group), n))


def _kinds(z: np.ndarray, n: int) -> sparse.csr_array:
    """Which cell is of which of n kinds, or of as many as cells differ: k-means of z (cells, components)."""
    n = min(n, len(np.unique((z / max(np.abs(z).max(), 1e-6)).round(6), axis=0)))
    return _members(KMeans(n, n_init=3, random_state=0).fit_predict(z), n)


def _mutual(
    z: np.ndarray, batch: np.ndarray, n_batch: int, share: float = 1.0
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of batches: cells of the one, of the other, and which are neighbours of each other in z (bool, a x b)."""
    members = [np.flatnonzero(batch == b) for b in range(n_batch)]
    largest = np.argsort([-len(m) for m in members], kind="stable")[:MOST_BATCHES]
    n = [_n_neighbors(len(m), share) for m in members]
    for a, b in sorted({(min(a, b), max(a, b)) for a in largest for b in range(n_batch) if a != b}):
        if n[a] and n[b]:
            d = _distances(z[members[a]], z[members[b]])
            farthest_b = np.partition(d, n[b] - 1, axis=1)[:, n[b] - 1, None]
            farthest_a = np.partition(d, n[a] - 1, axis=0)[n[a] - 1]
            yield members[a], members[b], (d <= farthest_b) & (d <= farthest_a)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Half the squares of the distances, (a, b). For 500 batches of a few cells in a tenth of a neighbour search."""
    return ((a * a).sum(1)[:, None] / 2 + (b * b).sum(1) / 2 - a @ b.T).astype(np.float32)


def _n_neighbors(n_cells: int, share: float) -> int:
    return min(n_cells, int(np.clip(share * n_cells, FEWEST_NEIGHBORS, NEIGHBORS)))


def _between_neighbors(y: sparse.csr_array, batch: np.ndarray, n_batch: int) -> np.ndarray:
    """What each batch adds to each gene (n_batch, G), by cells of two batches that are neighbours of each other.

    Least squares of the mean differences over pairs of batches, each weighing as the cells of the smaller. Neighbours
    in principal components of cells of unit length; where a batch has none, it adds nothing.
    """
    length = np.sqrt(y.multiply(y).sum(1))
    unit = y.multiply(1 / np.maximum(length, 1e-12)[:, None]).tocsr()
    everything = _members(np.zeros(len(batch), np.int64), 1)
    z, _ = _components(unit, everything, np.zeros((1, y.shape[1])))
    inner, outer = np.zeros((n_batch, n_batch)), np.zeros((n_batch, len(batch)))
    for of_a, of_b, mutual in _mutual(z, batch, n_batch):
        if mutual.any():
            a, b = batch[of_a[0]], batch[of_b[0]]
            weight = min(len(of_a), len(of_b))
            inner[[a, b], [a, b]] += weight
            inner[[a, b], [b, a]] -= weight
            for cells, each in ((of_a, mutual.sum(1)), (of_b, -mutual.sum(0))):
                outer[a, cells] += weight / mutual.sum() * each
                outer[b, cells] -= weight / mutual.sum() * each
    return np.linalg.lstsq(inner, outer @ y, rcond=None)[0]


def _between_kinds(z: np.ndarray, batch: np.ndarray, n_batch: int, kinds: sparse.csr_array) -> float:
    """Median distance between the means of two kinds in a batch; infinite if no batch has two."""
    found = []
    for own in (np.flatnonzero(batch == b) for b in range(n_batch)):
        size = kinds[own].sum(0)
        there = size >= FEWEST_NEIGHBORS
        found.append(pdist((kinds[own].T @ z[own])[there] / size[there, None]))
    found = np.concatenate(found)
    return float(np.median(found)) if len(found) else np.inf


def _around(z: np.ndarray, batch: np.ndarray, n_batch: int) -> np.ndarray:
    """Means of the cells around each of z (n, d) in its batch: without what single cells differ by."""
    means = z.copy()
    for own in (np.flatnonzero(batch == b) for b in range(n_batch)):
        if n := _n_neighbors(len(own), NEIGHBOR_SHARE):
            near = np.argpartition(_distances(z[own], z[own]), n - 1, axis=1)[:, :n]
            means[own] = z[own][near].mean(1)
    return means


def _of_one_sort(
    z: np.ndarray, batch: np.ndarray, n_batch: int, farthest: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Those of the mutual nearest neighbours that are near enough, by the means of the cells around them."""
    means = _around(z, batch, n_batch)
    for of_a, of_b, mutual in _mutual(z, batch, n_batch, NEIGHBOR_SHARE):
        d = np.sqrt(np.maximum(2 * _distances(means[of_a], means[of_b]), 0))
        near = d <= np.minimum(farthest, CLOSEST * np.minimum(d.min(1)[:, None], d.min(0)))
        yield of_a, of_b, mutual & near


def _joined(z: np.ndarray, batch: np.ndarray, n_batch: int, farthest: float = np.inf) -> np.ndarray:
    """Cells z (n, d), each moved by what the mutual nearest neighbours around it in its batch differ by from theirs.

    The mean over the other batches, weighed by their cells: the batches meet in the middle. Cells that had no mutual
    neighbour at first lead none: a group that others have not would be drawn in by its edge, move by move.
    """
    leads = np.zeros(len(z), bool)
    for i in range(MOVES):
        move, weight = np.zeros_like(z), np.bincount(batch, minlength=n_batch)[batch].astype(float)
        between = list(_of_one_sort(z, batch, n_batch, farthest))
        for of_a, of_b, mutual in between if i == 0 else ():
            leads[of_a] |= mutual.any(1)
            leads[of_b] |= mutual.any(0)
        for of_a, of_b, mutual in between:
            for own, other, pairs in ((of_a, of_b, mutual), (of_b, of_a, mutual.T)):
                weight[own] += len(other)
                paired = np.flatnonzero(pairs.any(1) & leads[own])
                if len(paired):
                    theirs = pairs[paired] @ z[other] / pairs[paired].sum(1)[:, None]
                    difference = theirs - z[own[paired]]
                    n = min(len(paired), _n_neighbors(len(own), NEIGHBOR_SHARE))
                    around = np.argpartition(_distances(z[own], z[own[paired]]), n - 1, axis=1)[:, :n]
                    move[own] += len(other) * difference[around].mean(1)
        z = z + move / weight[:, None]
    return z


def _shared(z: np.ndarray, batch: np.ndarray, n_batch: int, kinds: sparse.csr_array) -> np.ndarray:
    """How far other batches hold such cells as each of z (n, d), in which the batches are joined: (n,) in [0, 1].

    Share of other batches among the cells nearest to it, as a share of theirs among the cells of its kind (n, K): what
    is rare in a batch is not for that without counterparts.
    """
    near = NearestNeighbors(n_neighbors=min(NEAREST, len(z) // 8)).fit(z).kneighbors(return_distance=False)
    own = (kinds.T @ _members(batch, n_batch)).toarray()[kinds.indices, batch]  # cells of its kind and batch
    others = 1 - own / kinds.sum(0)[kinds.indices]
    found = (batch[near] != batch[:, None]).mean(1)
    return np.minimum(np.divide(found, others, out=np.zeros(len(z)), where=others > 0), 1)


def _overlap(batch: np.ndarray, n_batch: int, kinds: sparse.csr_array) -> float:
    """How alike the shares of kinds are in a batch and in the others, as a share of that with the batches shuffled.

    Batches of a few cells differ by chance. 1 where only one batch has cells.
    """
    rng = np.random.default_rng(0)
    by_chance = np.mean([_alike(rng.permutation(batch), n_batch, kinds) for _ in range(SHUFFLES)])
    return min(_alike(batch, n_batch, kinds) / by_chance, 1.0) if by_chance else 1.0


def _alike(batch: np.ndarray, n_batch: int, kinds: sparse.csr_array) -> float:
    """With shares of the kinds a_k in a batch and b_k in the others: sum_k min(a_k, b_k), mean of cells."""
    own = (_members(batch, n_batch).T @ kinds).toarray()  # (n_batch, K)
    others = own.sum(0) - own
    size = own.sum(1)
    share, rest = (n / np.maximum(n.sum(1, keepdims=True), 1) for n in (own, others))
    return float(size @ np.minimum(share, rest).sum(1) / size.sum())


def _landmarks(
    z: np.ndarray, batch: np.ndarray, n_batch: int, weight: np.ndarray, axes: np.ndarray, overlap: float = 1.0
) -> CellKinds:
    """The kinds of cells z (n, d) on the axes (G, d), by means of the weights (n, K) over a few cells of a batch."""
    n = np.clip(np.bincount(batch, minlength=n_batch) // CELLS_A_LANDMARK, 1, LANDMARKS)
    points, weights = (np.zeros((n_batch, n.max(), a.shape[1])) for a in (z, weight))
    for b in range(n_batch):
        rows = np.flatnonzero(batch == b)
        if len(rows):
            of = _kinds(z[rows], n[b])
            mean = (of / np.maximum(of.sum(0), 1)).T.tocsr()[np.minimum(np.arange(n.max()), of.shape[1] - 1)]
            points[b], weights[b] = mean @ z[rows], mean @ weight[rows]
    return CellKinds(*(torch.from_numpy(a.astype(np.float32)) for a in (axes, points, weights)), overlap)


def _additive(y: sparse.csr_array, batches: sparse.csr_array, kinds: sparse.csr_array) -> np.ndarray:
    """What each batch adds to each gene beside what the kinds do, (n_batch, G): least squares, with the mean zero."""
    both = sparse.hstack([batches, kinds], format="csr")
    inner = (both.T @ both).toarray() + 1e-3 * np.eye(both.shape[1])
    added = np.linalg.solve(inner, (both.T @ y).toarray())[: batches.shape[1]]
    return added - batches.mean(0) @ added


def _components(y: sparse.csr_array, batches: sparse.csr_array, added: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of y (n, G), without what the batches add (n_batch, G): (n, d), and their axes (G, d)."""
    shift = added + (y.mean(0) - batches.mean(0) @ added)
    operator = LinearOperator(
        y.shape,
        matvec=lambda v: y @ v - batches @ (shift @ v),
        rmatvec=lambda u: y.T @ u - shift.T @ (batches.T @ u),
        dtype=np.float64,
    )
    start = np.random.default_rng(0).standard_normal(min(y.shape))
    u, s, axes = svds(operator, k=min(N_COMPONENTS, min(y.shape) - 1), v0=start, tol=1e-2)
    return u * s, axes.T


def _factors(
    x: sparse.csr_array, library: np.ndarray, batches: sparse.csr_array, kinds: sparse.csr_array
) -> np.ndarray:
    """Logarithms of the factors of the batches, (n_batch, G)."""
    depth = (batches.multiply(library).T @ kinds).toarray()  # of each batch and kind
    by_batch, by_kind = (batches.T @ x).toarray(), (kinds.T @ x).toarray()
    share = depth.sum(1) / depth.sum()
    prior = PRIOR * by_batch.mean(0)
    factor = np.ones(by_batch.shape)
    for _ in range(SWEEPS):
        expected = depth.T @ factor
        of_kind = np.divide(by_kind, expected, out=np.zeros_like(expected), where=expected > 0)
        expected = depth @ of_kind
        factor = np.divide(by_batch + prior, expected + prior, out=np.ones_like(expected), where=expected + prior > 0)
    factor = factor / (share @ factor)
    factor[share == 0] = 1
    return np.log(factor)
