"""Steps recorded on a GPU and played back (CUDA graphs): one launch in place of hundreds, each slower than its work."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor

from sccvae._rows import SparseRows

logger = logging.getLogger(__name__)

#: A mini-batch as a loader of cells gives it.
Tensors = dict[str, Tensor | SparseRows]

#: Runs before a recording: libraries and the optimiser make what they need once. In the second it is looked whether the
#: CPU waits for the GPU, which cannot be recorded.
WARM_UP = 3
#: Room for the values of a mini-batch, as a multiple of those of the one that is recorded.
ROOM = 1.25


class Recorder:
    """Runs functions of a mini-batch: the first times as they are, then from a recording of what they do on the GPU.

    A recording holds where its tensors lie. So a function must read and write the same ones each time (weights,
    gradients, sums), and decide nothing by their values. One that waits for the GPU is never recorded; that is logged.

    As a context it has everything inside done on the stream that it records: no other may have to wait for that one,
    as torch's default stream would for a gradient whose place in the graph was made there.

    Parameters
    ----------
    device
        The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._recordings: dict[Hashable, _Recording] = {}
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._inside = ExitStack()

    def __enter__(self) -> Self:
        before = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(before)
        self._inside.callback(before.wait_stream, self._stream)
        self._inside.enter_context(torch.cuda.stream(self._stream))
        return self

    def __exit__(self, *_: object) -> None:
        self._inside.close()

    def run(self, key: Hashable, function: Callable[[Tensors], None], tensors: Tensors) -> None:
        """Run a function on a mini-batch.

        Parameters
        ----------
        key
            Differs between functions, and wherever one does other things than before, but for the number of cells.
        function
            Takes tensors by name.
        tensors
            The mini-batch, on the GPU.

        Raises
        ------
        RuntimeError
            If the function cannot be recorded, though it does not wait for the GPU.
        """
        key = key, len(tensors["x"])
        if key not in self._recordings:
            self._recordings[key] = _Recording()
        self._recordings[key].run(self, function, tensors)

    def strictly(self, function: Callable[[], None]) -> None:
        """Run a function, with an error if it waits for the GPU."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)  # good enough
            torch.cuda.set_sync_debug_mode("error")
            try:
                function()
            finally:
                torch.cuda.set_sync_debug_mode(mode)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record what a function does, without doing it; give what plays it."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                function()
        except RuntimeError as error:  # torch's random numbers on the GPU do not come back from it
            msg = (
                "A training step could not be recorded on the GPU. Start Python anew and train with "
                f"cuda_graphs=False; please report it. ({str(error).splitlines()[0]})"
            )
            raise RuntimeError(msg) from error
        return graph.replay


class _Recording:
    """One function for mini-batches of one size: its runs so far, its own mini-batch, and what plays it."""

    def __init__(self) -> None:
        self.n_runs = 0
        self.inputs: Tensors = {}
        self.play: Callable[[], None] | None = None
        self.refused = False

    def run(self, recorder: Recorder, function: Callable[[Tensors], None], tensors: Tensors) -> None:
        """As :meth:`Recorder.run`."""
        self.n_runs += 1
        if self.refused:
            function(tensors)
            return
        if self.n_runs <= WARM_UP:
            if self.n_runs != 2:
                function(tensors)
                return
            try:
                recorder.strictly(lambda: function(tensors))
            except RuntimeError as error:
                if "synchronizing" not in str(error):
                    raise
                self.refused = True
                logger.info("Steps are not recorded, as one waits for the GPU (%s).", str(error).splitlines()[0])
                function(tensors)
            return
        if self.play is None or not _fits(tensors, self.inputs):
            self.play, self.inputs = None, {name: _room_for(t) for name, t in tensors.items()}
            self.play = recorder.record(lambda: function({name: _again(t) for name, t in self.inputs.items()}))
        for name, t in tensors.items():
            _copy(t, self.inputs[name])
        self.play()


def _fits(tensors: Tensors, inputs: Tensors) -> bool:
    x, room = tensors["x"], inputs["x"]
    return not isinstance(x, SparseRows) or len(x.values) <= len(room.values)


def _room_for(t: Tensor | SparseRows) -> Tensor | SparseRows:
    """A copy, with room for more values; zeros there."""
    if isinstance(t, Tensor):
        return t.clone()
    size = int(ROOM * len(t.values)) + 1
    parts = (torch.cat([part, part.new_zeros(size - len(part))]) for part in (t.columns, t.values))
    return SparseRows(t.starts.clone(), *parts, t.n_columns)


def _again(t: Tensor | SparseRows) -> Tensor | SparseRows:
    """The same; rows anew, so that nothing made of them before is taken for what they hold now."""
    return t if isinstance(t, Tensor) else SparseRows(t.starts, t.columns, t.values, t.n_columns)


def _copy(t: Tensor | SparseRows, to: Tensor | SparseRows) -> None:
    if isinstance(t, Tensor):
        to.copy_(t)
        return
    n = len(t.values)
    to.starts.copy_(t.starts)
    to.columns[:n].copy_(t.columns)
    to.values[:n].copy_(t.values)
    to.values[n:].zero_()
