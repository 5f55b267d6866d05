"""Models on disk: ``model.json``, ``weights.safetensors`` and a model card. Nothing is pickled, nothing is run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from anndata import AnnData
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sccvae import __version__
from sccvae._names import checks_names
from sccvae.data.categories import is_label
from sccvae.model._card import model_card
from sccvae.module._growing import adapt

JSON_FILE, WEIGHTS_FILE, CARD_FILE = "model.json", "weights.safetensors", "README.md"
#: In format 1 the weights of :class:`sccvae.nn.Linear`, which end so, lay by output.
FORMAT, BY_OUTPUT = 2, 1
TURNED = (".linear.weight", "latent.weight")
CONDITIONS = ("batch_key", "categorical_covariate_keys", "continuous_covariate_keys")
KEYS = {"class", "settings", "seed", "trained", "registry", "reference", "history", "splits"}


class SavingMixin:
    """Saving and loading."""

    @checks_names
    def save(self, dir_path: str | Path, *, overwrite: bool = False) -> None:
        """Save the model, without data, to a folder; it appears there whole or not at all.

        Parameters
        ----------
        dir_path
            Folder to make; its parent must exist.
        overwrite
            Replace a model that is there. A folder that holds anything else is never replaced.

        Raises
        ------
        FileExistsError
            If the folder is there and ``overwrite`` is false, or it holds something else than a model.
        FileNotFoundError
            If its parent is missing.
        """
        folder = Path(dir_path)
        if not folder.parent.is_dir():
            msg = f"{folder} cannot be made, since there is no folder {folder.parent}; make that first."
            raise FileNotFoundError(msg)
        if folder.exists():
            if not overwrite:
                msg = f"{folder} exists; pass overwrite=True to replace the model in it."
                raise FileExistsError(msg)
            if not folder.is_dir() or _foreign(folder):
                msg = f"{folder} holds other things than a saved model, so it is not replaced; choose another folder."
                raise FileExistsError(msg)
        content = {
            "format": FORMAT,
            "sccvae_version": __version__,
            "class": type(self).__name__,
            "settings": self.settings,
            "seed": self.seed,
            "trained": bool(self.is_trained),
            "registry": _encode(self.registry_),
            "reference": self.reference,
            "history": {name: frame[name].tolist() for name, frame in (self.history_ or {}).items()},
            "splits": {k: _encode(getattr(self, k)) for k in ("train_indices", "validation_indices", "test_indices")},
        }
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            (temporary / JSON_FILE).write_text(json.dumps(content, indent=1))
            (temporary / CARD_FILE).write_text(model_card(self), encoding="utf-8")
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in self.module.state_dict().items()},
                temporary / WEIGHTS_FILE,
            )
            # Both are made private to the user; a saved model is as readable as any other file.
            (temporary / WEIGHTS_FILE).chmod((temporary / JSON_FILE).stat().st_mode)
            temporary.chmod(0o755)
            old = temporary.with_name(temporary.name + "-old")
            if folder.exists():
                os.replace(folder, old)
            try:
                os.replace(temporary, folder)
            except BaseException:
                if old.exists():
                    os.replace(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    @checks_names
    def load(cls, dir_path: str | Path, adata: AnnData | Literal[False] | None = None) -> Self:
        """Load a model.

        Parameters
        ----------
        dir_path
            Where :meth:`save` put it.
        adata
            Data to attach, set up as the training data were: the same genes in any order, known categories. Without
            it (None or, as in scvi-tools, False) pass ``adata=`` to the methods; generation works without.

        Returns
        -------
        The model, in evaluation mode, on the CPU.

        Raises
        ------
        FileNotFoundError
            If there is no model.
        ValueError
            If the folder holds files that are not part of a model, a damaged or newer one, or another class of model;
            or
            the data do not fit it.
        """
        folder = Path(dir_path)
        content = _read(folder)
        if content["class"] != cls.__name__:
            msg = f"{folder} holds a {content['class']}; use sccvae.model.{content['class']}.load or sccvae.model.load."
            raise ValueError(msg)
        registry = _decode(content["registry"])
        model = cls(registry=registry, seed=content["seed"], **content["settings"])
        try:
            weights = load_file(folder / WEIGHTS_FILE)
            if content["format"] == BY_OUTPUT:
                weights = {k: v.T if k.endswith(TURNED) else v for k, v in weights.items()}
            if content["reference"].get("mapping", {}).get("adapted"):  # not in queries of earlier versions
                adapt(model.module)
            model.module.load_state_dict(weights)
        except (SafetensorError, RuntimeError) as error:
            msg = f"{folder / WEIGHTS_FILE} is damaged or does not belong to {JSON_FILE}: {error}"
            raise ValueError(msg) from error
        model.reference = content["reference"]
        if model.reference.get("chooses_components"):  # the settings have the number that was chosen
            model._choose_components = True
            model._made_with["n_components"] = None
        model.history_ = {
            name: pd.DataFrame({name: values}, index=pd.RangeIndex(len(values), name="epoch"))
            for name, values in content["history"].items()
        } or ({} if content["trained"] else None)  # a query may have had nothing to train
        model.is_trained = content["trained"]
        model._summarise()
        for name, rows in content["splits"].items():
            setattr(model, name, _decode(rows))
        if adata is not None and adata is not False:
            model._attach(adata)
        return model

    def _attach(self, adata: AnnData) -> None:
        """Make ``adata`` the model's data, registered as the training data were."""
        self._store(adata)  # any misfit is named here
        if adata.n_vars != len(self.schema.var_names):
            msg = (
                f"adata has {adata.n_vars} genes, the model {len(self.schema.var_names)}: subset it first with "
                "`adata = adata[:, model.schema.var_names].copy()`, or load without adata and pass it to the methods."
            )
            raise ValueError(msg)
        setup = self.registry_["setup_args"]
        key = self.schema.labels_key
        labels = adata.obs.get(key) if key is not None else None
        if key is not None and (labels is None or not is_label(labels, self.schema.unlabeled_category).any()):
            msg = (
                f"adata.obs[{key!r}] holds no label, and this model was set up with labels: load it without adata and "
                "pass these cells to its methods, as in `model.get_latent_representation(adata)`, or map them with "
                "`model.load_query(adata)`."
            )
            raise ValueError(msg)
        if not self._reads_conditions:
            setup = {k: v for k, v in setup.items() if k not in CONDITIONS}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the set-up: they came up when it was made
            type(self).setup_anndata(adata, **setup, source_registry=self.registry_)
        self._adata = adata
        self._adata_manager = self._get_most_recent_anndata_manager(adata, required=True)
        self._register_manager_for_instance(self._adata_manager)


