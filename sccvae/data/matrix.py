"""What every storage of a matrix shares: conversion, the order of genes, and one look at all values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from tqdm import tqdm

#: Bytes of the matrix that are looked at, or read from disk, at a time.
BLOCK_BYTES = 2**25
#: Seconds after which a look at all values shows a progress bar.
PATIENCE = 5


def as_matrix(x: Any, where: str) -> np.ndarray | sparse.csr_matrix:
    """Any matrix that AnnData can hold as float32 CSR or dense; no copy where it is that already.

    Parameters
    ----------
    x
        The matrix.
    where
        How to name it in a message.

    Returns
    -------
    CSR with sorted rows and no entry twice, or C-contiguous dense.

    Raises
    ------
    TypeError
        If the values are not numbers.
    """
    if hasattr(x, "to_memory"):  # backed sparse
        x = x.to_memory()
    elif hasattr(x, "compute"):  # dask
        x = x.compute()
    if not sparse.issparse(x):
        x = np.asarray(x)  # backed dense (h5py, zarr), a view, a matrix
    if x.dtype.kind not in "fiub":
        msg = f"{where} has values of type {x.dtype}; the model needs numbers."
        raise TypeError(msg)
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused later
        if not sparse.issparse(x):
            return np.ascontiguousarray(x, dtype=np.float32)
        x = sparse.csr_matrix(x, dtype=np.float32, copy=False)
    if not x.has_canonical_format:  # an entry may be stored in parts: its value is their sum
        x = x.copy()
        x.sum_duplicates()
    return x


def gene_columns(names: Any, wanted: np.ndarray) -> np.ndarray | None:
    """Columns of the genes ``wanted`` among ``names``, (G,) int; None if they are the same in the same order.

    Raises
    ------
    ValueError
        If genes are missing or cannot be matched.
    """
    if len(names) == len(wanted) and (np.asarray(names) == wanted).all():
        return None
    if not names.is_unique:
        msg = "adata.var_names are not unique, so genes cannot be matched; run `adata.var_names_make_unique()` first."
        raise ValueError(msg)
    at = names.get_indexer(wanted)
    if (at < 0).any():
        missing = [str(g) for g in wanted[at < 0]]
        msg = (
            f"{len(missing)} of the model's {len(wanted)} genes are missing from adata.var_names, such as "
            f"{missing[:5]}. "
            "Are the names of the same kind (symbols or Ensembl ids)?"
        )
        raise ValueError(msg)
    return at


def take_columns(x: np.ndarray | sparse.csr_matrix, at: np.ndarray | None) -> np.ndarray | sparse.csr_matrix:
    """These columns, in this order, CSR or C-contiguous; ``x`` itself for None."""
    if at is None:
        return x
    return np.ascontiguousarray(x[:, at]) if isinstance(x, np.ndarray) else x[:, at].tocsr()


@dataclass
class Survey:
    """What one look at all values tells.

    Attributes
    ----------
    smallest, largest
        Of the stored values; infinite and -infinite if there are none.
    fractional
        The first value that is not a whole number, None if there is none.
    totals
        Sum of each cell, (n,) float32.
    mean
        Mean of each gene, (G,) float32; None if it was not asked for.
    """

    smallest: float
    largest: float
    fractional: float | None
    totals: np.ndarray
    mean: np.ndarray | None = None


def survey(x: Any, where: str, *, means: bool = False) -> Survey:
    """Look at all values of a matrix, a block of rows at a time.

    Parameters
    ----------
    x
        (n, G) float32: CSR, dense, or on disk (:class:`sccvae.data.DiskMatrix`).
    where
        How to name it in a message.
    means
        Find the means of genes too.

    Returns
    -------
    What was found.

    Raises
    ------
    ValueError
        If values are NaN or infinite.
    """
    n, n_genes = x.shape
    found, sums = Survey(np.inf, -np.inf, None, np.empty(n, np.float32)), np.zeros(n_genes)
    n_bad, first_bad = 0, n
    for start, block in _blocks(x):
        values = block.data if sparse.issparse(block) else block
        if not values.size:
            found.totals[start : start + block.shape[0]] = 0
            continue
        smallest, largest = float(values.min()), float(values.max())
        if not np.isfinite([smallest, largest]).all():  # NaN, if there is one
            bad = _not_finite(block)
            n_bad, first_bad = n_bad + len(bad), min(first_bad, start + int(bad[0]))
        found.smallest, found.largest = min(found.smallest, smallest), max(found.largest, largest)
        if found.fractional is None:
            whole = values == np.floor(values)
            if not whole.all():
                found.fractional = float(values[~whole][0])
        with np.errstate(invalid="ignore", over="ignore"):  # refused below
            found.totals[start : start + block.shape[0]] = np.asarray(block.sum(1)).reshape(-1)
            sums += _sums(block) if means else 0
    if n_bad:
        msg = f"{where} holds NaN or infinite values in {n_bad} cells (first: row {first_bad}); remove or replace them."
        raise ValueError(msg)
    if means:
        found.mean = (sums / max(n, 1)).astype(np.float32)
    return found


def gene_means(x: Any) -> np.ndarray:
    """Mean of each gene, (G,) float32, of a matrix as :func:`survey` takes it."""
    sums = sum((_sums(block) for _, block in _blocks(x)), np.zeros(x.shape[1]))
    return (sums / max(x.shape[0], 1)).astype(np.float32)


def _sums(block: np.ndarray | sparse.csr_matrix) -> np.ndarray:
    """Sum of each gene, (G,), in float64, so that the sizes of the blocks make no difference."""
    return block.T @ np.ones(block.shape[0]) if sparse.issparse(block) else block.sum(0, dtype=np.float64)


def _blocks(x: Any) -> Iterator[tuple[int, np.ndarray | sparse.csr_matrix]]:
    """First row and values of one block of rows after the other."""
    n = x.shape[0]
    size = x.nbytes if not sparse.issparse(x) else x.data.nbytes + x.indices.nbytes
    rows = max(1, int(n * BLOCK_BYTES / max(size, 1)))
    for start in tqdm(range(0, n, rows), desc="Checking the cells", unit=" blocks", delay=PATIENCE, leave=False):
        yield start, x if rows >= n and sparse.issparse(x) else x[start : start + rows]  # a slice is a copy


def _not_finite(x: np.ndarray | sparse.csr_matrix) -> np.ndarray:
    """Rows with values that are NaN or infinite."""
    bad = ~np.isfinite(x.data if sparse.issparse(x) else x)
    return np.unique(x.tocoo().row[bad] if sparse.issparse(x) else np.nonzero(bad)[0])
