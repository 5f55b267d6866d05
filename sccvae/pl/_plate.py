"""The plate diagram of a model, drawn from the text of its factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._plate_layout import RADIUS, Edge, arrange, curve
from ._style import SMALL, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _SHADE = "#222222", "#CFCFCF"
_EDGE_COLORS = {"generative": _INK, "inference": "#0072B2"}
_DASHES = (0, (4, 2.2))
_HEAD = 0.15  # length of a triangular head and diameter of a round one
_SCALE = 0.62  # inches per unit in a new figure
_GREEK = ("alpha", "beta", "gamma", "epsilon", "zeta", "eta", "theta", "lambda", "mu", "pi", "sigma", "phi", "psi")


def plate_diagram(model: Any, *, ax: Axes | None = None) -> Axes:
    """Draw the plate diagram of a model (source text 4.2.9, figures 4.1 and 4.3).

    Observed variables are shaded and latent ones white; a variable that is computed rather than drawn (``delta``) has
    a double outline. Solid arrows with triangular heads are the generative factors p, dashed arrows with round heads
    the inference factors q. All variables stand in the plate of the N samples.

    Parameters
    ----------
    model
        A model (its ``module.factors`` is drawn), a module (``factors``), or a
        :class:`~sccvae.module.Factorization`.
    ax
        Where to draw; its limits are set and its frame is taken away. ``None`` makes a figure of fitting size.

    Returns
    -------
    The Axes. Its artists have a ``gid`` to find them by, as ``"node:z"``, ``"generative:z->x"``, ``"head:..."`` and
    ``"plate"``.

    Raises
    ------
    TypeError
        If no factorization is found in the first argument.
    ValueError
        If the generative factors run in a circle.
    """
    from matplotlib.patches import FancyBboxPatch

    factorization = _factorization(model)
    nodes, edges = arrange(factorization)
    (left, bottom), (right, top) = _extent(nodes, edges)
    if ax is None:
        width, height = (right - left + 0.2) * _SCALE, (top - bottom + 0.2) * _SCALE
        ax = panels(1, 1, width=max(width, 2.9), height=height + 0.65)[1][0, 0]
    ax.set(xlim=(left - 0.1, right + 0.1), ylim=(bottom - 0.1, top + 0.1), aspect="equal")
    ax.axis("off")
    size = _type_size(ax)

    box = "round,pad=0,rounding_size=0.12"
    plate = FancyBboxPatch(
        (left, bottom), right - left, top - bottom, boxstyle=box, fill=False, ec=_INK, lw=1, gid="plate"
    )
    ax.add_patch(plate)
    ax.text(right - 0.12, bottom + 0.1, "$N$", ha="right", va="bottom", fontsize=0.9 * size, color=_INK)
    for edge, control in edges.items():
        _draw_edge(ax, edge, control)
    deterministic = {f.variable for f in (*factorization.generative, *factorization.inference) if f.kind == "delta"}
    for name, center in nodes.items():
        _draw_node(ax, name, center, shaded=name in factorization.observed, double=name in deterministic, size=size)
    _legend(ax, double=bool(deterministic), kinds={edge.kind for edge in edges})
    return ax


def _factorization(source: Any) -> Any:
    for found in (source, getattr(source, "factors", None), getattr(getattr(source, "module", None), "factors", None)):
        if all(hasattr(found, name) for name in ("generative", "inference", "latent", "observed")):
            return found
    msg = f"{type(source).__name__} has no factors to draw: pass a model, a module with `factors`, or a Factorization."
    raise TypeError(msg)


def _extent(nodes: dict[str, np.ndarray], edges: dict[Edge, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the plate: around all nodes and bows, with room for the N below."""
    centers = np.array(list(nodes.values()))
    bows = np.concatenate([centers, *(curve(control) for control in edges.values())])
    low = np.minimum(centers.min(axis=0) - RADIUS - 0.3, bows.min(axis=0) - 0.2)
    high = np.maximum(centers.max(axis=0) + RADIUS + 0.3, bows.max(axis=0) + 0.2)
    spare = max(0.0, 2.2 - (high[0] - low[0])) / 2  # a single column still gets a plate with a free corner
    return low - np.array([spare, 0.1]), high + np.array([spare, 0])


