"""A training in phases: one call of ``fit`` after the other, with one history."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer

from sccvae.data import CellStore
from sccvae.module import GenerativeModule
from sccvae.train.fit import TrainingResult, fit

logger = logging.getLogger(__name__)


class _EndedError(Exception):
    """A phase was interrupted, with ``result``: no other follows."""

    def __init__(self, result: TrainingResult) -> None:
        self.result = result


class Phases:
    """Trains one module in several phases.

    Parameters
    ----------
    module, train_rows, validation_rows, checkpoint_dir, callbacks, seed, **options
        As for :func:`sccvae.train.fit`. Each phase has a folder of its own in ``checkpoint_dir`` and a seed of its own;
        ``max_time`` is that of all. Lightning's ``EarlyStopping`` is for the first: losses of others do not compare.

    Attributes
    ----------
    frames
        The history of each phase so far.
    """

    def __init__(
        self,
        module: GenerativeModule,
        train_rows: np.ndarray,
        validation_rows: np.ndarray,
        *,
        checkpoint_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.module = module
        self.train_rows, self.validation_rows = train_rows, validation_rows
        self.checkpoint_dir, self.callbacks = checkpoint_dir, callbacks
        self.seed, self.options = seed, options
        self.frames: list[pd.DataFrame] = []
        self.trainer: Trainer | None = None
        self.end = None
        if (max_time := self.options.pop("max_time", None)) is not None:
            self.end = time.monotonic() + Timer(max_time).time_remaining()

    def run(
        self,
        name: str,
        number: int,
        store: CellStore,
        max_epochs: float,
        watch: Callback | None = None,
        again: np.ndarray | None = None,
        **options: Any,
    ) -> TrainingResult:
        """One phase.

        Parameters
        ----------
        name
            What the progress bar and the folder of the checkpoints call it.
        number
            Value of ``phase`` in the history.
        store
            The cells, with the labels of this phase.
        max_epochs
            Epochs; a share of those of another phase is rounded, to one at least.
        watch
            A callback of this phase.
        again
            Training rows that are shown once more in each epoch, (m,) int64, a row as often as it is in there.
        **options
            For :func:`sccvae.train.fit`, before those of all phases.

        Returns
        -------
        History of all phases so far, and the trainer of this one. If it was interrupted, none follows:
        :meth:`in_order` ends there.
        """
        index = len(self.frames)
        left = None if self.end is None else self.end - time.monotonic()
        if index and left is not None and left <= 0:
            raise _EndedError(self._so_far())
        callbacks = [c for c in self.callbacks if not (index and isinstance(c, EarlyStopping))]
        found = fit(
            self.module,
            store,
            self.train_rows if again is None else np.concatenate([self.train_rows, again]),
            self.validation_rows,
            max_epochs=max_epochs if isinstance(max_epochs, int) else max(1, round(max_epochs)),
            checkpoint_dir=None if self.checkpoint_dir is None else Path(self.checkpoint_dir) / f"{index}-{name}",
            callbacks=[*callbacks, *filter(None, [watch])],
            max_time=None if left is None else timedelta(seconds=max(left, 0)),
            seed=self.seed + index,
            description=name,
            **self.options | options,
        )
        frame = pd.concat([*found.history.values()], axis=1) if found.history else pd.DataFrame()
        kept = sum(map(len, self.frames)) + found.kept
        self.frames.append(frame.assign(phase=float(number)))
        self.trainer = found.trainer
        result = TrainingResult(self._history(), found.interrupted, found.trainer, kept, found.out_of_time)
        if found.interrupted:
            raise _EndedError(result)
        return result

    def in_order(self, phases: Callable[[], TrainingResult]) -> TrainingResult:
        """What ``phases`` gives, which calls :meth:`run`; or what is there when Ctrl-C or ``max_time`` ends it."""
        try:
            return phases()
        except _EndedError as end:
            return end.result
        except KeyboardInterrupt:  # between two phases: within one, it ends in order by itself
            if not self.frames:
                raise
            return self._so_far()

    def _so_far(self) -> TrainingResult:
        """What is there when Ctrl-C strikes, or time is over, between two phases."""
        logger.warning("Training ends after %d of its phases; the model keeps its current weights.", len(self.frames))
        late = self.end is not None and time.monotonic() >= self.end
        return TrainingResult(self._history(), True, self.trainer, sum(map(len, self.frames)) - 1, late)

    def _history(self) -> dict[str, pd.DataFrame]:
        table = pd.concat(self.frames, ignore_index=True).rename_axis(index="epoch")
        return {column: table[[column]] for column in table}


@contextmanager
def at_stage(module: GenerativeModule, stage: str) -> Iterator[None]:
    """Inside, the module is at this stage, and only what it learns there (``LEARNED``) has gradients.

    Several processes wait for the gradients of all weights that want one.

    Parameters
    ----------
    module
        A model with stages.
    stage
        One of them.
    """
    before, module.stage = module.stage, stage
    try:
        for name, weight in module.named_parameters():
            weight.requires_grad_(name.startswith(module.LEARNED[stage]))
        yield
    finally:
        module.stage = before
        module.requires_grad_(True)
