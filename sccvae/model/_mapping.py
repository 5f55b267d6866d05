"""Query mapping: new cells on a trained reference, whose own cells keep their place."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from sccvae._names import checks_names, with_known_names
from sccvae.data import CellStore, MaskedStore, batch_moments
from sccvae.data.masked import measured
from sccvae.distributions import ZINB
from sccvae.model._base import BaseModel
from sccvae.model._query import genes_of, known_labels, labels_of, new_categories, report_text
from sccvae.model._registry import extend_registry
from sccvae.model._saving import _decode, _encode, load
from sccvae.model._transfer import TransferMixin
from sccvae.module import Batch
from sccvae.module._batches import anchored
from sccvae.module._growing import adapt, grow, new_weights, only_new
from sccvae.train import TrainingResult, fit

logger = logging.getLogger(__name__)

#: Optimiser steps of a query, and fewest of an epoch. With learning rate LR the few weights of a new category have
#: arrived after these (on a pancreas set more steps, or smaller ones, gave no better ELBO); FINE_LR is for all weights.
STEPS, EPOCH_STEPS, LR, FINE_LR = 100, 10, 3e-2, 1e-4
#: Training cells from which the reference knows what stands for a gene that a query lacks.
MEANS_OF = 10_000


class MappingMixin(TransferMixin):
    """Mapping of query cells: new categories get weights of their own, missing genes are masked, labels follow."""

    @property
    def is_query(self) -> bool:
        """Whether this model was made by :meth:`load_query`."""
        return "mapping" in self.reference

    @partial(checks_names, like="load_query_data")
    def load_query(self, adata: AnnData, *, freeze: bool = True) -> Self:
        """Make a model of the query cells ``adata`` from this trained reference; ``train()`` it next.

        The new model is this one with weights for the query's new categories of ``batch_key`` and the categorical
        covariates. With ``freeze`` its ``train()`` moves these weights alone; without new categories there is nothing
        to train. Cells of the reference keep their latent coordinates, up to the rounding of a float32. Nothing is
        written to ``adata``. Of the arguments of ``train``, ``max_epochs=None`` gives about 100 optimiser steps here,
        at least one pass over the cells, and the defaults are ``lr=0.03`` (0.0001 if not frozen), ``kl_warmup=0`` and
        ``train_size=1`` (0.9).

        Parameters
        ----------
        adata
            Query cells, set up like the reference: the same layer and ``obs`` columns (labels may be missing or NaN).
            Genes in any order. Genes that the reference does not know are left out. Those that it has and the query
            lacks are masked: the encoder sees a stand-in, the reference's mean times what the cell has more of the gene
            by a first z, they do not count in p(x|z), and the library size is scaled to what all genes would have
            given.
        freeze
            Train the weights of new categories only; else all weights, with a small learning rate, and cells of the
            reference move. Labels are then transferred by where the classes lay before: the further the weights went,
            the more cells are "unknown".

        Returns
        -------
        A model of the same class. ``query_report`` says what was new, missing or left out.

        Raises
        ------
        KeyError
            If a layer or column of the set-up is missing.
        ValueError
            If this model is not trained, a condition is NaN, or the query has less than half of the genes.

        References
        ----------
        Lotfollahi et al. 2022, Mapping single-cell data to reference atlases by transfer learning, Nature
        Biotechnology 40 ("architectural surgery").

        Examples
        --------
        >>> reference = sccvae.model.load("my_reference")
        >>> query = reference.load_query(adata_query)
        >>> query.train()
        >>> adata_query.obsm["X_mapped"] = query.get_latent_representation()
        """
        if not self.is_trained:
            msg = f"This {type(self).__name__} is not trained, so nothing can be mapped on it: run model.train() first."
            raise ValueError(msg)
        new = new_categories(adata, self._read_schema)
        present = self._check_genes(adata)
        registry = _decode(_encode(self.registry_))
        extend_registry(registry, new, adata.n_obs)
        query = type(self)(registry=registry, seed=self.seed, **self.settings)
        known = self.schema.n_categories
        adapt(query.module)
        query.module.load_state_dict(grow(query.module, self.module.state_dict(), known))
        query.module.to(self.module.device).eval()
        query.reference = dict(self.reference)
        query.reference["mapping"] = {
            "n_known": list(known),
            "freeze": bool(freeze),
            "adapted": True,
            "new_categories": {key: [str(v) for v in values] for key, values in new.items()},
            "n_cells": int(adata.n_obs),
            "missing_genes": [str(g) for g in self.schema.var_names[~present]],
            "n_genes_left_out": int(adata.n_vars - present.sum()),
        } | labels_of(adata, self.schema)
        store = query._store(adata)
        query._adata = adata
        query._note_combinations(store)
        query._start_dispersions(store, known)
        query.is_trained = freeze and not new_weights(query.module, known)
        query._summarise()
        report = query.query_report
        level = logging.WARNING if report["missing_genes"] or report["unknown_labels"] else logging.INFO
        logger.log(level, "%s.", query._said_of_query())
        return query

    @classmethod
    @checks_names
    def load_query_data(cls, adata: AnnData, reference_model: str | Path | BaseModel, *, freeze: bool = True) -> Self:
        """:meth:`load_query` under scvi-tools' name: a class method that takes a model or its folder.

        Parameters
        ----------
        adata, freeze
            As for :meth:`load_query`.
        reference_model
            The trained reference, or the folder that it was saved to.

        Returns
        -------
        As :meth:`load_query`.

        Raises
        ------
        TypeError
            If the reference is a model of another class.
        KeyError, ValueError, FileNotFoundError
            As for :meth:`load_query` and :meth:`load`.
        """
        reference = load(reference_model) if isinstance(reference_model, str | Path) else reference_model
        if type(reference) is not cls:
            name = type(reference).__name__
            msg = f"The reference is a {name}: call {name}.load_query_data, or load_query on the reference itself."
            raise TypeError(msg)
        return reference.load_query(adata, freeze=freeze)

    @staticmethod
    def prepare_query_anndata(
        adata: AnnData,
        reference_model: str | Path | BaseModel,
        return_reference_var_names: bool = False,
        inplace: bool = True,
    ) -> AnnData | pd.Index | None:
        """Check the genes of a query, as :meth:`load_query` does; there for scvi-tools' users, and never needed.

        scvi-tools sorts genes and fills missing ones with zeros. Here they are matched by name, and missing ones are
        masked, so ``adata`` stays as it is.

        Parameters
        ----------
        adata
            Query cells.
        reference_model
            The trained reference, or its folder.
        return_reference_var_names
            Only give the genes of the reference.
        inplace
            Give nothing, rather than ``adata``.

        Returns
        -------
        None, ``adata`` itself, or the genes of the reference.

        Raises
        ------
        ValueError
            If too few genes are those of the reference.
        """
        reference = load(reference_model) if isinstance(reference_model, str | Path) else reference_model
        if return_reference_var_names:
            return pd.Index(reference.schema.var_names)
        reference._check_genes(adata)
        return None if inplace else adata

    @property
    def query_report(self) -> dict[str, Any]:
        """What :meth:`load_query` found: new categories, missing genes, genes left out, cells without a label."""
        if not self.is_query:
            msg = "This model was not made by load_query, so there is no query to report on."
            raise ValueError(msg)
        return {k: v for k, v in self.reference["mapping"].items() if k not in ("n_known", "freeze", "adapted")}

    @with_known_names
    @wraps(BaseModel.train)
    def train(self, max_epochs: int | None = None, **options: Any) -> None:
        if self.is_query:
            self._train_query(max_epochs, **options)
        else:
            self._label_codes()  # labels that do not fit are named before the training
            super().train(max_epochs, **options)

    def _train_query(
        self,
        max_epochs: int | None,
        *,
        train_size: float | None = None,
        validation_size: float | None = None,
        batch_size: int = 128,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Train the weights of new categories, or all: see :meth:`load_query`."""
        mapping = self.reference["mapping"]
        freeze, known = mapping["freeze"], mapping["n_known"]
        if freeze and not new_weights(self.module, known):
            logger.warning("The query has no new categories: there is nothing to train, it is mapped as it is.")
            self.history_, self.is_trained = {}, True
            return
        if freeze and options.get("weight_decay"):
            msg = "weight_decay would shrink the frozen weights as well; leave it out, or use load_query(freeze=False)."
            raise ValueError(msg)
        store = self._training_store(options.pop("data", "auto"))
        store.labels = known_labels(self.adata, self.schema) if hasattr(self.module, "classify") else None
        # The few weights of a category cannot learn cells by heart: all train, unless the user wants to see others.
        train_size = (1.0 if freeze else 0.9) if train_size is None else train_size
        defaults = {"lr": LR if freeze else FINE_LR, "kl_warmup": 0.0, "description": "query"}
        options = defaults | options | {"batch_size": batch_size, "seed": seed, "settings": self._made_with}
        labelled = store.labels is not None
        with self._split(len(store), train_size, validation_size, seed):
            options["early_stopping"] = self._stops_early(options.get("early_stopping"), options.get("patience"))
            rows = self.train_indices
            if len(rows) == 1:
                rows = np.repeat(rows, 2)  # the batch norms hold still here: a single cell can be mapped
            if max_epochs is None:
                # An epoch shows few cells several times: what it costs beside its steps would be most of the time.
                rows = np.tile(rows, max(1, round(EPOCH_STEPS * batch_size / len(rows))))
                max_epochs = math.ceil(STEPS / math.ceil(len(rows) / batch_size))
            with only_new(self.module, known, labels=labelled) if freeze else nullcontext(), anchored(self.module):
                result = fit(self.module, store, rows, self.validation_indices, max_epochs=max_epochs, **options)
        super()._finish_training(result)

    def _classes_that_train(self) -> np.ndarray | None:
        return None if self.is_query else self._label_codes()

    def _finish_training(self, result: TrainingResult) -> None:
        super()._finish_training(result)
        self._note_means()
        self._note_classes()

    def _note_means(self) -> None:
        """Note what stands for a gene that a query lacks, and the share of the counts that is its."""
        store = self._store(self.adata)
        rows = np.sort(np.random.default_rng(0).permutation(self.train_indices)[:MEANS_OF])
        total, seen, n = 0.0, 0.0, len(rows)
        for part in np.array_split(rows, max(1, n // 1024)):
            cells = Batch.on(self.module.device, store.gather(part))
            read = self.module.likelihood.encoder_input(cells.dense, cells.library)
            total, seen = (s + t.cpu().double().sum(0) for s, t in ((total, cells.dense), (seen, read)))
        counts = self.module.likelihood.support == "counts"
        stand_in = (seen / n).expm1() if counts else seen / n  # the encoder input is log(1 + x) for counts
        self.reference["gene_means"] = [float(v) for v in (total / n).float()]
        self.reference["gene_stand_ins"] = [float(v) for v in stand_in.float()]

    def _store(self, adata: AnnData | None, data: str = "disk") -> CellStore:
        given = self._given(adata)
        if not self.is_query or (present := measured(given, self.schema)).all():
            return super()._store(adata, data)
        schema = replace(self._read_schema, var_names=self.schema.var_names[present])
        cells = self._cells(given, schema, data)
        if self.schema.size_factor_key is None and self.module.likelihood.support == "counts":
            means = np.asarray(self.reference["gene_means"])
            cells.library = (cells.library * (means.sum() / means[present].sum())).astype(np.float32)
        likelihood = self.module.likelihood
        depth = float(likelihood.depth) if hasattr(likelihood, "depth") else None
        known = self.reference["gene_stand_ins"], self.reference["gene_means"]
        return MaskedStore(cells, present, known[0], depth=depth, usual=known[1])

    def _attach(self, adata: AnnData) -> None:
        if self.is_query:
            self._store(adata)  # any misfit is named here
            self._adata = adata
        else:
            super()._attach(adata)

    def _start_dispersions(self, store: CellStore, known: Sequence[int]) -> None:
        """Start the dispersions of new batches, where they have their own, at the query's cells."""
        likelihood = self.module.likelihood
        if "log_theta" not in likelihood.batchwise or len(likelihood.log_theta) == known[0]:
            return
        zeros = not isinstance(likelihood, ZINB)
        theta = torch.from_numpy(batch_moments(store, len(likelihood.log_theta), zeros=zeros)[1])
        # A gene that was not measured keeps the mean of the known batches: its stand-ins hardly vary.
        present = getattr(store, "present", slice(None))
        with torch.no_grad():
            likelihood.log_theta[known[0] :, present] = (2 * theta[known[0] :, present]).log()

    def _note_combinations(self, store: CellStore) -> None:
        """Add the query's combinations of conditions to those that generation draws from."""
        if not self._reads_conditions:
            return
        combinations, counts = np.unique(store.cells.codes, axis=0, return_counts=True)
        known = [tuple(codes) for codes in self.reference["codes"]]
        for codes, share in zip(combinations.tolist(), counts / counts.sum(), strict=True):
            if tuple(codes) not in known:
                self.reference["codes"] = [*self.reference["codes"], codes]
                self.reference["frequencies"] = [*self.reference["frequencies"], float(share)]
        total = sum(self.reference["frequencies"])
        self.reference["frequencies"] = [share / total for share in self.reference["frequencies"]]

    def _summarise(self) -> None:
        super()._summarise()
        if self.is_query:
            self._model_summary_string += f"\n{self._said_of_query()}"

    def _said_of_query(self) -> str:
        return report_text(self.query_report, len(self.schema.var_names))

    def _check_genes(self, adata: AnnData) -> np.ndarray:
        """Which of the reference's genes the query has, (G,) bool, if they are enough."""
        return genes_of(adata, self.schema, maskable="gene_stand_ins" in self.reference)
