"""The conditional variational autoencoder on AnnData."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
from anndata import AnnData

from sccvae import module
from sccvae.distributions import Likelihood
from sccvae.model._base import BaseModel, settings_of
from sccvae.model._correction import CorrectionMixin
from sccvae.model._counterfactual import CounterfactualMixin, PerturbationMixin
from sccvae.model._differential import DifferentialMixin
from sccvae.model._latent import VariationalMixin
from sccvae.model._mapping import MappingMixin
from sccvae.model._predictive import PredictiveMixin
from sccvae.model._sampling import SamplingMixin

#: Normals of the mixture, if nothing else is said.
N_COMPONENTS = 20


class CVAE(
    VariationalMixin,
    CorrectionMixin,
    DifferentialMixin,
    CounterfactualMixin,
    PerturbationMixin,
    PredictiveMixin,
    SamplingMixin,
    MappingMixin,
    BaseModel,
):
    """Conditional VAE (source text 4.3.1): removes batch effects, or separates known conditions.

    Parameters
    ----------
    adata
        AnnData after ``CVAE.setup_anndata`` with at least one condition: ``batch_key``,
        ``categorical_covariate_keys`` or
        ``continuous_covariate_keys``.
    prior
        ``"mixture"``: p(x|z,c) p(z), z forgets the conditions (batch-effect removal); p(z) is a mixture of normals,
        learned and shared by all conditions. ``"fixed"``: the same with p(z) = N(0, I). ``"learned"``: p(x|z) p(z|c),
        one blob in z for each condition.
    n_components
        Number of normals in the mixture; of no other prior.
    encode_condition
        q(z|x,c) if true, else q(z|x).
    alignment
        Weight, in nats, of a penalty on the distance between the batches in z; not with the learned prior. 0 for
        none; None for 0.3 for each gene, 300 from 1,000 genes on (0.2 and 200 with another ``likelihood`` than the
        default).
    likelihood
        As for :class:`VAE`. None for a negative binomial with an offset and a dispersion for each gene and batch
        (without a ``batch_key`` for each gene and category of the first categorical covariate; without either, and with
        the learned prior: ``"nb"``).
    kl
        As for :class:`VAE`, but for the mixture, which has no analytic KL: there it is ``"monte_carlo"``.
    n_latent, n_hidden, n_layers, n_samples, activation, norm, dropout, skip, input_dropout, seed, registry
        As for :class:`VAE`.

    Examples
    --------
    >>> sccvae.model.CVAE.setup_anndata(adata, layer="counts", batch_key="batch")
    >>> model = sccvae.model.CVAE(adata)
    >>> model.train()
    >>> adata.obsm["X_cvae"] = model.get_latent_representation()
    >>> model.correct(transform_batch="batch0")  # adata.layers["corrected"]
    """

    def __init__(
        self,
        adata: AnnData | None = None,
        *,
        prior: Literal["mixture", "fixed", "learned"] = "mixture",
        n_components: int = N_COMPONENTS,
        encode_condition: bool = True,
        alignment: float | None = None,
        likelihood: str | dict | Likelihood | None = None,
        n_latent: int | None = None,
        n_hidden: int | None = None,
        n_layers: int = 1,
        kl: Literal["analytic", "monte_carlo"] = "analytic",
        n_samples: int = 1,
        activation: str = "relu",
        norm: Literal["batch", "layer"] | None = "batch",
        dropout: float = 0.0,
        skip: bool = False,
        input_dropout: float | None = None,
        seed: int = 0,
        registry: dict | None = None,
    ) -> None:
        super().__init__(adata, registry, seed, settings_of(locals()))
        if adata is None:  # what is loaded was warned of when it was made
            return
        if prior != "mixture" and n_components != N_COMPONENTS:
            msg = f"n_components={n_components} does nothing with prior={prior!r}: it is of prior='mixture'."
            warnings.warn(msg, UserWarning, stacklevel=2)
        if not self.schema.continuous and all(n == 1 for n in self.schema.n_categories):
            keys = list(self.schema.categories)
            msg = (
                f"adata.obs{keys} has a single category: there is no batch effect to model, and the CVAE acts as a VAE."
            )
            warnings.warn(msg, UserWarning, stacklevel=2)

    def _in_use(self) -> dict[str, Any]:
        found = super()._in_use()
        if self.module.mixture is None:
            del found["n_components"]
        else:
            found["kl"] = "monte_carlo"
        return found

    def _make_module(self) -> module.CVAE:
        if not self.schema.categories and not self.schema.continuous:
            msg = (
                "A CVAE needs a condition: call CVAE.setup_anndata with batch_key=, categorical_covariate_keys= or "
                "continuous_covariate_keys=; or use a VAE."
            )
            raise ValueError(msg)
        return module.CVAE(
            len(self.schema.var_names), self.schema.n_categories, len(self.schema.continuous), **self.settings
        )

    def prior_centers(self) -> AnnData:
        """Decode the mean of p(z|c) for each combination of conditions in the training data (learned prior only).

        Returns
        -------
        AnnData (combinations, genes) of expected values (at the median library size for counts); obs holds the
        conditions, ``obsm["z"]`` the centres.

        Raises
        ------
        ValueError
            If the prior is shared by the conditions: no centre belongs to one of them.
        """
        if self.module.shared_prior:
            msg = (
                f"prior={self.settings['prior']!r} has no centres of the conditions; make the model with "
                "prior='learned'."
            )
            raise ValueError(msg)
        codes = self._known_codes
        library = np.full((len(codes), 1), self.reference["library_quantiles"][50], dtype=np.float32)
        return self._generate(codes, library, mean=True, seed=0, center=True)
