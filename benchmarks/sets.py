"""The labelled cell sets that the benchmarks read by path; none of them is part of sccvae."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
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
    adata = ad.read_h5ad(data_dir() / f"{cells.name}.h5ad")
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
