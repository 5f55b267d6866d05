"""A batch effect planted in real counts, so that the truth under it is known."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

import numpy as np

from ._cells import log_normalise

if TYPE_CHECKING:
    from anndata import AnnData

_DEPTH = (0.6, 0.9)  # range of the depth of a batch relative to the reference


def plant_batch_effect(
    adata: AnnData,
    n_batches: int = 2,
    strength: float = 0.5,
    *,
    layer: str | None = "counts",
    batch_key: str = "batch",
    label_key: str | None = None,
    seed: int = 0,
) -> AnnData:
    r"""Split cells into batches at random and distort the counts of all batches but the first.

    In batch b the expected count of gene g is multiplied by

    .. math:: r_{gb} = d_b \, e^{s_{gb}}, \qquad s_{gb} \sim N(0, strength^2), \quad d_b \sim U(0.6, 0.9)

    and in the reference, ``"batch0"``, by 1. The new count y is drawn given the true count x with mean exactly
    :math:`r x`, and stays an integer:

    - r <= 1: binomial thinning, y ~ Binomial(x, r), as if fewer molecules had been captured. A Poisson count stays
      Poisson.
    - r > 1: amplification, y = x + Poisson((r - 1) x). What was not seen is not invented: zeros stay zeros, at the
      price of a variance above Poisson in these genes. As :math:`d_b < 1`, they are the minority.

    Parameters
    ----------
    adata
        Cells x genes with raw counts. Not changed.
    n_batches
        Number of batches, at least 2.
    strength
        Standard deviation of the natural log of the gene factors. 0 changes the depth only; 0.5 multiplies a
        typical gene by 1.4 or by 0.7.
    layer
        Layer with the raw counts, dense or sparse; None takes ``X``.
    batch_key
        Column of ``obs`` to write.
    label_key
        Column of ``obs`` with cell types. If given, every type is spread over the batches in proportions of its own
        (uniform on the simplex), so batch and type are confounded in part. By default every batch is a random
        sample of the same size.
    seed
        Seed of everything random here.

    Returns
    -------
    A new AnnData with the cells and genes of ``adata``, its ``obs``, ``var`` and the colours in ``uns``, and

    - ``layers[layer]``: the distorted counts, CSR if they were sparse, else dense; a floating type is kept, any
      other becomes int64
    - ``X``: log1p of those counts scaled to 10,000 a cell, float32 (the counts themselves if ``layer`` is None)
    - ``layers["truth"]``: the counts before the effect
    - ``obs[batch_key]``: ``"batch0"``, ``"batch1"``, …
    - ``varm["batch_log_effect"]``: s, (n_genes, n_batches) float64; zeros in the first column
    - ``uns["planted_batch_effect"]``: the parameters, and ``depth``: d, (n_batches,)

    Everything else in ``adata`` (other layers, embeddings, graphs) describes the cells without the effect and is
    left out.

    Raises
    ------
    KeyError
        If the layer or the label column does not exist.
    ValueError
        If the counts are negative, fractional or not finite, there are fewer than two batches, more batches than
        cells, a negative ``strength``, missing labels, or a batch that got no cell; if ``layer`` is ``"truth"``, or
        ``batch_key`` is ``label_key``, of which one would be lost.

    Notes
    -----
    After scaling every cell to the same depth, s is visible only up to a constant for each batch.
    A cell with very few counts can lose all of them.

    Examples
    --------
    >>> adata = sccvae.datasets.plant_batch_effect(sccvae.datasets.pbmc68k_reduced())  # doctest: +SKIP
    """
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse

    if n_batches < 2 or strength < 0:
        msg = f"n_batches={n_batches} must be at least 2 and strength={strength} at least 0."
        raise ValueError(msg)
    if layer == "truth":
        msg = "layer='truth' is where the counts before the effect are written: rename the layer, such as to 'counts'."
        raise ValueError(msg)
    if batch_key == label_key:
        msg = f"batch_key={batch_key!r} is the column of the labels, which would be lost: choose another batch_key."
        raise ValueError(msg)
    truth = _counts(adata, layer)
    rng = np.random.default_rng(seed)
    batch = _assign(adata, n_batches, label_key, rng)  # (n_cells,) codes

    log_effect = rng.normal(scale=strength, size=(adata.n_vars, n_batches))
    depth = rng.uniform(*_DEPTH, size=n_batches)
    log_effect[:, 0], depth[0] = 0.0, 1.0

    x = sparse.csr_matrix(truth)  # the entries of zero stay zero, so only the others are drawn
    rows = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))
    ratio = depth[batch[rows]] * np.exp(log_effect[x.indices, batch[rows]])
    n = x.data.astype(np.int64)
    drawn = rng.binomial(n, np.minimum(ratio, 1)) + rng.poisson(np.maximum(ratio - 1, 0) * n)
    dtype = truth.dtype if truth.dtype.kind == "f" else np.int64  # a small integer type could overflow
    planted = sparse.csr_matrix((drawn.astype(dtype), x.indices.copy(), x.indptr.copy()), shape=x.shape)
    planted.eliminate_zeros()
    counts = planted if sparse.issparse(truth) else planted.toarray()

    names = [f"batch{i}" for i in range(n_batches)]
    new = AnnData(
        counts.copy() if layer is None else counts.astype(np.float32),
        obs=adata.obs.assign(**{batch_key: pd.Categorical.from_codes(batch, categories=names)}),
        var=adata.var.copy(),
        varm={"batch_log_effect": log_effect},
        uns={key: copy(value) for key, value in adata.uns.items() if key.endswith("_colors")},
    )
    new.layers["truth"] = truth
    if layer is not None:
        new.layers[layer] = counts
        log_normalise(new)
    new.uns["planted_batch_effect"] = {
        "n_batches": n_batches,
        "strength": strength,
        "layer": layer or "X",
        "batch_key": batch_key,
        "label_key": label_key or "",
        "seed": seed,
        "depth": depth,
    }
    return new


def _counts(adata: AnnData, layer: str | None):
    """Copy and check the counts: a CSR matrix if they are sparse, else a dense array."""
    from scipy import sparse

    if layer is not None and layer not in adata.layers:
        msg = f"There is no layer {layer!r}, only {sorted(adata.layers)}: give that of the raw counts, or None for X."
        raise KeyError(msg)
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    counts = adata.X if layer is None else adata.layers[layer]
    counts = sparse.csr_matrix(counts, copy=True) if sparse.issparse(counts) else np.array(counts)
    if sparse.issparse(counts):
        counts.sum_duplicates()
    values = counts.data if sparse.issparse(counts) else counts
    bad = ~((values >= 0) & (values == np.round(values)) & np.isfinite(values))
    if bad.any():
        msg = (
            f"{where} holds {bad.sum()} values that are no counts (negative, fractional or not finite), "
            f"such as {values[bad][0]}. A batch effect is planted in raw counts: name their layer."
        )
        raise ValueError(msg)
    return counts


def _assign(adata: AnnData, n_batches: int, label_key: str | None, rng: np.random.Generator) -> np.ndarray:
    """Batch of every cell, (n_cells,) integer codes."""
    if label_key is None:
        batch = rng.permutation(np.arange(adata.n_obs) % n_batches)
    else:
        if label_key not in adata.obs:
            msg = f"There is no column {label_key!r} in adata.obs: it has {list(adata.obs.columns)}."
            raise KeyError(msg)
        labels = adata.obs[label_key]
        if labels.isna().any():
            msg = f"adata.obs[{label_key!r}] has {labels.isna().sum()} missing labels: fill or drop them first."
            raise ValueError(msg)
        batch = np.empty(adata.n_obs, dtype=np.int64)
        for label in sorted(labels.unique(), key=str):
            cells = np.flatnonzero(labels == label)
            batch[cells] = rng.choice(n_batches, size=len(cells), p=rng.dirichlet(np.ones(n_batches)))
    empty = np.setdiff1d(np.arange(n_batches), batch)
    if len(empty):
        msg = f"batch{empty[0]} got none of the {adata.n_obs} cells: use fewer batches, or another seed with label_key."
        raise ValueError(msg)
    return batch
