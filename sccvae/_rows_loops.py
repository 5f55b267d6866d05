"""The compiled loops behind ``_rows``: importing this file imports numba; each loop compiles once for a machine."""

from __future__ import annotations

import numpy as np

from sccvae._compiled import compiled

# Columns and places are unsigned: for signed ones numba asks at each whether it counts from the end, and no vectors are
# made. In ``starts``, (n + 1,), row i has the places from starts[i] to starts[i + 1].


@compiled()
def count(x, starts):
    """Fill ``starts`` (n + 1,) for the values of x (n, G) that are not zero."""
    starts[0] = 0
    for i in range(len(x)):
        n = 0
        for j in range(x.shape[1]):
            n += x[i, j] != 0
        starts[i + 1] = starts[i] + n


@compiled()
def gather(start, stop, x, starts, columns, values):
    """Columns and values of what is not zero in the rows of x (n, G) from ``start`` to ``stop``."""
    at = np.empty(x.shape[1], np.uint32)
    for i in range(start, stop):
        row, first, n = x[i], starts[i], np.uintp(0)
        for j in range(len(row)):
            at[n] = np.uint32(j)  # without a branch: of counts none can be foretold
            n += np.uintp(row[j] != 0)
        for k in range(n):
            columns[first + k] = at[k]
            values[first + k] = row[at[k]]


@compiled()
def scatter(starts, columns, values, x):
    """Put the values at their columns of x (n, G)."""
    for i in range(len(x)):
        row = x[i]
        for k in range(starts[i], starts[i + 1]):
            row[columns[k]] = values[k]


@compiled()
def thin(starts, columns, values, random, below, factor, kept_starts, kept_columns, kept_values):
    """Leave out values whose random byte is less than ``below``; ``factor`` times the others."""
    n = np.uintp(0)
    kept_starts[0] = 0
    for i in range(len(starts) - 1):
        for k in range(starts[i], starts[i + 1]):
            kept_columns[n] = columns[k]
            kept_values[n] = values[k] * factor
            n += np.uintp(random[k] >= below)
        kept_starts[i + 1] = n


@compiled()
def turn(starts, columns, values, turned_starts, rows, turned_values):
    """The same by columns: the rows and values of column j lie from turned_starts[j] on, in order."""
    turned_starts[:] = 0
    for k in range(len(columns)):
        turned_starts[columns[k] + 1] += 1
    for j in range(len(turned_starts) - 1):
        turned_starts[j + 1] += turned_starts[j]
    at = turned_starts[:-1].copy()
    for i in range(len(starts) - 1):
        for k in range(starts[i], starts[i + 1]):
            place = at[columns[k]]
            at[columns[k]] = place + 1
            rows[place], turned_values[place] = i, values[k]


@compiled(fastmath={"contract", "reassoc", "nsz"})
def product(start, stop, starts, columns, values, w, bias, out):
    """Rows of values @ w + bias from ``start`` to ``stop``, for w (G, H), bias (H,) and out (n, H)."""
    one, four = np.uintp(1), np.uintp(4)
    for i in range(start, stop):
        o = out[i]
        o[:] = bias
        k, end = np.uintp(starts[i]), np.uintp(starts[i + 1])
        while k + four <= end:  # four rows of w for each time that the sum is read and written
            a, b, c, d = values[k], values[k + one], values[k + one + one], values[k + four - one]
            wa, wb, wc, wd = w[columns[k]], w[columns[k + one]], w[columns[k + one + one]], w[columns[k + four - one]]
            for h in range(len(o)):
                o[h] += a * wa[h] + b * wb[h] + c * wc[h] + d * wd[h]
            k += four
        while k < end:
            a, wa = values[k], w[columns[k]]
            for h in range(len(o)):
                o[h] += a * wa[h]
            k += one
