"""Tiny models that several test files share, each trained once."""

from __future__ import annotations

from functools import cache

from _toys import toy_counts, toy_values

from sccvae.distributions import NegativeBinomial, Normal
from sccvae.model import AE, CVAE, IDEC, VAE

#: Smallest sensible network and training: what a test adds to show its point.
TINY = {"n_latent": 2, "n_hidden": 8}
FAST = {"max_epochs": 2, "batch_size": 16, "accelerator": "cpu", "progress_bar": False}


def make(cls, adata, train=True, setup=None, **options):
    """Set ``adata`` up (by default with its batch), make a tiny model and train it."""
    cls.setup_anndata(adata, **({"batch_key": "batch"} if setup is None else setup))
    model = cls(adata, **(TINY | options))
    if train:
        model.train(**FAST)
    return model


def toy_for(likelihood):
    """Data that the likelihood can describe."""
    return toy_values() if likelihood in ("normal", "bernoulli") else toy_counts()


LIKELIHOODS = ["normal", "bernoulli", "poisson", "nb", "zinb"]
CASES = {
    "ae": (AE, "normal", {}),
    "ae-linear": (AE, "normal", {"linear": True}),
    "ae-mask": (AE, "normal", {"noise": "mask"}),
    "idec": (IDEC, "normal", {"n_components": 3}),
}
CASES |= {f"vae-{name}": (VAE, name, {"likelihood": name}) for name in LIKELIHOODS}
CASES |= {f"cvae-{name}": (CVAE, name, {"likelihood": name}) for name in LIKELIHOODS}
CASES |= {
    "vae-input-dropout": (VAE, "nb", {"input_dropout": 0.3}),
    "vae-k": (VAE, "nb", {"kl": "monte_carlo", "n_samples": 3}),
    "vae-sigma": (VAE, "normal", {"likelihood": Normal(sigma="latent", min_sigma=0.05)}),
    "cvae-learned": (CVAE, "nb", {"prior": "learned"}),
    "cvae-q(z|x)": (CVAE, "nb", {"encode_condition": False}),
    "cvae-gene-batch": (CVAE, "nb", {"likelihood": NegativeBinomial(dispersion="gene-batch")}),
    "cvae-deep": (CVAE, "zinb", {"n_layers": 3, "skip": True, "norm": "layer", "dropout": 0.1, "activation": "elu"}),
}


@cache
def trained(name):
    """The model of a case, trained; tests must not change it."""
    cls, likelihood, options = CASES[name]
    return make(cls, toy_for(likelihood), **options)
