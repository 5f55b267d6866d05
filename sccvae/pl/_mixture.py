"""The mixture of a clustering model: where its components lie, what they hold, and what they look like."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ._history import PHASES, _read
from ._images import _draw, _pictures, _rows, _shape
from ._scatter import _categories, _legend, _points, compute_umap, single
from ._style import NORMAL, SMALL, bare, legend_width, palette, panels, plain

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_MAX_CELLS = 10_000
_MAX_TEXT = 15  # rows and columns of a table whose numbers can be read in its cells
_INK = "#222222"


def mixture(
    model: Any,
    adata: Any = None,
    *,
    n: int = _MAX_CELLS,
    size: float | None = None,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw the cells with the components of the mixture among them.

    Cells are coloured by their component. The mean of each component is marked by its name; it is embedded together
    with the cells, so it lies where a cell with this z would. A component that no cell is near is empty; the panel
    reaches out to it.

    Parameters
    ----------
    model
        A trained model with ``predict``; the means are marked if it has ``get_components``.
    adata
        Cells to draw. ``None`` draws those it was trained on.
    n
        At most so many cells are drawn, chosen at random.
    size
        Area of a point in square points. ``None`` fits it to the number of cells.
    seed
        Of the choice of cells and the UMAP.
    ax
        Where to draw. ``None`` makes a figure with room for the legend; your own needs ``layout="constrained"``.

    Returns
    -------
    The Axes: a UMAP of z (scanpy's; the first in a session takes about 20 s), or z itself where it has two dimensions.

    Raises
    ------
    TypeError
        If the model finds no clusters.
    ValueError
        If there are no cells to draw, or too few for a UMAP.
    """
    adata, rows = _cells(model, adata, n, seed)
    found = model.predict(adata, indices=rows).reset_index(drop=True)
    used = found.cat.remove_unused_categories()
    colors = _colors(model.component_names)
    xy, means, label = _view(model, adata, rows, seed)
    ax = single(_categories(used)) if ax is None else ax
    _points(ax, xy, used, [colors[name] for name in used.cat.categories], size=size)
    for name, at in means.items():
        text = ax.annotate(
            plain(name), at, ha="center", va="center", fontsize=SMALL, color=_INK, zorder=4, gid=f"mean:{name}"
        )
        text.set_bbox({"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": colors[name], "linewidth": 1.5})
    _finish(ax, label, "components and their means" if means else "components", means)
    return ax


