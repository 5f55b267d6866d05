"""Sets made of those at hand: two of the batches, types missing, shares or depths apart; and simulated ones.

No setting was chosen on them, but the width of networks by that of many types, and which cells of two batches are of
one sort, and how a GMVAE starts, by sets much like the three last.
"""

from __future__ import annotations

from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from benchmarks.sets import CellSet, read, studies

KANG, MERGED, PANCREAS, ZHENG = (
    "kang2018_ctrl12k",
    "kang2018_merged_labelled",
    "pancreas_panc8_small_int",
    "zheng2017_pbmc_facs",
)


def some(adata: ad.AnnData, n: int = 5_000) -> ad.AnnData:
    """At most ``n`` cells, drawn at random."""
    return adata[np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:n])].copy()


def batches(adata: ad.AnnData, *names: str) -> ad.AnnData:
    """The cells of these batches."""
    return adata[adata.obs["batch"].isin(names).to_numpy()].copy()


def without(adata: ad.AnnData, key: str, **missing: list[str]) -> ad.AnnData:
    """The cells but for some types in some batches."""
    out = np.zeros(adata.n_obs, bool)
    for batch, types in missing.items():
        out |= ((adata.obs[key] == batch) & adata.obs["cell_type"].isin(types)).to_numpy()
    return adata[~out].copy()


def thinned() -> ad.AnnData:
    """Donors of whom 0.15 to all of the counts are left."""
    adata = some(read(KANG))
    x, donors = adata.X.tocsr(), adata.obs["batch"].astype(str)
    left = dict(zip(sorted(donors.unique()), np.geomspace(0.15, 1, donors.nunique()), strict=True))
    share = np.repeat(donors.map(left).to_numpy(), np.diff(x.indptr))
    x.data = np.random.default_rng(0).binomial(x.data.astype(int), share).astype(np.float32)
    x.eliminate_zeros()
    adata.X = x
    return adata[np.asarray(x.sum(1)).ravel() > 50].copy()


def relabelled(adata: ad.AnnData, batch: np.ndarray) -> ad.AnnData:
    """The same cells in other batches."""
    adata.obs["batch"] = batch
    return adata


def sorted_apart() -> ad.AnnData:
    """T cells as one batch, all others as the other: no type in both, and no effect of the batch."""
    adata = read(ZHENG)
    return relabelled(adata, np.where(adata.obs["cell_type"].str.contains("CD4\\+|CD8\\+"), "T", "other"))


def no_effect() -> ad.AnnData:
    """Cells of one batch, labelled as three at random."""
    adata = read(ZHENG)
    return relabelled(adata, np.random.default_rng(0).choice(["a", "b", "c"], adata.n_obs))


def many_batches() -> ad.AnnData:
    """Donors parted at random into 48 batches of about 100 cells."""
    adata = some(read(KANG))
    part = pd.Series(np.random.default_rng(0).integers(0, 6, adata.n_obs).astype(str), index=adata.obs_names)
    return relabelled(adata, (adata.obs["batch"].astype(str) + "-" + part).to_numpy())


def blood() -> ad.AnnData:
    """Two studies, of which one lacks B cells and the other CD14+ monocytes."""
    adata = studies((ZHENG, "pbmc3k_labelled"))
    return without(adata, "batch", pbmc3k_labelled=["B"], zheng2017_pbmc_facs=["CD14+ monocyte"])


def treated() -> ad.AnnData:
    """Control and treated cells, of which these lack B cells and CD14+ monocytes, and those NK cells."""
    return without(read(MERGED), "condition", stim=["B cells", "CD14+ Monocytes"], ctrl=["NK cells"])


