"""Cluster cells in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from anndata import AnnData

from sccvae.model import BaseModel
from sccvae.model._clustering import entropy

from ._embed import write_embedding
from ._job import check_columns, plain, requested, target, trained_model

if TYPE_CHECKING:
    from sccvae.distributions import Likelihood


def cluster(
    adata: AnnData,
    model: Literal["gmvae"] | BaseModel = "gmvae",
    *,
    batch_key: str | None = None,
    labels_key: str | None = None,
    unlabeled_category: str | None = None,
    n_components: int | None = None,
    layer: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    size_factor_key: str | None = None,
    n_latent: int | None = None,
    likelihood: str | Likelihood | None = None,
    key_added: str | None = None,
    copy: bool = False,
    seed: int = 0,
    model_options: Mapping[str, Any] | None = None,
    train_options: Mapping[str, Any] | None = None,
) -> AnnData | None:
    """Train a GMVAE on the cells and write its clusters to ``obs``, with their probabilities.

    The whole job: set-up, training through all phases, embedding, clusters. With ``batch_key`` clusters run across the
    batches. With ``labels_key`` cells with a label teach the component of their class, and the others get a class too.

    Parameters
    ----------
    adata
        Cells x genes, in memory or backed.
    model
        ``"gmvae"``, or a trained model that clusters (see :func:`embed`).
    batch_key
        Column of ``obs`` with the batch that clusters are to run across.
    labels_key, unlabeled_category
        Column of ``obs`` with known classes, NaN or ``unlabeled_category`` where a cell has none; None to find
        clusters without.
    n_components
        Number of components; None lets the training choose it (with labels: one for each class).
    layer, categorical_covariate_keys, continuous_covariate_keys, size_factor_key, n_latent, likelihood
        As for :func:`embed`.
    key_added
        Name of the results; None is the name of the model, ``"gmvae"``.
    copy, seed, model_options, train_options
        As for :func:`embed`.

    Returns
    -------
    None, or with ``copy=True`` the copy. It holds

    - ``obs[key_added]``: the most probable component of each cell, categorical; classes keep their names
    - ``obs["<key_added>_entropy"]``: how uncertain it is, in nats, 0 to log K, float32
    - ``obsm["<key_added>_proba"]``: probabilities of the components, (n_cells, K) float32, in the order of the
      categories
    - ``obsm["X_<key_added>"]`` and ``uns["X_<key_added>"]``: as from :func:`embed`
    - ``uns[key_added]``: what :func:`embed` records (of the last epoch, whose weights a GMVAE keeps), and
      ``n_components``, ``embedding`` and ``probabilities`` (keys of ``obsm``). :func:`sccvae.pl.occupancy` draws its
      ``history``

    Raises
    ------
    TypeError, KeyError, ValueError
        As for :func:`embed`; and ValueError if the model has no clusters, or fewer components than classes, or a
        column to be written is one that it reads.

    Examples
    --------
    >>> sccvae.tl.cluster(adata, batch_key="batch", layer="counts")  # doctest: +SKIP
    >>> sc.pp.neighbors(adata, use_rep="X_gmvae")
    ... sc.tl.umap(adata)  # doctest: +SKIP
    >>> sc.pl.umap(adata, color=["gmvae", "gmvae_entropy"])  # doctest: +SKIP
    """
    options = requested(locals())
    to = target(adata, key_added, copy=copy)
    name = model if isinstance(checked(model), str) else type(model).__name__.lower()
    key = name if key_added is None else key_added
    columns = [key, f"{key}_entropy"]
    fitted = trained_model(to, model, check=lambda model: check_columns(model, columns), **options)
    q = fitted.predict(to, soft=True)
    values = q.to_numpy()
    to.obs[columns[0]] = pd.Categorical.from_codes(values.argmax(1), categories=list(q.columns))
    to.obs[columns[1]] = entropy(values)
    to.obsm[f"{key}_proba"] = values
    embedding, entry = write_embedding(to, fitted, f"X_{key}", train_options)
    more = {"n_components": fitted.n_components, "embedding": embedding, "probabilities": f"{key}_proba"}
    to.uns[key] = entry | plain(more)
    return to if copy else None


def checked(model: Any) -> Any:
    """``model``, if it clusters.

    Raises
    ------
    ValueError
        If it does not.
    """
    if model == "gmvae" or hasattr(model, "predict_proba"):
        return model
    name = model if isinstance(model, str) else type(model).__name__
    msg = f"model={name!r} cannot cluster: only 'gmvae', or a trained model that has `predict`, can."
    raise ValueError(msg)
