"""Plots. Every function returns the Axes it drew on and leaves showing and saving to the caller."""

from ._history import history
from ._images import generated, images, prior_centers, reconstructions
from ._plate import plate_diagram
from ._scatter import latent, umap

__all__ = ["generated", "history", "images", "latent", "plate_diagram", "prior_centers", "reconstructions", "umap"]
