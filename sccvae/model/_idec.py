"""Improved deep embedded clustering on AnnData."""

from __future__ import annotations

from typing import Any, Literal

from anndata import AnnData

from sccvae import module
from sccvae.data import CellStore
from sccvae.model._base import BaseModel, settings_of
from sccvae.model._clustering import ClusteringMixin
from sccvae.model._correction import CorrectionMixin
from sccvae.model._latent import LatentMixin
from sccvae.train import TrainingResult, fit_deep_clustering


class IDEC(ClusteringMixin, LatentMixin, CorrectionMixin, BaseModel):
    """Improved deep embedded clustering: an autoencoder whose latent space is drawn to cluster centres.

    Give it values on a scale where square error makes sense: log-normalised expression, or pixels.

    Parameters
    ----------
    adata
        AnnData after ``IDEC.setup_anndata``. Conditions and labels are not used.
    n_components
        Number K of clusters; None lets a graph clustering of the latent space choose it.
    gamma
        Weight of the clustering loss beside the mean square error of a feature, as in the authors' program.
    noise, noise_level
        Denoising in the pretraining, as for :class:`AE`.
    n_latent, n_hidden, n_layers, activation, norm, dropout, skip, seed, registry
        As for :class:`AE`.

    References
    ----------
    Guo, Gao, Liu, Yin 2017, Improved deep embedded clustering with local structure preservation, IJCAI.

    Examples
    --------
    >>> sccvae.model.IDEC.setup_anndata(adata)
    >>> model = sccvae.model.IDEC(adata, n_components=8)
    >>> model.train()
    >>> adata.obs["idec"] = model.predict()
    """

    _reads_conditions = False

    def __init__(
        self,
        adata: AnnData | None = None,
        *,
        n_components: int | None = None,
        gamma: float = 0.1,
        noise: Literal["gaussian", "mask"] | None = "mask",
        noise_level: float = 0.2,
        n_latent: int = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        activation: str = "relu",
        norm: Literal["batch", "layer"] | None = "batch",
        dropout: float = 0.0,
        skip: bool = False,
        seed: int = 0,
        registry: dict | None = None,
    ) -> None:
        self._choose_components = n_components is None
        super().__init__(adata, registry, seed, settings_of(locals()))

    def _make_module(self) -> module.IDEC:
        settings = dict(self.settings)
        n_components = settings.pop("n_components")
        return module.IDEC(len(self.schema.var_names), 1 if n_components is None else n_components, **settings)

    def train(
        self, max_epochs: int | None = None, *, init: Literal["leiden", "kmeans"] = "leiden", **options: Any
    ) -> None:
        """Pretrain a denoising autoencoder, place the centres at clusters of z, then cluster.

        The clustering ends early when fewer than 0.1 % of the cells change their cluster in an epoch.

        Parameters
        ----------
        max_epochs
            Epochs of the pretraining; None for about 6,000 optimiser steps. The clustering takes at most half of it.
        init
            Where the centres start: at Leiden communities in z and in the principal components, or, as published, by
            k-means (``"kmeans"``), which needs a much longer pretraining. With ``n_components=None`` always Leiden.
        **options
            As for :meth:`BaseModel.train`; ``early_stopping`` and ``patience`` are of the pretraining.

        Raises
        ------
        ValueError
            If there are fewer training cells than clusters, ``init`` is not known, and as for :meth:`BaseModel.train`.
        FloatingPointError
            If the loss stops being finite.
        """
        super().train(max_epochs, init=init, **options)

    def _fit(self, store: CellStore, **options: Any) -> TrainingResult:
        options["settings"] |= {"init": options["init"]}
        self.reference["chooses_components"] = self._choose_components
        try:
            return fit_deep_clustering(
                self.module,
                store,
                self.train_indices,
                self.validation_indices,
                choose_components=self._choose_components,
                **options,
            )
        finally:  # a training that fails after the choice leaves a model that can still be saved
            self.settings["n_components"] = self.module.n_components
