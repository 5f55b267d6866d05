"""Clustering: the GMVAE on images and on labelled cells, with peers beside it.

    SCCVAE_DATA_DIR=... python -m benchmarks.clustering --data mnist [--components 10] [--labels 100] [--seeds 3]

Labels score the clusters and are not seen in training, but for the share given by ``--labels``. Test images are never
trained on; cells are scored where they were clustered. The control scores the same clusters against shuffled labels.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData

from benchmarks.derived import DERIVED
from benchmarks.integration import embed
from benchmarks.results import write_section
from benchmarks.sets import LABELLED, MULTI_STUDY, CellSet, load
from sccvae import datasets, metrics
from sccvae.model import GMVAE

IMAGES = ("mnist", "fashion_mnist")
SETS = [*LABELLED, *MULTI_STUDY, *DERIVED]
#: Embeddings that Leiden clusters beside ours.
PEERS = ("PCA", "Harmony", "scVI")
#: One setting for both image sets, all numbers of components and labels, and all seeds.
IMAGE_MODEL = {"likelihood": "bernoulli", "n_hidden": 512, "n_layers": 2, "masking": 0.3}
IMAGE_TRAINING = {"batch_size": 256, "train_size": 0.95, "max_epochs": 20}


def image_sets(name: str, validation: bool) -> tuple[AnnData, AnnData]:
    """Training and test images; with ``validation`` the last tenth of the training images in place of the test."""
    train = getattr(datasets, name)(split="train")
    if not validation:
        return train, getattr(datasets, name)(split="test")
    order = np.random.default_rng(0).permutation(train.n_obs)
    cut = int(0.9 * train.n_obs)
    return train[np.sort(order[:cut])].copy(), train[np.sort(order[cut:])].copy()


def hide_labels(adata: AnnData, key: str, labels: float, seed: int) -> None:
    """Put ``obs["known"]``: so many labels (a count of 1 or more, or a share), in every class."""
    rng = np.random.default_rng(seed)
    truth = adata.obs[key].astype(object)
    share = labels if labels < 1 else labels / adata.n_obs
    known = pd.Series(np.nan, index=adata.obs_names, dtype=object)
    for name, cells in truth.groupby(truth, observed=True).groups.items():
        n = max(1, round(share * len(cells)))
        if labels >= 1 and labels % truth.nunique() == 0:
            n = int(labels) // truth.nunique()
        known[rng.choice(np.asarray(cells), n, replace=False)] = name
    adata.obs["known"] = known


def score(truth: np.ndarray, found: np.ndarray, labels: float | None) -> dict[str, float]:
    """Clustering scores; with labels the plain accuracy. And the control on shuffled labels."""
    shuffled = np.random.default_rng(0).permutation(truth)
    scores = metrics.clustering(truth, found)
    if labels is not None:
        scores["accuracy"] = float((truth == found).mean())
    return scores | {"majority, shuffled": metrics.majority_accuracy(shuffled, found)}


def images(name: str, components: int | None, labels: float | None, seed: int, validation: bool) -> list[dict]:
    """One training on images."""
    train, test = image_sets(name, validation)
    start = time.perf_counter()
    if labels is not None:
        hide_labels(train, "label", labels, seed)
    GMVAE.setup_anndata(train, labels_key=None if labels is None else "known")
    model = GMVAE(train, n_components=components, seed=seed, **IMAGE_MODEL)
    model.train(seed=seed, accelerator="cpu", progress_bar=False, **IMAGE_TRAINING)
    seconds = time.perf_counter() - start
    truth = test.obs["label"].astype(str).to_numpy()
    row = {"method": "GMVAE", **score(truth, model.predict(test).astype(str).to_numpy(), labels)}
    return [row | {"seconds": seconds, "components": model.n_components}]


def idec(name: str, components: int | None, labels: float | None, seed: int, validation: bool) -> list[dict]:
    """IDEC on images."""
    del labels
    train, test = image_sets(name, validation)
    start = time.perf_counter()
    from sccvae.model import IDEC

    IDEC.setup_anndata(train)
    model = IDEC(train, n_components=components or 10, n_hidden=512, n_layers=2, seed=seed)
    model.train(seed=seed, accelerator="cpu", progress_bar=False, **IMAGE_TRAINING)
    seconds = time.perf_counter() - start
    truth = test.obs["label"].astype(str).to_numpy()
    row = {"method": "IDEC", **score(truth, model.predict(test).astype(str).to_numpy(), None)}
    return [row | {"seconds": seconds, "components": model.n_components}]


def leiden(z: np.ndarray, components: int | None, seed: int) -> np.ndarray:
    """Scanpy's Leiden on 15 neighbours: at resolution 1, or at one that gives so many clusters."""
    adata = AnnData(obsm={"z": z}, obs=pd.DataFrame(index=[str(i) for i in range(len(z))]))
    sc.pp.neighbors(adata, use_rep="z", random_state=seed)
    low, high, resolution = -4.0, 2.0, 0.0
    for _ in range(1 if components is None else 14):
        sc.tl.leiden(
            adata, 2**resolution, random_state=seed, flavor="igraph", n_iterations=-1, directed=False, key_added="l"
        )
        n = adata.obs["l"].nunique()
        if n == components:
            break
        low, high = (low, resolution) if components is not None and n > components else (resolution, high)
        resolution = (low + high) / 2
    return adata.obs["l"].astype(str).to_numpy()


