"""Conditional variational autoencoders for single-cell data, on AnnData.

The subpackages (``sccvae.model``, ``sccvae.tl``, …) are imported when they are first used: ``import sccvae`` alone
loads neither torch nor scvi-tools.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from sccvae import data, datasets, distributions, metrics, model, module, nn, pl, tl, train

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "data",
    "datasets",
    "distributions",
    "metrics",
    "model",
    "module",
    "nn",
    "pl",
    "tl",
    "train",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    msg = f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}."
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
