"""Draws from the posterior predictive distribution, and the check of a model against its data by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from sccvae.data.masked import measured
from sccvae.model._base import evaluating
from sccvae.model._decoding import Change
from sccvae.model._parameters import ParametersMixin
from sccvae.nn import check_sizes
from sccvae.train.callbacks import progress

#: What is compared, gene by gene.
STATISTICS = ("mean", "variance", "zero_fraction")


class PredictiveMixin(ParametersMixin):
    """Replicated cells, for models with a random latent variable."""

    def posterior_predictive_sample(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        condition: Mapping[str, Any] | None = None,
        shift: np.ndarray | None = None,
        n_samples: int = 1,
        gene_list: Sequence[str] | str | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> sparse.csr_matrix | np.ndarray:
        """Draw each cell anew: z from q(z|x,c), then x from p(x|z,c).

        The draws have the noise of measured cells, so statistics of the two can be compared, on any scale.

        Parameters
        ----------
        adata, indices, batch_size
            As for ``get_latent_representation``.
        condition
            Draw the cells under these conditions, as in ``predict_counterfactual``; None keeps each cell's own. What
            scvi-tools calls ``transform_batch="b"`` is ``condition={batch_key: "b"}``.
        shift
            Added to z, (n_latent,), such as ``latent_delta(...)``; None for nothing.
        n_samples
            Draws of each cell.
        gene_list
            As for ``get_normalized_expression``.
        seed
            Of the draws: the same seed gives the same, so pass another for others.

        Returns
        -------
        (n, genes) float32, CSR for counts (drawn at each cell's own library size), else an array. For several draws an
        array (n, genes, n_samples), as scvi-tools has it, but dense: it takes four bytes for each value.

        Raises
        ------
        TypeError, ValueError
            As for ``predict_counterfactual``; and if ``shift`` has another shape.
        """
        check_sizes(n_samples=n_samples)
        change = Change() if condition is None else self._change(condition)
        if shift is not None:
            change = Change(change.codes, change.covariates, self._shift(shift).shift)
        columns = self._columns(gene_list, adata)
        as_csr, parts = self.module.likelihood.support == "counts" and n_samples == 1, []
        options = {"n_samples": n_samples, "batch_size": batch_size}
        with evaluating(seed):
            for _, observations in self._observations(adata, indices, [change], **options):
                draws = [p_x.sample() for p_x in observations]
                values = draws[0] if n_samples == 1 else torch.stack(draws, -1)
                values = (values if columns is None else values[:, columns]).cpu().numpy()
                parts.append(sparse.csr_matrix(values) if as_csr else values)
        return sparse.vstack(parts, format="csr") if as_csr else np.concatenate(parts)

    def posterior_predictive_check(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        n_samples: int = 100,
        band: float = 0.9,
        batch_size: int | None = None,
        seed: int = 0,
        progress_bar: bool = True,
    ) -> pd.DataFrame:
        """Mean, variance and share of zeros of each gene, beside those of replicated data sets.

        A replicated data set holds every cell drawn once from its posterior predictive (see
        :meth:`posterior_predictive_sample`). The band of a gene runs between two quantiles of its statistic over the
        replicated data sets. It is as wide as the sampling noise of that many cells and no wider: with many cells,
        small misfits show. Memory is genes x ``n_samples``, however many cells there are.

        Parameters
        ----------
        adata, indices, batch_size, seed
            As for ``get_latent_representation``. Cells that the model was not trained on make it a stricter test.
        n_samples
            Number of replicated data sets, at least 2.
        band
            Share of the replicated values within the band, the rest cut off evenly at both ends; above 0, below 1.
        progress_bar
            Show the cells done.

        Returns
        -------
        Genes x columns, without the genes that a query lacks, which have nothing to compare. For each of ``mean``,
        ``variance`` (divided by n) and ``zero_fraction``, on the scale of the input: ``<statistic>`` of the cells,
        ``<statistic>_low`` and ``<statistic>_high`` (float64), and ``<statistic>_inside`` (bool).
        :func:`sccvae.pl.posterior_predictive` draws it; the mean of a last column is the share of genes that the model
        describes.

        Raises
        ------
        ValueError
            If ``n_samples`` or ``band`` is out of range, and as for ``get_latent_representation``.
        TypeError
            If ``n_samples`` is no whole number.

        References
        ----------
        Gelman, Meng & Stern 1996, "Posterior predictive assessment of model fitness via realized discrepancies",
        Statistica Sinica 6:733-807.
        """
        check_sizes(n_samples=n_samples)
        if n_samples < 2 or not 0 < band < 1:
            msg = f"n_samples={n_samples} must be at least 2, and band={band} above 0 and below 1."
            raise ValueError(msg)
        n, n_genes = len(self._rows(adata, indices)), len(self.schema.var_names)
        real = _Moments(1, n_genes)
        replicated = _Moments(n_samples, n_genes)
        with (
            evaluating(seed),
            progress(total=n, unit=" cells", disable=not progress_bar, desc="posterior predictive") as bar,
        ):
            stream = self._observations(adata, indices, [Change()], n_samples=n_samples, batch_size=batch_size)
            for batch, observations in stream:
                real.add(0, batch.dense)
                for i, p_x in enumerate(observations):
                    replicated.add(i, p_x.sample())
                bar.update(len(batch))
        found = {}
        for name, one, many in zip(STATISTICS, real.statistics(n), replicated.statistics(n), strict=True):
            low, high = np.quantile(many, [(1 - band) / 2, (1 + band) / 2], axis=0)
            found |= {name: one[0], f"{name}_low": low, f"{name}_high": high}
            found[f"{name}_inside"] = (one[0] >= low) & (one[0] <= high)
        table = pd.DataFrame(found, index=pd.Index(self.schema.var_names))
        return table[measured(self._given(adata), self.schema)]


class _Moments:
    """Running sums over cells of data sets with the same genes, float64."""

    def __init__(self, n_sets: int, n_genes: int) -> None:
        self.totals = np.zeros((3, n_sets, n_genes))

    def add(self, i: int, x: torch.Tensor) -> None:
        """Add cells (n, n_genes) to data set ``i``."""
        x = x.double()
        for total, part in zip(self.totals, (x.sum(0), x.square().sum(0), (x == 0).sum(0)), strict=True):
            total[i] += part.cpu().numpy()

    def statistics(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Those of ``STATISTICS``, each (n_sets, n_genes), of ``n`` cells."""
        first, second, zeros = self.totals / n
        return first, np.maximum(second - first**2, 0), zeros
