"""Feed-forward networks (source text, definition 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import batch_norm, softplus

from sccvae._rows import SparseRows
from sccvae.nn.conditions import ConditionedLinear, thin_linear

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}
"""Activation functions by name (definition 3.1 and the usual others)."""


class _RowNorm(nn.Module):
    """Batch norm over all leading axes, so that (samples, n, width) is normalised as (samples * n, width).

    While ``frozen``, it normalises with its running statistics in training too, and leaves them as they are; while not
    ``tracked``, it normalises with those of the mini-batch, and leaves the running ones as they are.
    """

    frozen, tracked = False, True

    def __init__(self, width: int) -> None:
        super().__init__()
        # Running means over about 20 mini-batches: torch's 10 make the validation loss jump, scVI's 100 lag behind.
        self.norm = nn.BatchNorm1d(width, momentum=0.05, eps=1e-3)

    def forward(self, h: Tensor) -> Tensor:
        """Normalise h (..., width), each column over all rows; the same shape."""
        rows, n = h.reshape(-1, h.shape[-1]), self.norm
        training = self.training and not self.frozen  # not as n(rows): it also counts its calls, which nobody reads
        mean, var = (n.running_mean, n.running_var) if self.tracked or not training else (None, None)
        return batch_norm(rows, mean, var, n.weight, n.bias, training, n.momentum, n.eps).reshape(h.shape)


def frozen_statistics(net: nn.Module) -> AbstractContextManager[None]:
    """Inside, every batch norm of ``net`` normalises with its running statistics, and leaves them as they are.

    Parameters
    ----------
    net
        A network of :class:`MLP`.

    Returns
    -------
    The context.
    """
    return _norms_with(net, "frozen", True)


def untracked_statistics(net: nn.Module) -> AbstractContextManager[None]:
    """Inside, no batch norm of ``net`` takes note of what it sees: for inputs that are no data.

    Parameters
    ----------
    net
        A network of :class:`MLP`.

    Returns
    -------
    The context.
    """
    return _norms_with(net, "tracked", False)


@contextmanager
def _norms_with(net: nn.Module, name: str, value: bool) -> Iterator[None]:
    norms = [layer for layer in net.modules() if isinstance(layer, _RowNorm)]
    before = [getattr(layer, name) for layer in norms]
    try:
        for layer in norms:
            setattr(layer, name, value)
        yield
    finally:
        for layer, old in zip(norms, before, strict=True):
            setattr(layer, name, old)


def _norm(kind: str | None, width: int) -> nn.Module:
    match kind:
        case None:
            return nn.Identity()
        case "batch":
            return _RowNorm(width)
        case "layer":
            return nn.LayerNorm(width)
        case _:
            msg = f"norm={kind!r} is not known; choose 'batch', 'layer' or None."
            raise ValueError(msg)


def check_sizes(**sizes: int) -> None:
    """Refuse a width that is no whole number, or below 1, under the name that the user gave it.

    Parameters
    ----------
    **sizes
        Name and value of each width.

    Raises
    ------
    TypeError
        If a size is not a whole number.
    ValueError
        If a size is not positive.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral):
            msg = f"{name}={size!r} must be a whole number, at least 1."
            raise TypeError(msg)
        if size < 1:
            msg = f"{name}={size} must be at least 1."
            raise ValueError(msg)


class MLP(nn.Module):
    """Linear layers with norm, activation and dropout; conditions enter every layer.

    Parameters
    ----------
    n_in
        Width of the input.
    n_hidden
        Widths of the layers; empty for the identity map.
    n_cond
        Width of the conditions c, 0 for none.
    activation
        A name in :data:`ACTIVATIONS`.
    norm
        ``"batch"``, ``"layer"`` or None.
    dropout
        Probability of dropping a hidden unit.
    skip
        Give the input to every later layer too (rule 5 of definition 3.3: edges that jump levels).

    Attributes
    ----------
    n_out
        Width of the output.

    Raises
    ------
    ValueError
        If the activation or norm is not known, a width is not positive, or conditions have no layer to enter.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: Sequence[int],
        *,
        n_cond: int = 0,
        activation: str = "relu",
        norm: Literal["batch", "layer"] | None = "batch",
        dropout: float = 0.0,
        skip: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            msg = f"activation={activation!r} is not known; choose one of {sorted(ACTIVATIONS)}."
            raise ValueError(msg)
        check_sizes(n_in=n_in, n_hidden=min(n_hidden, default=1))
        if n_cond and not n_hidden:
            msg = "A network without layers cannot take conditions in; use n_layers of at least 1."
            raise ValueError(msg)
        self.skip = skip
        self.linears = nn.ModuleList()
        self.afters = nn.ModuleList()
        width = n_in
        for i, n in enumerate(n_hidden):
            self.linears.append(ConditionedLinear(width + (n_in if skip and i else 0), n, n_cond))
            self.afters.append(nn.Sequential(_norm(norm, n), ACTIVATIONS[activation](), nn.Dropout(dropout)))
            width = n
        self.n_out = width

    def forward(self, x: Tensor | SparseRows, c: Tensor | None = None) -> Tensor:
        """Map x (..., n, n_in) and conditions c (n, n_cond) to (..., n, n_out)."""
        if isinstance(x, SparseRows) and (self.skip or not self.linears):
            x = x.dense()
        h = x
        for i, (layer, after) in enumerate(zip(self.linears, self.afters, strict=True)):
            h = after(layer(torch.cat([h, x], dim=-1) if self.skip and i else h, c))
        return h


class GaussianEncoder(nn.Module):
    """A network for a diagonal normal: N(loc(h), scale(h)) with h = MLP(x, c).

    Parameters
    ----------
    n_in
        Width of the input.
    n_latent
        Dimension of the normal.
    **mlp
        As for :class:`MLP`.

    Raises
    ------
    ValueError
        As for :class:`MLP`, or if ``n_latent`` is not positive.
    """

    #: Smallest standard deviation: keeps log(scale) finite whatever the weights.
    MIN_SCALE = 1e-4

    def __init__(self, n_in: int, n_latent: int, **mlp) -> None:
        super().__init__()
        check_sizes(n_latent=n_latent)
        self.body = MLP(n_in, **mlp)
        self.loc = nn.Linear(self.body.n_out, n_latent)
        self.scale = nn.Linear(self.body.n_out, n_latent)

    def forward(self, x: Tensor | SparseRows, c: Tensor | None = None) -> Normal:
        """The normal for x (..., n, n_in) and c (n, n_cond): loc and scale (..., n, n_latent)."""
        return self.head(self.body(x, c))

    def mean(self, x: Tensor | SparseRows, c: Tensor | None = None) -> Tensor:
        """Its loc alone, (..., n, n_latent)."""
        return thin_linear(self.body(x, c), self.loc.weight.T, self.loc.bias)

    def head(self, h: Tensor) -> Normal:
        """The normal for the output h (..., n, n_out) of the body."""
        loc, scale = self.loc, self.scale
        if h.is_cuda:  # in one product: each takes longer to launch than to do
            weight, bias = torch.cat([loc.weight, scale.weight]), torch.cat([loc.bias, scale.bias])
            mean, raw = thin_linear(h, weight.T, bias).chunk(2, -1)
        else:
            mean, raw = loc(h), scale(h)
        return Normal(mean, softplus(raw) + self.MIN_SCALE, validate_args=False)
