"""Small AnnData that several test files share."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse


def toy_counts(n: int = 48, n_genes: int = 12, seed: int = 0) -> AnnData:
    """Counts (CSR float32) with a batch effect; in ``obs`` batch, donor, treatment, dose and a size factor."""
    rng = np.random.default_rng(seed)
    batch = np.arange(n) % 2
    rates = rng.gamma(1.0, 2.0, size=(3, n_genes))[rng.integers(3, size=n)]
    rates = rates * np.where(batch[:, None] == 1, rng.gamma(2.0, 0.5, size=n_genes), 1.0)
    counts = rng.poisson(rates).astype(np.float32)
    counts[:, 0] += 1  # no empty cell, no empty gene
    obs = pd.DataFrame(
        {
            "batch": np.array(["a", "b"])[batch],
            "donor": np.array(["d1", "d2", "d3"])[np.arange(n) % 3],
            "treated": (np.arange(n) // 2) % 2,
            "dose": rng.normal(5.0, 2.0, size=n),
            "size": counts.sum(1) / counts.sum(1).mean(),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    return AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(n_genes)]))


def toy_values(n: int = 48, n_features: int = 12, seed: int = 0) -> AnnData:
    """Values in [0, 1] (dense float32) on a three-dimensional plane, with the ``obs`` of :func:`toy_counts`."""
    rng = np.random.default_rng(seed)
    x = 1 / (1 + np.exp(-rng.normal(size=(n, 3)) @ rng.normal(size=(3, n_features))))
    toy = toy_counts(n, n_features, seed)
    return AnnData(x.astype(np.float32), obs=toy.obs, var=toy.var)


def totals(adata: AnnData) -> np.ndarray:
    """Counts of each cell, (n, 1)."""
    return np.asarray(adata.X.sum(1)).reshape(-1, 1)
