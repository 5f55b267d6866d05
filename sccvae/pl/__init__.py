"""Plots. Every function returns the Axes it drew on and leaves showing and saving to the caller."""

from ._history import history
from ._images import generated, images, prior_centers, reconstructions
from ._integration import integration
from ._mixture import component_grid, confusion, entropy, mixture, occupancy
from ._plate import plate_diagram
from ._prediction import counterfactual, posterior_predictive
from ._scatter import latent, umap

__all__ = [
    "component_grid",
    "confusion",
    "counterfactual",
    "entropy",
    "generated",
    "history",
    "images",
    "integration",
    "latent",
    "mixture",
    "occupancy",
    "plate_diagram",
    "posterior_predictive",
    "prior_centers",
    "reconstructions",
    "umap",
]
