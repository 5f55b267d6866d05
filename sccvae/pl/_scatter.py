"""Cells or images as points: two latent dimensions, or UMAPs of several representations side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._style import MISSING, NORMAL, SMALL, bare, legend_columns, legend_width, palette, panels, plain

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

_PANEL = 3.3  # inches
_MIN_UMAP = 4  # points; the spectral layout that UMAP starts from fails with fewer


def latent(
    adata: Any,
    *,
    color: str | Sequence[Any] | None = None,
    basis: str = "X_cvae",
    dims: tuple[int, int] = (0, 1),
    size: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw two dimensions of a latent representation, one point per row.

    Parameters
    ----------
    adata
        AnnData with ``obsm[basis]``, or array of shape (rows, dimensions). ``basis="X_umap"`` draws a UMAP.
    color
        Column of ``adata.obs``, name of a gene in ``adata``, or one value per row. Text, categories and true/false
        get a legend (with ``adata.uns["<color>_colors"]`` where scanpy left it), numbers a colour bar from their 1st
        to their 99th percentile. ``None`` draws all points alike.
    basis
        Key of ``adata.obsm``; not used with an array.
    dims
        The two columns to draw, counted from 0.
    size
        Area of a point in square points. ``None`` fits it to the number of rows.
    title
        ``None`` takes the name in ``color``.
    ax
        Where to draw. ``None`` makes a figure with room for the legend; your own needs ``layout="constrained"``.

    Returns
    -------
    The Axes. Points are drawn in random order (the same at every call), so no group hides another, and as a bitmap
    in vector files.

    Raises
    ------
    KeyError
        If the basis or the colour is not in ``adata``.
    ValueError
        If a dimension does not exist, a coordinate is NaN, or the colours do not match the rows.
    """
    named = hasattr(adata, "obsm")
    points, what = (_basis(adata, basis), f"obsm[{basis!r}]") if named else (np.asarray(adata, float), "The array")
    n_dims = points.shape[1] if points.ndim == 2 else 0
    if len(dims) != 2 or not all(0 <= d < n_dims for d in dims):
        msg = f"{what} has shape {points.shape}: dims={tuple(dims)!r} must be two of its columns, counted from 0."
        raise ValueError(msg)
    xy = _finite(points[:, list(dims)], what)
    values, colors = _color(adata if named else None, color, len(xy))

    ax = single(_categories(values)) if ax is None else ax
    _points(ax, xy, values, colors, size=size)
    symbol = _label(basis) if named else "z"
    ax.set(xlabel=f"{symbol} {dims[0] + 1}", ylabel=f"{symbol} {dims[1] + 1}")
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_title(plain(color if title is None and isinstance(color, str) else title or ""), fontsize=NORMAL)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def umap(
    adata: AnnData,
    *,
    bases: str | Sequence[str] = ("X_pca", "X_cvae"),
    colors: str | Sequence[str] = ("batch", "cell_type"),
    titles: str | Sequence[str] | None = None,
    size: float | None = None,
    n_neighbors: int = 15,
    seed: int = 0,
) -> np.ndarray:
    """Draw UMAPs of several representations of the same cells, one row each, once per colour.

    ``adata`` is not changed. Where ``adata.obsm["<basis>_umap"]`` exists (shape (cells, 2)) it is drawn; otherwise
    scanpy computes neighbours and UMAP (the first time in a session, compiling them takes about 20 s).

    Parameters
    ----------
    adata
        Cells with the representations in ``obsm``.
    bases
        Keys of ``adata.obsm``, for example before and after: one row of panels each. One may be given as it is.
    colors
        Columns of ``adata.obs``, or names of genes: one column of panels each. One may be given as it is.
    titles
        Names of the rows. ``None`` takes the keys without ``"X_"``.
    size
        Area of a point in square points. ``None`` fits it to the number of cells.
    n_neighbors
        Neighbours of a cell in the graph, as in :func:`scanpy.pp.neighbors`.
    seed
        Seed of neighbours and UMAP.

    Returns
    -------
    Array of Axes of shape (bases, colors).

    Raises
    ------
    KeyError
        If a basis or a colour is not in ``adata``.
    ValueError
        If a coordinate is NaN, titles and bases differ in number, or there are fewer than 4 cells to compute from.
    """
    bases, colors = _several(bases), _several(colors)
    titles = [_label(basis) for basis in bases] if titles is None else _several(titles)
    if len(titles) != len(bases):
        msg = f"There are {len(bases)} bases, but {len(titles)} titles: titles name the rows of panels."
        raise ValueError(msg)
    columns = [_color(adata, color, adata.n_obs) for color in colors]
    representations = [_finite(_basis(adata, basis), f"obsm[{basis!r}]") for basis in bases]  # all checked first
    embedded = []  # and computed before there is a figure
    for basis, representation in zip(bases, representations, strict=True):
        if f"{basis}_umap" in adata.obsm:
            embedded.append(_finite(_basis(adata, f"{basis}_umap"), f"obsm['{basis}_umap']")[:, :2])
        else:
            embedded.append(compute_umap(representation, n_neighbors=n_neighbors, seed=seed))

    legends = [_categories(values) for values, _ in columns]
    room = sum(legend_width(names) if names else 0.8 for names in legends)
    width, height = _PANEL * len(colors) + room + 0.4, _PANEL * len(bases) + 0.3
    _, axes = panels(len(bases), len(colors), width=width, height=height)
    for row, xy in enumerate(embedded):
        for col, (values, given) in enumerate(columns):
            ax = axes[row, col]
            _points(ax, xy, values, given, size=size, legend=row == 0)
            bare(ax)
            if row == 0:
                ax.set_title(plain(colors[col]), fontsize=NORMAL)
        axes[row, 0].set_ylabel(f"UMAP of {plain(titles[row])}", fontsize=NORMAL)
    return axes


