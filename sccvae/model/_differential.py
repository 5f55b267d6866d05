"""Differential expression between groups of cells, on the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from tqdm.auto import tqdm

from sccvae.data import CellStore
from sccvae.model._base import evaluating

#: Counts in a cell of median library size below which a gene counts as not expressed (scvi-tools' threshold_counts).
NOT_EXPRESSED = 0.01


@dataclass(frozen=True)
class Comparison:
    """Two groups of cells: their names, and their rows (n,) int64."""

    name1: str
    name2: str
    rows1: np.ndarray
    rows2: np.ndarray


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
        delta: float = 0.25,
        batch_correction: bool | None = None,
        fdr_target: float = 0.05,
        test_mode: Literal["three", "two"] = "three",
        pseudocounts: float | None = None,
        n_samples_overall: int = 2000,
        all_stats: bool = True,
        batch_size: int | None = None,
        silent: bool = False,
        seed: int = 0,
    ) -> pd.DataFrame:
        r"""Genes that differ between groups of cells; names and columns are those of scvi-tools.

        Pairs of cells are drawn, one from each group, z from q(z|x) of each, and both are decoded to normalised
        expression h (proportions). The change of a gene is :math:`r = \log_2(h_1 + \epsilon) - \log_2(h_2 + \epsilon)`,
        so its distribution holds what the model is unsure of and how cells differ within a group.

        Parameters
        ----------
        adata
            Cells with the model's genes; None for the training data.
        groupby
            Column of ``obs`` with the groups. Cells without a value belong to no group, nor to the rest.
        group1
            A group, or several, each of which is compared; None for every group.
        group2
            The group to compare with; None for all other cells.
        idx1, idx2
            Instead of groups: rows, a mask, or a query of ``obs`` such as ``"cell_type == 'B' and age > 60"``.
            ``idx2=None`` is all other cells.
        mode
            ``"change"``: is the absolute change above ``delta``? ``"vanilla"``: which group is above the other?
        delta
            Smallest absolute log2 fold change of interest.
        batch_correction
            Decode both cells of a pair in the same batch, in turn in every batch that has a cell of either group. If
            false every cell is decoded in its own batch, and a difference between batches counts as one between groups.
            None is true where the model decodes from a batch.
        fdr_target
            Posterior expected false discovery rate of the genes in ``is_de_fdr_*``.
        test_mode
            ``"three"``: a gene is up, down or neither, and ``proba_de`` is the larger of P(up) and P(down);
            ``"two"``: it is their sum, so a gene that merely varies more in one group counts as well.
        pseudocounts
            :math:`\epsilon`, in units of proportions; it draws changes of unexpressed genes to zero. None is 0.01
            counts in a cell of the training data's median library size.
        n_samples_overall
            Pairs drawn. Pairs x genes changes are held in memory (float32).
        all_stats
            Add what was observed in the two groups, as listed below.
        batch_size
            Cells at a time.
        silent
            Show no progress bar.
        seed
            Of the pairs and the draws of z.

        Returns
        -------
        A row for each gene and comparison, the surest first in each comparison.

        - ``proba_de``, ``proba_not_de``: P(|r| > delta) as ``test_mode`` says, and its complement
        - ``bayes_factor``: natural log of their ratio
        - ``lfc_mean``, ``lfc_median``, ``lfc_std``, ``lfc_min``, ``lfc_max``: of r. With likelihoods other than counts
          r is the difference of the expected values, on the scale of the input
        - ``is_de_fdr_<fdr_target>``: the longest list of genes with the highest ``proba_de`` whose mean ``proba_not_de``
          is at most ``fdr_target``
        - ``scale1``, ``scale2``: mean of h; ``delta``, ``pseudocounts``: as used
        - ``raw_mean1``, ``raw_mean2``: mean of the values in all cells of the group; ``raw_normalized_mean1``, ``2``:
          after scaling each cell to 10,000 (counts only); ``non_zeros_proportion1``, ``2``: share of cells with a value
        - ``comparison``, ``group1``, ``group2``: who was compared; ``Rest`` is all others

        With ``mode="vanilla"`` the first four lines are replaced by ``proba_m1`` = P(h1 > h2), ``proba_m2`` and
        ``bayes_factor``, the natural log of their ratio.

        Raises
        ------
        KeyError
            If ``groupby`` is no column of ``obs``.
        ValueError
            If a group is not known or has no cells, neither or both of ``groupby`` and ``idx1`` are given, a number is
            out of range, or the model has no batch to correct for.

        Notes
        -----
        The expected share of false genes is one under the model, and for single cells, so it tends to be cautious:
        with groups that overlap, or a ``delta`` near the real changes, few genes are found.

        References
        ----------
        Lopez et al. 2018, Nat. Methods 15:1053-1058 (``"vanilla"``). Boyeau et al. 2019, Deep generative models for
        detecting differential expression in single cells, bioRxiv 794289 (``"change"``, expected FDR).
        """
        _check_options(mode, test_mode, delta, fdr_target, pseudocounts, n_samples_overall)
        counts = self.module.likelihood.support == "counts"
        corrects = self.schema.batch_key is not None and self._decoder_sees_conditions
        if batch_correction and not corrects:
            msg = (
                f"batch_correction=True: this {type(self).__name__} does not decode from the batch. Use a CVAE with "
                "batch_key= in setup_anndata and prior='fixed'."
            )
            raise ValueError(msg)
        if (groupby is None) == (idx1 is None):
            msg = "Give either groupby=, the obs column of the groups, or idx1=, the cells of the first group."
            raise ValueError(msg)
        given = self._given(adata)
        comparisons = _by_rows(given, idx1, idx2) if groupby is None else _by_groups(given, groupby, group1, group2)
        if pseudocounts is None:
            pseudocounts = NOT_EXPRESSED / self.reference["library_quantiles"][50]
        self._check_if_trained(warn=True)
        store = self._store(adata)
        raw = self._raw_statistics(store, comparisons, batch_size) if all_stats else [{}] * len(comparisons)
        rng = np.random.default_rng(seed)
        tables = []
        with evaluating(seed):
            for one, observed in zip(tqdm(comparisons, "DE", disable=silent), raw, strict=True):
                pick1, pick2 = (rng.choice(rows, n_samples_overall) for rows in (one.rows1, one.rows2))
                codes = None
                if corrects and batch_correction is not False:
                    batches = np.unique(store.cells.codes[np.concatenate([one.rows1, one.rows2]), 0])
                    codes = rng.permutation(np.resize(batches, n_samples_overall))
                change, scale1, scale2 = self._changes(
                    store, pick1, pick2, codes, pseudocounts if counts else None, batch_size
                )
                if mode == "change":
                    columns = _change(change, delta, test_mode)
                    columns |= {"delta": delta, "pseudocounts": pseudocounts if counts else 0.0}
                else:
                    columns = _vanilla(change)
                table = pd.DataFrame(
                    columns | {"scale1": scale1, "scale2": scale2} | observed, index=pd.Index(self.schema.var_names)
                )
                table = table.sort_values("proba_de" if mode == "change" else "bayes_factor", ascending=False)
                if mode == "change":
                    table[f"is_de_fdr_{fdr_target}"] = expected_fdr(table["proba_de"].to_numpy()) <= fdr_target
                table["comparison"] = f"{one.name1} vs {one.name2}"
                table["group1"], table["group2"] = one.name1, one.name2
                tables.append(table)
        return pd.concat(tables)

    def _changes(
        self,
        store: CellStore,
        pick1: np.ndarray,
        pick2: np.ndarray,
        codes: np.ndarray | None,
        pseudocounts: float | None,
        batch_size: int | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Changes of the pairs, (n_pairs, G) float32, and the mean expression of either group, (G,).

        Pair i is decoded in batch ``codes[i]``; None for each cell's own. No pseudocounts give plain differences.
        """
        changes = np.empty((len(pick1), len(self.schema.var_names)), np.float32)
        sums, done = torch.zeros(2, changes.shape[1], dtype=torch.float64), 0
        for pair in zip(*(self._batches(store, rows, batch_size) for rows in (pick1, pick2)), strict=True):
            here = slice(done, done + len(pair[0].x))
            decoded = []
            for batch in pair:
                target = batch
                if codes is not None:
                    new = batch.codes.clone()
                    new[:, 0] = torch.from_numpy(codes[here]).to(new)
                    target = replace(batch, codes=new)
                z = self.module.inference(batch)["z"].sample()
                decoded.append(self.module.generative({"z": z}, target).expression())
            sums += torch.stack([h.double().sum(0).cpu() for h in decoded])
            if pseudocounts is not None:
                decoded = [torch.log2(h + pseudocounts) for h in decoded]
            changes[here] = (decoded[0] - decoded[1]).cpu().numpy()
            done = here.stop
        scale1, scale2 = (sums / done).numpy()
        return changes, scale1, scale2

    def _raw_statistics(
        self, store: CellStore, comparisons: list[Comparison], batch_size: int | None
    ) -> list[dict[str, np.ndarray]]:
        """What was observed in the groups of each comparison, in one pass over the cells."""
        groups = [rows for one in comparisons for rows in (one.rows1, one.rows2)]
        member = np.zeros((len(store), len(groups)), np.float64)
        for column, rows in enumerate(groups):
            member[rows, column] = 1 / len(rows)
        used = np.flatnonzero(member.any(1))
        counts = self.module.likelihood.support == "counts"
        names = ("raw_mean", "non_zeros_proportion") + (("raw_normalized_mean",) if counts else ())
        found = {name: 0.0 for name in names}
        done = 0
        for batch in self._batches(store, used, batch_size):
            x = batch.x.double().cpu()
            share = torch.from_numpy(member[used[done : done + len(x)]].T)  # (n_groups, n)
            done += len(x)
            parts = [x, (x != 0).double()]
            if counts:
                parts.append(1e4 * x / x.sum(1, keepdim=True).clamp(min=1))
            for name, part in zip(names, parts, strict=True):
                found[name] = found[name] + (share @ part).numpy()
        return [
            {f"{name}{k + 1}": found[name][2 * i + k] for name in names for k in range(2)}
            for i in range(len(comparisons))
        ]


