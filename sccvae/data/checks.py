"""What ``setup_anndata`` refuses or warns of, before anything is written to an AnnData."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from sccvae.data.categories import check_filled, check_plain, is_label, obs_column
from sccvae.data.confounding import confounding, follows

#: Genes for each cell above which networks lose types, and genes that are few enough whatever the cells. Of 1,000
#: simulated cells 0.88, 0.79 and 0.64 of the neighbours are of the same type with 5,000, 8,000 and 15,000 genes (in
#: principal components 0.91 each), and 0.97 with the 2,000 most variable of 15,000.
GENES_A_CELL, MANY_GENES = 5, 4_000
#: Names of classes that mostly mean that there is none.
NO_LABEL = ("unknown", "unlabeled", "unlabelled", "unassigned", "na", "n/a", "nan", "none", "")
#: Share of its largest value that a covariate must vary by; below it, a model takes it for constant.
SMALLEST_SPREAD = 1e-6
#: Kinds of numpy's dtypes that are no numbers, or two: what they are, and how to make numbers of them.
NO_NUMBERS = {
    "M": ("dates", "({at} - {at}.min()).dt.total_seconds() / 86400"),
    "m": ("durations", "{at}.dt.total_seconds()"),
    "c": ("complex numbers", "{at}.map(abs)"),
}


def check_anndata(adata: Any) -> None:
    """Refuse what is no AnnData."""
    if not isinstance(adata, AnnData):
        msg = f"adata must be an AnnData object, not {type(adata).__name__}."
        raise TypeError(msg)


def check_no_view(adata: AnnData, otherwise: str = "") -> None:
    """Refuse a view, which nothing can be written to; what could be done ``otherwise``."""
    if adata.is_view:
        msg = f"adata is a view of another AnnData; run `adata = adata.copy()` first{otherwise}."
        raise ValueError(msg)


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
        If ``adata`` is no AnnData, keys were given as one string, or one key as a list, a condition or the labels mix
        text with numbers or hold neither (intervals, dates), or a covariate holds dates, durations or complex numbers.
    KeyError
        If a layer or an ``obs`` column is missing.
    ValueError
        If ``adata`` is a view, is empty, has duplicate gene names, a column has missing or unusable values, or is named
        both as categories and as a number.

    Warns
    -----
    UserWarning
        If a covariate or the labels cannot be told from the batch, or two categorical covariates from each other; see
        :func:`confounding`. If there are many genes for so few cells. If a class is called as if it were none
        ("Unknown"), and if a covariate varies too little for its size.
    """
    check_anndata(adata)
    check_no_view(adata)
    _check_values(adata, layer)
    several = {"categorical_covariate_keys": categorical_covariate_keys}
    several |= {"continuous_covariate_keys": continuous_covariate_keys}
    _check_names({"batch_key": batch_key, "labels_key": labels_key, "size_factor_key": size_factor_key}, several)
    categorical = [batch_key, *(categorical_covariate_keys or ())]
    numerical = [size_factor_key, *(continuous_covariate_keys or ())]
    for key in filter(None, [*categorical, labels_key, *numerical]):
        obs_column(adata, key)
    both = sorted({*filter(None, categorical)} & {*filter(None, numerical)})
    if both:
        msg = (
            f"adata.obs[{both[0]!r}] is named as a batch or categorical covariate and as a number; name it once, or "
            f"make a second column: `adata.obs['{both[0]}_group'] = adata.obs[{both[0]!r}].astype(str)`."
        )
        raise ValueError(msg)
    for key in filter(None, categorical):
        check_filled(adata.obs[key])
        check_plain(adata.obs[key])
    _check_labels(adata, labels_key, unlabeled_category)
    if labels_key is not None:
        _warn_of_no_labels(adata.obs[labels_key], unlabeled_category)
    for key in filter(None, numerical):
        values = numeric_column(adata.obs[key], positive=key == size_factor_key)
        if key != size_factor_key:
            _warn_of_lost_digits(adata.obs[key], values)
    if adata.n_vars > max(MANY_GENES, GENES_A_CELL * adata.n_obs):
        msg = (
            f"adata has {adata.n_vars} genes and {adata.n_obs} cells: networks learn so few cells by heart, and lose "
            "types that the most variable genes show. Choose some first, such as with "
            "`scanpy.pp.highly_variable_genes(adata, n_top_genes=2000, flavor='seurat_v3', subset=True)` (of counts; "
            "layer= and batch_key= as here)."
        )
        warnings.warn(msg, UserWarning, stacklevel=3)
    keys = batch_key, labels_key, categorical_covariate_keys, continuous_covariate_keys
    _warn_of_confounding(adata, *keys, unlabeled_category)


def _check_values(adata: AnnData, layer: str | None) -> None:
    """Refuse an AnnData without values, or with two genes of a name."""
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


