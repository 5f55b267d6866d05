"""Networks: conditioned layers, encoders, decoders' bodies, corruption. On torch alone."""

from sccvae._rows import SparseRows
from sccvae.nn.adversarial import virtual_adversarial_penalty
from sccvae.nn.alignment import CellKinds, batch_discrepancy
from sccvae.nn.conditions import ConditionedLinear, Conditions, Linear, new_columns, widen
from sccvae.nn.corruption import GaussianNoise, Masking, as_corruption
from sccvae.nn.mlp import ACTIVATIONS, MLP, GaussianEncoder, check_sizes, frozen_statistics, untracked_statistics

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "CellKinds",
    "ConditionedLinear",
    "Conditions",
    "GaussianEncoder",
    "GaussianNoise",
    "Linear",
    "Masking",
    "SparseRows",
    "as_corruption",
    "batch_discrepancy",
    "check_sizes",
    "frozen_statistics",
    "new_columns",
    "untracked_statistics",
    "virtual_adversarial_penalty",
    "widen",
]
