"""What a mixture does while it is trained, epoch by epoch."""

from __future__ import annotations

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from sccvae.data import CellStore
from sccvae.train.passes import over_cells

#: A component counts as in use from this share of the cells on.
IN_USE = 0.005


class MixtureMonitor(Callback):
    """Watches the mixture over the epochs, on a few training cells; the history of the training tells what it sees.

    For each epoch these are ``components_in_use`` (of at least 0.5 % of the cells), ``entropy`` of q(y|.) in nats,
    ``active_units`` of z (variance of the means above 0.01; Burda et al. 2016) and ``occupancy_<k>``, the share of
    cells.

    Parameters
    ----------
    store
        The cells.
    watched
        Which of them, (n,) int64.
    """

    def __init__(self, store: CellStore, watched: np.ndarray) -> None:
        self.store, self.watched = store, watched

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the cells."""
        module = pl_module.module
        q = torch.from_numpy(over_cells(module, self.store, self.watched, module.classify))
        z = torch.from_numpy(over_cells(module, self.store, self.watched, lambda b: module.inference(b)["z"].loc))
        module.train()
        share = torch.bincount(q.argmax(1), minlength=q.shape[1]) / len(q)
        row = {
            "components_in_use": float((share >= IN_USE).sum()),
            "entropy": float(torch.special.entr(q).sum(1).mean()),
            "active_units": float((z.var(0) > 0.01).sum()) if len(z) > 1 else 0.0,
        }
        pl_module.watched = row | {f"occupancy_{k}": float(s) for k, s in enumerate(share)}
