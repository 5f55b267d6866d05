"""What is known of the classes of a reference: where each lies in z, which genes speak for it, and how sure that is."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.sparse import csr_matrix
from scipy.special import log_softmax, logsumexp

#: Weight of the pooled covariance in that of a class, in cells: few cells of a class say little about its shape.
SHRINKAGE = 20
#: Weight of the training cells against the penalty of the logistic regression, for a mean squared length of one. The
#: scale of the genes does not matter then; a quarter and four times it give the same accuracy to one in a hundred.
STRENGTH = 16.0
#: Largest gradient at which its fit stops, for the same length: the loss is within 0.1 % of the least then.
TOLERANCE = 1e-4
#: Principal axes of the genes.
N_COMPONENTS = 30
#: Log-probability of what is impossible: it can still be divided by a temperature.
SMALLEST_LOG = -1e6
#: Share of a query's cells that is thought to be of known types: what even they differ by is the technology's.
LEAST_STRANGE = 0.25
#: Bins of the calibration error.
BINS = 15


def normals(z: np.ndarray, codes: np.ndarray, n_classes: int) -> dict[str, Any]:
    """Share, mean and covariance of each class in z, as lists; a covariance is shrunk to that of all classes."""
    d = z.shape[1]
    mean = np.zeros((n_classes, d))
    counts = np.bincount(codes, minlength=n_classes)
    np.add.at(mean, codes, z)
    mean /= np.maximum(counts, 1)[:, None]
    rest = z - mean[codes]
    pooled = rest.T @ rest / len(z)
    pooled += 1e-6 * max(np.trace(pooled) / d, 1e-12) * np.eye(d)
    covariance = np.empty((n_classes, d, d))
    for k in range(n_classes):
        own = rest[codes == k]
        covariance[k] = (own.T @ own + SHRINKAGE * pooled) / (len(own) + SHRINKAGE)
    return {"shares": (counts / counts.sum()).tolist(), "means": mean.tolist(), "covariances": covariance.tolist()}


def by_normals(z: np.ndarray, known: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """-log sum_k share_k N(z; mean_k, covariance_k) in nats, (n,), and log-probability of each class, (n, K).

    A class without a cell has no part in either.
    """
    shares, means, covariances = (np.asarray(known[name]) for name in ("shares", "means", "covariances"))
    joint = np.full((len(z), len(shares)), -np.inf)
    for k in np.flatnonzero(shares > 0):
        root = np.linalg.cholesky(covariances[k])
        distance = np.square(np.linalg.solve(root, (z - means[k]).T)).sum(0)
        log_volume = np.log(np.diagonal(root)).sum() + z.shape[1] / 2 * np.log(2 * np.pi)
        joint[:, k] = np.log(shares[k]) - log_volume - distance / 2
    total = logsumexp(joint, axis=1)
    return -total, np.maximum(joint - total[:, None], SMALLEST_LOG)


def logistic(x: csr_matrix, codes: np.ndarray, n_classes: int) -> dict[str, Any] | None:
    """Weights (K, G) and intercepts (K,) of a logistic regression on genes, as lists; None for a single class."""
    from sklearn.linear_model import LogisticRegression

    present = np.unique(codes)
    if len(present) < 2:
        return None
    length = float(np.linalg.norm(x.data.astype(np.float64)) / np.sqrt(len(codes))) or 1.0
    fit = LogisticRegression(C=STRENGTH, tol=TOLERANCE, max_iter=1000).fit(x / length, codes)
    weights, intercepts = np.zeros((n_classes, x.shape[1])), np.full(n_classes, SMALLEST_LOG)
    two = len(present) == 2  # one row then, for the second against the first
    weights[present] = (np.vstack([-fit.coef_, fit.coef_]) / 2 if two else fit.coef_) / length
    intercepts[present] = np.hstack([-fit.intercept_, fit.intercept_]) / 2 if two else fit.intercept_
    largest = np.abs(weights).max() or 1.0
    weights = weights.round(6 - int(np.floor(np.log10(largest))))  # seven digits of the largest: less to save
    return {"weights": weights.tolist(), "intercepts": intercepts.tolist()}


def principal_axes(x: csr_matrix) -> np.ndarray:
    """Principal axes of the genes of cells x (n, G), about the origin: (c, G) float32."""
    from sklearn.decomposition import TruncatedSVD

    n = max(1, min(N_COMPONENTS, min(x.shape) - 1))
    return TruncatedSVD(n, random_state=0).fit(x).components_.astype(np.float32)


def against_classes(
    views: dict[str, np.ndarray], known: dict[str, Any], *, together: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Outlier score of each cell, (n,), and log-probability of each class, (n, K), before the last temperature.

    Parameters
    ----------
    views
        ``z``, (n, d); ``genes``, the scores of the classes by logistic regression, (n, K), and ``q``, log q(y|.),
        (n, K), where there is one; of cells with what was not measured drawn, ``drawn``, the scores again, and
        ``place``, (n, c), and ``beyond``, (n,), of the genes on their principal axes.
    known
        What :func:`normals` gives, with ``temperatures`` of those views that decide, ``scores``, centre and spread of
        what :func:`strangeness` finds, and ``places``, the normals of the classes on the principal axes.
    together
        The cells are of one query: what most of them have on the genes' side is taken to be its technology's.

    Returns
    -------
    The sum of what is strange about a cell, in units of the spread, and the product of the views' probabilities, each
    at its temperature.
    """
    density, by_z = by_normals(views["z"], known)
    logs = {"z": by_z} | {name: views[name] for name in ("q", "genes") if name in views}
    # A reference of an earlier version has no temperatures: q alone decides, or the normals.
    temperatures = known.get("temperatures") or {"q" if "q" in logs else "z": 1.0}
    logs = {name: log_softmax(logs[name] / t, axis=1) for name, t in temperatures.items()}
    found = strangeness(density, views, by_z, known)
    scores = known.get("scores") or {"density": (0.0, 1.0)}
    if together:
        for name, quartile in known.get("quartiles", {}).items():
            found[name] = found[name] - max(0.0, np.quantile(found[name], LEAST_STRANGE) - quartile)
    return sum((found[name] - centre) / spread for name, (centre, spread) in scores.items()), sum(logs.values())


