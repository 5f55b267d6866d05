"""Batch removal: CVAE and GMVAE beside PCA, Harmony, scVI and scANVI, judged by scib-metrics.

    SCCVAE_DATA_DIR=... python -m benchmarks.integration [--data NAME ...] [--seeds 3]

All run at their defaults. Totals are 0.6 bio + 0.4 batch of the raw metrics (no min-max scaling): the median over the
seeds, with the worst. Labels are used for scoring only, but for the methods whose names say so: these are given all.
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

from benchmarks.derived import DERIVED
from benchmarks.results import write_section
from benchmarks.sets import MULTI_BATCH, MULTI_STUDY, CellSet, load

N_PCS = 30
SETS = [*MULTI_BATCH, *MULTI_STUDY, *DERIVED]
KEPT = """One cell type is left in one batch only, on purpose. Purity: share of the same type among the 15 nearest other
cells, in 30 principal components (before) and in the embedding (after)."""


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
    return _scvi(adata, cells, seed).get_latent_representation()


def scanvi(adata: ad.AnnData, cells: CellSet, seed: int) -> np.ndarray:
    """From that scVI, as its authors advise: 20 epochs of scANVI, all labels given."""
    from scvi.model import SCANVI

    model = SCANVI.from_scvi_model(_scvi(adata, cells, seed), unlabeled_category="unknown", labels_key=cells.label_key)
    model.train(max_epochs=20, enable_progress_bar=False, accelerator="cpu")
    return model.get_latent_representation()


def _scvi(adata: ad.AnnData, cells: CellSet, seed: int):
    import scvi as scvi_tools

    scvi_tools.settings.seed = seed
    copy = adata.copy()
    scvi_tools.model.SCVI.setup_anndata(copy, batch_key=cells.batch_key)
    model = scvi_tools.model.SCVI(copy, gene_likelihood="nb")
    # 12,000 cells on two cores: 60 epochs, as many optimiser steps as the default gives 1,800 cells
    model.train(max_epochs=60 if adata.n_obs > 10_000 else None, enable_progress_bar=False, accelerator="cpu")
    return model


def cvae(adata: ad.AnnData, cells: CellSet, seed: int) -> np.ndarray:
    """Our CVAE at its defaults."""
    return _ours("CVAE", adata, seed, batch_key=cells.batch_key)


def gmvae(adata: ad.AnnData, cells: CellSet, seed: int) -> np.ndarray:
    """Our GMVAE at its defaults: it chooses the number of clusters."""
    return _ours("GMVAE", adata, seed, batch_key=cells.batch_key)


def labelled_gmvae(adata: ad.AnnData, cells: CellSet, seed: int) -> np.ndarray:
    """Our GMVAE at its defaults, all labels given."""
    return _ours("GMVAE", adata, seed, batch_key=cells.batch_key, labels_key=cells.label_key)


def _ours(name: str, adata: ad.AnnData, seed: int, **keys: str) -> np.ndarray:
    import sccvae

    copy, cls = adata.copy(), getattr(sccvae.model, name)
    cls.setup_anndata(copy, **keys)
    model = cls(copy, seed=seed)
    model.train(seed=seed, progress_bar=False, accelerator="cpu")
    return model.get_latent_representation()


METHODS: dict[str, Callable] = {
    "PCA": pca,
    "Harmony": harmony,
    "scVI": scvi,
    "CVAE": cvae,
    "GMVAE": gmvae,
    "scANVI, labels": scanvi,
    "GMVAE, labels": labelled_gmvae,
}
OURS = ("CVAE", "GMVAE", "GMVAE, labels")
SEEDED = {"scVI", "scANVI, labels", *OURS}


def score(adata: ad.AnnData, cells: CellSet, embeddings: dict[str, np.ndarray]) -> pd.DataFrame:
    """scib-metrics of each embedding: one row each, every metric and the raw bio, batch and total."""
    from sccvae.metrics import integration

    batch, labels = adata.obs[cells.batch_key], adata.obs[cells.label_key]
    return integration(embeddings, batch, labels, unintegrated=pca(adata, cells, 0))


def hold_out(adata: ad.AnnData, cells: CellSet, label: str) -> ad.AnnData:
    """The cells without those of a type in all batches but the one that has most of it."""
    of_type = adata.obs[cells.label_key] == label
    if not of_type.any():
        msg = f"{cells.name} has no cells of type {label!r}: {list(adata.obs[cells.label_key].cat.categories)}."
        raise SystemExit(msg)
    home = adata.obs.loc[of_type, cells.batch_key].value_counts().index[0]
    return adata[(~of_type | (adata.obs[cells.batch_key] == home)).to_numpy()].copy()


def keep_apart(cells: CellSet, label: str, methods: list[str], n_seeds: int) -> pd.DataFrame:
    """Is a type that one batch only has still apart? One row for each method and seed, of :func:`overcorrection`."""
    from sccvae.metrics import overcorrection

    adata = hold_out(load(cells), cells, label)
    batch, labels = adata.obs[cells.batch_key], adata.obs[cells.label_key]
    before = pca(adata, cells, 0)
    found = []
    for name in methods:
        for seed in range(n_seeds if name in SEEDED else 1):
            z, seconds = embed(adata, cells, name, seed, None)
            table = overcorrection(z, batch, labels, unintegrated=before)
            others = table[table["label"] != label]
            row = table[table["label"] == label].assign(set=cells.name, method=name, seed=seed, seconds=seconds)
            found.append(
                row.assign(**{"worst other": others["purity_after"].min(), "fell, other": others["fell"].sum()})
            )
    columns = ["set", "label", "batch", "n_cells", "method", "seed", "purity_before", "purity_after", "mixed_with"]
    return pd.concat(found)[[*columns, "worst other", "fell, other", "seconds"]]


def embed(adata: ad.AnnData, cells: CellSet, method: str, seed: int, cache: Path | None) -> tuple[np.ndarray, float]:
    """Embedding and its seconds; those of peers are kept in ``cache``, ours are always made anew."""
    file = None if cache is None or method in OURS else cache / f"{cells.name}-{method}-{seed}.npz"
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
    usual = [c.name for c in SETS if c not in DERIVED]
    parser.add_argument(
        "--data", nargs="+", default=usual, choices=[c.name for c in SETS], help="those of derived.py too"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="folder that keeps the embeddings of the peers between runs")
    parser.add_argument("--table", type=Path, help="CSV of single runs to add to: a long benchmark in several parts")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/RESULTS.md as it is")
    parser.add_argument(
        "--hold-out-type", metavar="TYPE", help="leave this type in one batch only: does it stay apart?"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # scib-metrics and jax; not ours
    if args.hold_out_type:
        sets = [c for c in SETS if c.name in args.data]
        table = pd.concat([keep_apart(c, args.hold_out_type, args.methods, args.seeds) for c in sets]).round(3)
        print(table.to_string(index=False))
        if not args.no_write:
            options = f"--data {' '.join(args.data)} --hold-out-type {args.hold_out_type!r} --seeds {args.seeds}"
            write_section("A type of one batch", KEPT, table, f"python -m benchmarks.integration {options}")
        return
    key = ["set", "method", "seed"]
    table = pd.read_csv(args.table, dtype={"seed": str}) if args.table and args.table.exists() else pd.DataFrame()
    for cells in (c for c in SETS if c.name in args.data):
        new = run(cells, args.methods, args.seeds, args.cache)
        table = pd.concat([table, new]).drop_duplicates(key, keep="last")
        if args.table:
            table.to_csv(args.table, index=False)
        print(summarise(new).iloc[:, 1:8].round(3).to_string(index=False), flush=True)
    order = table.assign(at=table["set"].map({c.name: i for i, c in enumerate(SETS)})).sort_values(["at", *key[1:]])
    if not args.no_write:
        command = "python -m benchmarks.integration --seeds 3"
        write_section(
            "Batch removal", __doc__.split("\n\n", 2)[2], summarise(order.drop(columns="at")).round(3), command
        )


if __name__ == "__main__":
    main()
