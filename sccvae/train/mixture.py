"""Training a Gaussian mixture without hand-holding: warm-up as a VAE, guide, guided, free."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback
from sklearn.metrics import adjusted_rand_score

from sccvae.data import CellStore
from sccvae.data.moments import zero_share
from sccvae.module import Batch
from sccvae.module.gmvae import GMVAE
from sccvae.nn import check_sizes, frozen_statistics
from sccvae.train.few_labels import FOLDS, classes_from_few, core, mean_recall
from sccvae.train.fit import TrainingResult, seeded
from sccvae.train.guide import (
    MAX_CELLS,
    RESOLUTIONS,
    Communities,
    Guide,
    joint_graph,
    principal_components,
)
from sccvae.train.monitor import MixtureMonitor
from sccvae.train.passes import over_cells, some_of_each, some_rows
from sccvae.train.phases import Phases, at_stage
from sccvae.train.schedules import default_max_epochs

logger = logging.getLogger(__name__)

#: Names of the phases, by their number in the history.
PHASES = ("warm-up", "guide", "guided", "free", "free-guided")
#: Values whose classes are rather of even sizes, as images are collected; types of cells are not. If so many classes as
#: wanted have valleys between them, those are looked for (Fashion-MNIST, held out: accuracy of 0.66, 0.665, 0.60;
#: by valleys 0.57).
EVEN = ("unit",)
#: From this share of zeros on, values from 0 to 1 are no images (MNIST: 0.81) but accessible chromatin, whose types are
#: as uneven as any (simulated, 2.8 % accessible, one type of 60 % of the cells: adjusted Rand index of 0.61 as images).
SPARSE = 0.9
#: Times that the guide is made again, from what a classifier makes of the one before. Not where counts are clustered:
#: on 20 sets of cells what was found again had a mean ARI of 0.55, not 0.74, and what was taken of it was no better.
ROUNDS = 2
#: A guide made again may move borders; with less agreement than this (adjusted Rand index) it found other clusters, and
#: the one before is kept.
SAME_CLUSTERS = 0.9
#: Fewest optimiser steps of a round and of the guided phase, as far as the warm-up has so many epochs: after fewer, the
#: classifier is worth less than its guide.
GUIDED_STEPS = 200
#: Epochs of a round's classifier, of the guided and of the free phase as shares of those of the warm-up.
ROUND, GUIDED, FREE = 1 / 5, 1 / 2, 1 / 10
#: From so many labels for each class on, a classifier is tried that learns from them alone; as a share of the warm-up
#: the epochs that it gets if it finds held-back labels better than the guide does, and the most.
MANY_LABELS, LABELLED, LABELLED_EPOCHS = 50, 1.5, 30
#: Then labelled cells are a larger share of an epoch (MNIST with 5 %, with the penalty on every cell: 0.984 in place of
#: 0.978), and mini-batches are so many times as large: both parts of the loss need many cells (0.983, not 0.980).
LABELLED_SHARE, LABELLED_BATCH = 1 / 3, 2
#: Learning rate of the free phase as a share of that of the others. Left to itself, the mixture drifts to what is
#: normal in z, and loses what the guide knew from x (MNIST: 0.975 to 0.970 with a tenth); this phase only settles.
FREE_LR = 0.01
#: Most epochs of either: with more passes over few cells the classifier learns the errors of its guide by heart.
ROUND_EPOCHS, GUIDED_EPOCHS, FREE_EPOCHS = 6, 15, 5
#: Cells with a true label are shown more often, up to this share of an epoch and so many times each.
KNOWN_SHARE, KNOWN_TIMES = 0.2, 20
#: Cells that the monitor looks at after each epoch.
MONITORED = 2_000
#: A guided component is lost below this share of its guide.
LOST = 0.2


def fit_mixture(
    module: GMVAE,
    store: CellStore,
    train_rows: np.ndarray,
    validation_rows: np.ndarray,
    *,
    guide: np.ndarray | None = None,
    choose_components: bool = False,
    max_epochs: int | None = None,
    batch_size: int = 128,
    lr: float = 1e-3,
    checkpoint_dir: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
    **options: Any,
) -> TrainingResult:
    """Train ``module`` in place through all phases.

    1. *Warm-up*: a VAE with p(z) = N(0, I), until its held-out ELBO no longer falls.
    2. *Guide*: Leiden communities in z, united where no valley of density parts them; or classes from the labels in
       ``store``. Twice, but for communities of counts, q(y|.) alone learns them and the guide is made again from its
       last layer. Or the user's own.
    3. *Guided*: components are placed at the clusters; cells of the guide take its component, the others sum y out.
    4. *Free*: only labels of ``store`` are seen. Should a component of the guide be lost, this phase is taken back and
       run again with the guide.

    With many labels, q(y|x) learns these alone, before any guide. If it finds held-back labels better than the spread
    ones do, it learns all of them and then stays as it is, while the mixture is fitted to it in place of 3 and 4.

    Parameters
    ----------
    module
        The model.
    store
        The cells; its ``labels``, if any, are true labels (-1 for unknown).
    train_rows, validation_rows
        Rows of the store, (n,) int64.
    guide
        Labels of all cells of the store instead of a clustering, (n,) int64, -1 for none.
    choose_components
        Let the guide choose the number of components.
    max_epochs
        Epochs of the warm-up; None for about 6,000 optimiser steps. The later phases are shares of it.
    batch_size, lr, checkpoint_dir, callbacks, seed, **options
        As for :func:`sccvae.train.fit`; the free phase has a hundredth of ``lr``, each phase a folder of its own.

    Returns
    -------
    History over all phases (``phase`` counts :data:`PHASES`), whether it was interrupted, and the trainer.

    Raises
    ------
    ValueError
        If no training cell has a guide, and as for :func:`sccvae.train.fit`.
    TypeError, FloatingPointError
        As for :func:`sccvae.train.fit`.
    """
    check_sizes(batch_size=batch_size, max_epochs=1 if max_epochs is None else max_epochs)
    known = store.labels if store.labels is not None else np.full(len(store), -1)
    if guide is not None and (guide[train_rows] < 0).all():
        msg = (
            f"guide= has no value for any of the {len(train_rows)} training cells: it guides nothing. Give more cells "
            "one, or leave it out."
        )
        raise ValueError(msg)
    warm = default_max_epochs(-(-len(train_rows) // batch_size)) if max_epochs is None else int(max_epochs)
    options |= {"batch_size": batch_size, "lr": lr, "checkpoint_dir": checkpoint_dir, "callbacks": callbacks}
    phases = Phases(module, train_rows, validation_rows, seed=seed, **options)
    training = _Training(phases, store, known, guide, warm, choose_components, batch_size=batch_size, lr=lr)
    return phases.in_order(training.run)


class _Training:
    """The phases of :func:`fit_mixture`. ``known`` and ``guide`` are labels of all cells, (n,) int64, -1 for none."""

    def __init__(
        self,
        phases: Phases,
        store: CellStore,
        known: np.ndarray,
        guide: np.ndarray | None,
        warm: int,
        choose: bool,
        *,
        batch_size: int,
        lr: float,
    ) -> None:
        self.phases, self.module, self.train_rows, self.seed = phases, phases.module, phases.train_rows, phases.seed
        self.store, self.known, self.guide, self.choose = store, known, guide, choose
        self.warm, self.batch_size, self.lr = warm, batch_size, lr
        self.n_classes = int(known.max()) + 1  # also of those that no cell of the guide has
        self.blind = guide is None and (known < 0).all()
        self.counts = self.module.likelihood.support == "counts"
        self.even = self.module.likelihood.support in EVEN and zero_share(store) < SPARSE
        self.fixed = known.copy()  # what a guide does not change
        if guide is not None:
            self.fixed[self.train_rows] = np.where(known >= 0, known, guide)[self.train_rows]
        self.least = min(warm, GUIDED_STEPS * batch_size / len(self.train_rows))

    def run(self) -> TrainingResult:
        """All phases."""
        self.choose_components(1)  # a training before this one may have chosen
        with at_stage(self.module, "warmup"):
            self.phases.run("warm-up", PHASES.index("warm-up"), CellStore(self.store.cells, None), self.warm)
        self.rows = _guide_rows(self.train_rows, self.known, self.seed)
        self.z = self.look(lambda b: self.module.inference(b)["z"].loc)
        if self.module.learned_w:  # z holds the conditions there; clusters are looked for across them
            self.z = _without(self.z, self.look(self.module.c))
        found = self.first_guide()
        if self.guide is None and self.labels_teach_more(found.recall):
            return self.by_labels()
        labels = _on_cells(self.guide_again(found), self.rows, self.fixed)
        with seeded(self.seed):
            self.module.reset_classifier()
            self.place(labels)
        self.phase("guided", max(self.least, min(GUIDED * self.warm, GUIDED_EPOCHS)), labels)
        return self.free(labels)

    def first_guide(self) -> Guide:
        """The user's own guide, or one that is found; where the number of components is to be chosen, it says it."""
        if self.guide is None:
            views, beside = self.views()
            known = self.known[self.rows]
            found = _guide(views, known, self.n_classes, self.module, self.choose, self.seed, beside, even=self.even)
        else:
            found = Guide(self.guide[self.rows], int(self.guide.max()) + 1)
        if self.choose and self.blind and found.n_clusters == 1:
            logger.warning("All cells are one cluster: no valley parts them. To part them anyway, give n_components.")
        self.choose_components(found.n_clusters)
        return found

    def views(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Coordinates that cells are neighbours in, and those where valleys alone are looked for."""
        views, beside = [self.z], []
        parts = self.module.conditions.width > 0
        if (self.blind or not parts) and min(len(self.rows), self.store.n_features) > 3:
            x, library = self.store.cells.x[self.rows], self.store.cells.library[self.rows] if self.counts else None
            # Neighbours in z err where the encoder does, those in the principal components elsewhere: together fewer
            # err. With conditions, these part the batches, as neighbours; valleys are looked for there too.
            (beside if parts else views).append(principal_components(x, library, 30 if self.counts else 50))
        return views, beside

    def labels_teach_more(self, recall: float) -> bool:
        """Whether true labels by themselves, if they are many, teach more than a guide of this recall."""
        hidden = _held_back(self.train_rows, self.known, self.module)
        if not len(hidden):
            return False
        rest = self.known.copy()
        rest[hidden] = -1
        self.learn_labels(rest, min(GUIDED * self.warm, GUIDED_EPOCHS))
        own = mean_recall(self.known[hidden], over_cells(self.module, self.store, hidden, self.component))
        logger.info("Recall of held-back labels, learned from the others alone: %.3f", own)
        # Within one standard error is enough: the trial had fewer labels and epochs than the training would have.
        return own + math.sqrt(own * (1 - own) / len(hidden)) > recall

    def by_labels(self) -> TrainingResult:
        """Learn all labels, and fit the mixture to what they teach, in place of the guided and the free phase."""
        self.learn_labels(self.known, min(LABELLED * self.warm, LABELLED_EPOCHS))
        found = Guide(self.look(self.component), self.module.n_components)
        self.place(_on_cells(found, self.rows, self.known))
        with at_stage(self.module, "given"), frozen_statistics(self.module.y_body):
            # As long as it takes: classes that stay cannot be learned by heart (Kang's cells, all labelled: scib total
            # of 0.789 in place of 0.751 with GUIDED_EPOCHS).
            return self.phase("guided", max(self.least, GUIDED * self.warm), self.known)

    def learn_labels(self, labels: np.ndarray, epochs: float) -> None:
        """Let q(y|x) alone learn true labels, whatever z."""
        with seeded(self.seed):
            self.module.reset_classifier()
        self.module.forget_z()
        again = _more_often(self.train_rows, labels, LABELLED_SHARE)
        epochs = max(min(self.warm, LABELLED_BATCH * self.least), epochs)  # as many steps at least
        with at_stage(self.module, "labels"):
            self.phase("guide", epochs, labels, again, batch_size=LABELLED_BATCH * self.batch_size)

    def guide_again(self, found: Guide) -> Guide:
        """The guide, made again from what a classifier makes of it, while that finds the same clusters."""
        for _ in range(0 if self.guide is not None or (self.blind and self.counts) else ROUNDS):
            with seeded(self.seed):
                self.module.reset_classifier()
            with at_stage(self.module, "classifier"):
                labels = _on_cells(found, self.rows, self.fixed)
                self.phase("guide", max(self.least, min(ROUND * self.warm, ROUND_EPOCHS)), labels)
            known, features = self.known[self.rows], self.look(self.module.class_features)
            views = [principal_components(features, None, 30)]
            anew = _guide(views, known, self.n_classes, self.module, False, self.seed, before=found, even=self.even)
            both = (found.labels >= 0) & (anew.labels >= 0)
            agreement = adjusted_rand_score(found.labels[both], anew.labels[both])
            logger.info("The guide made again agrees with the one before by %.3f (adjusted Rand index)", agreement)
            if agreement < SAME_CLUSTERS:
                break
            found = anew
        if self.guide is None and found.n_clusters < self.module.n_components:
            text = (
                "The cells fall into %d clusters at most, fewer than n_components=%d; the other components start empty."
            )
            logger.warning(text, found.n_clusters, self.module.n_components)
        return found

    def free(self, labels: np.ndarray) -> TrainingResult:
        """The last phase, and once more with the guide's labels (n,) if one of its components is lost."""
        before = {k: v.clone() for k, v in self.module.state_dict().items()}
        epochs, true = min(FREE * self.warm, FREE_EPOCHS), self.known if (self.known >= 0).any() else None
        result = self.phase("free", epochs, true, lr=FREE_LR * self.lr)
        if lost := _lost(labels[self.rows], self.look(self.component), self.module.n_components):
            logger.warning(
                "Components %s lost their cells in the free phase (a collapse); it is run again with the guide. More "
                "components than the data have clusters are a common cause: try a smaller n_components.",
                lost,
            )
            self.module.load_state_dict(before)
            result = self.phase("free-guided", epochs, labels, lr=FREE_LR * self.lr)
        return result

    def phase(
        self, name: str, epochs: float, labels: np.ndarray | None, again: np.ndarray | None = None, **options: Any
    ) -> TrainingResult:
        """A phase after the warm-up, with labels (n,); the rows ``again`` are by default those of true labels."""
        monitor = MixtureMonitor(self.store, some_rows(self.train_rows, MONITORED, self.seed))
        options = {"kl_warmup": 0.0, "early_stopping": False, "restore_best": False} | options
        again = _more_often(self.train_rows, self.known, KNOWN_SHARE) if again is None else again
        seen = CellStore(self.store.cells, labels)
        return self.phases.run(name, PHASES.index(name), seen, epochs, monitor, again, **options)

    def choose_components(self, n: int) -> None:
        """Make ``n`` components, one for each class at least, if their number is to be chosen."""
        if self.choose:
            with seeded(self.seed):
                self.module.set_components(max(n, self.n_classes))

    def place(self, labels: np.ndarray) -> None:
        """Put the components where the cells with these labels (n,) lie."""
        self.module.place(*_moments(self.z, labels[self.rows], self.module.n_components))

    def look(self, values: Callable[[Batch], torch.Tensor]) -> np.ndarray:
        """``values`` of mini-batches, over the cells of the guide."""
        return over_cells(self.module, self.store, self.rows, values)

    def component(self, batch: Batch) -> torch.Tensor:
        """The likeliest component of cells, (n,)."""
        return self.module.classify(batch).argmax(1)


def _held_back(train_rows: np.ndarray, known: np.ndarray, module: GMVAE) -> np.ndarray:
    """A fifth of the training cells with a label, if these are many, each component has a class and q(y|.) sees x."""
    cells = train_rows[known[train_rows] >= 0]
    n_classes = int(known.max()) + 1
    if not module.classifier_sees_x or module.n_components > n_classes or len(cells) < MANY_LABELS * n_classes:
        return cells[:0]
    return np.sort(cells[np.argsort(known[cells], kind="stable")][::FOLDS])


def _more_often(train_rows: np.ndarray, labels: np.ndarray, share: float) -> np.ndarray:
    """Training rows with a label, repeated so that they are this share of an epoch; none if they are so already."""
    rows = train_rows[labels[train_rows] >= 0]
    times = share / (1 - share) * (len(train_rows) - len(rows)) / len(rows) if len(rows) else 1
    return np.repeat(rows, int(np.clip(round(times), 1, KNOWN_TIMES)) - 1)


def _on_cells(found: Guide, rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The guide of the cells ``rows`` as labels of all cells, (n,); what is known stays."""
    logger.info("Guide: %d clusters of sizes %s", found.n_clusters, np.bincount(found.labels[found.labels >= 0]))
    labels = known.copy()
    labels[rows] = np.where(known[rows] >= 0, known[rows], found.labels)
    return labels


def _guide_rows(train_rows: np.ndarray, known: np.ndarray, seed: int) -> np.ndarray:
    """Cells that a graph can take, (m,) int64; of many, up to half are those with a label, some of each class."""
    labelled = train_rows[known[train_rows] >= 0]
    if len(train_rows) <= MAX_CELLS or not len(labelled):
        return some_rows(train_rows, MAX_CELLS, seed)
    first = some_of_each(labelled, known[labelled], MAX_CELLS // 2, seed)
    return np.union1d(first, some_rows(train_rows, MAX_CELLS - len(first), seed))


def _without(z: np.ndarray, c: np.ndarray) -> np.ndarray:
    """What a linear regression of z on the conditions c leaves, (n, d), about the mean of z."""
    c = c - c.mean(0)
    return (z - c @ np.linalg.lstsq(c, z, rcond=None)[0]).astype(np.float32)


def _guide(
    views: list[np.ndarray],
    known: np.ndarray,
    n_classes: int,
    module: GMVAE,
    choose: bool,
    seed: int,
    beside: Sequence[np.ndarray] = (),
    before: Guide | None = None,
    even: bool = False,
) -> Guide:
    """Labels for the cells with these coordinates: spread from the known ones, or found, much as before."""
    if (known >= 0).any():
        return _spread_guide(joint_graph(views), known, n_classes, module, choose, seed)
    communities = Communities.of(views, seed, beside)
    if choose:
        return communities.separate()
    found, n = None, module.n_components
    if even and n <= communities.apart(RESOLUTIONS[0]).n_clusters:
        found = communities.blocks(n, before)
    return found or communities.with_clusters(n, before)


def _spread_guide(graph, known: np.ndarray, n_classes: int, module: GMVAE, choose: bool, seed: int) -> Guide:
    """Classes spread over the graph from the known labels; components beyond them take clusters far from any label."""
    n_components = n_classes if choose else module.n_components
    classes, recall = classes_from_few(graph, known, n_classes, seed)
    labels = core(graph, classes, n_classes)
    if n_components > n_classes:
        found = Communities(graph, seed).with_clusters(n_components)
        unnamed = [k for k in range(found.n_clusters) if not (known[found.labels == k] >= 0).any()]
        for new, k in enumerate(unnamed[: n_components - n_classes], start=n_classes):
            labels[(found.labels == k) & (known < 0)] = new
    return Guide(labels, n_components, recall)


def _moments(z: np.ndarray, labels: np.ndarray, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each cluster, (n, d); an empty one gets those of a random cell and all cells."""
    rng = np.random.default_rng(0)
    overall = z.std(0)
    loc, scale = np.empty((n, z.shape[1])), np.empty((n, z.shape[1]))
    for k in range(n):
        own = z[labels == k]
        loc[k] = own.mean(0) if len(own) else z[rng.integers(len(z))]
        scale[k] = own.std(0) if len(own) > z.shape[1] else overall
    return torch.from_numpy(loc).float(), torch.from_numpy(scale).float()


def _lost(labels: np.ndarray, found: np.ndarray, n: int) -> list[int]:
    """Those of n components that cells are ``found`` in (m,) fewer than a fifth as often as their guide has them."""
    sizes, left = np.bincount(labels[labels >= 0], minlength=n), np.bincount(found, minlength=n)
    return np.flatnonzero(left < LOST * sizes).tolist()
