"""Cells in memory or on disk, gathered many mini-batches at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, distributed

from sccvae.data.read import Cells

#: A matrix as CSR: row starts, columns, values.
Stored = tuple[Tensor, Tensor, Tensor]

#: Most values of x held dense at a time by a loader: 2^24 float32 are 64 MB.
CHUNK_VALUES = 2**24


class CellStore:
    """Cells that hand out any rows as dense tensors; sparse data stay sparse until then.

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

    def subset(self, rows: np.ndarray) -> CellStore:
        """These rows, in memory."""
        cells = Cells(self.cells.x[rows], self.cells.codes[rows], self.cells.covariates[rows], self.cells.library[rows])
        return CellStore(cells, None if self.labels is None else self.labels[rows])

    def gather(self, rows: np.ndarray) -> dict[str, Tensor | Stored]:
        """Rows as tensors on the CPU: ``x`` (n, G) dense, ``codes``, ``covariates``, ``library``, any ``labels``.

        Where x is sparse, ``stored`` has it as CSR beside: row starts (n + 1,) int64, columns and values (nnz,).
        """
        x = self.cells.x[rows]
        more = {} if self.labels is None else {"labels": torch.from_numpy(self.labels[rows])}
        if sparse.issparse(x):
            more["stored"] = tuple(torch.from_numpy(a) for a in (x.indptr.astype(np.int64), x.indices, x.data))
        return more | {
            "x": torch.from_numpy(x.toarray() if sparse.issparse(x) else x),
            "codes": torch.from_numpy(self.cells.codes[rows]),
            "covariates": torch.from_numpy(self.cells.covariates[rows]),
            "library": torch.from_numpy(self.cells.library[rows]),
        }


class ChunkLoader:
    """Iterate over chunks, each a list of mini-batches (dictionaries of tensors).

    Every cell comes once; with several processes once in one of them, and all have the same number of mini-batches.
    Mini-batches differ by at most one cell in size and never exceed ``batch_size``, so there is no last mini-batch of a
    single cell (batch norm cannot work on one) unless there is a single cell.

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

    def __iter__(self) -> Iterator[list[dict[str, Tensor | Stored]]]:
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


def mini_batches(tensors: dict[str, Tensor | Stored], sizes: list[int]) -> list[dict[str, Tensor | Stored]]:
    """Tensors (n, ...) cut into mini-batches of these sizes, which add up to n; views of all that is large."""
    split = {name: t.split(sizes) for name, t in tensors.items() if name != "stored"}
    if "stored" in tensors:
        split["stored"] = _cut(*tensors["stored"], sizes)
    return [{name: t[i] for name, t in split.items()} for i in range(len(sizes))]


def _cut(starts: Tensor, columns: Tensor, values: Tensor, sizes: list[int]) -> list[Stored]:
    """Rows of a CSR matrix cut into parts of these sizes."""
    ends = np.cumsum(sizes)
    parts = [starts[end - size : end + 1] for size, end in zip(sizes, ends, strict=True)]
    at = [(int(part[0]), int(part[-1])) for part in parts]
    return [(part - a, columns[a:b], values[a:b]) for part, (a, b) in zip(parts, at, strict=True)]
