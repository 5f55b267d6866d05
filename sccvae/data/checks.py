"""What ``setup_anndata`` refuses or warns of, before anything is written to an AnnData."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from sccvae.data.categories import check_plain, is_label
from sccvae.data.confounding import confounding

#: Genes for each cell above which networks lose types, and genes that are few enough whatever the cells. Of 1,000
#: simulated cells 0.88, 0.79 and 0.64 of the neighbours are of the same type with 5,000, 8,000 and 15,000 genes (in
#: principal components 0.91 each), and 0.97 with the 2,000 most variable of 15,000.
GENES_A_CELL, MANY_GENES = 5, 4_000


def check_setup(
    adata: AnnData,
    layer: str | None = None,
    batch_key: str | None = None,
    labels_key: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    unlabeled_category: str | None = None,
) -> None:
    """Check that everything named for ``setup_anndata`` is there and usable, before anything is written to ``adata``.

    Parameters
    ----------
    adata
        The cells.
    layer
        Layer of the values, None for X.
    batch_key, labels_key, size_factor_key
        ``obs`` columns, or None.
    categorical_covariate_keys, continuous_covariate_keys
        Lists of ``obs`` columns, or None.
    unlabeled_category
        Value of ``labels_key`` that stands for no label, or None.

    Raises
    ------
    TypeError
        If ``adata`` is no AnnData, keys were given as one string, or a condition mixes text with numbers or holds
        neither (intervals, dates).
    KeyError
        If a layer or an ``obs`` column is missing.
    ValueError
        If ``adata`` is a view, is empty, has duplicate gene names, or a column has missing or unusable values.

    Warns
    -----
    UserWarning
        If a categorical covariate or the labels cannot be told from the batch; see :func:`confounding`. If there are
        many genes for so few cells.
    """
    if not isinstance(adata, AnnData):
        msg = f"adata must be an AnnData object, not {type(adata).__name__}."
        raise TypeError(msg)
    if adata.is_view:
        msg = (
            "adata is a view of another AnnData; run `adata = adata.copy()` first, so that the setup has a place "
            "to stay."
        )
        raise ValueError(msg)
    if 0 in adata.shape:
        msg = f"adata has {adata.n_obs} cells and {adata.n_vars} genes; there is nothing to model."
        raise ValueError(msg)
    if not adata.var_names.is_unique:
        twice = adata.var_names[adata.var_names.duplicated()][0]
        msg = f"adata.var_names are not unique ({twice!r} stands twice); run `adata.var_names_make_unique()` first."
        raise ValueError(msg)
    if layer is not None and layer not in adata.layers:
        msg = f"There is no adata.layers[{layer!r}]; the layers are {sorted(adata.layers)}. Use layer=None for adata.X."
        raise KeyError(msg)
    if layer is None and adata.X is None:
        msg = f"adata.X is None; pass layer= with one of {sorted(adata.layers)}."
        raise ValueError(msg)
    for name, keys in [
        ("categorical_covariate_keys", categorical_covariate_keys),
        ("continuous_covariate_keys", continuous_covariate_keys),
    ]:
        if isinstance(keys, str):
            msg = f"{name} must be a list; write {name}=[{keys!r}]."
            raise TypeError(msg)
    categorical = [batch_key, *(categorical_covariate_keys or ())]
    numerical = [size_factor_key, *(continuous_covariate_keys or ())]
    for key in filter(None, [*categorical, labels_key, *numerical]):
        if key not in adata.obs:
            msg = f"There is no adata.obs[{key!r}]; the columns are {list(adata.obs.columns)}."
            raise KeyError(msg)
    for key in filter(None, categorical):
        missing = int(adata.obs[key].isna().sum())
        if missing:
            msg = (
                f"adata.obs[{key!r}] is missing (NaN) for {missing} of {adata.n_obs} cells. Give them a "
                "category of their "
                f"own (`adata.obs[{key!r}] = adata.obs[{key!r}].astype(object).fillna('unknown')`) or leave "
                "these cells out."
            )
            raise ValueError(msg)
        check_plain(adata.obs[key])
        other = [v for v in adata.obs[key].unique() if not isinstance(v, str)]
        if 0 < len(other) < adata.obs[key].nunique():
            msg = (
                f"adata.obs[{key!r}] mixes text with values such as {other[0]!r} ({type(other[0]).__name__}), which "
                f"cannot be sorted. Make all of them text: `adata.obs[{key!r}] = adata.obs[{key!r}].astype(str)`."
            )
            raise TypeError(msg)
    if unlabeled_category is not None and labels_key is None:
        msg = f"unlabeled_category={unlabeled_category!r} needs labels_key, the obs column that it stands in."
        raise ValueError(msg)
    if labels_key is not None:
        check_plain(adata.obs[labels_key])
        if not is_label(adata.obs[labels_key], unlabeled_category).any():
            n = adata.obs[labels_key].count()
            msg = (
                f"adata.obs[{labels_key!r}] has no label at all: {n} of {adata.n_obs} cells are "
                f"{unlabeled_category!r}, the others NaN. Leave labels_key out."
            )
            raise ValueError(msg)
    for key in filter(None, numerical):
        numeric_column(adata.obs[key], positive=key == size_factor_key)
    if adata.n_vars > max(MANY_GENES, GENES_A_CELL * adata.n_obs):
        msg = (
            f"adata has {adata.n_vars} genes and {adata.n_obs} cells: networks learn so few cells by heart, and lose "
            "types that the most variable genes show. Choose some first, such as with "
            "`scanpy.pp.highly_variable_genes(adata, n_top_genes=2000, flavor='seurat_v3', subset=True)` (of counts; "
            "layer= and batch_key= as here)."
        )
        warnings.warn(msg, UserWarning, stacklevel=3)
    _warn_of_confounding(adata, batch_key, labels_key, categorical_covariate_keys, unlabeled_category)


def _warn_of_confounding(
    adata: AnnData,
    batch_key: str | None,
    labels_key: str | None,
    categorical_covariate_keys: Sequence[str] | None,
    unlabeled_category: str | None,
) -> None:
    """Say, in one warning, which columns of the set-up cannot be told from the batch."""
    if batch_key is None:
        return
    columns = {key: adata.obs[key] for key in categorical_covariate_keys or ()}
    if labels_key is not None:
        labels = adata.obs[labels_key].astype(object)
        columns[labels_key] = labels.where(is_label(labels, unlabeled_category))
    found = [confounding(adata.obs[batch_key], column) for key, column in columns.items() if key != batch_key]
    found = [f"adata.obs: {sentence}" for sentence in found if sentence is not None]
    if found:
        found.append(
            "A model of this set-up can give a difference to either, and removing the batch can remove it. If it is "
            "biology that is to stay, name a coarser batch_key (or none)."
        )
        warnings.warn("\n".join(found), UserWarning, stacklevel=4)


def numeric_column(column: pd.Series, *, positive: bool = False) -> np.ndarray:
    """A column of ``obs`` as finite float32 numbers (n,); else an error that names the column.

    Raises
    ------
    ValueError
        If a value is not a number, is NaN or infinite, or, with ``positive``, is not above zero.
    """
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float32, na_value=np.nan)
    bad = ~np.isfinite(values) | (positive & (values <= 0))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        kind = "positive finite" if positive else "finite"
        msg = (
            f"adata.obs[{column.name!r}] must hold {kind} numbers; {int(bad.sum())} of {len(bad)} cells do not "
            f"(first: {column.iloc[first]} in cell {column.index[first]!r})."
        )
        raise ValueError(msg)
    return values
