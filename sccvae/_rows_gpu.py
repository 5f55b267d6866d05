"""Rows of counts on a GPU, by Triton: what takes torch a dozen operations, each as long as this.

Importing this file imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Columns of a row that are worked on at a time, and values.
BLOCK, FEW = 1024, 128


@triton.jit
def _dense(starts, columns, values, x, n_columns, block: tl.constexpr, few: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    x += i * n_columns
    for start in range(0, n_columns, block):
        at = start + tl.arange(0, block)
        tl.store(x + at, tl.zeros((block,), x.dtype.element_ty), mask=at < n_columns)
    tl.debug_barrier()  # none of its zeros comes after a value of another thread
    last = tl.load(starts + i + 1)
    for start in range(tl.load(starts + i), last, few):
        at = start + tl.arange(0, few)
        column = tl.load(columns + at, mask=at < last, other=0)
        tl.store(x + column, tl.load(values + at, mask=at < last, other=0), mask=at < last)


@triton.jit
def _fill(out, first, last, value, few: tl.constexpr):
    for start in range(first, last, few):
        at = start + tl.arange(0, few)
        tl.store(out + at, value, mask=at < last)


@triton.jit
def _spread(starts, by_row, out, n_rows, n_values, few: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    value = tl.load(by_row + i)
    _fill(out, tl.load(starts + i), tl.load(starts + i + 1), value, few)
    end = tl.load(starts + n_rows)  # of the values of no row each program has some
    share = tl.cdiv(n_values - end, n_rows)
    _fill(out, end + i * share, tl.minimum(end + (i + 1) * share, n_values), value, few)


def dense(starts: Tensor, columns: Tensor, values: Tensor, n_columns: int) -> Tensor:
    """The matrix, (n, G). Arguments as for ``SparseRows``."""
    x = values.new_empty(len(starts) - 1, n_columns)
    _dense[(len(x),)](starts, columns, values, x, n_columns, BLOCK, FEW, num_warps=4)
    return x


def spread(starts: Tensor, by_row: Tensor, n_values: int) -> Tensor:
    """What belongs to the row of each value, (nnz,), of ``by_row`` (n,); of some row for values of none."""
    out = by_row.new_empty(n_values)
    _spread[(len(by_row),)](starts, by_row.contiguous(), out, len(by_row), n_values, FEW, num_warps=4)
    return out


def works(device: torch.device) -> bool:
    """Whether Triton compiles and runs there; raises what went wrong if not."""
    starts, columns = torch.tensor([0, 1, 1], device=device), torch.ones(2, dtype=torch.int32, device=device)
    values = torch.full((2,), 3.0, device=device)
    right = spread(starts, values[:2] * torch.tensor([1.0, 2.0], device=device), 2).tolist() in ([3, 3], [3, 6])
    return right and dense(starts, columns, values, 2).tolist() == [[0, 3], [0, 0]]
