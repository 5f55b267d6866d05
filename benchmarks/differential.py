"""Differential expression and correction, judged by a known truth.

    python -m benchmarks.differential [--seeds 3] [--scvi]

1,500 cells of three types x 1,000 genes: negative binomial counts, median depth 3,000, 100 genes of each of two types
changed by 2 to 4 times. Then `sccvae.datasets.plant_batch_effect` with three batches, strength 0.5: cells dealt to the
batches at random, or (confounded) each type in proportions of its own. Called at FDR 5 %, t1 and t2 each against t0.
Correlation of the corrected layer (average over the batches) with the proportions that the counts were drawn from, for
each gene that differs between types, median over genes: over cells, and over means of each type and batch.
"""

from __future__ import annotations

import argparse
import time

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from benchmarks.results import write_section
from sccvae.datasets import plant_batch_effect
from sccvae.metrics import gene_correlation

FDR = 0.05


def simulate(
    seed: int, confounded: bool = False, n: int = 1500, n_genes: int = 1000, n_changed: int = 100
) -> ad.AnnData:
    """Cells with a batch effect; the truth is in ``varm``: log2 fold changes against t0, and proportions."""
    rng = np.random.default_rng(seed)
    change = np.zeros((3, n_genes))
    for kind in (1, 2):
        genes = rng.choice(n_genes, n_changed, replace=False)
        change[kind, genes] = rng.uniform(1, 2, n_changed) * rng.choice([-1, 1], n_changed)
    proportions = rng.lognormal(0, 1.5, n_genes) * 2**change
    proportions /= proportions.sum(1, keepdims=True)
    kind = rng.integers(0, 3, n)
    mean = rng.lognormal(np.log(3000), 0.3, (n, 1)) * proportions[kind]
    counts = rng.poisson(mean * rng.gamma(5.0, 1 / 5.0, mean.shape)).astype(np.float32)
    seen = (counts > 0).sum(0) >= 3
    obs = pd.DataFrame({"type": pd.Categorical.from_codes(kind, ["t0", "t1", "t2"])}, index=[f"c{i}" for i in range(n)])
    var = pd.DataFrame(index=[f"g{i}" for i in np.flatnonzero(seen)])
    adata = ad.AnnData(sparse.csr_matrix(counts[:, seen]), obs=obs, var=var)
    adata.layers["counts"] = adata.X.copy()
    planted = plant_batch_effect(adata, n_batches=3, strength=0.5, label_key="type" if confounded else None, seed=seed)
    planted.varm["log2_fold_change"] = change[:, seen].T
    planted.varm["proportions"] = proportions[:, seen].T
    return planted


def judge(table: pd.DataFrame, adata: ad.AnnData, column: str) -> dict[str, float]:
    """False among the called, and the share of the planted genes that is called, over t1 and t2."""
    called = table.groupby("group1", observed=True)[column]
    planted = pd.DataFrame(adata.varm["log2_fold_change"] != 0, index=adata.var_names, columns=["t0", "t1", "t2"])
    hit = [(planted.loc[c.index, kind].to_numpy(), c.to_numpy(bool)) for kind, c in called]
    truth, call = (np.concatenate(part) for part in zip(*hit, strict=True))
    return {"called": int(call.sum()), "false": (call & ~truth).sum() / max(1, call.sum()), "found": call[truth].mean()}


def ours(adata: ad.AnnData, seed: int) -> list[dict]:
    """Our CVAE at its defaults, with and without batch correction."""
    from sccvae.model import CVAE

    start = time.perf_counter()
    CVAE.setup_anndata(adata, layer="counts", batch_key="batch")
    model = CVAE(adata, seed=seed)
    model.train(seed=seed, progress_bar=False, accelerator="cpu")
    trained = time.perf_counter() - start
    batches = adata.obs["batch"].cat.categories.tolist()
    corrected = model.get_normalized_expression(transform_batch=batches, return_numpy=True)
    differ = (adata.varm["log2_fold_change"] != 0).any(1)
    truth = adata.varm["proportions"].T[adata.obs["type"].cat.codes]
    group = adata.obs["type"].astype(str) + adata.obs["batch"].astype(str)
    means = [pd.DataFrame(m).groupby(group.to_numpy()).mean() for m in (corrected, truth)]
    correlations = {
        "r, cells": np.nanmedian(gene_correlation(corrected, truth)[differ]),
        "r, means": np.nanmedian(gene_correlation(*means)[differ]),
    }
    rows = []
    for correct in (True, False):
        for delta in (0.25, 0.5):
            start = time.perf_counter()
            table = model.differential_expression(
                groupby="type", group2="t0", batch_correction=correct, delta=delta, fdr_target=FDR, silent=True
            )
            row = {"method": "CVAE" if correct else "CVAE, own batch", "delta": delta, "seed": seed}
            row |= judge(table, adata, f"is_de_fdr_{FDR}") | correlations
            rows.append(row | {"train s": trained, "test s": time.perf_counter() - start})
    return rows


def peers(adata: ad.AnnData, seed: int, with_scvi: bool) -> list[dict]:
    """Wilcoxon tests of log-normalised counts, blind to the batch; and scVI's own differential expression."""
    import scanpy as sc

    copy = adata.copy()
    sc.tl.rank_genes_groups(copy, "type", groups=["t1", "t2"], reference="t0", method="wilcoxon")
    table = sc.get.rank_genes_groups_df(copy, None).rename(columns={"group": "group1", "names": "gene"})
    table["called"] = table["pvals_adj"] < FDR
    rows = [{"method": "Wilcoxon", "seed": seed} | judge(table.set_index("gene"), adata, "called")]
    if with_scvi:
        import scvi

        scvi.settings.seed = seed
        scvi.model.SCVI.setup_anndata(copy, layer="counts", batch_key="batch")
        model = scvi.model.SCVI(copy, gene_likelihood="nb")
        model.train(max_epochs=100, enable_progress_bar=False, accelerator="cpu")
        options = {"mode": "change", "delta": 0.25, "batch_correction": True, "fdr_target": FDR, "silent": True}
        table = model.differential_expression(groupby="type", group1=["t1", "t2"], group2="t0", **options)
        rows.append({"method": "scVI", "delta": 0.25, "seed": seed} | judge(table, adata, f"is_de_fdr_{FDR}"))
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scvi", action="store_true", help="scVI's own differential expression as well")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/RESULTS.md as it is")
    args = parser.parse_args()
    rows = []
    for confounded in (False, True):
        for seed in range(args.seeds):
            adata = simulate(seed, confounded)
            new = [*ours(adata, seed), *peers(adata, seed, args.scvi)]
            rows += [{"batches": "confounded" if confounded else "random"} | row for row in new]
            print(confounded, pd.DataFrame(new).round(3).to_string(index=False), flush=True)
    grouped = pd.DataFrame(rows).fillna({"delta": 0}).groupby(["batches", "method", "delta"], sort=False)
    table = grouped.median(numeric_only=True).drop(columns="seed")
    table.insert(2, "worst false", grouped["false"].max())
    table = table.reset_index().round(3)
    print(table.to_string(index=False))
    if not args.no_write:
        text = __doc__.split("\n\n", 2)[2]
        write_section("Differential expression", text, table, f"python -m benchmarks.differential --seeds {args.seeds}")


if __name__ == "__main__":
    main()
