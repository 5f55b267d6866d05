"""Which cells differential expression compares."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from sccvae.data.categories import match, obs_column
from sccvae.data.splits import row_numbers

#: Cells of a group below which their spread cannot be told (simulated, against 400 cells: of the genes found at 5 %,
#: 12 % are false with 10 cells, 10 % with 12, 6 % with 16).
FEW = 15
#: Column that a query of ``obs`` takes along.
ROW = "row of sccvae"


@dataclass(frozen=True)
class Comparison:
    """Two groups of cells: their names, and their rows (n,) int64."""

    name1: str
    name2: str
    rows1: np.ndarray
    rows2: np.ndarray

    def __str__(self) -> str:
        return f"{self.name1} vs {self.name2}"


def comparisons(
    adata: AnnData, groupby: str | None, group1: Any, group2: Any, idx1: Any, idx2: Any
) -> list[Comparison]:
    """The comparisons that the arguments of ``differential_expression`` name; a warning where a group is small."""
    by_groups, by_rows = (any(v is not None for v in way) for way in ((groupby, group1, group2), (idx1, idx2)))
    if by_groups == by_rows or (groupby is None and idx1 is None):
        msg = (
            "Give either groupby=, the obs column of the groups, with group1= and group2=; or idx1=, the cells of "
            "the first group, with idx2=."
        )
        raise ValueError(msg)
    for name, value, cure in (
        ("groupby", groupby, "it is one column of adata.obs"),
        ("group2", group2, "it is one group; to compare with several taken together, give their cells as idx2="),
    ):
        if pd.api.types.is_list_like(value):
            msg = f"{name}={value!r} names several: {cure}."
            raise TypeError(msg)
    if groupby is None:
        found = [Comparison("one", "Rest" if idx2 is None else "two", *_rows(adata, idx1, idx2))]
    else:
        found = _by_groups(adata, groupby, group1, group2)
    few = [
        f"{len(rows)} cells in one group of '{one}'"
        for one in found
        for rows in (one.rows1, one.rows2)
        if len(rows) < FEW
    ]
    if few:
        msg = f"{few[0]}: from so few the spread of a gene cannot be told, and false discovery rates are too low."
        warnings.warn(msg, UserWarning, stacklevel=3)
    return found


def warn_of_parted_batches(found: list[Comparison], batch: np.ndarray, key: str) -> None:
    """Say which comparisons are of groups without a common batch; ``batch`` is that of each cell, (n,)."""
    parted = [str(one) for one in found if not np.intersect1d(batch[one.rows1], batch[one.rows2]).size]
    if parted:
        msg = (
            f"{parted[0]!r}{f' and {len(parted) - 1} more' if parted[1:] else ''}: the two groups have no "
            f"obs[{key!r}] in common, and both are decoded in the same batches. What the model takes for a difference "
            "between their batches is no change then, even if it is biology. To compare the groups each in its own "
            "batches, pass batch_correction=False."
        )
        warnings.warn(msg, UserWarning, stacklevel=4)


def warn_of_common_shifts(found: list[Comparison], shifts: list[float], delta: float) -> None:
    """Say in which comparisons most genes change by more than half of ``delta``, all by the same."""
    moved = [(str(one), shift) for one, shift in zip(found, shifts, strict=True) if abs(shift) > delta / 2]
    if moved:
        name, shift = moved[0]
        msg = (
            f"{name!r}{f' and {len(moved) - 1} more' if moved[1:] else ''}: most genes shift together, by {shift:.2g}, "
            f"which is much for delta={delta}. A strong gene that takes a share of one group's counts does that to the "
            "proportions of all others. Leave that gene out when the model is made, or raise delta."
        )
        warnings.warn(msg, UserWarning, stacklevel=3)


def _by_groups(adata: AnnData, groupby: str, group1: Any, group2: Any) -> list[Comparison]:
    """One comparison for each group of ``group1``."""
    column = obs_column(adata, groupby, "groupby")
    known = pd.Series(sorted(column.dropna().unique(), key=str), dtype=object)
    names = known.astype(str)
    known, names = known[~names.duplicated()].to_numpy(), names.drop_duplicates().tolist()
    if len(names) < 2:
        msg = f"adata.obs[{groupby!r}] has {len(names)} group: differential expression compares two."
        raise ValueError(msg)

    def codes(groups: Any) -> list[int]:
        found = match(known, pd.Series(groups, dtype=object)).tolist()
        unknown = [str(group) for group, code in zip(groups, found, strict=True) if code < 0]
        if unknown or not found:
            msg = f"adata.obs[{groupby!r}] has no cells in {unknown or group1!r}; its groups are {names}."
            raise ValueError(msg)
        return found

    second = None if group2 is None else codes([group2])[0]
    if group1 is None:
        if len(names) > len(column) / 2:
            msg = (
                f"adata.obs[{groupby!r}] has {len(names)} values for {len(column)} cells: no groups. Cut it into some "
                "(`pd.cut`), or name those to compare with group1=."
            )
            raise ValueError(msg)
        first = [code for code in range(len(names)) if code != second]
    else:
        first = codes(list(group1) if np.ndim(group1) else [group1])
    if second in first:
        msg = f"group1 and group2 are both {names[second]!r}: compare two groups."
        raise ValueError(msg)
    code = match(known, column)

    def others(one: int) -> np.ndarray:
        return np.flatnonzero((code >= 0) & (code != one) if second is None else code == second)

    name2 = "Rest" if second is None else names[second]
    return [Comparison(names[one], name2, np.flatnonzero(code == one), others(one)) for one in first]


def _rows(adata: AnnData, idx1: Any, idx2: Any) -> Iterator[np.ndarray]:
    one = None
    for name, idx in (("idx1", idx1), ("idx2", idx2)):
        if isinstance(idx, str):  # by number: names of cells may be there twice
            table = adata.obs.assign(**{ROW: np.arange(adata.n_obs)})
            try:
                idx = table.query(idx)[ROW].to_numpy()
            except Exception as error:  # of pandas, of Python's parser, or of what the query calls
                msg = (
                    f"{name}={idx!r} is no query of adata.obs: {error}. Its columns are {list(adata.obs.columns)}; "
                    "write the value itself in place of a variable (@x)."
                )
                raise ValueError(msg) from error
        elif idx is None:
            idx = np.setdiff1d(np.arange(adata.n_obs), one)
        one = row_numbers(idx, adata.n_obs, name)
        yield one
