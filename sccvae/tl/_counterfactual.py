"""Expression under other conditions in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from anndata import AnnData

from sccvae.data.out import check_room
from sccvae.model import BaseModel
from sccvae.model._correction import check_layer, layer_library_size
from sccvae.model._decoding import check_condition

from ._embed import write_embedding
from ._job import plain, requested, target, trained_model

if TYPE_CHECKING:
    from sccvae.distributions import Likelihood


def counterfactual(
    adata: AnnData,
    condition: Mapping[str, Any],
    model: Literal["cvae"] | BaseModel = "cvae",
    *,
    batch_key: str | None = None,
    layer: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    size_factor_key: str | None = None,
    n_latent: int | None = None,
    likelihood: str | Likelihood | None = None,
    library_size: float | Literal["latent"] | None = None,
    key_added: str = "counterfactual",
    copy: bool = False,
    seed: int = 0,
    model_options: Mapping[str, Any] | None = None,
    train_options: Mapping[str, Any] | None = None,
) -> AnnData | None:
    """Train a CVAE on the cells and write the expression that they would have under another condition to ``layers``.

    The whole job: set-up, training, embedding, and decoding of every cell with its condition replaced. The values are
    expected expression, without the noise of single counts. Cells that have the condition already get their own
    expected expression, so the two sides of a comparison are alike.

    Parameters
    ----------
    adata
        Cells x genes, in memory or backed.
    condition
        Column of ``obs`` -> value that every cell is given, such as ``{"treatment": "stim"}``. Other conditions stay
        what they are in each cell.
    model
        ``"cvae"``, or a trained model that decodes from these conditions (see :func:`embed`).
    batch_key
        First condition of the model; None takes the first column in ``condition``, unless that is one of the
        covariates. All other columns in ``condition`` must be covariates.
    layer, categorical_covariate_keys, continuous_covariate_keys, size_factor_key, n_latent, likelihood
        As for :func:`embed`.
    library_size
        As for :func:`correct`.
    key_added
        Key of ``layers`` and ``uns``.
    copy, seed, model_options, train_options
        As for :func:`embed`.

    Returns
    -------
    None, or with ``copy=True`` the copy. It holds

    - ``layers[key_added]``: expression under the condition, (n_cells, n_genes) float32, dense
    - ``uns[key_added]``: what :func:`embed` records, and ``condition`` (a ``/`` in the name of a column is a ``|``
      there), ``library_size`` (only for counts) and ``embedding`` (key of ``obsm``)
    - ``obsm["X_cvae"]`` and ``uns["X_cvae"]``: as from :func:`embed`

    Raises
    ------
    TypeError, KeyError, ValueError
        As for :func:`embed` and ``model.predict_counterfactual``; and ValueError if ``library_size`` has no meaning, or
        ``key_added`` is the layer of the input, or there is no room in memory. All before the training.

    Examples
    --------
    >>> sccvae.tl.counterfactual(adata, {"treatment": "stim"}, layer="counts")  # doctest: +SKIP
    >>> sc.pl.violin(adata, "ISG15", groupby="cell_type", layer="counterfactual", log=True)  # doctest: +SKIP
    """
    check_condition(condition)
    given = (categorical_covariate_keys, continuous_covariate_keys)
    covariates = [key for keys in given if keys is not None for key in keys]
    if isinstance(model, str) and batch_key is None:
        batch_key = next((key for key in condition if key not in covariates), None)
    options = requested(locals())
    to = target(adata, key_added, copy=copy)
    if not isinstance(model, BaseModel) and model != "cvae":
        msg = f"model={model!r} cannot be asked what if: only 'cvae', or a trained model, decodes from a condition."
        raise ValueError(msg)

    def check(model: BaseModel) -> None:
        model._change(condition)
        layer_library_size(model, library_size)
        check_layer(to, model, key_added)

    check_room(to, [key_added], None)
    fitted = trained_model(to, model, check=check, **options)
    size = layer_library_size(fitted, library_size)
    fitted._write_layers(to, [fitted._change(condition)], key_added, library_size=size)
    key, entry = write_embedding(to, fitted, None, train_options)
    to.uns[key_added] = entry | plain({"condition": condition, "library_size": size, "embedding": key})
    return to if copy else None
