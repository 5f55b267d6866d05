"""Arrays in, numbers out: how well an embedding or a corrected expression does."""

from __future__ import annotations

from ._clustering import clustering, contingency, hungarian_accuracy, majority_accuracy
from ._embedding import batch_mixing, knn_accuracy, label_silhouette
from ._expression import gene_correlation, principal_angles, r_squared_of_means

__all__ = [
    "batch_mixing",
    "clustering",
    "contingency",
    "gene_correlation",
    "hungarian_accuracy",
    "knn_accuracy",
    "label_silhouette",
    "majority_accuracy",
    "principal_angles",
    "r_squared_of_means",
]
