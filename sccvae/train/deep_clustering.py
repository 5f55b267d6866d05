"""Training IDEC: pretraining as a denoising autoencoder, centres, clustering."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from sklearn.cluster import KMeans

from sccvae.data import CellStore
from sccvae.module import Batch
from sccvae.module.idec import IDEC
from sccvae.nn import check_sizes
from sccvae.train.fit import TrainingResult, seeded
from sccvae.train.guide import MAX_CELLS, Communities, Guide, principal_components
from sccvae.train.passes import over_cells, some_rows
from sccvae.train.phases import Phases, at_stage
from sccvae.train.schedules import default_max_epochs

logger = logging.getLogger(__name__)

#: Epochs of the clustering phase as a share of those of the pretraining.
CLUSTERING = 1 / 2
#: The clustering ends when fewer than this share of the cells change their cluster in an epoch.
TOLERANCE = 0.001
#: Starts of k-means.
STARTS = 20


def fit_deep_clustering(
    module: IDEC,
    store: CellStore,
    train_rows: np.ndarray,
    validation_rows: np.ndarray,
    *,
    choose_components: bool = False,
    init: Literal["leiden", "kmeans"] = "leiden",
    max_epochs: int | None = None,
    batch_size: int = 128,
    kl_warmup: float = 0.2,
    early_stopping: bool = True,
    checkpoint_dir: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
    **options: Any,
) -> TrainingResult:
    """Train ``module`` in place.

    1. *Pretraining*: a denoising autoencoder, until its held-out error no longer falls.
    2. Centres at clusters, by Leiden or by k-means of z.
    3. *Clustering*: error and clustering loss together, on clean inputs, until hardly a cell changes its cluster.

    Parameters
    ----------
    module
        The model.
    store
        The cells.
    train_rows, validation_rows
        Rows of the store, (n,) int64.
    choose_components
        Let a graph clustering choose the number of centres.
    init
        ``"leiden"``: centres at the communities of the neighbour graphs in z and in the principal components, those
        with most links merged until so many are left;
        ``"kmeans"``: as published. The number of centres can be chosen by Leiden alone.
    max_epochs
        Epochs of the pretraining; None for about 6,000 optimiser steps. The clustering takes at most half of it.
    kl_warmup, early_stopping
        As for :func:`sccvae.train.fit`; of the pretraining.
    batch_size, checkpoint_dir, callbacks, seed, **options
        As for :func:`sccvae.train.fit`; each phase has a folder of its own in ``checkpoint_dir``.

    Returns
    -------
    History over both phases (``phase`` is 0 or 1), whether it was interrupted, and the trainer.

    Raises
    ------
    ValueError
        If there are fewer training cells than centres, ``init`` is not known, and as for :func:`sccvae.train.fit`.
    FloatingPointError
        As for :func:`sccvae.train.fit`.
    """
    check_sizes(batch_size=batch_size, max_epochs=1 if max_epochs is None else max_epochs)
    if init not in ("leiden", "kmeans"):
        msg = f"init={init!r} is not known; choose 'leiden' or 'kmeans'."
        raise ValueError(msg)
    if not choose_components and len(train_rows) < module.n_components:
        msg = f"n_components={module.n_components}, but there are only {len(train_rows)} training cells."
        raise ValueError(msg)
    epochs = default_max_epochs(-(-len(train_rows) // batch_size)) if max_epochs is None else int(max_epochs)
    options |= {"batch_size": batch_size, "checkpoint_dir": checkpoint_dir, "callbacks": callbacks}
    phases = Phases(module, train_rows, validation_rows, seed=seed, **options)
    return phases.in_order(
        lambda: _in_phases(phases, store, epochs, choose_components, init, kl_warmup, early_stopping)
    )


def _in_phases(
    phases: Phases,
    store: CellStore,
    epochs: int,
    choose_components: bool,
    init: str,
    kl_warmup: float,
    early_stopping: bool,
) -> TrainingResult:
    """:func:`fit_deep_clustering`, with the epochs of the pretraining."""
    module, train_rows, seed = phases.module, phases.train_rows, phases.seed
    if choose_components:  # a training before this one may have chosen
        with seeded(seed):
            module.set_components(1)
    with at_stage(module, "pretraining"):
        phases.run("pretraining", 0, store, epochs, kl_warmup=kl_warmup, early_stopping=early_stopping)
    rows = some_rows(train_rows, MAX_CELLS, seed)
    z = over_cells(module, store, rows, lambda batch: module.inference(batch)["z"])
    views = [z]
    if min(len(rows), store.n_features) > 3:  # as for the guide of a mixture
        views.append(principal_components(store.cells.x[rows], None))
    if choose_components:
        found = Communities.of(views, seed).separate()
        with seeded(seed):
            module.set_components(found.n_clusters)
    elif init == "kmeans":
        found = _k_means(z, module.n_components, seed)
    else:
        found = _leiden(views, module.n_components, seed)
    logger.info("Centres: %d clusters of sizes %s", found.n_clusters, np.bincount(found.labels[found.labels >= 0]))
    centers = np.stack([z[found.labels == k].mean(0) for k in range(found.n_clusters)])
    module.place(torch.from_numpy(centers))
    target = TargetDistribution(store, train_rows)
    free = {"kl_warmup": 0.0, "early_stopping": False, "restore_best": False}
    return phases.run("clustering", 1, store, CLUSTERING * epochs, target, **free)


class TargetDistribution(Callback):
    """Brings the frequencies of IDEC's clusters up to date after each epoch; ends the training when labels are stable.

    Parameters
    ----------
    store
        The cells.
    rows
        Those of the training, (n,) int64.

    Attributes
    ----------
    labels
        Cluster of each cell, (n,) int64.
    changed
        For each epoch, the share of the cells that changed their cluster.
    """

    def __init__(self, store: CellStore, rows: np.ndarray) -> None:
        self.store, self.rows = store, rows
        self.labels: np.ndarray | None = None
        self.changed: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the cells; after an interruption this finds what the last epoch had left."""
        self._update(pl_module.module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the cells, and compare."""
        before = self.labels
        self._update(pl_module.module)
        self.changed.append(float((self.labels != before).mean()))
        trainer.should_stop |= self.changed[-1] < TOLERANCE

    def _update(self, module: IDEC) -> None:
        total = torch.zeros_like(module.frequencies, dtype=torch.float64)

        def look(batch: Batch) -> torch.Tensor:
            q = module.classify(batch)
            total.add_(q.sum(0, dtype=torch.float64))
            return q.argmax(1)

        training = module.training
        self.labels = over_cells(module, self.store, self.rows, look)
        module.frequencies.copy_(total)
        module.train(training)


def _leiden(views: list[np.ndarray], n_clusters: int, seed: int) -> Guide:
    """Communities of even sizes, as the target distribution wants them; by k-means on z if the cells have not so many.

    Each cluster counts alike in the target. A partition that lays two large groups together and parts a third has a
    lower modularity (MNIST: 4 and 9 in one cluster, 1 in two).
    """
    return Communities.of(views, seed).even(n_clusters) or _k_means(views[0], n_clusters, seed)


def _k_means(z: np.ndarray, n_clusters: int, seed: int) -> Guide:
    """Clusters by k-means, the largest first."""
    labels = KMeans(n_clusters, n_init=STARTS, random_state=seed).fit_predict(z)
    order = np.argsort(-np.bincount(labels, minlength=n_clusters), kind="stable")
    return Guide(np.argsort(order)[labels], n_clusters)
