"""Sets made of those at hand, on which no setting was chosen: two of the batches, types missing, depths apart."""

from __future__ import annotations

from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd

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
}
