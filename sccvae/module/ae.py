"""Autoencoder: z = E(x), x = D(z) (source text 3.5)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sccvae.distributions import Normal, Observation
from sccvae.module._base import Batch, GenerativeModule
from sccvae.module._factorization import Factorization
from sccvae.nn import MLP, ConditionedLinear, as_corruption, check_sizes


class AE(GenerativeModule):
    """Autoencoder with square error ||x - D(E(x))||^2 (definition 3.8).

    With ``linear=True`` both maps are affine, and at the optimum the decoder spans the principal components of x
    (3.5.1). With ``noise`` the encoder sees a corrupted x while the target stays clean (denoising).

    Parameters
    ----------
    n_features
        Number G of features.
    n_latent
        Dimension of z.
    n_hidden, n_layers
        Width and number of hidden layers on either side.
    linear
        No hidden layers and no activation.
    noise, noise_level
        ``"gaussian"`` (standard deviation) or ``"mask"`` (probability); None for none.
    activation, norm, dropout, skip
        As for :class:`sccvae.nn.MLP`.
    """

    factors = Factorization(p="p(x|z)", q="delta(z|x)")

    def __init__(
        self,
        n_features: int,
        *,
        n_latent: int = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        linear: bool = False,
        noise: Literal["gaussian", "mask"] | None = None,
        noise_level: float = 0.1,
        activation: str = "relu",
        norm: Literal["batch", "layer"] | None = "batch",
        dropout: float = 0.0,
        skip: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(n_latent=n_latent)
        mlp = {
            "n_hidden": [] if linear else [n_hidden] * n_layers,
            "activation": activation,
            "norm": norm,
            "dropout": dropout,
            "skip": skip,
        }
        self.corruption = as_corruption(noise, noise_level)
        self.encoder = MLP(n_features, **mlp)
        self.latent = ConditionedLinear(self.encoder.n_out, n_latent)
        self.decoder = MLP(n_latent, **mlp)
        self.likelihood = Normal(sigma="unit").build(self.decoder.n_out, n_features)

    def inference(self, batch: Batch) -> dict[str, Tensor]:
        """Give z = E(x), (n, d)."""
        return {"z": self.latent(self.encoder(self.corruption(batch.dense)))}

    def generative(self, latents: dict[str, Tensor], batch: Batch) -> Observation:
        """D(z), (..., n, G), as the mean of a unit normal."""
        return self.likelihood(self.decoder(latents["z"]))

    def elbo_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Square error of each observation, (n,)."""
        p_x = self.generative(self.inference(batch), batch)
        error = (batch.dense - p_x.mean).square()
        return {"reconstruction": (error if batch.present is None else error[:, batch.present[0]]).sum(-1)}
