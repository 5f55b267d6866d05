"""Normal and Bernoulli observations: log-normalised expression and pixels."""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from sccvae._rows import SparseRows, dense
from sccvae.distributions._base import Likelihood, Observation, register

#: Largest log standard deviation that a network gives: exp must not overflow.
MAX_LOG_SIGMA = 20.0


def log_normal(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log density of N(loc, scale), element-wise, in nats (source text, equation 4.12).

    Parameters
    ----------
    x, loc, scale
        Values, means and standard deviations, broadcastable to each other.

    Returns
    -------
    Log density or mass, of the broadcast shape.
    """
    return -0.5 * ((x - loc) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)


def log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """Log mass of Bernoulli(sigmoid(logits)), element-wise, in nats; x in [0, 1] gives minus the cross entropy.

    Parameters
    ----------
    x, logits
        Values in [0, 1] and log odds, broadcastable to each other.

    Returns
    -------
    Log density or mass, of the broadcast shape.
    """
    x, logits = torch.broadcast_tensors(x, logits)
    return -binary_cross_entropy_with_logits(logits, x, reduction="none")


class NormalObservation(Observation):
    """Independent normals with mean ``mean`` (..., n, G) and standard deviation ``scale``, broadcastable to it."""

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        self.mean = mean
        self.scale = scale

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of x (n, G) in nats, summed over features, (..., n)."""
        return log_normal(x, self.mean, self.scale).sum(-1)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Draw values, (..., n, G)."""
        return torch.normal(self.mean, self.scale.expand_as(self.mean))


class BernoulliObservation(Observation):
    """Independent Bernoulli values with log odds ``logits`` (..., n, G)."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    @property
    def mean(self) -> Tensor:
        """Probability of a one, (..., n, G)."""
        return torch.sigmoid(self.logits)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log mass of x (n, G) in nats, summed over features, (..., n)."""
        return log_bernoulli(x, self.logits).sum(-1)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Draw zeros and ones, (..., n, G)."""
        return torch.bernoulli(self.mean)


@register("normal")
class Normal(Likelihood):
    """Normal values; with a learned sigma the decoder is calibrated (sigma-VAE, source text 4.2.7).

    Parameters
    ----------
    sigma
        ``"gene"`` one learned standard deviation per feature; ``"shared"`` one for all; ``"latent"`` given by the
        network
        for each observation; ``"unit"`` fixed at 1 (square error); a number fixes it there.
    min_sigma
        Lower bound of a learned sigma, in units of x: without one the density can grow without limit (4.2.7).

    Raises
    ------
    ValueError
        If ``sigma`` is not known or a bound is not positive.

    References
    ----------
    Rybkin, Daniilidis, Levine 2021, Simple and effective VAE training with calibrated decoders, ICML.
    """

    support = "real"

    def __init__(
        self, sigma: Literal["gene", "shared", "latent", "unit"] | float = "gene", min_sigma: float = 0.01
    ) -> None:
        known = sigma in ("gene", "shared", "latent", "unit") if isinstance(sigma, str) else sigma > 0
        if not known or min_sigma <= 0:
            msg = (
                f"Normal(sigma={sigma!r}, min_sigma={min_sigma}): sigma must be 'gene', 'shared', 'latent', "
                "'unit' or a "
                "positive number, and min_sigma must be positive."
            )
            raise ValueError(msg)
        super().__init__(sigma=sigma, min_sigma=min_sigma)

    def build(self, n_in: int, n_features: int, n_batch: int | None = None) -> Self:
        """Create the heads; see :meth:`Likelihood.build`."""
        self.mean_head = nn.Linear(n_in, n_features)
        match self.settings["sigma"]:
            case "gene":
                self.log_sigma = nn.Parameter(torch.zeros(n_features))
            case "shared":
                self.log_sigma = nn.Parameter(torch.zeros(1))
            case "latent":
                self.sigma_head = nn.Linear(n_in, n_features)
            case fixed:
                self.register_buffer("fixed_sigma", torch.tensor(1.0 if fixed == "unit" else float(fixed)))
        return self

    def initialise(self, mean: Tensor) -> None:
        """Start every observation at the feature means (G,)."""
        with torch.no_grad():
            self.mean_head.bias.copy_(mean)

    def forward(self, h: Tensor, library: Tensor | None = None, batch_index: Tensor | None = None) -> NormalObservation:
        """Distribution of values; see :meth:`Likelihood.forward`."""
        return NormalObservation(self.mean_head(h), self.sigma(h))

    def sigma(self, h: Tensor | None = None) -> Tensor:
        """Standard deviation: (G,) or (1,), () if fixed, (..., n, G) from the decoder output ``h`` if ``"latent"``."""
        match self.settings["sigma"]:
            case "gene" | "shared":
                log_sigma = self.log_sigma
            case "latent":
                log_sigma = self.sigma_head(h).clamp(max=MAX_LOG_SIGMA)
            case _:
                return self.fixed_sigma
        return self.settings["min_sigma"] + log_sigma.exp()


@register("bernoulli")
class Bernoulli(Likelihood):
    """Bernoulli pixels. Values between 0 and 1 are taken as probabilities (minus the cross entropy).

    Parameters
    ----------
    resample
        Draw each pixel anew from its grey value in every training step (dynamic binarisation; Burda et al. 2016).
        In evaluation mode the data are taken as they are.
    """

    support = "unit"

    def __init__(self, resample: bool = False) -> None:
        super().__init__(resample=resample)

    def build(self, n_in: int, n_features: int, n_batch: int | None = None) -> Self:
        """Create the heads; see :meth:`Likelihood.build`."""
        self.logit_head = nn.Linear(n_in, n_features)
        return self

    def initialise(self, mean: Tensor) -> None:
        """Start every pixel at its mean (G,)."""
        with torch.no_grad():
            self.logit_head.bias.copy_(torch.logit(mean, eps=1e-3))

    def observe(self, x: Tensor | SparseRows) -> Tensor | SparseRows:
        """x, or zeros and ones drawn from it while training with ``resample``, (n, G)."""
        if not (self.training and self.settings["resample"]):
            return x
        return torch.bernoulli(dense(x))

    def forward(
        self, h: Tensor, library: Tensor | None = None, batch_index: Tensor | None = None
    ) -> BernoulliObservation:
        """Distribution of pixels; see :meth:`Likelihood.forward`."""
        return BernoulliObservation(self.logit_head(h))
