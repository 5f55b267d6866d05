"""Run by test_processes.py: trains with several processes, and says what each of them saw and ended with.

python _two_processes.py FOLDER STRATEGY DEVICES BATCH_SIZE MODEL...
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning import Callback

from sccvae.data import Cells, CellStore
from sccvae.module import GMVAE, IDEC, VAE
from sccvae.train import fit, fit_deep_clustering, fit_mixture

N_TRAIN, N_VALIDATION, G = 301, 100, 20


class Seen(Callback):
    """Cells of each epoch, by their covariate, which is their number."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.epochs = folder, []

    def on_train_epoch_start(self, *_) -> None:
        self.epochs.append([])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.epochs[-1] += [int(n) for tensors in batch for n in tensors["covariates"][:, 0]]

    def on_train_end(self, trainer, pl_module) -> None:
        (self.folder / f"seen{trainer.global_rank}.json").write_text(json.dumps(self.epochs))


def main(folder: Path, strategy: str, devices: int, batch_size: int, models: list[str]) -> None:
    """Train each model."""
    warnings.simplefilter("error")
    # those that pyproject.toml lists
    warnings.filterwarnings("ignore", r".*treespec, LeafSpec", FutureWarning)
    rng = np.random.default_rng(0)
    n = N_TRAIN + N_VALIDATION
    types = rng.integers(3, size=n)
    x = rng.poisson(rng.gamma(2, 2, (3, G))[types]).astype(np.float32)
    cells = Cells(x, np.zeros((n, 0), np.int64), np.arange(n, dtype=np.float32)[:, None], x.sum(1, keepdims=True))
    rows = np.arange(N_TRAIN), np.arange(N_TRAIN, n)
    for name in models:
        torch.manual_seed(0)
        options = {"max_epochs": 20, "batch_size": batch_size, "progress_bar": False, "callbacks": [Seen(folder)]}
        options |= {"accelerator": "cpu", "devices": devices, "strategy": strategy, "lr": 3e-3}
        size = {"n_latent": 3, "n_hidden": 16}
        if name == "VAE":
            module = VAE(G, **size)
            history = fit(module, CellStore(cells), *rows, **options).history
        elif name == "IDEC":
            module = IDEC(G, 3, **size)
            history = fit_deep_clustering(module, CellStore(cells), *rows, **options).history
        else:
            module = GMVAE(G, 3, **size)
            history = fit_mixture(module, CellStore(cells), *rows, **options).history
        state = {k: v.double().sum().item() for k, v in module.state_dict().items()}
        end = {"losses": history["elbo_validation"]["elbo_validation"].tolist(), "state": state}
        (folder / f"{name}{os.environ.get('LOCAL_RANK', 0)}.json").write_text(json.dumps(end))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
