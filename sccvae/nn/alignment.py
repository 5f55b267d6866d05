"""How far the batches lie apart in a latent space: the maximum mean discrepancy."""

from __future__ import annotations

import torch
from torch import Tensor

#: Squared widths of the Gaussian kernels, in units of the dimension: a standard normal has a mean square of 2 there.
WIDTHS = (0.5, 1.0, 2.0, 4.0)


def batch_discrepancy(z: Tensor, batch: Tensor, n_batch: int) -> Tensor:
    """Squared maximum mean discrepancy between each batch and all others, averaged over the cells.

    MMD^2(A, B) = E k(a, a') + E k(b, b') - 2 E k(a, b), estimated without bias (so it can be below zero), with k the
    mean of Gaussian kernels of several widths. It is zero exactly if both have the same distribution. Batches with
    fewer than two cells, or fewer than two others, are left out.

    Parameters
    ----------
    z
        Draws, (n, d).
    batch
        Batch of each, (n,) int64.
    n_batch
        Number of batches.

    Returns
    -------
    A scalar with gradient.

    References
    ----------
    Gretton, Borgwardt, Rasch, Schoelkopf, Smola 2012, A kernel two-sample test, JMLR 13, lemma 6.
    """
    n, z = len(z), z.to(torch.promote_types(z.dtype, torch.float32))
    with torch.autocast(z.device.type, enabled=False):  # the three parts all but cancel
        distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").square() / z.shape[1]
        kernel = sum(torch.exp(-distance / w) for w in WIDTHS) / len(WIDTHS)
        kernel = kernel - torch.diag(kernel.diagonal())
        member = torch.nn.functional.one_hot(batch, n_batch).to(z.dtype)  # (n, n_batch)
        sums = member.T @ kernel @ member  # sums of k over the pairs of two batches
        own, row, total = sums.diagonal(), sums.sum(1), sums.sum()
        size = member.sum(0)
        rest = n - size
        enough = (size > 1) & (rest > 1)
        size_, rest_ = size.clamp(min=2), rest.clamp(min=2)
        within = own / (size_ * (size_ - 1))
        others = (total - 2 * row + own) / (rest_ * (rest_ - 1))
        between = (row - own) / (size_ * rest_)
        return (enough * size / n * (within + others - 2 * between)).sum()
