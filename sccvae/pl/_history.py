"""Training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ._style import NORMAL, SMALL, TRAIN, VALIDATION, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Names of the values of ``history["phase"]`` of a GMVAE.
PHASES = ("warm-up", "guide", "guided", "free", "free with guide")
_SIDES = {"train": TRAIN, "validation": VALIDATION}
_MAX_COLUMNS = 4


def history(model: Any, *, terms: str | Sequence[str] | None = None) -> np.ndarray:
    """Draw the training curves: one panel for the ELBO and one for each of its terms.

    Train and validation share a panel. Where the KL weight changes during training, it is shaded behind the KL
    terms. Values of the first tenth of the epochs that would flatten the rest are left above the panel, which says
    how high they reach. A training in phases, as the GMVAE's, is treated so phase by phase; dotted lines part them.
    In a GMVAE's guide rounds the classifier alone learns: only ``"kl_y"``, there the cross-entropy with the guide, is
    drawn (where it was measured); the ELBO and its other terms have a gap.

    Parameters
    ----------
    model
        A trained model, or its ``history`` alone: name to a one-column DataFrame (or Series) indexed by epoch, with
        names such as ``"elbo_train"``, ``"kl_z_validation"``. Values are in nats per sample, lower is better. A record
        that ``sccvae.tl`` left in ``uns``, such as ``adata.uns["X_cvae"]``, is drawn by the history in it.
    terms
        A name without the ending, or several in the order to draw, such as ``("loss", "kl_z")``. ``None`` draws
        ``"elbo"``, ``"reconstruction"`` and every ``"kl_*"`` that was recorded.

    Returns
    -------
    One-dimensional array of Axes, one per term.

    Raises
    ------
    ValueError
        If nothing was recorded yet, or a term asked for is not in the history.
    """
    curves = _read(model)
    recorded = _terms(curves)
    if terms is None:
        terms = [t for t in ("elbo", "reconstruction") if t in recorded]
        terms += [t for t in recorded if t.startswith("kl_")]
    terms = [terms] if isinstance(terms, str) else list(terms)
    unknown = [t for t in terms if t not in recorded]
    if unknown or not terms:
        msg = f"The history holds no curve named {unknown or 'elbo'}; it holds {recorded or list(curves)}."
        raise ValueError(msg)

    n_cols = min(len(terms), _MAX_COLUMNS)
    n_rows = -(-len(terms) // n_cols)
    fig, grid = panels(n_rows, n_cols, width=2.9 * n_cols + 1.3, height=2.5 * n_rows)
    axes = grid.ravel()
    for ax in axes[len(terms) :]:
        ax.remove()
    axes = axes[: len(terms)]
    for ax, term in zip(axes, terms, strict=True):
        _draw_term(ax, term, curves)
    for row in grid:
        row[0].set_ylabel("nats per sample")
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=SMALL)
    return axes


def _read(model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Bring every curve to (epochs, values), each of shape (number of recorded epochs,)."""
    found = model if isinstance(model, Mapping) else getattr(model, "history", None)
    if isinstance(found, Mapping) and isinstance(found.get("history"), Mapping):  # what `sccvae.tl` notes in `uns`
        found = found["history"]
    if not found:
        done = getattr(model, "is_trained", False)
        why = "this query had no new categories, so nothing was trained" if done else "train first, with model.train()"
        msg = f"There is no training history to draw: {why}."
        raise ValueError(msg)
    curves = {}
    for name, frame in found.items():
        values = np.asarray(frame, dtype=float).reshape(len(frame), -1)[:, 0]
        epochs = np.asarray(getattr(frame, "index", np.arange(len(values))), dtype=float)
        known = ~np.isnan(values)  # a value that was not measured in this epoch: join its neighbours
        curves[name] = epochs[known], values[known]
    return curves