def many_types(n_cells: int = 8_000, n_genes: int = 2_000, n_batch: int = 4) -> ad.AnnData:
    """60 simulated types, six to each of ten lineages, in shares of their own in each of four batches.

    Negative binomial counts. A lineage changes 200 genes and a type 100 more; a batch changes all by about 1.5 times.
    """
    rng, n_lineages, n_types = np.random.default_rng(0), 10, 60

    def changed(n_profiles: int, n_changed: int, strength: float) -> np.ndarray:
        chosen = rng.random((n_profiles, n_genes)).argsort(1) < n_changed
        return chosen * rng.normal(0, strength, (n_profiles, n_genes))

    lineage = np.arange(n_types) // (n_types // n_lineages)
    log_mean = rng.normal(-1, 1.5, n_genes) + changed(n_lineages, 200, 1.2)[lineage] + changed(n_types, 100, 1.5)
    shares = (rng.dirichlet(np.full(n_types, 1.0), n_batch) + rng.dirichlet(np.full(n_types, 1.5))) / 2
    batch = rng.integers(n_batch, size=n_cells)
    kind = np.array([rng.choice(n_types, p=shares[b]) for b in batch])
    mean = np.exp(log_mean[kind] + rng.normal(0, 0.4, (n_batch, n_genes))[batch])
    mean *= np.exp(rng.normal(8.2, 0.4, n_cells))[:, None] / mean.sum(1, keepdims=True)
    theta = np.exp(rng.normal(1, 0.7, n_genes))
    counts = sparse.csr_matrix(rng.poisson(rng.gamma(theta, mean / theta)).astype(np.float32))
    names = [f"cell{i}" for i in range(n_cells)]
    obs = pd.DataFrame({"batch": batch.astype(str), "cell_type": kind.astype(str)}, index=names)
    return ad.AnnData(counts, obs)


def parted(*shares: list[int], strength: float, seed: int, n_cells: int = 1_200, n_genes: int = 1_500) -> ad.AnnData:
    """Simulated batches in each of which six types have shares of their own; negative binomial counts, 3,000 a cell."""
    rng = np.random.default_rng(seed)
    batch = rng.integers(len(shares), size=n_cells)
    kind = np.array([rng.choice(6, p=np.array(shares[b]) / sum(shares[b])) for b in batch])
    changed = rng.normal(0, strength, (6, n_genes)) * (rng.random((6, n_genes)) < 0.08)
    mean = np.exp(rng.normal(0, 1.5, n_genes) + changed[kind] + rng.normal(0, 0.2, (len(shares), n_genes))[batch])
    mean *= 3000 * np.exp(rng.normal(0, 0.35, n_cells))[:, None] / mean.sum(1, keepdims=True)
    counts = sparse.csr_matrix(rng.poisson(mean * rng.gamma(3, 1 / 3, mean.shape)).astype(np.float32))
    names = [f"cell{i}" for i in range(n_cells)]
    return ad.AnnData(counts, pd.DataFrame({"batch": batch.astype(str), "cell_type": kind.astype(str)}, index=names))


def other_shares() -> ad.AnnData:
    """Three donors, who have many cells of other types each, and few of those they share."""
    adata = read(KANG)
    wanted = {
        "1015": {"CD14+ Monocytes": 150, "FCGR3A+ Monocytes": 150, "CD4 T cells": 20, "NK cells": 20},
        "1256": {"CD4 T cells": 150, "CD8 T cells": 130, "NK cells": 20, "CD14+ Monocytes": 20},
        "1488": {"NK cells": 110, "B cells": 150, "CD4 T cells": 20, "CD14+ Monocytes": 20},
    }
    groups = adata.obs.groupby(["batch", "cell_type"], observed=True).indices
    rows = [groups[donor, kind][:n] for donor, types in wanted.items() for kind, n in types.items()]
    return adata[np.sort(np.concatenate(rows))].copy()


DERIVED: dict[CellSet, Callable[[], ad.AnnData]] = {
    CellSet("zheng_kang", "batch"): lambda: studies((ZHENG, KANG)),
    CellSet("celseq2_smartseq2", "batch"): lambda: batches(read(PANCREAS), "celseq2", "smartseq2"),
    CellSet("indrop_celseq", "batch"): lambda: batches(read(PANCREAS), "indrop", "celseq"),
    CellSet("two_donors", "batch"): lambda: batches(read(KANG), "1015", "1256"),
    CellSet("treated_lack_types", "condition"): treated,
    CellSet("lines_lack_one", "batch"): lambda: without(read("mixology_3cl"), "batch", **{"CEL-seq2": ["H2228"]}),
    CellSet("studies_lack_types", "batch"): blood,
    CellSet("depths_apart", "batch"): thinned,
    CellSet("sorted_apart", "batch"): sorted_apart,
    CellSet("no_effect", "batch"): no_effect,
    CellSet("many_batches", "batch"): many_batches,
    CellSet("many_types", "batch"): many_types,
    CellSet("two_of_six", "batch"): lambda: parted([5, 5, 1, 1, 0, 0], [0, 0, 1, 1, 5, 5], strength=0.9, seed=3),
    CellSet("eight_to_one", "batch"): lambda: parted(
        [8, 8, 1, 1, 0, 0], [1, 1, 8, 8, 1, 1], [0, 0, 1, 1, 8, 8], strength=0.8, seed=0
    ),
    CellSet("other_shares", "batch"): other_shares,
}
