"""A matrix that stays on disk and is read by rows; whether it should stay there."""

from __future__ import annotations

import ctypes
import logging
import sys
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse

from sccvae.data.matrix import BLOCK_BYTES, Survey, as_matrix, survey, take_columns

logger = logging.getLogger(__name__)

#: A matrix is read into memory if what that takes is at most this share of the memory that is free.
SHARE = 0.5
#: Bytes between wanted rows that are read along with them: about what one more access to a file costs.
GAP_BYTES = 2**16
#: Where Linux tells what the group of a process may take.
CONTROL_GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class DiskMatrix:
    """A matrix in an HDF5 or zarr file, given out by rows as float32.

    Parameters
    ----------
    stored
        ``adata.X`` or a layer where it stays on disk: ``anndata.abc.CSRDataset``, or a dense h5py or zarr array.
    where
        How to name it in a message.
    columns
        Columns to take, in this order; None for all.

    Attributes
    ----------
    shape
        (n, G).
    row_bytes, chunk_rows
        Bytes of a row in memory, and rows in a chunk of the file; both are means.
    """

    def __init__(self, stored: Any, where: str, columns: np.ndarray | None = None) -> None:
        n, width = stored.shape
        self.where, self.columns = where, columns
        self.shape = (n, width if columns is None else len(columns))
        self._width = width
        self._sparse = isinstance(stored, CSRDataset)
        self._stored = stored.group if self._sparse else stored
        if self._sparse:
            self._data, self._indices = self._stored["data"], self._stored["indices"]
            self._indptr = self._stored["indptr"][:]
            values = max(1.0, self._indptr[-1] / max(n, 1))
            self.row_bytes, self.chunk_rows = 8 * values, _chunk(self._data) / values
        else:
            self.row_bytes, self.chunk_rows = 4.0 * self.shape[1], float(_chunk(stored))

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that it would have in memory."""
        return int(self.row_bytes * len(self))

    @cached_property
    def survey(self) -> Survey:
        """What one look at all values tells; taken once."""
        found = survey(self, self.where, means=True)  # of a disk one look is enough
        give_back()
        return found

    def same(self, other: DiskMatrix | None) -> bool:
        """Whether ``other`` is the same part of the same file, which nobody could change meanwhile."""
        return (
            other is not None
            and _source(self._stored) == _source(other._stored) is not None
            and np.array_equal(self.columns, other.columns)
        )

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray | sparse.csr_matrix:
        """Rows as float32 CSR or dense, in the order asked for; a row may be asked for more than once."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            return self._read(start, stop) if step == 1 else self[np.arange(start, stop, step)]
        rows = np.asarray(rows)
        ordered, back = np.unique(rows, return_inverse=True)
        gap = max(1.0, self.chunk_rows / 4, GAP_BYTES / self.row_bytes)
        longest = max(1, int(BLOCK_BYTES / self.row_bytes))
        ends = np.flatnonzero((np.diff(ordered) > gap) | np.diff(ordered // longest).astype(bool)) + 1
        parts = []
        for run in np.split(ordered, ends):
            start, stop = (run[0], run[-1] + 1) if len(run) else (0, 0)
            part = self._read(start, stop)
            parts.append(part if len(run) == stop - start else part[run - start])
        if len(parts) == 1:
            x = parts[0]
        else:
            x = sparse.vstack(parts, format="csr") if self._sparse else np.concatenate(parts)
        return x if np.array_equal(ordered, rows) else x[back]

    def _read(self, start: int, stop: int) -> np.ndarray | sparse.csr_matrix:
        if not self._sparse:
            return take_columns(as_matrix(self._stored[start:stop], self.where), self.columns)
        # Not by anndata's own indexing, which builds a matrix of the whole file each time: 10 ms for each block.
        first, last = self._indptr[start], self._indptr[stop]
        values = self._data[first:last], self._indices[first:last], self._indptr[start : stop + 1] - first
        x = sparse.csr_matrix(values, shape=(stop - start, self._width))
        return take_columns(as_matrix(x, self.where), self.columns)


def stays_on_disk(x: Any, data: Literal["auto", "disk", "memory"], where: str) -> bool:
    """Whether a matrix is to be read from disk as it is needed, rather than into memory at once.

    Parameters
    ----------
    x
        ``adata.X`` or a layer.
    data
        ``"disk"`` keeps on disk what is there, ``"memory"`` reads it, and ``"auto"`` reads it if that takes at most
        half of the free memory; what was chosen is printed or logged. A matrix in memory stays there in any case.
    where
        How to name it in a message.

    Returns
    -------
    True for on disk.

    Raises
    ------
    ValueError
        If it must be read into memory, because its rows cannot be read one by one, and does not fit.
    """
    if data not in ("auto", "disk", "memory"):
        msg = f"data={data!r} must be 'auto', 'disk' or 'memory'."
        raise ValueError(msg)
    by_rows = isinstance(x, CSRDataset) or type(x).__module__.split(".")[0] in ("h5py", "zarr")
    if not by_rows and not isinstance(x, CSCDataset):
        return False
    if by_rows and data != "auto":
        return data == "disk"
    needed, free = memory_needed(x), free_memory()
    size = f"{where} takes {gigabytes(needed)} in memory, {gigabytes(free)} are free"
    if by_rows:
        stays = needed > SHARE * free
        say(f"{size}: {'it is read from disk block by block' if stays else 'it is read into memory'}.")
        return stays
    if needed > free:
        msg = (
            f"{where} is stored on disk by genes (CSC), so that cells cannot be read one by one, and {size}. Write it "
            "by cells (`adata.X = adata.X.tocsr()`) on a machine with more memory."
        )
        raise ValueError(msg)
    say(f"{size}. It is stored by genes (CSC) and so read into memory.")
    return False


def say(text: str) -> None:
    """Log what was chosen; where nobody reads a log, tell it on the standard error."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(text)
    else:
        sys.stderr.write(f"{text}\n")


def memory_needed(x: Any) -> int:
    """Bytes that reading a matrix on disk takes: as it is stored, and as CSR or dense float32 if it is not yet.

    Parameters
    ----------
    x
        ``anndata.abc.CSRDataset`` or ``CSCDataset``, or a dense h5py or zarr array.
    """
    if not isinstance(x, CSRDataset | CSCDataset):
        return x.shape[0] * x.shape[1] * (4 + (x.dtype.itemsize if x.dtype != np.float32 else 0))
    data, indices = x.group["data"], x.group["indices"]
    as_it_is = isinstance(x, CSRDataset) and data.dtype == np.float32
    each = data.dtype.itemsize + indices.dtype.itemsize + (0 if as_it_is else 8)
    return data.shape[0] * each + 8 * x.shape[0]


def free_memory() -> int:
    """Bytes that this process may still take: what is left of the machine's, and of its control group's (Linux)."""
    free = psutil.virtual_memory().available
    try:
        own = CONTROL_GROUPS / OWN_GROUP.read_text().split("::", 1)[1].splitlines()[0].strip("/")
    except (OSError, IndexError):  # not Linux, or control groups of the old kind
        return free
    for group in (own, *own.parents):
        try:  # a container, a job of a cluster
            most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        except (OSError, ValueError, KeyError):  # no such group, or one without a limit ("max")
            continue
        free = min(free, max(0, most - used + int(cached)))
    return free


def give_back() -> None:
    """Give memory that was freed back to the system: glibc keeps what held blocks of a file, the more the longer it is.

    Of a million cells 190 MB, on top of which those of the training would come.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        return


def gigabytes(size: float) -> str:
    """A number of bytes for a message, such as ``"1.25 GB"``."""
    return f"{size / 1e9:,.2f} GB"


def _chunk(stored: Any) -> int:
    """Length of a chunk of a stored array along its first axis."""
    return (stored.chunks or (1,))[0]


def _source(stored: Any) -> tuple[str, str] | None:
    """File and name of what is stored; None if it is open for writing."""
    if type(stored).__module__.startswith("h5py"):
        return (stored.file.filename, stored.name) if stored.file.mode == "r" else None
    return (str(stored.store_path), stored.name) if stored.read_only else None