def expected_fdr(proba: np.ndarray) -> np.ndarray:
    """Posterior expected false discovery rate of the list that ends with each gene, (G,).

    The list of a gene holds it and all genes before it, by falling ``proba`` (G,); its expected rate is the mean of
    ``1 - proba`` over the list (Boyeau et al. 2019).
    """
    order = np.argsort(-proba, kind="stable")
    rate = np.empty(len(proba))
    rate[order] = np.cumsum(1 - proba[order]) / np.arange(1, len(proba) + 1)
    return rate


def _change(change: np.ndarray, delta: float, test_mode: str) -> dict[str, np.ndarray]:
    up, down = (change >= delta).mean(0), (change < -delta).mean(0)
    proba = up + down if test_mode == "two" else np.maximum(up, down)
    return {"proba_de": proba, "proba_not_de": 1 - proba, "bayes_factor": _log_odds(proba)} | {
        f"lfc_{name}": getattr(np, name)(change, axis=0) for name in ("mean", "median", "std", "min", "max")
    }


def _vanilla(change: np.ndarray) -> dict[str, np.ndarray]:
    proba = (change > 0).mean(0)
    return {"proba_m1": proba, "proba_m2": 1 - proba, "bayes_factor": _log_odds(proba)}


def _log_odds(proba: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    return np.log(proba + eps) - np.log(1 - proba + eps)


def _check_options(
    mode: str, test_mode: str, delta: float, fdr_target: float, pseudocounts: float | None, n_samples: int
) -> None:
    if mode not in ("change", "vanilla") or test_mode not in ("two", "three"):
        msg = f"mode={mode!r}, test_mode={test_mode!r}: choose mode='change' or 'vanilla', test_mode='two' or 'three'."
        raise ValueError(msg)
    if not (delta >= 0 and 0 < fdr_target < 1 and n_samples >= 1 and (pseudocounts is None or pseudocounts > 0)):
        msg = (
            f"delta={delta} must not be negative, fdr_target={fdr_target} must lie between 0 and 1, "
            f"n_samples_overall={n_samples} must be at least 1, and pseudocounts={pseudocounts} positive."
        )
        raise ValueError(msg)


def _by_groups(adata: AnnData, groupby: str, group1: Any, group2: Any) -> list[Comparison]:
    """One comparison for each group of ``group1``."""
    if groupby not in adata.obs:
        msg = f"There is no adata.obs[{groupby!r}]; the columns are {list(adata.obs.columns)}."
        raise KeyError(msg)
    column = adata.obs[groupby]
    names = column.astype(object).where(column.notna(), None)
    names = np.array([None if name is None else str(name) for name in names], dtype=object)
    groups = sorted({name for name in names if name is not None})
    if len(groups) < 2:
        msg = f"adata.obs[{groupby!r}] has {len(groups)} group: differential expression compares two."
        raise ValueError(msg)
    several = group1 is not None and not isinstance(group1, str) and np.ndim(group1)
    wanted = [str(g) for g in (group1 if several else groups if group1 is None else [group1])]
    if group1 is None and group2 is not None:
        wanted = [g for g in groups if g != str(group2)]
    unknown = [g for g in [*wanted, *([] if group2 is None else [str(group2)])] if g not in groups]
    if unknown or not wanted:
        msg = f"adata.obs[{groupby!r}] has no cells in {unknown or group1!r}; its groups are {groups}."
        raise ValueError(msg)
    if group2 is not None and str(group2) in wanted:
        msg = f"group1 and group2 are both {str(group2)!r}: compare two groups."
        raise ValueError(msg)

    def others(name: str) -> np.ndarray:
        other = names != name if group2 is None else names == str(group2)
        return np.flatnonzero(other & (names != None))  # noqa: E711  elementwise

    second = "Rest" if group2 is None else str(group2)
    return [Comparison(name, second, np.flatnonzero(names == name), others(name)) for name in wanted]


def _by_rows(adata: AnnData, idx1: Any, idx2: Any) -> list[Comparison]:
    """The comparison of two selections."""
    return [Comparison("one", "Rest" if idx2 is None else "two", *_rows(adata, idx1, idx2))]


def _rows(adata: AnnData, idx1: Any, idx2: Any) -> Iterator[np.ndarray]:
    one = None
    for name, idx in (("idx1", idx1), ("idx2", idx2)):
        if idx is None:
            rows = np.setdiff1d(np.arange(adata.n_obs), one)
        elif isinstance(idx, str):
            rows = np.flatnonzero(adata.obs.index.isin(adata.obs.query(idx).index))
        else:
            idx = np.asarray(idx)
            if idx.dtype == bool and len(idx) != adata.n_obs:
                msg = f"{name} is a mask of {len(idx)} values, but there are {adata.n_obs} cells."
                raise ValueError(msg)
            rows = np.flatnonzero(idx) if idx.dtype == bool else idx.astype(np.int64)
        if not len(rows):
            msg = f"{name} selects no cell."
            raise ValueError(msg)
        one = rows if one is None else one
        yield rows
