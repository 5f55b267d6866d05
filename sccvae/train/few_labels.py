"""Classes of all cells from those of a few, over a neighbour graph."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
from scipy import sparse

from sccvae.train.guide import Communities

logger = logging.getLogger(__name__)

#: How far labels spread (alpha of Zhou et al.; theirs is 0.99). With many labels small types drown in large ones beside
#: them if it is far; held-back labels decide.
SPREADS = (0.9, 0.99)
#: Steps of the spread.
STEPS = 50
#: Parts in which labels are held back.
FOLDS = 5


def classes_from_few(
    graph: sparse.csr_matrix, known: np.ndarray, n_classes: int, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Classes of all cells from those of a few: what finds held-back labels best.

    Tried are labels spread along the graph, near and far, and Leiden's partition into as many clusters as there are
    classes, each named after most of its known cells: a handful of labels can name a cluster, but not draw its border.
    The clusters are taken if they are within one standard error of the best.

    Parameters
    ----------
    graph
        As from :func:`neighbor_graph`.
    known
        Class of each cell, (n,) int64; -1 for unknown.
    n_classes
        Number of classes.
    seed
        Of Leiden's random order and of what is held back.

    Returns
    -------
    Class of each cell, (n,) int64, -1 where no label reaches; and the recall of held-back labels, mean over classes.
    """
    clusters = Communities(graph, seed).with_clusters(n_classes).labels

    def named(labels: np.ndarray) -> np.ndarray:
        return named_after(clusters, labels, n_classes)

    def spread_by(alpha: float) -> Callable[[np.ndarray], np.ndarray]:
        def classes(labels: np.ndarray) -> np.ndarray:
            heat = spread(graph, labels, n_classes, alpha=alpha)
            return np.where(heat.max(1) > 0, heat.argmax(1), -1)

        return classes

    ways = {f"spread {alpha}": spread_by(alpha) for alpha in SPREADS} | {"named clusters": named}
    cells = np.random.default_rng(seed).permutation(np.flatnonzero(known >= 0))
    cells = cells[np.argsort(known[cells], kind="stable")]  # so that every part has its share of each class
    scores = {}
    for name, way in ways.items():
        found = np.full(len(cells), -1)
        for part in range(FOLDS):
            rest = known.copy()
            rest[cells[part::FOLDS]] = -1
            if (rest >= 0).any():
                found[part::FOLDS] = way(rest)[cells[part::FOLDS]]
        scores[name] = mean_recall(known[cells], found)
    if len(np.setdiff1d(known[cells], named(known))):  # a class without a cluster would be lost
        del scores["named clusters"]
    best = max(scores, key=scores.get)
    error = np.sqrt(scores[best] * (1 - scores[best]) / len(cells))
    if scores.get("named clusters", -1.0) >= scores[best] - error:  # the simplest within one standard error
        best = "named clusters"
    logger.info("Classes from few, recall of held-back labels: %s", {n: round(float(s), 3) for n, s in scores.items()})
    return np.where(known >= 0, known, ways[best](known)), scores[best]


def mean_recall(classes: np.ndarray, found: np.ndarray) -> float:
    """Share of the cells of a class that were found, mean over classes: small ones count as much as large ones.

    Parameters
    ----------
    classes, found
        True and found class of each cell, (n,) int64.

    Returns
    -------
    From 0 to 1.
    """
    return float(np.mean([(found == k)[classes == k].mean() for k in np.unique(classes)]))


def named_after(clusters: np.ndarray, known: np.ndarray, n_classes: int) -> np.ndarray:
    """Give each cluster the class of most of its known cells.

    Parameters
    ----------
    clusters
        Cluster of each cell, (n,) int64; -1 for none.
    known
        Class of each cell, (n,) int64; -1 for unknown.
    n_classes
        Number of classes.

    Returns
    -------
    Class of each cell, (n,) int64; -1 in clusters without a known cell.
    """
    votes = np.zeros((clusters.max() + 1, n_classes))
    both = (clusters >= 0) & (known >= 0)
    np.add.at(votes, (clusters[both], known[both]), 1)
    names = np.where(votes.any(1), votes.argmax(1), -1)
    return np.where(clusters >= 0, names[clusters], -1)


def spread(graph: sparse.csr_matrix, labels: np.ndarray, n_classes: int, *, alpha: float = SPREADS[0]) -> np.ndarray:
    """Spread known labels along a graph, as heat that the labelled cells hold.

    Parameters
    ----------
    graph
        As from :func:`neighbor_graph`.
    labels
        Class of each cell, (n,) int64; -1 for unknown.
    n_classes
        Number of classes.
    alpha
        How far the labels spread, in (0, 1): the share that a cell takes from its neighbours.

    Returns
    -------
    (n, n_classes) float64, rows summing to 1, or to 0 where no label can reach.

    References
    ----------
    Zhou et al. 2003, Learning with local and global consistency, NeurIPS; classes are brought to the
    shares of the known labels (class mass normalisation, Zhu et al. 2003).
    """
    start = np.zeros((len(labels), n_classes))
    known = np.flatnonzero(labels >= 0)
    start[known, labels[known]] = 1
    share = start.sum(0)
    degree = np.sqrt(np.asarray(graph.sum(1)).ravel()) + 1e-12
    walk = sparse.diags(1 / degree) @ graph @ sparse.diags(1 / degree)
    heat = start.copy()
    for _ in range(STEPS):
        heat = alpha * (walk @ heat) + (1 - alpha) * start
    heat *= np.divide(share, heat.sum(0), out=np.zeros(n_classes), where=heat.sum(0) > 0)
    heat[known] = start[known]
    total = heat.sum(1, keepdims=True)
    return np.divide(heat, total, out=np.zeros_like(heat), where=total > 0)


def core(graph: sparse.csr_matrix, labels: np.ndarray, n_classes: int, agreement: float = 0.8) -> np.ndarray:
    """Labels of the cells whose neighbours agree, -1 for the others: what lies between clusters guides nobody.

    Parameters
    ----------
    graph
        As from :func:`neighbor_graph`.
    labels
        Cluster of each cell, (n,) int64; -1 for none.
    n_classes
        Number of clusters.
    agreement
        Share of the neighbours, by weight, that must have the cell's own label.

    Returns
    -------
    (n,) int64. No cluster is left without a label.
    """
    known = labels >= 0
    hot = sparse.csr_matrix((np.ones(known.sum()), (np.flatnonzero(known), labels[known])), (len(labels), n_classes))
    votes = np.asarray((graph @ hot).todense())
    share = votes / np.maximum(np.asarray(graph.sum(1)), 1e-12)
    keep = known & (share[np.arange(len(labels)), labels] >= agreement)
    for k in np.setdiff1d(np.unique(labels[known]), np.unique(labels[keep])):
        keep |= labels == k
    return np.where(keep, labels, -1)
