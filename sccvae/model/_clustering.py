"""Clusters of cells: names, probabilities, entropy, what lies outside, and how components hang together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.special import entr

from sccvae.model._base import evaluating
from sccvae.nn import check_sizes


class ClusteringMixin:
    """For models whose module has ``classify(batch)``, the probabilities of its components."""

    @property
    def n_components(self) -> int:
        """Number of components."""
        return self.module.n_components

    @property
    def classes(self) -> list[str]:
        """Names of known classes, in the order of the components; none for an unsupervised model."""
        return []

    @property
    def component_names(self) -> list[str]:
        """Names of the components: the classes of ``labels_key``, then numbers that no class is called."""
        classes = self.classes
        free = (str(k) for k in count(len(classes)) if str(k) not in classes)
        return [*classes, *islice(free, self.n_components - len(classes))]

    def predict(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        soft: bool = False,
        batch_size: int | None = None,
    ) -> pd.Series | pd.DataFrame:
        """Component of each cell.

        Parameters
        ----------
        adata
            Cells with the model's genes, in any order; None for the training data.
        indices
            Rows (or a mask) of the cells; None for all.
        soft
            Give the probabilities of all components instead.
        batch_size
            Cells at a time.

        Returns
        -------
        A categorical series, indexed by cell; with ``soft`` a data frame (n, K) of float32, rows summing to 1.
        """
        q = self.predict_proba(adata, indices, batch_size=batch_size)
        names = self._given(adata).obs_names[self._rows(adata, indices)]
        if soft:
            return pd.DataFrame(q, index=names, columns=self.component_names)
        codes = pd.Categorical.from_codes(q.argmax(1), categories=self.component_names)
        return pd.Series(codes, index=names, name=type(self).__name__.lower())

    def predict_proba(
        self, adata: AnnData | None = None, indices: Sequence[int] | None = None, *, batch_size: int | None = None
    ) -> np.ndarray:
        """Probability of each component for each cell.

        Parameters
        ----------
        adata, indices, batch_size
            As for :meth:`predict`.

        Returns
        -------
        (n, K) float32, rows summing to 1.
        """
        with evaluating(0):
            return torch.cat([self.module.classify(b) for b in self._stream(adata, indices, batch_size)]).cpu().numpy()

    def get_entropy(
        self, adata: AnnData | None = None, indices: Sequence[int] | None = None, *, batch_size: int | None = None
    ) -> np.ndarray:
        """Entropy of each cell's components in nats: 0 for a cell amid one cluster, log K for one that could be any.

        Parameters
        ----------
        adata, indices, batch_size
            As for :meth:`predict`.

        Returns
        -------
        (n,) float32.
        """
        return entropy(self.predict_proba(adata, indices, batch_size=batch_size))

    def effective_n_components(self, adata: AnnData | None = None, indices: Sequence[int] | None = None) -> float:
        """Exp of the entropy of the mean occupancy (Hill number of order 1): how many components are in use.

        Parameters
        ----------
        adata, indices
            As for :meth:`predict`.

        Returns
        -------
        From 1 to K.
        """
        share = self.predict_proba(adata, indices).mean(0, dtype=np.float64)
        return float(np.exp(entr(share).sum()))


def entropy(q: np.ndarray) -> np.ndarray:
    """Entropy in nats, (n,), of probabilities (n, K)."""
    return entr(q).sum(1)


class MixtureMixin(ClusteringMixin):
    """What a Gaussian mixture in z gives beyond clusters."""

    def get_outlier_score(
        self, adata: AnnData | None = None, indices: Sequence[int] | None = None, *, batch_size: int | None = None
    ) -> np.ndarray:
        """Negative log-density of a cell's mean z under the mixture: large for what the training cells are unlike.

        Parameters
        ----------
        adata, indices, batch_size
            As for :meth:`predict`.

        Returns
        -------
        (n,) float32, in nats; compare it with the scores of the training cells.
        """
        scores = []
        with evaluating(0):
            for batch in self._stream(adata, indices, batch_size):
                q = self.module.inference(batch)
                scores.append(-self.module.log_p_z(q["z"].loc, q["w"].loc))
        return torch.cat(scores).cpu().numpy()

    def get_components(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Means and variances of the components of p(z|w,y), at the mean of p(w) (averaged over conditions).

        Returns
        -------
        Two data frames (K, n_latent) of float32, rows named as in ``predict``.
        """
        self._check_if_trained(warn=True)
        n = len(self.reference["frequencies"])
        with evaluating(0):
            batch = self._empty_batch(self._known_codes)
            loc = self.module.prior_w(batch).loc.expand(n, self.module.n_w)
            p = self.module.components(loc)
        weights = torch.tensor(self.reference["frequencies"], dtype=p.loc.dtype, device=p.loc.device)[:, None, None]
        mean = (weights * p.loc).sum(0)
        variance = (weights * (p.variance + (p.loc - mean).square())).sum(0)
        return tuple(pd.DataFrame(v.cpu().numpy(), index=self.component_names) for v in (mean, variance))

    def merge_components(self, n_clusters: int | None = None) -> pd.DataFrame:
        """Hierarchy of the components: which are closest, step by step (average linkage, Bhattacharyya distance).

        Parameters
        ----------
        n_clusters
            One level only: the partition into that many groups.

        Returns
        -------
        A data frame (K, levels) of group numbers; the column ``n`` has n groups. Map ``predict()`` through one:
        ``model.predict().map(model.merge_components(5)[5])``.

        Raises
        ------
        TypeError
            If ``n_clusters`` is no whole number.
        ValueError
            If it is not between 1 and K.
        """
        from scipy.cluster.hierarchy import fcluster, linkage
        from scipy.spatial.distance import squareform

        k = self.n_components
        check_sizes(n_clusters=1 if n_clusters is None else n_clusters)
        if n_clusters is not None and n_clusters > k:
            msg = f"n_clusters={n_clusters} must be between 1 and the number of components, {k}."
            raise ValueError(msg)
        levels = range(1, k + 1) if n_clusters is None else [n_clusters]
        mean, variance = (frame.to_numpy(dtype=np.float64) for frame in self.get_components())
        if k == 1:
            return pd.DataFrame({n: [0] for n in levels}, index=self.component_names)
        pooled = (variance[:, None] + variance[None]) / 2
        shift = np.square(mean[:, None] - mean[None]) / pooled
        log_ratio = np.log(pooled) - (np.log(variance)[:, None] + np.log(variance)[None]) / 2
        distance = (shift / 8 + log_ratio / 2).sum(-1)
        np.fill_diagonal(distance, 0)
        tree = linkage(squareform(distance, checks=False), "average")
        groups = {n: fcluster(tree, n, "maxclust") - 1 for n in levels}
        return pd.DataFrame(groups, index=self.component_names)
