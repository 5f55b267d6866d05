"""Query mapping: a batch left out of the reference and mapped on it, beside joint training and scANVI's surgery.

    SCCVAE_DATA_DIR=... python -m benchmarks.mapping [--data NAME] [--left-out BATCH] [--removed TYPE] [--write]

The batch is left out, a CVAE is trained on the rest, and the batch is mapped; the embedding of all cells is scored by
scib-metrics (0.6 bio + 0.4 batch, raw) beside that of a CVAE trained on all cells at once. Seconds are CPU seconds of
the process, since the machine may be shared. Labels: a GMVAE is trained on the labelled rest without one cell type as
well; the batch is mapped without its labels. Accuracy is over the cells of known types, AUROC is that of the outlier
score for cells of the removed type. scANVI is trained on the same cells (from scVI) and mapped by its own surgery.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from benchmarks.integration import score
from benchmarks.results import write_section
from benchmarks.sets import MULTI_BATCH, CellSet, load

QUIET = {"progress_bar": False, "accelerator": "cpu"}
#: Left-out batch and removed type of each set.
SPLITS = {
    "pancreas_panc8_small_int": ("indrop", "beta"),
    "kang2018_ctrl12k": ("1015", "B cells"),
    "mixology_3cl": ("Drop-seq", "H2228"),
    "kang2018_merged_labelled": ("stim", "B cells"),
}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` gives, and its CPU seconds."""
    start = time.process_time()
    return work(), time.process_time() - start


def _trained(cls: type, adata: ad.AnnData, seed: int, **setup: str) -> Any:
    cls.setup_anndata(adata, **setup)
    model = cls(adata, seed=seed)
    model.train(seed=seed, **QUIET)
    return model


def _mapped(reference: Any, adata: ad.AnnData, seed: int) -> Any:
    query = reference.load_query(adata)
    query.train(seed=seed, **QUIET)
    return query


def embedding(adata: ad.AnnData, cells: CellSet, out: np.ndarray, seed: int) -> dict[str, Any]:
    """Totals and CPU seconds of joint training and of mapping the cells ``out`` on the others."""
    from sccvae.model import CVAE

    joint, joint_seconds = timed(lambda: _trained(CVAE, adata.copy(), seed, batch_key=cells.batch_key))
    reference = _trained(CVAE, adata[~out].copy(), seed, batch_key=cells.batch_key)
    query, seconds = timed(lambda: _mapped(reference, adata[out].copy(), seed))
    found = {"joint": joint.get_latent_representation(), "mapped": query.get_latent_representation(adata)}
    untrained = reference.load_query(adata[out].copy())
    untrained.is_trained = True
    found["start"] = untrained.get_latent_representation(adata)
    table = score(adata, cells, found)
    row = {f"{name} {part.lower()}": float(table.loc[name, part]) for name in found for part in ("Total",)}
    for name in ("joint", "mapped"):
        row |= {
            f"{name} bio": table.loc[name, "Bio conservation"],
            f"{name} batch": table.loc[name, "Batch correction"],
        }
    return row | {"joint s": joint_seconds, "mapping s": seconds, "share of time": seconds / joint_seconds}


def labels(adata: ad.AnnData, cells: CellSet, out: np.ndarray, removed: str, seed: int, peers: bool) -> dict[str, Any]:
    """Accuracy over the known types of the mapped cells and AUROC of the removed one, of GMVAE, CVAE and scANVI."""
    from sccvae.model import CVAE, GMVAE

    truth = adata.obs[cells.label_key].astype(str).to_numpy()
    inside, strange = ~out & (truth != removed), truth[out] == removed
    reference, query = adata[inside].copy(), adata[out].copy()
    query.obs[cells.label_key] = np.nan
    row: dict[str, Any] = {"query cells": len(query), "removed cells": int(strange.sum())}
    for cls in (GMVAE, CVAE):
        name = cls.__name__
        model = _trained(cls, reference.copy(), seed, batch_key=cells.batch_key, labels_key=cells.label_key)
        mapped = _mapped(model, query, seed)
        table = mapped.transfer_labels()
        right = table["best_label"].astype(str).to_numpy() == truth[out]
        unknown = (table["label"] == "unknown").to_numpy()
        row |= {
            f"{name} accuracy": right[~strange].mean(),
            f"{name} AUROC": roc_auc_score(strange, table["outlier_score"]),
            f"{name} AUROC uncertainty": roc_auc_score(strange, table["uncertainty"]),
            f"{name} found unknown": unknown[strange].mean(),
            f"{name} falsely unknown": unknown[~strange].mean(),
            f"{name} ECE held out": model.calibration.get("expected_calibration_error"),
            f"{name} ECE query": _gap(table["probability"].to_numpy()[~strange], right[~strange]),
        }
    print(pd.Series(row).to_string(), flush=True)
    if peers:
        predicted, seconds = scanvi(reference, query, cells, seed)
        row |= {"scANVI accuracy": (predicted == truth[out])[~strange].mean(), "scANVI surgery s": seconds}
    return row


