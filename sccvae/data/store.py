"""Cells in memory or on disk, gathered many mini-batches at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, distributed

from sccvae._rows import SparseRows
from sccvae.data.ondisk import DiskMatrix
from sccvae.data.read import Cells

#: Most values of x, zeros among them, held by a loader at a time: 2^24 float32 are 64 MB where x is dense.
CHUNK_VALUES = 2**24


class CellStore:
    """Cells that hand out any rows as tensors; sparse data as :class:`~sccvae.nn.SparseRows`.

    Parameters
    ----------
    cells
        The arrays; not copied.
    labels
        Class of each cell, (n,) int64, -1 for unknown; None for no classes.
    """

    def __init__(self, cells: Cells, labels: np.ndarray | None = None) -> None:
        self.cells = cells
        self.labels = labels

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def n_features(self) -> int:
        """Number G of features."""
        return self.cells.x.shape[1]

    def some_rows(self, most: int) -> np.ndarray:
        """Rows of at most ``most`` cells, (n,) int64, in order: of each batch its share at random, the same each time.

        Cells that are so few are all there. The batch is the first condition, if there is one.
        """
        batch = self.cells.codes[:, :1].sum(1)  # zeros where there is no condition
        by_batch = np.lexsort((np.random.default_rng(0).random(len(batch)), batch))
        return np.sort(by_batch[:: max(1, -(-len(batch) // most))])

    def subset(self, rows: np.ndarray) -> CellStore:
        """These rows, in memory."""
        cells = Cells(self.cells.x[rows], self.cells.codes[rows], self.cells.covariates[rows], self.cells.library[rows])
        return CellStore(cells, None if self.labels is None else self.labels[rows])

    def gather(self, rows: np.ndarray) -> dict[str, Tensor | SparseRows]:
        """Rows on the CPU: ``x`` (n, G), sparse or dense, ``codes``, ``covariates``, ``library``, any ``labels``."""
        x = _some(self.cells.x, rows)
        more = {} if self.labels is None else {"labels": torch.from_numpy(self.labels[rows])}
        return more | {
            "x": x if isinstance(x, SparseRows) else torch.from_numpy(x),
            "codes": torch.from_numpy(self.cells.codes[rows]),
            "covariates": torch.from_numpy(self.cells.covariates[rows]),
            "library": torch.from_numpy(self.cells.library[rows]),
        }


class ChunkLoader:
    """Iterate over chunks, each a list of mini-batches (dictionaries of tensors).

    Every cell comes once; with several processes once in one of them, and all have the same number of mini-batches.
    Mini-batches differ by at most one cell in size and never exceed ``batch_size``, so from a ``batch_size`` of 3 on
    there is no last mini-batch of a single cell (batch norm cannot work on one) unless there is a single cell.

    Parameters
    ----------
    store
        The cells.
    rows
        Which of them, (n,) int64.
    batch_size
        Most cells of a mini-batch.
    shuffle
        A new full permutation in each epoch, drawn from (seed, epoch): a resumed run sees the same order.
    seed
        Of the permutations.
    n_processes
        Processes of ``torch.distributed`` that share the rows; each takes every so-many-th.
    """

    def __init__(
        self,
        store: CellStore,
        rows: np.ndarray,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        n_processes: int = 1,
    ) -> None:
        if batch_size < 1:
            msg = f"batch_size={batch_size} must be at least 1."
            raise ValueError(msg)
        self.store, self.rows, self.batch_size = store, np.asarray(rows), batch_size
        self.shuffle, self.seed, self.n_processes = shuffle, seed, n_processes
        self.n_batches = math.ceil(math.ceil(len(self.rows) / n_processes) / batch_size)
        self.per_chunk = max(1, CHUNK_VALUES // (store.n_features * batch_size))
        self.epoch = 0

    def __len__(self) -> int:
        """Number of chunks."""
        return -(-self.n_batches // self.per_chunk)

    def __iter__(self) -> Iterator[list[dict[str, Tensor | SparseRows]]]:
        rows = self.rows
        if self.shuffle:
            rows = np.random.default_rng((self.seed, self.epoch)).permutation(rows)
        self.epoch += 1
        if self.n_processes > 1:
            rows = rows[distributed.get_rank() :: self.n_processes]
        batches = np.array_split(rows, max(1, self.n_batches))
        for start in range(0, self.n_batches, self.per_chunk):
            part = batches[start : start + self.per_chunk]
            yield mini_batches(self.store.gather(np.concatenate(part)), [len(b) for b in part])


def _some(x: np.ndarray | sparse.csr_matrix | DiskMatrix, rows: np.ndarray) -> np.ndarray | SparseRows:
    """Rows of a matrix, values copied; in a fifth of scipy's time where they follow each other in memory."""
    in_order = len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all()
    if in_order and not isinstance(x, DiskMatrix) and sparse.issparse(x):
        starts = x.indptr[rows[0] : rows[-1] + 2]
        within = slice(starts[0], starts[-1])
        columns = np.require(x.indices[within], requirements="W")  # torch warns of what cannot be written to
        return _sparse(starts - starts[0], columns, x.data[within].copy(), x.shape[1])
    x = x[rows]
    return _sparse(x.indptr, x.indices, x.data, x.shape[1]) if sparse.issparse(x) else x


def _sparse(starts: np.ndarray, columns: np.ndarray, values: np.ndarray, n_columns: int) -> SparseRows:
    parts = starts.astype(np.int64), columns.astype(np.int32, copy=False), values
    return SparseRows(*(torch.from_numpy(part) for part in parts), n_columns)


def mini_batches(tensors: dict[str, Tensor | SparseRows], sizes: list[int]) -> list[dict[str, Tensor | SparseRows]]:
    """Tensors (n, ...) cut into mini-batches of these sizes, which add up to n; views of all that is large."""
    split = {name: t.split(sizes) for name, t in tensors.items()}
    return [{name: t[i] for name, t in split.items()} for i in range(len(sizes))]
