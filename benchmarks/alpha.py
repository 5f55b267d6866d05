"""Concentration: how alpha, of the GMVAE's Dirichlet prior, steers the components in use.

    SCCVAE_DATA_DIR=... python -m benchmarks.alpha [--seeds 3]

K = 20 components on pbmc3k, which has nine types. *Per cell* is exp of the mean entropy of q(y|.): between how many
components a cell stands. *In use* are the components with at least 0.5 % of the cells, by their most probable one;
*effective* is exp of the entropy of the mean occupancy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.results import write_section
from benchmarks.sets import LABELLED, load
from sccvae import metrics
from sccvae.model import GMVAE

ALPHAS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
DATA, K, IN_USE = "pbmc3k_labelled", 20, 0.005
PLOT = "alpha.png"


def measure(alpha: float, seed: int) -> dict[str, float]:
    """One training."""
    data = next(s for s in LABELLED if s.name == DATA)
    adata = load(data)
    GMVAE.setup_anndata(adata, batch_key=data.batch_key)
    model = GMVAE(adata, n_components=K, alpha=alpha, seed=seed)
    model.train(seed=seed, accelerator="cpu", progress_bar=False)
    q = model.predict_proba()
    share = np.bincount(q.argmax(1), minlength=K) / len(q)
    return {
        "alpha": alpha,
        "seed": seed,
        "per cell": float(np.exp(model.get_entropy().mean())),
        "in use": int((share >= IN_USE).sum()),
        "effective": model.effective_n_components(),
        "ari": metrics.clustering(adata.obs[data.label_key].astype(str), model.predict().astype(str))["ari"],
    }


def draw(table: pd.DataFrame, path: Path) -> None:
    """The three numbers over alpha: every run, and a line through the medians."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.0), layout="constrained")
    titles = {
        "per cell": "components a cell stands between",
        "in use": "components with 0.5 % of the cells",
        "effective": "effective number of components",
    }
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        ax.plot(table["alpha"], table[name], "o", color="#9AA5B1", markersize=4)
        median = table.groupby("alpha")[name].median()
        ax.plot(median.index, median.to_numpy(), color="#1F4E79")
        ax.set(xscale="log", xlabel="alpha", ylim=(0, K + 0.5))
        ax.set_title(title, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        for alpha in ALPHAS:
            rows.append(measure(alpha, seed))
            print({k: round(v, 4) for k, v in rows[-1].items()}, flush=True)
    table = pd.DataFrame(rows)
    draw(table, Path(__file__).with_name(PLOT))
    medians = table.drop(columns="seed").groupby("alpha").median().round(3).reset_index()
    command = f"python -m benchmarks.alpha --seeds {args.seeds}"
    write_section("Concentration", __doc__.split("\n\n", 2)[2], medians, command, (PLOT,))


if __name__ == "__main__":
    main()
