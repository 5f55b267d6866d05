"""Likelihoods and closed-form divergences, on torch alone."""

from sccvae.distributions._base import LIKELIHOODS, Likelihood, Observation, as_likelihood, register
from sccvae.distributions.continuous import Bernoulli, Normal, log_bernoulli, log_normal
from sccvae.distributions.counts import ZINB, NegativeBinomial, Poisson
from sccvae.distributions.kl import (
    expected_log_probability,
    kl_categorical,
    kl_dirichlet,
    kl_normal,
    kl_standard_normal,
)
from sccvae.distributions.masses import log_nb, log_poisson, log_zinb
from sccvae.distributions.mixture import NormalMixture

__all__ = [
    "LIKELIHOODS",
    "ZINB",
    "Bernoulli",
    "Likelihood",
    "NegativeBinomial",
    "Normal",
    "NormalMixture",
    "Observation",
    "Poisson",
    "as_likelihood",
    "expected_log_probability",
    "kl_categorical",
    "kl_dirichlet",
    "kl_normal",
    "kl_standard_normal",
    "log_bernoulli",
    "log_nb",
    "log_normal",
    "log_poisson",
    "log_zinb",
    "register",
]
