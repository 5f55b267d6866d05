"""Data that a user loads by name, and effects planted with known truth."""

from __future__ import annotations

from ._cells import pbmc68k_reduced
from ._idx import read_idx
from ._images import fashion_mnist, mnist
from ._planted import plant_batch_effect
from ._toy import blobs

__all__ = ["blobs", "fashion_mnist", "mnist", "pbmc68k_reduced", "plant_batch_effect", "read_idx"]
