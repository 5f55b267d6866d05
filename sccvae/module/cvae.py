"""Conditional variational autoencoder (source text 4.3.1): one plate that forgets c, one that separates it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.distributions import Normal

from sccvae.distributions import Likelihood, Observation, as_likelihood
from sccvae.module._base import Batch, LatentVariableModule, standard_normal
from sccvae.module._factorization import Factorization
from sccvae.nn import MLP, Conditions, GaussianEncoder, batch_discrepancy

#: The default p(x|z,c) where the decoder knows the batch: each batch has its own offset and dispersion of a gene.
BATCHWISE = {"name": "nb", "dispersion": "gene-batch", "batch_offset": True}


class CVAE(LatentVariableModule):
    """Conditional VAE.

    ``prior="fixed"``: p(x|z,c) N(z; 0, I). The decoder knows c, so z need not hold it: z forgets the condition.
    ``prior="learned"``: p(x|z) p(z|c) p(c). The decoder knows z only, so z must hold c: one blob for each condition,
    placed by a network (equation 4.16). p(c) is constant and left out of the loss.

    Parameters
    ----------
    n_features
        Number G of features.
    n_categories
        Number of categories of each categorical condition, the batch first.
    n_continuous
        Number of continuous covariates in c.
    prior
        ``"fixed"`` or ``"learned"``.
    encode_condition
        q(z|x,c) if true, else q(z|x).
    alignment
        Weight, in nats, of the penalty on the distance between the batches in z (:func:`sccvae.nn.batch_discrepancy`);
        fixed prior only. 0 for none: the loss is then the negative ELBO.
    likelihood
        p(x|z,c) or its name. None for the negative binomial: with an offset and a dispersion for each gene and batch if
        the decoder knows a batch, else with a dispersion for each gene.
    n_latent, n_hidden, n_layers, kl, n_samples, activation, norm, dropout, skip
        As for :class:`sccvae.module.VAE`.

    Raises
    ------
    ValueError
        If there is no condition at all, ``prior`` is not known, or ``alignment`` is negative.
    """

    nets_of_c = ("prior_net",)

    def __init__(
        self,
        n_features: int,
        n_categories: Sequence[int],
        n_continuous: int = 0,
        *,
        prior: Literal["fixed", "learned"] = "fixed",
        encode_condition: bool = True,
        alignment: float = 100.0,
        likelihood: str | dict | Likelihood | None = None,
        n_latent: int = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        kl: Literal["analytic", "monte_carlo"] = "analytic",
        n_samples: int = 1,
        activation: str = "relu",
        norm: Literal["batch", "layer"] | None = "batch",
        dropout: float = 0.0,
        skip: bool = False,
    ) -> None:
        super().__init__(kl, n_samples)
        if prior not in ("fixed", "learned"):
            msg = f"prior={prior!r} is not known; choose 'fixed' (forgets the condition) or 'learned' (separates it)."
            raise ValueError(msg)
        if alignment < 0:
            msg = f"alignment={alignment} is the weight of a penalty: it must be 0 (none) or positive."
            raise ValueError(msg)
        self.conditions = Conditions(n_categories, n_continuous)
        if not self.conditions.width:
            msg = (
                "A CVAE needs at least one condition (batch, categorical or continuous); use a VAE without conditions."
            )
            raise ValueError(msg)
        self.encode_condition = encode_condition
        self.fixed_prior = prior == "fixed"
        self.factors = Factorization(
            p="p(x|z,c) p(z)" if self.fixed_prior else "p(x|z) p(z|c) p(c)",
            q="q(z|x,c)" if encode_condition else "q(z|x)",
        )
        mlp = {
            "activation": activation,
            "norm": norm,
            "dropout": dropout,
            "skip": skip,
            "n_hidden": [n_hidden] * n_layers,
        }
        n_cond = self.conditions.width
        self.encoder = GaussianEncoder(n_features, n_latent, n_cond=n_cond if encode_condition else 0, **mlp)
        self.decoder = MLP(n_latent, n_cond=n_cond if self.fixed_prior else 0, **mlp)
        self.prior_net = None if self.fixed_prior else GaussianEncoder(n_cond, n_latent, n_hidden=[n_hidden], norm=None)
        n_batch = self.conditions.n_categories[0] if n_categories and self.fixed_prior else None
        if likelihood is None:
            likelihood = "nb" if n_batch is None else BATCHWISE
        self.likelihood = as_likelihood(likelihood).build(self.decoder.n_out, n_features, n_batch)
        self.alignment = alignment if n_batch is not None else 0.0
        self._drawn: Tensor | None = None

    def c(self, batch: Batch) -> Tensor:
        """The vector of conditions, (n, C)."""
        return self.conditions(batch.codes, batch.covariates)

    def inference(self, batch: Batch) -> dict[str, Normal]:
        """q(z|x,c) or q(z|x)."""
        return {"z": self.encoder(self.likelihood.encoder_input(batch.x), self.c(batch))}

    def prior(self, batch: Batch) -> dict[str, Normal]:
        """N(z; 0, I), or p(z|c) by a network."""
        return {"z": standard_normal(batch.x) if self.fixed_prior else self.prior_net(self.c(batch))}

    def generative(self, latents: dict[str, Tensor], batch: Batch) -> Observation:
        """p(x|z,c) with the fixed prior, p(x|z) with the learned one."""
        return self.likelihood(self.decoder(latents["z"], self.c(batch)), batch.library, batch.batch_index)

    def draw(self, q: dict[str, Normal]) -> dict[str, Tensor]:
        """Draws of z, (k, n, d); the first is kept for the penalty."""
        draws = super().draw(q)
        self._drawn = draws["z"][0] if self.training and self.alignment else None
        return draws

    def penalties(self, batch: Batch) -> dict[str, Tensor]:
        """``alignment``: how far the batches lie apart in z, as far as this mini-batch tells."""
        z, self._drawn = self._drawn, None
        if z is None:
            return {}
        n_batch = self.conditions.n_categories[0]
        return {"alignment": self.alignment * batch_discrepancy(z, batch.batch_index, n_batch)}
