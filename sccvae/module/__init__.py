"""Generative models on bare tensors: one file is one plate diagram."""

from sccvae.module._base import Batch, GenerativeModule, LatentVariableModule
from sccvae.module._factorization import Factor, Factorization
from sccvae.module._input import InputDropout
from sccvae.module.ae import AE
from sccvae.module.cvae import CVAE
from sccvae.module.gmvae import GMVAE
from sccvae.module.idec import IDEC
from sccvae.module.vae import VAE

__all__ = [
    "AE",
    "CVAE",
    "GMVAE",
    "IDEC",
    "VAE",
    "Batch",
    "Factor",
    "Factorization",
    "GenerativeModule",
    "InputDropout",
    "LatentVariableModule",
]
