"""What a design cannot tell apart: the batch and another column of the set-up."""

from __future__ import annotations

import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components

#: Names that a message lists before it says how many more there are.
LISTED = 5


def confounding(batch: pd.Series, other: pd.Series) -> str | None:
    """Say what cannot be told from the batch, if anything.

    Batches and categories that share cells are linked. Where links lead from every category to every other, by way of
    other batches, differences between categories can be told from those between batches (as in an additive linear
    model with two factors). Where the links fall into separate parts, differences between the parts cannot.

    Parameters
    ----------
    batch, other
        Two columns, (n,); cells with a missing value in either do not count.

    Returns
    -------
    A sentence that names the columns and the parts, or None: the columns are crossed, or one is constant.
    """
    pairs = pd.DataFrame({"batch": batch.astype(str), "other": other.astype(str)})
    pairs = pairs[(batch.notna() & other.notna()).to_numpy()].drop_duplicates()
    (i, batches), (j, others) = pairs["batch"].factorize(sort=True), pairs["other"].factorize(sort=True)
    if len(batches) < 2 or len(others) < 2:
        return None
    n = len(batches) + len(others)
    links = sparse.coo_matrix(([1] * len(i), (i, j + len(batches))), shape=(n, n))
    n_parts, part = connected_components(links, directed=False)
    if n_parts == 1:
        return None
    part_of_batch, part_of_other = part[: len(batches)], part[len(batches) :]
    parts = [
        f"{_names(others[part_of_other == k])} only in {_names(batches[part_of_batch == k])}" for k in range(n_parts)
    ]
    b, o = repr(batch.name), repr(other.name)
    if n_parts == len(batches) == len(others):
        what = f"{b} and {o} split the cells in the same way"
        result = f"the effect of {o} cannot be told from that of {b}"
    elif n_parts == len(others):
        what = f"{b} is nested in {o}: every category of {b} has a single category of {o}"
        result = f"the effect of {o} cannot be told from differences between the categories of {b}"
    elif n_parts == len(batches):
        what = f"{o} is nested in {b}: every category of {o} occurs in a single category of {b}"
        result = f"only differences of {o} within one {b} can be told from the effect of {b}"
    else:
        what = f"{b} and {o} fall into {n_parts} parts that share no category"
        result = f"differences of {o} between these parts cannot be told from the effect of {b}"
    shown = "; ".join(parts[:LISTED]) + (f"; and {n_parts - LISTED} more" if n_parts > LISTED else "")
    return f"{what} ({shown}), so {result}."


def _names(names: pd.Index) -> str:
    listed = ", ".join(names[:LISTED])
    return listed if len(names) <= LISTED else f"{listed} and {len(names) - LISTED} more"
