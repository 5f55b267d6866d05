"""Training: the Lightning plan, schedules, callbacks, checkpoints."""

from sccvae.train.callbacks import BestWeights
from sccvae.train.deep_clustering import TargetDistribution, fit_deep_clustering
from sccvae.train.effects import batch_effects
from sccvae.train.fit import TrainingResult, fit
from sccvae.train.mixture import fit_mixture
from sccvae.train.plan import TrainingPlan
from sccvae.train.schedules import Schedule, default_max_epochs, default_sizes

__all__ = [
    "BestWeights",
    "Schedule",
    "TargetDistribution",
    "TrainingPlan",
    "TrainingResult",
    "batch_effects",
    "default_max_epochs",
    "default_sizes",
    "fit",
    "fit_deep_clustering",
    "fit_mixture",
]