def _gap(probability: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    at = np.minimum((probability * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(at, weights=right - probability, minlength=bins)).sum() / len(right))


def scanvi(reference: ad.AnnData, query: ad.AnnData, cells: CellSet, seed: int) -> tuple[np.ndarray, float]:
    """Labels that scANVI's own surgery gives the query, and the CPU seconds of the surgery."""
    import scvi

    scvi.settings.seed = seed
    reference, query = reference.copy(), query.copy()
    query.obs[cells.label_key] = "Unknown"
    quiet = {"enable_progress_bar": False, "accelerator": "cpu"}
    scvi.model.SCVI.setup_anndata(reference, batch_key=cells.batch_key, labels_key=cells.label_key)
    # The options that its authors' tutorial gives a reference for surgery.
    base = scvi.model.SCVI(
        reference, use_layer_norm="both", use_batch_norm="none", encode_covariates=True, gene_likelihood="nb"
    )
    base.train(max_epochs=min(400, round(20_000 / len(reference) * 20)), **quiet)
    model = scvi.model.SCANVI.from_scvi_model(base, unlabeled_category="Unknown")
    model.train(max_epochs=20, **quiet)

    def surgery() -> Any:
        mapped = scvi.model.SCANVI.load_query_data(query, model)
        mapped.train(max_epochs=100, plan_kwargs={"weight_decay": 0.0}, check_val_every_n_epoch=101, **quiet)
        return mapped

    mapped, seconds = timed(surgery)
    return np.asarray(mapped.predict()).astype(str), seconds


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="pancreas_panc8_small_int", choices=list(SPLITS))
    parser.add_argument("--left-out", help="batch to map")
    parser.add_argument("--removed", help="cell type that the reference of the labels does not hold")
    parser.add_argument("--max-cells", type=int, help="a random subset of the cells, for a quick look")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--parts", nargs="+", default=["embedding", "labels", "scanvi"])
    parser.add_argument("--write", action="store_true", help="write the section of benchmarks/RESULTS.md")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # scib-metrics and jax; not ours
    cells = next(c for c in MULTI_BATCH if c.name == args.data)
    left_out, removed = args.left_out or SPLITS[args.data][0], args.removed or SPLITS[args.data][1]
    adata = load(cells)
    if args.max_cells and adata.n_obs > args.max_cells:
        some = np.random.default_rng(0).choice(adata.n_obs, args.max_cells, replace=False)
        adata = adata[np.sort(some)].copy()
    out = (adata.obs[cells.batch_key].astype(str) == left_out).to_numpy()
    rows = []
    for seed in args.seeds:
        row = {"set": cells.name, "cells": adata.n_obs, "left out": left_out, "removed": removed, "seed": seed}
        if "labels" in args.parts:
            row |= labels(adata, cells, out, removed, seed, "scanvi" in args.parts)
        if "embedding" in args.parts:
            row |= embedding(adata, cells, out, seed)
        rows.append(row)
        print(pd.Series(row).to_string(), flush=True)
    if args.write:
        table = pd.DataFrame(rows).round(3)
        write_section(
            f"Query mapping: {cells.name}", __doc__.split("\n\n", 2)[2], table, "python -m benchmarks.mapping"
        )


if __name__ == "__main__":
    main()
