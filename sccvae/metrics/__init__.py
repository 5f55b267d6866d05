"""Arrays in, numbers out: how well an embedding or a corrected expression does."""

from __future__ import annotations

from ._clustering import clustering, contingency, hungarian_accuracy, majority_accuracy
from ._embedding import batch_mixing, knn_accuracy, label_silhouette
from ._expression import (
    de_overlap,
    gene_correlation,
    perturbation_scores,
    principal_angles,
    r_squared_of_means,
    top_de_genes,
)
from ._integration import integration, overcorrection

__all__ = [
    "batch_mixing",
    "clustering",
    "contingency",
    "de_overlap",
    "gene_correlation",
    "hungarian_accuracy",
    "integration",
    "knn_accuracy",
    "label_silhouette",
    "majority_accuracy",
    "overcorrection",
    "perturbation_scores",
    "principal_angles",
    "r_squared_of_means",
    "top_de_genes",
]
