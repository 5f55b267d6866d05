"""The Lightning plan: one training step receives a chunk and takes many optimiser steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from sccvae._recording import Recorder
from sccvae.module import Batch, GenerativeModule
from sccvae.train.schedules import Schedule

#: Learning rate of dispersions and sigmas (``log_theta``, ``log_sigma``), as a multiple of that of the networks. They
#: are logarithms that no network scales, and have a long way to go: at the rate of the networks they do not arrive.
#: Held-out ELBO at 3 against 1, in nats a cell: zheng +7.5, kang +5.8 (with fewer epochs); at 10 pbmc3k loses 7.
SPREAD_SPEED = 3.0


class TrainingPlan(LightningModule):
    """Trains any :class:`~sccvae.module.GenerativeModule` by stochastic gradient steps on its loss.

    Lightning's cost is paid once a chunk; callbacks, loggers and devices work as usual. Means over the epoch of every
    reported term are logged as ``<term>_train`` and ``<term>_validation``, with ``kl_weight`` and ``lr``.

    Parameters
    ----------
    module
        The model to train.
    schedule
        KL weight and learning-rate factor by optimiser step.
    lr
        Highest learning rate of Adam.
    weight_decay
        Decoupled weight decay.

    Attributes
    ----------
    recorder
        Plays recordings of the steps (on a GPU); what Lightning calls inside a step is then not called. None, as at
        first, takes each step anew.
    n_steps
        Optimiser steps taken.
    rows
        One dictionary of logged means for each finished epoch.
    optimizer_state
        State that a resumed training starts its optimiser with.
    """

    def __init__(
        self, module: GenerativeModule, schedule: Schedule, *, lr: float = 1e-3, weight_decay: float = 0.0
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.module = module
        self.schedule = schedule
        self.lr, self.weight_decay = lr, weight_decay
        self.recorder: Recorder | None = None
        self.n_steps = 0
        self.rows: list[dict[str, float]] = []
        self.optimizer_state: dict[str, Any] | None = None
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "validation": {}}
        self._counts = {"train": 0, "validation": 0}
        self._validation: dict[str, float] = {}
        self.watched: dict[str, float] = {}  # what callbacks add to the row of the epoch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, fused where the device has it."""
        fused = self.device.type in ("cpu", "cuda")
        weights = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        spread = [p for name, p in weights if name.startswith("likelihood.log_")]
        others = [p for name, p in weights if not name.startswith("likelihood.log_")]
        groups = [{"params": others, "speed": 1.0}, {"params": spread, "speed": SPREAD_SPEED}]
        groups = [group for group in groups if group["params"]]
        if self.recorder is not None:  # a recording reads the learning rates where they lie
            groups = [group | {"lr": torch.tensor(self.lr, device=self.device)} for group in groups]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay, fused=fused)
        if self.optimizer_state is not None:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": self.optimizer_state})
        return optimizer

    def training_step(self, chunk: list[dict[str, Tensor]], _: int) -> None:
        """One optimiser step for each mini-batch of the chunk."""
        optimizer = self.optimizers()
        for tensors in chunk:
            if self.recorder is None:
                factors = self.schedule.at(self.n_steps)
                for group in optimizer.param_groups:
                    group["lr"] = group["speed"] * self.lr * factors["lr"]
                self._update(tensors, factors["kl_weight"], factors["late"], optimizer)
            else:
                late = self.module.has_late_penalty and self.schedule.late(self.n_steps) > 0
                self.recorder.run(("train", late), partial(self._update_recorded, late=late), tensors)
            self.n_steps += 1
            self._counts["train"] += len(tensors["x"])
        if self.recorder is not None:  # what an optimiser of Lightning counts
            self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed += len(chunk)
        if self.trainer.world_size > 1:  # running means of batch norm: each process has seen other cells
            for buffer in self.module.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))
        if not torch.isfinite(self._sums["train"]["loss"]):
            bad = [name for name, value in self._sums["train"].items() if not torch.isfinite(value)]
            msg = (
                f"The loss is no longer finite at optimiser step {self.n_steps} (terms {bad}); the model goes "
                "back to its best "
                f"weights so far. Train again with a lower learning rate (lr={self.lr / 10:g}) or look for "
                "extreme values."
            )
            raise FloatingPointError(msg)

    def _update(
        self, tensors: dict[str, Tensor], kl_weight: float | Tensor, late: float | Tensor, optimizer: Any
    ) -> None:
        """One optimiser step."""
        batch = self.module.completed(Batch(**tensors))
        objective, report = self.module.loss(batch, kl_weight=kl_weight, late=late)
        for group in optimizer.param_groups:  # as optimizer.zero_grad(), but for its books: a fiftieth of a step
            for weight in group["params"]:
                weight.grad = None
        self.manual_backward(objective)
        optimizer.step()
        self._add("train", report, len(batch))

    def _update_recorded(self, tensors: dict[str, Tensor], *, late: bool) -> None:
        """The same without a number that changes from step to step: the schedule lies on the device, as a table."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        factors = self._schedule.index_select(0, self._step)[0]
        for group in optimizer.param_groups:
            group["lr"].copy_(factors[2] * group["speed"])
            group["capturable"] = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        self._update(tensors, factors[0], factors[1] if late else 0.0, optimizer)
        self._step.add_(1)

    def validation_step(self, chunk: list[dict[str, Tensor]], _: int) -> None:
        """Terms at the target KL weight, so that epochs compare whatever the warm-up."""
        for tensors in chunk:
            if self.recorder is None:
                self._look(tensors)
            else:
                self.recorder.run("validation", self._look, tensors)
            self._counts["validation"] += len(tensors["x"])

    def _look(self, tensors: dict[str, Tensor]) -> None:
        batch = self.module.completed(Batch(**tensors))
        self._add("validation", self.module.loss(batch, kl_weight=self.schedule.kl_weight)[1], len(batch))

    def on_train_start(self) -> None:
        """Several processes draw different noise; a recorder finds the schedule on the device."""
        if self.trainer.world_size > 1:
            torch.manual_seed(torch.initial_seed() + len(self.rows) + 1_000_003 * (1 + self.trainer.global_rank))
        if self.recorder is not None:
            steps = (self.schedule.at(step) for step in range(self.schedule.total_steps))
            table = [(f["kl_weight"], f["late"], self.lr * f["lr"]) for f in steps]
            self._schedule = torch.tensor(table, device=self.device)
            self._step = torch.tensor([self.n_steps], device=self.device)

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation cells; the weights are those at the end of the epoch."""
        self._validation = self._means("validation")
        self.log_dict(self._validation, sync_dist=self.trainer.world_size > 1)

    def on_train_epoch_end(self) -> None:
        """Log the means over the training cells of this epoch, and keep the epoch's row."""
        last = max(0, self.n_steps - 1)
        rates = {"kl_weight": self.schedule.kl(last), "lr": self.lr * self.schedule.lr(last)}
        means = self._means("train") | rates
        self.log_dict(means, sync_dist=self.trainer.world_size > 1)
        self.rows.append(means | self._validation | self.watched)
        self._validation, self.watched = {}, {}

    def _add(self, part: str, report: dict[str, Tensor], n: int) -> None:
        sums = self._sums[part]
        for name, value in report.items():
            if name not in sums:
                sums[name] = torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32))
            sums[name].add_(value, alpha=n)

    def _means(self, part: str) -> dict[str, float]:
        values = torch.stack([*self._sums[part].values(), torch.tensor(float(self._counts[part]), device=self.device)])
        if self.trainer.world_size > 1:
            values = self.trainer.strategy.reduce(values, reduce_op="sum")
        totals = (values[:-1] / values[-1]).tolist()
        means = {f"{name}_{part}": mean for name, mean in zip(self._sums[part], totals, strict=True)}
        with torch.inference_mode():  # sums of a validation were made in it
            for total in self._sums[part].values():
                total.zero_()
        self._counts[part] = 0
        return means
