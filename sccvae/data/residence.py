"""Cells that lie on a GPU while a model trains on them."""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sccvae._rows import SparseRows
from sccvae.data.ondisk import DiskMatrix
from sccvae.data.store import CellStore

#: Cells lie on a GPU if they take at most this share of its memory that is free.
SHARE = 0.5


class ResidentStore(CellStore):
    """The cells of a store on a device, whole; any rows are gathered there.

    Parameters
    ----------
    store
        The cells, in memory.
    device
        Where they go.
    """

    def __init__(self, store: CellStore, device: torch.device) -> None:
        super().__init__(store.cells, store.labels)
        x = store.cells.x
        if sparse.issparse(x):
            self._lengths = np.diff(x.indptr).astype(np.int64)
            columns = x.indices.astype(np.int32, copy=False)
            parts = (torch.from_numpy(part).to(device) for part in (x.indptr.astype(np.int64), columns, x.data))
            self._x = SparseRows(*parts, x.shape[1])
        else:
            self._x = torch.from_numpy(x).to(device)
        others = {"codes": store.cells.codes, "covariates": store.cells.covariates, "library": store.cells.library}
        others |= {} if store.labels is None else {"labels": store.labels}
        self._others = {name: torch.from_numpy(array).to(device) for name, array in others.items()}

    def gather(self, rows: np.ndarray) -> dict[str, Tensor | SparseRows]:
        """As :meth:`CellStore.gather`, on the device."""
        at = torch.from_numpy(rows).to(self._x.device)
        return {name: t[at] for name, t in self._others.items()} | {"x": self._some(rows, at)}

    def _some(self, rows: np.ndarray, at: Tensor) -> Tensor | SparseRows:
        x = self._x
        if isinstance(x, Tensor):
            return x[at]
        size = int(self._lengths[rows].sum())  # known here, so that nobody waits for the device
        first = x.starts[at]
        lengths = x.starts[at + 1] - first
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        places = torch.arange(size, device=x.device)
        places += (first - starts[:-1]).repeat_interleave(lengths, output_size=size)
        return SparseRows(starts, x.columns[places], x.values[places], x.n_columns)


def resident(store: CellStore, device: torch.device) -> CellStore:
    """The cells on the device of the training, if that is a GPU (CUDA) where they can lie; else where they are.

    They can if they are in memory, all their features measured, and take at most half of the memory that is free there.
    """
    x = store.cells.x
    if device.type != "cuda" or type(store) is not CellStore or isinstance(x, DiskMatrix):
        return store
    size = 8 * (x.nnz + len(store)) if sparse.issparse(x) else x.nbytes
    return ResidentStore(store, device) if size <= SHARE * torch.cuda.mem_get_info(device)[0] else store
