"""What a model says of the counts behind the counts: parameters, library sizes, correlations; scvi-tools' names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import stats

from sccvae.distributions import Observation
from sccvae.model._base import evaluating
from sccvae.model._decoding import Change, DecodingMixin
from sccvae.nn import check_sizes


class ParametersMixin(DecodingMixin):
    """Parameters of p(x|z,c), for models of counts with a random latent variable."""

    def get_likelihood_parameters(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        n_samples: int = 1,
        give_mean: bool = False,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """Parameters of p(x|z,c) of each cell, for draws of z; names and shapes are those of scvi-tools.

        Parameters
        ----------
        adata, indices, batch_size, seed
            As for ``posterior_predictive_sample``.
        n_samples
            Draws of z for each cell.
        give_mean
            Give the mean over the draws, else each.

        Returns
        -------
        Arrays (n, genes) float32, for several draws without ``give_mean`` (n_samples, n, genes); genes in the order of
        ``get_normalized_expression``.

        - ``mean``: of the counts, before any dropout
        - ``dispersions``: inverse dispersion theta; not for a ``"poisson"``
        - ``dropout``: probability of a zero of its own kind; for a ``"zinb"`` alone

        Raises
        ------
        ValueError
            If the likelihood is none of counts, or ``n_samples`` is below 1.
        TypeError
            If ``n_samples`` is no whole number.
        """
        self._check_counts("get_likelihood_parameters")
        check_sizes(n_samples=n_samples)
        columns, parts = self._columns(None, adata), []
        options = {"n_samples": n_samples, "batch_size": batch_size}
        with evaluating(seed):
            for _, observations in self._observations(adata, indices, [Change()], **options):
                draws = [_parameters(p_x) for p_x in observations]
                stacked = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
                parts.append({k: (v.mean(0) if give_mean else v).cpu().numpy() for k, v in stacked.items()})
        found = {name: np.concatenate([part[name] for part in parts], axis=-2) for name in parts[0]}
        if columns is not None:
            found = {name: value[..., columns] for name, value in found.items()}
        return found if give_mean or n_samples > 1 else {name: value[0] for name, value in found.items()}

    def get_feature_correlation_matrix(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        transform_batch: Any | Sequence[Any] | None = None,
        n_samples: int = 10,
        rna_size_factor: float = 1000,
        correlation_type: Literal["spearman", "pearson"] = "spearman",
        batch_size: int | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Correlation of genes over cells, without the noise of counting; as scvi-tools has it.

        Rates of Poisson counts are drawn for each cell: z from q(z|x,c), then a gamma of shape theta whose mean is the
        proportion of the gene times ``rna_size_factor`` (with a ``"poisson"`` that mean itself).

        Parameters
        ----------
        adata, indices, batch_size, seed
            As for ``posterior_predictive_sample``.
        transform_batch
            As for ``get_normalized_expression``; the correlations in several batches are averaged.
        n_samples
            Draws for each cell, which all count. Memory: n x ``n_samples`` x genes float32, for each batch.
        rna_size_factor
            Library size of all cells.
        correlation_type
            Of ranks or of values.

        Returns
        -------
        (genes, genes) float64 with names, in the order of ``get_normalized_expression``.

        Raises
        ------
        ValueError
            If the likelihood is none of counts, a batch is not known, or an option is out of range.
        TypeError
            If ``n_samples`` is no whole number.
        """
        self._check_counts("get_feature_correlation_matrix")
        check_sizes(n_samples=n_samples)
        if correlation_type not in ("spearman", "pearson") or not rna_size_factor > 0:
            msg = (
                f"correlation_type={correlation_type!r} must be 'spearman' or 'pearson', and "
                f"rna_size_factor={rna_size_factor} positive."
            )
            raise ValueError(msg)
        columns, genes = self._columns(None, adata), pd.Index(self.schema.var_names)
        changes = self._in_batches(transform_batch)
        rates: list[list[np.ndarray]] = [[] for _ in changes]
        with evaluating(seed):
            stream = self._observations(adata, indices, changes, n_samples=n_samples, batch_size=batch_size)
            for _, observations in stream:
                for i, p_x in enumerate(observations):  # the draws of a change follow each other
                    rate = p_x.expression(rna_size_factor)
                    theta = _parameters(p_x).get("dispersions")
                    rate = rate if theta is None else torch._standard_gamma(theta) * (rate / theta)
                    rates[i // n_samples].append(rate.cpu().numpy())
        found = np.mean([_correlation(np.concatenate(parts), correlation_type) for parts in rates], axis=0)
        table = pd.DataFrame(found, index=genes, columns=genes)
        return table if columns is None else table.iloc[columns, columns]

    def get_latent_library_size(self, adata: AnnData | None = None, indices: Sequence[int] | None = None) -> np.ndarray:
        """Library size of each cell in p(x|z,c): known here, not a latent variable as in some models of scvi-tools.

        Parameters
        ----------
        adata, indices
            As for ``get_latent_representation``.

        Returns
        -------
        (n, 1) float32, in counts: the sum of the cell's counts, or its size factor times what makes such of size
        factors; of a query that lacks genes what all genes would have given.

        Raises
        ------
        ValueError
            If the likelihood is none of counts.
        """
        self._check_counts("get_latent_library_size")
        return self._store(adata).cells.library[self._rows(adata, indices)]

    def _check_counts(self, name: str) -> None:
        if self.module.likelihood.support != "counts":
            likelihood = type(self.module.likelihood).__name__
            msg = f"{name} is of models of counts (likelihood 'nb', 'zinb' or 'poisson'); this one is {likelihood}."
            raise ValueError(msg)


def _parameters(p_x: Observation) -> dict[str, torch.Tensor]:
    """Those of counts, each (n, G)."""
    found = {"mean": p_x.log_mu.exp()}
    if hasattr(p_x, "log_theta"):
        found["dispersions"] = p_x.log_theta.exp().expand_as(p_x.log_mu)
    if hasattr(p_x, "logits"):
        found["dropout"] = torch.sigmoid(p_x.logits)
    return found


def _correlation(values: np.ndarray, kind: str) -> np.ndarray:
    """Of the columns of values (n, G), (G, G); NaN for one that does not vary."""
    values = stats.rankdata(values, axis=0) if kind == "spearman" else values.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.atleast_2d(np.corrcoef(values, rowvar=False))
