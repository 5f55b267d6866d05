"""Differential expression between groups of cells, on the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from sccvae.data import DiskMatrix
from sccvae.data.masked import measured
from sccvae.model._base import evaluating
from sccvae.model._comparisons import Comparison, comparisons, warn_of_common_shifts, warn_of_parted_batches
from sccvae.model._decoding import DECODES_FROM_CONDITIONS, Change
from sccvae.model._shrinkage import common_shift, expected_fdr, posterior_draws
from sccvae.nn import check_sizes
from sccvae.train.callbacks import progress

#: Counts in a cell of median library size below which a gene counts as not expressed (scvi-tools' threshold_counts).
NOT_EXPRESSED = 0.01
#: Draws of the weights of cells.
N_WEIGHTS = 200


@dataclass
class Sums:
    """Sums over cells, filled batch after batch.

    Cells that belong to the same groups make a part; what a group has is the sum over its parts. ``n`` (...,),
    ``weight`` (..., K), ``decoded``, ``observed``, ``expected`` (..., K, G) for K draws of the cells' weights, and
    ``raw``, ``nonzero``, ``normalized`` (..., G).
    """

    n: np.ndarray
    weight: np.ndarray
    decoded: np.ndarray
    observed: np.ndarray
    expected: np.ndarray
    raw: np.ndarray
    nonzero: np.ndarray
    normalized: np.ndarray

    @classmethod
    def zeros(cls, n_parts: int, n_genes: int) -> Sums:
        """No cell yet."""
        shapes = [(), (N_WEIGHTS,), *[(N_WEIGHTS, n_genes)] * 3, *[(n_genes,)] * 3]
        return cls(*(np.zeros((n_parts, *shape)) for shape in shapes))

    def over(self, parts: np.ndarray) -> Sums:
        """The sums over some parts, (n_parts,) bool."""
        # a product: to pick them first would copy nearly all of them for the rest of the cells
        return Sums(*(np.tensordot(parts.astype(float), value, 1) for value in vars(self).values()))


class DifferentialMixin:
    """Bayesian differential expression."""

    def differential_expression(
        self,
        adata: AnnData | None = None,
        groupby: str | None = None,
        group1: str | Sequence[str] | None = None,
        group2: str | None = None,
        idx1: Sequence[int] | Sequence[bool] | str | None = None,
        idx2: Sequence[int] | Sequence[bool] | str | None = None,
        *,
        mode: Literal["change", "vanilla"] = "change",
        delta: float = 0.5,
        batch_correction: bool | None = None,
        fdr_target: float = 0.05,
        pseudocounts: float | None = None,
        n_samples_overall: int = 2000,
        all_stats: bool = True,
        batch_size: int | None = None,
        silent: bool = False,
        seed: int = 0,
    ) -> pd.DataFrame:
        r"""Genes whose mean expression differs between groups of cells; names and columns are those of scvi-tools.

        The mean of a group is what the model decodes from z ~ q(z|x) of its cells, in the same batches for both groups,
        times what was counted over what the model expects of these cells in their own batches:

        .. math::
            m_g = \Big(\sum_i w_i \, \tfrac1B \sum_b h_g(z_i, b)\Big)
                  \frac{\frac12 + \sum_i w_i x_{ig}}{\frac12 + \sum_i w_i \mathrm{E}[x_{ig} | z_i, b_i]}

        with proportions h, counts x and the mean E of p(x|z,b): library size times h, and for a ``"zinb"`` times the
        share that does not drop out, so that dropout is no change. So a gene that the model draws to the mean of all
        cells is put right by its counts. The weights w are drawn anew 200 times (Bayesian bootstrap: exponential),
        which tells the error of the log2 fold change :math:`\log_2(m_1 + \epsilon) - \log_2(m_2 + \epsilon)`, at least
        that of Poisson counts. From estimate and error of all genes follows the posterior of each (adaptive shrinkage:
        most genes may not change at all, or all by the same; see the notes).

        Of a gene that a query lacks there is the decoded change alone: it stands as if the counts had been what the
        model expects, and its error does not tell how far the model is wrong.

        Parameters
        ----------
        adata
            Cells with the model's genes (of a query, with those that it has); None for the training data.
        groupby
            Column of ``obs`` with the groups. Cells without a value belong to no group, nor to the rest.
        group1
            A group, or several, each of which is compared; None for every group.
        group2
            The group to compare with; None for all other cells.
        idx1, idx2
            Instead of groups: numbers of rows, a mask, a slice, or a query of ``obs`` such as
            ``"cell_type == 'B' and age > 60"``. ``idx2=None`` is all other cells.
        mode
            ``"change"``: is the absolute change above ``delta``? ``"vanilla"``: which group is above the other?
        delta
            Smallest absolute log2 fold change of interest.
        batch_correction
            Decode the cells of both groups in every batch that has a cell of any group, with equal weight. If false
            every cell stays in its own batch, and a difference between batches counts as one between groups. None is
            true where the model decodes from a batch.
        fdr_target
            Posterior expected false discovery rate of the genes in ``is_de_fdr_*``.
        pseudocounts
            :math:`\epsilon`, in units of proportions; it draws changes of unexpressed genes to zero. None is 0.01
            counts in a cell of the training data's median library size.
        n_samples_overall
            Draws from the posterior of the change.
        all_stats
            Add what was observed in the two groups, as listed below.
        batch_size
            Cells at a time.
        silent
            Show no progress bar.
        seed
            Of all draws.

        Returns
        -------
        A row for each gene and comparison, the surest first in each comparison: by ``proba_de`` and, where all or no
        draws lie beyond ``delta``, by how many ``lfc_std`` the mean lies beyond it.

        - ``proba_de``, ``proba_not_de``: P(abs(change) > delta), and its complement
        - ``bayes_factor``: natural log of their ratio
        - ``lfc_mean``, ``lfc_median``, ``lfc_std``, ``lfc_min``, ``lfc_max``: of the draws of the log2 fold change. For
          likelihoods other than counts it is the difference of the means, on the scale of the input
        - ``lfc_raw``, ``lfc_error``: estimate and standard error before shrinkage
        - ``is_de_fdr_<fdr_target>``: the longest list of genes with the highest ``proba_de`` whose mean
          ``proba_not_de`` is at most ``fdr_target``
        - ``scale1``, ``scale2``: means of the groups m; ``delta``, ``pseudocounts``: as used
        - ``raw_mean1``, ``raw_mean2``: mean of the values in all cells of the group; ``raw_normalized_mean1``, ``2``:
          after scaling each cell to 10,000 (counts only); ``non_zeros_proportion1``, ``2``: share of cells with a
          value. NaN for a gene that was not measured, which does not count in the 10,000 either
        - ``comparison``, ``group1``, ``group2``: who was compared; ``Rest`` is all others

        With ``mode="vanilla"`` the first lines and ``is_de_fdr_*`` are replaced by ``proba_m1`` = P(change > 0) with
        half of P(change = 0), ``proba_m2`` and ``bayes_factor``, the natural log of their ratio.

        Raises
        ------
        KeyError
            If ``groupby`` is no column of ``obs``.
        ValueError
            If a group is not known or has no cells, neither or both of ``groupby`` and ``idx1`` are given or parts of
            both, a query of ``obs`` fails, a number is out of range, or the model has no batch to correct for.
        TypeError, IndexError
            If ``groupby`` or ``group2`` is a list; ``idx1`` or ``idx2`` are no rows, or there are none such;
            ``n_samples_overall`` is no whole number; or ``delta``, ``fdr_target`` or ``pseudocounts`` is no number.

        Warns
        -----
        UserWarning
            If a group has fewer than 15 cells; if most genes change together by more than ``delta / 2``; if the two
            groups have no batch in common, and cells are decoded in all batches: what differs between their batches is
            no change then.

        Notes
        -----
        scvi-tools compares single cells drawn from the two groups; here it is the groups' means. Cells are taken as
        independent: with few donors the error among donors is not in the rates. Nor is the error of the model's batch
        effect, which matters where groups and batches are confounded. For counts, changes are of proportions: if a few
        strong genes rise, all others fall. So with ``mode="change"`` and ``delta`` above 0 estimates are shrunk to the
        change that most genes have in common (zero, unless another mode explains the estimates better), not to no
        change; the reported changes include it. One gene at a fifth of the counts of one group, 31 of 1,000 genes
        changed: 6 % of those found are false, 32 % when shrunk to zero.

        Memory: 200 x genes x 3 float64 for each group. Time: the cells are read and decoded once, however many groups
        there are; a comparison adds about 0.5 s for 2,000 genes.

        References
        ----------
        Lopez et al. 2018, Nat. Methods 15:1053-1058 (expression posterior). Boyeau et al. 2019, bioRxiv 794289 (change,
        expected FDR). Rubin 1981, Ann. Stat. 9:130-134 (Bayesian bootstrap). Stephens 2017, Biostatistics 18:275-294
        (adaptive shrinkage).
        """
        _check_options(mode, delta, fdr_target, pseudocounts, n_samples_overall)
        counts = self.module.likelihood.support == "counts"
        corrects = self.schema.batch_key is not None and self._decoder_sees_conditions
        if batch_correction and not corrects:
            msg = (
                f"batch_correction=True: this {type(self).__name__} does not decode from the batch. Use "
                f"{DECODES_FROM_CONDITIONS}, with batch_key= in setup_anndata."
            )
            raise ValueError(msg)
        given = self._given(adata)
        found = comparisons(given, groupby, group1, group2, idx1, idx2)
        if not counts:
            pseudocounts = 0.0
        elif pseudocounts is None:
            pseudocounts = NOT_EXPRESSED / self.reference["library_quantiles"][50]
        correct = corrects and batch_correction is not False
        present = measured(given, self.schema)
        sums, parts = self._sums(adata, found, correct, batch_size, silent, seed)
        rng = np.random.default_rng(seed)
        tables, shifts = [], []
        for i, one in enumerate(found):
            both = [sums.over(parts[:, column]) for column in (2 * i, 2 * i + 1)]
            estimate, error, scale1, scale2 = _estimates(both, pseudocounts, counts)
            # a gene near the pseudocounts shows a part of what all have in common
            share = (scale1 + scale2) / (scale1 + scale2 + 2 * pseudocounts) if counts else 1.0
            # none where any change counts: of two groups some gene is always above; nor of values that are no shares
            shrunk = counts and mode == "change" and delta
            shifts.append(common_shift(estimate, error, share) if shrunk else 0.0)
            draws = posterior_draws(estimate, error, n_samples_overall, rng, shifts[-1] * share)
            columns = _change(draws, delta) if mode == "change" else _vanilla(draws)
            columns |= {"lfc_raw": estimate, "lfc_error": error} if mode == "change" else {}
            columns |= {"scale1": scale1, "scale2": scale2}
            columns |= {"delta": delta, "pseudocounts": pseudocounts} if mode == "change" else {}
            if all_stats:
                columns |= _observed(both, counts, present)
            order = _surest_first(columns["proba_de" if mode == "change" else "proba_m1"], draws, mode, delta)
            table = pd.DataFrame(columns, index=pd.Index(self.schema.var_names)).iloc[order]
            if mode == "change":
                table[f"is_de_fdr_{fdr_target}"] = expected_fdr(table["proba_de"].to_numpy()) <= fdr_target
            table["comparison"] = str(one)
            table["group1"], table["group2"] = one.name1, one.name2
            tables.append(table)
        warn_of_common_shifts(found, shifts, delta)
        return pd.concat(tables)

    def _sums(
        self,
        adata: AnnData | None,
        found: list[Comparison],
        correct: bool,
        batch_size: int | None,
        silent: bool,
        seed: int,
    ) -> tuple[Sums, np.ndarray]:
        """What all comparisons need, in one pass over their cells.

        With the sums come the parts of each group, (n_parts, n_groups) bool: columns 2 i and 2 i + 1 are comparison i.
        """
        self._check_if_trained(warn=True)
        store = self._store(adata)
        if correct:
            warn_of_parted_batches(found, store.cells.codes[:, 0], self.schema.batch_key)
        groups = [rows for one in found for rows in (one.rows1, one.rows2)]
        member = np.zeros((len(store), len(groups)), bool)
        for column, rows in enumerate(groups):
            member[rows, column] = True
        used = np.flatnonzero(member.any(1))
        parts, part = np.unique(member[used], axis=0, return_inverse=True)
        part = part.ravel()
        if not isinstance(store.cells.x, DiskMatrix):  # part by part, so that a mini-batch adds to few of the sums
            order = np.argsort(part, kind="stable")
            used, part = used[order], part[order]
        changes = [Change(codes={0: int(b)}) for b in np.unique(store.cells.codes[used, 0])] if correct else [Change()]
        sums, rng, done = Sums.zeros(len(parts), store.n_features), np.random.default_rng(seed), 0
        with evaluating(seed), progress(total=len(used), desc="DE", unit=" cells", disable=silent) as bar:
            for batch in self._batches(store, used, batch_size):
                z = self.module.inference(batch)["z"].sample()
                own = self.module.generative({"z": z}, batch).mean
                decoded = sum(p_x.expression() for p_x in self._decoded(batch, changes, [z])) / len(changes)
                x, total = batch.dense, batch.dense.sum(1, keepdim=True)
                if batch.present is not None:  # where there are no counts, those expected leave the decoded change
                    total = (x * batch.present).sum(1, keepdim=True)
                    x = torch.where(batch.present, x, own)
                scaled = 1e4 * x / total.clamp(min=1)
                x, own, decoded, scaled = (t.double().cpu().numpy() for t in (x, own, decoded, scaled))
                weight = rng.exponential(size=(N_WEIGHTS, len(x)))
                here = part[done : done + len(x)]
                done += len(x)
                for i in np.unique(here):
                    cells = here == i
                    w, counted = weight[:, cells], x[cells]
                    sums.n[i] += len(counted)
                    sums.weight[i] += w.sum(1)
                    sums.decoded[i] += w @ decoded[cells]
                    sums.observed[i] += w @ counted
                    sums.expected[i] += w @ own[cells]
                    sums.raw[i] += counted.sum(0)
                    sums.nonzero[i] += (counted != 0).sum(0)
                    sums.normalized[i] += scaled[cells].sum(0)
                bar.update(len(x))
        return sums, parts


def _estimates(
    groups: list[Sums], pseudocounts: float, counts: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Change between two groups, its standard error, and the groups' means, each (G,)."""
    means, levels, floor = [], [], 1e-12
    for group in groups:
        size = group.weight[:, None]  # (K, 1)
        if counts:
            means.append(group.decoded / size * (group.observed + 0.5) / (group.expected + 0.5))
            rate = means[-1].mean(0)
            floor = floor + (rate / (rate + pseudocounts) / np.log(2)) ** 2 / (group.raw + 0.5)
        else:
            means.append((group.decoded + group.observed - group.expected) / size)
        level = np.log2(means[-1] + pseudocounts) if counts else means[-1]
        # as of a sample: these weights alone give a mean the variance s^2 (n - 1) / (n (n + 1)), not s^2 / n
        wider = np.sqrt((group.n + 1) / max(group.n - 1, 1))
        levels.append(level.mean(0) + wider * (level - level.mean(0)))
    change = levels[0] - levels[1]
    error = np.sqrt(np.maximum(change.var(0), floor))
    return change.mean(0), error, means[0].mean(0), means[1].mean(0)


