"""A training on disk: one safetensors file with weights, optimiser, random state and history; nothing pickled."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sccvae.train.callbacks import BestWeights, out_of_time
from sccvae.train.plan import TrainingPlan

FILE_NAME = "training.safetensors"
FORMAT = 3


class ResumableTraining(Checkpoint):
    """Writes the state of the training after every epoch, and gives it back to a later run.

    It is a Lightning ``Checkpoint`` only so that it runs after the plan has closed its epoch.

    Parameters
    ----------
    folder
        Where the file lies; made if missing.
    settings
        What must be the same for a training to go on, as JSON values; other types by their text.
    best
        The keeper of the best weights, or None.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], best: BestWeights | None) -> None:
        self.path = Path(folder) / FILE_NAME
        self.settings, self.best = json.loads(json.dumps(settings, default=_plain)), best

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the finished epoch; of several processes the first does."""
        if trainer.is_global_zero:
            self.write(pl_module, finished=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the training has ended by itself; one that ran out of time (``max_time=``) goes on later."""
        finished = len(pl_module.rows) >= self.settings["max_epochs"] or not out_of_time(trainer)
        if trainer.is_global_zero:
            self.write(pl_module, finished=finished)

    def write(self, plan: TrainingPlan, *, finished: bool) -> None:
        """Write everything to a temporary file, then put it in the place of the last one."""
        optimizer_state = plan.optimizers(use_pl_optimizer=False).state_dict()["state"]
        tensors = {f"weights/{k}": v for k, v in plan.module.state_dict().items()}
        tensors |= {f"optimizer/{i}/{k}": v for i, state in optimizer_state.items() for k, v in state.items()}
        tensors["rng"] = torch.random.get_rng_state()
        if plan.device.type == "cuda":
            tensors["rng_cuda"] = torch.cuda.get_rng_state(plan.device)
        header = {
            "format": FORMAT,
            "settings": self.settings,
            "n_steps": plan.n_steps,
            "rows": plan.rows,
            "finished": finished,
        }
        if self.best is not None:
            header |= {"best": self.best.best, "best_epoch": self.best.epoch}
            tensors |= {f"best/{k}": v for k, v in (self.best.weights or {}).items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        # clone: safetensors refuses tensors that share memory
        save_file(
            {k: v.detach().cpu().clone() for k, v in tensors.items()},
            temporary,
            {"sccvae": json.dumps(header, default=_plain)},
        )
        os.replace(temporary, self.path)

    def resume(self, plan: TrainingPlan) -> bool:
        """Bring ``plan`` and the best weights to the state on disk, if there is one; return whether it had finished.

        Raises
        ------
        ValueError
            If the file is of a training with other settings, of a newer format, or damaged.
        """
        if not self.path.exists():
            return False
        try:
            opened = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            msg = f"{self.path} is damaged ({error}); delete it, or choose another checkpoint_dir, to start anew."
            raise ValueError(msg) from error
        with opened as file:
            header = json.loads((file.metadata() or {}).get("sccvae", "{}"))
            if header.get("format") != FORMAT:
                msg = (
                    f"{self.path} has training format {header.get('format')}; this sccvae reads format {FORMAT}. "
                    "Delete it, or choose another checkpoint_dir, to start anew."
                )
                raise ValueError(msg)
            other = {k: (v, self.settings.get(k)) for k, v in header["settings"].items() if v != self.settings.get(k)}
            if other:
                msg = (
                    f"{self.path} holds a training with other settings {other} (there, here); train with the same "
                    "settings to go on, or choose another checkpoint_dir to start anew."
                )
                raise ValueError(msg)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        part = {"weights": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            room, _, key = name.partition("/")
            if room == "optimizer":
                i, _, key = key.partition("/")
                part[room].setdefault(int(i), {})[key] = tensor
            elif room in part:
                part[room][key] = tensor
        plan.module.load_state_dict(part["weights"])
        plan.optimizer_state = part["optimizer"]
        plan.n_steps, plan.rows = header["n_steps"], header["rows"]
        torch.random.set_rng_state(tensors["rng"])
        if "rng_cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([tensors["rng_cuda"]] * torch.cuda.device_count())  # whichever will train
        if self.best is not None:
            self.best.best, self.best.epoch = header["best"], header["best_epoch"]
            self.best.weights = part["best"] or None
        return header["finished"]


def digest(*values: np.ndarray | None) -> str | None:
    """A short name of these arrays, by which a checkpoint tells them from others; None if one is None.

    Parameters
    ----------
    *values
        Of any shape.

    Returns
    -------
    Twelve hexadecimal digits.
    """
    if any(value is None for value in values):
        return None
    return hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest()[:12]


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
