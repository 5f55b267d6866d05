"""One look at cells without training, shared by the trainings in phases."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sccvae.data import CellStore, ChunkLoader
from sccvae.module import Batch, GenerativeModule

#: Cells of a mini-batch when nothing is trained.
LOOK_BATCH = 1024


@torch.no_grad()
def over_cells(
    module: GenerativeModule, store: CellStore, rows: np.ndarray, look: Callable[[Batch], Tensor]
) -> np.ndarray:
    """``look(batch)`` over mini-batches of the rows, in order, without labels; leaves the module in evaluation mode.

    Parameters
    ----------
    module
        The model.
    store
        The cells.
    rows
        Which of them, (n,) int64.
    look
        Gives one row for each cell of a batch.

    Returns
    -------
    (n, ...) what ``look`` gave, joined.
    """
    module.eval()
    found = [
        look(Batch.on(module.device, {name: t for name, t in tensors.items() if name != "labels"}))
        for chunk in ChunkLoader(store, rows, LOOK_BATCH)
        for tensors in chunk
    ]
    return torch.cat(found).cpu().numpy()


def some_of_each(rows: np.ndarray, classes: np.ndarray, most: int, seed: int, each: int = 50) -> np.ndarray:
    """At most so many of the rows, drawn at random, in order, with up to ``each`` of every class among them.

    Parameters
    ----------
    rows
        (n,) int64.
    classes
        Their classes, (n,).
    most
        How many at most.
    seed
        Of the draw.
    each
        Cells of a class that come first; fewer, if there are too many classes for so many.

    Returns
    -------
    (m,) int64, m <= most.
    """
    if len(rows) <= most:
        return rows
    order = np.random.default_rng(seed).permutation(len(rows))
    rank = pd.Series(order).groupby(classes[order]).cumcount().to_numpy()
    each = min(each, max(1, most // len(np.unique(classes))))
    return rows[np.sort(order[np.argsort(rank >= each, kind="stable")][:most])]


def some_rows(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many of the rows, drawn at random, in order.

    Parameters
    ----------
    rows
        (n,) int64.
    most
        How many at most.
    seed
        Of the draw.

    Returns
    -------
    (m,) int64, m <= most.
    """
    return rows if len(rows) <= most else np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
