"""From AnnData to arrays: every storage that AnnData knows, genes in any order, values checked."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from anndata import AnnData
from scipy import sparse

from sccvae.data.categories import check_once
from sccvae.data.checks import numeric_column
from sccvae.data.fields import Schema
from sccvae.data.matrix import Survey, as_matrix, gene_columns, gene_means, survey, take_columns
from sccvae.data.ondisk import DiskMatrix, stays_on_disk


@dataclass
class Cells:
    """Model input as arrays; rows are cells.

    Attributes
    ----------
    x
        Values, (n, G) float32: CSR, C-contiguous dense, or on disk.
    codes
        Category of each condition, (n, n_keys) int64.
    covariates
        Continuous covariates, (n, n_continuous) float32.
    library
        Library size, (n, 1) float32 (sum of x, or the size factor).
    survey
        What a look at all values told, if there was one.
    """

    x: np.ndarray | sparse.csr_matrix | DiskMatrix
    codes: np.ndarray
    covariates: np.ndarray
    library: np.ndarray
    survey: Survey | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def gene_means(self) -> np.ndarray:
        """Mean of each gene, (G,) float32."""
        known = self.survey.mean if self.survey else None
        return gene_means(self.x) if known is None else known


def read_cells(
    adata: AnnData,
    schema: Schema,
    data: Literal["auto", "disk", "memory"] = "memory",
    known: DiskMatrix | None = None,
) -> Cells:
    """Read what a model needs from ``adata``, without writing to it.

    Parameters
    ----------
    adata
        In memory, backed or a view; CSR, CSC, dense or dask; any numeric type; its genes in any order.
    schema
        Where the inputs lie.
    data
        Where values that lie on disk are to be: as for :func:`stays_on_disk`.
    known
        A matrix on disk that was looked at before; if it is the same one, this is not done again.

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
        check_once(adata, key)
    if schema.layer is not None and schema.layer not in adata.layers:
        msg = f"The model was set up with layers[{schema.layer!r}], which this AnnData lacks: {sorted(adata.layers)}."
        raise KeyError(msg)
    where = schema.where
    stored = adata.X if schema.layer is None else adata.layers[schema.layer]
    columns = gene_columns(adata.var_names, schema.var_names)
    if stays_on_disk(stored, data, where):
        x = DiskMatrix(stored, where, columns)
        x = known if x.same(known) else x
        found = x.survey
    else:
        x = take_columns(as_matrix(stored, where), columns)
        found = survey(x, where)
    codes = [schema.codes(key, adata.obs[key]) for key in schema.categories]
    covariates = [numeric_column(adata.obs[key]) for key in schema.continuous]
    if schema.size_factor_key is None:
        library = found.totals.reshape(-1, 1).copy()
    else:
        library = numeric_column(adata.obs[schema.size_factor_key], positive=True).reshape(-1, 1)
    n = x.shape[0]
    return Cells(
        x,
        np.stack(codes, 1) if codes else np.zeros((n, 0), np.int64),
        np.stack(covariates, 1) if covariates else np.zeros((n, 0), np.float32),
        library,
        found,
    )


def check_support(cells: Cells, support: str, where: str) -> None:
    """Check the values against the ``support`` of a likelihood: ``"counts"``, ``"unit"`` or ``"real"``.

    Of counts, cells without any get library size 1, with a warning. ``where`` is what messages call the matrix.
    """
    found = cells.survey or survey(cells.x, where)
    if support == "counts":
        cure = (
            "Pass raw counts (for example layer='counts'), or use likelihood='normal' for log-normalised values "
            "(counts that were corrected to fractions can be rounded: `np.round`)."
        )
        if found.smallest < 0:
            msg = (
                f"{where} holds negative values (smallest {found.smallest:g}); a count likelihood cannot describe "
                f"them. {cure}"
            )
            raise ValueError(msg)
        if found.fractional is not None:
            msg = (
                f"{where} holds values that are not whole numbers, such as {found.fractional:g}: not raw counts. {cure}"
            )
            raise ValueError(msg)
        empty = cells.library[:, 0] <= 0
        if empty.any():
            msg = (
                f"{int(empty.sum())} of {len(cells)} cells have no counts at all in {where}; they carry no "
                "information, and "
                "their library size is taken as 1. `scanpy.pp.filter_cells(adata, min_counts=1)` removes them."
            )
            warnings.warn(msg, UserWarning, stacklevel=5)
            cells.library[empty] = 1
    elif support == "unit" and (found.smallest < 0 or found.largest > 1):
        msg = (
            f"{where} holds values from {found.smallest:g} to {found.largest:g}; a Bernoulli likelihood needs [0, 1]. "
            "Divide images by their largest value, or choose another likelihood."
        )
        raise ValueError(msg)
