"""How the compiled loops of ``distributions`` and ``nn`` are made, and parted between threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch

#: Values for which one more thread is worth its start.
SHARE = 50_000


@cache
def has_numba() -> bool:
    """Whether loops can be compiled here."""
    return find_spec("numba") is not None


def compiled(**more: Any) -> Any:
    """Decorate with numba's ``njit``, kept on disk where there is a folder for it."""
    import numba

    options = {"error_model": "numpy", "nogil": True, **more}

    def decorate(function: Any) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder that can be written to: compiled anew in each session
            return numba.njit(**options)(function)

    return decorate


@cache
def _pool(process: int, n: int) -> ThreadPoolExecutor:
    """Threads of a process: those of a parent are not there after a fork."""
    del process
    return ThreadPoolExecutor(n, "sccvae-loops")


def in_threads(loop: Callable[..., Any], n_rows: int, n_values: int, *given: Any) -> None:
    """Run ``loop(start, stop, *given)`` over all rows, parted between as many threads as torch may use.

    Parameters
    ----------
    loop
        A compiled loop over the rows from ``start`` to ``stop``; it holds no lock of Python's.
    n_rows
        Rows in all.
    n_values
        Values in all: how much work it is.
    *given
        The other arguments of the loop.
    """
    n = max(1, min(torch.get_num_threads(), n_rows, n_values // SHARE))
    parts = list(pairwise(n_rows * i // n for i in range(n + 1)))
    others = [_pool(os.getpid(), n).submit(loop, *part, *given) for part in parts[:-1]]
    loop(*parts[-1], *given)
    for other in others:
        other.result()
