"""Decoded expression: denoised, or as it would be in another batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from sccvae.model._base import evaluating


class CorrectionMixin:
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
        schema = self.schema
        columns = None
        if gene_list is not None:
            columns = pd.Index(schema.var_names).get_indexer(list(gene_list))
            if (columns < 0).any():
                unknown = [g for g, i in zip(gene_list, columns, strict=True) if i < 0]
                msg = f"The model has no genes {unknown[:5]}{' ...' if len(unknown) > 5 else ''}; see adata.var_names."
                raise ValueError(msg)
        if library_size != "latent" and not (isinstance(library_size, Real) and library_size > 0):
            msg = f"library_size={library_size!r} must be a positive number or 'latent'."
            raise ValueError(msg)
        if n_samples < 1:
            msg = f"n_samples={n_samples} must be at least 1."
            raise ValueError(msg)
        codes = self._target_codes(transform_batch)
        counts = self.module.likelihood.support == "counts"
        if not counts and library_size != 1:
            msg = (
                f"library_size={library_size!r} needs a count likelihood; this model gives means on the scale of "
                "its input."
            )
            raise ValueError(msg)
        rows = self._rows(adata, indices)
        shape = (len(rows), len(schema.var_names) if columns is None else len(columns))
        if out is not None and (tuple(out.shape) != shape or not np.issubdtype(out.dtype, np.floating)):
            msg = f"out is {tuple(out.shape)} of {out.dtype}; it must be {shape} of float32 (or float64)."
            raise ValueError(msg)
        values = np.empty(shape, dtype=np.float32) if out is None else out
        done = 0
        with evaluating(seed):
            for batch in self._stream(adata, indices, batch_size):
                q = self.module.inference(batch)["z"]
                if isinstance(q, torch.Tensor):
                    draws = [q]
                else:
                    draws = [q.loc] if n_samples == 1 else [q.sample() for _ in range(n_samples)]
                size = batch.library if library_size == "latent" else float(library_size)
                total = None
                for code in codes:
                    target = batch if code is None else _in_batch(batch, code)
                    for z in draws:
                        one = self.module.generative({"z": z}, target).expression(size)
                        one = one if columns is None else one[:, columns]
                        total = one if total is None else total + one
                several = len(codes) * len(draws)
                values[done : done + len(total)] = (total if several == 1 else total / several).cpu().numpy()
                done += len(total)
        if return_numpy or out is not None:
            return values
        names = self._given(adata).obs_names[rows]
        genes = pd.Index(schema.var_names)
        return pd.DataFrame(values, index=names, columns=genes if columns is None else genes[columns])

    def _target_codes(self, transform_batch: Any) -> list[int | None]:
        if transform_batch is None:
            return [None]
        if self.schema.batch_key is None or not self._decoder_sees_conditions:
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
        return [self._batch_code(b) for b in (transform_batch if several else [transform_batch])]

    @property
    def _decoder_sees_conditions(self) -> bool:
        return any("c" in f.parents for f in self.module.factors.generative if f.variable == "x")


def _in_batch(batch, code: int):
    """The same cells with the code of their first condition replaced."""
    codes = batch.codes.clone()
    codes[:, 0] = code
    return replace(batch, codes=codes)
