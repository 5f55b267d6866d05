"""Embed cells in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from anndata import AnnData

from sccvae.model import BaseModel

from ._job import record, requested, target, trained_model

if TYPE_CHECKING:
    from sccvae.distributions import Likelihood


def embed(
    adata: AnnData,
    model: Literal["ae", "vae", "cvae", "gmvae"] | BaseModel = "cvae",
    *,
    batch_key: str | None = None,
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
    """Train a model on the cells and write their latent coordinates to ``obsm``.

    The whole job: set-up, training, embedding. Nothing else in ``adata`` is touched. Where the same model is to give
    more than an embedding, train one of ``sccvae.model`` and pass it here and to :func:`correct`.

    Parameters
    ----------
    adata
        Cells x genes, in memory or backed.
    model
        ``"cvae"`` (an embedding that forgets the batch), ``"gmvae"`` (which also clusters: see :func:`cluster`),
        ``"vae"``, ``"ae"``, or a trained model. A trained model embeds the cells of ``adata`` as they are (the same
        genes, in any order): the arguments from ``batch_key`` to ``likelihood``, ``seed``, ``model_options`` and
        ``train_options`` are then its own.
    batch_key
        Column of ``obs`` with the batch; for the CVAE and the GMVAE.
    layer
        Layer with the values, None for ``X``. Count likelihoods, the default of all but the AE, need raw counts; an AE
        wants log-normalised values.
    categorical_covariate_keys, continuous_covariate_keys
        More columns of ``obs`` that the embedding is to forget; for the CVAE and the GMVAE.
    size_factor_key
        Column of ``obs`` with size factors, used in place of the sums of counts.
    n_latent
        Number of latent dimensions; None for the default of the model's class.
    likelihood
        As for :class:`sccvae.model.VAE`. None is the default of the model: ``"nb"``, but for a CVAE or GMVAE whose
        decoder knows the batch a negative binomial with an offset and a dispersion for each gene and batch, which reads
        cells at the median depth; the CVAE then aligns batches more strongly, too. There ``"nb"`` is the plain one.
    key_added
        Key of ``obsm`` and ``uns``; None is ``"X_"`` and the name of the model, such as ``"X_cvae"``.
    copy
        Return a copy with the results and leave ``adata`` as it is.
    seed
        Of the weights, the split into training and validation cells, the order of the cells, and the noise.
    model_options
        More arguments of the model's class, such as ``{"n_hidden": 256, "prior": "learned"}``.
    train_options
        Arguments of ``train``, such as ``{"max_epochs": 50, "progress_bar": False}``.

    Returns
    -------
    None, or with ``copy=True`` the copy. It holds

    - ``obsm[key_added]``: latent coordinates (the mean of q(z|x)), (n_cells, n_latent) float32
    - ``uns[key_added]``: ``model`` (class), ``sccvae_version``, ``seed``, ``params``, ``epochs``, ``elbo_train`` and
      ``elbo_validation`` (negative ELBO in nats per cell of the weights kept; lower is better), and ``history``,
      which :func:`sccvae.pl.history` draws

    Raises
    ------
    TypeError
        If ``adata``, ``model`` or ``key_added`` is something else.
    KeyError
        If the layer or a column does not exist.
    ValueError
        If ``adata`` is a view (and ``copy`` is false), ``key_added`` holds a ``/``, arguments do not fit each other, or
        the model cannot describe the values; the message says what to do.

    Examples
    --------
    >>> sccvae.tl.embed(adata, batch_key="batch", layer="counts")  # doctest: +SKIP
    >>> sc.pp.neighbors(adata, use_rep="X_cvae")  # doctest: +SKIP
    """
    options = requested(locals())
    to = target(adata, key_added, copy=copy)
    trained = trained_model(to, model, **options)
    write_embedding(to, trained, key_added, train_options)
    return to if copy else None


def write_embedding(
    adata: AnnData,
    model: BaseModel,
    key: str | None,
    train_options: Mapping[str, Any] | None,
    cells: AnnData | None = None,
) -> tuple[str, dict[str, Any]]:
    """Write the embedding (of ``cells``, if given) and its record to ``adata``; return the key and the record."""
    key = f"X_{type(model).__name__.lower()}" if key is None else key
    adata.obsm[key] = model.get_latent_representation(adata if cells is None else cells)
    adata.uns[key] = record(model, train_options)
    return key, adata.uns[key]
