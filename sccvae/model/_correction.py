"""Decoded expression: denoised, or as it would be in another batch; as values, or written to layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from sccvae.data.checks import check_no_view
from sccvae.data.out import InSparse, check_room, new_layers
from sccvae.model._base import inference_batch
from sccvae.model._decoding import DECODES_FROM_CONDITIONS, Change, DecodingMixin, check_library_size
from sccvae.nn import check_sizes

#: Sum of a cell's values in a layer, if nothing else is asked for: scanpy's usual target_sum.
LIBRARY_SIZE = 1e4


class CorrectionMixin(DecodingMixin):
    """Normalised and batch-corrected expression."""

    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        transform_batch: Any | Sequence[Any] | None = None,
        gene_list: Sequence[str] | str | None = None,
        library_size: float | Literal["latent"] = 1,
        n_samples: int = 1,
        n_samples_overall: int | None = None,
        return_mean: bool = True,
        return_numpy: bool = False,
        out: Any | None = None,
        batch_size: int | None = None,
        silent: bool = True,
        seed: int = 0,
    ) -> pd.DataFrame | np.ndarray | Any:
        """Expected expression of each cell, decoded from its latent coordinates.

        Parameters
        ----------
        adata, indices, batch_size, seed
            As for ``get_latent_representation``.
        transform_batch
            Decode as if every cell came from this batch (a category of ``batch_key``); a list averages over several,
            ``"all"`` over all of the training data. None keeps each cell's own.
        gene_list
            Genes to give, in this order, or a single one. None for all: in the order of the AnnData's ``var_names`` if
            it has the model's genes and no others, so that the values fit its layers; else in that of the model.
        library_size
            For count likelihoods: the sum over all genes of a cell's values; ``"latent"`` is the cell's own library
            size. Other likelihoods give the mean on the scale of the input and take no library size.
        n_samples
            1 decodes the mean of q(z|x); more average over that many draws.
        n_samples_overall
            Give so many draws of the whole population instead: cells at random, with replacement, in their order, of
            each a draw of z. Not with ``n_samples``.
        return_mean
            If false, the ``n_samples`` draws (more than one) are given one by one, not averaged.
        return_numpy
            An array instead of a data frame.
        out
            An array on disk to write into instead, (n, genes) floating: a zarr array, an h5py dataset or a
            ``numpy.memmap``. A few thousand cells are in memory at a time, however many there are.
        silent
            Show no progress bar.

        Returns
        -------
        (n, genes) float32, cells x genes; a data frame with names, or an array; ``out``, if given. With
        ``n_samples_overall`` that is n. With ``return_mean=False`` and several samples an array (n_samples, n, genes).

        Raises
        ------
        ValueError
            If a gene or batch is not known, the model cannot change the batch, a number is not positive, draws are
            asked of a deterministic encoder, options do not fit together, or ``out`` has another shape or no floating
            type. Nothing is written then.
        TypeError
            If ``n_samples`` is no whole number, or ``out`` no array.
        """
        if n_samples_overall is not None:
            check_sizes(n_samples_overall=n_samples_overall)
            if n_samples != 1:
                msg = f"n_samples={n_samples} and n_samples_overall={n_samples_overall}: give one of them."
                raise ValueError(msg)
            rows = self._rows(adata, indices)
            indices = np.sort(np.random.default_rng(seed).choice(rows, n_samples_overall))
        return self._expression(
            adata,
            indices,
            self._in_batches(transform_batch),
            gene_list=gene_list,
            library_size=library_size,
            n_samples=n_samples,
            return_numpy=return_numpy,
            out=out,
            batch_size=batch_size,
            seed=seed,
            draw=n_samples_overall is not None,
            return_mean=return_mean,
            silent=silent,
        )

    def correct(
        self,
        adata: AnnData | None = None,
        *,
        transform_batch: Any | Sequence[Any] | None = None,
        library_size: float | Literal["latent"] | None = None,
        key_added: str = "corrected",
        sparse_below: float | None = None,
        dtype: Any = "float32",
        n_samples: int = 1,
        sd: bool = False,
        out: str | Path | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        """Write expected expression to a layer: denoised, or as it would be in one batch.

        Expected expression is not counts: it lacks the noise of single counts, so it suits plots, means and
        regressions, not tests that assume independent noise in each cell. For these see
        :meth:`differential_expression`.

        Parameters
        ----------
        adata
            Cells with the model's genes, in any order; None for the training data.
        transform_batch
            As if every cell came from this batch; a list averages over several, ``"all"`` over all of the training
            data, each with the same weight. None keeps each cell's own: denoised, not corrected.
        library_size
            For count likelihoods, the sum of a cell's values over the model's genes: None is 10,000, comparable to
            counts after ``scanpy.pp.normalize_total(adata, target_sum=1e4)`` (take ``log1p`` of both); ``"latent"`` is
            each cell's own library size, comparable to its raw counts. Other likelihoods give means on the scale of
            their input, such as log-normalised values, and take none.
        key_added
            Key of ``layers`` and ``uns``.
        sparse_below
            Store as CSR, with values smaller than this in size set to zero, in units of the layer: expected expression
            has no zeros of its own. With the default library size, 0.1 is 0.1 counts in 10,000. None stores all.
        dtype
            Floating type of the layer; with ``sparse_below`` float32 or float64.
        n_samples
            1 decodes the mean of q(z|x); more average over that many draws.
        sd
            Write the standard deviation over the ``n_samples`` draws as well. It is what the position of the cell in
            the latent space leaves open; the weights of the decoder are taken as known.
        out
            A new file, ``.zarr`` or ``.h5ad``, to write the layers to instead, a few thousand cells at a time. It also
            gets ``obs``, ``var``, ``obsm`` and ``uns`` of ``adata``, but not ``X``. Needs
            ``pip install 'sccvae[ondisk]'``.
        batch_size, seed
            As for ``get_latent_representation``.

        Returns
        -------
        None. Written to ``adata``, or to the file (whole, or not at all):

        - ``layers[key_added]``, (n_cells, n_genes); with ``sd`` also ``layers[key_added + "_sd"]``
        - ``uns[key_added]``: ``transform_batch`` (the batches, or ``"own"``), ``n_samples``, and for counts
          ``library_size``

        Raises
        ------
        ValueError
            If a batch is not known, the model cannot change it, ``adata`` is a view or has genes that the model does
            not know, ``key_added`` is the layer of the input, options do not fit together, ``sd`` is asked of a
            deterministic encoder, or there is no room in memory. Nothing is written then.
        TypeError
            If ``n_samples`` is no whole number.
        OSError
            If ``out`` exists or cannot be written, or the disk is too full.

        Examples
        --------
        >>> model.correct(transform_batch="all")  # doctest: +SKIP
        >>> sc.pl.violin(adata, "LYZ", groupby="batch", layer="corrected", log=True)  # doctest: +SKIP
        """
        to = self._given(adata)
        out = None if out is None else Path(out)
        if out is None:
            check_no_view(to)
        check_sizes(n_samples=n_samples)
        if sd:
            self._check_draws("sd=True")
            if n_samples < 2:
                msg = f"sd=True needs at least two draws: pass n_samples=25, not {n_samples}."
                raise ValueError(msg)
        batches = self._batches_meant(transform_batch)
        size = layer_library_size(self, library_size)
        entry = {"transform_batch": "own" if batches is None else [str(b) for b in np.atleast_1d(batches)]}
        entry |= {"n_samples": n_samples} | ({} if size is None else {"library_size": size})
        file = None
        if out is not None:
            file = without_matrices(to)
            file.uns[key_added] = entry
        self._write_layers(
            to,
            self._in_batches(batches),
            key_added,
            library_size=size,
            sparse_below=sparse_below,
            dtype=dtype,
            n_samples=n_samples,
            sd=sd,
            file=file,
            out=out,
            batch_size=batch_size,
            seed=seed,
        )
        if out is None:
            to.uns[key_added] = entry

    def _write_layers(
        self,
        to: AnnData,
        changes: list[Change],
        key_added: str,
        *,
        library_size: float | str | None,
        sparse_below: float | None = None,
        dtype: Any = np.float32,
        n_samples: int = 1,
        sd: bool = False,
        file: AnnData | None = None,
        out: Path | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        """Write what is decoded from the cells of ``to`` to its layers, or with those of ``file`` to ``out``."""
        keys = [key_added, f"{key_added}_sd"][: 1 + sd]
        for key in keys:
            check_layer(to, self, key)
        if not np.issubdtype(np.dtype(dtype), np.floating):
            msg = f"dtype={dtype!r} must be a floating type: expected expression is no whole number."
            raise ValueError(msg)
        if sparse_below is not None and np.dtype(dtype) not in (np.float32, np.float64):
            msg = f"dtype={dtype!r}: a sparse layer holds float32 or float64; use one, or leave sparse_below out."
            raise ValueError(msg)
        if sparse_below is not None and (out is not None or not sparse_below > 0):
            msg = f"sparse_below={sparse_below!r} must be positive, and not given with out=, which writes dense layers."
            raise ValueError(msg)
        if sparse_below is None:
            check_room(to, keys, out, dtype)
        if sd and batch_size is None:  # all draws of a mini-batch are held at once
            batch_size = max(1, inference_batch(len(self.schema.var_names)) // n_samples)

        def fill(layers: list[Any]) -> None:
            self._expression(
                to,
                None,
                changes,
                gene_list=to.var_names,
                library_size=1 if library_size is None else library_size,
                n_samples=n_samples,
                return_numpy=True,
                out=layers[0],
                sd=layers[1] if sd else None,
                batch_size=batch_size,
                seed=seed,
            )

        if out is not None:
            with new_layers(file, keys, out, dtype) as layers:
                fill(layers)
            return
        if sparse_below is None:
            layers = [np.empty(to.shape, dtype) for _ in keys]
            fill(layers)
        else:
            sinks = [InSparse(to.shape, dtype, sparse_below) for _ in keys]
            fill(sinks)
            layers = [sink.matrix() for sink in sinks]
        for key, layer in zip(keys, layers, strict=True):
            to.layers[key] = layer

    def _batches_meant(self, transform_batch: Any) -> Any:
        """``"all"`` written out, unless a batch has that name."""
        key = self.schema.batch_key
        if isinstance(transform_batch, str) and transform_batch == "all" and key:
            return transform_batch if "all" in self.schema.categories[key] else self._known_categories(key)
        return transform_batch

    def _in_batches(self, transform_batch: Any) -> list[Change]:
        """One change for each batch that is averaged over."""
        transform_batch = self._batches_meant(transform_batch)
        if transform_batch is None:
            return [Change()]
        key = self.schema.batch_key
        if key is None or not self._decoder_sees_conditions:
            msg = (
                f"transform_batch={transform_batch!r}: this {type(self).__name__} does not decode from the batch. Use "
                f"{DECODES_FROM_CONDITIONS}, with batch_key= in setup_anndata."
            )
            raise ValueError(msg)
        several = pd.api.types.is_list_like(transform_batch)
        if several and not len(transform_batch):
            msg = "transform_batch is empty; name a batch, several, or None for each cell's own."
            raise ValueError(msg)
        return [self._change({key: b}) for b in (transform_batch if several else [transform_batch])]


def without_matrices(adata: AnnData) -> AnnData:
    """What a file of new layers has of ``adata``: no matrix, no notes about other layers, and nothing of set-ups."""

    def own(of: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in of.items() if not key.startswith("_scvi")}

    obs = adata.obs[list(own(dict.fromkeys(adata.obs)))].copy()
    uns = {key: value for key, value in own(adata.uns).items() if key not in adata.layers}
    return AnnData(obs=obs, var=adata.var.copy(), obsm=own(adata.obsm), uns=uns)


def layer_library_size(model: Any, size: float | str | None) -> float | str | None:
    """The library size to decode at; None where there is no such thing."""
    if model.module.likelihood.support != "counts":
        if size is not None:
            msg = f"library_size={size!r} is for count likelihoods; here the layer is on the scale of the input."
            raise ValueError(msg)
        return None
    if size is None:
        return LIBRARY_SIZE
    check_library_size(size)
    return size


def check_layer(adata: AnnData, model: Any, key: str) -> None:
    """A layer needs a value for every gene of ``adata``, and must not take the place of the input."""
    if key == model.schema.layer:
        msg = f"key_added={key!r} is the layer of the input, which would be lost: choose another key."
        raise ValueError(msg)
    if "/" in key:
        msg = f"key_added={key!r}: a file would hold '/' as layers within layers; choose a key without it."
        raise ValueError(msg)
    unknown = adata.var_names.difference(model.schema.var_names, sort=False)
    if len(unknown):
        msg = (
            f"{len(unknown)} of the {adata.n_vars} genes of adata are not known to the model, such as "
            f"{list(unknown[:5])}, and a layer needs them all. Subset adata first: "
            "`adata = adata[:, model.schema.var_names].copy()`."
        )
        raise ValueError(msg)