def strangeness(
    density: np.ndarray, views: dict[str, np.ndarray], by_z: np.ndarray, known: dict[str, Any]
) -> dict[str, np.ndarray]:
    """What is strange about a cell, each (n,).

    ``density`` in z; ``energy``: no class speaks for its genes (Liu et al. 2020, equation 4); ``disagreement``: -log of
    the probability that z and genes, each for itself, name the same class (``by_z``: log-probabilities (n, K) by z);
    ``place``: -log density of its genes on the reference's principal axes; ``beyond``: the squared length of what these
    axes leave of them.
    """
    found = {"density": density}
    if "drawn" in views:
        by_both = (
            log_softmax(log_q / known["temperatures"][name], axis=1)
            for name, log_q in (("z", by_z), ("genes", views["drawn"]))
        )
        found["energy"] = -logsumexp(views["drawn"], axis=1)
        found["disagreement"] = -logsumexp(sum(by_both), axis=1)
    if "places" in known:
        found |= {"place": by_normals(views["place"], known["places"])[0], "beyond": views["beyond"]}
    return found


def temperature_of(log_q: np.ndarray, codes: np.ndarray) -> float:
    """The temperature at which log-probabilities (n, K) have the smallest cross entropy with the true classes (n,).

    Under a standard normal prior of its logarithm: of a few cells, all of them right, none could be cold enough.
    """
    rows = np.arange(len(codes))

    def misfit(log_temperature: float) -> float:
        cross_entropy = -log_softmax(log_q / np.exp(log_temperature), axis=1)[rows, codes].sum()
        return cross_entropy + log_temperature**2 / 2

    return float(np.exp(minimize_scalar(misfit, bounds=(-3, 3), method="bounded").x))


def calibrate(log_q: np.ndarray, codes: np.ndarray) -> dict[str, Any]:
    """Temperature with the smallest cross entropy, and accuracy and calibration error before and after it."""
    temperature = temperature_of(log_q, codes)
    q = np.exp(log_softmax(log_q / temperature, axis=1))
    return {
        "temperature": temperature,
        "n_held_out": len(codes),
        "accuracy": float((q.argmax(1) == codes).mean()),
        "expected_calibration_error_before": calibration_error(np.exp(log_softmax(log_q, axis=1)), codes),
        "expected_calibration_error": calibration_error(q, codes),
    }


def calibration_error(q: np.ndarray, codes: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: mean gap between probability and accuracy over equal bins (Guo et al. 2017, eq. 3).

    Parameters
    ----------
    q
        Probabilities of the classes, (n, K).
    codes
        True classes, (n,) int64.
    bins
        Number of bins of the largest probability, of equal width.

    Returns
    -------
    From 0 to 1.
    """
    probability, right = q.max(1), q.argmax(1) == codes
    at = np.minimum((probability * bins).astype(int), bins - 1)
    gaps = np.bincount(at, weights=right - probability, minlength=bins)
    return float(np.abs(gaps).sum() / len(codes))
