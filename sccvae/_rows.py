"""Cells of which most values are zero: a loader hands them on, an encoder and a likelihood read them, row by row.

The first layer of an encoder multiplies thousands of genes, of which a cell has counts of a tenth. Its product over
these alone (on the CPU, by numba), and that of its gradient, take a third of the time, and what comes before
(logarithm, dropout) a fifth.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from sccvae._compiled import has_numba, in_threads

logger = logging.getLogger(__name__)

#: Largest share of values that are not zero: the dense product is as fast from about 0.25 on.
DENSEST = 0.2
#: Fewest columns: of a panel of few genes the dense product is done in no time.
FEWEST_COLUMNS = 256


class SparseRows:
    """The values of a matrix (n, G) that are not zero, row by row.

    Off the CPU there may be room for more values after those of the last row; they must be zero.

    Parameters
    ----------
    starts
        Row i has the values from starts[i] to starts[i + 1], (n + 1,) int64.
    columns
        Column of each value, (nnz,) int32, each once in a row.
    values
        The values, (nnz,) floating, without gradient.
    n_columns
        Number G of columns.
    """

    def __init__(self, starts: Tensor, columns: Tensor, values: Tensor, n_columns: int) -> None:
        self.starts, self.columns, self.values, self.n_columns = starts, columns, values, n_columns

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def shape(self) -> torch.Size:
        """(n, G)."""
        return torch.Size((len(self), self.n_columns))

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.values.device

    @classmethod
    def of(cls, x: Tensor, densest: float = 1.0) -> Self | None:
        """Those of x (n, G) on the CPU; None if more than this share of the values is not zero. Needs numba."""
        from sccvae import _rows_loops

        array, starts = x.detach().contiguous().numpy(), torch.empty(len(x) + 1, dtype=torch.int64)
        _rows_loops.count(array, starts.numpy())
        size = int(starts[-1])
        if size > densest * x.numel():
            return None
        columns, values = torch.empty(size, dtype=torch.int32), torch.empty(size, dtype=x.dtype)
        rows = cls(starts, columns, values, x.shape[1])
        in_threads(_rows_loops.gather, len(x), x.numel() // 2, array, *rows.arrays())
        return rows

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Starts, columns as uint32, and values, as compiled loops take them; on the CPU, without a copy."""
        return self.starts.numpy(), self.columns.numpy().view(np.uint32), self.values.numpy()

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        parts = (t.to(device) for t in (self.starts, self.columns, self.values))
        return self if torch.device(device) == self.device else type(self)(*parts, self.n_columns)

    def split(self, sizes: Sequence[int]) -> list[Self]:
        """Parted into so many rows each, which add up to n; views."""
        ends = np.cumsum([0, *sizes])
        places = self.starts[torch.from_numpy(ends).to(self.device)].tolist()  # one look at a device for all parts
        return [
            type(self)(
                self.starts[first : last + 1] - start, self.columns[start:end], self.values[start:end], self.n_columns
            )
            for (first, last), (start, end) in zip(pairwise(ends.tolist()), pairwise(places), strict=True)
        ]

    def __getitem__(self, rows: slice) -> Self:
        """Some of the rows, such as each second."""
        lengths = self.starts.diff()
        kept = torch.zeros_like(lengths, dtype=torch.bool)
        kept[rows] = True
        starts = torch.cat([self.starts[:1], lengths[rows].cumsum(0)])
        at = kept.repeat_interleave(lengths, output_size=len(self.values))
        return type(self)(starts, self.columns[at], self.values[at], self.n_columns)

    def _like(self, values: Tensor) -> Self:
        """Other values in the same places."""
        new = type(self)(self.starts, self.columns, values, self.n_columns)
        vars(new).update({name: made for name, made in vars(self).items() if name in ("rows", "places")})
        return new

    def map(self, function: Callable[..., Tensor], *by_row: Tensor) -> Self:
        """``function`` of the values, (nnz,), and of what belongs to their rows, each (n, 1), given as (nnz,).

        It must leave zero at zero.
        """
        if self.device.type == "cpu":
            repeats = self.starts.diff()
            given = (t.reshape(-1).repeat_interleave(repeats, output_size=len(self.values)) for t in by_row)
        elif has_triton(self.device):
            from sccvae import _rows_gpu

            given = (_rows_gpu.spread(self.starts, t.reshape(-1), len(self.values)) for t in by_row)
        else:
            given = (t.reshape(-1)[self.rows] for t in by_row)
        return self._like(function(self.values, *given))

    def drop(self, n: int) -> Self:
        """With each value zero with probability n / 256; the others times 256 / (256 - n). On the CPU by numba."""
        size, factor = len(self.values), 256 / (256 - n)
        if self.device.type != "cpu":
            kept = random_bytes(size, self.device) >= n
            return self._like(self.values * kept.to(self.dtype).mul_(factor))
        from sccvae import _rows_loops

        # One place more: the loop writes before it knows whether a value is kept.
        starts, columns = torch.empty_like(self.starts), torch.empty(size + 1, dtype=torch.int32)
        kept = type(self)(starts, columns, torch.empty(size + 1), self.n_columns)
        _rows_loops.thin(*self.arrays(), random_bytes(size).numpy(), np.uint8(n), np.float32(factor), *kept.arrays())
        end = int(starts[-1])
        return type(self)(starts, columns[:end], kept.values[:end], self.n_columns)

    @cached_property
    def rows(self) -> Tensor:
        """Row of each value, (nnz,) int64; some row of those that have none.

        Not the same of all: a GPU adds what goes to one place one after the other.
        """
        places = torch.arange(len(self.values), device=self.device)
        rows = torch.searchsorted(self.starts, places, right=True).sub_(1)
        return torch.where(rows < len(self), rows, places % len(self))

    @cached_property
    def places(self) -> Tensor:
        """Place of each value in the flat matrix, (nnz,) int64."""
        return self.rows * self.n_columns + self.columns

    @cached_property
    def _dense(self) -> Tensor:
        if has_triton(self.device):
            from sccvae import _rows_gpu

            return _rows_gpu.dense(self.starts, self.columns, self.values, self.n_columns)
        x = self.values.new_zeros(self.shape)
        if self.device.type == "cpu" and has_numba():
            from sccvae import _rows_loops

            _rows_loops.scatter(*self.arrays(), x.numpy())
        else:  # added, not put: a value of no row must not hide one
            x.view(-1).scatter_add_(0, self.places, self.values)
        return x

    def dense(self) -> Tensor:
        """The matrix, (n, G); made once."""
        return self._dense

    @cached_property
    def turned(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The transposed matrix, as :meth:`arrays` gives this one; made once, for all layers that read these rows."""
        from sccvae import _rows_loops

        size = len(self.values)
        turned = np.empty(self.n_columns + 1, np.int64), np.empty(size, np.uint32), np.empty(size, np.float32)
        _rows_loops.turn(*self.arrays(), *turned)
        return turned

    def linear(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The matrix times weight (G, H), plus bias (H,): (n, H). On the CPU by numba, elsewhere as a dense product."""
        if self.device.type != "cpu":
            return torch.mm(self.dense(), weight).add_(bias)  # cuBLAS takes 1.5 times as long for both in one
        return _Linear.apply(self, weight, bias)


@cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton, which comes with torch on Linux, compiles for a device: an NVIDIA GPU, with a C compiler."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    try:
        from sccvae import _rows_gpu

        return _rows_gpu.works(device)
    except Exception as error:  # whatever keeps it from working, torch does the same
        logger.info("Triton cannot be used (%s: %s); torch takes its place.", type(error).__name__, error)
        return False


def random_bytes(n: int, device: torch.device | None = None) -> Tensor:
    """Uniform random bytes, (n,) uint8: a seventh of the time of as many random numbers."""
    return torch.empty(-(-n // 8), dtype=torch.int64, device=device).random_(-(2**63), None).view(torch.uint8)[:n]


def dense(x: Tensor | SparseRows) -> Tensor:
    """Values (n, G) as a tensor."""
    return x.dense() if isinstance(x, SparseRows) else x


def few(x: Tensor | SparseRows) -> SparseRows | None:
    """The values of x (n, G) that are not zero; None where they are not a faster way to read it.

    On the CPU they are not from a fifth of the values on, for few columns, in another type than float32 and without
    numba; and where a gradient by x is asked for. Elsewhere rows are taken as they come, and tensors left as they are.
    """
    if x.device.type != "cpu":
        return x if isinstance(x, SparseRows) else None
    suits = x.dtype == torch.float32 and len(x.shape) == 2
    if not suits or x.shape[1] < FEWEST_COLUMNS or not len(x) or not has_numba():
        return None
    if isinstance(x, SparseRows):
        return x if len(x.values) <= DENSEST * x.shape.numel() else None
    return None if x.requires_grad else SparseRows.of(x, DENSEST)


class _Linear(torch.autograd.Function):
    """The product, and its gradients by weight and bias; of first order."""

    @staticmethod
    def forward(ctx: Any, rows: SparseRows, weight: Tensor, bias: Tensor) -> Tensor:
        """The product, (n, H)."""
        from sccvae import _rows_loops

        ctx.rows = rows
        out = torch.empty(len(rows), weight.shape[1])
        given = *rows.arrays(), *(t.detach().contiguous().numpy() for t in (weight, bias, out))
        in_threads(_rows_loops.product, len(out), len(rows.values) * 8, *given)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, Tensor]:
        """Gradients by weight (G, H) and bias (H,), for that of the product, (n, H)."""
        from sccvae import _rows_loops

        by_weight, zero = torch.empty(ctx.rows.n_columns, g.shape[1]), np.zeros(g.shape[1], np.float32)
        given = *ctx.rows.turned, g.contiguous().numpy(), zero, by_weight.numpy()
        in_threads(_rows_loops.product, len(by_weight), len(ctx.rows.values) * 8, *given)
        return None, by_weight, g.sum(0)
