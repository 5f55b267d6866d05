"""Cells as an encoder reads them where most values are zero: only the others, on the CPU, by numba.

The first layer of an encoder multiplies thousands of genes, of which a cell has counts of a tenth. Its product over
these alone, and that of its gradient, take a third of the time, and what comes before (logarithm, dropout) a fifth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from sccvae._compiled import has_numba, in_threads

#: Largest share of values that are not zero: the dense product is as fast from about 0.25 on.
DENSEST = 0.2
#: Fewest columns: of a panel of few genes the dense product is done in no time.
FEWEST_COLUMNS = 256


class SparseRows:
    """The values of a matrix (n, G) that are not zero, row by row.

    Parameters
    ----------
    starts
        Row i has the values from starts[i] to starts[i + 1], (n + 1,) int64.
    columns
        Column of each value, (nnz,) uint32, each once in a row.
    values
        The values, (nnz,) float32 on the CPU, without gradient.
    n_columns
        Number G of columns.
    """

    def __init__(self, starts: np.ndarray, columns: np.ndarray, values: Tensor, n_columns: int) -> None:
        self.starts, self.columns, self.values, self.n_columns = starts, columns, values, n_columns

    def __len__(self) -> int:
        return len(self.starts) - 1

    @classmethod
    def of(cls, x: Tensor, stored: tuple[Tensor, Tensor, Tensor] | None = None) -> Self | None:
        """Those of x (n, G); None where its product is not faster this way, or a gradient by x is asked for.

        ``stored`` is the same matrix as CSR, if it is at hand: row starts (n + 1,) int64, columns and values (nnz,).
        """
        suits = x.dtype == torch.float32 and x.device.type == "cpu" and x.dim() == 2 and not x.requires_grad
        if not suits or x.shape[1] < FEWEST_COLUMNS or not len(x) or not has_numba():
            return None
        if stored is not None:
            starts, columns, values = stored
            if len(values) > DENSEST * x.numel():
                return None
            return cls(starts.numpy(), columns.numpy().astype(np.uint32, copy=False), values, x.shape[1])
        from sccvae.nn import _loops

        array, starts = x.contiguous().numpy(), np.empty(len(x) + 1, np.int64)
        _loops.count(array, starts)
        if starts[-1] > DENSEST * x.numel():
            return None
        columns, values = np.empty(starts[-1], np.uint32), torch.empty(starts[-1])
        in_threads(_loops.gather, len(x), x.numel() // 2, array, starts, columns, values.numpy())
        return cls(starts, columns, values, x.shape[1])

    def map(self, function: Callable[..., Tensor], *by_row: Tensor) -> Self:
        """``function`` of the values, (nnz,), and of what belongs to their rows, each (n, 1), given as (nnz,).

        It must leave zero at zero.
        """
        repeats = torch.from_numpy(np.diff(self.starts))
        given = (t.reshape(-1).repeat_interleave(repeats, output_size=len(self.values)) for t in by_row)
        return type(self)(self.starts, self.columns, function(self.values, *given), self.n_columns)

    def drop(self, n: int) -> Self:
        """Without each value with probability n / 256; the others times 256 / (256 - n)."""
        from sccvae.nn import _loops

        size = len(self.values)
        words = torch.empty(-(-size // 8), dtype=torch.int64).random_(-(2**63), None)
        random, factor = words.numpy().view(np.uint8)[:size], np.float32(256 / (256 - n))
        # One place more: the loop writes before it knows whether a value is kept.
        starts, columns = np.empty_like(self.starts), np.empty(size + 1, np.uint32)
        values = torch.empty(size + 1)
        given = self.starts, self.columns, self.values.numpy()
        _loops.thin(*given, random, np.uint8(n), factor, starts, columns, values.numpy())
        return type(self)(starts, columns[: starts[-1]], values[: starts[-1]], self.n_columns)

    def dense(self) -> Tensor:
        """The matrix, (n, G)."""
        x = torch.zeros(len(self), self.n_columns)
        rows = np.repeat(np.arange(len(self)), np.diff(self.starts))
        x.numpy()[rows, self.columns] = self.values.numpy()
        return x

    def linear(self, weight: Tensor, bias: Tensor) -> Tensor:
        """As :func:`torch.nn.functional.linear` of the matrix, (n, H), for weight (H, G) and bias (H,)."""
        return _Linear.apply(self, weight, bias)


class _Linear(torch.autograd.Function):
    """The product, and its gradients by weight and bias; of first order."""

    @staticmethod
    def forward(ctx: Any, rows: SparseRows, weight: Tensor, bias: Tensor) -> Tensor:
        """The product, (n, H)."""
        from sccvae.nn import _loops

        ctx.rows = rows
        out = torch.empty(len(rows), len(weight))
        given = rows.starts, rows.columns, rows.values.numpy(), weight.detach().t().contiguous().numpy()
        in_threads(_loops.product, len(out), len(rows.values) * 8, *given, bias.detach().numpy(), out.numpy())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, Tensor]:
        """Gradients by weight (H, G) and bias (H,), for that of the product, (n, H)."""
        from sccvae.nn import _loops

        rows, size = ctx.rows, len(ctx.rows.values)
        starts, at, values = np.empty(rows.n_columns + 1, np.int64), np.empty(size, np.uint32), torch.empty(size)
        _loops.turn(rows.starts, rows.columns, rows.values.numpy(), starts, at, values.numpy())
        by_weight = torch.empty(rows.n_columns, g.shape[1])
        given = starts, at, values.numpy(), g.contiguous().numpy(), np.zeros(g.shape[1], np.float32)
        in_threads(_loops.product, rows.n_columns, size * 8, *given, by_weight.numpy())
        # Contiguous: a gradient of the same weight from elsewhere may be added to it.
        return None, by_weight.t().contiguous(), g.sum(0)
