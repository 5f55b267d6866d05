"""Which cells train and which validate."""

from __future__ import annotations

import numpy as np


def split_indices(
    n: int, train_size: float = 0.9, validation_size: float | None = None, seed: int = 0
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

    Returns
    -------
    Three arrays of sorted row numbers, int64, that together hold every cell once. At least one cell trains.

    Raises
    ------
    ValueError
        If the shares do not fit.
    """
    validation_size = 1 - train_size if validation_size is None else validation_size
    if not (0 < train_size <= 1 and validation_size >= 0 and train_size + validation_size <= 1 + 1e-9):
        msg = (
            f"train_size={train_size} and validation_size={validation_size} do not fit: train_size must be in "
            "(0, 1] and "
            "their sum at most 1."
        )
        raise ValueError(msg)
    n_train = max(1, round(n * train_size))
    n_validation = min(n - n_train, round(n * validation_size))
    order = np.random.default_rng(seed).permutation(n)
    parts = np.split(order, [n_train, n_train + n_validation])
    return tuple(np.sort(part) for part in parts)
