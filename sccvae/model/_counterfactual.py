"""What if: cells under other conditions, by the decoder or by arithmetic in the latent space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from sccvae.data.categories import match, obs_column
from sccvae.model._decoding import Change, DecodingMixin


class PerturbationMixin(DecodingMixin):
    """Latent arithmetic (scGen), for any model with an encoder and a decoder."""

    def predict_perturbation(
        self,
        source: Any,
        target: Any,
        *,
        condition_key: str | None = None,
        cell_type_key: str | None = None,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        n_samples: int = 1,
        return_numpy: bool = False,
        out: Any | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> pd.DataFrame | np.ndarray | Any:
        """Expected expression of cells had they been perturbed: z + delta, decoded.

        Delta is that of :meth:`latent_delta`. The cells may be of a type that was never seen perturbed.
        For a model that decodes from its conditions use :meth:`predict_counterfactual`: its z is made to forget them,
        so there is little for a delta to find, and the cells are decoded under their own conditions.

        Parameters
        ----------
        source, target
            Values of ``obs[condition_key]`` before and after, such as ``"ctrl"`` and ``"stim"``.
        condition_key
            Column of ``obs`` of the training data; None for ``batch_key``.
        cell_type_key
            Column of ``obs`` of the training data that is balanced over, see :meth:`latent_delta`.
        adata
            Cells to perturb, in the state ``source``; None for the training data.
        indices
            Rows (or a mask) of them. If neither is given, all training cells with the value ``source`` are perturbed.
        gene_list, library_size, n_samples, return_numpy, out, batch_size, seed
            As for ``get_normalized_expression``.

        Returns
        -------
        As ``get_normalized_expression``.

        Raises
        ------
        KeyError, TypeError, ValueError
            As :meth:`latent_delta` and ``get_normalized_expression``; nothing is written then.

        References
        ----------
        Lotfollahi, Wolf & Theis 2019, "scGen predicts single-cell perturbation responses", Nat. Methods 16:715-721.
        """
        if adata is None and indices is None:
            indices = self._in_state(condition_key, source)
        delta = self.latent_delta(
            source, target, condition_key=condition_key, cell_type_key=cell_type_key, batch_size=batch_size
        )
        return self._expression(
            adata,
            indices,
            [self._shift(delta)],
            gene_list=gene_list,
            library_size=library_size,
            n_samples=n_samples,
            return_numpy=return_numpy,
            out=out,
            batch_size=batch_size,
            seed=seed,
        )

    def latent_delta(
        self,
        source: Any,
        target: Any,
        *,
        condition_key: str | None = None,
        cell_type_key: str | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Mean of z of the perturbed training cells minus that of the others.

        With ``cell_type_key`` it is the mean, each type with the same weight, of the differences within the cell types
        that have both. scGen balances by drawing cells of the rarer types again; this is the limit of many draws, and
        a type that lacks one of the two states cannot lean on it.

        Parameters
        ----------
        source, target
            Values of ``obs[condition_key]`` before and after.
        condition_key
            Column of ``obs`` of the training data; None for ``batch_key``.
        cell_type_key
            Column of ``obs`` of the training data with types to balance; None takes all cells alike. Cells without a
            type (NaN) are left out.
        batch_size
            Cells at a time.

        Returns
        -------
        (n_latent,) float64.

        Raises
        ------
        KeyError
            If a column does not exist.
        ValueError
            If the model has no data, a state has no cells, or no cell type has both.
        """
        adata = self._given(None)
        groups = [self._in_state(condition_key, state) for state in (source, target)]
        types = np.full(adata.n_obs, "all", dtype=object)
        if cell_type_key is not None:
            types = obs_column(adata, cell_type_key, "cell_type_key").astype(object).to_numpy()
        means = []
        for rows in groups:
            z = self.get_latent_representation(indices=rows, batch_size=batch_size)
            means.append(pd.DataFrame(z, dtype=np.float64).groupby(types[rows]).mean())  # leaves NaN out
        before, after = means
        both = before.index.intersection(after.index)
        if not len(both):
            msg = (
                f"No cell type in obs[{cell_type_key!r}] has cells of both {source!r} ({list(before.index)}) and "
                f"{target!r} ({list(after.index)}), so there is no difference to learn."
            )
            raise ValueError(msg)
        return (after.loc[both] - before.loc[both]).to_numpy().mean(axis=0)

    def _in_state(self, key: str | None, state: Any) -> np.ndarray:
        """Rows of the training data whose condition is ``state``, (n,) int64."""
        key = self.schema.batch_key if key is None else key
        if key is None:
            msg = "condition_key= is needed: the column of adata.obs with the two states. This model has no batch_key."
            raise ValueError(msg)
        column = obs_column(self._given(None), key, "condition_key")
        rows = np.flatnonzero(match(np.array([state], dtype=object), column) >= 0) if np.isscalar(state) else []
        if not len(rows):
            known = sorted(column.dropna().astype(str).unique())
            msg = f"No cell of the training data has obs[{key!r}] == {state!r}; there are {known}."
            raise ValueError(msg)
        return rows

    def _shift(self, shift: Any) -> Change:
        """The change that moves z by ``shift`` (n_latent,)."""
        shift = np.asarray(shift, dtype=np.float32)
        if shift.shape != (self.settings["n_latent"],) or not np.isfinite(shift).all():
            msg = f"shift has shape {shift.shape}; it must be {self.settings['n_latent']} finite numbers, as z has."
            raise ValueError(msg)
        return Change(shift=torch.from_numpy(shift).to(self.module.device))


