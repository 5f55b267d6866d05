"""The way from AnnData to tensors on the device."""

from sccvae.data.blocks import BlockLoader, shuffled_loader
from sccvae.data.checks import check_setup
from sccvae.data.confounding import confounding
from sccvae.data.fields import Schema, anndata_fields
from sccvae.data.lazy import open_anndata
from sccvae.data.masked import MaskedStore
from sccvae.data.moments import batch_moments
from sccvae.data.ondisk import DiskMatrix
from sccvae.data.read import Cells, read_cells
from sccvae.data.residence import ResidentStore
from sccvae.data.splits import split_indices
from sccvae.data.store import CellStore, ChunkLoader

__all__ = [
    "BlockLoader",
    "CellStore",
    "Cells",
    "ChunkLoader",
    "DiskMatrix",
    "MaskedStore",
    "ResidentStore",
    "Schema",
    "anndata_fields",
    "batch_moments",
    "check_setup",
    "confounding",
    "open_anndata",
    "read_cells",
    "shuffled_loader",
    "split_indices",
]
