"""The way from AnnData to tensors on the device."""

from sccvae.data.fields import Schema, anndata_fields, check_setup
from sccvae.data.masked import MaskedStore, measured, read_measured
from sccvae.data.read import Cells, check_support, read_cells
from sccvae.data.splits import split_indices
from sccvae.data.store import CellStore, ChunkLoader

__all__ = [
    "CellStore",
    "Cells",
    "ChunkLoader",
    "MaskedStore",
    "Schema",
    "anndata_fields",
    "check_setup",
    "check_support",
    "measured",
    "read_cells",
    "read_measured",
    "split_indices",
]
