"""Layers that are filled row by row: in a file of their own, chunk by chunk, or sparse."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from anndata.io import write_elem
from scipy import sparse

from sccvae.data.ondisk import free_memory, gigabytes, say

logger = logging.getLogger(__name__)

#: Bytes of a chunk of the layer.
CHUNK_BYTES = 2**23


def check_room(adata: AnnData, keys: Sequence[str], out: Path | None, dtype: Any = np.float32) -> None:
    """Check that there is room for dense layers in memory (``out=None``) or on disk.

    Raises
    ------
    ValueError
        If the file is of no known kind, or the layers do not fit into memory.
    OSError
        If the file exists already, its folder does not, or the disk is too full.
    """
    key, (size, text) = keys[0], _needed(adata, keys, dtype)
    if out is None:
        if size > free_memory():
            msg = (
                f"{text} of memory, {gigabytes(free_memory())} are free. Write it to disk (`correct` with "
                f"out='{key}.zarr', `predict_counterfactual` with an array on disk as out=), or take fewer cells."
            )
            raise ValueError(msg)
        logger.info("%s of memory.", text)
        return
    if out.suffix not in (".zarr", ".h5ad"):
        msg = f"out={str(out)!r} must end in .zarr or .h5ad."
        raise ValueError(msg)
    if out.exists():
        msg = f"{out} exists; choose another file, or remove it."
        raise FileExistsError(msg)
    if not out.parent.is_dir():
        msg = f"There is no folder {out.parent}; make it first."
        raise FileNotFoundError(msg)
    free = shutil.disk_usage(out.parent).free
    if size > free:
        msg = f"{text} on disk, {gigabytes(free)} are free in {out.parent.resolve()}."
        raise OSError(msg)


def _needed(adata: AnnData, keys: Sequence[str], dtype: Any) -> tuple[int, str]:
    """Bytes that dense layers take, and the start of a sentence about them."""
    size = len(keys) * np.dtype(dtype).itemsize * adata.n_obs * adata.n_vars
    name = ", ".join(map(repr, keys))
    return size, f"layers[{name}] of {adata.n_obs:,} cells x {adata.n_vars:,} genes takes {gigabytes(size)}"


@contextmanager
def new_layers(adata: AnnData, keys: Sequence[str], out: Path, dtype: Any = np.float32) -> Iterator[list[InChunks]]:
    """A new file with all of ``adata`` and dense layers, whose rows are to be written inside, one after the other.

    The file appears at the end, whole, or not at all.

    Parameters
    ----------
    adata
        What the file holds besides the layers; it needs no X.
    keys
        Of the layers.
    out
        The file, .zarr or .h5ad.
    dtype
        Type of the values.

    Yields
    ------
    The layers, each to be filled from the first row to the last.
    """
    free = gigabytes(shutil.disk_usage(out.parent).free)
    say(f"{_needed(adata, keys, dtype)[1]} on disk, {free} are free; it is written chunk by chunk.")
    rows = max(1, CHUNK_BYTES // (4 * adata.n_vars))
    chunks = (min(rows, adata.n_obs), adata.n_vars)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        unfinished = Path(folder) / out.name
        with _opened(unfinished) as file:
            zarr = out.suffix == ".zarr"
            write_elem(file, "/", adata, dataset_kwargs={"shards": None} if zarr else {})
            create = file["layers"].create_array if zarr else file["layers"].create_dataset
            layers = []
            for key in keys:
                array = create(key, shape=adata.shape, chunks=chunks, dtype=np.dtype(dtype))
                array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
                layers.append(InChunks(array, chunks[0]))
            yield layers
            for layer in layers:
                layer.flush()
        os.replace(unfinished, out)


class InChunks:
    """Takes rows one after the other and hands them on in whole chunks: each chunk of the file is written once.

    Parameters
    ----------
    array
        An array on disk, (n, genes).
    rows
        Rows of a chunk.
    """

    def __init__(self, array: Any, rows: int) -> None:
        self.array, self.shape, self.dtype = array, array.shape, np.dtype(array.dtype)
        self.held = np.empty((rows, array.shape[1]), self.dtype)
        self.first, self.n = 0, 0

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        done = 0
        while done < len(values):
            some = values[done : done + len(self.held) - self.n]
            self.held[self.n : self.n + len(some)] = some
            self.n, done = self.n + len(some), done + len(some)
            if self.n == len(self.held):
                self.flush()

    def flush(self) -> None:
        """Write what is held."""
        self.array[self.first : self.first + self.n] = self.held[: self.n]
        self.first, self.n = self.first + self.n, 0


class InSparse:
    """Takes rows one after the other and keeps those of their values that are not small, as CSR.

    Parameters
    ----------
    shape
        Of the matrix.
    dtype
        Type of the values.
    below
        Values smaller than this in size become zero.
    """

    def __init__(self, shape: tuple[int, int], dtype: Any, below: float) -> None:
        self.shape, self.dtype, self.below = shape, np.dtype(dtype), below
        self.blocks: list[sparse.csr_matrix] = []

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        kept = np.where(np.abs(values) < self.below, 0, values).astype(self.dtype)
        self.blocks.append(sparse.csr_matrix(kept))

    def matrix(self) -> sparse.csr_matrix:
        """What was written."""
        return sparse.vstack(self.blocks, format="csr")


def _opened(path: Path) -> Any:
    """A new file to write to, in a context that closes it.

    Raises
    ------
    ImportError
        If the package for this kind of file is not installed.
    """
    try:
        if path.suffix == ".h5ad":
            import h5py

            return h5py.File(path, "w")
        import zarr

        return nullcontext(zarr.open_group(path, mode="w", zarr_format=3))
    except ImportError as error:
        msg = f"Writing {path.suffix} files chunk by chunk needs {error.name}: `pip install 'sccvae[ondisk]'`."
        raise ImportError(msg) from error