def _guide_rounds(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Epochs in which q(y|.) alone learned a guide; none for a model without a mixture, whose phases are others."""
    epochs, phase = curves.get("phase", (np.zeros(0), np.zeros(0)))
    return epochs[phase == PHASES.index("guide")] if "kl_y_train" in curves else epochs[:0]


def _terms(curves: Mapping[str, Any]) -> list[str]:
    endings = tuple(f"_{side}" for side in _SIDES)
    names = [name.rsplit("_", 1)[0] for name in curves if name.endswith(endings)]
    return list(dict.fromkeys(names))


def _draw_term(ax: Axes, term: str, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    from matplotlib.ticker import MaxNLocator

    drawn = {side: curves[f"{term}_{side}"] for side in _SIDES if f"{term}_{side}" in curves}
    guide = _guide_rounds(curves)
    gap = len(guide) > 0 and (term in ("elbo", "loss", "reconstruction") or term.startswith("kl_")) and term != "kl_y"
    for side, (epochs, values) in drawn.items():
        # kl_y is 0 where no cell of this side has a guide
        hidden = np.isin(epochs, guide) & (gap | ((term == "kl_y") & (values == 0)))
        values = np.where(hidden, np.nan, values)
        drawn[side] = epochs, values
        known = np.pad(np.isfinite(values), 1)
        alone = known[1:-1] & ~known[:-2] & ~known[2:]  # no line leads to these: they get a dot
        style = {"marker": "o", "markevery": alone, "markersize": 4} if alone.any() else {}
        ax.plot(epochs, values, color=_SIDES[side], linewidth=1.5, label=side, **style)
    if gap:
        _name_gap(ax, guide, curves["phase"][0])
    if term.startswith("kl_"):
        _shade_weight(ax, curves.get("kl_weight"))
    starts = _phase_starts(curves)
    for start in starts[1:]:
        ax.axvline(start - 0.5, color="#A0A0A0", linewidth=0.8, linestyle=":", zorder=0.5, gid="phase")
    _robust_limits(ax, list(drawn.values()), starts)
    ax.set_title(_title(term), fontsize=NORMAL)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.margins(x=0.02)
    ax.spines[["top", "right"]].set_visible(False)


def _name_gap(ax: Axes, guide: np.ndarray, epochs: np.ndarray) -> None:
    """Say what the gap is, if it is wide enough for a line of type."""
    if np.ptp(guide) + 2 > 0.06 * np.ptp(epochs):
        style = {"rotation": 90, "ha": "center", "va": "center", "fontsize": SMALL, "color": "#606060"}
        ax.text((guide[0] + guide[-1]) / 2, 0.5, "guide", transform=ax.get_xaxis_transform(), gid="guide", **style)


def _title(term: str) -> str:
    if term == "elbo":
        return "−ELBO"
    return rf"KL of ${term[3:]}$" if term.startswith("kl_") and len(term) == 4 else term.replace("_", " ")


def _shade_weight(ax: Axes, weight: tuple[np.ndarray, np.ndarray] | None) -> None:
    if weight is None or len(weight[0]) < 2 or np.ptp(weight[1]) == 0:
        return
    full = max(1.0, weight[1].max())
    across = ax.get_xaxis_transform()  # x in epochs, y as a fraction of the panel: the weight needs no second axis
    label = f"KL weight\n(panel height = {full:g})"
    ax.fill_between(weight[0], weight[1] / full, color="#E8E8E8", linewidth=0, zorder=0, transform=across, label=label)


def _phase_starts(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """First epoch of each phase of the training; empty if it has no phases."""
    epochs, phase = curves.get("phase", (np.zeros(0), np.zeros(0)))
    return epochs[np.diff(phase, prepend=np.nan) != 0]


def _robust_limits(ax: Axes, curves: list[tuple[np.ndarray, np.ndarray]], starts: np.ndarray) -> None:
    """Let the first tenth of the epochs, or of a phase, run out of the panel where it would take two thirds of it."""
    epochs, values = (np.concatenate(part) for part in zip(*curves, strict=True))
    finite = np.isfinite(values)
    epochs, values = epochs[finite], values[finite]
    if len(values) == 0:
        return
    edges = np.append(starts if len(starts) else epochs.min(), epochs.max())
    settled = np.ones(len(epochs), dtype=bool)
    for start, end in pairwise(edges):
        settled &= (epochs < start) | (epochs > start + 0.1 * (end - start))
    late = values[settled]
    low, high = values.min(), values.max()
    if len(late) and late.max() > low and high - low > 3 * (late.max() - low):
        note = f"↑ up to {high:,.0f}" if high >= 100 else f"↑ up to {high:.3g}"
        ax.annotate(note, (0.97, 0.97), xycoords="axes fraction", ha="right", va="top", fontsize=SMALL, color="#606060")
        high = late.max() + 0.3 * (late.max() - low)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    ax.set_ylim(low - pad, high + pad)
