"""Categories in ``obs``: which values are labels, which are the same, which can be saved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData


def is_label(column: pd.Series, unlabeled_category: Any) -> np.ndarray:
    """Which values of a column are labels, (n,) bool: not what is missing or matches ``unlabeled_category``."""
    known = column.notna().to_numpy()
    if unlabeled_category is None:
        return known
    return known & (match(np.array([unlabeled_category], dtype=object), column) < 0)


def match(known: np.ndarray, column: pd.Series) -> np.ndarray:
    """Where values (n,) stand among the known ones, each there once; (n,) int64, -1 for what is new or missing.

    By value, then by text (1 is 1.0, and "1", as a file may hold it). Text and numbers are compared as numbers in the
    end: "-1", as on a command line, is -1.0.
    """
    index = pd.Index(known)
    codes = index.get_indexer(column.astype(object))
    if (codes < 0).any():
        codes = np.where(codes < 0, index.astype(str).get_indexer(column.astype(str)), codes)
    texts = [all(isinstance(v, str) for v in values) for values in (index, column.dropna().unique())]
    if (codes < 0).any() and texts[0] != texts[1]:
        numbers = pd.Index(pd.to_numeric(pd.Series(index.astype(str)), errors="coerce"))
        if numbers.dropna().is_unique:
            wanted = pd.to_numeric(column.astype(str), errors="coerce").to_numpy(dtype=float, na_value=np.nan)
            at = pd.Series(np.arange(len(numbers)), numbers)[numbers.notna()].reindex(wanted, fill_value=-1)
            codes = np.where(codes < 0, np.where(np.isnan(wanted), -1, at), codes)
    return np.where(column.isna(), -1, codes).astype(np.int64)


def check_once(adata: AnnData, key: str) -> None:
    """Refuse a column of ``obs`` that stands there twice, as after ``pd.concat(axis=1)``."""
    if isinstance(adata.obs[key], pd.DataFrame):
        msg = (
            f"adata.obs has {adata.obs[key].shape[1]} columns called {key!r}; keep one: "
            "`adata.obs = adata.obs.loc[:, ~adata.obs.columns.duplicated()]`."
        )
        raise ValueError(msg)


def obs_column(adata: AnnData, key: str, argument: str = "") -> pd.Series:
    """A column of ``obs``, named by a user's ``argument``; an error if it is not there, or twice."""
    if key not in adata.obs:
        what = f"{argument}={key!r}: there" if argument else "There"
        msg = f"{what} is no adata.obs[{key!r}]; the columns are {list(adata.obs.columns)}."
        raise KeyError(msg)
    check_once(adata, key)
    return adata.obs[key]


def of_cells(values: Any, names: pd.Index, what: str) -> Any:
    """A user's values of cells (n,), in the order of the cells' ``names``: a Series by its index, others as they are.

    A Series that is merely numbered has values in order, too.
    """
    if isinstance(values, pd.Series) and not isinstance(values.index, pd.RangeIndex) and not values.index.equals(names):
        if not values.index.is_unique or len(names.difference(values.index)):
            msg = (
                f"{what} is a Series whose index {list(values.index[:3])}... is not that of the cells, "
                f"{list(names[:3])}...: give it adata.obs_names, or pass `.to_numpy()` if its order is theirs."
            )
            raise ValueError(msg)
        values = values.reindex(names)
    if len(values) != len(names):
        msg = f"{what} has {len(values)} values for {len(names)} cells."
        raise ValueError(msg)
    return values


def check_filled(column: pd.Series, cells: str = "cells", instead: str = "unknown") -> None:
    """Refuse a column of ``obs`` with missing values, for these ``cells``; what could stand there ``instead``."""
    missing = int(column.isna().sum())
    if missing:
        at = f"adata.obs[{column.name!r}]"
        msg = (
            f"{at} is missing (NaN) for {missing} of {len(column)} {cells}. Give them a category of their own "
            f"(`{at} = {at}.astype(object).fillna({instead!r})`) or leave these cells out."
        )
        raise ValueError(msg)


def check_plain(column: pd.Series) -> None:
    """Refuse categories that cannot be saved with a model, as the intervals of ``pd.cut``, or not be sorted.

    Text beside numbers is neither: 1 and "1" would be two categories of one name.
    """
    values = column.dropna().unique()
    numbers = [v for v in values if not isinstance(v, str)]
    other = [v for v in numbers if not isinstance(v, bool | int | float | np.generic)]
    at = f"adata.obs[{column.name!r}]"
    text = "map(str, na_action='ignore')" if column.hasnans else "astype(str)"  # which makes text of what is missing
    cure = f"Make all of them text: `{at} = {at}.{text}`."
    if other:
        msg = f"{at} holds {other[0]!r} ({type(other[0]).__name__}), which is neither text nor a number. {cure}"
        raise TypeError(msg)
    if 0 < len(numbers) < len(values):
        what = f"{numbers[0]!r} ({type(numbers[0]).__name__})"
        msg = f"{at} mixes text with values such as {what}, which cannot be sorted. {cure}"
        raise TypeError(msg)
