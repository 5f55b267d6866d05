"""The variational autoencoder on AnnData."""

from __future__ import annotations

from typing import Literal

from anndata import AnnData

from sccvae import module
from sccvae.distributions import Likelihood
from sccvae.model._base import BaseModel, settings_of
from sccvae.model._correction import CorrectionMixin
from sccvae.model._counterfactual import PerturbationMixin
from sccvae.model._differential import DifferentialMixin
from sccvae.model._latent import VariationalMixin
from sccvae.model._mapping import MappingMixin
from sccvae.model._predictive import PredictiveMixin
from sccvae.model._sampling import SamplingMixin


class VAE(
    VariationalMixin,
    CorrectionMixin,
    DifferentialMixin,
    PerturbationMixin,
    PredictiveMixin,
    SamplingMixin,
    MappingMixin,
    BaseModel,
):
    """Variational autoencoder: p(x|z) N(z; 0, I), q(z|x) (source text 4.2).

    Parameters
    ----------
    adata
        AnnData after ``VAE.setup_anndata``. Conditions are not used, as a warning in the log says: see
        :class:`CVAE`.
    likelihood
        p(x|z): ``"nb"``, ``"zinb"``, ``"poisson"`` for raw counts; ``"normal"`` (a sigma-VAE with one learned sigma
        for each
        gene, 4.2.7) for log-normalised values; ``"bernoulli"`` for pixels; or an object of ``sccvae.distributions``.
    n_latent
        Dimension of z. None for 20 below 1,000 cells, else 10.
    n_hidden
        Width of the hidden layers. None for 64 below 1,000 cells, 128 below 5,000, else 256.
    n_layers
        Number of hidden layers on either side.
    kl
        ``"analytic"`` (equation 4.13) or ``"monte_carlo"`` (equation 4.10).
    n_samples
        Draws of z for each cell in the ELBO.
    activation, norm, dropout, skip
        As for :class:`sccvae.nn.MLP`.
    input_dropout
        Probability of dropping an input of the encoder while training: it learns less of the noise of few cells by
        heart, and z holds less of it. None for 0.6 for counts of at least 700 genes, 0.5 of at least 300, else 0; where
        fewer than half of the counts are zero, less in proportion. ``settings`` then holds the number.
    seed
        Of the initial weights.
    registry
        Saved set-up, to make a model without data.

    Examples
    --------
    >>> sccvae.model.VAE.setup_anndata(adata, layer="counts")
    >>> model = sccvae.model.VAE(adata)
    >>> model.train()
    >>> adata.obsm["X_vae"] = model.get_latent_representation()
    """

    _reads_conditions = False

    def __init__(
        self,
        adata: AnnData | None = None,
        *,
        likelihood: str | dict | Likelihood = "nb",
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

    def _make_module(self) -> module.VAE:
        return module.VAE(len(self.schema.var_names), **self.settings)
