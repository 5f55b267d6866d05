"""What a design cannot tell apart: the batch and another column of the set-up, or two others."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components

#: Names that a message lists before it says how many more there are.
LISTED = 5
#: Share of the cells of both a batch and a category below which the cells that they share hardly link them.
WEAK = 0.01


def confounding(batch: pd.Series, other: pd.Series) -> str | None:
    """Say what cannot, or hardly, be told from the batch, if anything.

    Batches and categories that share cells are linked. Where links lead from every category to every other, by way of
    other batches, differences between categories can be told from those between batches (as in an additive linear
    model with two factors). Where the links fall into separate parts, differences between the parts cannot; where they
    do without links of a few cells, hardly.

    Parameters
    ----------
    batch, other
        Two columns, (n,); cells with a missing value in either do not count.

    Returns
    -------
    A sentence that names the columns and the parts, or None: the columns are crossed, or one is constant.
    """
    both = (batch.notna() & other.notna()).to_numpy()
    (i, batches), (j, others) = (c[both].astype(str).factorize(sort=True) for c in (batch, other))
    if len(batches) < 2 or len(others) < 2:
        return None
    shared = pd.DataFrame({"i": i, "j": j}).value_counts()  # cells of each pair that has some
    row, column = (shared.index.get_level_values(k).to_numpy() for k in "ij")
    cells, shape, few = shared.to_numpy(), (len(batches), len(others)), 0
    part = _parts(row, column, shape)
    if not part.any():  # all are linked; but by how many cells?
        weak = cells < WEAK * np.minimum(np.bincount(i)[row], np.bincount(j)[column])
        part, few = _parts(row[~weak], column[~weak], shape), cells[weak].sum()
    if not part.any():
        return None
    n_parts, part_of_batch, part_of_other = part.max() + 1, part[: len(batches)], part[len(batches) :]
    parts = [
        f"{_names(others[part_of_other == k])} only in {_names(batches[part_of_batch == k])}" for k in range(n_parts)
    ]
    b, o, cannot = repr(batch.name), repr(other.name), "can hardly" if few else "cannot"
    if n_parts == len(batches) == len(others):
        what = f"{b} and {o} split the cells in the same way"
        result = f"the effect of {o} {cannot} be told from that of {b}"
    elif n_parts == len(others):
        what = f"{b} is nested in {o}: every category of {b} has a single category of {o}"
        result = f"the effect of {o} {cannot} be told from differences between the categories of {b}"
    elif n_parts == len(batches):
        what = f"{o} is nested in {b}: every category of {o} occurs in a single category of {b}"
        result = f"only differences of {o} within one {b} can be told from the effect of {b}"
    else:
        what = f"{b} and {o} fall into {n_parts} parts that share no category"
        result = f"differences of {o} between these parts {cannot} be told from the effect of {b}"
    what += f", but for {few} of {len(i)} cells" if few else ""
    shown = "; ".join(parts[:LISTED]) + (f"; and {n_parts - LISTED} more" if n_parts > LISTED else "")
    return f"{what} ({shown}), so {result}."


def _parts(batch: np.ndarray, other: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Part that each batch, then each category, is in, of so many, where these pairs are linked."""
    links = sparse.coo_matrix((np.ones(len(batch)), (batch, other + shape[0])), shape=(sum(shape), sum(shape)))
    return connected_components(links, directed=False)[1]


def follows(batch: pd.Series, number: pd.Series) -> str | None:
    """Say that a continuous covariate hardly varies within batches, if so.

    Parameters
    ----------
    batch, number
        Two columns, (n,).

    Returns
    -------
    A sentence that names the columns, or None.
    """
    values = number.astype(float)
    if batch.nunique() < 2 or values.nunique() < 2:
        return None
    whole = values.var(ddof=0)
    within = (values - values.groupby(batch.to_numpy(), observed=True).transform("mean")).var(ddof=0)
    if within >= WEAK * whole:
        return None
    return (
        f"{number.name!r} hardly varies within {batch.name!r} ({within / whole:.1%} of its variance), so its effect "
        "cannot be told from that of the batch."
    )


def _names(names: pd.Index) -> str:
    listed = ", ".join(names[:LISTED])
    return listed if len(names) <= LISTED else f"{listed} and {len(names) - LISTED} more"
