"""The way from AnnData to tensors on the device."""

from sccvae.data.blocks import BlockLoader, shuffled_loader
from sccvae.data.categories import check_once, is_label, match
from sccvae.data.checks import check_setup
from sccvae.data.confounding import confounding
from sccvae.data.fields import Schema, anndata_fields
from sccvae.data.lazy import open_anndata
from sccvae.data.masked import MaskedStore, measured
from sccvae.data.moments import batch_moments, zero_share
from sccvae.data.ondisk import DiskMatrix, free_memory, gigabytes
from sccvae.data.read import Cells, check_support, read_cells
from sccvae.data.residence import ResidentStore, resident
from sccvae.data.splits import row_numbers, split_indices
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
    "check_once",
    "check_setup",
    "check_support",
    "confounding",
    "free_memory",
    "gigabytes",
    "is_label",
    "match",
    "measured",
    "open_anndata",
    "read_cells",
    "resident",
    "row_numbers",
    "shuffled_loader",
    "split_indices",
    "zero_share",
]
