"""How close two expression matrices, or two linear spans, are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def gene_correlation(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """Pearson correlation over cells, gene by gene.

    Parameters
    ----------
    x, y
        Two matrices of the same cells and genes, (n_cells, n_genes): arrays or scipy sparse matrices.

    Returns
    -------
    (n_genes,) float64 in [-1, 1]; NaN for a gene that is constant in ``x`` or in ``y``, so summarise with
    :func:`numpy.nanmean` or :func:`numpy.nanmedian`.

    Raises
    ------
    TypeError
        If an AnnData is given in place of a matrix.
    ValueError
        If the shapes differ or values are not finite.
    """
    x, y = _matrix(x, "x"), _matrix(y, "y")
    if x.shape != y.shape:
        msg = f"x {x.shape} and y {y.shape} must hold the same cells and genes."
        raise ValueError(msg)
    # Compared exactly: the variance of a constant column is not always 0 in floating point.
    constant = (x == x[0]).all(axis=0) | (y == y[0]).all(axis=0)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    scale = np.linalg.norm(x, axis=0) * np.linalg.norm(y, axis=0)
    correlation = (x * y).sum(axis=0) / np.where(constant, 1, scale)
    return np.where(constant, np.nan, np.clip(correlation, -1, 1))


def r_squared_of_means(x: ArrayLike, y: ArrayLike) -> float:
    """Squared Pearson correlation, over genes, of the mean expressions of two groups of cells.

    The usual score of a predicted perturbation. It is blind to an offset and a scale common to all genes.

    Parameters
    ----------
    x, y
        (n_cells, n_genes) and (m_cells, n_genes): arrays or scipy sparse matrices with the same genes. The cells
        need not match.

    Returns
    -------
    From 0 to 1; NaN if the means of one group are the same for all genes.

    Raises
    ------
    TypeError
        If an AnnData is given in place of a matrix.
    ValueError
        If the numbers of genes differ, there are fewer than two, or values are not finite.

    References
    ----------
    Lotfollahi, Wolf & Theis 2019, "scGen predicts single-cell perturbation responses", Nat. Methods 16:715-721.
    """
    x, y = _matrix(x, "x"), _matrix(y, "y")
    if x.shape[1] != y.shape[1] or x.shape[1] < 2:
        msg = f"x {x.shape} and y {y.shape} must have the same genes, two or more."
        raise ValueError(msg)
    return float(gene_correlation(x.mean(axis=0)[:, None], y.mean(axis=0)[:, None])[0] ** 2)


def top_de_genes(x: ArrayLike, control: ArrayLike, n: int = 100) -> np.ndarray:
    """Genes whose expression differs most between two groups of cells, up or down, by the Wilcoxon rank-sum test.

    Parameters
    ----------
    x, control
        (n_cells, n_genes) and (m_cells, n_genes): arrays or scipy sparse matrices with the same genes, normalised for
        the depth of the cells. The order is the same on any monotone scale.
    n
        Number of genes.

    Returns
    -------
    (n,) int64 column numbers, the most significant gene first (two-sided, corrected for ties; where p-values are equal,
    as those that underflow to 0, by the distance of U from its mean).

    Raises
    ------
    TypeError
        If an AnnData is given in place of a matrix.
    ValueError
        If the numbers of genes differ, there are fewer than ``n``, or values are not finite.
    """
    from scipy.stats import mannwhitneyu

    x, control = _matrix(x, "x"), _matrix(control, "control")
    if x.shape[1] != control.shape[1] or not 1 <= n <= x.shape[1]:
        msg = f"x {x.shape} and control {control.shape} must have the same genes, and n={n} be from 1 to their number."
        raise ValueError(msg)
    constant = (np.concatenate([x, control]) == x[0]).all(axis=0)  # no ranks to compare: last
    with np.errstate(invalid="ignore", divide="ignore"):
        found = mannwhitneyu(x, control, axis=0, method="asymptotic")
    p = np.where(constant, 1.0, found.pvalue)
    return np.lexsort((-np.abs(found.statistic / (len(x) * len(control)) - 0.5), p))[:n]


def de_overlap(predicted: ArrayLike, real: ArrayLike, control: ArrayLike, n: int = 100) -> float:
    """Share of the ``n`` most differential genes of a real response that a predicted response finds as well.

    Parameters
    ----------
    predicted, real, control
        Cells x genes, with the same genes, each group with cells of its own. The test looks at the spread over cells:
        give predicted cells with the noise of measured ones (``posterior_predictive_sample``).
    n
        Number of genes; see :func:`top_de_genes`.

    Returns
    -------
    From 0 to 1; genes chosen at random give ``n`` / number of genes.

    Raises
    ------
    TypeError, ValueError
        As :func:`top_de_genes`.
    """
    return len(np.intersect1d(top_de_genes(predicted, control, n), top_de_genes(real, control, n))) / n


def perturbation_scores(predicted: ArrayLike, real: ArrayLike, control: ArrayLike, n: int = 100) -> dict[str, float]:
    """How well a predicted response agrees with the real one: what papers on perturbations report.

    Parameters
    ----------
    predicted, real, control
        Log-normalised expression, cells x genes, of predicted, perturbed and control cells with the same genes: arrays
        or scipy sparse matrices, such as ``adata.X`` or a layer.
    n
        Number of differential genes, found between ``real`` and ``control``.

    Returns
    -------
    ``r2``: :func:`r_squared_of_means` over all genes; ``r2_top``: over the ``n`` genes of :func:`top_de_genes`;
    ``de_overlap``: :func:`de_overlap`.

    Raises
    ------
    TypeError, ValueError
        As :func:`top_de_genes` and :func:`r_squared_of_means`.
    """
    predicted, real = _matrix(predicted, "predicted"), _matrix(real, "real")
    top = top_de_genes(real, control, n)
    return {
        "r2": r_squared_of_means(predicted, real),
        "r2_top": r_squared_of_means(predicted[:, top], real[:, top]),
        "de_overlap": len(np.intersect1d(top_de_genes(predicted, control, n), top)) / n,
    }


def principal_angles(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Angles between the spans of the columns of two matrices.

    Parameters
    ----------
    a, b
        (n_features, k) and (n_features, l): each column is a vector, such as a decoder's weights or the transposed
        ``components_`` of a PCA. The columns need not be orthogonal.

    Returns
    -------
    (min(k, l),) angles in degrees, 0 to 90, the largest last. All are 0 if one span lies within the other.

    Raises
    ------
    TypeError
        If an AnnData is given in place of a matrix.
    ValueError
        If the numbers of features differ or values are not finite.

    References
    ----------
    Knyazev & Argentati 2002, SIAM J. Sci. Comput. 23(6):2008-2040, by :func:`scipy.linalg.subspace_angles`.
    """
    from scipy.linalg import subspace_angles

    a, b = _matrix(a, "a"), _matrix(b, "b")
    if len(a) != len(b):
        msg = f"a {a.shape} and b {b.shape} must have the same number of rows (features); is one transposed?"
        raise ValueError(msg)
    return np.rad2deg(subspace_angles(a, b))[::-1]


def _matrix(x: ArrayLike, name: str) -> np.ndarray:
    if hasattr(x, "obs_names") and hasattr(x, "X"):  # numpy would take it apart cell by cell
        msg = f"{name} is an AnnData, which may hold several matrices: give adata.X or a layer, adata.layers[...]."
        raise TypeError(msg)
    x = np.asarray(x.toarray() if hasattr(x, "toarray") else x, dtype=np.float64)
    if x.ndim != 2 or x.size == 0 or not np.isfinite(x).all():
        msg = f"{name} must be a finite matrix with rows and columns; its shape is {x.shape}."
        raise ValueError(msg)
    return x
