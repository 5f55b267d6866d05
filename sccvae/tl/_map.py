"""Map query cells on a trained reference in one call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anndata import AnnData

from sccvae.model import BaseModel, load

from ._job import plain, record, target


def map_query(
    adata: AnnData,
    reference: BaseModel | str | Path,
    *,
    freeze: bool = True,
    unknown_threshold: float | None = 0.99,
    key_added: str = "mapped",
    copy: bool = False,
    seed: int = 0,
    train_options: Mapping[str, Any] | None = None,
) -> AnnData | None:
    """Map the cells on a trained reference: coordinates in its latent space, and labels if it has some.

    The whole job: :meth:`sccvae.model.CVAE.load_query`, training of the weights of new batches, embedding, label
    transfer. Neither the cells of the reference nor anything but its model are needed.

    Parameters
    ----------
    adata
        Query cells, with the layer and the columns of ``obs`` of the reference's set-up; labels are not needed.
    reference
        A trained model, or the folder that it was saved to.
    freeze
        Train the weights of new categories only: the reference stays where it is.
    unknown_threshold
        As for :meth:`sccvae.model.CVAE.transfer_labels`.
    key_added
        Name of the results.
    copy
        Return a copy with the results and leave ``adata`` as it is.
    seed
        Of the split into training and validation cells, the order of the cells, and the noise.
    train_options
        Arguments of ``train``, such as ``{"max_epochs": 20, "progress_bar": False}``.

    Returns
    -------
    None, or with ``copy=True`` the copy. With the default ``key_added`` it holds

    - ``obsm["X_mapped"]``: latent coordinates, (n_cells, n_latent) float32
    - ``obs["mapped_label"]``, ``obs["mapped_uncertainty"]``, ``obs["mapped_outlier_score"]``: label with
      ``"unknown"``, 1 - its calibrated probability, and how unlike the reference a cell is; if the reference has labels
    - ``uns["mapped"]``: what :func:`embed` records, and ``query``: new categories, missing genes and the like

    Raises
    ------
    TypeError
        If ``adata`` is no AnnData, or ``reference`` neither a model nor a folder.
    FileNotFoundError, KeyError, ValueError
        If there is no model, or it cannot be mapped on; the message says what to do.

    Examples
    --------
    >>> sccvae.tl.map_query(adata_query, "my_reference")  # doctest: +SKIP
    >>> sc.pl.embedding(adata_query, "X_mapped", color="mapped_label")  # doctest: +SKIP
    """
    to = target(adata, copy=copy)
    if isinstance(reference, str | Path):
        reference = load(reference)
    if not hasattr(reference, "load_query"):
        msg = f"reference must be a trained model, or the folder of one, not {type(reference).__name__}."
        raise TypeError(msg)
    has_labels = "transfer" in reference.reference
    if has_labels and unknown_threshold is not None:
        reference.unknown_score(unknown_threshold)  # refused before anything is trained
    query = reference.load_query(to, freeze=freeze)
    query.train(**{"seed": seed} | dict(train_options or {}))
    z = query.get_latent_representation()
    if has_labels:
        table = query.transfer_labels(unknown_threshold=unknown_threshold)
        for column in ("label", "uncertainty", "outlier_score"):
            to.obs[f"{key_added}_{column}"] = table[column]
    to.obsm[f"X_{key_added}"] = z
    to.uns[key_added] = record(query, train_options) | {"seed": seed, "query": plain(query.query_report)}
    return to if copy else None