def cells(
    data: CellSet, components: int | None, labels: float | None, seed: int, methods: list[str], cache: Path | None
) -> list[dict]:
    """Ours and the peers on labelled cells."""
    adata = load(data)
    truth = adata.obs[data.label_key].astype(str).to_numpy()
    rows = []

    def add(method: str, found: np.ndarray, start: float, **more) -> None:
        rows.append({"method": method, **score(truth, found, labels), "seconds": time.perf_counter() - start, **more})

    if labels is not None:
        hide_labels(adata, data.label_key, labels, seed)
        hidden = adata.obs["known"].isna().to_numpy()
    start = time.perf_counter()
    if "GMVAE" in methods:
        ours = adata.copy()
        GMVAE.setup_anndata(ours, batch_key=data.batch_key, labels_key=None if labels is None else "known")
        model = GMVAE(ours, n_components=components, seed=seed)
        model.train(seed=seed, accelerator="cpu", progress_bar=False)
        found = model.predict().astype(str).to_numpy()
        # A type is kept if some cluster has it as its most common type.
        lost = len(np.unique(truth)) - len(set(metrics.contingency(truth, found).argmax(0)))
        if labels is not None:
            add("GMVAE", found, start)
            rows[-1]["accuracy"] = float((truth == found)[hidden].mean())
        else:
            add("GMVAE", found, start, components=model.n_components, **{"types without a cluster": int(lost)})
    if labels is not None:
        if "scANVI" in methods:
            start = time.perf_counter()
            found = scanvi(adata, data, seed)
            add("scANVI", found, start)
            rows[-1]["accuracy"] = float((truth == found)[hidden].mean())
        return rows
    for peer in PEERS:
        if peer in methods and not (peer == "Harmony" and data.batch_key is None):
            start = time.perf_counter()
            add(f"Leiden on {peer}", leiden(embed(adata, data, peer, seed, cache)[0], components, seed), start)
    return rows


def scanvi(adata: AnnData, data: CellSet, seed: int) -> np.ndarray:
    """Labels by scANVI at its defaults, on scVI at its defaults."""
    import scvi

    scvi.settings.seed = seed
    copy = adata.copy()
    copy.obs["known"] = copy.obs["known"].fillna("Unknown").astype("category")
    scvi.model.SCVI.setup_anndata(copy, batch_key=data.batch_key, labels_key="known")
    base = scvi.model.SCVI(copy, gene_likelihood="nb")
    base.train(max_epochs=60 if copy.n_obs > 10_000 else None, enable_progress_bar=False, accelerator="cpu")
    model = scvi.model.SCANVI.from_scvi_model(base, unlabeled_category="Unknown")
    model.train(enable_progress_bar=False, accelerator="cpu")
    return np.asarray(model.predict())


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Median over the seeds, and the worst of the main scores."""
    key = ["data", "K", "labels", "method"]
    main = [c for c in ("hungarian", "majority", "accuracy", "ari") if c in table]
    grouped = table.drop(columns="seed").groupby(key, sort=False, dropna=False)
    summary = grouped.median(numeric_only=True)
    for name in main:
        summary.insert(summary.columns.get_loc(name) + 1, f"worst {name}", grouped[name].min())
    summary.insert(0, "seeds", grouped.size())
    return summary.reset_index()


def main() -> None:
    """Run the command line."""
    names = [c.name for c in SETS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["mnist"], choices=[*IMAGES, *names])
    parser.add_argument("--components", type=int, help="K; without it the number of classes (images: 10)")
    parser.add_argument("--auto", action="store_true", help="let the model choose the number of components")
    parser.add_argument("--labels", type=float, help="labels seen in training: a count, or a share below 1")
    parser.add_argument("--methods", nargs="+", default=["GMVAE", *PEERS, "scANVI"], help="on cells")
    parser.add_argument("--model", choices=["GMVAE", "IDEC"], default="GMVAE", help="on images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-seed", type=int, help="this seed alone")
    parser.add_argument("--validation", action="store_true", help="images: score on held-out training images")
    parser.add_argument("--cache", type=Path, help="folder that keeps the embeddings of the peers between runs")
    parser.add_argument("--table", type=Path, help="CSV of single runs to add to: a long benchmark in several parts")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/RESULTS.md as it is")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("sccvae").setLevel(logging.INFO)  # what the guide found
    key = ["data", "K", "labels", "method", "seed"]
    table = pd.read_csv(args.table, dtype={"K": str, "labels": str}) if args.table and args.table.exists() else None
    for name in args.data:
        for seed in range(args.seeds) if args.only_seed is None else [args.only_seed]:
            if name in IMAGES:
                k = None if args.auto or args.labels is not None else args.components or 10
                rows = (idec if args.model == "IDEC" else images)(name, k, args.labels, seed, args.validation)
            else:
                data = SETS[names.index(name)]
                k = None
                if not args.auto and args.labels is None:
                    k = args.components or load(data).obs[data.label_key].nunique()
                rows = cells(data, k, args.labels, seed, args.methods, args.cache)
            what = {"data": name, "K": "auto" if k is None else str(k), "labels": str(args.labels or 0), "seed": seed}
            new = pd.DataFrame([what | row for row in rows])
            print(new.round(4).to_string(index=False), flush=True)
            table = pd.concat([table, new]).drop_duplicates(key, keep="last")
            if args.table:
                table.to_csv(args.table, index=False)
    print(summarise(table).round(4).to_string(index=False))
    if not args.no_write:
        text = __doc__.split("\n\n", 2)[2]
        command = "python -m benchmarks.clustering --data ... --seeds 3"
        write_section("Clustering", text, summarise(table).round(4), command)


if __name__ == "__main__":
    main()
