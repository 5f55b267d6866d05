"""What ``sccvae demo`` shows: a planted batch effect removed from real cells, and how near that comes to the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

BATCH, CELL_TYPE, REFERENCE = "batch", "bulk_labels", "batch0"
#: Standard deviation of the natural log of the factor that the second batch puts on a gene: 1 doubles or halves it.
STRENGTH = 1.0
#: With 5 optimiser steps in an epoch, a high learning rate gets as far as twice the epochs at the default one.
MAX_EPOCHS, LEARNING_RATE = 100, 3e-3
#: Cell types with fewer cells in a batch have no mean profile worth comparing.
FEWEST_CELLS = 10


@dataclass(frozen=True)
class Demo:
    """What the demo leaves.

    Attributes
    ----------
    adata
        The cells, with ``obsm`` (``X_pca``, ``X_cvae`` and a UMAP of either), ``layers`` (``counts``, ``truth``,
        ``corrected``) and ``uns``.
    figures
        File name without ending -> figure.
    table
        Scores, as text.
    """

    adata: AnnData
    figures: dict[str, Figure]
    table: str


def run(*, seed: int = 0, progress_bar: bool = True, say: Callable[[str], Any] = lambda text: None) -> Demo:
    """Plant a batch effect, remove it, and compare with the truth.

    Parameters
    ----------
    seed
        Of the planted effect, the model and the UMAPs.
    progress_bar
        Show the progress of the training.
    say
        Called with a line of text before each step.
    """
    import scanpy as sc

    from sccvae import datasets, model, tl
    from sccvae.pl._scatter import compute_umap

    adata = datasets.plant_batch_effect(datasets.pbmc68k_reduced(), strength=STRENGTH, seed=seed)
    adata.uns.pop("louvain_colors")
    say(f"{adata.n_obs} cells x {adata.n_vars} genes, 2 batches; training a CVAE on the counts")
    sc.pp.pca(adata, random_state=seed)
    trained = adata.copy()  # takes the notes of the set-up, which the user's file need not carry
    model.CVAE.setup_anndata(trained, layer="counts", batch_key=BATCH)
    cvae = model.CVAE(trained, seed=seed)
    cvae.train(max_epochs=MAX_EPOCHS, lr=LEARNING_RATE, seed=seed, progress_bar=progress_bar)
    tl.correct(adata, cvae, reference=REFERENCE)
    say("UMAPs (compiling them takes some seconds)")
    for basis in ("X_pca", "X_cvae"):
        adata.obsm[f"{basis}_umap"] = compute_umap(adata.obsm[basis], n_neighbors=15, seed=seed)
    say("scores and pictures")
    return Demo(adata, _figures(adata, cvae), table(adata, seed))


def table(adata: AnnData, seed: int = 0) -> str:
    """Scores of embedding and corrected layer, as text, beside those of the distorted ("before") and the true counts.

    The embedding is scored on batches and cell types. The layer is scored by its Pearson correlation with the true
    counts; everything is scaled to 10,000 a cell and log1p. Three correlations, since none is fair to all sides:

    - The mean profile of each cell type in the distorted batch, over genes: the mean of these correlations. Means have
      little noise, so the batch effect is what matters. They are taken before log1p.
    - Each gene over cells, where the truth is the mean of the true counts in the cell's type: the median over genes.
      The target is free of noise, and blind to differences within a type, so smooth values win more easily.
    - Each gene over single cells: the median over genes. Half of the distorted counts *are* the truth, sampling noise
      included, and the rest keeps most of that noise; a corrected value is an expectation, which cannot know it.

    Parameters
    ----------
    adata
        Cells as :func:`run` leaves them.
    seed
        Of the PCA.
    """
    import scanpy as sc
    from anndata import AnnData

    from sccvae import metrics

    truth, before = (_per_10k(adata.layers[name]) for name in ("truth", "counts"))
    undistorted = AnnData(np.log1p(truth))
    sc.pp.pca(undistorted, random_state=seed)
    embeddings = (adata.obsm["X_pca"], adata.obsm["X_cvae"], undistorted.obsm["X_pca"])
    batch, types = adata.obs[BATCH].to_numpy(), adata.obs[CELL_TYPE].to_numpy()
    distorted = batch != REFERENCE

    names = [t for t in np.unique(types) if (distorted & (types == t)).sum() >= FEWEST_CELLS]

    def profiles(values: np.ndarray) -> np.ndarray:  # (n_genes, n_types)
        return np.log1p([values[distorted & (types == t)].mean(axis=0) for t in names]).T

    by_type = np.log1p([truth[types == t].mean(axis=0) for t in np.unique(types)])
    by_type = by_type[np.unique(types, return_inverse=True)[1]]  # (n_cells, n_genes)

    def correlations(values: np.ndarray) -> tuple[float, float, float]:
        log = np.log1p(values)
        return (
            np.mean(metrics.gene_correlation(profiles(values), profiles(truth))),
            np.nanmedian(metrics.gene_correlation(log, by_type)),
            np.nanmedian(metrics.gene_correlation(log, np.log1p(truth))),
        )

    scores = [correlations(values) for values in (before, adata.layers["corrected"], truth)]
    profile, typed, single = zip(*scores, strict=True)
    rows = [
        ("", "before", "after", "truth"),
        ("Embedding", "PCA", "CVAE", "PCA"),
        ("  batches mixed (1: as at random)", *(metrics.batch_mixing(z, batch) for z in embeddings)),
        ("  cell types, accuracy of neighbours", *(metrics.knn_accuracy(z, types) for z in embeddings)),
        ("  cell types, silhouette (0 to 1)", *(metrics.label_silhouette(z, types) for z in embeddings)),
        ("Correlation with the truth", "counts", "corrected", "counts"),
        ("  profiles of cell types in batch1", *profile),
        ("  genes, cells against their type", *typed),
        ("  genes, single cells (*)", *single),
    ]
    text = "\n".join(f"{name:<38}" + "".join(f"{_cell(value):>10}" for value in values) for name, *values in rows)
    return text + "\n(*) half of the counts are the truth, noise included; corrected values are free of noise"


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3f}"


def _per_10k(counts: Any) -> np.ndarray:
    """Counts scaled to 10,000 a cell, (n_cells, n_genes) float64; cells without counts stay zero."""
    counts = counts.toarray().astype(np.float64)
    return 1e4 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _figures(adata: AnnData, cvae: Any) -> dict[str, Figure]:
    from sccvae import pl

    colors = (BATCH, CELL_TYPE)
    return {
        "umap": pl.umap(adata, colors=colors, titles=("PCA, before", "CVAE, after")).flat[0].figure,
        "history": pl.history(cvae).flat[0].figure,
        "plate": pl.plate_diagram(cvae).figure,
    }
