"""Reading the latent space and the fit of a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from anndata import AnnData

from sccvae.model._base import evaluating, inference_batch
from sccvae.nn import check_sizes


class LatentMixin:
    """Embedding and reconstruction error."""

    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        give_mean: bool = True,
        return_dist: bool = False,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Latent coordinates z of cells.

        Parameters
        ----------
        adata
            Cells with the model's genes, in any order; None for the training data.
        indices
            Rows (or a mask) of the cells to embed; None for all.
        give_mean
            The mean of q(z|x), else one draw from it.
        return_dist
            Give mean and variance of q(z|x) instead.
        batch_size
            Cells at a time.
        seed
            Of the draw: the same seed gives the same draw, so pass another for another.

        Returns
        -------
        (n, n_latent) float32; with ``return_dist`` a pair of such arrays.
        """
        if return_dist or not give_mean:
            self._check_draws("return_dist=True" if return_dist else "give_mean=False")
        means, variances = [], []
        with evaluating(seed):
            for batch in self._stream(adata, indices, batch_size):
                q = self.module.inference(batch)["z"]
                if isinstance(q, torch.Tensor):
                    means.append(q)
                else:
                    means.append(q.loc if give_mean or return_dist else q.sample())
                    variances.append(q.variance)
        if return_dist:
            return _numpy(means), _numpy(variances)
        return _numpy(means)

    def get_reconstruction_error(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        return_mean: bool = True,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> float | np.ndarray:
        """Reconstruction term of the negative ELBO: -log p(x|z) in nats for a draw of z; square error for an AE.

        Parameters
        ----------
        adata, indices, batch_size, seed
            As for :meth:`get_latent_representation`.
        return_mean
            Mean over the cells, else one value for each.

        Returns
        -------
        Lower is better. A float, or (n,) float32.
        """
        return self._per_cell(
            lambda b: self.module.elbo_terms(b)["reconstruction"], adata, indices, return_mean, batch_size, seed
        )

    def _per_cell(self, values, adata, indices, return_mean, batch_size, seed) -> float | np.ndarray:
        """``values(batch)`` (n,) over the stream of cells."""
        with evaluating(seed):
            found = _numpy([values(batch) for batch in self._stream(adata, indices, batch_size)])
        return float(found.mean(dtype=np.float64)) if return_mean else found


class VariationalMixin(LatentMixin):
    """Bounds of the evidence, for models with a random latent variable."""

    def get_elbo(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        return_mean: bool = True,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> float | np.ndarray:
        """Evidence lower bound in nats per cell, higher is better (source text, equation 4.8).

        Parameters
        ----------
        adata, indices, return_mean, batch_size, seed
            As for :meth:`get_reconstruction_error`.

        Returns
        -------
        A float, or (n,) float32.
        """
        return self._per_cell(
            lambda b: -sum(self.module.elbo_terms(b).values()), adata, indices, return_mean, batch_size, seed
        )

    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        n_mc_samples: int = 1000,
        return_mean: bool = True,
        batch_size: int | None = 64,
        seed: int = 0,
    ) -> float | np.ndarray:
        """Importance-weighted bound of log p(x|c) in nats per cell, higher is better.

        It approaches the evidence as ``n_mc_samples`` grows; memory stays flat, since draws are taken in chunks.

        Parameters
        ----------
        adata, indices, return_mean, batch_size, seed
            As for :meth:`get_reconstruction_error`.
        n_mc_samples
            Draws from q(z|x) for each cell.

        Returns
        -------
        A float, or (n,) float32.

        Raises
        ------
        ValueError, TypeError
            If ``n_mc_samples`` is below 1, or no whole number.

        References
        ----------
        Burda, Grosse, Salakhutdinov 2016, Importance weighted autoencoders, ICLR, equation 8.
        """
        check_sizes(n_mc_samples=n_mc_samples)
        n_genes = len(self.schema.var_names)
        chunk = max(1, 2**23 // ((batch_size or inference_batch(n_genes)) * n_genes))
        return self._per_cell(
            lambda b: self.module.marginal_ll(b, n_mc_samples, chunk), adata, indices, return_mean, batch_size, seed
        )


def _numpy(parts: list[torch.Tensor]) -> np.ndarray:
    return torch.cat(parts).cpu().numpy()