def _type_size(ax: Axes) -> float:
    """Points of type that fill a node as it is drawn now."""
    width, height = np.ptp(ax.get_xlim()), np.ptp(ax.get_ylim())
    points = min(ax.bbox.width / width, ax.bbox.height / height) * 72 / ax.figure.dpi  # per unit
    return float(np.clip(1.15 * RADIUS * points, 6, 24))


def _draw_node(ax: Axes, name: str, center: np.ndarray, *, shaded: bool, double: bool, size: float) -> None:
    from matplotlib.patches import Circle

    fill = _SHADE if shaded else "white"
    ax.add_patch(Circle(center, RADIUS, facecolor=fill, edgecolor=_INK, linewidth=1.2, zorder=3, gid=f"node:{name}"))
    if double:
        inner = Circle(center, 0.8 * RADIUS, fill=False, edgecolor=_INK, linewidth=1, zorder=4, gid=f"inner:{name}")
        ax.add_patch(inner)
    ax.text(*center, _symbol(name), ha="center", va="center_baseline", fontsize=size, color=_INK, zorder=5)


def _symbol(name: str) -> str:
    """Write a name as mathematics: ``z1`` as z with index 1, ``alpha`` as the Greek letter."""
    stem = name.rstrip("0123456789").rstrip("_") or name
    index = name[len(stem) :].lstrip("_")
    letter = f"\\{stem}" if stem in _GREEK else stem.replace("_", r"\_")
    return f"${letter}_{{{index}}}$" if index else f"${letter}$"


def _draw_edge(ax: Axes, edge: Edge, control: np.ndarray) -> None:
    """Draw the curve from rim to rim, short of its head, and the head touching the target's rim."""
    from matplotlib.patches import Circle, PathPatch, Polygon
    from matplotlib.path import Path

    points = curve(control, np.linspace(0, 1, 400)[:, None])
    from_source = np.linalg.norm(points - control[0], axis=1)
    from_target = np.linalg.norm(points - control[2], axis=1)
    color, name = _EDGE_COLORS[edge.kind], f"{edge.source}->{edge.target}"
    solid = edge.kind == "generative"
    line = points[(from_source >= RADIUS) & (from_target >= RADIUS + _HEAD)]
    style = {"linestyle": "solid" if solid else _DASHES, "linewidth": 1.3, "edgecolor": color, "fill": False}
    ax.add_patch(PathPatch(Path(line), capstyle="butt", zorder=2, gid=f"{edge.kind}:{name}", **style))
    tip = points[np.argmax(from_target <= RADIUS)]
    along = (tip - line[-1]) / np.linalg.norm(tip - line[-1])
    if solid:
        across = np.array([-along[1], along[0]]) * _HEAD * 0.42
        back = tip - along * _HEAD
        head = Polygon([tip, back + across, back - across], facecolor=color, edgecolor=color)
    else:
        head = Circle(tip - along * _HEAD / 2, _HEAD / 2, facecolor="white", edgecolor=color)
    head.set(linewidth=1.2 if not solid else 0.5, zorder=3.5, gid=f"head:{edge.kind}:{name}")
    ax.add_patch(head)


def _legend(ax: Axes, *, double: bool, kinds: set[str]) -> None:
    from matplotlib.lines import Line2D

    node = {"linestyle": "", "markersize": 9, "markeredgecolor": _INK}
    entries = {
        "observed": Line2D([], [], marker="o", markerfacecolor=_SHADE, **node),
        "latent": Line2D([], [], marker="o", markerfacecolor="white", **node),
    }
    if double:
        inner = Line2D([], [], marker="o", markerfacecolor="none", **node | {"markersize": 6})
        entries["latent, computed"] = (entries.pop("latent"), inner)
    line = {"linewidth": 1.3, "markersize": 5}
    blue = {"color": _EDGE_COLORS["inference"], "linestyle": _DASHES, "markerfacecolor": "white"}
    if "generative" in kinds:
        entries["generative p"] = Line2D([], [], color=_INK, marker=">", **line)
    if "inference" in kinds:
        entries["inference q"] = Line2D([], [], marker="o", **blue, **line)
    legend = ax.legend(
        entries.values(),
        entries.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=2,
        frameon=False,
        fontsize=SMALL,
        handlelength=2.6,
        handletextpad=1.0,
        columnspacing=1.5,
    )
    for handle in legend.legend_handles[-len(kinds) :]:
        handle.set_markevery([2])  # matplotlib puts the marker at the second of three points: move the head to the end
