"""Which cells train and which validate, and which a user means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def split_indices(
    n: int,
    train_size: float = 0.9,
    validation_size: float | None = None,
    seed: int = 0,
    classes: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split ``n`` cells at random into training, validation and test cells.

    Parameters
    ----------
    n
        Number of cells.
    train_size, validation_size
        Shares of the cells; ``validation_size=None`` takes the rest, so that no test cells are left.
    seed
        Of the permutation.
    classes
        Class of each cell, (n,) int64, -1 for none. One cell of each trains, if there is room: it changes places with
        a training cell that no class needs.

    Returns
    -------
    Three arrays of sorted row numbers, int64, that together hold every cell once. At least one cell trains.

    Raises
    ------
    ValueError
        If the shares do not fit.
    """
    rest = validation_size is None
    validation_size = 1 - train_size if rest else validation_size
    if not (0 < train_size <= 1 and validation_size >= 0 and train_size + validation_size <= 1 + 1e-9):
        msg = (
            f"train_size={train_size} and validation_size={validation_size} do not fit: train_size must be in "
            "(0, 1] and "
            "their sum at most 1."
        )
        raise ValueError(msg)
    n_train = max(1, round(n * train_size))
    n_validation = n - n_train if rest else min(n - n_train, round(n * validation_size))
    order = np.random.default_rng(seed).permutation(n)
    if classes is not None:
        _let_each_train(order, n_train, classes)
    parts = np.split(order, [n_train, n_train + n_validation])
    return tuple(np.sort(part) for part in parts)


def _let_each_train(order: np.ndarray, n_train: int, classes: np.ndarray) -> None:
    """Change ``order`` (n,) so that its first ``n_train`` rows hold a cell of each class, as far as there is room."""
    for k in np.setdiff1d(classes[order[n_train:]], [-1, *classes[order[:n_train]]]):
        trains = classes[order[:n_train]]
        own, size = np.unique(trains, return_counts=True)
        spare = np.flatnonzero((trains < 0) | np.isin(trains, own[size > 1]))
        if not len(spare):
            return
        one = n_train + np.argmax(classes[order[n_train:]] == k)
        spare = spare[np.argmin(trains[spare])]  # one without a class, if there is any
        order[[spare, one]] = order[[one, spare]]


def row_numbers(indices: ArrayLike | slice | None, n_cells: int, name: str = "indices") -> np.ndarray:
    """Rows that ``indices`` selects of ``n_cells`` cells, (n,) int64, in the order given, from 0 on.

    These are numbers of rows, negative ones from the end; a mask (n_cells,) bool; a slice; or None for all. Errors call
    them by their ``name``.
    """
    if indices is None or isinstance(indices, slice):
        rows = np.arange(n_cells)[indices or slice(None)]
    else:
        rows = np.asarray(indices)
    if rows.dtype == bool:
        if len(rows) != n_cells:
            msg = f"{name} is a mask of {len(rows)} values, but there are {n_cells} cells."
            raise ValueError(msg)
        rows = np.flatnonzero(rows)
    if not rows.size:
        msg = f"{name} selects no cell."
        raise ValueError(msg)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        msg = (
            f"{name}={indices!r:.60} must be whole numbers of rows, a mask or a slice; for names of cells take "
            "`adata.obs_names.get_indexer(names)`."
        )
        raise TypeError(msg)
    rows = rows.astype(np.int64)
    far = rows[(rows < -n_cells) | (rows >= n_cells)]
    if len(far):
        msg = f"{name} holds {far[0]}, but there are {n_cells} cells: rows go from 0 to {n_cells - 1}."
        raise IndexError(msg)
    return np.where(rows < 0, rows + n_cells, rows)
