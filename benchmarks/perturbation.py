"""Perturbation prediction: a cell type that was never seen stimulated, Kang et al. 2018 (interferon beta).

    SCCVAE_DATA_DIR=... python -m benchmarks.perturbation [--types NAME ...] [--methods NAME ...] [--seeds 3] [--write]

Each of five cell types is held out of the stimulated cells in turn. Its control cells are predicted and compared with
its stimulated cells on the log-normalised scale: R² of the mean expression over all genes and over the 100 most
differential genes (Wilcoxon, two-sided, real stimulated against control), and the share of these 100 that the
prediction finds. The median over the seeds, and the worst. "scGen-style" is scGen's published model and arithmetic
written with our VAE: unit normal likelihood on log-normalised values, 2 x 800 hidden, 100 latent dimensions, dropout
0.2, KL weight 2.5e-5, 100 epochs of mini-batches of 32. "shift" adds the mean change of the other types to the
controls, "controls" changes nothing. Count models draw ten cells for each control.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from benchmarks.results import write_section
from benchmarks.sets import CellSet, load
from sccvae.metrics import perturbation_scores

SET = CellSet("kang2018_merged_labelled", "condition")
CONTROL, STIMULATED = "ctrl", "stim"
TYPES = ("CD4 T cells", "CD14+ Monocytes", "B cells", "CD8 T cells", "FCGR3A+ Monocytes")
N_DRAWS = 10
STATES = {"condition_key": SET.batch_key, "cell_type_key": SET.label_key}


def log_normalised(counts: np.ndarray) -> np.ndarray:
    """log(1 + counts scaled to 10,000 a cell), as ``layers["logged"]``."""
    return np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * 1e4)


def simple(seen: ad.AnnData, controls: ad.AnnData, seed: int, train: dict) -> dict[str, np.ndarray]:
    """No prediction at all; and the mean change of the types that have both states, each type with the same weight."""
    del seed, train
    logged = pd.DataFrame(seen.layers["logged"].toarray())
    means = logged.groupby([seen.obs[SET.batch_key].to_numpy(), seen.obs[SET.label_key].to_numpy()]).mean()
    change = (means.loc[STIMULATED] - means.loc[CONTROL]).dropna().mean().to_numpy()
    own = controls.layers["logged"].toarray()
    return {"controls": own, "shift": own + change}


def cvae(seen: ad.AnnData, controls: ad.AnnData, seed: int, train: dict) -> dict[str, np.ndarray]:
    """Our CVAE, told the condition; controls encoded as such and drawn as stimulated."""
    from sccvae.model import CVAE

    CVAE.setup_anndata(seen, batch_key=SET.batch_key)
    model = CVAE(seen, seed=seed)
    model.train(seed=seed, progress_bar=False, accelerator="cpu", **train)
    return {"CVAE counterfactual": _draws(model, controls, condition={SET.batch_key: STIMULATED})}


def arithmetic(seen: ad.AnnData, controls: ad.AnnData, seed: int, train: dict) -> dict[str, np.ndarray]:
    """Our VAE of counts, not told the condition; controls moved in the latent space."""
    from sccvae.model import VAE

    VAE.setup_anndata(seen)
    model = VAE(seen, seed=seed)
    model.train(seed=seed, progress_bar=False, accelerator="cpu", **train)
    return {"VAE arithmetic": _draws(model, controls, shift=model.latent_delta(CONTROL, STIMULATED, **STATES))}


def scgen(seen: ad.AnnData, controls: ad.AnnData, seed: int, train: dict) -> dict[str, np.ndarray]:
    """What scGen publishes: a wide VAE with hardly any KL on log-normalised values, and latent arithmetic."""
    from sccvae.distributions import Normal
    from sccvae.model import VAE

    wide = {"n_latent": 100, "n_hidden": 800, "n_layers": 2, "dropout": 0.2, "activation": "leaky_relu"}
    # scGen's loss is half the square error plus half of 5e-5 KL
    options = {"max_epochs": 100, "batch_size": 32, "kl_weight": 2.5e-5, "kl_warmup": 0.0, "train_size": 1.0}
    VAE.setup_anndata(seen, layer="logged")
    model = VAE(seen, likelihood=Normal("unit"), seed=seed, **wide)
    model.train(seed=seed, progress_bar=False, accelerator="cpu", **options | train)
    values = model.predict_perturbation(CONTROL, STIMULATED, adata=controls, return_numpy=True, **STATES)
    return {"scGen-style": values}


def _draws(model, controls: ad.AnnData, **what) -> np.ndarray:
    draws = [model.posterior_predictive_sample(controls, seed=i, **what).toarray() for i in range(N_DRAWS)]
    return log_normalised(np.concatenate(draws))


METHODS: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "simple": simple,
    "scgen": scgen,
    "arithmetic": arithmetic,
    "cvae": cvae,
}


def run(adata: ad.AnnData, held_out: str, family: str, seed: int, train: dict) -> list[dict]:
    """Hold one type out of the stimulated cells, predict it, and score: one row for each method of the family."""
    is_type = (adata.obs[SET.label_key] == held_out).to_numpy()
    stimulated = (adata.obs[SET.batch_key] == STIMULATED).to_numpy()
    seen = adata[~(is_type & stimulated)].copy()
    controls, real = adata[is_type & ~stimulated].copy(), adata[is_type & stimulated].copy()
    start = time.perf_counter()
    predicted = METHODS[family](seen, controls, seed, train)
    seconds = time.perf_counter() - start
    row = {"held out": held_out, "family": family, "seed": seed, "seconds": seconds}
    real, control = real.layers["logged"], controls.layers["logged"]
    return [row | {"method": name} | perturbation_scores(x, real, control) for name, x in predicted.items()]


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Median over the seeds and the worst, for each held-out type and method."""
    scores = ["r2", "r2_top", "de_overlap"]
    grouped = table.groupby(["held out", "method"], sort=False)
    found = grouped[[*scores, "seconds"]].median().join(grouped[scores].min(), rsuffix=" worst")
    found.insert(0, "seeds", grouped.size())
    order = {name: i for i, name in enumerate(TYPES)}
    found = found.reset_index().sort_values("held out", key=lambda column: column.map(order), kind="stable")
    return found[["held out", "method", "seeds", *(f"{s}{end}" for s in scores for end in ("", " worst")), "seconds"]]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(TYPES), help="cell types to hold out, one at a time")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-epochs", type=int, help="of every training (default: the method's own)")
    parser.add_argument("--table", type=Path, help="CSV of single runs to add to: a long benchmark in several parts")
    parser.add_argument("--write", action="store_true", help="write the section in benchmarks/RESULTS.md")
    args = parser.parse_args()
    adata = load(SET)
    unknown = [t for t in args.types if t not in set(adata.obs[SET.label_key])]
    if unknown:
        parser.error(f"no cell is of type {unknown}; there are {sorted(set(adata.obs[SET.label_key]))}")
    train = {} if args.max_epochs is None else {"max_epochs": args.max_epochs}
    key = ["held out", "family", "seed"]
    table = pd.read_csv(args.table) if args.table and args.table.exists() else pd.DataFrame(columns=key)
    done = set(table[key].itertuples(index=False, name=None))
    for seed in range(args.seeds):
        for family in args.methods:
            for held_out in args.types:
                if (seed and family == "simple") or (held_out, family, seed) in done:
                    continue
                rows = run(adata, held_out, family, seed, train)
                for row in rows:
                    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                table = pd.DataFrame([*table.to_dict("records"), *rows])
                if args.table:
                    table.to_csv(args.table, index=False)
    summary = summarise(table).round(3)
    print(summary.to_string(index=False))
    if args.write:
        command = f"python -m benchmarks.perturbation --seeds {args.seeds}"
        command += f" --max-epochs {args.max_epochs}" if args.max_epochs else ""
        write_section("Perturbation", __doc__.split("\n\n", 2)[2], summary, command)


if __name__ == "__main__":
    main()
