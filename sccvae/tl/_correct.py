"""Correct expression for the batch in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from anndata import AnnData

from sccvae.data.out import check_room
from sccvae.model import BaseModel
from sccvae.model._correction import check_layer, layer_library_size, without_matrices
from sccvae.model._decoding import DECODES_FROM_CONDITIONS

from ._embed import write_embedding
from ._job import plain, requested, target, trained_model

if TYPE_CHECKING:
    from sccvae.distributions import Likelihood


def correct(
    adata: AnnData,
    model: Literal["cvae"] | BaseModel = "cvae",
    *,
    batch_key: str | None = None,
    reference: Any | Sequence[Any] | None = None,
    layer: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    size_factor_key: str | None = None,
    n_latent: int | None = None,
    likelihood: str | Likelihood | None = None,
    library_size: float | Literal["latent"] | None = None,
    key_added: str = "corrected",
    out: str | Path | None = None,
    copy: bool = False,
    seed: int = 0,
    model_options: Mapping[str, Any] | None = None,
    train_options: Mapping[str, Any] | None = None,
) -> AnnData | None:
    """Train a CVAE on the cells and write their expression, as it would be in one batch, to ``layers``.

    The whole job: set-up, training, embedding, and decoding of every cell as if it came from the reference. The values
    are expected expression: without the batch effect, and without the noise of single counts. So they suit plots,
    means and regressions; tests that assume independent noise in each cell do not apply to them.

    Parameters
    ----------
    adata
        Cells x genes, in memory or backed.
    model
        ``"cvae"``, or a trained CVAE whose decoder sees the batch (see :func:`embed`).
    batch_key
        Column of ``obs`` with the batch. Needed unless the model is trained.
    reference
        What the cells are transformed to: a batch, several whose expression is averaged, or None for the average of
        all batches that cells of the training data have, each with the same weight. Other covariates stay what they
        are in each cell.
    layer, categorical_covariate_keys, continuous_covariate_keys, size_factor_key, n_latent, likelihood
        As for :func:`embed`.
    library_size
        For count likelihoods, the sum of a cell's values over all genes of ``adata``: a number, ``"latent"`` for
        each cell's own library size, or None for 10,000, which makes the layer comparable to counts after
        ``scanpy.pp.normalize_total(adata, target_sum=1e4)`` (take ``log1p`` of both before comparing). With other
        likelihoods, as ``"normal"``, the layer is on the scale of the input, and this must be None.
    key_added
        Key of ``layers`` and ``uns``.
    out
        A new file, ``.zarr`` or ``.h5ad``, to write the layer to instead, a few thousand cells at a time. It also gets
        ``obs``, ``var``, ``obsm`` and ``uns`` of ``adata``, but not ``X``. Needs ``pip install 'sccvae[ondisk]'``.
    copy, seed, model_options, train_options
        As for :func:`embed`.

    Returns
    -------
    None, or with ``copy=True`` the copy. It holds

    - ``layers[key_added]``: corrected expression, (n_cells, n_genes) float32, dense; with ``out`` it is only in that
      file, which appears at the end, whole, or not at all
    - ``uns[key_added]``: what :func:`embed` records, and ``reference`` (the batches), ``library_size`` (only for
      counts) and ``embedding`` (key of ``obsm``)
    - ``obsm["X_cvae"]`` and ``uns["X_cvae"]``: as from :func:`embed`

    Raises
    ------
    TypeError, KeyError, ValueError
        As for :func:`embed`; and ValueError if a reference is no batch of the training cells, the model does not decode
        from the batch, ``library_size`` has no meaning, ``key_added`` is the layer of the input, or there is no room
        in memory.
    OSError
        If ``out`` exists or cannot be written, or the disk is too full.

    Examples
    --------
    >>> sccvae.tl.correct(adata, batch_key="batch", reference="batch0", layer="counts")  # doctest: +SKIP
    >>> sc.pl.violin(adata, "LYZ", groupby="batch", layer="corrected", log=True)  # doctest: +SKIP
    """
    options = requested(locals())
    if out is not None and copy:
        msg = "out= writes a file of its own: leave copy=True out."
        raise ValueError(msg)
    to = target(adata, key_added, copy=copy)
    trained = isinstance(model, BaseModel)
    if not trained and model != "cvae":
        msg = f"model={model!r} cannot correct: only 'cvae', or a trained CVAE, decodes from the batch."
        raise ValueError(msg)
    if not trained and batch_key is None:
        msg = "batch_key= is needed: the column of adata.obs with the batch to correct for."
        raise ValueError(msg)

    def check(model: BaseModel) -> None:
        _batches(model, reference)
        layer_library_size(model, library_size)
        check_layer(to, model, key_added)

    out = None if out is None else Path(out)
    check_room(to, [key_added], out)
    fitted = trained_model(to, model, check=check, **options)
    batches, size = _batches(fitted, reference), layer_library_size(fitted, library_size)
    entry = {"reference": batches, "library_size": size}
    changes = fitted._in_batches(batches)
    if out is None:
        fitted._write_layers(to, changes, key_added, library_size=size)
        _record(to, fitted, key_added, entry, train_options, to)
    else:
        whole = without_matrices(to)
        key = _record(whole, fitted, key_added, entry, train_options, to)
        fitted._write_layers(to, changes, key_added, library_size=size, file=whole, out=out)
        to.obsm[key] = whole.obsm[key]
        to.uns |= {k: whole.uns[k] for k in (key, key_added)}
    return to if copy else None


def _record(
    to: AnnData, model: BaseModel, key_added: str, entry: dict, train_options: Mapping[str, Any] | None, cells: AnnData
) -> str:
    """Write to ``to`` the embedding of the cells, and what was done; the key of the embedding."""
    key, found = write_embedding(to, model, None, train_options, cells)
    to.uns[key_added] = found | plain(entry | {"embedding": key})
    return key


def _batches(model: BaseModel, reference: Any) -> list[Any]:
    """The batches to average over."""
    key = model.schema.batch_key
    if key is None or not model._decoder_sees_conditions:
        msg = (
            f"This {type(model).__name__} does not decode from the batch ({model.module.factors.p}). "
            f"Use {DECODES_FROM_CONDITIONS}, with batch_key=."
        )
        raise ValueError(msg)
    known = model._known_categories(key)
    if reference is None:
        return known
    batches = list(reference) if pd.api.types.is_list_like(reference) else [reference]
    names = [str(batch) for batch in known]
    if not batches or any(str(batch) not in names for batch in batches):
        msg = f"reference={reference!r} must be of the batches in obs[{key!r}]: {names}."
        raise ValueError(msg)
    return batches
