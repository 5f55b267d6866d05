"""A mixture of diagonal normals whose log density takes few operations, each far smaller than its launch."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution


class NormalMixture(Distribution):
    """p(z) = sum_k pi_k N(z; m_k, diag s_k^2) of vectors z (..., d).

    Parameters
    ----------
    loc, log_scale
        Means m_k and log standard deviations, (K, d) floating.
    logits
        Log of the shares pi_k, up to a constant, (K,) floating.
    """

    arg_constraints: ClassVar = {}

    def __init__(self, loc: Tensor, log_scale: Tensor, logits: Tensor) -> None:
        super().__init__(event_shape=loc.shape[-1:], validate_args=False)
        self._given = loc, log_scale, logits

    @property
    def mean(self) -> Tensor:
        """Expected z, (d,)."""
        loc, _, logits = self._given
        return logits.softmax(-1) @ loc

    @property
    def variance(self) -> Tensor:
        """Variance of each value of z, (d,)."""
        loc, log_scale, logits = self._given
        return logits.softmax(-1) @ ((2 * log_scale).exp() + (loc - self.mean).square())

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density in nats, (...,), for z (..., d); with gradients of first order by z and the parameters."""
        return _LogDensity.apply(z, *self._given)

    @torch.no_grad()
    def responsibilities(self, z: Tensor) -> Tensor:
        """p(k|z) of each normal, (..., K), for z (..., d); without gradient."""
        return _joint(z, *self._given)[0].softmax(-1)

    @torch.no_grad()
    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Draw z, ``(*sample_shape, d)``."""
        return self.sample_of(Categorical(logits=self._given[2], validate_args=False).sample(sample_shape))

    @torch.no_grad()
    def sample_of(self, k: Tensor) -> Tensor:
        """Draw z of the normals ``k`` (...) int64, (..., d)."""
        loc, log_scale, _ = self._given
        return loc[k] + log_scale[k].exp() * torch.randn_like(loc[k])  # torch.normal would wait for a GPU


def _joint(z: Tensor, loc: Tensor, log_scale: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log pi_k N(z; m_k, s_k), (..., K); (z - m_k) / s_k, (..., K, d); and 1 / s_k, (K, d)."""
    one_over = (-log_scale).exp()
    e = (z[..., None, :] - loc) * one_over
    constant = logits.log_softmax(-1) - log_scale.sum(-1) - 0.5 * loc.shape[-1] * math.log(2 * math.pi)
    return constant - 0.5 * e.square().sum(-1), e, one_over


class _LogDensity(torch.autograd.Function):
    """The log density and, from what it takes, its gradients: a quarter of the operations of autograd's."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, loc: Tensor, log_scale: Tensor, logits: Tensor) -> Tensor:
        """Log density in nats, (...,), for z (..., d)."""
        joint, e, one_over = _joint(z, loc, log_scale, logits)
        total = joint.logsumexp(-1)
        ctx.save_for_backward(e, one_over, (joint - total[..., None]).exp(), logits)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients by z (..., d), loc and log scale (K, d) and logits (K,), for that of the result, (...,)."""
        e, one_over, share, logits = ctx.saved_tensors
        of = g[..., None] * share  # (..., K)
        steep = of[..., None] * e  # (..., K, d)
        by_k = of.reshape(-1, len(logits)).sum(0)
        by_loc = steep.reshape(-1, *one_over.shape).sum(0) * one_over
        by_log_scale = (steep * e).reshape(-1, *one_over.shape).sum(0) - by_k[:, None]
        return -(steep * one_over).sum(-2), by_loc, by_log_scale, by_k - g.sum() * logits.softmax(-1)
