"""The labelled cell sets that the benchmarks read by path; none of them is part of sccvae."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

N_GENES = 2000


@dataclass(frozen=True)
class CellSet:
    """A set of labelled cells: its file, and the columns of batch and cell type."""

    name: str
    batch_key: str | None
    label_key: str = "cell_type"


MULTI_BATCH = [
    CellSet("mixology_3cl", "batch"),
    CellSet("kang2018_merged_labelled", "condition"),
    CellSet("kang2018_ctrl12k", "batch"),
    CellSet("pancreas_panc8_small_int", "batch"),
]
LABELLED = [
    CellSet("zheng2017_pbmc_facs", None),
    CellSet("pbmc3k_labelled", None),
    CellSet("kang2018_ctrl12k", "batch"),
    CellSet("mixology_3cl", "batch"),
    CellSet("kang2018_merged_labelled", "condition"),
    CellSet("pancreas_panc8_small_int", "batch"),
]


#: Blood cells of several studies together, by the genes they share, with types as coarse as the coarsest names them. No
#: setting was chosen by these but one (how counterparts are counted). Shares of types differ by up to ten times between
#: studies, and some types only one has.
STUDIES = {
    "pbmc_zheng_3k": ("zheng2017_pbmc_facs", "pbmc3k_labelled"),
    "pbmc_3k_kang": ("pbmc3k_labelled", "kang2018_ctrl12k"),
    "pbmc_zheng_3k_kang": ("zheng2017_pbmc_facs", "pbmc3k_labelled", "kang2018_ctrl12k"),
}
MULTI_STUDY = [CellSet(name, "study") for name in STUDIES]
#: Most cells of a study.
STUDY_CELLS = 4000
#: How the studies name a type begins with, and the type.
COARSE = {
    "CD14": "CD14+ monocyte",
    "FCGR3A": "FCGR3A+ monocyte",
    "CD34": "CD34+",
    "CD56": "NK",
    "NK": "NK",
    "CD8": "CD8 T",
    "CD4": "CD4 T",
    "Naive CD4": "CD4 T",
    "Memory CD4": "CD4 T",
    "CD19": "B",
    "B": "B",
    "D": "dendritic",
    "Platelet": "megakaryocyte",
    "Megakaryocytes": "megakaryocyte",
}


def data_dir() -> Path:
    """Folder of the sets, from SCCVAE_DATA_DIR."""
    folder = os.environ.get("SCCVAE_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        msg = f"SCCVAE_DATA_DIR={folder!r}: set it to the folder that holds the .h5ad files of the benchmark."
        raise SystemExit(msg)
    return Path(folder)


def load(cells: CellSet) -> ad.AnnData:
    """Read raw counts in X (CSR float32): the 2,000 genes most variable within batches (seurat_v3; all if fewer).

    ``layers["logged"]`` holds log-normalised counts (to 10,000 over all genes), for PCA.
    """
    from benchmarks.derived import DERIVED  # which stands on this file

    if cells in DERIVED:
        adata = DERIVED[cells]()
    else:
        adata = studies(STUDIES[cells.name], cells.batch_key) if cells.name in STUDIES else read(cells.name)
    adata.X = adata.X.astype(np.float32)
    adata.obs = adata.obs[[k for k in (cells.batch_key, cells.label_key) if k]].astype(str).astype("category")
    sc.pp.filter_genes(adata, min_cells=3)
    adata.layers["logged"] = adata.X.copy()
    sc.pp.normalize_total(adata, target_sum=1e4, layer="logged")
    sc.pp.log1p(adata, layer="logged")
    if adata.n_vars > N_GENES:
        # Within batches: genes that differ between technologies only would drown the cells.
        sc.pp.highly_variable_genes(adata, n_top_genes=N_GENES, flavor="seurat_v3", batch_key=cells.batch_key)
        adata = adata[:, adata.var["highly_variable"]].copy()
    return adata


def read(name: str) -> ad.AnnData:
    """A set as its file has it: raw counts in X, types in ``obs["cell_type"]``."""
    return ad.read_h5ad(data_dir() / f"{name}.h5ad")


def studies(names: tuple[str, ...], key: str = "batch") -> ad.AnnData:
    """Raw counts of several studies, at most 4,000 cells of each, with coarse types; ``key`` names the study."""
    rng, parts = np.random.default_rng(0), {}
    for name in names:
        part = read(name)
        kept = np.sort(rng.permutation(part.n_obs)[:STUDY_CELLS])
        types = [next(t for start, t in COARSE.items() if n.startswith(start)) for n in part.obs["cell_type"]]
        obs = pd.DataFrame({"cell_type": types}, index=part.obs_names)
        parts[name] = ad.AnnData(part.X, obs, pd.DataFrame(index=part.var_names))[kept]
    return ad.concat(parts, label=key, index_unique="-")
