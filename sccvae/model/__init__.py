"""Models on AnnData: set up, train, read out."""

from sccvae.model._ae import AE
from sccvae.model._base import BaseModel
from sccvae.model._cvae import CVAE
from sccvae.model._gmvae import GMVAE
from sccvae.model._idec import IDEC
from sccvae.model._saving import load
from sccvae.model._vae import VAE

__all__ = ["AE", "CVAE", "GMVAE", "IDEC", "VAE", "BaseModel", "load"]
