"""Many noisy estimates at once: what is likely behind each, and how many of a list are false."""

from __future__ import annotations

import numpy as np

#: Ratio of neighbouring standard deviations in the grid of the prior.
STEP = np.sqrt(2)
#: Weight of the point at zero in the Dirichlet penalty of the prior's weights, as in Stephens' ashr.
AT_ZERO = 10.0


def posterior_draws(estimate: np.ndarray, error: np.ndarray, n_draws: int, rng: np.random.Generator) -> np.ndarray:
    r"""Draw the true effects behind noisy estimates: adaptive shrinkage (ash).

    The effects b are taken to come from a mixture of a point at zero and of normals around zero, and
    :math:`\hat b_g \sim N(b_g, s_g^2)`. The weights are fitted to all estimates by EM, on a grid of standard deviations
    that are a factor of :math:`\sqrt 2` apart (equations 4 and 5, penalty of its supplement).

    Parameters
    ----------
    estimate
        Estimates, (G,).
    error
        Their standard errors, (G,), positive.
    n_draws
        Number of draws.
    rng
        Source of chance.

    Returns
    -------
    Draws from the posterior of each effect, (n_draws, G) float32; exact zeros come from the point at zero.

    References
    ----------
    Stephens 2017, False discovery rates: a new deal, Biostatistics 18:275-294.
    """
    smallest = error.min() / 10
    largest = max(2 * np.sqrt(max((estimate**2 - error**2).max(), 0.0)), 8 * smallest)
    sd = np.append(0.0, smallest * STEP ** np.arange(np.ceil(np.log(largest / smallest) / np.log(STEP)) + 1))
    variance = error[:, None] ** 2 + sd**2  # (G, n_components)
    log_likelihood = -0.5 * (np.log(variance) + estimate[:, None] ** 2 / variance)
    likelihood = np.exp(log_likelihood - log_likelihood.max(1, keepdims=True))
    weight, extra = np.full(len(sd), 1 / len(sd)), np.zeros(len(sd))
    extra[0] = AT_ZERO - 1
    for _ in range(2000):
        new = weight * ((1 / (likelihood @ weight)) @ likelihood) + extra  # the sums of each gene's shares
        new /= new.sum()
        moved, weight = np.abs(new - weight).max(), new
        if moved < 1e-6:
            break
    shrink = sd**2 / variance
    share = weight * likelihood  # (G, n_components)
    ends = (share / share.sum(1, keepdims=True)).cumsum(1).T.copy()  # genes side by side: a third of the time
    draws = np.empty((n_draws, len(estimate)), np.float32)
    genes = np.arange(len(estimate))
    for draw in draws:
        component = np.minimum((rng.random(len(genes)) > ends).sum(0, dtype=np.int16), len(sd) - 1)
        factor = shrink[genes, component]
        draw[:] = factor * estimate + np.sqrt(factor) * error * rng.standard_normal(len(genes))
    return draws


def expected_fdr(proba: np.ndarray) -> np.ndarray:
    """Posterior expected false discovery rate of the list that ends with each gene, (G,).

    The list of a gene holds it and all genes before it, by falling ``proba`` (G,); its expected rate is the mean of
    ``1 - proba`` over the list (Boyeau et al. 2019).
    """
    order = np.argsort(-proba, kind="stable")
    rate = np.empty(len(proba))
    rate[order] = np.cumsum(1 - proba[order]) / np.arange(1, len(proba) + 1)
    return rate
