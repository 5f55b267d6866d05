"""What an embedding keeps and what it has forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import entr

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def knn_accuracy(
    z: ArrayLike,
    labels: ArrayLike,
    z_test: ArrayLike | None = None,
    labels_test: ArrayLike | None = None,
    n_neighbors: int = 15,
) -> float:
    """Fraction of points whose label is the most frequent one among their nearest neighbours.

    Parameters
    ----------
    z
        Embedding, (n, d).
    labels
        Label of each point, (n,): strings, integers or a pandas categorical, none missing.
    z_test, labels_test
        Points to be labelled from ``z``, (m, d) and (m,). Without them every point of ``z`` is labelled from all the
        others (leave-one-out).
    n_neighbors
        Neighbours that vote, by Euclidean distance. Of labels with equal votes the first in sorted order wins, as in
        :class:`sklearn.neighbors.KNeighborsClassifier`.

    Returns
    -------
    Accuracy from 0 to 1. Chance is the share of the most frequent label, not 0.

    Raises
    ------
    ValueError
        If lengths do not match, labels are missing, values are not finite, only one of ``z_test`` and
        ``labels_test`` is given, or there are not enough points for ``n_neighbors``.
    """
    if (z_test is None) != (labels_test is None):
        msg = "z_test and labels_test belong together: give both, or neither for leave-one-out."
        raise ValueError(msg)
    z = _embedding(z, "z")
    names, codes = _codes(labels, len(z), "labels")
    if z_test is None:
        neighbors = _neighbors(z, n_neighbors)  # (n, k)
        correct = _majority(codes[neighbors], len(names)) == codes
    else:
        z_test = _embedding(z_test, "z_test")
        names_test, codes_test = _codes(labels_test, len(z_test), "labels_test")
        neighbors = _neighbors(z, n_neighbors, query=z_test)  # (m, k)
        correct = names[_majority(codes[neighbors], len(names))] == names_test[codes_test]
    return float(np.mean(correct))


def batch_mixing(z: ArrayLike, batch: ArrayLike, n_neighbors: int = 30) -> float:
    r"""How well batches are mixed in the neighbourhoods of an embedding: 0 apart, 1 as mixed as at random.

    For each cell the entropy of the batches among its ``n_neighbors`` nearest others is taken,

    .. math:: H_i = - \sum_b \frac{k_{ib}}{k} \log \frac{k_{ib}}{k}

    The mean over cells is divided by its expectation if the batches were dealt to the same cells at random. That
    expectation is exact (hypergeometric), so batches of unequal size and small neighbourhoods need no care: random
    batches score 1 on average, and a score can come out slightly above 1.

    Parameters
    ----------
    z
        Embedding, (n, d).
    batch
        Batch of each cell, (n,), none missing.
    n_neighbors
        Size of a neighbourhood, at least 2: a single neighbour is never mixed. The cell itself is not part of it.

    Returns
    -------
    Mixing score. If batches differ in their cell types, even a perfect embedding stays below 1.

    Raises
    ------
    ValueError
        If there is only one batch, lengths do not match, batches are missing, values are not finite, ``n_neighbors``
        is below 2, or there are not enough cells for it.
    """
    z = _embedding(z, "z")
    names, codes = _codes(batch, len(z), "batch")
    if len(names) < 2:
        msg = f"All {len(z)} cells are of one batch, {names[0]}: mixing needs two batches or more."
        raise ValueError(msg)
    votes = _votes(codes[_neighbors(z, n_neighbors, least=2)], len(names))  # (n, n_batches)
    observed = entr(votes / n_neighbors).sum(axis=1).mean()
    return float(observed / _expected_entropy(np.bincount(codes), n_neighbors))


def label_silhouette(z: ArrayLike, labels: ArrayLike) -> float:
    """Mean silhouette width of the labels, scaled from -1..1 to 0..1.

    Parameters
    ----------
    z
        Embedding, (n, d).
    labels
        Label of each point, (n,), none missing.

    Returns
    -------
    ``(s + 1) / 2`` with s of :func:`sklearn.metrics.silhouette_score` (Euclidean): 1 for tight labels far apart, 0.5
    for labels that overlap, less where points lie nearer to another label. Time grows with n squared.

    Raises
    ------
    ValueError
        If there are fewer than two labels or as many as points, lengths do not match, labels are missing or values
        are not finite.

    References
    ----------
    Rousseeuw 1987, J. Comput. Appl. Math. 20:53-65. The scaling is that of Luecken et al. 2022, Nat. Methods 19:41-50.
    """
    from sklearn.metrics import silhouette_score

    z = _embedding(z, "z")
    names, codes = _codes(labels, len(z), "labels")
    if not 2 <= len(names) < len(z):
        msg = (
            f"A silhouette needs at least 2 labels and fewer labels than points: got {len(names)} for {len(z)} points."
        )
        raise ValueError(msg)
    return float((silhouette_score(z, codes) + 1) / 2)


def _embedding(z: ArrayLike, name: str) -> np.ndarray:
    z = np.asarray(z)
    if z.ndim != 2 or z.size == 0:
        msg = f"{name} must be a finite array of shape (n, d); its shape is {z.shape}."
        raise ValueError(msg)
    bad = int((~np.isfinite(z)).any(axis=1).sum())
    if bad:
        msg = (
            f"{name} must be finite, but {bad} of its {len(z)} rows hold NaN or infinite values: take the others, "
            "`np.isfinite(...).all(axis=1)`, here and in all that goes with them."
        )
        raise ValueError(msg)
    return z


def _codes(labels: ArrayLike, n: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct labels, and for each point the place of its label among them."""
    import pandas as pd

    labels = np.asarray(labels)
    if labels.shape != (n,):
        msg = f"{name} must have one entry for each of the {n} points; its shape is {labels.shape}."
        raise ValueError(msg)
    missing = int(pd.isna(labels).sum())
    if missing:
        msg = f"{name} has {missing} missing entries: drop these points or name them."
        raise ValueError(msg)
    return np.unique(labels, return_inverse=True)


def _neighbors(z: np.ndarray, k: int, query: np.ndarray | None = None, least: int = 1) -> np.ndarray:
    """Find the k nearest points of z, (n, k) indices; without a query a point is not its own neighbour."""
    from sklearn.neighbors import NearestNeighbors

    available = len(z) - (query is None)
    if not least <= k <= available:
        msg = f"n_neighbors={k} must be from {least} to {available}, the number of points to choose from."
        raise ValueError(msg)
    return NearestNeighbors(n_neighbors=k).fit(z).kneighbors(query, return_distance=False)


def _votes(codes: np.ndarray, n_labels: int) -> np.ndarray:
    """How often each label occurs in each row: (n, k) codes -> (n, n_labels) counts."""
    n = len(codes)
    flat = codes + n_labels * np.arange(n)[:, None]
    return np.bincount(flat.ravel(), minlength=n * n_labels).reshape(n, n_labels)


def _majority(codes: np.ndarray, n_labels: int) -> np.ndarray:
    return _votes(codes, n_labels).argmax(axis=1)


def _expected_entropy(sizes: np.ndarray, k: int) -> float:
    """Average entropy of the batches of k cells drawn at random, without replacement, from batches of these sizes."""
    from scipy.stats import hypergeom

    # Nothing to correct for the cell itself: averaged over all cells, k others are k of all cells.
    drawn = np.arange(k + 1)
    pmf = hypergeom.pmf(drawn, sizes.sum(), sizes[:, None], k)  # (n_batches, k + 1)
    return float((pmf * entr(drawn / k)).sum())
