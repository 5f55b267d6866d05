"""Cells that lack some of a model's genes: masked, not filled with zeros."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from sccvae._rows import dense
from sccvae.data.fields import Schema
from sccvae.data.read import Cells
from sccvae.data.store import CellStore


def measured(adata: AnnData, schema: Schema) -> np.ndarray:
    """Which of the model's genes ``adata`` has, (G,) bool, in the order of the model."""
    return pd.Index(schema.var_names.astype(str)).isin(adata.var_names.astype(str))  # np.isin takes half a second


class MaskedStore(CellStore):
    """Cells of which some features were not measured; they are handed out at full width with the mask.

    Parameters
    ----------
    cells
        Their measured features, x (n, present.sum()).
    present
        Which features were measured, (G,) bool.
    stand_in
        What the encoder sees in place of each feature, (G,) float32; read where it was not measured.
    labels
        As for :class:`CellStore`.
    depth
        Library size that the stand-ins belong to, where the encoder sees counts relative to the library size; else
        None.
    usual
        What cells have of each feature in the mean, (G,) float32; None for the stand-ins.
    """

    def __init__(
        self,
        cells: Cells,
        present: np.ndarray,
        stand_in: np.ndarray,
        labels: np.ndarray | None = None,
        depth: float | None = None,
        usual: np.ndarray | None = None,
    ) -> None:
        super().__init__(cells, labels)
        self.present, self.depth = torch.from_numpy(present), depth
        self.stand_in = torch.from_numpy(np.asarray(stand_in, dtype=np.float32))
        self.usual = self.stand_in if usual is None else torch.from_numpy(np.asarray(usual, dtype=np.float32))

    @property
    def n_features(self) -> int:
        """Number G of features, measured or not."""
        return len(self.present)

    def subset(self, rows: np.ndarray) -> MaskedStore:
        """These rows, in memory."""
        some = super().subset(rows)
        known = self.present.numpy(), self.stand_in.numpy(), some.labels, self.depth, self.usual.numpy()
        return MaskedStore(some.cells, *known)

    def gather(self, rows: np.ndarray) -> dict[str, Tensor]:
        """As :meth:`CellStore.gather`, with ``present`` (n, G) bool; where it is false, ``x`` has the stand-in.

        And with ``usual``, (n, G) float32.
        """
        tensors = super().gather(rows)
        x = self.stand_in.repeat(len(rows), 1)
        if self.depth is not None:
            x = x * (tensors["library"] / self.depth)
        x[:, self.present] = dense(tensors["x"])
        masked = {"present": self.present.expand(len(rows), -1), "usual": self.usual.expand(len(rows), -1)}
        return tensors | {"x": x} | masked
