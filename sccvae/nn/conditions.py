"""Known conditions (batch, donor, treatment, age) as a vector, and the linear layer that takes them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot

from sccvae._rows import SparseRows

#: Most rows of a weight for which the way matters; of 20 both take as long.
THIN = 16


class Conditions(nn.Module):
    """The vector c of a cell: one-hot categories side by side, then standardised continuous covariates.

    Parameters
    ----------
    n_categories
        Number of categories of each categorical condition, such as ``(2, 8)``.
    n_continuous
        Number of continuous covariates.

    Attributes
    ----------
    width
        Length of c.
    """

    def __init__(self, n_categories: Sequence[int] = (), n_continuous: int = 0) -> None:
        super().__init__()
        self.n_categories = tuple(n_categories)
        self.width = sum(self.n_categories) + n_continuous
        self.register_buffer("center", torch.zeros(n_continuous))
        self.register_buffer("spread", torch.ones(n_continuous))

    def standardise(self, covariates: Tensor) -> None:
        """Take centre and spread of the continuous covariates from the training cells, (n, n_continuous)."""
        if not covariates.shape[1]:
            return
        self.center.copy_(covariates.double().mean(0))
        spread = covariates.double().std(0, correction=0)
        constant = spread <= 1e-6 * covariates.abs().amax(0)  # all but the last digits of float32 agree
        self.spread.copy_(spread.masked_fill(constant, 1.0))

    def forward(self, codes: Tensor, covariates: Tensor) -> Tensor:
        """Build c.

        Parameters
        ----------
        codes
            Category of each condition, (n, len(n_categories)) int64.
        covariates
            Continuous covariates, (n, n_continuous) floating.

        Returns
        -------
        (n, width) floating.
        """
        parts = [one_hot(codes[:, i], n).to(covariates.dtype) for i, n in enumerate(self.n_categories)]
        if covariates.shape[1] or not parts:
            parts.append((covariates - self.center) / self.spread)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def widen(weight: Tensor, known: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Give weights on c columns for new categories, the last of each condition; they start at the mean of the known.

    Parameters
    ----------
    weight
        (n_out, C), with C as for the known categories.
    known, wanted
        Number of categories of each condition, before and after.

    Returns
    -------
    (n_out, C + new). Columns of known categories and of continuous covariates are the same bits as before.
    """
    *blocks, rest = weight.split([*known, weight.shape[1] - sum(known)], dim=1)
    new = [b.mean(1, keepdim=True).expand(-1, m - n) for b, n, m in zip(blocks, known, wanted, strict=True)]
    return torch.cat([*(part for pair in zip(blocks, new, strict=True) for part in pair), rest], dim=1)


def new_columns(known: Sequence[int], wanted: Sequence[int], n_continuous: int = 0) -> Tensor:
    """Which entries of c belong to new categories.

    Parameters
    ----------
    known, wanted
        As for :func:`widen`.
    n_continuous
        Number of continuous covariates.

    Returns
    -------
    (C,) bool, with C as for the wanted categories.
    """
    parts = [torch.arange(m) >= n for n, m in zip(known, wanted, strict=True)]
    return torch.cat([*parts, torch.zeros(n_continuous, dtype=torch.bool)])


def thin_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product x W + b for x (..., n, m), weight (m, k) and bias (k,); on a GPU fast where m or k is small."""
    if not weight.is_cuda or min(weight.shape) > THIN or torch.is_autocast_enabled("cuda"):
        return linear(x, weight.T, bias)
    return _ThinLinear.apply(x.reshape(-1, len(weight)), weight, bias).reshape(*x.shape[:-1], -1)


class _ThinLinear(torch.autograd.Function):
    """For the gradient of a weight of few rows cuBLAS takes 50 us on an H200; of few columns, that is transposed, 5."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The product, (n, k), for x (n, m), weight (m, k) and bias (k,)."""
        ctx.save_for_backward(x, weight)
        return torch.addmm(bias, x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients by x, weight and bias, for that of the product, (n, k)."""
        x, weight = ctx.saved_tensors
        by_weight = (g.T @ x).T if len(weight) < weight.shape[1] else x.T @ g
        return g @ weight.T if ctx.needs_input_grad[0] else None, by_weight, g.sum(0)


class Linear(nn.Module):
    """y = x W + b, with weights by input, (n_in, n_out): the product over counts that are not zero reads rows of them.

    They start as those of :class:`torch.nn.Linear`.

    Parameters
    ----------
    n_in, n_out
        Widths of x and y.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew."""
        start = nn.Linear(*self.weight.shape, device=self.weight.device, dtype=self.weight.dtype)
        self.weight.copy_(start.weight.T)
        self.bias.copy_(start.bias)

    def forward(self, x: Tensor | SparseRows) -> Tensor:
        """Map x (..., n, n_in) to (..., n, n_out)."""
        if isinstance(x, SparseRows):
            return x.linear(self.weight, self.bias)
        return thin_linear(x, self.weight, self.bias)


class ConditionedLinear(nn.Module):
    """y = W h + V c + b: the same as a linear layer on the concatenation [h, c], with V apart so that it can grow.

    Parameters
    ----------
    n_in, n_out
        Widths of h and y.
    n_cond
        Width of c; with 0 this is a plain linear layer.

    Attributes
    ----------
    scale
        None, or after :meth:`adapt` weights S: y = exp(S c) (W h + b) + V c.
    """

    def __init__(self, n_in: int, n_out: int, n_cond: int = 0) -> None:
        super().__init__()
        self.linear = Linear(n_in, n_out)
        self.condition = nn.Linear(n_cond, n_out, bias=False) if n_cond else None
        self.scale: nn.Linear | None = None

    def adapt(self) -> None:
        """Let conditions, if there are any, scale the outputs too; as long as S is zero, as here, they do not."""
        if self.condition is not None:
            n_out, n_cond = self.condition.weight.shape
            # skip_init: nothing is drawn, so the random state of whoever maps a query is left alone.
            device = self.condition.weight.device
            self.scale = nn.utils.skip_init(nn.Linear, n_cond, n_out, bias=False, device=device)
            nn.init.zeros_(self.scale.weight)

    def forward(self, h: Tensor | SparseRows, c: Tensor | None = None) -> Tensor:
        """Map h (..., n, n_in) and c (n, n_cond) to (..., n, n_out)."""
        y = self.linear(h)
        if self.scale is not None:
            y = y * linear(c, self.scale.weight).exp()
        return y if self.condition is None else y + linear(c, self.condition.weight)
