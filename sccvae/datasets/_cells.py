"""Real cells that need no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData

# scanpy's file keeps log1p values to three decimals: a count recovered from them is off by at most 0.1 %.
_ROUNDING = 1e-3
_TARGET_SUM = 1e4


def pbmc68k_reduced() -> AnnData:
    """700 blood cells x 765 genes with raw counts, from the file that comes with scanpy.

    :func:`scanpy.datasets.pbmc68k_reduced` keeps only normalised values: log1p of counts scaled to 10,000 a cell over
    *all* genes, whose total is in ``obs["n_counts"]``. Undoing both steps gives the integers back exactly; the result
    is checked to be integer within the rounding of the file (0.1 % of a count's value).

    Returns
    -------
    AnnData of 700 x 765:

    - ``layers["counts"]``: the raw counts, CSR float32
    - ``X``: log1p of the counts scaled to 10,000 a cell (over these 765 genes), CSR float32
    - ``obs``: ``bulk_labels`` (10 types, by correlation with bulk samples), ``louvain``, ``phase``,
      ``n_counts`` and ``n_genes`` (over all genes of the original file), ``percent_mito``, ``S_score``, ``G2M_score``
    - ``uns``: the colours of ``bulk_labels`` and ``louvain``

    Scanpy's embeddings and graphs are left out.

    Raises
    ------
    RuntimeError
        If the file of the installed scanpy does not hold what is described above.

    References
    ----------
    Zheng et al. 2017, "Massively parallel digital transcriptional profiling of single cells", Nat. Commun. 8:14049.
    """
    import scanpy as sc
    from anndata import AnnData

    original = sc.datasets.pbmc68k_reduced()
    normalised = original.raw.X.tocsr().astype(np.float64)
    scale = original.obs["n_counts"].to_numpy(dtype=np.float64) / _TARGET_SUM  # (n_cells,)
    counts = normalised.copy()
    counts.data = _integers(np.expm1(normalised.data) * np.repeat(scale, np.diff(normalised.indptr)))

    adata = AnnData(counts.astype(np.float32), obs=original.obs.copy(), var=original.raw.var.copy())
    adata.uns = {key: original.uns[key].copy() for key in ("bulk_labels_colors", "louvain_colors")}
    adata.layers["counts"] = adata.X.copy()
    log_normalise(adata)
    return adata


def log_normalise(adata: AnnData) -> None:
    """Turn the counts in X into log1p of 10,000 a cell, in place, as scanpy does."""
    import scanpy as sc

    sc.pp.normalize_total(adata, target_sum=_TARGET_SUM)
    sc.pp.log1p(adata)


def _integers(values: np.ndarray) -> np.ndarray:
    counts = np.round(values)
    off = np.abs(values - counts)
    if not np.all((off <= _ROUNDING * counts) & (off < 0.5)):
        msg = (
            f"The counts recovered from scanpy.datasets.pbmc68k_reduced() are not integers (off by {off.max():.3g}). "
            "This scanpy ships another file than the one known here: install scanpy 1.11 and report this."
        )
        raise RuntimeError(msg)
    return counts
