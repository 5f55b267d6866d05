"""Predictions against the real cells: counterfactual means, and the posterior predictive check."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from ._style import NORMAL, OKABE_ITO, SMALL, panels, plain, settle

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_GREY, _TOP, _OUTSIDE = "#9AA5B1", OKABE_ITO[3], OKABE_ITO[1]


def counterfactual(
    predicted: Any,
    real: Any,
    control: Any | None = None,
    *,
    n_top: int = 100,
    n_labels: int = 10,
    gene_names: Sequence[str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the mean expression of each gene in predicted cells over that in real cells, with R².

    Parameters
    ----------
    predicted, real
        Log-normalised expression, (n_cells, n_genes) and (m_cells, n_genes): an AnnData (its ``X``), a data frame, or
        an array (dense or sparse). The same genes in the same order.
    control
        Unperturbed cells of the same kind. With them the ``n_top`` most differential genes between ``real`` and
        ``control`` (see :func:`sccvae.metrics.top_de_genes`) are coloured and get an R² of their own.
    n_top
        Number of differential genes; at most all.
    n_labels
        How many of these to name, from the most significant on. They need names: those of ``predicted`` or ``real``,
        or ``gene_names``. A figure made here grows with them; on your own Axes many names get smaller type.
    gene_names
        Names of the genes, for arrays.
    title
        Above the panel, over several lines where it is long.
    ax
        Where to draw; None makes a figure.

    Returns
    -------
    The Axes. On the dashed line prediction and truth agree.

    Raises
    ------
    ValueError
        If the numbers of genes or their names differ, or a value is not finite.

    References
    ----------
    Lotfollahi, Wolf & Theis 2019, Nat. Methods 16:715-721, figure 2.

    Examples
    --------
    >>> sccvae.pl.counterfactual(predicted, stimulated, controls, title="CD4 T cells")  # doctest: +SKIP
    """
    from sccvae.metrics import r_squared_of_means, top_de_genes

    given = [group for group in (predicted, real, control) if group is not None]
    names = _names(given, gene_names)
    values = [_values(group) for group in given]
    x, y = (np.asarray(v.mean(axis=0)).ravel() for v in (values[1], values[0]))
    text = f"R² = {r_squared_of_means(values[0], values[1]):.3f} (all {len(x):,} genes)"
    top = np.array([], dtype=int)
    if control is not None:
        top = top_de_genes(values[1], values[2], min(n_top, len(x)))
        r2 = r_squared_of_means(values[0][:, top], values[1][:, top])
        text += f"\nR² = {r2:.3f} (top {len(top)} differential)"

    figure = None
    if ax is None:
        height = max(4.4, 0.6 + 0.16 * len(top[:n_labels]) * (names is not None))
        figure, axes = panels(1, 1, width=height + 0.6, height=height)
        ax = axes[0, 0]
    end = 1.04 * max(x.max(), y.max())
    ax.plot([0, end], [0, end], color="#555555", linewidth=0.8, linestyle="--", zorder=1)
    rest = np.setdiff1d(np.arange(len(x)), top)
    ax.scatter(x[rest], y[rest], s=9, color=_GREY, alpha=0.6, linewidths=0, rasterized=True, zorder=2)
    ax.scatter(x[top], y[top], s=13, color=_TOP, alpha=0.8, linewidths=0, zorder=3)
    least = min(0.0, x.min(), y.min())
    ax.set(xlim=(least, end), ylim=(least, end), xlabel="mean expression, real", ylabel="mean expression, predicted")
    ax.set_aspect("equal")
    ax.text(0.03, 0.97, text, transform=ax.transAxes, va="top", fontsize=SMALL)
    wide = ax.get_window_extent().width / ax.figure.dpi  # inches
    ax.set_title(plain(fill(title or "", max(10, int(wide / 0.085)))), fontsize=NORMAL)
    ax.spines[["top", "right"]].set_visible(False)
    if names is not None:
        _label(ax, x, y, top[:n_labels], names)
    if figure is not None:
        settle(figure)
    return ax


