"""How well clusters agree with classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

from ._embedding import _codes


def contingency(labels: ArrayLike, clusters: ArrayLike) -> np.ndarray:
    """Cells of each class in each cluster.

    Parameters
    ----------
    labels, clusters
        One value for each cell, (n,), none missing.

    Returns
    -------
    (classes, clusters) int64, both sorted by name.

    Raises
    ------
    ValueError
        If they are not of the same, positive length, or some are missing.
    """
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    if labels.shape != clusters.shape or labels.ndim != 1 or not len(labels):
        msg = f"labels {labels.shape} and clusters {clusters.shape}: one value of each for every cell is needed."
        raise ValueError(msg)
    a, b = (_codes(v, len(v), name)[1] for v, name in ((labels, "labels"), (clusters, "clusters")))
    table = np.zeros((a.max() + 1, b.max() + 1), dtype=np.int64)
    np.add.at(table, (a, b), 1)
    return table


def hungarian_accuracy(labels: ArrayLike, clusters: ArrayLike) -> float:
    """Accuracy under the best one-to-one match of clusters and classes; cells of unmatched clusters are wrong.

    Parameters
    ----------
    labels, clusters
        One value for each cell, (n,), none missing.

    Returns
    -------
    From 0 to 1.

    References
    ----------
    Kuhn 1955; as in Xie, Girshick, Farhadi 2016, DEC, equation 10.
    """
    table = contingency(labels, clusters)
    return float(table[linear_sum_assignment(-table)].sum() / table.sum())


def majority_accuracy(labels: ArrayLike, clusters: ArrayLike) -> float:
    """Accuracy if every cluster is named after its most common class (purity); for more clusters than classes.

    Parameters
    ----------
    labels, clusters
        One value for each cell, (n,), none missing.

    Returns
    -------
    From 0 to 1.
    """
    table = contingency(labels, clusters)
    return float(table.max(0).sum() / table.sum())


def clustering(labels: ArrayLike, clusters: ArrayLike) -> dict[str, float]:
    """Hungarian and majority accuracy, normalised mutual information and adjusted Rand index.

    Parameters
    ----------
    labels, clusters
        One value for each cell, (n,), none missing.

    Returns
    -------
    ``hungarian``, ``majority``, ``nmi``, ``ari`` and ``n_clusters``.

    Raises
    ------
    ValueError
        As for :func:`contingency`.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    return {
        "hungarian": hungarian_accuracy(labels, clusters),
        "majority": majority_accuracy(labels, clusters),
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ari": float(adjusted_rand_score(labels, clusters)),
        "n_clusters": len(np.unique(clusters)),
    }