def single(names: list[str]) -> Axes:
    """One panel with room for a legend of ``names``, or for a colour bar where there are none."""
    width = _PANEL + 0.8 + (legend_width(names) if names else 0.8)
    return panels(1, 1, width=width, height=_PANEL + 0.6)[1][0, 0]


def _several(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def compute_umap(representation: np.ndarray, *, n_neighbors: int, seed: int) -> np.ndarray:
    """UMAP coordinates, shape (cells, 2), from a fresh AnnData: the caller's stays as it is."""
    if len(representation) < _MIN_UMAP:
        msg = (
            f"A UMAP needs at least {_MIN_UMAP} cells, but there are {len(representation)}: pass more, or draw two "
            "dimensions of z with sccvae.pl.latent()."
        )
        raise ValueError(msg)
    import scanpy as sc
    from anndata import AnnData

    light = AnnData(obsm={"X": representation}, shape=(len(representation), 0))
    sc.pp.neighbors(light, use_rep="X", n_neighbors=n_neighbors, random_state=seed)
    sc.tl.umap(light, random_state=seed)
    return light.obsm["X_umap"]


def _basis(adata: AnnData, basis: str) -> np.ndarray:
    if basis not in adata.obsm:
        cures = {"X_pca": "run sc.pp.pca(adata)", "X_umap": "run sc.tl.umap(adata)"}
        cure = cures.get(basis, f'set adata.obsm["{basis}"] = model.get_latent_representation()')
        msg = f"adata.obsm has no {basis!r}: {cure} first, or choose one of {list(adata.obsm.keys())}."
        raise KeyError(msg)
    return np.asarray(adata.obsm[basis], dtype=float)


def _finite(points: np.ndarray, what: str) -> np.ndarray:
    bad = int((~np.isfinite(points)).any(axis=1).sum())
    if bad or len(points) == 0:
        msg = f"{what} has NaN or infinite coordinates in {bad} of its {len(points)} rows: nothing to draw for them."
        raise ValueError(msg)
    return points


def _label(basis: str) -> str:
    return basis.removeprefix("X_")


def _color(adata: AnnData | None, color: Any, n: int) -> tuple[pd.Series | None, list[str] | None]:
    """Find the values that colour the points, and the colours of their categories where scanpy chose them."""
    import pandas as pd
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    if color is None:
        return None, None
    given = None
    if isinstance(color, str):
        if adata is None:
            msg = f"color={color!r} names a column, but an array has none: pass one value per row, or an AnnData."
            raise ValueError(msg)
        if color not in adata.obs and color not in adata.var_names:
            msg = f"adata has no {color!r} to colour by: obs holds {list(adata.obs)}, and no gene has this name."
            raise KeyError(msg)
        values = adata.obs[color] if color in adata.obs else pd.Series(adata.obs_vector(color))
        given = adata.uns.get(f"{color}_colors")
    else:
        values = pd.Series(color)
    if len(values) != n:
        msg = f"There are {n} rows to draw, but {len(values)} colour values."
        raise ValueError(msg)
    values = values.reset_index(drop=True)
    if is_numeric_dtype(values) and not is_bool_dtype(values):
        return values, None
    values = values.astype("category")
    chosen = None if given is None or len(given) != len(values.cat.categories) else list(given)
    used = values.cat.remove_unused_categories()
    if chosen is not None:
        chosen = [c for c, name in zip(chosen, values.cat.categories, strict=True) if name in used.cat.categories]
    return used, chosen


def _categories(values: pd.Series | None) -> list[str]:
    return [str(c) for c in values.cat.categories] if values is not None and values.dtype == "category" else []


def _points(
    ax: Axes,
    xy: np.ndarray,
    values: pd.Series | None,
    colors: list[str] | None,
    *,
    size: float | None,
    legend: bool = True,
) -> None:
    """Draw ``xy`` of shape (n, 2) in random order, with a legend or a colour bar outside the panel."""
    order = np.random.default_rng(0).permutation(len(xy))
    size = float(np.clip(40_000 / len(xy), 1.5, 25)) if size is None else size
    style = {"s": size, "linewidths": 0, "rasterized": True, "alpha": 0.8}
    x, y = xy[order].T
    names = _categories(values)
    if values is None:
        ax.scatter(x, y, color=palette(1)[0], **style)
    elif names:
        table = np.array([*(colors or palette(len(names))), MISSING])
        codes = values.cat.codes.to_numpy()  # -1 where missing: the last colour
        ax.scatter(x, y, c=list(table[codes[order]]), **style)
        if legend:
            _legend(ax, [*names, *(["missing"] if (codes < 0).any() else [])], list(table))
    else:
        _continuous(ax, x, y, values.to_numpy(dtype=float, na_value=np.nan)[order], style, legend=legend)


def _legend(ax: Axes, names: list[str], colors: list[str]) -> None:
    from matplotlib.lines import Line2D

    dots = [Line2D([], [], marker="o", linestyle="", markersize=6, color=c) for c in colors[: len(names)]]
    ax.legend(
        dots,
        [plain(name) for name in names],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0,
        frameon=False,
        fontsize=SMALL,
        handletextpad=0.2,
        columnspacing=0.8,
        ncols=legend_columns(len(names)),
    )


def _continuous(
    ax: Axes, x: np.ndarray, y: np.ndarray, values: np.ndarray, style: dict[str, Any], *, legend: bool
) -> None:
    from matplotlib.cm import ScalarMappable

    known = np.isfinite(values)
    if not known.any():
        ax.scatter(x, y, color=MISSING, **style)
        return
    low, high = np.quantile(values[known], [0.01, 0.99])  # one stray value must not take all of the scale
    if low == high:
        low, high = values[known].min(), values[known].max()
    ax.scatter(x[~known], y[~known], color=MISSING, **style)
    drawn = ax.scatter(x[known], y[known], c=values[known], vmin=low, vmax=high, cmap="viridis", **style)
    if legend:
        below, above = values[known].min() < low, values[known].max() > high
        extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get((below, above), "neither")
        opaque = ScalarMappable(drawn.norm, drawn.cmap)
        bar = ax.figure.colorbar(opaque, ax=ax, extend=extend, shrink=0.8, aspect=18, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=SMALL)