def posterior_predictive(table: pd.DataFrame, *, title: str | None = None) -> np.ndarray:
    """Draw a posterior predictive check: what the model says of each gene over what the cells say.

    Parameters
    ----------
    table
        From ``model.posterior_predictive_check()``.
    title
        Above the figure, such as the likelihood.

    Returns
    -------
    Array of three Axes: mean, variance and share of zeros. A line spans the band of a gene; genes whose cells lie
    outside it are coloured. Means and variances have logarithmic axes, with a place for zero where there is one;
    where a value is negative, linear ones.

    Raises
    ------
    ValueError
        If a column is missing, or the table holds no gene.
    """
    statistics = {"mean": "mean", "variance": "variance", "zero_fraction": "share of zeros"}
    missing = [f"{s}{end}" for s in statistics for end in ("", "_low", "_high", "_inside") if f"{s}{end}" not in table]
    if missing:
        msg = f"The table lacks the columns {missing}; pass what `model.posterior_predictive_check()` returns."
        raise ValueError(msg)
    if len(table) == 0:
        msg = "The table has no rows: pass what `model.posterior_predictive_check()` returns, with a gene at least."
        raise ValueError(msg)
    figure, axes = panels(1, 3, width=10.2, height=3.6)
    for ax, (name, label) in zip(axes[0], statistics.items(), strict=True):
        _band(
            ax,
            *(table[f"{name}{end}"].to_numpy() for end in ("", "_low", "_high", "_inside")),
            log=name != "zero_fraction",
        )
        share = table[f"{name}_inside"].mean()
        ax.set_title(f"{label}: {share:.0%} of genes inside", fontsize=NORMAL)
        ax.set(xlabel=f"{label}, cells", ylabel=f"{label}, model")
    if title is not None:
        figure.suptitle(plain(title), fontsize=NORMAL)
    return axes[0]


def _band(ax: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, inside: np.ndarray, *, log: bool) -> None:
    """Bands of genes over their values ``x``, each (n_genes,)."""
    from matplotlib.collections import LineCollection

    seen = np.concatenate([x, low, high])
    seen = seen[np.isfinite(seen)]
    if log and (seen > 0).all():
        ax.set(xscale="log", yscale="log")
    elif log and (seen >= 0).all() and seen.any():  # a zero gets a place of its own, a decade below the others
        least = 10 ** np.floor(np.log10(seen[seen > 0].min()))
        ax.set_xscale("symlog", linthresh=least)
        ax.set_yscale("symlog", linthresh=least)
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(numticks=7)  # its default is 15, whose names meet
    scale = ax.yaxis.get_transform()
    middle = scale.inverted().transform((scale.transform(low) + scale.transform(high)) / 2)
    inside = inside.astype(bool)
    for which, color, order in ((inside, OKABE_ITO[0], 2), (~inside, _OUTSIDE, 3)):
        ends = [[(a, b), (a, c)] for a, b, c in zip(x[which], low[which], high[which], strict=True)]
        ax.add_collection(LineCollection(ends, colors=color, linewidths=0.8, alpha=0.5, rasterized=True, zorder=order))
        ax.scatter(x[which], middle[which], s=4, color=color, linewidths=0, rasterized=True, zorder=order)
    bounds = [seen.min(), seen.max()] if len(seen) else []
    ax.plot(bounds, bounds, color="#555555", linewidth=0.8, linestyle="--", zorder=4)
    ax.tick_params(labelsize=SMALL)
    ax.spines[["top", "right"]].set_visible(False)


def _label(ax: Axes, x: np.ndarray, y: np.ndarray, which: np.ndarray, names: np.ndarray) -> None:
    """Name points in a column right of the panel, in the order of their height and kept apart."""
    low, high = ax.get_ylim()
    order = sorted(which, key=lambda i: y[i])
    places = np.array([(y[i] - low) / (high - low) for i in order])
    gap = min(0.045, 1 / max(len(places) - 1, 1))
    points = 72 * gap * ax.get_window_extent().height / ax.figure.dpi  # from one name to the next
    for k in range(1, len(places)):
        places[k] = max(places[k], places[k - 1] + gap)
    top = 1.0
    for k in range(len(places) - 1, -1, -1):  # and down again, where the column would stand out at the top
        places[k] = top = min(places[k], top)
        top -= gap
    for i, place in zip(order, places, strict=True):
        ax.annotate(
            plain(names[i]),
            (x[i], y[i]),
            xytext=(1.02, place),
            textcoords="axes fraction",
            va="center",
            fontsize=min(SMALL, points / 1.3),
            arrowprops={"arrowstyle": "-", "color": "#777777", "linewidth": 0.4, "shrinkA": 1, "shrinkB": 2},
            zorder=5,
        )


def _values(group: Any) -> np.ndarray:
    """The matrix of an AnnData, a data frame or an array, dense."""
    group = group.X if hasattr(group, "obs_names") else group
    return np.asarray(group.toarray() if hasattr(group, "toarray") else group, dtype=np.float64)


def _names(groups: Sequence[Any], given: Sequence[str] | None) -> np.ndarray | None:
    """Names of the genes, (n_genes,); None if nothing has any."""
    found = [np.asarray(given, dtype=str)] if given is not None else []
    for group in groups:
        names = getattr(group, "var_names", getattr(group, "columns", None))
        if names is not None:
            found.append(np.asarray(names, dtype=str))
    sizes = {group.shape[1] for group in groups} | {len(names) for names in found}
    if len(sizes) > 1 or any((names != found[0]).any() for names in found):
        msg = (
            f"The groups must have the same genes in the same order (numbers found: {sorted(sizes)}); take "
            "`adata[:, genes]` of each first."
        )
        raise ValueError(msg)
    return found[0] if found else None
