"""Labels of a reference for other cells, with a calibrated probability, and "unknown" for what the reference lacks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp

from sccvae.model._base import evaluating

logger = logging.getLogger(__name__)

#: Name of what the reference does not hold.
UNKNOWN = "unknown"
#: Weight of the pooled covariance in that of a class, in cells: few cells of a class say little about its shape.
SHRINKAGE = 20
#: Log-probability of what is impossible: it can still be divided by a temperature.
SMALLEST_LOG = -1e6
#: Bins of the calibration error, and quantiles kept of the held-out outlier scores.
BINS, QUANTILES = 15, 1001


class TransferMixin:
    """Label transfer: what the training notes of its labelled cells is enough, their data are not needed."""

    def transfer_labels(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        unknown_threshold: float | None = 0.99,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Label of each cell by the labelled cells that the reference was trained on.

        A GMVAE decides by q(y|z,x), other models by a normal for each class in z. Either is sharpened or flattened by
        one temperature, so that held-out reference cells labelled with probability 0.8 are right 8 times of 10.

        Parameters
        ----------
        adata
            Cells with the model's genes, in any order; None for the model's own, such as those of the query.
        indices
            Rows (or a mask) of the cells; None for all.
        unknown_threshold
            A cell is called ``"unknown"`` if its outlier score is larger than those of this share of the held-out
            reference cells: the default leaves 1 % of cells like them unknown. None gives every cell a label. Raise it
            where a query's technology differs a lot from the reference's, lower it to find rarer intruders.
        batch_size
            Cells at a time.

        Returns
        -------
        A data frame, indexed by cell: ``label`` (categorical, with ``"unknown"``), ``best_label`` (without),
        ``probability`` (calibrated, of ``best_label``), ``uncertainty`` (1 - probability) and ``outlier_score``
        (-log-density of z under normals for all classes, in nats; unknown above :meth:`unknown_score`).

        Raises
        ------
        ValueError
            If the reference has no labels, or the threshold is not between 0 and 1.

        References
        ----------
        Guo, Pleiss, Sun, Weinberger 2017, On calibration of modern neural networks, ICML (temperature scaling).
        """
        known = self._transfer()
        bound = np.inf if unknown_threshold is None else self.unknown_score(unknown_threshold)
        z, log_q = self._look(adata, indices, batch_size)
        names = known["classes"]
        score, log_q = _against_classes(z, log_q, known)
        q = np.exp(log_softmax(log_q / known["temperature"], axis=1))
        best = q.argmax(1)
        index = self._given(adata).obs_names[self._rows(adata, indices)]
        labels = pd.Categorical.from_codes(np.where(score > bound, len(names), best), categories=[*names, UNKNOWN])
        probability = q.max(1).astype(np.float32)
        return pd.DataFrame(
            {
                "label": labels,
                "best_label": pd.Categorical.from_codes(best, categories=names),
                "probability": probability,
                "uncertainty": 1 - probability,
                "outlier_score": score.astype(np.float32),
            },
            index=index,
        )

    def unknown_score(self, unknown_threshold: float = 0.99) -> float:
        """Outlier score that this share of the held-out reference cells stays below.

        Parameters
        ----------
        unknown_threshold
            Share between 0 and 1.

        Returns
        -------
        The quantile.

        Raises
        ------
        ValueError
            If the share is out of range, or the reference has no labels.
        """
        if not 0 <= unknown_threshold <= 1:
            msg = f"unknown_threshold={unknown_threshold} must be a share between 0 and 1, or None for no unknowns."
            raise ValueError(msg)
        quantiles = self._transfer()["score_quantiles"]
        return float(np.interp(unknown_threshold, np.linspace(0, 1, len(quantiles)), quantiles))

    @property
    def calibration(self) -> dict[str, float]:
        """Temperature, and on the held-out reference cells accuracy and calibration error before and after it.

        ``expected_calibration_error`` is the mean gap between probability and accuracy over 15 bins (Guo et al. 2017).
        It is of the cells that the temperature was fitted to; one number cannot overfit much.
        """
        known = self._transfer()
        return {k: known[k] for k in ("temperature", "n_held_out", *_SCORES) if k in known}

    def _transfer(self) -> dict[str, Any]:
        if "transfer" not in self.reference:
            key = self.schema.labels_key
            what = (
                "was set up without labels_key" if key is None else f"has not noted the classes of obs[{key!r}] (yet)"
            )
            msg = (
                f"This {type(self).__name__} {what}: set the reference up with labels_key= and train it to transfer "
                "labels."
            )
            raise ValueError(msg)
        return self.reference["transfer"]

    def _look(
        self, adata: AnnData | None, indices: Sequence[int] | None, batch_size: int | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean of z, (n, d), and log q(y|.), (n, K), or None for a model without it."""
        means, logs = [], []
        with evaluating(0):
            for batch in self._stream(adata, indices, batch_size):
                q = self.module.inference(batch)["z"]
                means.append(q if isinstance(q, torch.Tensor) else q.loc)
                if hasattr(self.module, "log_q_y"):
                    logs.append(self.module.classify(batch, log=True))
        z = torch.cat(means).double().cpu().numpy()
        return z, torch.cat(logs).double().cpu().numpy() if logs else None

    def _note_classes(self) -> None:
        """Note where each class lies in z, the temperature, and how held-out cells score; nothing without labels."""
        self.reference.pop("transfer", None)
        key = self.schema.labels_key
        if key is None:
            return
        codes = self.schema.label_codes(self.adata.obs[key])
        train, held_out = self.train_indices, self.validation_indices
        z, log_q = self._look(None, train)
        names = [str(c) for c in self.schema.classes] if log_q is None else self.component_names
        own = codes[train]
        if log_q is not None:  # cells without a label have a component all the same
            own = np.where(own >= 0, own, log_q.argmax(1))
        if not (own >= 0).any():
            logger.warning("No training cell has a label, so there is nothing to transfer.")
            return
        known = _normals(z[own >= 0], own[own >= 0], len(names)) | {"classes": names, "temperature": 1.0}
        if len(held_out):
            z, log_q = self._look(None, held_out)
            own = codes[held_out]
        else:
            logger.warning("No cells were held out, so the probabilities of transferred labels are not calibrated.")
        classified, seen = log_q is not None, own >= 0
        scores, log_q = _against_classes(z, log_q, known)
        # A cell without a label may be of a class that no label names, unless every cell has a component.
        scores = scores[slice(None) if classified or not seen.any() else seen]
        known["score_quantiles"] = np.quantile(scores, np.linspace(0, 1, QUANTILES)).tolist()
        if len(held_out) and seen.any():
            known |= _calibrate(log_q[seen], own[seen])
            logger.info(
                "Labels of %d held-out cells: accuracy %.3f, calibration error %.3f, %.3f at temperature %.2f.",
                known["n_held_out"],
                *(known[name] for name in _SCORES),
                known["temperature"],
            )
        self.reference["transfer"] = known


_SCORES = ("accuracy", "expected_calibration_error_before", "expected_calibration_error")


def _normals(z: np.ndarray, codes: np.ndarray, n_classes: int) -> dict[str, Any]:
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


def _against_classes(z: np.ndarray, log_q: np.ndarray | None, known: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Outlier score of each cell, (n,), and log-probability of each class, (n, K).

    The score is -log sum_k share_k N(z; mean_k, covariance_k); ``log_q`` None takes the posterior of these normals
    (Bayes' rule). A class without a cell has no part in either.
    """
    shares, means, covariances = (np.asarray(known[name]) for name in ("shares", "means", "covariances"))
    joint = np.full((len(z), len(shares)), -np.inf)
    for k in np.flatnonzero(shares > 0):
        root = np.linalg.cholesky(covariances[k])
        distance = np.square(np.linalg.solve(root, (z - means[k]).T)).sum(0)
        log_volume = np.log(np.diagonal(root)).sum() + z.shape[1] / 2 * np.log(2 * np.pi)
        joint[:, k] = np.log(shares[k]) - log_volume - distance / 2
    total = logsumexp(joint, axis=1)
    return -total, np.maximum(joint - total[:, None], SMALLEST_LOG) if log_q is None else log_q


def _calibrate(log_q: np.ndarray, codes: np.ndarray) -> dict[str, Any]:
    """Temperature with the smallest cross entropy, and accuracy and calibration error before and after it."""
    rows = np.arange(len(codes))

    def cross_entropy(log_temperature: float) -> float:
        return -log_softmax(log_q / np.exp(log_temperature), axis=1)[rows, codes].mean()

    temperature = float(np.exp(minimize_scalar(cross_entropy, bounds=(-3, 3), method="bounded").x))
    q = np.exp(log_softmax(log_q / temperature, axis=1))
    return {
        "temperature": temperature,
        "n_held_out": len(codes),
        "accuracy": float((q.argmax(1) == codes).mean()),
        "expected_calibration_error_before": calibration_error(np.exp(log_q), codes),
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
