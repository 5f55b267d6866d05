"""What scvi-tools' base class tells of a set-up, for models that are saved as sccvae saves and may have no manager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rich.pretty  # noqa: F401  scvi-tools' view_anndata_setup uses it without importing it
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager

from sccvae.data import anndata_fields
from sccvae.model._saving import _decode, _read


class _Unregistered(AnnDataManager):
    """A manager of a registry alone."""

    def __init__(self, registry: dict[str, Any]) -> None:
        super().__init__(fields=anndata_fields(**registry["setup_args"]))
        self._registry = registry

    def _assert_anndata_registered(self) -> None:
        """Viewing needs no AnnData."""


class RegistryMixin:
    """The set-up of a model: its own, and that of a saved one."""

    @property
    def _has_manager(self) -> bool:
        """Whether an AnnData was registered: not for a model without data, nor for a query."""
        return self.adata_manager is not None

    def view_anndata_setup(self, adata: AnnData | None = None, hide_state_registries: bool = False) -> None:
        """Print the set-up of the model, with or without data, or of another AnnData.

        Parameters
        ----------
        adata
            One that was set up for this model; None for the model's own set-up.
        hide_state_registries
            Leave out the categories of each field.

        Raises
        ------
        ValueError
            If ``adata`` was not set up.
        """
        if self._has_manager or not (adata is None or adata is self.adata):
            super().view_anndata_setup(adata, hide_state_registries)
            return
        _Unregistered(self.registry_).view_registry(hide_state_registries=hide_state_registries)

    def view_registry(self, hide_state_registries: bool = False) -> None:
        """Print the set-up of the model: :meth:`view_anndata_setup` under scvi-tools' other name.

        Parameters
        ----------
        hide_state_registries
            Leave out the categories of each field.
        """
        self.view_anndata_setup(hide_state_registries=hide_state_registries)

    def update_setup_method_args(self, setup_method_args: dict[str, Any]) -> None:
        """Not here: what a model was set up with stays what it was trained with.

        Parameters
        ----------
        setup_method_args
            Not used.

        Raises
        ------
        NotImplementedError
            Always.
        """
        del setup_method_args
        name = type(self).__name__
        msg = f"A model keeps the set-up it was made with: run `{name}.setup_anndata(adata, ...)` and make another."
        raise NotImplementedError(msg)

    def deregister_manager(self, adata: AnnData | None = None) -> None:
        """Forget the set-up of ``adata``, or of all but the model's own.

        Parameters
        ----------
        adata
            One that was set up for this model; None for all others than the model's own.

        Raises
        ------
        ValueError
            If the model has registered none.
        """
        if not self._has_manager:
            msg = (
                "This model has registered no AnnData, since it was loaded without data or is a query: there is "
                "nothing to deregister."
            )
            raise ValueError(msg)
        super().deregister_manager(adata)

    @staticmethod
    def load_registry(dir_path: str | Path) -> dict[str, Any]:
        """The set-up of a saved model, as scvi-tools' registry.

        Parameters
        ----------
        dir_path
            Folder of the model.

        Returns
        -------
        What ``model.registry_`` is.

        Raises
        ------
        FileNotFoundError, ValueError
            As for ``load``.
        """
        return _decode(_read(Path(dir_path))["registry"])

    @staticmethod
    def view_setup_args(dir_path: str | Path) -> None:
        """Print the arguments of ``setup_anndata`` of a saved model.

        Parameters
        ----------
        dir_path
            Folder of the model.

        Raises
        ------
        FileNotFoundError, ValueError
            As for ``load``.
        """
        AnnDataManager.view_setup_method_args(RegistryMixin.load_registry(dir_path))

    @classmethod
    def convert_legacy_save(cls, *args: Any, **options: Any) -> None:
        """Not needed: ``load`` reads every format of sccvae.

        Parameters
        ----------
        *args, **options
            Those of scvi-tools.

        Raises
        ------
        NotImplementedError
            Always.
        """
        msg = "There is nothing to convert: load reads every format of sccvae, and save writes the newest."
        raise NotImplementedError(msg)


def extend_registry(registry: dict[str, Any], new: dict[str, list[Any]], n_cells: int) -> None:
    """Make the registry of a reference that of a query: more categories, behind the known ones, and other cells."""
    fields = registry["field_registries"]
    fields[REGISTRY_KEYS.X_KEY]["summary_stats"]["n_cells"] = n_cells
    for key, values in new.items():
        if key == registry["setup_args"].get("batch_key"):
            field = fields[REGISTRY_KEYS.BATCH_KEY]
            state, name = field["state_registry"], "categorical_mapping"
            field["summary_stats"]["n_batch"] += len(values)
        else:
            field = fields[REGISTRY_KEYS.CAT_COVS_KEY]
            state, name = field["state_registry"]["mappings"], key
            at = list(field["state_registry"]["field_keys"]).index(key)
            field["state_registry"]["n_cats_per_key"][at] += len(values)
        known = np.asarray(state[name])
        grown = np.empty(len(known) + len(values), dtype=object)
        grown[:] = [*known.tolist(), *values]
        state[name] = pd.Series(grown).infer_objects().to_numpy()  # numbers stay numbers, if all are
