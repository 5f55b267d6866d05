"""What every model on AnnData has in common: set-up, training, and the stream of cells through the module."""

from __future__ import annotations

import inspect
import logging
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from anndata import AnnData
from scvi.data import AnnDataManager
from scvi.model.base import BaseModelClass

from sccvae._names import check_names
from sccvae.data import (
    Cells,
    CellStore,
    ChunkLoader,
    DiskMatrix,
    Schema,
    anndata_fields,
    batch_moments,
    check_setup,
    read_cells,
)
from sccvae.data.checks import check_anndata
from sccvae.data.moments import zero_share
from sccvae.data.read import check_support
from sccvae.data.splits import row_numbers
from sccvae.distributions import ZINB, NegativeBinomial
from sccvae.model._registry import RegistryMixin
from sccvae.model._saving import SavingMixin
from sccvae.model._training import TrainingMixin
from sccvae.module import Batch, GenerativeModule, InputDropout
from sccvae.train import batch_effects, default_sizes
from sccvae.train.fit import seeded

logger = logging.getLogger(__name__)

#: Values of a mini-batch when nothing is trained, zeros among them: 8 MB; and how few and how many cells it may have.
INFERENCE_VALUES, FEWEST, MOST = 2**21, 128, 4_096


class BaseModel(TrainingMixin, SavingMixin, RegistryMixin, BaseModelClass, ABC):
    """Base of all sccvae models; it stands on scvi-tools' registry, so ``view_anndata_setup`` and friends work.

    Of scvi-tools' base class it replaces ``__init__``, ``setup_anndata``, ``train``, ``save`` and ``load``, and what
    reads saved models or needs a registered AnnData, and nothing else.

    Parameters
    ----------
    adata
        AnnData that was set up with ``setup_anndata``; None with ``registry``.
    registry
        Saved set-up, to make a model without data.
    seed
        Of the initial weights.
    settings
        Arguments of the module, as plain JSON values.

    Attributes
    ----------
    module
        The torch module.
    history
        Logged name -> data frame with one column, indexed by epoch (scvi-tools' form); None before training.
    reference
        What generation needs to know of the training data: quantiles of the library size, combinations of conditions.
    was_interrupted
        Whether Ctrl-C ended the last training (``max_time`` does not count).
    """

    _reads_conditions = True
    was_interrupted = False

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Look at the names of arguments first."""
        check_names(cls.__name__, options, inspect.signature(cls.__init__).parameters, like="a model")
        return super().__new__(cls)

    def __init__(self, adata: AnnData | None, registry: dict | None, seed: int, settings: dict[str, Any]) -> None:
        try:
            super().__init__(adata, registry)
        except ValueError as error:
            if adata is None or "setup_anndata" in str(error):
                raise
            name = type(self).__name__
            msg = (
                f"This AnnData is not the one that was set up, but a copy, a part of it, or one read from a file: run "
                f"`{name}.setup_anndata(adata, ...)` on it, then make the model. ({str(error).splitlines()[0]})"
            )
            raise ValueError(msg) from error
        self.seed = int(seed)
        sizes = default_sizes(0 if adata is None else adata.n_obs)  # a model that is loaded has its own
        self.settings = settings | {name: size for name, size in sizes.items() if settings[name] is None}
        self._made_with = self.settings | {"seed": self.seed}  # the training may choose the number of components
        self.schema = Schema.from_registry(self.registry_)
        with seeded(seed):
            self.module = self._make_module()
        self.reference: dict[str, Any] = {}
        self._looked_at: tuple[weakref.ref[AnnData], DiskMatrix] | None = None
        if adata is not None:
            self._start_at_data(self._store(adata))
            unread = [*self.schema.categories, *self.schema.continuous]
            if unread and not self._reads_conditions:
                text = "A %s takes no account of obs%s and removes no batch effect; a CVAE or GMVAE does."
                logger.warning(text, type(self).__name__, unread)
            if self.settings.get("alignment") and not self._in_use()["alignment"]:
                msg = (
                    f"alignment={self.settings['alignment']:g} does nothing here: it draws batches together where the "
                    "decoder knows them (batch_key or a categorical covariate; not with prior='learned')."
                )
                warnings.warn(msg, UserWarning, stacklevel=3)
        self.module.eval()
        self._summarise()

    @property
    def _read_schema(self) -> Schema:
        """Where the inputs lie that the module reads."""
        return self.schema if self._reads_conditions else replace(self.schema, categories={}, continuous=())

    def _summarise(self) -> None:
        """Make what ``print(model)`` says."""
        text = ", ".join(f"{k}={v:g}" if type(v) is float else f"{k}={v!r}" for k, v in self._in_use().items())
        self._model_summary_string = f"sccvae {type(self).__name__}({text})\n{self.module.factors}"

    def _in_use(self) -> dict[str, Any]:
        """The settings as the module takes them: what None stands for, and without what does nothing."""
        found = dict(self.settings)
        if found.get("likelihood", "") is None:
            found["likelihood"] = self.module.likelihood.config
        if "alignment" in found:
            found["alignment"] = float(self.module.alignment.weight)
        return found

    @abstractmethod
    def _make_module(self) -> GenerativeModule:
        """Make the torch module from ``self.settings`` and ``self.schema``."""

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        unlabeled_category: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Say where the model's inputs lie in ``adata``.

        Nothing is written to X or the layers; scvi-tools notes the set-up under ``_scvi_*`` names in obs, obsm and uns.

        Parameters
        ----------
        adata
            Cells x genes; no view.
        layer
            Layer with the values, None for X. Count likelihoods need raw counts.
        batch_key
            ``obs`` column of the batch (the first condition).
        labels_key
            ``obs`` column of class labels; NaN where a cell has none. A :class:`GMVAE` learns from them; the others
            note them for :meth:`CVAE.transfer_labels`.
        size_factor_key
            ``obs`` column of positive size factors, used in place of the sum of counts.
        categorical_covariate_keys
            More ``obs`` columns of categorical conditions. They enter the networks alone: what differs most, such as
            the technology, belongs into ``batch_key``, if need be as one column with the batch.
        continuous_covariate_keys
            ``obs`` columns of continuous conditions; standardised inside the model.
        unlabeled_category
            Value of ``labels_key`` that stands for no label, such as ``"Unknown"``.
        **kwargs
            For ``AnnDataManager.register_fields``.

        Raises
        ------
        KeyError
            If a layer or column is missing.
        TypeError, ValueError
            If something named cannot be used; the message says what, where, and what to do.

        Warns
        -----
        UserWarning
            If a covariate or the labels cannot be told from the batch (nested in it, or it in them), or two covariates
            from each other; if there are far more genes than cells; if a class reads like no label.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        args = setup_method_args["setup_args"]
        for name in ("categorical_covariate_keys", "continuous_covariate_keys"):
            if isinstance(args[name], Iterable) and not isinstance(args[name], str):  # an array has no truth
                args[name] = list(args[name])
        check_setup(adata, **args)
        manager = AnnDataManager(fields=anndata_fields(**args), setup_method_args=setup_method_args)
        manager.register_fields(adata, **kwargs)
        cls.register_manager(manager)

    def _given(self, adata: AnnData | None) -> AnnData:
        """``adata``, or that of the set-up."""
        if adata is None and self.adata is None:
            msg = "This model was loaded without data; pass adata=."
            raise ValueError(msg)
        adata = self.adata if adata is None else adata
        check_anndata(adata)
        return adata

    def _store(self, adata: AnnData | None, data: str = "disk") -> CellStore:
        """The cells of ``adata`` (None: of the set-up), checked against the likelihood; read now unless from disk."""
        return CellStore(self._cells(self._given(adata), self._read_schema, data))

    def _cells(self, adata: AnnData, schema: Schema, data: str) -> Cells:
        """What :meth:`_store` hands out, with the genes of ``schema``."""
        known = self._looked_at[1] if self._looked_at and self._looked_at[0]() is adata else None
        cells = read_cells(adata, schema, data, known)
        if isinstance(cells.x, DiskMatrix):
            self._looked_at = weakref.ref(adata), cells.x
        check_support(cells, self.module.likelihood.support, schema.where)
        if self.schema.size_factor_key is not None:
            # On first sight of the training cells: the unit that makes size factors library sizes in counts.
            if "library_unit" not in self.reference:
                self.reference["library_unit"] = float(cells.survey.totals.sum() / cells.library.sum())
            cells.library = (cells.library * self.reference["library_unit"]).astype(np.float32)
        return cells

    def _start_at_data(self, store: CellStore) -> None:
        """Note what generation needs, and start output heads and covariate scales at the training data."""
        cells = store.cells
        codes = [self.schema.codes(key, self.adata.obs[key]) for key in self.schema.categories]
        codes = np.stack(codes, 1) if codes else cells.codes
        combinations, counts = np.unique(codes, axis=0, return_counts=True)
        self.reference |= {
            "library_quantiles": np.quantile(cells.library, np.linspace(0, 1, 101)).tolist(),
            "codes": combinations.tolist(),
            "frequencies": (counts / counts.sum()).tolist(),
        }
        if "image_shape" in self.adata.uns:
            self.reference["image_shape"] = [int(n) for n in self.adata.uns["image_shape"]]
        likelihood, mean = self.module.likelihood, cells.gene_means
        if likelihood.support == "counts":
            if not mean.any():
                msg = f"{self.schema.where} holds no counts at all; there is nothing to learn. Is it the right layer?"
                raise ValueError(msg)
            mean = mean / mean.sum()
        likelihood.initialise(torch.from_numpy(mean))
        if hasattr(likelihood, "depth"):
            likelihood.depth.fill_(float(np.median(cells.library)))
        if isinstance(likelihood, NegativeBinomial):
            own = "log_theta" in likelihood.batchwise
            zeros = not isinstance(likelihood, ZINB)  # which explains them otherwise
            theta = batch_moments(store, self.schema.n_categories[0] if own else None, zeros=zeros)[1]
            likelihood.initialise_dispersion(torch.from_numpy(theta))
        offset = "offset" in likelihood.batchwise and hasattr(likelihood, "initialise_batches")
        if offset or self._aligns_kinds:
            effect, kinds = batch_effects(store, self.schema.n_categories[0], with_kinds=self._aligns_kinds)
            if offset:
                likelihood.initialise_batches(torch.from_numpy(effect))
            if self._aligns_kinds:
                self.module.kinds = kinds
        if self.settings.get("input_dropout", 0.0) is None:
            self.module.input_dropout = self._default_input_dropout(store)
            for known in (self.settings, self._made_with):
                known["input_dropout"] = self.module.input_dropout.level
        if hasattr(self.module, "conditions"):
            self.module.conditions.standardise(torch.from_numpy(cells.covariates))

    def _default_input_dropout(self, store: CellStore) -> InputDropout:
        """How many counts are hidden from the encoder, by the number of genes and the share of zeros."""
        support = self.module.likelihood.support
        return InputDropout.of(None, support, store.n_features, zero_share(store) if support == "counts" else 1.0)

    @property
    def _aligns_kinds(self) -> bool:
        """Whether training compares batches kind by kind: kinds are told from counts at the median depth."""
        settings = self.module.likelihood.settings
        return hasattr(self.module, "kinds") and self.module.has_late_penalty and settings.get("depth_free", False)

    def _check_draws(self, asked: str) -> None:
        """Refuse what was ``asked`` for, which needs draws of z, of an encoder that gives none."""
        if any(factor.kind == "delta" for factor in self.module.factors.inference):
            msg = (
                f"{asked}: {type(self).__name__} has a deterministic encoder: there are no draws of z to give. Leave "
                "it out, or use a VAE."
            )
            raise ValueError(msg)

    def _rows(self, adata: AnnData | None, indices: Sequence[int] | slice | None) -> np.ndarray:
        return row_numbers(indices, self._given(adata).n_obs)

    @property
    def _known_codes(self) -> np.ndarray:
        """Codes of the combinations of conditions that cells of the training data have, (n, n_keys) int64."""
        codes = self.reference["codes"]
        return np.asarray(codes, dtype=np.int64).reshape(len(codes), -1)

    def _known_categories(self, key: str) -> list[Any]:
        """Categories of the condition ``key`` that cells of the training data have: others were not learned."""
        learned = set(self._known_codes[:, list(self.schema.categories).index(key)].tolist())
        return [value for code, value in enumerate(self.schema.categories[key].tolist()) if code in learned]

    def _category_code(self, key: str, category: Any) -> int:
        """Code of a category of the condition ``key`` that the model was trained with.

        Raises
        ------
        ValueError
            If the category is not known, or no cell had it.
        """
        code, column = self.schema.code(key, category), list(self.schema.categories).index(key)
        if code not in self._known_codes[:, column]:
            msg = f"No cell of the training data has obs[{key!r}] == {category!r}, so it was not learned."
            raise ValueError(msg)
        return code

    def _stream(
        self, adata: AnnData | None, indices: Sequence[int] | None = None, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """Mini-batches of cells, in order, on the module's device."""
        self._check_if_trained(warn=True)
        yield from self._batches(self._store(adata), self._rows(adata, indices), batch_size)

    def _batches(self, store: CellStore, rows: np.ndarray, batch_size: int | None = None) -> Iterator[Batch]:
        """:meth:`_stream` of rows (n,) of cells that were read already."""
        self.module.eval()
        for chunk in ChunkLoader(store, rows, batch_size or inference_batch(store.n_features)):
            for tensors in chunk:
                yield self.module.completed(Batch.on(self.module.device, tensors))


def inference_batch(n_features: int) -> int:
    """Cells of a mini-batch when nothing is trained."""
    return min(max(INFERENCE_VALUES // n_features, FEWEST), MOST)


@contextmanager
def evaluating(seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside, without gradients; torch's global random state is left as it was."""
    with seeded(seed), torch.inference_mode():
        yield


def settings_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The module's settings among the ``locals()`` of a model's ``__init__``, as plain JSON values."""
    from sccvae.distributions import Likelihood

    def plain(value: Any) -> Any:
        if isinstance(value, Likelihood):
            value = value.config
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value.item() if isinstance(value, np.generic) else value

    left_out = {"self", "adata", "registry", "seed", "__class__"}
    return {k: plain(v) for k, v in arguments.items() if k not in left_out}
