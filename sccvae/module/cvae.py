"""Conditional variational autoencoder (source text 4.3.1): one plate that forgets c, one that separates it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from sccvae.distributions import Likelihood, NormalMixture, Observation
from sccvae.module._base import Batch, LatentVariableModule, StandardNormal
from sccvae.module._batches import PER_FEATURE, PER_FEATURE_WITHIN, Alignment, aligned, likelihood_of, one_of
from sccvae.module._factorization import Factorization
from sccvae.module._input import InputDropout, encoder_input
from sccvae.nn import MLP, CellKinds, Conditions, GaussianEncoder, check_sizes


class Mixture(nn.Module):
    """p(z) = sum_k pi_k N(z; m_k, diag s_k^2): a learned mixture of normals.

    Parameters
    ----------
    n_components
        Number K of normals.
    n_latent
        Dimension d of z.
    """

    def __init__(self, n_components: int, n_latent: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.randn(n_components, n_latent))
        self.log_scale = nn.Parameter(torch.zeros(n_components, n_latent))
        self.logits = nn.Parameter(torch.zeros(n_components))

    def forward(self) -> NormalMixture:
        """The distribution of vectors (d,)."""
        return NormalMixture(self.loc, self.log_scale, self.logits)


class CVAE(LatentVariableModule):
    """Conditional VAE.

    ``prior="fixed"``: p(x|z,c) N(z; 0, I). The decoder knows c, so z need not hold it: z forgets the condition.
    ``prior="mixture"``: the same with p(z) = sum_k pi_k N(z; m_k, diag s_k^2), learned and shared by all conditions.
    Groups of cells need not be drawn to one centre.
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
        ``"mixture"``, ``"fixed"`` or ``"learned"``.
    n_components
        Number K of normals in the mixture.
    encode_condition
        q(z|x,c) if true, else q(z|x).
    alignment
        Weight, in nats, of the penalty on the distance between the batches in z (:func:`sccvae.nn.batch_discrepancy`);
        not with the learned prior. 0 for none: the loss is then the negative ELBO. None for 0.3 for each feature,
        300 from 1,000 on; 0.2 and 200 where the likelihood is not depth-free.
    likelihood
        p(x|z,c) or its name. None for the negative binomial: with an offset and a dispersion for each gene and batch if
        the decoder knows a batch, else with a dispersion for each gene.
    n_latent, n_hidden, n_layers, kl, n_samples, activation, norm, dropout, skip, input_dropout
        As for :class:`sccvae.module.VAE`.

    Attributes
    ----------
    kinds
        Kinds of cells that were found in the data (``sccvae.train.batch_effects``): the alignment compares batches kind
        by kind. None: by the normals of the mixture, or all cells.

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
        prior: Literal["mixture", "fixed", "learned"] = "mixture",
        n_components: int = 20,
        encode_condition: bool = True,
        alignment: float | None = None,
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
        input_dropout: float | None = None,
    ) -> None:
        super().__init__(kl, n_samples)
        if prior not in ("mixture", "fixed", "learned"):
            msg = (
                f"prior={prior!r} is not known; choose 'mixture' or 'fixed' (forget the condition) or 'learned' "
                "(separates it)."
            )
            raise ValueError(msg)
        check_sizes(n_components=n_components)
        self.conditions = Conditions(n_categories, n_continuous)
        if not self.conditions.width:
            msg = (
                "A CVAE needs at least one condition (batch, categorical or continuous); use a VAE without conditions."
            )
            raise ValueError(msg)
        self.encode_condition = encode_condition
        self.shared_prior = prior != "learned"
        self.factors = Factorization(
            p="p(x|z,c) p(z)" if self.shared_prior else "p(x|z) p(z|c) p(c)",
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
        self.decoder = MLP(n_latent, n_cond=n_cond if self.shared_prior else 0, **mlp)
        learned = GaussianEncoder(n_cond, n_latent, n_hidden=[n_hidden], norm=None) if prior == "learned" else None
        self.prior_net = learned
        self.mixture = Mixture(n_components, n_latent) if prior == "mixture" else None
        n_batch = self.conditions.n_categories[0] if n_categories and self.shared_prior else None
        self.likelihood = likelihood_of(likelihood, n_batch).build(self.decoder.n_out, n_features, n_batch)
        self.input_dropout = InputDropout.of(input_dropout, self.likelihood.support, n_features)
        per_feature = PER_FEATURE_WITHIN if self.likelihood.settings.get("depth_free", False) else PER_FEATURE
        self.alignment = Alignment(alignment, n_batch, n_features, per_feature)
        self.kinds: CellKinds | None = None

    def c(self, batch: Batch) -> Tensor:
        """The vector of conditions, (n, C)."""
        return self.conditions(batch.codes, batch.covariates)

    def inference(self, batch: Batch) -> dict[str, Normal]:
        """q(z|x,c) or q(z|x)."""
        x = self.input_dropout(encoder_input(self.likelihood, batch))
        return {"z": self.encoder(x, self.c(batch))}

    def prior(self, batch: Batch) -> dict[str, Distribution]:
        """The mixture, N(z; 0, I), or p(z|c) by a network."""
        if self.mixture is not None:
            return {"z": self.mixture()}
        return {"z": StandardNormal(batch.library) if self.shared_prior else self.prior_net(self.c(batch))}

    def generative(self, latents: dict[str, Tensor], batch: Batch) -> Observation:
        """p(x|z,c) if the prior is shared, p(x|z) with the learned one."""
        return self.likelihood(self.decoder(latents["z"], self.c(batch)), batch.library, batch.batch_index)

    def draw(self, q: dict[str, Normal]) -> dict[str, Tensor]:
        """Draws of z, (k, n, d); the first is kept for the penalty."""
        draws = super().draw(q)
        if self.training:
            z = draws["z"][0]
            self.alignment.note(z, None if self.mixture is None else self.mixture().responsibilities(z))
        return draws

    @torch.no_grad()
    def draw_like(self, z: Tensor, kinds: Tensor | None) -> Tensor:
        """Draws from normals of p(z), (n, d): for each cell of one that it may come from, by ``kinds`` (n, K)."""
        if self.mixture is None:
            return torch.randn_like(z)
        return self.mixture().sample_of(one_of(kinds))

    @property
    def has_late_penalty(self) -> bool:
        """Whether batches are aligned."""
        return bool(self.alignment.weight)

    def penalties(self, batch: Batch, late: float | Tensor) -> dict[str, Tensor]:
        """``alignment``: how far the batches lie apart in z, as far as this mini-batch tells."""
        return aligned(self, batch, late)
