"""Map query cells on a trained reference in one call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anndata import AnnData

from sccvae.model import BaseModel, load

from ._job import MODELS, check_columns, check_whole, plain, record, target


def map_query(
    adata: AnnData,
    reference: BaseModel | str | Path,
    *,
    freeze: bool = True,
    unknown_threshold: float | None = 0.9,
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
        If there is no model, it cannot be mapped on, or a column to be written is one that it reads; the message says
        what to do.

    Examples
    --------
    >>> sccvae.tl.map_query(adata_query, "my_reference")  # doctest: +SKIP
    >>> sc.pp.neighbors(adata_query, use_rep="X_mapped")  # doctest: +SKIP
    >>> sc.tl.umap(adata_query)  # doctest: +SKIP
    >>> sc.pl.umap(adata_query, color="mapped_label")  # doctest: +SKIP
    """
    to = target(adata, key_added, copy=copy)
    if isinstance(reference, str | Path):
        reference = load(reference)
    if isinstance(reference, BaseModel) and not hasattr(reference, "load_query"):
        able = ", ".join(kind.__name__ for kind in MODELS.values() if hasattr(kind, "load_query"))
        msg = f"Cells cannot be mapped on a model of class {type(reference).__name__}; the classes that can are {able}."
        raise ValueError(msg)
    if not isinstance(reference, BaseModel):
        msg = f"reference must be a trained model, or the folder of one, not {type(reference).__name__}."
        raise TypeError(msg)
    has_labels = "transfer" in reference.reference
    columns = {name: f"{key_added}_{name}" for name in ("label", "uncertainty", "outlier_score")} if has_labels else {}
    check_columns(reference, columns.values())
    if has_labels and unknown_threshold is not None:
        reference.unknown_score(unknown_threshold)  # refused before anything is trained
    query = reference.load_query(to, freeze=freeze)
    query.train(**{"seed": seed} | dict(train_options or {}))
    check_whole(query)
    z = query.get_latent_representation()
    if has_labels:
        table = query.transfer_labels(unknown_threshold=unknown_threshold)
        for name, column in columns.items():
            to.obs[column] = table[name]
    to.obsm[f"X_{key_added}"] = z
    to.uns[key_added] = record(query, train_options) | {"seed": seed, "query": plain(query.query_report)}
    return to if copy else None
