"""What the jobs share: a model for an AnnData that is left as it was, and the record of what was done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from sccvae import __version__
from sccvae.data.checks import check_anndata, check_no_view
from sccvae.model import AE, CVAE, GMVAE, VAE, BaseModel
from sccvae.model._saving import CONDITIONS

MODELS: dict[str, type[BaseModel]] = {"ae": AE, "vae": VAE, "cvae": CVAE, "gmvae": GMVAE}
#: Arguments of the jobs, by what they are handed to.
SETUP = ("layer", "size_factor_key", "labels_key", "unlabeled_category", *CONDITIONS)
SETTINGS = ("n_latent", "likelihood", "n_components")


def requested(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`trained_model` needs of the arguments of a job, its ``locals()``."""
    settings = {name: arguments[name] for name in SETTINGS if name in arguments}
    setup = {name: arguments[name] for name in SETUP if name in arguments}
    return {
        # several columns may come as an array, which is neither true nor false
        "setup": {k: v.tolist() if isinstance(v, np.ndarray | pd.Index) else v for k, v in setup.items()},
        "settings": settings | dict(arguments["model_options"] or {}),
        "seed": arguments["seed"],
        "train_options": arguments["train_options"],
    }


def target(adata: AnnData, key: str | None, *, copy: bool) -> AnnData:
    """The AnnData to write to under ``key``: ``adata`` itself or its copy, which is in memory.

    Raises
    ------
    TypeError
        If ``adata`` is no AnnData, or the key is neither a text nor None.
    ValueError
        If ``adata`` is a view and is to be written to, or a file could not hold the key.
    """
    check_anndata(adata)
    if key is not None and not (isinstance(key, str) and key):  # anndata would take any, and fail later
        msg = f"key_added={key!r} must be a text, the key of the results, and not empty."
        raise TypeError(msg)
    if "/" in (key or ""):
        msg = (
            f"{key!r} cannot be the key of the results: in a file '/' makes groups within groups, which anndata cannot "
            "read back. Choose a key without it."
        )
        raise ValueError(msg)
    if copy:  # matrices may be on disk without `adata.isbacked`: those of sccvae.data.open_anndata are
        return adata.to_memory(copy=True)
    check_no_view(adata, ", or pass copy=True")
    return adata


def trained_model(
    adata: AnnData,
    model: str | BaseModel,
    *,
    setup: Mapping[str, Any],
    settings: Mapping[str, Any],
    seed: int,
    train_options: Mapping[str, Any] | None,
    check: Callable[[BaseModel], Any] = lambda model: None,
) -> BaseModel:
    """A trained model: the one given, or a new one trained on the cells of ``adata``, which stays as it is.

    Parameters
    ----------
    adata
        The cells.
    model
        Name of a model, or a trained one.
    setup
        Arguments of ``setup_anndata``; those that are None do not count.
    settings
        Arguments of the model's class; those that are None do not count.
    seed
        Of the weights, the split and the noise.
    train_options
        Arguments of ``train``.
    check
        Called with the model before it is trained: what fails, fails early.

    Raises
    ------
    TypeError, ValueError
        If ``model`` is none, is not trained, or does not fit the other arguments; and what the model raises.
    """
    setup = {name: value for name, value in setup.items() if value is not None}
    settings = {name: value for name, value in settings.items() if value is not None}
    if isinstance(model, BaseModel):
        given = [*setup, *settings, *(["train_options"] if train_options else [])]
        if given:
            msg = (
                f"{given} belong to a model that is still to be trained; this {type(model).__name__} has its own: "
                "leave them out, or name the model that is to be trained."
            )
            raise ValueError(msg)
        if not model.is_trained:
            msg = f"This {type(model).__name__} is not trained yet: run model.train() first."
            raise ValueError(msg)
        check(model)
        return model
    kind = model_class(model, setup, settings)
    # scvi-tools writes its notes into the AnnData it is shown and keeps that AnnData until Python ends. So it is shown
    # one that shares the matrices and loses them again.
    light = AnnData(
        X=adata.X, obs=adata.obs.copy(), var=pd.DataFrame(index=adata.var_names), layers=dict(adata.layers.items())
    )
    try:
        kind.setup_anndata(light, **setup)
        new = kind(light, seed=seed, **settings)
        check(new)
        new.train(**{"seed": seed} | dict(train_options or {}))
        check_whole(new)
    finally:
        light.X = None
        light.layers.clear()
        light.obs = light.obs[[]]
    return new