def _observed(groups: list[Sums], counts: bool, present: np.ndarray) -> dict[str, np.ndarray]:
    """Means of the cells of each group; NaN where a gene is not ``present`` (G,)."""
    names = {"raw_mean": "raw", "non_zeros_proportion": "nonzero"}
    names |= {"raw_normalized_mean": "normalized"} if counts else {}
    return {
        f"{name}{k}": np.where(present, vars(g)[of] / g.n, np.nan)
        for name, of in names.items()
        for k, g in enumerate(groups, 1)
    }


def _change(change: np.ndarray, delta: float) -> dict[str, np.ndarray]:
    proba = (np.abs(change) > delta).mean(0)
    return {"proba_de": proba, "proba_not_de": 1 - proba, "bayes_factor": _log_odds(proba)} | {
        f"lfc_{name}": getattr(np, name)(change, axis=0) for name in ("mean", "median", "std", "min", "max")
    }


def _vanilla(change: np.ndarray) -> dict[str, np.ndarray]:
    proba = (change > 0).mean(0) + (change == 0).mean(0) / 2
    return {"proba_m1": proba, "proba_m2": 1 - proba, "bayes_factor": _log_odds(proba)}


def _surest_first(proba: np.ndarray, change: np.ndarray, mode: str, delta: float) -> np.ndarray:
    """The order of genes, (G,): by ``proba``, then by what a normal with the moments of the draws (n, G) would say."""
    mean = change.mean(0)
    beyond = np.abs(mean) - delta if mode == "change" else mean
    return np.lexsort((-beyond / np.maximum(change.std(0), 1e-12), -proba))


def _log_odds(proba: np.ndarray) -> np.ndarray:
    return np.log(proba + 1e-8) - np.log(1 - proba + 1e-8)


def _check_options(mode: str, delta: float, fdr_target: float, pseudocounts: float | None, n_samples: int) -> None:
    if mode not in ("change", "vanilla"):
        msg = f"mode={mode!r}: choose 'change' or 'vanilla'."
        raise ValueError(msg)
    check_sizes(n_samples_overall=n_samples)
    for name, number in {"delta": delta, "fdr_target": fdr_target, "pseudocounts": pseudocounts or 1.0}.items():
        if not isinstance(number, Real):
            msg = f"{name}={number!r} must be a number, as delta=0.5, fdr_target=0.05; none is estimated from the data."
            raise TypeError(msg)
    if not (delta >= 0 and 0 < fdr_target < 1 and n_samples >= 1 and (pseudocounts is None or pseudocounts > 0)):
        msg = (
            f"delta={delta} must not be negative, fdr_target={fdr_target} must lie between 0 and 1, "
            f"n_samples_overall={n_samples} must be at least 1, and pseudocounts={pseudocounts} positive."
        )
        raise ValueError(msg)
