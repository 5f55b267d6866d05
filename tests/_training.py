"""What the tests of training share: tiny modules and data, and callbacks that make trouble."""

from __future__ import annotations

import numpy as np
import torch
from lightning import Callback

from sccvae.data import Cells, CellStore
from sccvae.module import AE, VAE, Batch
from sccvae.train import fit

N, G = 40, 6
TRAIN, VALIDATION = np.arange(30), np.arange(30, N)


def a_store(n=N, unit=False):
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(1.0, 3.0, size=(n, G))).astype(np.float32)
    x = x / x.max() if unit else x
    empty = np.zeros((n, 0), np.float32)
    return CellStore(Cells(x, empty.astype(np.int64), empty, x.sum(1, keepdims=True) + 1))


def a_vae(**options):
    torch.manual_seed(7)
    return VAE(G, **({"n_latent": 2, "n_hidden": 4} | options))


def an_ae(**options):
    torch.manual_seed(7)
    return AE(G, n_latent=2, n_hidden=4, **options)


def train(module, train_rows=TRAIN, validation_rows=VALIDATION, store=None, **options):
    settings = {"max_epochs": 4, "batch_size": 8, "accelerator": "cpu", "progress_bar": False}
    return fit(module, store or a_store(), train_rows, validation_rows, **(settings | options))


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_history(a, b):
    return a.keys() == b.keys() and all(a[k].equals(b[k]) for k in a)


def square_error(module, rows=VALIDATION):
    with torch.no_grad():
        x = torch.from_numpy(a_store().cells.x[rows])
        return float(module.loss(Batch.of(x))[1]["elbo"])


class Raise(Callback):
    """Raise an error at a hook once it was called ``after`` times."""

    def __init__(self, error, hook="on_train_epoch_end", after=2):
        self.error, self.left = error, after
        setattr(self, hook, self._count)

    def _count(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.error


class Scramble(Callback):
    """Spoil the weights from an epoch on."""

    def __init__(self, first):
        self.first = first

    def on_train_epoch_start(self, trainer, pl_module):
        if len(pl_module.rows) >= self.first:
            with torch.no_grad():
                for p in pl_module.module.parameters():
                    p.add_(torch.randn(p.shape))
