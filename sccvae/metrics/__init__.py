"""Arrays in, numbers out: how well an embedding or a corrected expression does."""

from __future__ import annotations

from ._embedding import batch_mixing, knn_accuracy, label_silhouette
from ._expression import gene_correlation, principal_angles, r_squared_of_means

__all__ = [
    "batch_mixing",
    "gene_correlation",
    "knn_accuracy",
    "label_silhouette",
    "principal_angles",
    "r_squared_of_means",
]
