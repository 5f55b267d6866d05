"""The likelihood kernels for a GPU: there as they are, elsewhere in Triton's interpreter, where Triton is installed."""

from __future__ import annotations

import logging
import math
import os
from importlib.util import find_spec

import pytest
import torch

from sccvae import _rows
from sccvae._rows import SparseRows, has_triton
from sccvae.distributions import kernels, log_nb, log_zinb

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which comes with torch for a GPU")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
if find_spec("triton"):
    from sccvae import _rows_gpu


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "_by_loops", lambda x: False)
    monkeypatch.setattr(kernels, "_by_triton", lambda x: True)


def close(got, wanted, relative, absolute):
    torch.testing.assert_close(got.double().cpu(), wanted.double(), rtol=relative, atol=absolute)


def compare(x, inputs, log_depth=None, rows=None, absolute=1e-5):
    """Log mass and gradients, in float32 by Triton, against those of float64 by torch's autograd."""
    slow = [t.double().requires_grad_() for t in inputs]
    fast = [t.to(DEVICE, copy=True).requires_grad_() for t in inputs]
    log_mu = slow[0] if log_depth is None else slow[0].log_softmax(-1) + log_depth.double()
    log_theta = slow[1] if rows is None else slow[1][rows]
    wanted = (log_zinb if len(inputs) == 3 else log_nb)(x.double(), log_mu, log_theta, *slow[2:]).sum(-1)
    given = {"log_depth": log_depth, "rows": rows}
    given = {name: None if t is None else t.to(DEVICE) for name, t in given.items()}
    counts = SparseRows.of(x).to(DEVICE)
    got = (kernels.zinb_sum if len(inputs) == 3 else kernels.nb_sum)(counts, *fast, **given)
    close(got.detach(), wanted.detach(), 1e-5, absolute)
    weight = torch.rand(got.shape)
    (wanted * weight.double()).sum().backward()
    (got * weight.to(DEVICE)).sum().backward()
    for a, b in zip(fast, slow, strict=True):
        close(a.grad, b.grad, 1e-5, 10 * absolute)


@pytest.mark.parametrize("cells", [576, 1], ids=["one gene", "one cell"])
@pytest.mark.parametrize("inflated", [False, True])
def test_over_the_whole_range(inflated, cells):
    """Counts 0 to 1e6, dispersions 1e-4 to 1e6, means at the counts and far off."""
    counts = torch.tensor([0, 1, 2, 3, 7, 20, 21, 100, 1e3, 2.5, 1e4, 1e6])
    log_theta = torch.linspace(math.log(1e-4), math.log(1e6), 12)
    x = counts[:, None].expand(12, 12)
    shift = torch.tensor([-3.0, 0.0, 0.3, 2.0])[:, None, None]
    inputs = [x.clamp(min=0.1).log() + shift, log_theta.expand(4, 12, 12), torch.randn(4, 12, 12)]
    inputs = [t.reshape(cells, -1).contiguous() for t in inputs[: 3 if inflated else 2]]
    # A difference of numbers of about twenty at most: x - mu of a count of 20 at its mean.
    compare(x.expand(4, 12, 12).reshape(cells, -1).contiguous(), inputs, absolute=4e-7)


@pytest.mark.parametrize("rows", [(1,), (7,), (2, 7), (3,)], ids=["of a gene", "of a cell", "of a draw", "of a batch"])
@pytest.mark.parametrize("inflated", [False, True])
@pytest.mark.parametrize("genes", [40, 1500])
def test_with_their_softmax(genes, inflated, rows):
    """Of fewer genes than are worked on at a time, and of more."""
    x, depth = torch.poisson(torch.full((7, genes), 0.5)), torch.logspace(2, 5, 7)[:, None]
    x[0], x[6], x[2, 3] = 0, 0, 300
    inputs = [3 * torch.randn(2, 7, genes), torch.randn(*rows, genes)] + [torch.randn(2, 7, genes)] * inflated
    batch = torch.tensor([0, 2, 2, 0, 2, 0, 2]) if rows == (3,) else None  # nothing of batch 1
    compare(x, inputs, depth.log(), batch, absolute=1e-4)


@pytest.mark.parametrize("parameter", [0, 1, 2])
@pytest.mark.parametrize("count", [1.0, 3.0, 30.0])
def test_they_do_not_hide_nan(parameter, count):
    x = torch.full((2, 9), count)
    x[:, 2:] = 0
    inputs = [torch.zeros(2, 9) for _ in range(3)]
    inputs[parameter][1, [1, 4]] = math.nan
    rows, depth = SparseRows.of(x).to(DEVICE), torch.zeros(2, 1, device=DEVICE)
    inputs = [t.to(DEVICE) for t in inputs]
    found = [kernels.zinb_sum(rows, *inputs), kernels.zinb_sum(rows, *inputs, depth)]
    if parameter < 2:
        found += [kernels.nb_sum(rows, *inputs[:2]), kernels.nb_sum(rows, *inputs[:2], depth)]
    for got in found:
        assert got.isnan().tolist() == [False, True]


@pytest.mark.parametrize("columns", [3, 1500])
def test_rows(columns, monkeypatch):
    """Empty ones, one with more values than are worked on at a time, and room after the last, with values to ignore."""
    monkeypatch.setattr(_rows, "has_triton", lambda device: True)
    x = torch.poisson(torch.full((4, columns), 0.5))
    x[1], x[3] = 0, 0
    rows = SparseRows.of(x)
    place = rows.columns.new_full((9,), 2)
    rows = SparseRows(
        rows.starts, torch.cat([rows.columns, place]), torch.cat([rows.values, torch.full((9,), 7.0)]), columns
    )
    rows = rows.to(DEVICE)
    assert torch.equal(rows.dense().cpu(), x)
    given = _rows_gpu.spread(rows.starts, torch.arange(4.0, device=DEVICE), len(rows.values)).cpu()
    assert torch.equal(given[:-9], x.nonzero()[:, 0].float())
    assert given[-9:].unique().numel() > 1  # not one program alone
    monkeypatch.setattr(SparseRows, "device", property(lambda rows: torch.device("cuda")))
    mapped = rows.map(lambda v, d: v * d, torch.arange(1.0, 5.0, device=DEVICE)[:, None])
    assert torch.equal(mapped.dense().cpu(), x * torch.arange(1.0, 5.0)[:, None])


def test_what_keeps_triton_from_working_is_logged(monkeypatch, caplog):
    assert _rows_gpu.works(DEVICE)
    caplog.set_level(logging.INFO, logger="sccvae")

    def fail(device):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(_rows_gpu, "works", fail)
    has_triton.cache_clear()
    assert not has_triton(torch.device("cuda"))
    has_triton.cache_clear()
    assert "Triton cannot be used (RuntimeError: Failed to find C compiler)" in caplog.text
