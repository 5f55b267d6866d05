"""Whole jobs on an AnnData in one call, scanpy-style: results in obs, obsm and layers, parameters in ``uns``."""

from __future__ import annotations

from ._cluster import cluster
from ._consensus import consensus
from ._correct import correct
from ._counterfactual import counterfactual
from ._embed import embed
from ._integration import integration_report
from ._map import map_query

__all__ = ["cluster", "consensus", "correct", "counterfactual", "embed", "integration_report", "map_query"]
