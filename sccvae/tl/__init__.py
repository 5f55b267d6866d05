"""Whole jobs on an AnnData in one call, scanpy-style: results in ``obsm`` and ``layers``, parameters in ``uns``."""

from __future__ import annotations

from ._correct import correct
from ._embed import embed

__all__ = ["correct", "embed"]
