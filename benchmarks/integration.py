"""Batch removal: the CVAE beside PCA, Harmony and scVI, judged by scib-metrics.

    SCCVAE_DATA_DIR=... python -m benchmarks.integration [--data NAME ...] [--seeds 3]

Peers run at their defaults. Totals are 0.6 bio + 0.4 batch of the raw metrics (no min-max scaling): the median over the
seeds, with the worst. Labels are used for scoring only.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

from benchmarks.results import write_section
from benchmarks.sets import MULTI_BATCH, CellSet, load

N_PCS = 30


def pca(adata: ad.AnnData, cells: CellSet, seed: int) -> np.ndarray:
    """30 principal components of log-normalised counts."""
    del cells, seed
    return sc.pp.pca(adata.layers["logged"], n_comps=N_PCS)


def harmony(adata: ad.AnnData, cells: CellSet, seed: int) -> np.ndarray:
    """Harmony on 30 principal components."""
    from harmonypy import run_harmony

    corrected = run_harmony(
        pca(adata, cells, seed), adata.obs, cells.batch_key, random_state=seed, verbose=False
    ).Z_corr
    corrected = np.asarray(corrected)
    return corrected if corrected.shape[0] == adata.n_obs else corrected.T


def scvi(adata: ad.AnnData, cells: CellSet, seed: int) -> np.ndarray:
    """The scVI model at its defaults (10 latent dimensions, NB by default of the version, default epochs)."""
    import scvi as scvi_tools

    scvi_tools.settings.seed = seed
    copy = adata.copy()
    scvi_tools.model.SCVI.setup_anndata(copy, batch_key=cells.batch_key)
    model = scvi_tools.model.SCVI(copy, gene_likelihood="nb")
    # 12,000 cells on two cores: 60 epochs, as many optimiser steps as the default gives 1,800 cells
    model.train(max_epochs=60 if adata.n_obs > 10_000 else None, enable_progress_bar=False, accelerator="cpu")
    return model.get_latent_representation()


def cvae(adata: ad.AnnData, cells: CellSet, seed: int, **options) -> np.ndarray:
    """Our CVAE at its defaults."""
    from sccvae.model import CVAE

    copy = adata.copy()
    CVAE.setup_anndata(copy, batch_key=cells.batch_key)
    train_options = options.pop("train", {})
    model = CVAE(copy, seed=seed, **options)
    model.train(seed=seed, progress_bar=False, accelerator="cpu", **train_options)
    return model.get_latent_representation()


METHODS: dict[str, Callable] = {"PCA": pca, "Harmony": harmony, "scVI": scvi, "CVAE": cvae}
SEEDED = {"scVI", "CVAE"}


def score(adata: ad.AnnData, cells: CellSet, embeddings: dict[str, np.ndarray]) -> pd.DataFrame:
    """scib-metrics of each embedding: one row each, every metric and the raw bio, batch and total."""
    from scib_metrics.benchmark import BatchCorrection, Benchmarker, BioConservation

    judged = adata.copy()
    judged.obsm.update(embeddings)
    judged.obsm["unintegrated"] = pca(adata, cells, 0)
    benchmark = Benchmarker(
        judged,
        batch_key=cells.batch_key,
        label_key=cells.label_key,
        embedding_obsm_keys=list(embeddings),
        pre_integrated_embedding_obsm_key="unintegrated",
        bio_conservation_metrics=BioConservation(),
        batch_correction_metrics=BatchCorrection(),
        n_jobs=1,
        progress_bar=False,
    )
    benchmark.benchmark()
    table = benchmark.get_results(min_max_scale=False)
    return table.drop(index="Metric Type").astype(float)


def embed(adata: ad.AnnData, cells: CellSet, method: str, seed: int, cache: Path | None) -> tuple[np.ndarray, float]:
    """Embedding and its seconds; those of peers are kept in ``cache``, ours are always made anew."""
    file = None if cache is None or method == "CVAE" else cache / f"{cells.name}-{method}-{seed}.npz"
    if file is not None and file.exists():
        kept = np.load(file)
        return kept["z"], float(kept["seconds"])
    start = time.perf_counter()
    z = np.asarray(METHODS[method](adata, cells, seed))
    seconds = time.perf_counter() - start
    print(f"{cells.name}: {method} seed {seed}: {seconds:.0f} s", flush=True)
    if file is not None:
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(file, z=z, seconds=seconds)
    return z, seconds


def run(cells: CellSet, methods: list[str], n_seeds: int, cache: Path | None) -> pd.DataFrame:
    """Embed by every method and seed, score all in one go, and give the long table."""
    adata = load(cells)
    embeddings, seconds = {}, {}
    for name in methods:
        for seed in range(n_seeds if name in SEEDED else 1):
            key = f"{name}/{seed}"
            embeddings[key], seconds[key] = embed(adata, cells, name, seed, cache)
    table = score(adata, cells, embeddings)
    table["seconds"] = pd.Series(seconds)
    table.insert(0, "set", cells.name)
    table.insert(1, "method", [k.split("/")[0] for k in table.index])
    table.insert(2, "seed", [k.split("/")[1] for k in table.index])
    return table.reset_index(drop=True)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Median over seeds of every metric, with the worst total."""
    numbers = table.select_dtypes("number").columns
    grouped = table.groupby(["set", "method"], sort=False)
    summary = grouped[list(numbers)].median()
    summary.insert(0, "worst total", grouped["Total"].min())
    summary.insert(0, "seeds", grouped["Total"].count())
    first = ["seeds", "Total", "worst total", "Bio conservation", "Batch correction", "seconds"]
    return summary[first + [c for c in summary if c not in first]].reset_index()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[c.name for c in MULTI_BATCH])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="folder that keeps the embeddings of the peers between runs")
    parser.add_argument("--table", type=Path, help="CSV of single runs to add to: a long benchmark in several parts")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/RESULTS.md as it is")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # scib-metrics and jax; not ours
    key = ["set", "method", "seed"]
    table = pd.read_csv(args.table, dtype={"seed": str}) if args.table and args.table.exists() else pd.DataFrame()
    for cells in (c for c in MULTI_BATCH if c.name in args.data):
        new = run(cells, args.methods, args.seeds, args.cache)
        table = pd.concat([table, new]).drop_duplicates(key, keep="last")
        if args.table:
            table.to_csv(args.table, index=False)
        print(summarise(new).iloc[:, 1:8].round(3).to_string(index=False), flush=True)
    order = table.assign(at=table["set"].map({c.name: i for i, c in enumerate(MULTI_BATCH)})).sort_values(
        ["at", *key[1:]]
    )
    if not args.no_write:
        command = "python -m benchmarks.integration --seeds 3"
        write_section(
            "Batch removal", __doc__.split("\n\n", 2)[2], summarise(order.drop(columns="at")).round(3), command
        )


if __name__ == "__main__":
    main()
