"""What each batch looks like before anything is learned: mean proportion and dispersion of its genes."""

from __future__ import annotations

import numpy as np

from sccvae._rows import dense
from sccvae.data.store import CellStore

#: Cells that the moments are taken of, evenly spaced over all: enough for a start.
MOMENTS_OF = 20_000
#: Bounds of the inverse dispersion, whose estimate is wild for a gene of a few counts.
SMALLEST, LARGEST = 0.05, 20.0


def batch_moments(store: CellStore, n_batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean proportion and inverse dispersion of each gene in each batch, by the method of moments.

    With library sizes l, counts x and the proportion rho = sum x / sum l of a gene in a batch, a negative binomial of
    mean m = l rho has E (x - m)^2 = m + m^2 / theta, hence theta = sum m^2 / sum ((x - m)^2 - m), kept within bounds.

    Parameters
    ----------
    store
        The cells; the batch is their first condition.
    n_batch
        Number of batches.

    Returns
    -------
    Proportions and inverse dispersions, each (n_batch, G) float32. A batch without cells has those of all cells.
    """
    rows = np.arange(0, len(store), max(1, len(store) // MOMENTS_OF))
    x1, x2, lx = (np.zeros((n_batch, store.n_features)) for _ in range(3))  # sums of x, x^2 and l x
    l1, l2 = np.zeros((n_batch, 1)), np.zeros((n_batch, 1))
    for part in np.array_split(rows, max(1, len(rows) // 1024)):
        cells = store.gather(part)
        x = dense(cells["x"]).numpy().astype(np.float64)
        size = cells["library"].numpy().astype(np.float64)
        member = (cells["codes"][:, :1].numpy() == np.arange(n_batch)).astype(np.float64).T  # (n_batch, n)
        x1, x2, lx = x1 + member @ x, x2 + member @ x**2, lx + member @ (size * x)
        l1, l2 = l1 + member @ size, l2 + member @ size**2
    empty = l1[:, 0] == 0
    for sums in (x1, x2, lx, l1, l2):
        sums[empty] = sums.sum(0)
    rho = x1 / l1
    excess = x2 - 2 * rho * lx + rho**2 * l2 - x1
    theta = np.divide(rho**2 * l2, excess, out=np.full_like(rho, LARGEST), where=excess > 0)
    return rho.astype(np.float32), theta.clip(SMALLEST, LARGEST).astype(np.float32)
