"""Are two clusters one? Their density along the line that tells them apart: with no valley in between, they are."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter1d

#: Two clusters are apart where the density falls below this share of the lower of their peaks.
DEEP = 0.5
#: Cells of a cluster that are looked at.
LOOKED_AT = 1_000
#: Share of the covariance within clusters that is taken to be alike in all directions: a few cells tell it badly.
SHRINKAGE = 0.1
#: Places on the line where the density is told: the medians of the clusters are at 0 and 1.
STEP, START, END = 0.0125, -2.0, 3.0
GRID = np.arange(START + STEP / 2, END, STEP)
#: Where the peak of each cluster is looked for.
SIDES = abs(GRID) <= 0.5, abs(GRID - 1) <= 0.5
#: Narrowest normal that a cell is spread over, on the same scale.
NARROWEST = 0.05
#: Distance of the medians, in standard deviations of all, below which nothing can lie in between.
NEAREST = 1e-3


def valley(a: np.ndarray, b: np.ndarray) -> float:
    """How high the density is between two clusters, against the lower of their peaks.

    Both count alike, however many cells they have. The line is Fisher's discriminant of one half of the cells, on which
    the other half is looked at, and the other way round: cells lie apart on a line that was made for them. The density
    is a sum of normals about the cells, as wide as Silverman's rule says.

    Parameters
    ----------
    a, b
        Coordinates of the cells of each, (n_a, d) and (n_b, d).

    Returns
    -------
    0 for a gap to 1 for no valley at all, such as between the halves of one normal.

    References
    ----------
    Fisher 1936, Annals of Eugenics 7; Silverman 1986, Density Estimation, equation 3.28.
    """
    return _height(_looked_at(a), _looked_at(b))


class _Half:
    """Each second cell that is looked at of a cluster, (n, d), their mean and covariance."""

    def __init__(self, x: np.ndarray) -> None:
        self.x, self.mean = x, x.mean(0)
        self.covariance = np.cov(x.T, bias=True).reshape(x.shape[1], -1)


def _looked_at(x: np.ndarray) -> list[_Half]:
    """Both halves of a cluster; of a few cells all, both times."""
    x = x[np.linspace(0, len(x) - 1, min(len(x), LOOKED_AT)).astype(int)].astype(np.float64)
    return [_Half(x[k::2] if len(x) > 3 else x) for k in (0, 1)]


def _height(a: list[_Half], b: list[_Half]) -> float:
    """As :func:`valley`."""
    looked_at: tuple[list, list] = [], []
    for own in (0, 1):
        line = _discriminant(a[own], b[own])
        at = [half[1 - own].x @ line for half in (a, b)]
        start, end = map(np.median, at)
        if end - start <= NEAREST * np.concatenate(at).std():
            return 1.0
        for some, x in zip(looked_at, at, strict=True):
            some.append((x - start) / (end - start))
    density = sum(_density(np.concatenate(some)) for some in looked_at)
    left, right = (np.where(side, density, -1).argmax() for side in SIDES)
    peak = min(density[left], density[right])
    return float(density[left : right + 1].min() / peak) if peak > 0 else 0.0  # scattered: no cell near the median


def _discriminant(a: _Half, b: _Half) -> np.ndarray:
    """Fisher's, from a to b, (d,)."""
    within = (a.covariance + b.covariance) / 2
    alike = np.trace(within) / len(within) or 1.0  # all cells of a cluster may lie in one point
    return np.linalg.solve((1 - SHRINKAGE) * within + SHRINKAGE * alike * np.eye(len(within)), b.mean - a.mean)


def _density(at: np.ndarray) -> np.ndarray:
    """Density of positions at those of the grid: cells are counted in steps, and these spread over a normal each."""
    width = max(1.06 * at.std() * len(at) ** -0.2, NARROWEST)
    counts = np.bincount(((at[(at >= START) & (at < END)] - START) / STEP).astype(int), minlength=len(GRID))
    return gaussian_filter1d(counts / len(at), width / STEP, mode="constant")


def united(
    labels: np.ndarray, z: np.ndarray, links: np.ndarray, *, deep: float = DEEP, n_clusters: int = 1
) -> np.ndarray:
    """Unite clusters, the two with the highest valley first, until all that are left are apart or few enough.

    Parameters
    ----------
    labels
        Cluster of each cell, (n,) int64 from 0 on; -1 for none.
    z
        Coordinates, (n, d).
    links
        Which clusters hang together, (K, K) bool symmetric: others are apart.
    deep
        Valleys below this height keep clusters apart; 0 for none that do.
    n_clusters
        Least number that is left.

    Returns
    -------
    The number of the first of the clusters that each cell's was united with, (n,) int64; -1 for none.
    """
    labels, links = labels.copy(), links.copy()
    np.fill_diagonal(links, False)
    heights = np.full(links.shape, -1.0)
    clusters = [_looked_at(z[labels == k]) for k in range(len(links))]

    def look(i: int, j: int) -> None:
        heights[i, j] = heights[j, i] = _height(clusters[i], clusters[j])

    for i, j in np.argwhere(np.triu(links)):
        look(i, j)
    for _ in range(len(links) - n_clusters):
        if heights.max() < deep:
            break
        i, j = sorted(np.unravel_index(heights.argmax(), heights.shape))
        labels[labels == j] = i
        links[i] |= links[j]
        links[:, i] |= links[:, j]
        links[j], links[:, j], heights[j], heights[:, j] = False, False, -1, -1
        links[i, i] = False
        clusters[i] = _looked_at(z[labels == i])
        for k in np.flatnonzero(links[i]):
            look(i, k)
    return labels
