"""The autoencoder on AnnData."""

from __future__ import annotations

from typing import Literal

from anndata import AnnData

from sccvae import module
from sccvae.model._base import BaseModel, settings_of
from sccvae.model._correction import CorrectionMixin
from sccvae.model._counterfactual import PerturbationMixin
from sccvae.model._latent import LatentMixin
from sccvae.model._mapping import MappingMixin


class AE(LatentMixin, CorrectionMixin, PerturbationMixin, MappingMixin, BaseModel):
    """Autoencoder: z = E(x), x = D(z), with square error (source text 3.5).

    Give it values on a scale where square error makes sense: log-normalised expression, or pixels.

    Parameters
    ----------
    adata
        AnnData after ``AE.setup_anndata``. Conditions are not used.
    n_latent
        Dimension of z.
    n_hidden, n_layers
        Width and number of hidden layers on either side.
    linear
        Affine maps: spans the principal components (3.5.1).
    noise, noise_level
        Denoising: ``"gaussian"`` (standard deviation, units of x) or ``"mask"`` (probability), on the input only.
    activation, norm, dropout, skip
        As for :class:`sccvae.nn.MLP`.
    seed
        Of the initial weights.
    registry
        Saved set-up, to make a model without data.

    Examples
    --------
    >>> sccvae.model.AE.setup_anndata(adata)
    >>> model = sccvae.model.AE(adata, n_latent=20)
    >>> model.train()
    >>> adata.obsm["X_ae"] = model.get_latent_representation()
    """

    _reads_conditions = False

    def __init__(
        self,
        adata: AnnData | None = None,
        *,
        n_latent: int = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        linear: bool = False,
        noise: Literal["gaussian", "mask"] | None = None,
        noise_level: float = 0.1,
        activation: str = "relu",
        norm: Literal["batch", "layer"] | None = "batch",
        dropout: float = 0.0,
        skip: bool = False,
        seed: int = 0,
        registry: dict | None = None,
    ) -> None:
        super().__init__(adata, registry, seed, settings_of(locals()))

    def _make_module(self) -> module.AE:
        return module.AE(len(self.schema.var_names), **self.settings)
