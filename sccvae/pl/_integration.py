"""What an integration did to each cell type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ._style import NORMAL, OKABE_ITO, SMALL, panels, plain, settle

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_KEPT, _FELL, _BEFORE = OKABE_ITO[0], OKABE_ITO[3], "#9AA5B1"


def integration(
    adata: AnnData, embedding: str | None = None, *, key: str = "integration", ax: Axes | None = None
) -> Axes:
    """Draw the purity of each type's neighbourhoods before and after integration, batch by batch.

    Parameters
    ----------
    adata
        After :func:`sccvae.tl.integration_report`.
    embedding
        Key of ``obsm`` that was judged; None for the first.
    key
        Key of ``uns``.
    ax
        Where to draw; None makes a figure.

    Returns
    -------
    The Axes. A line leads from the purity before (ring) to that after (dot): a type that lost its neighbours has a
    vermilion line to the left, with the type that came in their place. A star marks types of a single batch.

    Raises
    ------
    KeyError
        If there is no report, or not of this embedding.
    """
    if key not in adata.uns:
        msg = f"There is no adata.uns[{key!r}]. Run `sccvae.tl.integration_report(adata, ...)` first."
        raise KeyError(msg)
    table = adata.uns[key]["overcorrection"]
    judged = list(dict.fromkeys(table["embedding"]))
    embedding = judged[0] if embedding is None else embedding
    if embedding not in judged:
        msg = f"adata.uns[{key!r}] has no report of {embedding!r}; it has {judged}."
        raise KeyError(msg)
    table = table[table["embedding"] == embedding].reset_index(drop=True)
    types = list(table.groupby("label")["purity_after"].min().sort_values(ascending=False).index)
    table = table.assign(order=table["label"].map(types.index)).sort_values(["order", "batch"], ignore_index=True)
    y = np.arange(len(table)) + 0.7 * table["order"].to_numpy()  # a gap between types
    figure = None
    if ax is None:
        figure, axes = panels(1, 1, width=6.5, height=1.2 + 0.21 * (y[-1] + 1))
        ax = axes[0, 0]
    for at, row in zip(y, table.itertuples(), strict=True):
        color = _FELL if row.fell else _KEPT
        ax.plot([row.purity_before, row.purity_after], [at, at], color=color, lw=2, alpha=0.6, zorder=1)
        if row.fell and row.mixed_with:
            ax.annotate(  # right of the ring: the line and the name of the row lie to its left
                f"now among {plain(row.mixed_with)}",
                (max(row.purity_before, row.purity_after), at),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                size=SMALL,
                color=_FELL,
            )
    ax.scatter(table["purity_before"], y, s=26, facecolor="white", edgecolor=_BEFORE, lw=1.3, zorder=2, label="before")
    for fell, color, label in ((False, _KEPT, "after"), (True, _FELL, "after, fell")):
        rows = (table["fell"] == fell).to_numpy()
        if rows.any():
            ax.scatter(table["purity_after"][rows], y[rows], s=24, color=color, zorder=3, label=label)
    names = [
        f"{plain(row.label)}{' ★' if row.one_batch else ''} · {plain(row.batch)} ({row.n_cells:,})"
        for row in table.itertuples()
    ]
    ax.set_yticks(y, names, size=SMALL)
    ax.set_ylim(y[-1] + 0.8, -0.8)
    ax.set_xlim(-0.03, 1.03)
    ax.grid(axis="x", color="#E5E5E5", lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("share of nearest neighbours of the same type")
    ax.set_title(f"{plain(embedding)}: are types still apart?" + _star(table), size=NORMAL, loc="left", pad=22)
    # between title and panel: beside it, what the types are now among needs the room
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2, "borderpad": 0.2}
    ax.legend(ncols=3, frameon=False, fontsize=SMALL, handletextpad=0.2, columnspacing=1.2, **place)
    if figure is not None:
        settle(figure)
    return ax


def _star(table) -> str:
    return "   (★ in one batch only)" if table["one_batch"].any() else ""
