"""How the compiled loops of ``distributions`` and ``nn`` are made, and parted between threads."""

from __future__ import annotations

import ctypes
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


#: What OpenMP calls in each of its threads; and the process whose threads they are.
_BODY, _PROCESS = ctypes.CFUNCTYPE(None, ctypes.c_void_p), os.getpid()


@cache
def _team(process: int) -> Callable[..., None] | None:
    """What runs a function in the OpenMP threads that torch has in this process; None where it has none to be found.

    These stay awake between torch's operations: threads of our own would have to wait for a core, half of the time.
    """
    if process != _PROCESS:  # a fork: the threads of its parent are not there
        return None
    try:
        parallel = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # also Intel's and LLVM's library have this name
    except (AttributeError, OSError):  # torch does without OpenMP
        return None
    parallel.argtypes, parallel.restype = (_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel


@cache
def _pool(process: int, n: int) -> ThreadPoolExecutor:
    """Threads of a process where there is no team: those of a parent are not there after a fork."""
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
    # All threads or one: OpenMP ends those that a smaller team does not need, and would start them anew.
    n = min(torch.get_num_threads(), n_rows) if n_values >= 2 * SHARE else 1
    if n < 2:
        loop(0, n_rows, *given)
        return
    parts = iter(list(pairwise(n_rows * i // n for i in range(n + 1))))  # each thread takes the next one
    failed: list[BaseException] = []

    def body(_: int | None) -> None:
        try:
            for part in parts:  # more than one where OpenMP gave fewer threads
                loop(*part, *given)
        except BaseException as error:  # of any kind, Ctrl-C too: raised below, where the user sees it
            failed.append(error)

    team = _team(os.getpid())
    if team is not None:
        team(_BODY(body), None, n, 0)
    else:
        others = [_pool(os.getpid(), n - 1).submit(body, None) for _ in range(n - 1)]
        body(None)
        for other in others:
            other.result()
    if failed:
        raise failed[0]
