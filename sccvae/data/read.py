"""From AnnData to arrays: every storage that AnnData knows, genes in any order, values checked."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse

from sccvae.data.fields import Schema, numeric_column


@dataclass
class Cells:
    """Model input as arrays; rows are cells.

    Attributes
    ----------
    x
        Values, (n, G) float32: CSR or C-contiguous dense.
    codes
        Category of each condition, (n, n_keys) int64.
    covariates
        Continuous covariates, (n, n_continuous) float32.
    library
        Library size, (n, 1) float32 (sum of x, or the size factor).
    """

    x: np.ndarray | sparse.csr_matrix
    codes: np.ndarray
    covariates: np.ndarray
    library: np.ndarray

    def __len__(self) -> int:
        return self.x.shape[0]


def read_cells(adata: AnnData, schema: Schema) -> Cells:
    """Read what a model needs from ``adata``, without writing to it.

    Parameters
    ----------
    adata
        In memory, backed or a view; CSR, CSC, dense or dask; any numeric type; its genes in any order.
    schema
        Where the inputs lie.

    Returns
    -------
    The cells, genes in the order of the schema.

    Raises
    ------
    KeyError
        If a layer or column is missing.
    TypeError
        If the values are not numbers.
    ValueError
        If genes are missing, values are NaN or infinite, or a category is not known.
    """
    for key in (*schema.categories, *schema.continuous, *filter(None, [schema.size_factor_key])):
        if key not in adata.obs:
            msg = (
                f"The model was set up with obs[{key!r}], which this AnnData lacks; its columns are {list(adata.obs)}."
            )
            raise KeyError(msg)
    if schema.layer is not None and schema.layer not in adata.layers:
        msg = f"The model was set up with layers[{schema.layer!r}], which this AnnData lacks: {sorted(adata.layers)}."
        raise KeyError(msg)
    where = "adata.X" if schema.layer is None else f"adata.layers[{schema.layer!r}]"
    x = _as_matrix(adata.X if schema.layer is None else adata.layers[schema.layer], where)
    x = _in_gene_order(x, adata.var_names, schema.var_names)
    _check_finite(x, where)
    codes = [schema.codes(key, adata.obs[key]) for key in schema.categories]
    covariates = [numeric_column(adata.obs[key]) for key in schema.continuous]
    if schema.size_factor_key is None:
        library = np.asarray(x.sum(1), dtype=np.float32).reshape(-1, 1)
    else:
        library = numeric_column(adata.obs[schema.size_factor_key], positive=True).reshape(-1, 1)
    n = x.shape[0]
    return Cells(
        x,
        np.stack(codes, 1) if codes else np.zeros((n, 0), np.int64),
        np.stack(covariates, 1) if covariates else np.zeros((n, 0), np.float32),
        library,
    )


def check_support(cells: Cells, support: str, where: str) -> None:
    """Check the values against what a likelihood can describe.

    Parameters
    ----------
    cells
        The data. For counts, cells without any count get library size 1, with a warning.
    support
        ``"counts"``, ``"unit"`` or ``"real"``.
    where
        How to name the matrix in a message.

    Raises
    ------
    ValueError
        If a value lies outside the support.
    """
    values = cells.x.data if sparse.issparse(cells.x) else cells.x
    if support == "counts":
        cure = (
            "Pass raw counts (for example layer='counts'), or use likelihood='normal' for log-normalised values "
            "(counts that were corrected to fractions can be rounded: `np.round`)."
        )
        if values.size and values.min() < 0:
            msg = (
                f"{where} holds negative values (smallest {values.min():g}); a count likelihood cannot describe "
                f"them. {cure}"
            )
            raise ValueError(msg)
        fractional = values[values != np.floor(values)]
        if fractional.size:
            msg = f"{where} holds values that are not whole numbers, such as {fractional[0]:g}: not raw counts. {cure}"
            raise ValueError(msg)
        empty = cells.library[:, 0] <= 0
        if empty.any():
            msg = (
                f"{int(empty.sum())} of {len(cells)} cells have no counts at all in {where}; they carry no "
                "information, and "
                "their library size is taken as 1. `scanpy.pp.filter_cells(adata, min_counts=1)` removes them."
            )
            warnings.warn(msg, UserWarning, stacklevel=4)
            cells.library[empty] = 1
    elif support == "unit" and values.size and (values.min() < 0 or values.max() > 1):
        msg = (
            f"{where} holds values from {values.min():g} to {values.max():g}; a Bernoulli likelihood needs [0, 1]. "
            "Divide images by their largest value, or choose another likelihood."
        )
        raise ValueError(msg)


def _as_matrix(x: Any, where: str) -> np.ndarray | sparse.csr_matrix:
    """Any matrix that AnnData can hold as float32 CSR or dense; no copy where it is that already."""
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


def _in_gene_order(x: Any, names: Any, wanted: np.ndarray) -> Any:
    if len(names) == len(wanted) and (np.asarray(names) == wanted).all():
        return x
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
    return np.ascontiguousarray(x[:, at]) if isinstance(x, np.ndarray) else x[:, at].tocsr()


def _check_finite(x: np.ndarray | sparse.csr_matrix, where: str) -> None:
    values = x.data if sparse.issparse(x) else x
    # A sum is finite exactly if all values are, short of overflow; only then is each value looked at.
    with np.errstate(invalid="ignore"):
        if np.isfinite(values.sum(dtype=np.float64)):
            return
    rows = x.tocoo().row[~np.isfinite(values)] if sparse.issparse(x) else np.nonzero(~np.isfinite(values))[0]
    if len(rows):
        msg = (
            f"{where} holds NaN or infinite values in {len(set(rows))} cells (first: row {rows.min()}); remove or "
            "replace them."
        )
        raise ValueError(msg)
