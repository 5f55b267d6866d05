"""Decoding cells, streamed: as they are, under other conditions, or moved in the latent space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from sccvae.distributions import Observation
from sccvae.model._base import evaluating
from sccvae.module import Batch
from sccvae.nn import check_sizes
from sccvae.train.callbacks import progress

#: Models whose decoder sees the conditions, for messages.
DECODES_FROM_CONDITIONS = "a CVAE with any prior but 'learned' or a GMVAE with w_prior='fixed' (the defaults of both)"


@dataclass(frozen=True)
class Change:
    """What is decoded instead of the cells as they are.

    Attributes
    ----------
    codes
        Column of ``Batch.codes`` -> code that every cell gets.
    covariates
        Column of ``Batch.covariates`` -> value that every cell gets.
    shift
        Added to z, (n_latent,); None for nothing.
    """

    codes: dict[int, int] = field(default_factory=dict)
    covariates: dict[int, float] = field(default_factory=dict)
    shift: torch.Tensor | None = None

    def batch(self, batch: Batch) -> Batch:
        """The same cells under the new conditions."""
        codes, covariates = batch.codes, batch.covariates
        if self.codes:
            codes = codes.clone()
            for column, code in self.codes.items():
                codes[:, column] = code
        if self.covariates:
            covariates = covariates.clone()
            for column, value in self.covariates.items():
                covariates[:, column] = value
        return replace(batch, codes=codes, covariates=covariates)

    def z(self, z: torch.Tensor) -> torch.Tensor:
        """The latent coordinates (..., n, n_latent), moved."""
        return z if self.shift is None else z + self.shift


class DecodingMixin:
    """The stream of decoded cells that correction, counterfactuals and predictive draws are made of."""

    def _observations(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        changes: Sequence[Change],
        *,
        n_samples: int | None,
        batch_size: int | None = None,
    ) -> Iterator[tuple[Batch, Iterator[Observation]]]:
        """Mini-batches of cells with p(x|z,c), once for each change and draw of z; for use under ``evaluating``.

        The draws of z are shared by the changes. ``n_samples=None`` decodes the mean of q(z|x).
        """
        for batch in self._stream(adata, indices, batch_size):
            q = self.module.inference(batch)["z"]
            if isinstance(q, torch.Tensor):
                draws = [q]
            else:
                draws = [q.loc] if n_samples is None else [q.sample() for _ in range(n_samples)]
            yield batch, self._decoded(batch, changes, draws)

    def _decoded(self, batch: Batch, changes: Sequence[Change], draws: list[torch.Tensor]) -> Iterator[Observation]:
        for change in changes:
            target = change.batch(batch)
            for z in draws:
                yield self.module.generative({"z": change.z(z)}, target)

    def _expression(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        changes: Sequence[Change],
        *,
        gene_list: Sequence[str] | None,
        library_size: float | Literal["latent"],
        n_samples: int,
        return_numpy: bool,
        out: Any | None,
        batch_size: int | None,
        seed: int,
        sd: Any | None = None,
        draw: bool = False,
        return_mean: bool = True,
        silent: bool = True,
    ) -> pd.DataFrame | np.ndarray | Any:
        """Expected expression, averaged over the changes; for the arguments see ``get_normalized_expression``.

        ``sd`` is an array like ``out``, for the standard deviation over the draws of z. With ``draw`` a single sample
        is a draw as well.
        """
        columns = self._columns(gene_list, adata)
        self._check_library_size(library_size)
        check_sizes(n_samples=n_samples)
        genes = pd.Index(self.schema.var_names)
        genes = genes if columns is None else genes[columns]
        rows = self._rows(adata, indices)
        shape = (len(rows), len(genes))
        apart = n_samples > 1 and not return_mean
        if n_samples > 1 or draw:
            self._check_draws("n_samples_overall" if draw else f"n_samples={n_samples}")
        if apart and out is not None:
            msg = "return_mean=False gives (n_samples, cells, genes), which out= does not take: leave one of them out."
            raise ValueError(msg)
        if out is not None and not (hasattr(out, "shape") and hasattr(out, "dtype")):
            msg = (
                f"out must be an array to write into, with a shape and a dtype, as those of numpy, zarr and h5py; not "
                f"{type(out).__name__}. `correct(out=...)` takes the path of a file."
            )
            raise TypeError(msg)
        if out is not None and (tuple(out.shape) != shape or not np.issubdtype(out.dtype, np.floating)):
            msg = f"out is {tuple(out.shape)} of {out.dtype}; it must be {shape} of float32 (or float64)."
            raise ValueError(msg)
        values = np.empty((n_samples, *shape) if apart else shape, dtype=np.float32) if out is None else out
        # Where nothing is summed, a mini-batch is put where it belongs as it is made.
        plain = isinstance(values, np.ndarray) and values.dtype == np.float32 and values.flags.carray
        once = plain and n_samples == len(changes) == 1 and columns is None and sd is None
        done = 0
        options = {"n_samples": None if n_samples == 1 and not draw else n_samples, "batch_size": batch_size}
        with evaluating(seed), progress(total=len(rows), unit=" cells", disable=silent) as bar:
            for batch, observations in self._observations(adata, indices, changes, **options):
                size = batch.library if library_size == "latent" else float(library_size)
                # One sum, or one for each draw; the draws follow each other within a change.
                sums: list[Any] = [None] * (n_samples if apart or sd is not None else 1)
                several = 0
                here = slice(done, done + len(batch))
                into = torch.from_numpy(values[here]) if once else None
                for p_x in observations:
                    one = p_x.expression(size, into)
                    one = one if columns is None else one[:, columns]
                    i = several % len(sums)
                    sums[i], several = one if sums[i] is None else sums[i] + one, several + 1
                if sd is not None:
                    draws = torch.stack(sums) / len(changes)  # (n_samples, n, genes)
                    sd[here] = draws.std(0).cpu().numpy()
                    sums = [draws.sum(0) * len(changes)]
                if apart:
                    values[:, here] = (torch.stack(sums) / len(changes)).cpu().numpy()
                elif not once:
                    values[here] = (sums[0] if several == 1 else sums[0] / several).cpu().numpy()
                done = here.stop
                bar.update(len(batch))
        if return_numpy or apart or out is not None:
            return values
        return pd.DataFrame(values, index=self._given(adata).obs_names[rows], columns=genes)

    def _columns(self, gene_list: Sequence[str] | None, adata: AnnData | None) -> np.ndarray | None:
        """Columns of the genes, (n,); None for all in the model's order.

        Without a list they are those of ``adata``, if it has the model's genes and no others: its layers can take them.
        """
        genes = pd.Index(self.schema.var_names)
        if gene_list is None:
            names = self._given(adata).var_names
            if len(names) != len(genes) or not names.isin(genes).all():
                return None
            gene_list = names
        wanted = [gene_list] if isinstance(gene_list, str) else list(gene_list)
        columns = genes.get_indexer(wanted)
        if (columns < 0).any():
            unknown = [g for g, i in zip(wanted, columns, strict=True) if i < 0]
            msg = f"The model has no genes {unknown[:5]}{' ...' if len(unknown) > 5 else ''}; see adata.var_names."
            raise ValueError(msg)
        return None if np.array_equal(columns, np.arange(len(genes))) else columns

    def _check_library_size(self, library_size: float | str) -> None:
        check_library_size(library_size)
        if self.module.likelihood.support != "counts" and library_size != 1:
            msg = (
                f"library_size={library_size!r} needs a count likelihood; this model gives means on the scale of "
                "its input."
            )
            raise ValueError(msg)

    def _change(self, condition: Mapping[str, Any]) -> Change:
        """The change that gives every cell these conditions.

        Raises
        ------
        TypeError
            If ``condition`` is no mapping.
        ValueError
            If it is empty, names something that the decoder does not know, or a continuous value is no finite number.
        """
        schema = self.schema
        check_condition(condition)
        if not self._decoder_sees_conditions:
            msg = (
                f"condition={dict(condition)!r}: this {type(self).__name__} does not decode from conditions "
                f"({self.module.factors.p}). Use {DECODES_FROM_CONDITIONS}, the condition being batch_key= or among "
                "categorical_covariate_keys= in setup_anndata; or `predict_perturbation`, which works in the latent "
                "space."
            )
            raise ValueError(msg)
        known = [*schema.categories, *schema.continuous]
        unknown = [key for key in condition if key not in known]
        if unknown or not condition:
            what = f"names {unknown}, which are no conditions of this model" if unknown else "is empty"
            msg = f"condition {what}; it was set up with {known}."
            raise ValueError(msg)
        codes, covariates = {}, {}
        for key, value in condition.items():
            if key in schema.categories:
                codes[list(schema.categories).index(key)] = self._category_code(key, value)
                continue
            if not isinstance(value, Real) or isinstance(value, bool) or not np.isfinite(value):
                msg = f"condition[{key!r}]={value!r} must be a finite number: {key!r} is a continuous covariate."
                raise ValueError(msg)
            covariates[schema.continuous.index(key)] = float(value)
        return Change(codes, covariates)

    @property
    def _decoder_sees_conditions(self) -> bool:
        return any("c" in f.parents for f in self.module.factors.generative if f.variable == "x")


def check_condition(condition: Any) -> None:
    """Refuse what is no mapping."""
    if not isinstance(condition, Mapping):
        msg = f"condition={condition!r} must be a dictionary of obs columns and values, as {{'treatment': 'stim'}}."
        raise TypeError(msg)


def check_library_size(size: Any) -> None:
    """Refuse what is neither a positive number nor ``"latent"``."""
    number = isinstance(size, Real) and not isinstance(size, bool) and 0 < size < np.inf
    if not (number or (isinstance(size, str) and size == "latent")):
        msg = f"library_size={size!r} must be a positive number or 'latent', which is each cell's own."
        raise ValueError(msg)