def check_whole(model: BaseModel) -> None:
    """End the job where Ctrl-C ended the training, before anything is written.

    Raises
    ------
    KeyboardInterrupt
        If it did.
    """
    if model.was_interrupted:
        msg = "The training was interrupted: nothing was written. With a checkpoint_dir in train_options it can go on."
        raise KeyboardInterrupt(msg)


def check_columns(model: BaseModel, columns: Iterable[str]) -> None:
    """Columns of ``obs`` that are written must not take the place of what the model reads.

    Raises
    ------
    ValueError
        If one would.
    """
    schema = model.schema
    read = [*schema.categories, *schema.continuous, schema.labels_key, schema.size_factor_key]
    lost = [column for column in columns if column in read]
    if lost:
        msg = (
            f"The results would be written to obs[{lost[0]!r}], which the model reads and which would be lost: choose "
            "another key."
        )
        raise ValueError(msg)


def model_class(name: Any, setup: Mapping[str, Any], settings: Mapping[str, Any]) -> type[BaseModel]:
    """The class called ``name``, if it takes account of what is named in ``setup`` and ``settings`` (without None).

    Raises
    ------
    TypeError, ValueError
        If there is none, or it does not.
    """
    if not isinstance(name, str):
        msg = f"model must be one of {sorted(MODELS)} or a trained model, not {type(name).__name__}."
        raise TypeError(msg)
    if name not in MODELS:
        msg = f"No model is called {name!r}; choose one of {sorted(MODELS)} or pass a trained model."
        raise ValueError(msg)
    conditions = [k for k in CONDITIONS if setup.get(k)]
    if name == "cvae" and not conditions:
        msg = "model='cvae' needs a condition: pass batch_key= (or covariates). model='vae' does without."
        raise ValueError(msg)
    if name in ("ae", "vae") and conditions:
        msg = f"model={name!r} takes no account of {conditions}: leave them out, or take model='cvae'."
        raise ValueError(msg)
    if name != "gmvae" and "n_components" in settings:
        msg = f"model={name!r} has no components: n_components= is for model='gmvae'."
        raise ValueError(msg)
    if name == "ae" and "likelihood" in settings:
        msg = "model='ae' has no likelihood (it minimises the square error); model='vae' takes likelihood='normal'."
        raise ValueError(msg)
    return MODELS[name]


def record(model: BaseModel, train_options: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is noted in ``uns`` about a model, of types that every AnnData file can hold.

    Returns
    -------
    Dictionary with ``model``, ``sccvae_version``, ``seed``, ``params`` (``setup``, ``model``, ``train``), ``epochs``,
    ``history`` (name -> one value for each epoch), and ``elbo_train`` and ``elbo_validation``: the negative ELBO in
    nats per cell (lower is better) at the epoch whose weights were kept.
    """
    history = {name: frame[name].to_numpy(dtype=np.float64) for name, frame in (model.history or {}).items()}
    kept = model.reference.get("kept_epoch", -1)
    params = {
        "setup": model.registry_["setup_args"],
        "model": model.settings,
        "train": train_options or {},
    }
    found = {
        "model": type(model).__name__,
        "sccvae_version": __version__,
        "seed": model.seed,
        "params": params,
        "epochs": len(next(iter(history.values()), [])),
        "history": history,
    }
    found |= {name: float(history[name][kept]) for name in ("elbo_train", "elbo_validation") if name in history}
    return plain(found)


def plain(value: Any) -> Any:
    """``value`` without None, of types that ``write_h5ad`` knows; anything else by its text.

    A ``/`` in a key, such as the name of a column, becomes a ``|``: a file would make groups within groups of it.
    """
    if isinstance(value, Mapping):
        return {str(k).replace("/", "|"): plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value if v is not None]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, str | bool | int | float | np.ndarray) else str(value)