class CounterfactualMixin(DecodingMixin):
    """Other conditions, for a model whose decoder sees them."""

    def predict_counterfactual(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        condition: Mapping[str, Any],
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        n_samples: int = 1,
        return_numpy: bool = False,
        out: Any | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> pd.DataFrame | np.ndarray | Any:
        """Expected expression of cells had their conditions been others.

        Each cell is encoded under its own conditions and decoded with those in ``condition`` replaced: what z holds,
        and all other conditions, stay the cell's own. A model whose decoder sees the condition (a CVAE with any prior
        but ``"learned"``, a GMVAE with ``w_prior="fixed"``; the defaults of both) learns to keep it out of z, and so
        can do this for a cell type that was never seen under the new condition.

        The values are expectations. To compare with measured cells on the log scale, draw cells with
        ``posterior_predictive_sample(condition=...)``: the log of a mean is not the mean of logs.

        Parameters
        ----------
        adata, indices, batch_size, seed
            As for ``get_latent_representation``.
        condition
            Column of ``obs`` -> value for all cells: a category of ``batch_key`` or of one of the
            ``categorical_covariate_keys``, or a number for one of the ``continuous_covariate_keys``. Several at once
            are allowed, in combinations that no cell had.
        gene_list, library_size, n_samples, return_numpy, out
            As for ``get_normalized_expression``.

        Returns
        -------
        As ``get_normalized_expression``.

        Raises
        ------
        TypeError
            If ``condition`` is no dictionary, and as for ``get_normalized_expression``.
        ValueError
            If a condition or category is not known, the model does not decode from its conditions, a value is no
            finite number, and as for ``get_normalized_expression``. Nothing is written then.

        References
        ----------
        Sohn, Lee & Yan 2015, "Learning structured output representation using deep conditional generative models".

        Examples
        --------
        >>> CVAE.setup_anndata(adata, layer="counts", batch_key="treatment")  # doctest: +SKIP
        >>> model.predict_counterfactual(controls, condition={"treatment": "stim"}, library_size=1e4)  # doctest: +SKIP
        """
        return self._expression(
            adata,
            indices,
            [self._change(condition)],
            gene_list=gene_list,
            library_size=library_size,
            n_samples=n_samples,
            return_numpy=return_numpy,
            out=out,
            batch_size=batch_size,
            seed=seed,
        )
