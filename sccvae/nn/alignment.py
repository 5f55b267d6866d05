"""How far the batches lie apart in a latent space: the maximum mean discrepancy, and the kinds of cells it compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sccvae._rows import SparseRows

#: Squared widths of the Gaussian kernels, in units of the dimension: a standard normal has a mean square of 2 there.
#: Each is twice the one before.
WIDTHS = (0.5, 1.0, 2.0, 4.0)
#: Least weight of a cell of a kind that only one side holds: batches cannot stay apart by being kinds of their own.
LEAST = 0.1
#: Cells of a kind on each side, as a sum of weights, from which on they are compared: two, nearly.
FEWEST = 1.5


@dataclass(frozen=True)
class CellKinds:
    """Kinds of cells that are known before training, and which of their cells other batches hold as well.

    Attributes
    ----------
    axes
        Directions among the genes, (G, d) floating.
    landmarks
        Points that stand for the cells around them in each batch, on these axes, (n_batch, L, d) floating. A batch with
        fewer repeats one.
    weights
        How far the cells there are of each kind, times how far other batches hold such cells, (n_batch, L, K) in
        [0, 1]; zeros for a batch without cells.
    overlap
        How alike the shares of the kinds are in a batch and in all others, in [0, 1]: 0 where no batch has a kind of
        another, 1 where they differ as by chance.
    """

    axes: Tensor
    landmarks: Tensor
    weights: Tensor
    overlap: float = 1.0

    def to(self, device: torch.device | str) -> CellKinds:
        """The same on a device."""
        if self.axes.device == torch.device(device):
            return self
        return CellKinds(self.axes.to(device), self.landmarks.to(device), self.weights.to(device), self.overlap)

    @torch.no_grad()
    def __call__(self, x: Tensor | SparseRows, batch: Tensor) -> Tensor:
        """Weight of each kind, (n, K), for cells x (n, G) on the scale of the axes, and their batches (n,).

        Those of the nearest landmark in the cell's batch.
        """
        axes, points = self.axes, self.landmarks
        with torch.autocast(x.device.type, enabled=False):  # distances would lose their digits
            z = x.linear(axes, axes.new_zeros(axes.shape[1])) if isinstance(x, SparseRows) else x.to(axes.dtype) @ axes
            near = (z @ points.flatten(0, 1).T).view(len(z), *points.shape[:2])  # to all: cheaper than to gather own
        near = near[torch.arange(len(z), device=z.device), batch] - points.square().sum(-1)[batch] / 2
        return self.weights[batch, near.argmax(1)]


def batch_discrepancy(
    z: Tensor, batch: Tensor, n_batch: int, kinds: Tensor | None = None, *, within: bool = False
) -> Tensor:
    """Squared maximum mean discrepancy between each batch and all others, averaged over the cells.

    MMD^2(A, B) = E k(a, a') + E k(b, b') - 2 E k(a, b), estimated without bias (so it can be below zero), with k the
    mean of Gaussian kernels of several widths. It is zero exactly if both have the same distribution. Batches with
    fewer than two cells, or fewer than two others, are left out.

    With ``kinds`` the expectations are over what both sides hold: with shares a_k and b_k of the kinds on the two sides
    a cell of kind k counts min(a_k, b_k) / a_k, or / b_k, times; and the discrepancy sum_k min(a_k, b_k) times. So a
    batch that holds other kinds of cells, or more of one, is hardly drawn to what the others hold. Hardly: each of
    these factors f is LEAST + (1 - LEAST) f.

    ``within`` kinds only cells of the same kind are compared: the sum over k of min(a_k, b_k) MMD^2(A_k, B_k), in which
    a cell counts by its weight for k. For kinds that do not move with z: by kinds of z the batches could stay apart as
    kinds of their own.

    Parameters
    ----------
    z
        Draws, (n, d).
    batch
        Batch of each, (n,) int64.
    n_batch
        Number of batches.
    kinds
        Probabilities of the kinds of each, (n, K), or weights with sums below one; without gradient. None compares all
        cells with all.
    within
        Compare cells of the same kind alone; needs ``kinds``.

    Returns
    -------
    A scalar with a gradient by z, of first order.

    References
    ----------
    Gretton, Borgwardt, Rasch, Schoelkopf, Smola 2012, A kernel two-sample test, JMLR 13, lemma 6.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if z.device.type == "cpu" and n_batch > len(z) // 8:  # of many batches a mini-batch holds a few
        batch = batch.unique(return_inverse=True)[1]
        n_batch = int(batch.max()) + 1 if len(batch) else 1
    with torch.autocast(z.device.type, enabled=False):  # the parts all but cancel
        find = _weights_within if within else _weights
        weight = find(batch, n_batch, None if kinds is None else kinds.to(z.dtype), z.dtype)
        return _SumOfKernels.apply(z, weight)


