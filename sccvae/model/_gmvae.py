"""The Gaussian-mixture variational autoencoder on AnnData."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from sccvae import module
from sccvae.data import CellStore
from sccvae.data.categories import match, obs_column, of_cells
from sccvae.distributions import Likelihood
from sccvae.model._base import BaseModel, settings_of
from sccvae.model._clustering import MixtureMixin
from sccvae.model._correction import CorrectionMixin
from sccvae.model._counterfactual import CounterfactualMixin, PerturbationMixin
from sccvae.model._differential import DifferentialMixin
from sccvae.model._latent import VariationalMixin
from sccvae.model._mapping import MappingMixin
from sccvae.model._predictive import PredictiveMixin
from sccvae.model._sampling import SamplingMixin
from sccvae.module import Batch, InputDropout
from sccvae.module._batches import PARTED
from sccvae.nn import check_sizes
from sccvae.train import TrainingResult, fit_mixture
from sccvae.train.checkpoint import digest
from sccvae.train.mixture import PHASES

logger = logging.getLogger(__name__)

#: Training cells from which ``sample`` knows how common each component is.
SHARES_OF = 10_000


class GMVAE(
    MixtureMixin,
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
    """Gaussian-mixture VAE with a Dirichlet prior: finds clusters in its latent space by itself.

    With conditions (``batch_key`` and covariates) it is conditional: clusters run across batches. With ``labels_key``
    it is semi-supervised: cells with a label take its component, those without are clustered.

    Parameters
    ----------
    adata
        AnnData after ``GMVAE.setup_anndata``.
    n_components
        Number K of components; None lets the training choose it (with labels: one for each class).
    prior, alpha, w_prior, classifier, consistency, masking, alignment, n_w
        As for :class:`sccvae.module.GMVAE`.
    likelihood
        As for :class:`CVAE`.
    n_latent, n_hidden, n_layers, activation, norm, dropout, skip, seed, registry
        As for :class:`VAE`.
    input_dropout
        Share of the counts that is hidden from q(z|x,c) and q(w|x,c) in training. None for as many as in a
        :class:`CVAE` where most cells of the batches are of other types than those of the rest, else 0: it parts such
        types, which a decoder that knows the batch lays on one another, but finds fewer clusters elsewhere.

    Examples
    --------
    >>> sccvae.model.GMVAE.setup_anndata(adata, layer="counts", batch_key="batch")
    >>> model = sccvae.model.GMVAE(adata)
    >>> model.train()
    >>> adata.obsm["X_gmvae"] = model.get_latent_representation()
    >>> adata.obs["gmvae"] = model.predict()
    """

    def __init__(
        self,
        adata: AnnData | None = None,
        *,
        n_components: int | None = None,
        prior: Literal["dirichlet", "uniform"] = "dirichlet",
        alpha: float = 1.0,
        w_prior: Literal["fixed", "learned"] = "fixed",
        classifier: Literal["zx", "z"] = "zx",
        consistency: float = 1.0,
        masking: float = 0.0,
        alignment: float | None = None,
        likelihood: str | dict | Likelihood | None = None,
        n_latent: int | None = None,
        n_w: int = 10,
        n_hidden: int | None = None,
        n_layers: int = 1,
        activation: str = "relu",
        norm: Literal["batch", "layer"] | None = "batch",
        dropout: float = 0.0,
        skip: bool = False,
        input_dropout: float | None = None,
        seed: int = 0,
        registry: dict | None = None,
    ) -> None:
        self._choose_components = n_components is None
        super().__init__(adata, registry, seed, settings_of(locals()))
        classes = self.classes
        if n_components is not None and n_components < len(classes):
            msg = (
                f"n_components={n_components}, but adata.obs[{self.schema.labels_key!r}] has {len(classes)} classes "
                f"({classes[:5]}...): each needs a component of its own. Raise n_components, or leave it None."
            )
            raise ValueError(msg)

    def _make_module(self) -> module.GMVAE:
        settings = dict(self.settings)
        if settings["n_components"] is None:
            settings["n_components"] = max(1, len(self.classes))
        schema = self.schema
        return module.GMVAE(
            len(schema.var_names),
            settings.pop("n_components"),
            n_categories=schema.n_categories,
            n_continuous=len(schema.continuous),
            **settings,
        )

    @property
    def classes(self) -> list[str]:
        """Names of the classes of ``labels_key``, in the order of the components; empty without labels."""
        return [str(c) for c in self.schema.classes]

    def train(self, max_epochs: int | None = None, *, guide: str | Sequence | None = None, **options: Any) -> None:
        """Warm up as a VAE, place the components at graph clusters, train guided by them, then free.

        Parameters
        ----------
        max_epochs
            Epochs of the warm-up; None for about 6,000 optimiser steps. Each of the two rounds of the guide (none for
            counts without labels, nor with your own guide) takes a fifth of it, at most 6, the guided phase half, at
            most 15, the free one a tenth, at most 5; but rounds and guided phase at least 200 optimiser steps, as far
            as the warm-up has so many epochs.
        guide
            Your own first labels instead of a graph clustering: an ``obs`` column, a Series indexed by cell, or one
            value for each cell in order (NaN for none). Unlike ``labels_key``, they only start the clusters. Beside
            labels, a cluster takes the class of its own name or else the one that most of its labelled cells have, and
            a component of its own where none has a label.
        **options
            As for :meth:`BaseModel.train`. ``early_stopping``, ``patience`` and ``kl_warmup`` are of the warm-up; the
            free phase has a hundredth of ``lr``.

        Raises
        ------
        KeyError, ValueError
            If the guide does not fit, and as for :meth:`BaseModel.train`.
        FloatingPointError
            If the loss stops being finite.
        """
        if self.is_query:
            if guide is not None:
                msg = "guide= starts clusters, but those of a query are its reference's: leave it out."
                raise ValueError(msg)
            super().train(max_epochs, **options)
            return
        super().train(max_epochs, guide=None if self.adata is None else self._guide_labels(guide), **options)
        if self.history["phase"].max().item() < PHASES.index("guided"):
            logger.warning(
                "The training ended before its guided phase, so no component has its place yet and clusters mean "
                "nothing: train again with more time (checkpoint_dir= goes on where a training ended)."
            )
        some = np.random.default_rng(options.get("seed", 0)).permutation(self.train_indices)[:SHARES_OF]
        self.reference["component_shares"] = self.predict_proba(indices=some).mean(0, dtype=np.float64).tolist()

    def _fit(self, store: CellStore, *, guide: np.ndarray | None, **options: Any) -> TrainingResult:
        store = CellStore(store.cells, self._label_codes())
        self._find_kinds(store)
        options["settings"] |= {"guide": digest(guide), "labels": digest(store.labels)}
        self.reference["chooses_components"] = self._choose_components
        try:
            return fit_mixture(
                self.module,
                store,
                self.train_indices,
                self.validation_indices,
                guide=guide,
                choose_components=self._choose_components,
                **options,
            )
        finally:  # also when the training fails: weights and settings must belong together
            self.settings["n_components"] = self.module.n_components

    def _default_input_dropout(self, store: CellStore) -> InputDropout:
        kinds = self.module.kinds
        return InputDropout(0.0) if kinds is None or kinds.overlap >= PARTED else super()._default_input_dropout(store)

    def _guide_labels(self, guide: str | Sequence | None) -> np.ndarray | None:
        """The user's guide as codes (n,): those of the classes of ``labels_key``, then those of other clusters."""
        if guide is None:
            return None
        if isinstance(guide, str):
            guide = obs_column(self.adata, guide, "guide")
        guide = of_cells(guide, self.adata.obs_names, "guide")
        values = pd.Series(np.asarray(guide, dtype=object))
        if values.isna().all():
            msg = "guide has no value at all (all NaN); leave it None for a graph clustering."
            raise ValueError(msg)
        codes, known = match(self.schema.classes, values), self._label_codes()
        known = np.full(len(codes), -1) if known is None else known
        others = np.flatnonzero((codes < 0) & values.notna())
        cluster, names = pd.factorize(values[others].astype(str), sort=True)
        labels = np.zeros((len(names), max(1, len(self.classes))), int)  # of the cells of each other cluster
        seen = known[others] >= 0
        np.add.at(labels, (cluster[seen], known[others][seen]), 1)
        new = ~labels.any(1)
        codes[others] = np.where(new, len(self.classes) + np.cumsum(new) - 1, labels.argmax(1))[cluster]
        codes, n = np.where(known >= 0, known, codes), len(self.classes) + new.sum()
        if not self._choose_components and n > self.module.n_components:
            more = f" beside {len(self.classes)} classes" if self.classes else ""
            msg = (
                f"guide has {n - len(self.classes)} clusters{more}, n_components={self.module.n_components}; make it "
                f"at least {n}."
            )
            raise ValueError(msg)
        return codes

    def sample(
        self, n: int, *, component: Any | None = None, batch: Any | None = None, mean: bool = False, seed: int = 0
    ) -> AnnData:
        """Generate ``n`` cells that never existed: w, then a component, then z, then x.

        Parameters
        ----------
        n
            Number of cells.
        component
            Name of the component (see ``predict``) of all of them; None draws one for each cell, as often as in the
            training data.
        batch, mean, seed
            As for :meth:`VAE.sample`.

        Returns
        -------
        AnnData (n, genes): X as for :meth:`VAE.sample`; ``obs["component"]`` (``"drawn_component"``, if that is the
        name of a condition); ``obsm["z"]``.

        Raises
        ------
        ValueError
            If the component or batch is not known, or ``n`` is not positive.
        """
        check_sizes(n=n)
        rng = np.random.default_rng([seed, 1])
        if component is None:
            shares = np.asarray(self.reference.get("component_shares") or np.ones(self.n_components))
            drawn = rng.choice(self.n_components, n, p=shares / shares.sum())
        else:
            if str(component) not in self.component_names:
                msg = f"component={component!r} is not one of {self.component_names}."
                raise ValueError(msg)
            drawn = np.full(n, self.component_names.index(str(component)))
        generated = self._sample(n, batch, mean=mean, seed=seed, components=drawn)
        name = "drawn_component" if "component" in generated.obs else "component"
        generated.obs[name] = pd.Categorical.from_codes(drawn, categories=self.component_names)
        return generated

    def _prior_z(self, batch: Batch, rows: np.ndarray, *, components: np.ndarray) -> torch.Tensor:
        p_w = self.module.prior_w(batch)
        w = p_w.loc + p_w.scale * torch.randn(len(rows), self.module.n_w, device=batch.x.device)
        p_z = self.module.components(w)
        own = torch.arange(len(rows)), torch.from_numpy(components[rows])
        return p_z.loc[own] + p_z.scale[own] * torch.randn_like(p_z.loc[own])
