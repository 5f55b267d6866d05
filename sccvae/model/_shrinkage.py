"""Many noisy estimates at once: what is likely behind each, and how many of a list are false."""

from __future__ import annotations

import numpy as np

#: Ratio of neighbouring standard deviations in the grid of the prior.
STEP = np.sqrt(2)
#: Weight of the point at zero in the Dirichlet penalty of the prior's weights, as in Stephens' ashr.
AT_ZERO = 10.0


def posterior_draws(
    estimate: np.ndarray, error: np.ndarray, n_draws: int, rng: np.random.Generator, centre: np.ndarray | float = 0.0
) -> np.ndarray:
    r"""Draw the true effects behind noisy estimates: adaptive shrinkage (ash).

    The effects b are taken to come from a mixture of a point at ``centre`` and of normals around it, and
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
    centre
        What the effects are shrunk to, (G,) or one for all.

    Returns
    -------
    Draws from the posterior of each effect, (n_draws, G) float32; exactly ``centre`` where they come from the point.

    References
    ----------
    Stephens 2017, False discovery rates: a new deal, Biostatistics 18:275-294.
    """
    beyond = estimate - centre
    sd, share, _ = _fit(beyond, error, 1e-6)
    shrink = sd**2 / (error[:, None] ** 2 + sd**2)
    ends = (share / share.sum(1, keepdims=True)).cumsum(1).T.copy()  # genes side by side: a third of the time
    draws = np.empty((n_draws, len(estimate)), np.float32)
    genes = np.arange(len(estimate))
    for draw in draws:
        component = np.minimum((rng.random(len(genes)) > ends).sum(0, dtype=np.int16), len(sd) - 1)
        factor = shrink[genes, component]
        draw[:] = centre + factor * beyond + np.sqrt(factor) * error * rng.standard_normal(len(genes))
    return draws


def common_shift(estimate: np.ndarray, error: np.ndarray, share: np.ndarray | float = 1.0) -> float:
    """The change that most genes have in common: the mode of the estimates, and 0.0 where that explains them as well.

    Each estimate counts as a normal as wide as its error, so the sure ones tell most. Their mode, unlike the best
    ``centre`` of a symmetric prior, stays with the unchanged genes where many others all rise. It must explain the
    estimates better than 0 does: in the log-likelihood by twice the log of their number, four times what the BIC asks
    for a number, as it was picked from many. Of 20 genes that all change at random it is taken in one case of ten or
    fewer.

    Parameters
    ----------
    estimate
        Estimates, (G,).
    error
        Their standard errors, (G,), positive.
    share
        Part of the common change that each gene shows, (G,) or one for all.

    Returns
    -------
    The change of a gene that shows all of it.
    """
    at, width = estimate / share, error / share
    width = np.hypot(width, np.median(width) / 2)
    grid = np.linspace(*np.percentile(at, (5, 95)), 200)
    density = [(np.exp(-0.5 * ((at - x) / width) ** 2) / width).sum() for x in grid]
    shift = grid[np.argmax(density)]
    gain = _fit(estimate - shift * share, error, 1e-4)[2] - _fit(estimate, error, 1e-4)[2]
    return float(shift) if gain > 2 * np.log(len(estimate)) else 0.0


def _fit(estimate: np.ndarray, error: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray, float]:
    """The prior around zero.

    Its standard deviations; weight of each times likelihood of each gene, up to a factor for each gene, (G,
    n_components); and the log-likelihood.
    """
    smallest = error.min() / 10
    largest = max(2 * np.sqrt(max((estimate**2 - error**2).max(), 0.0)), 8 * smallest)
    sd = np.append(0.0, smallest * STEP ** np.arange(np.ceil(np.log(largest / smallest) / np.log(STEP)) + 1))
    variance = error[:, None] ** 2 + sd**2  # (G, n_components)
    log_likelihood = -0.5 * (np.log(variance) + estimate[:, None] ** 2 / variance)
    highest = log_likelihood.max(1, keepdims=True)
    likelihood = np.exp(log_likelihood - highest)
    weight, extra = np.full(len(sd), 1 / len(sd)), np.zeros(len(sd))
    extra[0] = AT_ZERO - 1
    for _ in range(2000):
        new = weight * ((1 / (likelihood @ weight)) @ likelihood) + extra  # the sums of each gene's shares
        new /= new.sum()
        moved, weight = np.abs(new - weight).max(), new
        if moved < tolerance:
            break
    return sd, weight * likelihood, (highest[:, 0] + np.log(likelihood @ weight)).sum()


def expected_fdr(proba: np.ndarray) -> np.ndarray:
    """Posterior expected false discovery rate of the list that ends with each gene, (G,).

    The list of a gene holds it and all genes before it, by falling ``proba`` (G,); its expected rate is the mean of
    ``1 - proba`` over the list (Boyeau et al. 2019).
    """
    order = np.argsort(-proba, kind="stable")
    rate = np.empty(len(proba))
    rate[order] = np.cumsum(1 - proba[order]) / np.arange(1, len(proba) + 1)
    return rate
