"""Improved deep embedded clustering on AnnData."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from anndata import AnnData
from lightning import Callback

from sccvae import module
from sccvae.data import split_indices
from sccvae.model._base import BaseModel, settings_of
from sccvae.model._clustering import ClusteringMixin
from sccvae.model._correction import CorrectionMixin
from sccvae.model._latent import LatentMixin
from sccvae.train import fit_deep_clustering


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
        self,
        max_epochs: int | None = None,
        *,
        batch_size: int = 128,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        kl_weight: float = 1.0,
        kl_warmup: float = 0.2,
        train_size: float = 0.9,
        validation_size: float | None = None,
        early_stopping: bool = True,
        patience: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] = 1,
        checkpoint_dir: str | Path | None = None,
        seed: int = 0,
        progress_bar: bool = True,
        callbacks: Sequence[Callback] = (),
        **trainer_options: Any,
    ) -> None:
        """Pretrain a denoising autoencoder, place the centres at clusters of z, then cluster.

        The clustering ends early when fewer than 0.1 % of the cells change their cluster in an epoch.

        Parameters
        ----------
        max_epochs
            Epochs of the pretraining; None for about 6,000 optimiser steps. The clustering takes at most half of it.
        batch_size, lr, weight_decay, train_size, validation_size, accelerator, devices
            As for :meth:`BaseModel.train`.
        kl_weight, kl_warmup
            As for :meth:`BaseModel.train`; there is no KL term to weight, but no weights of the warm-up are kept.
        early_stopping, patience
            As for :meth:`BaseModel.train`; of the pretraining.
        checkpoint_dir, seed, progress_bar, callbacks, **trainer_options
            As for :meth:`BaseModel.train`.

        Raises
        ------
        ValueError
            If there are fewer training cells than clusters, and as for :meth:`BaseModel.train`.
        FloatingPointError
            If the loss stops being finite.
        """
        store = self._training_store()
        self.train_indices, self.validation_indices, self.test_indices = split_indices(
            len(store), train_size, validation_size, seed
        )
        try:
            result = fit_deep_clustering(
                self.module,
                store,
                self.train_indices,
                self.validation_indices,
                choose_components=self._choose_components,
                max_epochs=max_epochs,
                batch_size=batch_size,
                lr=lr,
                weight_decay=weight_decay,
                kl_weight=kl_weight,
                kl_warmup=kl_warmup,
                early_stopping=early_stopping,
                patience=patience,
                accelerator=accelerator,
                devices=devices,
                checkpoint_dir=checkpoint_dir,
                seed=seed,
                progress_bar=progress_bar,
                callbacks=callbacks,
                **trainer_options,
            )
        finally:  # a training that fails after the choice leaves a model that can still be saved
            self.settings["n_components"] = self.module.n_components
        self._finish_training(result)
