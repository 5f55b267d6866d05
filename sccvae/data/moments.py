"""What each batch looks like before anything is learned: mean proportion and dispersion of its genes."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix
from torch import Tensor

from sccvae._rows import SparseRows
from sccvae.data.store import CellStore

#: Cells that the moments are taken of, of each batch its share at random: enough for a start.
MOMENTS_OF = 20_000
#: The same for the share of zeros.
ZEROS_OF = 1_000
#: Bounds of the inverse dispersion, whose estimate is wild for a gene of a few counts.
SMALLEST, LARGEST = 0.01, 20.0
#: Groups of like library size that the cells of a batch are taken as, and halvings of the range of inverse dispersions.
N_SIZES, N_HALVINGS = 10, 12


def batch_moments(store: CellStore, n_batch: int | None, *, zeros: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Mean proportion and inverse dispersion of each gene in each batch.

    With library sizes l, counts x and the proportion rho = sum x / sum l of a gene in a batch, a negative binomial of
    mean m = l rho has E (x - m)^2 = m + m^2 / theta, hence theta = sum m^2 / sum ((x - m)^2 - m). Counts of reads have
    more zeros than that: where it is smaller, theta is the one of which sum (1 + m / theta)^-theta is the number of
    zeros. It is kept within bounds.

    Parameters
    ----------
    store
        The cells; the batch is their first condition.
    n_batch
        Number of batches; None takes all cells as one.
    zeros
        Whether zeros have a say.

    Returns
    -------
    Proportions and inverse dispersions, each (n_batch or 1, G) float32. A batch without cells has those of all cells.
    """
    rows = store.some_rows(MOMENTS_OF)
    x1, x2, lx, seen = (np.zeros((n_batch or 1, store.n_features)) for _ in range(4))  # sums of x, x^2, l x and [x > 0]
    l1, l2, n = (np.zeros((n_batch or 1, 1)) for _ in range(3))  # of l, l^2 and 1
    sizes: list[list[np.ndarray]] = [[] for _ in l1]
    for part in np.array_split(rows, max(1, len(rows) // 1024)):
        cells = store.gather(part)
        x = _csr(cells["x"])
        size = cells["library"].numpy().astype(np.float64)
        codes = cells["codes"][:, :1].numpy() if n_batch else np.zeros((len(size), 1), np.int64)
        member = csr_matrix((codes == np.arange(len(l1))).astype(np.float64).T)  # (n_batch, n)
        x1, x2, seen = x1 + member @ x, x2 + member @ x.multiply(x), seen + member @ (x > 0)
        lx += member.multiply(size.T) @ x
        l1, l2, n = l1 + member @ size, l2 + member @ size**2, n + member.sum(1)
        for k in range(len(l1)):
            sizes[k].append(size[codes[:, 0] == k, 0])
    x1, x2, lx, seen, n = (np.asarray(sums) for sums in (x1, x2, lx, seen, n))
    empty = l1[:, 0] == 0
    for sums in (x1, x2, lx, seen, l1, l2, n):
        sums[empty] = sums.sum(0)
    rho = x1 / l1
    excess = x2 - 2 * rho * lx + rho**2 * l2 - x1
    theta = np.divide(rho**2 * l2, excess, out=np.full_like(rho, LARGEST), where=excess > 0)
    everyone = np.concatenate([part for parts in sizes for part in parts])
    for k, parts in enumerate(sizes if zeros else ()):
        own = everyone if empty[k] else np.concatenate(parts)
        theta[k] = np.minimum(theta[k], _by_zeros(rho[k], own, n[k] - seen[k]))
    return rho.astype(np.float32), theta.clip(SMALLEST, LARGEST).astype(np.float32)


def zero_share(store: CellStore) -> float:
    """Share of zeros among the values of some of the cells, of each batch its share."""
    rows = store.some_rows(ZEROS_OF)
    return 1 - float(_csr(store.gather(rows)["x"]).count_nonzero()) / (len(rows) * store.n_features)


def _csr(x: Tensor | SparseRows) -> csr_matrix:
    """Counts (n, G) in float64."""
    if isinstance(x, SparseRows):
        return csr_matrix((x.values.double().numpy(), x.columns.numpy(), x.starts.numpy()), x.shape)
    return csr_matrix(x.double().numpy())


def _by_zeros(rho: np.ndarray, sizes: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """The inverse dispersion that expects so many zeros, (G,), by bisection; the largest where none expects so few.

    The smallest where no cell has a count: any expects that, and of those tried it is the best start.
    """
    groups = np.array_split(np.sort(sizes), min(N_SIZES, len(sizes)))
    mean = np.array([part.mean() for part in groups])[:, None] * rho  # (N_SIZES, G)
    weight = np.array([float(len(part)) for part in groups])
    low, high = np.full(len(rho), SMALLEST), np.full(len(rho), LARGEST)
    for _ in range(N_HALVINGS):  # the larger theta, the fewer zeros
        middle = np.sqrt(low * high)
        enough = weight @ np.exp(-middle * np.log1p(mean / middle)) <= zeros
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return high
