"""Train a module on stored cells: put loader, plan, callbacks and Lightning's trainer together."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, Timer

from sccvae._names import with_known_names
from sccvae._recording import Recorder
from sccvae.data import CellStore, ChunkLoader, shuffled_loader
from sccvae.data.residence import resident
from sccvae.module import GenerativeModule
from sccvae.nn import check_sizes
from sccvae.train.callbacks import BestWeights, CellsBar, out_of_time
from sccvae.train.checkpoint import ResumableTraining, digest
from sccvae.train.plan import TrainingPlan
from sccvae.train.schedules import Schedule, default_max_epochs

logger = logging.getLogger(__name__)

#: Patience is at least this many epochs and this many optimiser steps: an epoch of small data is a few noisy steps.
PATIENCE_EPOCHS, PATIENCE_STEPS = 10, 400
#: Precisions of Lightning whose steps can be recorded: others look at the gradients first.
RECORDED = ("32-true", "bf16-mixed")
#: What Lightning calls inside a step: a callback that has one of these is called at each step, so none is recorded.
INSIDE = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")


@dataclass
class TrainingResult:
    """What a training leaves besides the weights.

    Attributes
    ----------
    history
        Logged name -> data frame with one column, indexed by epoch.
    interrupted, out_of_time
        Whether Ctrl-C or ``max_time`` ended it, and whether it was the latter.
    trainer
        Lightning's trainer; None if a finished training was read from disk.
    kept
        The epoch whose weights the module has.
    """

    history: dict[str, pd.DataFrame]
    interrupted: bool
    trainer: Trainer | None
    kept: int
    out_of_time: bool = False


@with_known_names
def fit(
    module: GenerativeModule,
    store: CellStore,
    train_rows: np.ndarray,
    validation_rows: np.ndarray,
    *,
    max_epochs: int | None = None,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    kl_weight: float = 1.0,
    kl_warmup: float = 0.2,
    early_stopping: bool = True,
    patience: int | None = None,
    accelerator: str = "auto",
    devices: int | list[int] = 1,
    checkpoint_dir: str | Path | None = None,
    max_time: str | timedelta | dict[str, int] | None = None,
    seed: int = 0,
    progress_bar: bool = True,
    callbacks: Sequence[Callback] = (),
    restore_best: bool = True,
    cuda_graphs: bool = True,
    description: str = "",
    settings: dict[str, Any] | None = None,
    **trainer_options: Any,
) -> TrainingResult:
    """Train ``module`` in place; it ends with the weights of its best epoch, in evaluation mode, on the CPU.

    Parameters
    ----------
    module
        The model.
    store
        The cells.
    train_rows, validation_rows
        Rows of the store, (n,) int64. Without validation rows the last weights are kept.
    max_epochs
        Passes over the training cells; None for about 6,000 optimiser steps (20 to 400 epochs).
    batch_size
        Most cells of a mini-batch.
    lr, weight_decay
        Of AdamW; the learning rate falls along a cosine over all steps.
    kl_weight, kl_warmup
        Target of the KL weight, and the share of all steps after which it is reached.
    early_stopping
        Stop when the negative ELBO of the validation cells has not fallen for ``patience`` epochs.
    patience
        None for 10 epochs or 400 optimiser steps, whichever is longer. Epochs of the KL warm-up do not count.
    accelerator, devices
        As for ``lightning.Trainer``; ``"auto"`` takes an NVIDIA GPU or the CPU. With several devices
        (``strategy="ddp"``) each process takes its share of every epoch, ``batch_size`` is that of one process, and
        gradients are averaged.
    checkpoint_dir
        Folder for the state of the training after every epoch; a later call with the same settings goes on from there.
    max_time
        As for ``lightning.Trainer``; the epoch that runs then is the last one.
    seed
        Of mini-batch order and noise. The global random state of torch is left as it was.
    progress_bar
        Show epoch, losses and cells per second.
    callbacks
        More Lightning callbacks.
    restore_best
        End with the weights of the best validation epoch, else with the last ones.
    cuda_graphs
        On a single NVIDIA GPU whose memory has room for the cells: keep them there, record what a step does and play it
        back, which takes a fraction of the time. Not if a callback is to be called inside a step
        (``on_after_backward``, ...).
    description
        What the progress bar calls this training.
    settings
        Those of the model (plain JSON values), which must be the same for a training to go on from its checkpoint.
    **trainer_options
        For ``lightning.Trainer``, for example ``logger=``; those that count Lightning's batches, which are chunks of
        many mini-batches, are refused.

    Returns
    -------
    History, whether it was interrupted, and the trainer.

    Raises
    ------
    TypeError
        If ``max_epochs`` or ``batch_size`` is no whole number, or there is no such argument.
    ValueError
        If there are too few training cells, epochs or cells in a mini-batch, a checkpoint does not fit, ``max_time`` is
        no time at all, or Apple's GPU
        is asked for and x are counts.
    FloatingPointError
        If the loss stops being finite; the module then has its best weights, or, before any validation, its first ones.
    """
    check_sizes(batch_size=batch_size, max_epochs=1 if max_epochs is None else max_epochs)
    batch_size = int(batch_size)
    if len(train_rows) < 2:
        msg = f"Training needs at least 2 cells, there are {len(train_rows)} of {len(store)}; raise train_size."
        raise ValueError(msg)
    accelerator = _accelerator(accelerator, module)
    n_processes = _processes(accelerator, devices, **trainer_options)
    if len(train_rows) < 2 * n_processes or 0 < len(validation_rows) < n_processes:
        msg = (
            f"{n_processes} processes cannot share {len(train_rows)} training and {len(validation_rows)} validation "
            "cells: each needs two and one; use fewer devices."
        )
        raise ValueError(msg)
    train_loader = shuffled_loader(store, train_rows, batch_size, seed, n_processes)
    steps = train_loader.n_batches
    batch_norm = any(isinstance(m, torch.nn.BatchNorm1d) for m in module.modules())
    if batch_norm and len(train_rows) // n_processes < 2 * steps:
        msg = (
            f"batch_size={batch_size} leaves mini-batches of a single cell, on which batch norm cannot work; use a "
            "batch_size of at least 3, or norm='layer'."
        )
        raise ValueError(msg)
    max_epochs = default_max_epochs(steps) if max_epochs is None else int(max_epochs)
    schedule = Schedule(steps * max_epochs, kl_weight, kl_warmup)
    plan = TrainingPlan(module, schedule, lr=lr, weight_decay=weight_decay)
    best = None
    if len(validation_rows) and (early_stopping or restore_best):
        if early_stopping and patience is None:
            patience = max(PATIENCE_EPOCHS, math.ceil(PATIENCE_STEPS / steps))
        settled = min(schedule.warmup_steps * (2 if module.has_late_penalty else 1), steps * max_epochs)
        best = BestWeights(patience=patience if early_stopping else None, warmup_steps=settled)
    timer = None if max_time is None else Timer(max_time, "epoch")
    used = [*callbacks, *filter(None, [best, timer])]
    if progress_bar:
        used.append(CellsBar(len(train_rows), max_epochs, description))
    with ExitStack() as stack:
        stack.enter_context(_quiet_lightning())
        stack.enter_context(seeded(seed))
        checkpoint = None
        if n_processes > 1 and checkpoint_dir is None:  # by this file forked processes give their weights back
            checkpoint_dir = stack.enter_context(TemporaryDirectory(prefix="sccvae-"))
        if checkpoint_dir is not None:
            facts = {f"model's {name}": value for name, value in (settings or {}).items()}
            facts |= {"max_epochs": max_epochs, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay}
            facts |= {"kl_weight": kl_weight, "kl_warmup": kl_warmup, "patience": patience, "seed": seed}
            facts |= {"n_train": len(train_rows), "n_validation": len(validation_rows)} | _facts(module, store)
            checkpoint = ResumableTraining(checkpoint_dir, facts, best)
            if checkpoint.resume(plan):
                logger.info("The training in %s had finished; its weights are loaded.", checkpoint_dir)
                max_epochs = len(plan.rows)
            used.append(checkpoint)
        first = {k: v.clone() for k, v in module.state_dict().items()}
        trainer, interrupted = None, False
        try:
            if max_epochs > len(plan.rows):
                train_loader.epoch = len(plan.rows)
                done = len(plan.rows)
                options = {"accelerator": accelerator, "devices": devices, "callbacks": used} | trainer_options
                trainer = _trainer(max_epochs - done, bool(len(validation_rows)), checkpoint is not None, **options)
                module.train()
                validation = ChunkLoader(store, validation_rows, batch_size, n_processes=n_processes)
                with _on_gpu(plan, trainer, (train_loader, validation)) if cuda_graphs else nullcontext():
                    trainer.fit(plan, train_loader, validation)
                if len(plan.rows) == done and n_processes > 1:  # others have trained, forked from this process
                    checkpoint.resume(plan)
        except SystemExit as stop:  # Lightning answers Ctrl-C, wherever it strikes, by ending the Python session
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            interrupted = True
        except FloatingPointError:
            module.load_state_dict(first)
            raise
        finally:
            module.cpu()
            restored = best is not None and best.weights is not None and restore_best and not interrupted
            if restored:
                best.restore(module)
            module.eval()
    if not plan.rows and timer is not None:
        msg = f"max_time={max_time!r} was over before the first epoch began; give it more."
        raise ValueError(msg)
    late = trainer is not None and len(plan.rows) < max_epochs and out_of_time(trainer)
    if late:
        logger.warning("Time was over after epoch %d of %d at most.", len(plan.rows), max_epochs)
        interrupted = True
    elif interrupted:
        logger.warning("Training was interrupted in epoch %d; the model keeps its current weights.", len(plan.rows) + 1)
    table = pd.DataFrame(plan.rows)
    table.index.name = "epoch"
    kept = best.epoch if restored else len(table) - 1
    return TrainingResult({name: table[[name]] for name in table}, interrupted, trainer, kept, late)


def _facts(module: GenerativeModule, store: CellStore) -> dict[str, Any]:
    """What a training that goes on must find again, of the model and of what is in memory of the cells."""
    cells = store.cells
    return {
        "library sizes": digest(cells.library),
        "conditions": digest(cells.codes, cells.covariates),
        "model": type(module).__name__,
        "n_weights": sum(p.numel() for p in module.parameters()),
    }


def _trainer(max_epochs: int, validates: bool, keeps: bool, **options: Any) -> Trainer:
    """Lightning's trainer, for these epochs; whether there are cells to validate with, and checkpoints of ours."""
    defaults = {
        "logger": False,
        "enable_model_summary": False,
        # Lightning's own checkpoints pickle: who wants them asks for them.
        "enable_checkpointing": keeps or any(isinstance(c, Checkpoint) for c in options["callbacks"]),
        "enable_progress_bar": any(isinstance(c, ProgressBar) for c in options["callbacks"]),
    }
    # We log once an epoch, which is less than Lightning expects of the log; an empty loader it would warn about.
    return Trainer(
        max_epochs=max_epochs,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if validates else 0.0,
        **defaults | options,
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch draws from ``seed``; its global random states, also those of GPUs, are left as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def _on_gpu(plan: TrainingPlan, trainer: Trainer, loaders: Sequence[ChunkLoader]) -> Iterator[None]:
    """Inside, the cells lie on the GPU and steps are recorded, if there is one GPU that has room."""
    device, store = trainer.strategy.root_device, loaders[0].store
    inside = [type(c).__name__ for c in trainer.callbacks if any(_has(c, hook) for hook in INSIDE)]
    recordable = trainer.world_size == 1 and trainer.precision in RECORDED and not inside
    near = resident(store, device) if recordable else store
    if near is store:
        if inside and device.type == "cuda":
            logger.info("Steps are taken one by one, as callbacks are called inside them: %s.", ", ".join(inside))
        yield
        return
    plan.cpu()  # gradients of what was computed before then have no place on another stream (Recorder)
    try:
        with Recorder(device) as plan.recorder:
            for loader in loaders:
                loader.store = near
            yield
    finally:  # Lightning's trainer keeps loaders and plan; none of this is to stay on the GPU
        plan.recorder = None
        plan.zero_grad()
        for loader in loaders:
            loader.store = store


def _has(callback: Callback, hook: str) -> bool:
    """Whether a callback does something of its own at a hook."""
    return getattr(getattr(callback, hook), "__func__", None) is not getattr(Callback, hook)


def _accelerator(asked: str, module: GenerativeModule) -> str:
    """What to train on: as asked, but that ``"auto"`` leaves Apple's GPU alone, which has no float64."""
    if not torch.backends.mps.is_available() or asked not in ("auto", "gpu", "mps"):
        return asked
    if asked == "auto":
        return "cpu"
    if module.likelihood.support == "counts":
        msg = (
            f"accelerator={asked!r} is Apple's GPU here, which has no float64, and log probabilities of counts need "
            "it; use accelerator='cpu'."
        )
        raise ValueError(msg)
    return asked


def _processes(accelerator: str, devices: int | str | list[int], **options: Any) -> int:
    """How many processes Lightning would train with."""
    if devices == 1 and options.get("num_nodes", 1) == 1:
        return 1
    named = {name: options[name] for name in ("strategy", "num_nodes", "plugins") if name in options}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator=accelerator, devices=devices, **named, **quiet).world_size


@contextmanager
def _quiet_lightning():
    """Keep Lightning's notices about devices and products out of a notebook; its warnings stay, but for one."""
    loggers = [logging.getLogger(f"lightning.{room}.utilities.rank_zero") for room in ("pytorch", "fabric")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # lightning 2.6 with torch 2.13, at every fit: nothing that a user could change
            warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning, r"lightning\.pytorch")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
