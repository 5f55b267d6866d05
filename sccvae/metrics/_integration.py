"""Was the batch removed, and the biology kept? Scores of an integration, and where it went too far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ._embedding import _codes, _embedding, _neighbors, batch_mixing

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike


def integration(
    embeddings: Mapping[str, ArrayLike],
    batch: ArrayLike,
    labels: ArrayLike,
    *,
    unintegrated: ArrayLike,
    n_jobs: int = 1,
    progress_bar: bool = False,
) -> pd.DataFrame:
    """Scores of scib-metrics for embeddings of the same cells: biology kept, batch removed.

    Parameters
    ----------
    embeddings
        Name -> embedding, (n, d).
    batch, labels
        Batch and cell type of each cell, (n,), none missing.
    unintegrated
        Embedding before integration, (n, d), such as principal components; some scores compare with it.
    n_jobs
        Processes that search for neighbours.
    progress_bar
        Show one.

    Returns
    -------
    A row for each embedding; a column for each metric, then ``Batch correction`` and ``Bio conservation`` (means of
    their metrics) and ``Total`` (0.4 and 0.6 of them). All from 0 to 1, higher is better, and not rescaled, so rows of
    different calls can be compared.

    Raises
    ------
    ImportError
        If scib-metrics is not installed.
    TypeError
        If ``embeddings`` is no mapping.
    ValueError
        If there is no embedding, lengths do not match, values are not finite, batches or labels are missing, there
        are fewer than two of either, or no label has cells in two batches.

    References
    ----------
    Luecken et al. 2022, Benchmarking atlas-level data integration in single-cell genomics, Nat. Methods 19:41-50.
    """
    spaces, batches, types = _checked(embeddings, batch, labels, unintegrated)
    for name, values in (("batch", batches), ("labels", types)):
        if len(np.unique(values)) < 2:
            msg = f"All cells have the same {name}, {values[0]}: scores of an integration need two or more."
            raise ValueError(msg)
    import pandas as pd

    obs = pd.DataFrame({"batch": batches, "label": types}, dtype="category")
    if obs.groupby("label", observed=True)["batch"].nunique().max() < 2:
        msg = (
            "No label has cells in two batches, so nothing tells a batch from a type, and batch correction cannot be "
            "scored; sccvae.metrics.overcorrection shows whether each type is still apart."
        )
        raise ValueError(msg)
    try:
        from scib_metrics.benchmark import BatchCorrection, Benchmarker, BioConservation
    except ImportError as error:
        msg = f"Scores of an integration need scib-metrics ({error.name} is missing): `pip install 'sccvae[bench]'`."
        raise ImportError(msg) from error
    from anndata import AnnData

    obs.index = obs.index.astype(str)
    unnamed = ""  # no user's embedding has this name
    adata = AnnData(np.zeros((len(obs), 1), np.float32), obs=obs, obsm=spaces[0] | {unnamed: spaces[1]})
    benchmark = Benchmarker(
        adata,
        batch_key="batch",
        label_key="label",
        embedding_obsm_keys=list(spaces[0]),
        pre_integrated_embedding_obsm_key=unnamed,
        bio_conservation_metrics=BioConservation(),
        batch_correction_metrics=BatchCorrection(),
        n_jobs=n_jobs,
        progress_bar=progress_bar,
    )
    benchmark.benchmark()
    return benchmark.get_results(min_max_scale=False).drop(index="Metric Type").astype(float)


def overcorrection(
    embedding: ArrayLike,
    batch: ArrayLike,
    labels: ArrayLike,
    *,
    unintegrated: ArrayLike,
    n_neighbors: int = 15,
    max_drop: float = 0.1,
) -> pd.DataFrame:
    """Find the cell types that lost their neighbours of the same kind: biology taken for a batch.

    Purity of a cell is the share of its nearest other cells that have its label, among ``n_neighbors``, or as many as
    the label has other cells if these are fewer. It is compared before and after. Types that exist in one batch only
    are at risk: there is nothing in other batches for them to be mixed with.

    Parameters
    ----------
    embedding
        After integration, (n, d).
    batch, labels
        Batch and cell type of each cell, (n,), none missing.
    unintegrated
        Before integration, (n, d'), such as principal components.
    n_neighbors
        Size of a neighbourhood, without the cell itself.
    max_drop
        Purity may fall by so much before a row is flagged.

    Returns
    -------
    A row for each type in each batch that has cells of it.

    - ``label``, ``batch``, ``n_cells``
    - ``one_batch``: the type has cells in this batch only
    - ``purity_before``, ``purity_after``: mean over these cells, 0 to 1; NaN for a type of a single cell
    - ``mixing``: :func:`batch_mixing` of the embedding within the type, the same in all its rows: 0 apart, 1 as at
      random; NaN for types of one batch or of two cells
    - ``mixed_with``: the other type that is most frequent among the neighbours, after; empty if there is none
    - ``fell``: ``purity_after < purity_before - max_drop``

    Raises
    ------
    ValueError
        If lengths do not match, values are not finite, batches or labels are missing, or there are not enough cells
        for ``n_neighbors``.
    """
    import pandas as pd

    (spaces, before), batches, types = _checked({"embedding": embedding}, batch, labels, unintegrated)
    names, codes = np.unique(types, return_inverse=True)
    sizes = np.bincount(codes)
    purity = []
    for z in (before, spaces["embedding"]):
        neighbors = codes[_neighbors(z, n_neighbors)]  # (n, k), nearest first
        same = (neighbors == codes[:, None]).cumsum(1)
        k = np.minimum(n_neighbors, sizes[codes] - 1)
        purity.append(np.where(k > 0, same[np.arange(len(codes)), k - 1] / np.maximum(k, 1), np.nan))
    rows = []
    for code, name in enumerate(names):
        of_type = codes == code
        present, counts = np.unique(batches[of_type], return_counts=True)
        mixing = np.nan
        if len(present) > 1 and sizes[code] > 2:  # a single neighbour is never mixed
            mixing = batch_mixing(spaces["embedding"][of_type], batches[of_type], min(30, sizes[code] - 1))
        for where, n_cells in zip(present, counts, strict=True):
            cells = of_type & (batches == where)
            others = neighbors[cells]
            others = np.bincount(others[others != code], minlength=len(names))
            mixed_with = str(names[others.argmax()]) if others.any() else ""
            values = (name, where, n_cells, len(present) == 1, *(p[cells].mean() for p in purity), mixing, mixed_with)
            rows.append(values)
    columns = ["label", "batch", "n_cells", "one_batch", "purity_before", "purity_after", "mixing", "mixed_with"]
    table = pd.DataFrame(rows, columns=columns)
    table["fell"] = table["purity_after"] < table["purity_before"] - max_drop
    return table


def _checked(
    embeddings: Mapping[str, ArrayLike], batch: ArrayLike, labels: ArrayLike, unintegrated: ArrayLike
) -> tuple[tuple[dict[str, np.ndarray], np.ndarray], np.ndarray, np.ndarray]:
    """Arrays: the embeddings and that before integration, batches and labels."""
    if not isinstance(embeddings, Mapping):
        msg = (
            f"embeddings must be a dictionary of names and arrays, as {{'X_cvae': z}}, not {type(embeddings).__name__}."
        )
        raise TypeError(msg)
    if not embeddings:
        msg = "There is no embedding to judge."
        raise ValueError(msg)
    before = _embedding(unintegrated, "unintegrated")
    after = {name: _embedding(z, name) for name, z in embeddings.items()}
    for name, z in after.items():
        if len(z) != len(before):
            msg = f"{name} has {len(z)} cells, unintegrated {len(before)}: they must be the same cells."
            raise ValueError(msg)
    found = []
    for name, values in (("batch", batch), ("labels", labels)):
        distinct, codes = _codes(values, len(before), name)
        found.append(distinct[codes])
    return (after, before), *found
