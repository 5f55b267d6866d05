"""Cluster cells several times, and keep what the runs agree on."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from itertools import combinations
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from sccvae.metrics import clustering, contingency

from ._cluster import cluster
from ._job import check_columns, plain, record, requested, target, trained_model

logger = logging.getLogger(__name__)


def consensus(
    adata: AnnData,
    n_runs: int = 5,
    *,
    key_added: str = "consensus",
    copy: bool = False,
    seed: int = 0,
    **options: Any,
) -> AnnData | None:
    """Train several GMVAEs that differ in their seed alone, and write the clusters that they agree on.

    The components of each run are matched one to one (Hungarian) with those of the run whose number of components is
    the median; components that are left over count for the one they overlap most. Then the probabilities are
    averaged. Memory for it is cells x components, however many runs there are.

    Parameters
    ----------
    adata
        Cells x genes, in memory or backed.
    n_runs
        Number of runs; each takes as long as :func:`cluster`.
    key_added
        Name of the results.
    copy
        Return a copy with the results and leave ``adata`` as it is.
    seed
        Of the first run; the others count on from it.
    **options
        The other arguments of :func:`cluster`, from ``batch_key`` on, the same for every run.

    Returns
    -------
    None, or with ``copy=True`` the copy. It holds

    - ``obs[key_added]``: the component with the highest mean probability, categorical
    - ``obs["<key_added>_confidence"]``: share of the runs that put the cell there, float32
    - ``uns[key_added]``: what :func:`embed` records of the run that the others were matched with, and ``n_runs``,
      ``seeds``, ``n_components`` (of each run), ``ari`` (mean adjusted Rand index between two runs), ``clusters`` and
      their ``instability``: 1 - mean Jaccard index of a cluster and its best match in a run. Below 0.25 a cluster is
      found again and again; above 0.5 it dissolves, and should not be interpreted

    Raises
    ------
    TypeError
        If an option is not one of :func:`cluster`, or ``n_runs`` is no whole number.
    KeyError, ValueError
        As for :func:`cluster`; and ValueError if there are fewer than two runs.

    References
    ----------
    Hennig 2007, Cluster-wise assessment of cluster stability, Computational Statistics & Data Analysis 52 (there the
    cells are drawn anew for each run; here the network, the split and the noise are). Strehl and Ghosh 2002, Cluster
    ensembles, JMLR 3.

    Examples
    --------
    >>> sccvae.tl.consensus(adata, n_runs=5, batch_key="batch", layer="counts")  # doctest: +SKIP
    >>> sc.pl.umap(adata, color=["consensus", "consensus_confidence"])  # doctest: +SKIP
    """
    if isinstance(n_runs, bool) or not isinstance(n_runs, Integral):
        msg = f"n_runs={n_runs!r} must be a whole number, at least 2."
        raise TypeError(msg)
    if n_runs < 2:
        msg = f"n_runs={n_runs}: at least two runs are needed to see whether they agree."
        raise ValueError(msg)
    asked = _options(options)
    training = dict(asked["train_options"] or {})
    to = target(adata, key_added, copy=copy)
    columns = [key_added, f"{key_added}_confidence"]
    asked["check"] = lambda model: check_columns(model, columns)
    seeds = [seed + i for i in range(n_runs)]
    models = []
    for i, run in enumerate(seeds):
        models.append(trained_model(to, "gmvae", **asked | {"seed": run, "train_options": _own_folder(training, run)}))
        text = f"run {i + 1} of {n_runs} (seed {run}): {models[-1].n_components} components"
        logger.info(text)
        if training.get("progress_bar", True):
            tqdm.write(text)
    sizes = [model.n_components for model in models]
    middle = sizes.index(sorted(sizes)[(n_runs - 1) // 2])
    first = models[middle].predict_proba(to)
    mean = np.zeros_like(first)
    own, aligned = [], []  # components of each cell in each run: as they are, and as those of the middle run
    for model in models:
        q = model.predict_proba(to)
        match = matched(first, q, n_classes=len(model.classes))
        own.append(q.argmax(1))
        aligned.append(match[own[-1]])
        for k, j in enumerate(match):
            mean[:, j] += q[:, k] / n_runs
    labels = mean.argmax(1)
    to.obs[columns[0]] = pd.Categorical.from_codes(labels, categories=models[middle].component_names)
    to.obs[columns[1]] = np.mean([run == labels for run in aligned], axis=0, dtype=np.float32)
    pairs = [clustering(a, b)["ari"] for a, b in combinations(own, 2)]
    found = {
        "n_runs": n_runs,
        "seeds": seeds,
        "n_components": sizes,
        "ari": float(np.mean(pairs)),
        "clusters": [models[middle].component_names[k] for k in np.unique(labels)],
        "instability": instability(labels, own),
    }
    to.uns[key_added] = record(models[middle], training) | plain(found)
    return to if copy else None


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for :func:`trained_model`, with the defaults of :func:`cluster`."""
    known = inspect.signature(cluster).parameters
    taken = ("adata", "model", "key_added", "copy", "seed")
    unknown = [name for name in options if name not in known or name in taken]
    if unknown:
        msg = f"consensus() has no arguments {unknown}; the options are {[n for n in known if n not in taken]}."
        raise TypeError(msg)
    return requested({name: parameter.default for name, parameter in known.items()} | dict(options))


def _own_folder(training: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Options of ``train`` for one run: with checkpoints, in a folder of its own."""
    folder = training.get("checkpoint_dir")
    return training | ({} if folder is None else {"checkpoint_dir": Path(folder) / f"seed-{seed}"})


def matched(first: np.ndarray, other: np.ndarray, *, n_classes: int = 0) -> np.ndarray:
    """For each component of a run the component of the first run that it stands for.

    Parameters
    ----------
    first, other
        Probabilities of the components, (n, K) and (n, L).
    n_classes
        So many components, in front, have names: they stand for themselves.

    Returns
    -------
    (L,) int64: one to one as far as it goes, the best overlap for the rest.
    """
    overlap = first.T.astype(np.float64) @ other
    best = overlap.argmax(0)
    known = np.arange(n_classes)
    overlap[known, known] += overlap.sum()
    rows, columns = linear_sum_assignment(-overlap)
    best[columns] = rows
    return best


def instability(labels: np.ndarray, runs: list[np.ndarray]) -> np.ndarray:
    """1 - mean Jaccard index of each cluster in ``labels`` and its best match in a run, in the order of the clusters.

    Parameters
    ----------
    labels
        Clusters, (n,).
    runs
        Clusters of other runs, (n,) each.

    Returns
    -------
    (clusters,) float64, from 0 (the same cells each time) to 1.
    """
    scores = []
    for run in runs:
        common = contingency(labels, run)
        either = common.sum(1, keepdims=True) + common.sum(0, keepdims=True) - common
        scores.append((common / either).max(1))
    return 1 - np.mean(scores, axis=0)
