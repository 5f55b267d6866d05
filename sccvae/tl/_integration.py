"""Judge an integration in one call."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pandas as pd
from anndata import AnnData

from sccvae import metrics
from sccvae.data.categories import check_filled, obs_column
from sccvae.metrics._embedding import _embedding

from ._job import target

logger = logging.getLogger(__name__)


def integration_report(
    adata: AnnData,
    use_rep: str | Sequence[str],
    *,
    batch_key: str,
    label_key: str,
    unintegrated: str = "X_pca",
    scores: bool = False,
    n_neighbors: int = 15,
    max_drop: float = 0.1,
    key_added: str = "integration",
    copy: bool = False,
) -> AnnData | None:
    """Say for each cell type whether an integration kept it apart, and on request how it scores in all.

    Parameters
    ----------
    adata
        Cells with their embeddings in ``obsm``.
    use_rep
        Keys of ``obsm``: the embeddings to judge.
    batch_key, label_key
        Columns of ``obs`` with the batch and the cell type. Cells without a type are left out.
    unintegrated
        Key of ``obsm``: the embedding before integration.
    scores
        Compute the scores of scib-metrics as well; needs ``pip install 'sccvae[bench]'``.
    n_neighbors, max_drop
        As for :func:`sccvae.metrics.overcorrection`.
    key_added
        Key of ``uns``.
    copy
        Return a copy with the results and leave ``adata`` as it is.

    Returns
    -------
    None, or with ``copy=True`` the copy. ``uns[key_added]`` holds

    - ``"overcorrection"``: the table of :func:`sccvae.metrics.overcorrection`, with a column ``embedding``
    - ``"scores"``: the table of :func:`sccvae.metrics.integration`, with ``scores=True``
    - ``"params"``: the arguments

    Types whose neighbourhoods lost purity are logged.

    Raises
    ------
    TypeError
        If ``adata`` is no AnnData.
    KeyError
        If a column or an embedding is missing.
    ValueError
        If ``use_rep`` is empty, cells with a type have no batch or no finite embedding, or something cannot be scored;
        see the two functions.
    ImportError
        If ``scores`` is true and scib-metrics is not installed.

    Examples
    --------
    >>> sccvae.tl.integration_report(adata, "X_cvae", batch_key="batch", label_key="cell_type")  # doctest: +SKIP
    >>> sccvae.pl.integration(adata)  # doctest: +SKIP
    """
    to = target(adata, key_added, copy=copy)
    keys = [use_rep] if isinstance(use_rep, str) else list(use_rep)
    if not keys:
        msg = f"use_rep={use_rep!r} names no embedding to judge: give keys of adata.obsm; it has {sorted(to.obsm)}."
        raise ValueError(msg)
    for key in (batch_key, label_key):
        obs_column(to, key)
    for key in (*keys, unintegrated):
        if key not in to.obsm:
            cure = " Run `scanpy.pp.pca(adata)` on log-normalised values first." if key == "X_pca" else ""
            msg = f"There is no adata.obsm[{key!r}]; it has {sorted(to.obsm)}.{cure}"
            raise KeyError(msg)
    known = to.obs[label_key].notna().to_numpy()
    check_filled(to.obs.loc[known, batch_key], "cells with a type")
    batch, labels = (to.obs.loc[known, key].astype(str).to_numpy() for key in (batch_key, label_key))
    for key in (*keys, unintegrated):  # here, where the key is known
        _embedding(to.obsm[key][known], f"adata.obsm[{key!r}] of the cells with a type")
    before = to.obsm[unintegrated][known]
    options = {"unintegrated": before, "n_neighbors": n_neighbors, "max_drop": max_drop}
    tables = {key: metrics.overcorrection(to.obsm[key][known], batch, labels, **options) for key in keys}
    table = pd.concat(tables, names=["embedding"]).reset_index("embedding").reset_index(drop=True)
    table.index = table.index.astype(str)
    found = {"overcorrection": table}
    if scores:
        embeddings = {key: to.obsm[key][known] for key in keys}
        found["scores"] = metrics.integration(embeddings, batch, labels, unintegrated=before)
    found["params"] = {
        "use_rep": keys,
        "batch_key": batch_key,
        "label_key": label_key,
        "unintegrated": unintegrated,
        "n_neighbors": n_neighbors,
        "max_drop": max_drop,
    }
    for row in table[table["fell"]].itertuples():
        logger.warning(
            "%s: purity of %r in %r fell from %.2f to %.2f; its neighbours are %r.",
            *(row.embedding, row.label, row.batch, row.purity_before, row.purity_after, row.mixed_with),
        )
    to.uns[key_added] = found
    return to if copy else None
