"""Shuffled mini-batches of cells that stay on disk, by scDataset."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, count

import numpy as np
from torch import Tensor, distributed

from sccvae.data.ondisk import DiskMatrix, give_back
from sccvae.data.store import CellStore, ChunkLoader, mini_batches

#: Bytes of the matrix that are shuffled together in memory (while they are read, twice that).
BUFFER_BYTES = 96 * 2**20
#: Blocks of neighbouring cells in a buffer; chunks of the file that hold many cells make blocks larger and fewer.
BLOCKS, FEWEST_BLOCKS = 512, 64


class BlockLoader(ChunkLoader):
    """Iterate over shuffled chunks of cells on disk, each a list of mini-batches, as :class:`ChunkLoader` does.

    Blocks of neighbouring cells are drawn in random order until a buffer is full; the buffer is shuffled and cut into
    mini-batches, so a mini-batch holds cells from all over the file. Every cell comes once. Mini-batches hold
    ``batch_size`` cells; those of the last chunk are evened out, so that none has a single cell.

    Parameters
    ----------
    store
        The cells; their ``x`` is a :class:`DiskMatrix`.
    rows
        Which of them, (n,) int64.
    batch_size
        Most cells of a mini-batch.
    seed
        The order is drawn from (seed, epoch): a resumed run sees the same.
    n_processes
        Processes of ``torch.distributed`` that share the rows: each reads a part of the file of its own.

    Raises
    ------
    ImportError
        If scDataset is not installed.

    References
    ----------
    D'Ascenzo and Cultrera di Montesano 2025, scDataset, arXiv:2506.01883.
    """

    def __init__(
        self, store: CellStore, rows: np.ndarray, batch_size: int, *, seed: int = 0, n_processes: int = 1
    ) -> None:
        try:
            import scdataset  # noqa: F401
        except ImportError as error:
            msg = (
                "Training from disk needs scDataset: `pip install 'sccvae[ondisk]'`. Or read all cells into memory: "
                "`model.train(data='memory')`."
            )
            raise ImportError(msg) from error
        if (np.diff(rows) < 0).any():  # rows of a split are sorted: no copy of them
            rows = np.sort(rows)
        super().__init__(store, rows, batch_size, shuffle=True, seed=seed, n_processes=n_processes)
        shares = {len(self.rows) // n_processes, math.ceil(len(self.rows) / n_processes)}  # rows of a process
        sizes = chain(range(self.per_chunk, 0, -1), count(self.per_chunk + 1))
        self.per_chunk = next(p for p in sizes if all(n % (p * batch_size) != 1 or n == 1 for n in shares))
        self.chunk = self.per_chunk * batch_size
        x = store.cells.x
        self.chunks_in_buffer = max(1, int(BUFFER_BYTES / x.row_bytes) // self.chunk)
        cells = self.chunks_in_buffer * self.chunk
        # A chunk of the file is read whole for any of its cells: at least a quarter of it should be used.
        self.block = max(1, cells // BLOCKS, min(int(x.chunk_rows / 4), cells // FEWEST_BLOCKS))

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        from scdataset import BlockShuffling, scDataset

        held: list[CellStore] = []

        def fetch(store: CellStore, rows: np.ndarray) -> list[CellStore]:
            held.clear()  # scDataset still refers to the list; without this there would be two buffers at a time
            held.append(store.subset(rows))
            give_back()
            return held

        # A new one for each epoch: its own seeds are sums of seed and epoch, and rank and size would come from torch.
        seed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]
        self.epoch += 1
        rows = self.rows
        if self.n_processes > 1:
            rows = np.array_split(rows, self.n_processes)[distributed.get_rank()]
        batches_left = self.n_batches
        for tensors in scDataset(
            self.store,
            BlockShuffling(self.block, indices=rows.astype(np.int32 if len(self.store) < 2**31 else np.int64)),
            batch_size=self.chunk,
            fetch_factor=self.chunks_in_buffer,
            fetch_callback=fetch,
            batch_callback=lambda held, at: held[0].gather(at),
            rank=0,
            world_size=1,
            seed=int(seed),
        ):
            n = len(tensors["x"])
            parts = min(self.per_chunk, batches_left)
            batches_left -= parts
            yield mini_batches(tensors, [(n + i) // parts for i in range(parts)])


def shuffled_loader(
    store: CellStore, rows: np.ndarray, batch_size: int, seed: int, n_processes: int = 1
) -> ChunkLoader:
    """The loader to train on these rows of a store, in memory or on disk.

    Parameters
    ----------
    store
        The cells.
    rows
        Which of them, (n,) int64.
    batch_size
        Most cells of a mini-batch.
    seed
        Of the order.
    n_processes
        Processes that share the rows.

    Returns
    -------
    :class:`ChunkLoader` or :class:`BlockLoader`; set its ``epoch`` to go on after so many epochs.
    """
    if isinstance(store.cells.x, DiskMatrix):
        return BlockLoader(store, rows, batch_size, seed=seed, n_processes=n_processes)
    return ChunkLoader(store, rows, batch_size, shuffle=True, seed=seed, n_processes=n_processes)
