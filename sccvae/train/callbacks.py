"""Lightning callbacks: best weights with early stopping, and a bar that shows cells per second."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from torch import Tensor


class BestWeights(Callback):
    """Keeps the weights of the epoch with the least ``elbo_validation``, and stops when none was better for a while.

    Parameters
    ----------
    patience
        Epochs without a better one after which training stops; None never stops.
    warmup_steps
        Optimiser steps before which nothing counts (the KL warm-up, and that of late penalties): a few cells with many
        counts can make the held-out loss smallest after a handful of steps, when z holds next to nothing.

    Attributes
    ----------
    best, epoch
        Best value so far, and its epoch.
    weights
        A copy of the module's state at that epoch, on its device; None before the first validation.
    """

    def __init__(self, patience: int | None = None, warmup_steps: int = 0) -> None:
        self.patience, self.warmup_steps = patience, warmup_steps
        self.best, self.epoch = float("inf"), -1
        self.weights: dict[str, Tensor] | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the epoch, copy the weights if it is the best, stop if patience is over."""
        if pl_module.n_steps < self.warmup_steps:
            return
        value, epoch = float(trainer.callback_metrics["elbo_validation"]), len(pl_module.rows)
        if value < self.best:
            self.best, self.epoch = value, epoch
            self.weights = {k: v.detach().clone() for k, v in pl_module.module.state_dict().items()}
        else:
            trainer.should_stop |= self.patience is not None and epoch - self.epoch >= self.patience

    def restore(self, module: torch.nn.Module) -> None:
        """Give the module its best weights back."""
        if self.weights is not None:
            module.load_state_dict(self.weights)


class CellsBar(Callback):
    """One progress bar for the whole training, in cells: epoch, loss, and cells per second.

    Of several processes the first shows it, with the cells of all.

    Parameters
    ----------
    n_cells
        Training cells of an epoch.
    max_epochs
        Most epochs.
    name
        Said before the epoch.
    """

    def __init__(self, n_cells: int, max_epochs: int, name: str = "") -> None:
        self.n_cells, self.max_epochs, self.name = n_cells, max_epochs, name
        self.bar: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar; a resumed training starts where it was."""
        self.bar = progress(
            total=self.n_cells * self.max_epochs,
            initial=self.n_cells * len(pl_module.rows),
            unit=" cells",
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch: list[dict[str, Tensor]], batch_idx: int) -> None:
        """Count the cells of the chunk."""
        self.bar.set_description(
            f"{self.name} epoch {len(pl_module.rows) + 1}/{self.max_epochs}".lstrip().capitalize(), refresh=False
        )
        if pl_module.rows:
            shown = {part: pl_module.rows[-1].get(f"elbo_{part}") for part in ("train", "validation")}
            self.bar.set_postfix({k: f"{v:.1f}" for k, v in shown.items() if v is not None}, refresh=False)
        self.bar.update(trainer.world_size * sum(len(b["x"]) for b in batch))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self.bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


def out_of_time(trainer: Trainer) -> bool:
    """Whether a training was stopped by ``max_time=``, and so could go on."""
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)]
    return any(timer.time_remaining() is not None and timer.time_remaining() <= 0 for timer in timers)


def progress(**options: Any) -> Any:
    """A tqdm bar with scaled units: the notebook's own where it can be drawn, else text."""
    from importlib.util import find_spec

    if find_spec("ipywidgets") and find_spec("IPython"):
        from tqdm.auto import tqdm
    else:
        from tqdm import tqdm
    return tqdm(unit_scale=True, mininterval=0.2, **options)
