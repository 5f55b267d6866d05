"""Training: the Lightning plan, schedules, callbacks, checkpoints."""

from sccvae.train.callbacks import BestWeights, CellsBar, progress
from sccvae.train.fit import TrainingResult, fit
from sccvae.train.mixture import MixtureResult, fit_mixture
from sccvae.train.plan import TrainingPlan
from sccvae.train.schedules import Schedule, default_max_epochs

__all__ = [
    "BestWeights",
    "CellsBar",
    "MixtureResult",
    "Schedule",
    "TrainingPlan",
    "TrainingResult",
    "default_max_epochs",
    "fit",
    "fit_mixture",
    "progress",
]
