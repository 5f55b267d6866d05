"""Decoded expression: denoised, or as it would be in another batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from sccvae.model._decoding import Change, DecodingMixin


class CorrectionMixin(DecodingMixin):
    """Normalised and batch-corrected expression."""

    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        transform_batch: Any | Sequence[Any] | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        n_samples: int = 1,
        return_numpy: bool = False,
        out: Any | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> pd.DataFrame | np.ndarray | Any:
        """Expected expression of each cell, decoded from its latent coordinates.

        Parameters
        ----------
        adata, indices, batch_size, seed
            As for ``get_latent_representation``.
        transform_batch
            Decode as if every cell came from this batch (a category of ``batch_key``); a list averages over several.
            None
            keeps each cell's own.
        gene_list
            Genes to give, in this order; None for all.
        library_size
            For count likelihoods: the sum over all genes of a cell's values; ``"latent"`` is the cell's own library
            size.
            Other likelihoods give the mean on the scale of the input and take no library size.
        n_samples
            1 decodes the mean of q(z|x); more average over that many draws.
        return_numpy
            An array instead of a data frame.
        out
            An array on disk to write into instead, (n, genes) floating: a zarr array, an h5py dataset or a
            ``numpy.memmap``. A few thousand cells are in memory at a time, however many there are.

        Returns
        -------
        (n, genes) float32, cells x genes; a data frame with names, or an array; ``out``, if given.

        Raises
        ------
        ValueError
            If a gene or batch is not known, the model cannot change the batch, a number is not positive, or ``out``
            has another shape or no floating type. Nothing is written then.
        """
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
        )

    def _in_batches(self, transform_batch: Any) -> list[Change]:
        """One change for each batch that is averaged over."""
        if transform_batch is None:
            return [Change()]
        key = self.schema.batch_key
        if key is None or not self._decoder_sees_conditions:
            msg = (
                f"transform_batch={transform_batch!r}: this {type(self).__name__} does not decode from the "
                "batch. Use a CVAE "
                "with batch_key= in setup_anndata and prior='fixed'."
            )
            raise ValueError(msg)
        several = isinstance(transform_batch, (list, tuple, np.ndarray, pd.Index))
        if several and not len(transform_batch):
            msg = "transform_batch is empty; name a batch, several, or None for each cell's own."
            raise ValueError(msg)
        return [self._change({key: b}) for b in (transform_batch if several else [transform_batch])]
