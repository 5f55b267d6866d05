"""Names of scvi-tools and of Lightning: what means the same here is taken, else an error says what to use instead."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import wraps
from typing import Any

from lightning import Trainer

#: Arguments of scvi-tools' ``train`` and those of ours that mean the same.
SAME = {"enable_progress_bar": "progress_bar", "early_stopping_patience": "patience", "max_kl_weight": "kl_weight"}
#: Arguments of scvi-tools' ``train`` that hold others.
HOLDERS = ("plan_kwargs", "plan_config", "datasplitter_kwargs", "trainer_config")
CHUNKS = "to Lightning one batch is a chunk of many mini-batches here; "
_EARLY = "elbo_validation is watched; for more add lightning's EarlyStopping to callbacks="

#: What to use in place of arguments that others have, by function; of Lightning's those that would mislead.
_INSTEAD = {
    "train": {
        "limit_train_batches overfit_batches": f"{CHUNKS}for fewer cells lower train_size=, for less time set "
        "max_epochs= or max_time=",
        "limit_val_batches": f"{CHUNKS}set validation_size=",
        "limit_test_batches limit_predict_batches": "a training neither tests nor predicts; leave it out",
        "fast_dev_run": f"{CHUNKS}set max_epochs=1 and a small train_size=",
        "max_steps": f"{CHUNKS}set max_epochs= or max_time=",
        "min_steps": f"{CHUNKS}set min_epochs=",
        "val_check_interval": f"{CHUNKS}set check_val_every_n_epoch=",
        "num_sanity_val_steps": f"{CHUNKS}leave it out",
        "log_every_n_steps": "all is logged once an epoch; leave it out",
        "accumulate_grad_batches": "set batch_size=",
        "gradient_clip_val gradient_clip_algorithm": "lower lr=, or clip in the on_before_optimizer_step of a callback",
        "early_stopping_monitor early_stopping_mode early_stopping_min_delta": _EARLY,
        "early_stopping_warmup_epochs": "patience= does not count the epochs of the KL warm-up; leave it out",
        "n_epochs_kl_warmup n_steps_kl_warmup": "set kl_warmup=, a share of all steps (0 to 1)",
        "min_kl_weight": "the KL weight rises from 0, within kl_warmup=; leave it out",
        "reduce_lr_on_plateau lr_factor lr_patience lr_threshold lr_scheduler_metric lr_min": "the learning rate falls "
        "along a cosine from lr=; leave it out",
        "optimizer optimizer_creator eps": "the optimiser is AdamW; set lr= and weight_decay=",
        "n_samples_per_label": "a GMVAE shows labelled cells more often by itself; leave it out",
        "shuffle_set_split": "cells are split at random, by seed=; leave it out",
        "external_indexing": "cells are split at random; set train_size=, validation_size= and seed=",
        "load_sparse_tensor": "sparse data stay sparse by themselves; leave it out",
        "datamodule": "cells come from the AnnData of the model; data='disk' leaves its values on disk",
        "use_gpu": "set accelerator='gpu' or 'cpu'",
        "checkpointing_monitor": "the best weights are kept by themselves; set checkpoint_dir= to go on after a stop",
        "learning_rate_monitor": "model.history['lr'] has it; leave it out",
        "simple_progress_bar progress_bar_refresh_rate": "set progress_bar=",
        "log_save_dir": "set logger=",
        " ".join(HOLDERS): "give a dictionary, or its entries as arguments",
    },
    "a model": {
        "gene_likelihood": "set likelihood= ('nb', 'zinb', 'poisson', 'normal')",
        "dispersion": "give it to the likelihood, such as "
        "likelihood=sccvae.distributions.NegativeBinomial(dispersion='gene')",
        "dropout_rate": "set dropout= (hidden units, 0 by default) and input_dropout= (inputs of the encoder)",
        "use_batch_norm use_layer_norm": "set norm='batch', 'layer' or None",
        "encode_covariates": "set encode_condition= of a CVAE (true by default)",
        "deeply_inject_covariates": "every layer sees the conditions; leave it out",
        "use_observed_lib_size": "the library size is always the observed one, or size_factor_key= of setup_anndata; "
        "leave it out",
        "use_size_factor_key": "name the column in setup_anndata(size_factor_key=)",
        "latent_distribution": "z is normal; leave it out",
        "log_variational": "the encoder sees log(1 + x) of counts; leave it out",
        "batch_key labels_key layer categorical_covariate_keys continuous_covariate_keys size_factor_key "
        "unlabeled_category": "it is one of setup_anndata",
    },
    "save": {
        "prefix": "a folder holds one model; name another folder",
        "save_anndata": "cells are not saved with a model; adata.write_h5ad(...) does that",
        "save_kwargs legacy_mudata_format datamodule": "leave it out",
    },
    "load": {
        "prefix": "a folder holds one model; name its folder",
        "accelerator device use_gpu": "a model is loaded on the CPU; model.to_device('cuda') moves it",
        "backup_url datamodule allowed_classes_names_list": "leave it out",
    },
    "load_query_data": {
        "unfrozen": "freeze=False is unfrozen=True",
        "freeze_dropout freeze_expression freeze_decoder_first_layer freeze_batchnorm_encoder freeze_batchnorm_decoder "
        "freeze_classifier": "freeze=True leaves all but the weights of new categories as they are; leave it out",
        "inplace_subset_query_vars": "genes are matched by name, and nothing is written to adata; leave it out",
        "accelerator device": "the query is where its reference is; query.to_device('cuda') moves it",
        "transfer_batch registry datamodule": "leave it out",
    },
}
INSTEAD = {
    function: {name: text for names, text in table.items() for name in names.split()}
    for function, table in _INSTEAD.items()
}


def check_names(function: str, names: Iterable[str], known: Collection[str], *, like: str | None = None) -> None:
    """Refuse names of arguments that a function does not have, and say what to use here.

    Parameters
    ----------
    function
        What messages call it.
    names
        Those that were given.
    known
        Those that it has.
    like
        Its name in :data:`INSTEAD`; None for the same.

    Raises
    ------
    TypeError
        If one is not known.
    """
    table = INSTEAD.get(like or function, {})
    for name in names:
        if name in known:
            continue
        close = difflib.get_close_matches(name, known, 1)
        if name in table:
            what = f": {table[name]}."
        else:
            what = ", and neither has lightning.Trainer" if like == "train" else ""
            what += f"; did you mean {close[0]!r}?" if close else "."
        msg = f"{function}() has no argument {name!r}{what}"
        raise TypeError(msg)


def checks_names(function: Callable, like: str | None = None) -> Callable:
    """A function with :func:`check_names` before it.

    Parameters
    ----------
    function
        With all of its arguments by name.
    like
        As for :func:`check_names`.

    Returns
    -------
    The same function.
    """
    known = inspect.signature(function).parameters

    @wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        check_names(function.__name__, options, known, like=like)
        return function(*args, **options)

    return checked


def with_known_names(function: Callable) -> Callable:
    """A training whose arguments are looked at before anything else.

    Those of scvi-tools that mean the same as ours are taken for these; others that are neither its own nor known to
    ``lightning.Trainer``, or would mislead there, are refused.

    Parameters
    ----------
    function
        A method ``train``, or ``fit``.

    Returns
    -------
    The same function.
    """
    own = inspect.signature(function).parameters
    trainer = inspect.signature(Trainer.__init__).parameters.keys() - INSTEAD["train"].keys() - {"self"}

    @wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        options = _in_our_words(options)
        outer = getattr(type(args[0]), function.__name__, function) if args else function  # a model may have its own
        known = {*own, *inspect.signature(outer).parameters, *trainer, "cuda_graphs"} - {"options", "trainer_options"}
        check_names(function.__name__, options, known, like="train")
        return function(*args, **options)

    return checked


def _in_our_words(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a training by our names, those that were held by others beside them."""
    found: dict[str, Any] = {}
    held = [options[name] for name in HOLDERS if isinstance(options.get(name), Mapping)]
    alone = {k: v for k, v in options.items() if k not in HOLDERS or not (v is None or isinstance(v, Mapping))}
    for part in (alone, *held):
        for name, value in part.items():
            name = SAME.get(name, name)
            if name in found and found[name] != value:
                msg = f"{name}= is given two values: names of scvi-tools {sorted(SAME)} and entries of {HOLDERS} count."
                raise TypeError(msg)
            found[name] = value
    return found