def entropy(
    model: Any,
    adata: Any = None,
    *,
    n: int = _MAX_CELLS,
    size: float | None = None,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw the cells coloured by how uncertain their component is, in the view of :func:`mixture`.

    Parameters
    ----------
    model, adata, n, size, seed, ax
        As for :func:`mixture`.

    Returns
    -------
    The Axes. The colour is the entropy of q(y|.) in nats: 0 for a cell amid one component.

    Raises
    ------
    TypeError, ValueError
        As for :func:`mixture`.
    """
    import pandas as pd

    adata, rows = _cells(model, adata, n, seed)
    values = pd.Series(model.get_entropy(adata, indices=rows))
    xy, means, label = _view(model, adata, rows, seed)
    ax = single([]) if ax is None else ax
    _points(ax, xy, values, None, size=size)
    _finish(ax, label, "entropy of the component, nats", means)
    return ax


def occupancy(model_or_history: Any, *, ax: Axes | None = None) -> Axes:
    """Draw the share of the cells that each component holds, over the epochs.

    The phases of the training are named above. A component that thins out in the free phase was not needed; all shares
    flowing into a few components is a collapse.

    Parameters
    ----------
    model_or_history
        A trained GMVAE, its ``history``, or the record of ``sccvae.tl.cluster``, ``adata.uns["gmvae"]``.
    ax
        Where to draw. ``None`` makes a figure with room for the legend; your own needs ``layout="constrained"``.

    Returns
    -------
    The Axes.

    Raises
    ------
    ValueError
        If no shares were recorded: the model has no mixture, or its training ended in the warm-up.
    """
    curves = _read(model_or_history)
    names = [name.removeprefix("occupancy_") for name in curves if name.startswith("occupancy_")]
    shares = {name: curves[f"occupancy_{name}"] for name in names if len(curves[f"occupancy_{name}"][0])}
    if not shares:
        msg = "The history holds no occupancy_<k>: only a GMVAE that was trained beyond its warm-up has components."
        raise ValueError(msg)
    known = getattr(model_or_history, "component_names", [])
    labels = [str(known[int(k)]) if int(k) < len(known) else k for k in shares]
    colors = list(_colors(labels).values())
    epochs = next(iter(shares.values()))[0]
    # an epoch is a step, so that a phase of a single one can be seen
    edges = np.append(epochs, epochs[-1] + 1) - 0.5
    steps = [np.append(values, values[-1]) for _, values in shares.values()]
    if ax is None:
        ax = panels(1, 1, width=4.6 + legend_width(labels), height=3.2)[1][0, 0]
    ax.stackplot(edges, *steps, colors=colors, step="post", linewidth=0)
    span = edges[-1] - edges[0]
    left = max(edges[0] - 0.18 * span, -0.5)  # of the warm-up, which has no components, the end is enough
    ax.set(xlim=(left, edges[-1]), ylim=(0, 1), xlabel="epoch", ylabel="share of the cells")
    wide = ax.get_window_extent().width / ax.figure.dpi - legend_width(labels)  # inches left beside the legend, about
    _mark_phases(ax, curves.get("phase"), left, max(wide, 1.0))
    _legend(ax, labels, colors)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.get_major_locator().set_params(integer=True)
    return ax


def confusion(model: Any, labels: Any, adata: Any = None, *, ax: Axes | None = None) -> Axes:
    """Draw which classes the components hold: one row a class, its cells shared out over the components.

    Components are ordered so that the best one-to-one match with the classes (Hungarian) lies on the diagonal; those
    that are left stand beside the class they hold most of.

    Parameters
    ----------
    model
        A trained model with ``predict``, or one component for each cell.
    labels
        Column of ``adata.obs``, or one class for each cell; cells whose class is missing are left out.
    adata
        The cells. ``None`` takes those the model was trained on.
    ax
        Where to draw. ``None`` makes a figure of fitting size; your own needs ``layout="constrained"``.

    Returns
    -------
    The Axes. Rows sum to 1; where the table is small, its entries are written as numbers of cells.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If classes and components differ in number, or no cell has a class.
    """
    table = _table(model, labels, adata)
    counts = table.to_numpy()
    shares = counts / counts.sum(1, keepdims=True)
    n_rows, n_cols = counts.shape
    small = max(n_rows, n_cols) <= _MAX_TEXT
    across, down = (max(len(str(name)) for name in names) for names in (table.index, table.columns))
    long = down > 3
    if ax is None:
        side = 0.42 if small else max(0.14, 6 / max(n_rows, n_cols))
        width = max(n_cols * side, 2) + 0.07 * across + 1.6
        height = max(n_rows * side, 1.6) + 0.9 + (0.07 * down if long else 0)
        ax = panels(1, 1, width=width, height=height)[1][0, 0]
    drawn = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(n_cols), [plain(c) for c in table.columns], fontsize=SMALL, rotation=90 if long else 0)
    ax.set_yticks(range(n_rows), [plain(c) for c in table.index], fontsize=SMALL)
    ax.tick_params(length=0)
    ax.set(xlabel="component", ylabel="class")
    ax.spines[:].set_visible(False)
    if small:
        for i, j in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[i, j] > 0.55 else _INK
            ax.text(j, i, f"{counts[i, j]:d}", ha="center", va="center", fontsize=SMALL - 1, color=color)
    bar = ax.figure.colorbar(drawn, ax=ax, shrink=0.8, aspect=18, pad=0.02)
    bar.set_label("share of the class", fontsize=SMALL)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL)
    return ax


def component_grid(
    model: Any,
    *,
    n: int = 8,
    batch: str | None = None,
    seed: int = 0,
    image_shape: Sequence[int] | None = None,
    cmap: str = "gray",
) -> np.ndarray:
    """Draw images that each component makes: a column for a component, a row for a draw of w.

    Parameters
    ----------
    model
        A trained GMVAE, on images.
    n
        Rows: draws of w (and of the noise of z), the same for all components.
    batch
        Condition to sample under, where the model has one. ``None`` leaves the choice to the model.
    seed
        Of the draws.
    image_shape, cmap
        As in :func:`images`.

    Returns
    -------
    Array of Axes of shape (n, components).

    Raises
    ------
    TypeError
        If the model has no components to sample from.
    ValueError
        As :func:`images`, and if the batch is not known.
    """
    if not hasattr(model, "component_names") or not hasattr(model, "sample"):
        msg = f"{type(model).__name__} has no components to draw from: take a GMVAE."
        raise TypeError(msg)
    names = model.component_names
    condition = {} if batch is None else {"batch": batch}
    drawn = [model.sample(n, component=name, mean=True, seed=seed, **condition) for name in names]
    columns = np.stack([_pictures(_rows(images), _shape(images, image_shape)) for images in drawn], axis=1)
    pictures = columns.reshape(-1, *columns.shape[2:])  # (n, K, ...) row by row
    return _draw(pictures, ncols=len(names), cmap=cmap, header=names).reshape(n, len(names))


def _cells(model: Any, adata: Any, n: int, seed: int) -> tuple[Any, np.ndarray]:
    """The cells, and the rows of those to draw."""
    if not hasattr(model, "predict") or not hasattr(model, "component_names"):
        msg = f"{type(model).__name__} finds no clusters to draw: take a GMVAE."
        raise TypeError(msg)
    adata = model.adata if adata is None else adata
    if adata is None:
        msg = "This model was loaded without data; pass adata=."
        raise ValueError(msg)
    if n < 1:
        msg = f"n={n} must be at least 1."
        raise ValueError(msg)
    rows = np.random.default_rng(seed).permutation(adata.n_obs)[:n]
    return adata, np.sort(rows)


def _view(model: Any, adata: Any, rows: np.ndarray, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray], str]:
    """Cells and means of the components in two dimensions, (n, 2) and name -> (2,), and what the axes are."""
    z = model.get_latent_representation(adata, indices=rows)
    means = model.get_components()[0].to_numpy() if hasattr(model, "get_components") else z[:0]
    both = np.concatenate([z, means])
    label = "z"
    if z.shape[1] != 2:
        both, label = compute_umap(both, n_neighbors=min(15, len(both) - 1), seed=seed), "UMAP"
    marked = dict(zip(model.component_names, both[len(z) :], strict=False))
    return both[: len(z)], marked, label


def _colors(names: Sequence[str]) -> dict[str, str]:
    return dict(zip(names, palette(len(names)), strict=True))


def _finish(ax: Axes, label: str, title: str, means: dict[str, np.ndarray]) -> None:
    ax.set_title(title, fontsize=NORMAL)
    if means:  # the names of the means widen no limits by themselves
        ax.update_datalim(list(means.values()))
        ax.autoscale_view()
    if label == "UMAP":
        bare(ax)
        ax.set(xlabel="UMAP 1", ylabel="UMAP 2")
    else:
        ax.set(xlabel="z 1", ylabel="z 2")
        ax.set_aspect("equal", adjustable="datalim")
        ax.spines[["top", "right"]].set_visible(False)


def _mark_phases(ax: Axes, phase: tuple[np.ndarray, np.ndarray] | None, left: float, wide: float) -> None:
    """A line where a phase begins, and its name above the panel of ``wide`` inches; turned where names would meet."""
    if phase is None or len(phase[0]) == 0:
        return
    epochs, values = phase
    names: dict[str, float] = {}  # where in the panel, from 0 to 1
    right = ax.get_xlim()[1]
    for k in np.unique(values).astype(int):
        inside = epochs[values == k]
        start, end = max(inside[0] - 0.5, left), inside[-1] + 0.5
        if end <= left:
            continue
        if start > left:
            ax.axvline(start, color=_INK, linewidth=1, gid=f"phase:{k}")
        names[PHASES[k] if k < len(PHASES) else f"phase {k}"] = ((start + end) / 2 - left) / (right - left)
    half = [0.034 * len(name) for name in names]  # inches
    at = [wide * x for x in names.values()]
    flat = all(b - a > h + g + 0.06 for (a, h), (b, g) in pairwise(zip(at, half, strict=True)))
    flat &= at[-1] + half[-1] < wide + 0.06  # the legend is beside
    angle = 0 if flat else 45 if np.diff(at).min(initial=1.0) > 0.16 else 90
    x = -1.0
    for name, middle in names.items():
        x = max(middle, x + 0.14 / wide) if angle else middle  # a line of type apart at least
        style = {"ha": "left" if angle else "center", "va": "center" if angle == 90 else "bottom"}
        turn = {"rotation": angle, "rotation_mode": "anchor"}
        ax.text(x, 1.02, name, transform=ax.transAxes, fontsize=SMALL, **style, **turn)


def _table(model: Any, labels: Any, adata: Any) -> pd.DataFrame:
    """Cells of each class (row) in each component (column), the columns in the order of their classes."""
    import pandas as pd
    from scipy.optimize import linear_sum_assignment

    found = model.predict(adata) if hasattr(model, "predict") else model
    if isinstance(labels, str):
        adata = getattr(model, "adata", None) if adata is None else adata
        if adata is None or labels not in adata.obs:
            columns = [] if adata is None else list(adata.obs)
            msg = f"labels={labels!r}: there is no such column; adata.obs has {columns}."
            raise KeyError(msg)
        labels = adata.obs[labels]
    series = isinstance(labels, pd.Series) and isinstance(found, pd.Series)
    if series and labels.index.is_unique and not len(found.index.difference(labels.index)):
        labels = labels.reindex(found.index)
    classes, components = (pd.Series(pd.Series(v).array) for v in (labels, found))
    if len(classes) != len(components):
        msg = f"There are {len(classes)} classes, but {len(components)} cells with a component."
        raise ValueError(msg)
    table = pd.crosstab(classes, components)
    if not table.size:
        msg = "No cell has both a class and a component: there is nothing to compare."
        raise ValueError(msg)
    counts = table.to_numpy()
    rows, columns = linear_sum_assignment(-counts)
    best = counts.argmax(0)
    best[columns] = rows
    matched = np.isin(np.arange(len(best)), columns)
    return table.iloc[:, np.lexsort((-counts.max(0), ~matched, best))]
