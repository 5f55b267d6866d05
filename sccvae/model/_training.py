"""Training of a model on AnnData: the split of its cells, and what a training leaves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning import Callback

from sccvae._names import with_known_names
from sccvae.data import CellStore, split_indices
from sccvae.train import TrainingResult, batch_effects, fit
from sccvae.train.fit import seeded


class TrainingMixin:
    """Training."""

    @with_known_names
    def train(
        self,
        max_epochs: int | None = None,
        *,
        batch_size: int = 128,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        kl_weight: float = 1.0,
        kl_warmup: float = 0.2,
        train_size: float | None = None,
        validation_size: float | None = None,
        data: Literal["auto", "disk", "memory"] = "auto",
        early_stopping: bool | None = None,
        patience: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] = 1,
        checkpoint_dir: str | Path | None = None,
        seed: int = 0,
        progress_bar: bool = True,
        callbacks: Sequence[Callback] = (),
        **trainer_options: Any,
    ) -> None:
        """Train on the cells of the set-up; ends with the weights of the best validation epoch.

        Ctrl-C ends it cleanly with the current weights. With ``checkpoint_dir`` a later call goes on where it stopped.

        Parameters
        ----------
        max_epochs
            Passes over the training cells; None for about 6,000 optimiser steps (20 to 400 epochs).
        batch_size
            Most cells of a mini-batch.
        lr, weight_decay
            Of AdamW; the learning rate falls along a cosine over all steps.
        kl_weight, kl_warmup
            Target of the KL weight (1 is the ELBO), and the share of all steps after which it is reached.
        train_size, validation_size
            Shares of the cells; None for 0.9, and for the rest.
        data
            For an AnnData whose values are on disk: ``"memory"`` reads them all first, ``"disk"`` reads shuffled blocks
            of cells in every epoch (needs ``pip install 'sccvae[ondisk]'``), and ``"auto"`` reads them into memory if
            that takes at most half of what is free, and logs what it chose.
        early_stopping, patience
            Stop when the negative ELBO of the validation cells has not fallen for ``patience`` epochs; None for where
            there are such cells, and for 10 epochs or 400 optimiser steps, whichever is longer.
        accelerator, devices
            As for ``lightning.Trainer``; ``"auto"`` takes an NVIDIA GPU or the CPU.
        checkpoint_dir
            Folder for the state of the training after every epoch; a later call with the same settings, of this method
            and of the model, goes on from there. A folder is for one model.
        seed
            Of the split, the mini-batch order and the noise; the same seed and device give the same bits.
        progress_bar
            Show epoch, losses and cells per second.
        callbacks
            More Lightning callbacks.
        **trainer_options
            For ``lightning.Trainer``, for example ``logger=``; ``max_time`` and ``cuda_graphs`` as for
            :func:`sccvae.train.fit`. Names of scvi-tools that mean the same are taken for ours, such as
            ``enable_progress_bar``, and so are entries of ``plan_kwargs``.

        Raises
        ------
        TypeError
            If there is no such argument, or it would mislead: Lightning's batches are chunks of many mini-batches.
        ValueError
            If the model has no data, options do not fit, or the data cannot be described by the likelihood.
        FloatingPointError
            If the loss stops being finite. As after any error, a model that was trained before is what it was then;
            another has its best weights.

        Warns
        -----
        UserWarning
            If ``early_stopping`` or ``patience`` is given and no cells are held out.
        """
        store = self._training_store(data)
        with self._split(len(store), 0.9 if train_size is None else train_size, validation_size, seed):
            early_stopping = self._stops_early(early_stopping, patience)
            result = self._fit(
                store,
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
                settings=self._made_with | {"setup": self.registry_["setup_args"]},
                **trainer_options,
            )
        self._finish_training(result)

    @contextmanager
    def _split(self, n: int, train_size: float, validation_size: float | None, seed: int) -> Iterator[None]:
        """Inside, ``n`` cells are split; if training fails, a trained model stays what it was: split and weights."""
        before = self.train_indices, self.validation_indices, self.test_indices
        weights = {k: v.clone() for k, v in self.module.state_dict().items()} if self.is_trained else None
        n_components = getattr(self.module, "n_components", None)
        try:
            self.train_indices, self.validation_indices, self.test_indices = split_indices(
                n, train_size, validation_size, seed, self._classes_that_train()
            )
            yield
        except BaseException:
            self.train_indices, self.validation_indices, self.test_indices = before
            if weights is not None:
                if n_components is not None and self.module.n_components != n_components:
                    with seeded(seed):  # torch's global random state stays what it was
                        self.module.set_components(n_components)
                    self.settings["n_components"] = n_components
                self.module.load_state_dict(weights)
                self.module.eval()
            raise

    def _classes_that_train(self) -> np.ndarray | None:
        """Class of each cell, (n,) int64, -1 for none, where each must be seen in training; None if none is read."""
        return None

    def _stops_early(self, early_stopping: bool | None, patience: int | None) -> bool:
        """``early_stopping``, with a warning where it was asked for and no cell is held out to stop by."""
        asked = patience is not None if early_stopping is None else early_stopping
        if asked and not len(self.validation_indices):
            msg = (
                "No cells are held out, so early_stopping and patience do nothing: all epochs are trained. Pass "
                "train_size=0.9, or leave them out."
            )
            warnings.warn(msg, UserWarning, stacklevel=5)
        return early_stopping is None or bool(early_stopping)

    def _fit(self, store: CellStore, **options: Any) -> TrainingResult:
        """Train the module on ``train_indices``: where a model that trains in phases comes in."""
        self._find_kinds(store)
        return fit(self.module, store, self.train_indices, self.validation_indices, **options)

    def _find_kinds(self, store: CellStore) -> None:
        """Kinds of cells for the alignment, of a model that was loaded: its files do not hold them."""
        if self._aligns_kinds and self.module.kinds is None:
            depth = float(self.module.likelihood.depth)
            self.module.kinds = batch_effects(store, self.schema.n_categories[0], depth=depth)[1]

    def _training_store(self, data: str = "auto") -> CellStore:
        if self.adata is None:
            msg = (
                f"This model was loaded without data. Load it with `{type(self).__name__}.load(folder, "
                "adata=adata)` to train."
            )
            raise ValueError(msg)
        return self._store(self.adata, data)

    def _finish_training(self, result: TrainingResult) -> None:
        if result.trainer is not None:
            self.module.to(result.trainer.strategy.root_device)
        self.trainer = result.trainer
        self.was_interrupted = result.interrupted and not result.out_of_time
        self.history_ = result.history
        self._summarise()
        self.reference["kept_epoch"] = result.kept
        self.is_trained = True