@checks_names
def load(dir_path: str | Path, adata: AnnData | Literal[False] | None = None) -> Any:
    """Load a saved model of any class.

    Parameters
    ----------
    dir_path, adata
        As for :meth:`sccvae.model.BaseModel.load`.

    Returns
    -------
    A model of the class that was saved.

    Raises
    ------
    FileNotFoundError, ValueError
        As for :meth:`sccvae.model.BaseModel.load`.
    """
    from sccvae import model

    name = _read(Path(dir_path))["class"]
    if name not in model.__all__ or name in ("BaseModel", "load"):
        msg = f"{dir_path} holds a model of class {name!r}, which this sccvae does not have."
        raise ValueError(msg)
    return getattr(model, name).load(dir_path, adata)


def _read(folder: Path) -> dict[str, Any]:
    """``model.json``, after a look at every file in the folder."""
    if not (folder / JSON_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        if pickles := sorted(f.name for f in folder.glob("*model.pt")):
            msg = (
                f"{folder} holds {pickles}, a model of scvi-tools, which sccvae cannot read: load it with scvi-tools, "
                "or train a model of sccvae on the same cells."
            )
            raise ValueError(msg)
        msg = f"{folder} is no saved sccvae model: it needs {JSON_FILE} and {WEIGHTS_FILE}."
        raise FileNotFoundError(msg)
    unknown = _foreign(folder)
    if unknown:
        msg = (
            f"{folder} holds files that are not part of a sccvae model: {unknown}. Nothing was loaded, since a "
            "foreign file "
            "(a pickle, say) can run code; move them away if you trust the rest."
        )
        raise ValueError(msg)
    try:
        content = json.loads((folder / JSON_FILE).read_text())
        found = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{folder / JSON_FILE} is damaged: {error}"
        raise ValueError(msg) from error
    if found not in (BY_OUTPUT, FORMAT):
        msg = (
            f"{folder} is in format {found!r} (sccvae {content.get('sccvae_version')}); this sccvae {__version__} "
            f"reads formats {BY_OUTPUT} and {FORMAT}. Update sccvae, if a newer one wrote it, and load it again."
        )
        raise ValueError(msg)
    lacking = sorted(KEYS - content.keys())
    if lacking:
        msg = f"{folder / JSON_FILE} is damaged: it lacks {lacking}."
        raise ValueError(msg)
    return content


def _foreign(folder: Path) -> list[str]:
    """Names of what is not part of a model; macOS leaves ``.DS_Store`` in any folder that was looked at."""
    return sorted({f.name for f in folder.iterdir()} - {JSON_FILE, WEIGHTS_FILE, CARD_FILE, ".DS_Store"})


def _encode(value: Any) -> Any:
    """A registry as JSON: arrays become tagged lists, so that they come back as arrays of the same type."""
    if isinstance(value, np.ndarray | pd.Index):
        value = np.asarray(value)
        dtype = "object" if value.dtype.kind in "OUST" else value.dtype.str
        return {"__array__": [_encode(v) for v in value.tolist()], "dtype": dtype}
    if isinstance(value, dict):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    msg = f"Cannot save a value of type {type(value).__name__} ({value!r}) without pickling."
    raise TypeError(msg)


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if "__array__" in value:
            return np.array(value["__array__"], dtype=value["dtype"])
        return {k: _decode(v) for k, v in value.items()}
    return [_decode(v) for v in value] if isinstance(value, list) else value