def _check_names(single: dict[str, str | None], several: dict[str, Sequence[str] | None]) -> None:
    """Refuse several columns where an argument names one, and one where it names several."""
    for name, keys in several.items():
        if isinstance(keys, str):
            msg = f"{name} must be a list; write {name}=[{keys!r}]."
            raise TypeError(msg)
    for name, key in single.items():
        if np.ndim(key):
            more = " Further conditions go into categorical_covariate_keys." if name == "batch_key" else ""
            msg = f"{name}={key!r} must be the name of one column, as {name}={next(iter(key), 'batch')!r}.{more}"
            raise TypeError(msg)


def _check_labels(adata: AnnData, labels_key: str | None, unlabeled_category: str | None) -> None:
    """Refuse labels that are none, or could not be saved."""
    if unlabeled_category is not None and labels_key is None:
        msg = f"unlabeled_category={unlabeled_category!r} needs labels_key, the obs column that it stands in."
        raise ValueError(msg)
    if labels_key is not None:
        labels = is_label(adata.obs[labels_key], unlabeled_category)
        check_plain(adata.obs[labels_key].where(labels))
        if not labels.any():
            n = adata.obs[labels_key].count()
            msg = (
                f"adata.obs[{labels_key!r}] has no label at all: {n} of {adata.n_obs} cells are "
                f"{unlabeled_category!r}, the others NaN. Leave labels_key out."
            )
            raise ValueError(msg)


def _warn_of_confounding(
    adata: AnnData,
    batch_key: str | None,
    labels_key: str | None,
    categorical_covariate_keys: Sequence[str] | None,
    continuous_covariate_keys: Sequence[str] | None,
    unlabeled_category: str | None,
) -> None:
    """Say, in one warning, which columns of the set-up cannot be told from the batch, or from each other."""
    obs = adata.obs
    keys = [key for key in dict.fromkeys([batch_key, *(categorical_covariate_keys or ())]) if key is not None]
    found = [confounding(obs[a], obs[b]) for a, b in combinations(keys, 2)]
    if batch_key is not None:
        if labels_key not in (None, batch_key):
            labels = obs[labels_key].astype(object)
            found.append(confounding(obs[batch_key], labels.where(is_label(labels, unlabeled_category))))
        found += [follows(obs[batch_key], obs[key]) for key in continuous_covariate_keys or ()]
    found = [f"adata.obs: {sentence}" for sentence in found if sentence is not None]
    if found:
        found.append(
            "A model of this set-up can give a difference to either, and removing the batch can remove it. If it is "
            "biology that is to stay, leave out the covariate that holds it, or name a coarser batch_key (or none)."
        )
        warnings.warn("\n".join(found), UserWarning, stacklevel=4)


def _warn_of_no_labels(column: pd.Series, unlabeled_category: Any) -> None:
    """Say which class reads like no label at all."""
    labels = column[is_label(column, unlabeled_category)]
    taken = unlabeled_category is not None and len(labels) < column.count()  # some cells have that value
    alike = NO_LABEL if taken else (*NO_LABEL, str(unlabeled_category).casefold())
    found = [value for value in labels.unique() if str(value).strip().casefold() in alike]
    if found:
        at, name = f"adata.obs[{column.name!r}]", found[0]
        cure = f"`{at} = {at}.where({at} != {name!r})`" if taken else f"`unlabeled_category={name!r}`"
        msg = (
            f"{at}: {name!r} ({int((labels == name).sum())} cells) counts as a class like any other. If these cells "
            f"have no label, say so: {cure}."
        )
        warnings.warn(msg, UserWarning, stacklevel=4)


def _warn_of_lost_digits(column: pd.Series, values: np.ndarray) -> None:
    """Say which covariate, its ``values`` (n,) float32, varies in digits that are lost."""
    exact = pd.to_numeric(column).to_numpy(dtype=np.float64)
    largest, spread = np.abs(exact).max(), exact.std()
    if (values != exact).any() and 1e-12 * largest < spread <= SMALLEST_SPREAD * largest:
        at = f"adata.obs[{column.name!r}]"
        msg = (
            f"{at} varies by {spread:.3g} around {exact.mean():.6g}, too little for numbers of seven digits: the model "
            f"takes it for constant. Subtract what all cells have in common: `{at} = {at} - {at}.mean()`."
        )
        warnings.warn(msg, UserWarning, stacklevel=4)


def numeric_column(column: pd.Series, *, positive: bool = False) -> np.ndarray:
    """A column of ``obs`` as finite float32 numbers (n,); else an error that names the column.

    Raises
    ------
    TypeError
        If the values are dates, durations or complex.
    ValueError
        If a value is not a number, is NaN or infinite, or, with ``positive``, is not above zero.
    """
    numbers = pd.to_numeric(column, errors="coerce")
    kind = {numbers.dtype.kind, column.dtype.kind} & set(NO_NUMBERS)
    if kind:
        what, cure = NO_NUMBERS[kind.pop()]
        at = f"adata.obs[{column.name!r}]"
        msg = f"{at} holds {what}, and numbers are needed: `{at} = {cure.format(at=at)}`."
        raise TypeError(msg)
    values = numbers.to_numpy(dtype=np.float32, na_value=np.nan)
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
