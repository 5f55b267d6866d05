"""Variational autoencoder: p(x|z) N(z; 0, I), q(z|x) (source text 4.2)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.distributions import Normal

from sccvae.distributions import Likelihood, Observation, as_likelihood
from sccvae.module._base import Batch, LatentVariableModule, StandardNormal
from sccvae.module._factorization import Factorization
from sccvae.module._input import InputDropout, encoder_input
from sccvae.nn import MLP, GaussianEncoder


class VAE(LatentVariableModule):
    """Variational autoencoder (definition 4.3); with ``likelihood=Normal("shared" or "gene")`` a sigma-VAE (4.2.7).

    Parameters
    ----------
    n_features
        Number G of features.
    likelihood
        p(x|z): a likelihood, or its name.
    n_latent
        Dimension d of z.
    n_hidden, n_layers
        Width and number of hidden layers on either side.
    kl
        ``"analytic"`` (equation 4.13) or ``"monte_carlo"`` (equation 4.10).
    n_samples
        Number k of draws of z for each observation.
    activation, norm, dropout, skip
        As for :class:`sccvae.nn.MLP`.
    input_dropout
        Probability of dropping an input of the encoder while training: it learns less of the noise of few cells by
        heart, and z holds less of it. None for 0.6 for counts of at least 700 genes, 0.5 of at
        least 300, else 0.
    """

    factors = Factorization(p="p(x|z) p(z)", q="q(z|x)")

    def __init__(
        self,
        n_features: int,
        *,
        likelihood: str | Likelihood = "nb",
        n_latent: int = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        kl: Literal["analytic", "monte_carlo"] = "analytic",
        n_samples: int = 1,
        activation: str = "relu",
        norm: Literal["batch", "layer"] | None = "batch",
        dropout: float = 0.0,
        skip: bool = False,
        input_dropout: float | None = None,
    ) -> None:
        super().__init__(kl, n_samples)
        mlp = {
            "activation": activation,
            "norm": norm,
            "dropout": dropout,
            "skip": skip,
            "n_hidden": [n_hidden] * n_layers,
        }
        self.encoder = GaussianEncoder(n_features, n_latent, **mlp)
        self.decoder = MLP(n_latent, **mlp)
        self.likelihood = as_likelihood(likelihood).build(self.decoder.n_out, n_features)
        self.input_dropout = InputDropout.of(input_dropout, self.likelihood.support, n_features)

    def inference(self, batch: Batch) -> dict[str, Normal]:
        """q(z|x)."""
        return {"z": self.encoder(self.input_dropout(encoder_input(self.likelihood, batch)))}

    def prior(self, batch: Batch) -> dict[str, Normal]:
        """p(z) = N(0, I)."""
        return {"z": StandardNormal(batch.library)}

    def generative(self, latents: dict[str, Tensor], batch: Batch) -> Observation:
        """p(x|z)."""
        return self.likelihood(self.decoder(latents["z"]), batch.library)