@torch.no_grad()
def _weights(batch: Tensor, n_batch: int, kinds: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weight of k(z_i, z_j) in the discrepancy, (n, n): symmetric, its diagonal zero."""
    n = len(batch)
    own = torch.nn.functional.one_hot(batch, n_batch).to(dtype)  # (n, n_batch), as all below
    rest = 1 - own
    size, overlap = own.sum(0), 1.0
    enough = (size > 1) & (n - size > 1)
    if kinds is not None:
        a, b = (kinds.T @ side / side.sum(0).clamp(min=1) for side in (own, rest))  # (K, n_batch)
        both = torch.minimum(a, b)
        own, rest = (
            side * (LEAST + (1 - LEAST) * (kinds @ (both / share.clamp(min=1e-6))))
            for side, share in ((own, a), (rest, b))
        )
        overlap = LEAST + (1 - LEAST) * both.sum(0)
    return _of_sides(own, rest, enough * overlap * size / n)


@torch.no_grad()
def _weights_within(batch: Tensor, n_batch: int, kinds: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, of cells of the same kind: a discrepancy for each batch and kind."""
    n = len(batch)
    of_batch = torch.nn.functional.one_hot(batch, n_batch).to(dtype)
    own, rest = ((side[:, :, None] * kinds[:, None]).flatten(1) for side in (of_batch, 1 - of_batch))  # (n, n_batch K)
    size = of_batch.sum(0).repeat_interleave(kinds.shape[1])
    share, share_rest = own.sum(0) / size.clamp(min=1), rest.sum(0) / (n - size).clamp(min=1)
    enough = (own.sum(0) > FEWEST) & (rest.sum(0) > FEWEST)
    return _of_sides(own, rest, enough * torch.minimum(share, share_rest) * size / n)


def _of_sides(own: Tensor, rest: Tensor, each: Tensor) -> Tensor:
    """Sum of discrepancies between two sides, weights (n, m) each, times ``each`` (m,): (n, n)."""
    within = (own * (each / _pairs(own))) @ own.T + (rest * (each / _pairs(rest))) @ rest.T
    between = (own * (each / (own.sum(0) * rest.sum(0)).clamp(min=1e-6))) @ rest.T
    return (within - between - between.T).fill_diagonal_(0)


def _pairs(weight: Tensor) -> Tensor:
    """Sum of w_i w_j over pairs i != j, for weights (n, ...)."""
    return (weight.sum(0).square() - weight.square().sum(0)).clamp(min=1e-6)


class _SumOfKernels(torch.autograd.Function):
    """Sum of w_ij k(z_i, z_j) and, with it, its gradient by z: a tenth of the operations of autograd's."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor) -> Tensor:
        """The sum, a scalar, for z (n, d) and weights (n, n)."""
        z = z - z.mean(0)
        distance = _squared_distances(z).div_(z.shape[1])
        kernel = torch.exp(distance / -WIDTHS[-1])
        total, slope = kernel.clone(), kernel / -WIDTHS[-1]
        for w in WIDTHS[-2::-1]:
            kernel.square_()  # each width is half of the one after it
            total += kernel
            slope.sub_(kernel, alpha=1 / w)
        by_distance = slope.mul_(weight)  # twice each: the weights are symmetric
        gradient = z * by_distance.sum(1, keepdim=True) - by_distance @ z
        ctx.save_for_backward(gradient * (4 / (z.shape[1] * len(WIDTHS))))
        return (weight * total).sum() / len(WIDTHS)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """Gradient by z, (n, d)."""
        return g * ctx.saved_tensors[0], None


def _squared_distances(z: Tensor) -> Tensor:
    """Between all rows of z (n, d), (n, n)."""
    if z.device.type == "cpu":
        return torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").square_()
    squares = z.square().sum(-1)  # a GPU takes a block of threads for each pair in cdist
    return torch.addmm(squares[:, None] + squares, z, z.T, alpha=-2).clamp_(min=0)
