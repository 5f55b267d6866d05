"""Where the nodes of a plate diagram stand and how its arrows bend. Plain geometry, no drawing."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import numpy as np

RADIUS = 0.3  # of a node; every length here is in units of the diagram
_ROW, _COLUMN = 1.45, 1.6  # distances between neighbouring nodes
_CLEAR = 0.22  # an arrow should stay so far away from nodes and other arrows
_BENDS = np.array([0.0, 0.25, -0.25, 0.35, -0.35, 0.5, -0.5, 0.7, -0.7])  # twice the bow's height / its chord
_T = np.linspace(0, 1, 25)[:, None]
_SWEEPS = 4


@dataclass(frozen=True)
class Edge:
    """An arrow ``source`` → ``target``; ``kind`` is ``"generative"`` or ``"inference"``."""

    kind: str
    source: str
    target: str


def arrange(factorization: Any) -> tuple[dict[str, np.ndarray], dict[Edge, np.ndarray]]:
    """Lay out a plate diagram.

    Variables stand in rows: above everything that is generated from them, the data at the bottom. Known variables
    that no factor describes stand at the side. Among the orders within rows, the sides and a few bends of each
    arrow, those are taken that bring arrows least into the way of nodes and of each other.

    Returns
    -------
    Positions, name to array of shape (2,), and for each edge the three control points of a quadratic Bezier curve
    between the centres of its nodes, shape (3, 2).
    """
    edges = _edges(factorization)
    best = min((_bend(nodes, edges) for nodes in _candidates(factorization, edges)), key=lambda found: found[0])
    return best[1], best[2]


def curve(control: np.ndarray, t: np.ndarray = _T) -> np.ndarray:
    """Points of a quadratic Bezier curve at ``t`` of shape (k, 1); shape (k, 2)."""
    start, middle, end = control
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end


def _edges(factorization: Any) -> list[Edge]:
    sides = {"generative": factorization.generative, "inference": factorization.inference}
    return [Edge(kind, parent, f.variable) for kind, side in sides.items() for f in side for parent in f.parents]


def _rows(factorization: Any) -> tuple[list[list[str]], list[str]]:
    """Variables by row, the lowest first, and the known variables that stand aside."""
    generated = [f.variable for f in factorization.generative]
    aside = [v for v in factorization.observed if v not in generated]
    variables = [v for v in (*factorization.observed, *factorization.latent) if v not in aside]
    children = {v: [f.variable for f in factorization.generative if v in f.parents] for v in variables}
    parents = {f.variable: f.parents for f in factorization.inference}
    height: dict[str, int] = {}

    def climb(v: str, above: tuple[str, ...] = ()) -> int:
        if v in above:
            msg = f"The factors of {str(factorization)!r} run in a circle through {v!r}: no plate can be drawn."
            raise ValueError(msg)
        if v not in height:
            # a variable that generates nothing and is not generated is a summary: it stands above what it is read from
            below = children[v] if children[v] or v in generated else [u for u in parents[v] if u not in aside]
            height[v] = max((climb(u, (*above, v)) + 1 for u in below), default=0)
        return height[v]

    for v in variables:
        climb(v)
    return [[v for v in variables if height[v] == level] for level in range(max(height.values()) + 1)], aside


def _candidates(factorization: Any, edges: list[Edge]) -> list[dict[str, np.ndarray]]:
    rows, aside = _rows(factorization)
    level = {v: i * _ROW for i, row in enumerate(rows) for v in row}
    half = (max(len(row) for row in rows) - 1) / 2 * _COLUMN
    near = {v: [e.target for e in edges if e.source == v] for v in aside}
    layouts = []
    for order in product(*(permutations(row) for row in rows)):
        across = {v: (i - (len(row) - 1) / 2) * _COLUMN for row in order for i, v in enumerate(row)}
        for sides in product((-1, 1), repeat=len(aside)):
            nodes = {v: np.array([x, level[v]]) for v, x in across.items()}
            for side in (-1, 1):
                here = [v for v, s in zip(aside, sides, strict=True) if s == side]
                for i, v in enumerate(here):
                    y = np.mean([level.get(u, 0.0) for u in near[v]] or [0.0])
                    nodes[v] = np.array([side * (half + 1.5), y + (i - (len(here) - 1) / 2) * 1.1])
            layouts.append(nodes)
    return layouts


def _bend(
    nodes: dict[str, np.ndarray], edges: list[Edge]
) -> tuple[float, dict[str, np.ndarray], dict[Edge, np.ndarray]]:
    """Choose the best bend of each edge given the others, in a few sweeps; the cost, the nodes, the control points."""
    options = {edge: [_control(nodes[edge.source], nodes[edge.target], bend) for bend in _BENDS] for edge in edges}
    curves = {edge: np.array([curve(control) for control in options[edge]]) for edge in edges}  # (bends, 25, 2)
    alone = {edge: _cost_alone(edge, curves[edge], nodes) for edge in edges}
    chosen: dict[Edge, int] = {}
    costs: dict[Edge, float] = {}
    for _ in range(_SWEEPS):
        for edge in edges:
            others = [curves[e][i] for e, i in chosen.items() if e != edge]
            total = alone[edge] + _crowding(curves[edge], others, nodes[edge.source], nodes[edge.target])
            chosen[edge] = int(total.argmin())
            costs[edge] = float(total.min())
    return sum(costs.values()), nodes, {edge: options[edge][i] for edge, i in chosen.items()}


def _control(start: np.ndarray, end: np.ndarray, bend: float) -> np.ndarray:
    dx, dy = end - start
    return np.array([start, (start + end) / 2 + bend * np.array([dy, -dx]), end])


def _cost_alone(edge: Edge, curves: np.ndarray, nodes: dict[str, np.ndarray]) -> np.ndarray:
    """Cost of bows, length and nodes in the way, for curves of shape (bends, 25, 2); shape (bends,)."""
    cost = (2.0 if edge.kind == "generative" else 0.5) * np.abs(_BENDS)  # generative arrows stay straight if they can
    cost = cost + 0.2 * np.linalg.norm(np.diff(curves, axis=1), axis=2).sum(axis=1)
    for name, center in nodes.items():
        if name not in (edge.source, edge.target):
            gap = np.linalg.norm(curves - center, axis=2).min(axis=1) - RADIUS
            cost += np.where(gap > 0, 6 * np.clip(1 - gap / _CLEAR, 0, None), 12)
    return cost


def _crowding(curves: np.ndarray, others: list[np.ndarray], start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Cost of running close to, or across, other arrows, away from the arrow's own nodes; shape (bends,)."""
    if not others:
        return np.zeros(len(curves))
    away = np.minimum(np.linalg.norm(curves - start, axis=2), np.linalg.norm(curves - end, axis=2)) > RADIUS + 0.12
    gaps = np.linalg.norm(curves[:, :, None, None] - np.array(others), axis=-1).min(axis=-1)  # (bends, 25, others)
    return 6 * (np.clip(1 - gaps / _CLEAR, 0, None) * away[..., None]).mean(axis=1).sum(axis=1)
