"""What the plots share: colours, type sizes and grids of panels. Matplotlib is imported when first drawn with."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), distinguishable to colour-blind readers; its yellow is left out: too pale for small points.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#555555")
TRAIN, VALIDATION = OKABE_ITO[0], OKABE_ITO[3]
MISSING = "#C8C8C8"
SMALL, NORMAL = 8, 10  # type sizes, points
_LEGEND_ROWS = 16  # entries of size SMALL that fit beside a panel of 3.3 inches


def palette(n: int) -> list[str]:
    """Give ``n`` distinct colours as hex strings, the same ones at every call."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    if n <= len(OKABE_ITO):
        return list(OKABE_ITO[:n])
    if n <= 20:
        twenty = [to_hex(c) for c in mpl.colormaps["tab20"].colors]
        return (twenty[::2] + twenty[1::2])[:n]  # the ten strong ones first, then their pale partners
    # steps of the golden section never repeat and keep neighbours apart; every second one is darkened
    steps = [(0.04 + 0.92 * (0.618034 * i % 1), 0.65 if i % 2 else 1.0) for i in range(n)]
    return [to_hex([shade * part for part in mpl.colormaps["turbo"](at)[:3]]) for at, shade in steps]


def panels(n_rows: int, n_cols: int, *, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Make a figure, in inches, with a 2-D array of Axes that make room for their own legends."""
    from matplotlib import pyplot as plt

    return plt.subplots(n_rows, n_cols, figsize=(width, height), squeeze=False, layout="constrained")


def settle(figure: Figure) -> None:
    """Lay a figure of :func:`panels` out ahead: what stands out of a panel and moves with it takes a second time."""
    figure.get_layout_engine().execute(figure)


def legend_columns(n: int) -> int:
    """Count the columns of a legend of ``n`` entries beside a panel."""
    return max(1, ceil(n / _LEGEND_ROWS))


def legend_width(names: list[str]) -> float:
    """Estimate the width in inches of a legend beside a panel, for the size of a new figure."""
    longest = max((len(name) for name in names), default=0)
    return legend_columns(len(names)) * (0.4 + 0.068 * longest)


def bare(ax: Axes) -> None:
    """Take the ticks away where they would mean nothing, and draw the frame lightly."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_color("#B0B0B0")


def plain(text: Any) -> str:
    """Show a name as it is written: a dollar sign in it starts no formula."""
    return str(text).replace("$", r"\$")
