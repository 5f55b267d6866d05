"""Labels of a reference for other cells, with a calibrated probability, and "unknown" for what the reference lacks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix, vstack
from scipy.special import log_softmax
from sklearn.neighbors import NearestNeighbors

from sccvae.model._base import evaluating
from sccvae.model._classes import (
    LEAST_STRANGE,
    against_classes,
    by_normals,
    calibrate,
    logistic,
    normals,
    principal_axes,
    strangeness,
    temperature_of,
)
from sccvae.module import Batch
from sccvae.nn import check_sizes
from sccvae.train.passes import some_of_each

logger = logging.getLogger(__name__)

#: Name of what the reference does not hold.
UNKNOWN = "unknown"
#: Training cells that the logistic regression on genes learns from at most, and the depth that it sees cells at.
LEARNS_FROM, DEPTH = 10_000, 1e4
#: Quantile of the reference's library sizes up to which the counts of shallower cells are drawn.
SHALLOW = 0.25
#: Quantiles kept of the held-out outlier scores.
QUANTILES = 1001
#: Cells of a query among which neighbours are looked for.
MOST_CELLS = 20_000
#: Cells asked about for each neighbour at least: a few cells lie next to cells of other types.
CELLS_A_NEIGHBOR = 6


class TransferMixin:
    """Label transfer: what the training notes of its labelled cells is enough, their data are not needed."""

    def transfer_labels(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        unknown_threshold: float | None = 0.9,
        n_neighbors: int = 15,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Label of each cell by the labelled cells that the reference was trained on.

        Two views decide together, and in a GMVAE q(y|z,x) as a third: a normal for each class in z, and a logistic
        regression on the genes (log of one and counts per 10,000). Their probabilities are multiplied, each at a
        temperature of its own, and the product at a last one, so that held-out reference cells labelled with
        probability 0.8 are right 8 times of 10. So a GMVAE may differ from its ``predict``, which is q(y|z,x) alone.

        Parameters
        ----------
        adata
            Cells with the model's genes, in any order; None for the model's own, such as those of the query.
        indices
            Rows (or a mask) of the cells; None for all.
        unknown_threshold
            A cell is called ``"unknown"`` if its outlier score is larger than those of this share of the held-out
            reference cells, each by itself: the default leaves one in ten cells like them unknown alone, and 1 to 5 in
            a hundred with neighbours. None gives every cell a label. Raise it where a query's technology differs a lot
            from the reference's.
        n_neighbors
            The outlier score is the median over so many cells: the cell itself and those of the cells asked about whose
            genes are most like its own (30 components of their genes; at most one neighbour for each six cells). What
            is strange about one cell may be chance, about a whole group it is not. But a type of fewer than half as
            many cells goes unnoticed: 1 takes each cell by itself.
        batch_size
            Cells at a time.

        Returns
        -------
        A data frame, indexed by cell: ``label`` (categorical, with ``"unknown"``), ``best_label`` (without),
        ``probability`` (calibrated, of ``best_label``), ``uncertainty`` (1 - probability) and ``outlier_score``: how
        far the cell lies from all classes in z, how little its genes speak for any of them, how little both views
        agree, how far its genes lie from all classes on their principal axes, and how much these leave of them; the
        sum, each in standard deviations of the held-out reference cells from their median, and of that the median over
        its neighbours (unknown above :meth:`unknown_score`). For what is about genes, the counts that a cell has fewer
        than the lower quartile of the reference are drawn from p(x|z,c), and so are genes that are missing. Of the last
        two what a quarter of the cells asked about exceed the reference's by is taken off, as their technology's,
        unless each cell is taken by itself.

        Raises
        ------
        ValueError
            If the reference has no labels, the threshold is not between 0 and 1, or ``n_neighbors`` is below 1.
        TypeError
            If ``n_neighbors`` is no whole number.

        References
        ----------
        Guo, Pleiss, Sun, Weinberger 2017, On calibration of modern neural networks, ICML (temperature scaling). Liu,
        Wang, Owens, Li 2020, Energy-based out-of-distribution detection, NeurIPS, equation 4. Hinton 2002, Training
        products of experts by minimizing contrastive divergence, Neural Computation 14, equation 1.
        """
        known = self._transfer()
        check_sizes(n_neighbors=n_neighbors)
        rows = self._rows(adata, indices)
        n_neighbors = min(n_neighbors, len(rows) // CELLS_A_NEIGHBOR)
        bound = np.inf if unknown_threshold is None else self.unknown_score(unknown_threshold)
        axes = None
        if n_neighbors > 1:
            axes = principal_axes(self._genes_of(adata, rows[_some(len(rows), LEARNS_FROM)]))
        views = self._look(adata, indices, batch_size, known.get("genes"), axes)
        names = known["classes"]
        called = [*names, *{UNKNOWN}.difference(names)]
        score, log_q = against_classes(views, known, together=n_neighbors > 1)
        if n_neighbors > 1:
            score = _of_neighbors(score, views["where"], n_neighbors)
        q = np.exp(log_softmax(log_q / known["temperature"], axis=1))
        best = q.argmax(1)
        index = self._given(adata).obs_names[rows]
        labels = pd.Categorical.from_codes(np.where(score > bound, called.index(UNKNOWN), best), categories=called)
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

    def unknown_score(self, unknown_threshold: float = 0.9) -> float:
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
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        batch_size: int | None = None,
        genes: dict[str, Any] | None = None,
        axes: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Views of cells: mean of ``z``, (n, d); ``q``: log q(y|.), (n, K); ``genes``: class scores, (n, K).

        Of cells with what was not measured drawn: ``drawn``, class scores, (n, K); ``place``, on the reference's axes,
        (n, c); and ``beyond``, the squared length of the rest, (n,). ``where``: genes on other axes (c, G).
        """
        found: dict[str, list[torch.Tensor]] = {}

        def note(name: str, of: torch.Tensor) -> None:
            found.setdefault(name, []).append(of)

        known = {name: torch.tensor(of, dtype=torch.float32) for name, of in (genes or {}).items()}
        with evaluating(0):
            for batch in self._stream(adata, indices, batch_size):
                q = self.module.inference(batch)["z"]
                z = q if isinstance(q, torch.Tensor) else q.loc
                note("z", z)
                if hasattr(self.module, "log_q_y"):
                    note("q", self.module.classify(batch, log=True))
                if not known and axes is None:
                    continue
                whole = batch if z is q else self._drawn(batch, z, float(known.get("depth", 0.0)))
                x = self._genes(batch).cpu()
                drawn = x if whole is batch else self._genes(whole).cpu()
                if "weights" in known:
                    note("genes", x @ known["weights"].T + known["intercepts"])
                    note("drawn", drawn @ known["weights"].T + known["intercepts"])
                if "axes" in known:
                    place = drawn @ known["axes"].T
                    note("place", place)
                    note("beyond", drawn.square().sum(1) - place.square().sum(1))
                if axes is not None:
                    note("where", x @ torch.from_numpy(axes).T)
        return {name: torch.cat(parts).double().cpu().numpy() for name, parts in found.items()}

    def _drawn(self, batch: Batch, z: torch.Tensor, depth: float) -> Batch:
        """The cells with what was not measured drawn from p(x|z,c): genes, and counts up to a library of ``depth``.

        So they have the noise of cells that were measured, and it is not strange about a cell that it has few counts.
        """
        library = batch.library.clamp(min=depth) if depth else batch.library  # sums of values may be negative
        more, x = library - batch.library, batch.dense

        def draws(size: torch.Tensor) -> torch.Tensor:
            return self.module.generative({"z": z}, replace(batch, library=size.clamp(min=1e-6))).sample()

        if batch.present is None and not more.any():
            return batch
        if more.any():
            x = x + draws(more) * (more > 0)
        if batch.present is not None:
            x = torch.where(batch.present, x, draws(library))
        return replace(batch, x=x, library=library)

    def _genes(self, batch: Batch) -> torch.Tensor:
        """What the logistic regression reads of cells, (n, G): of counts log(1 + counts per 10,000), else x."""
        if self.module.likelihood.support != "counts":
            return batch.dense
        return torch.log1p(batch.dense * (DEPTH / batch.library.clamp(min=1e-6)))

    def _note_classes(self) -> None:
        """Note what is known of the classes and how held-out cells score; nothing without labels."""
        self.reference.pop("transfer", None)
        codes = self._label_codes()
        if codes is None:
            return
        train, held_out = self.train_indices, self.validation_indices
        views = self._look(None, train)
        names = self.component_names if "q" in views else [str(c) for c in self.schema.classes]
        own = codes[train]
        if "q" in views:  # cells without a label have a component all the same
            own = np.where(own >= 0, own, views["q"].argmax(1))
        if not (own >= 0).any():
            logger.warning("No training cell has a label, so there is nothing to transfer.")
            return
        known = normals(views["z"][own >= 0], own[own >= 0], len(names)) | {"classes": names, "temperature": 1.0}
        known |= self._learn_genes(train[own >= 0], own[own >= 0], len(names))
        if len(held_out):
            own = codes[held_out]
        else:
            logger.warning("No cells were held out, so the probabilities of transferred labels are not calibrated.")
        views = self._look(None, held_out if len(held_out) else train, genes=known["genes"])
        # Where all cells of a class are held out, nothing is known of it: any probability of it would be wrong.
        with_cells = np.minimum(known["shares"], known["places"]["shares"]) > 0
        seen = (own >= 0) & with_cells[own]
        if (own[~seen] >= 0).any():
            logger.warning(
                "Classes %s have no training cell: their %d held-out cells are no measure of the probabilities.",
                sorted({names[k] for k in own[~seen] if k >= 0}),
                (own[~seen] >= 0).sum(),
            )
        density, by_z = by_normals(views["z"], known)
        logs = {"z": by_z} | {name: views[name] for name in ("q", "genes") if name in views}
        fitted = len(held_out) > 0 and seen.any()
        known["temperatures"] = {n: temperature_of(v[seen], own[seen]) if fitted else 1.0 for n, v in logs.items()}
        found = strangeness(density, views, by_z, known)
        # A cell without a label may be of a class that no label names, unless every cell has a component.
        like = np.ones_like(seen) if "q" in views or not seen.any() else seen
        known["scores"] = {n: (float(np.median(v[like])), max(float(v[like].std()), 1e-6)) for n, v in found.items()}
        known["quartiles"] = {n: float(np.quantile(found[n][like], LEAST_STRANGE)) for n in ("place", "beyond")}
        scores, log_q = against_classes(views, known)
        known["score_quantiles"] = np.quantile(scores[like], np.linspace(0, 1, QUANTILES)).tolist()
        if fitted:
            known |= calibrate(log_q[seen], own[seen])
            logger.info(
                "Labels of %d held-out cells: accuracy %.3f, calibration error %.3f, %.3f at temperature %.2f.",
                known["n_held_out"],
                *(known[name] for name in _SCORES),
                known["temperature"],
            )
        self.reference["transfer"] = known

    def _label_codes(self) -> np.ndarray | None:
        """Class of each cell of the training data, (n,) int64, -1 for none; None without ``labels_key``."""
        key = self.schema.labels_key
        if key is None or self.adata is None:
            return None
        if key not in self.adata.obs:
            msg = (
                f"The model was set up with labels_key={key!r}, but adata.obs has no such column (any more). Put it "
                "back, or set up a model without labels_key."
            )
            raise KeyError(msg)
        return self.schema.label_codes(self.adata.obs[key])

    def _learn_genes(self, rows: np.ndarray, codes: np.ndarray, n_classes: int) -> dict[str, Any]:
        """What the genes of training cells, (n,) rows and classes, say: regression and axes, and normals on these."""
        some = some_of_each(np.arange(len(rows)), codes, LEARNS_FROM, 0)  # a class not among them would get nothing
        x, codes = self._genes_of(None, rows[some]), codes[some]
        axes = principal_axes(x).astype(np.float64).round(6)  # single precision would be written in 17 digits
        places = normals(x @ axes.T, codes, n_classes)
        genes = (logistic(x, codes, n_classes) or {}) | {"axes": axes.tolist()}
        if self.module.likelihood.support == "counts":
            library = self._store(self.adata).cells.library[rows]
            genes["depth"] = min(float(np.quantile(library, SHALLOW)), DEPTH)
        return {"genes": genes, "places": places}

    def _genes_of(self, adata: AnnData | None, rows: np.ndarray) -> csr_matrix:
        """:meth:`_genes` of these cells."""
        return vstack([csr_matrix(self._genes(batch).cpu().numpy()) for batch in self._stream(adata, rows)], "csr")


def _of_neighbors(score: np.ndarray, where: np.ndarray, n_neighbors: int) -> np.ndarray:
    """Median of the scores (n,) of the cells nearest to each, itself included, by where they are, (n, d)."""
    some = _some(len(where), MOST_CELLS)
    near = NearestNeighbors(n_neighbors=n_neighbors).fit(where[some]).kneighbors(where, return_distance=False)
    return np.median(score[some][near], axis=1)


def _some(n: int, most: int) -> np.ndarray:
    """At most so many of n rows, drawn at random, in order."""
    return np.sort(np.random.default_rng(0).permutation(n)[:most])


_SCORES = ("accuracy", "expected_calibration_error_before", "expected_calibration_error")
