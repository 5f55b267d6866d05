"""The first layer of an encoder over values that are not zero alone, against the dense product."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix as sparse_matrix

from sccvae import _compiled, _rows
from sccvae._rows import few
from sccvae.data import Cells, CellStore, ChunkLoader
from sccvae.distributions import Bernoulli, kernels
from sccvae.module import CVAE, GMVAE, VAE, Batch
from sccvae.module import _base as module_base
from sccvae.nn import MLP, SparseRows
from sccvae.train import TrainingPlan
from sccvae.train.schedules import Schedule

G = 300


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def counts(n=7, share=0.1, g=G):
    return torch.poisson(torch.full((n, g), 3.0)) * (torch.rand(n, g) < share)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.003, 0.15])
@pytest.mark.parametrize(("n", "width"), [(1, 5), (7, 128)])
def test_product_and_its_gradients(n, width, share, threads, monkeypatch):
    monkeypatch.setattr(_compiled, "SHARE", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, weight, bias, g = counts(n, share), torch.randn(G, width), torch.randn(width), torch.randn(n, width)
    slow = [t.double().requires_grad_() for t in (weight, bias)]
    fast = [t.clone().requires_grad_() for t in (weight, bias)]
    wanted, got = torch.addmm(slow[1], x.double(), slow[0]), SparseRows.of(x).linear(*fast)
    torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-5)
    wanted.backward(g.double())
    got.backward(g)
    for a, b in zip(fast, slow, strict=True):
        assert a.grad.shape == a.shape
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-4, rtol=1e-5)


def test_they_are_the_values_that_are_not_zero():
    x = counts()
    x[3], x[4, 7], x[5, 8] = 0, math.nan, math.inf
    x[0, -1], x[1, 0] = -2, 1
    rows = SparseRows.of(x)
    assert len(rows) == 7
    torch.testing.assert_close(rows.dense(), x, equal_nan=True, rtol=0, atol=0)
    assert rows.linear(torch.ones(G, 2), torch.zeros(2)).isnan().any(1).tolist() == [i == 4 for i in range(7)]
    every_second = SparseRows.of(counts(8)[::2])  # not contiguous
    assert len(every_second) == 4


def test_what_is_done_to_the_values_knows_their_row():
    x, depth = counts(), torch.rand(7, 1) + 1
    got = SparseRows.of(x).map(lambda v, d: v / d, depth).dense()
    torch.testing.assert_close(got, x / depth)


def test_values_are_dropped_at_random():
    x = counts(200, 0.19, 1000) + torch.eye(200, 1000)
    rows = SparseRows.of(x)
    kept = rows.drop(77).dense()
    where = kept != 0
    torch.testing.assert_close(kept[where], x[where] * (256 / 179))
    for part in (slice(None), slice(0, None, 7)):
        rate = where[:, part].sum() / (x[:, part] != 0).sum()
        assert abs(rate - 179 / 256) < 4 * math.sqrt(0.21 / float((x[:, part] != 0).sum()))
    assert not torch.equal(rows.drop(77).dense(), kept)
    assert torch.equal(rows.drop(0).dense(), x)
    assert torch.equal(rows.dense(), x)  # it stays as it was
    nothing = SparseRows.of(torch.zeros(3, G)).drop(77)
    assert len(nothing.values) == 0


@pytest.mark.parametrize(
    "x",
    [
        counts().double(),
        counts(share=0.4),
        counts(g=_rows.FEWEST_COLUMNS - 1),
        counts().requires_grad_(),
        counts()[None],
        counts(0),
    ],
    ids=["float64", "dense", "few columns", "gradient by x", "three axes", "no cell"],
)
def test_where_the_dense_product_is_taken(x):
    assert few(x) is None
    if x.dim() == 2 and len(x):
        assert few(SparseRows.of(x)) is None or x.requires_grad


def test_without_numba_the_dense_product_is_taken(monkeypatch):
    assert few(counts()) is not None
    monkeypatch.setattr(_rows, "has_numba", lambda: False)
    assert few(counts()) is None


@pytest.mark.parametrize(
    "module",
    [
        lambda: VAE(G, input_dropout=0),
        lambda: VAE(G, input_dropout=0, n_layers=3, skip=True, likelihood="poisson"),
        lambda: VAE(G, input_dropout=0, n_layers=0, likelihood="zinb"),
        lambda: CVAE(G, [2], input_dropout=0),
        lambda: CVAE(G, [2], input_dropout=0, prior="learned", encode_condition=False),
        lambda: GMVAE(G, 3, [2]),
        lambda: GMVAE(G, 3, classifier="z"),
    ],
    ids=["vae", "vae-skip", "vae-linear", "cvae", "cvae-learned", "gmvae", "gmvae-z"],
)
def test_a_module_learns_the_same(module, monkeypatch):
    """Loss and gradients by the sparse and by the dense product."""
    module, x = module(), counts(20)
    codes = torch.arange(20) % 2 if hasattr(module, "conditions") and module.conditions.width else None
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        module.zero_grad()
        module.loss(Batch.of(x, codes))[0].backward()
        found.append([p.grad for p in module.parameters() if p.grad is not None])
        monkeypatch.setattr(module_base, "few", lambda _: None)
    for by_sparse, by_dense in zip(*found, strict=True):
        torch.testing.assert_close(by_sparse, by_dense, rtol=1e-3, atol=1e-3 * float(by_dense.abs().max()) + 1e-6)


def test_a_mask_takes_values_away():
    """GMVAE(masking=) on counts."""
    module = GMVAE(G, 3, masking=1 - 1e-6).train()
    hidden = module.inference(Batch.of(counts(20)))["z"].loc
    torch.testing.assert_close(hidden, module.inference(Batch.of(torch.zeros(20, G)))["z"].loc)


def test_a_likelihood_that_moves_zero_keeps_the_dense_input():
    class Shifted(type(VAE(G).likelihood)):
        zero_stays_zero = False

        def encoder_input(self, x, library=None):
            return super().encoder_input(x, library) - 0.5

    module = VAE(G, input_dropout=0).eval()
    module.likelihood = Shifted().build(128, G)
    x = counts(20)
    wanted = module.encoder(x.log1p() - 0.5).loc
    torch.testing.assert_close(module.inference(Batch.of(x))["z"].loc, wanted)


def test_a_network_without_layers_or_with_skips_takes_them():
    x = counts()
    for net in (MLP(G, []), MLP(G, [4, 5], skip=True), MLP(G, [4], n_cond=2)):
        c = torch.rand(7, 2) if net.linears and net.linears[0].condition else None
        torch.testing.assert_close(net.eval()(SparseRows.of(x), c), net(x, c))


def test_rows_of_a_loader():
    """Chunks of several mini-batches, cells without a count among them; the same product as that of a dense x."""
    x = counts(90)
    x[[0, 40, 89]] = 0
    empty = np.zeros((90, 0), np.float32)
    more = empty.astype(np.int64), empty, np.ones((90, 1), np.float32)
    stores = [CellStore(Cells(values, *more)) for values in (x.numpy(), sparse_matrix(x.numpy()))]
    weight, bias, n = torch.randn(G, 5), torch.randn(5), 0
    loaders = [ChunkLoader(store, np.arange(90), 32, shuffle=True) for store in stores]
    for chunks in zip(*loaders, strict=True):
        for both in zip(*chunks, strict=True):
            dense, rows = (Batch.on(torch.device("cpu"), tensors) for tensors in both)
            assert rows.entries is rows.x
            assert torch.equal(rows.dense, dense.x)
            assert torch.equal(rows.entries.linear(weight, bias), dense.entries.linear(weight, bias))
            n += len(rows)
    assert n == 90


def test_some_of_the_rows():
    x = counts(11)
    x[3] = 0
    rows = SparseRows.of(x)
    for part in (slice(None, None, 2), slice(None, None, 1), slice(0, 0), slice(3, 4)):
        assert torch.equal(rows[part].dense(), x[part])
    for sizes in ([11], [4, 4, 3], [3, 1, 7]):
        assert all(torch.equal(a.dense(), b) for a, b in zip(rows.split(sizes), x.split(sizes), strict=True))
    assert rows.shape == x.shape
    assert rows.dense() is rows.dense()
    batch = Batch(rows, *(torch.rand(11, 1) for _ in range(3)), labels=torch.arange(11))
    half = batch.every(2)
    assert torch.equal(half.dense, x[::2])
    assert half.labels.tolist() == [0, 2, 4, 6, 8, 10]
    assert half.present is None


def test_rows_without_numba_and_on_another_device(monkeypatch):
    x = counts().double()
    rows = SparseRows.of(x)
    monkeypatch.setattr(_rows, "has_numba", lambda: False)
    assert torch.equal(rows.dense(), x)
    there = rows.to("meta")
    assert {there.device, there.dense().device} == {torch.device("meta")}
    assert rows.to("cpu") is rows


def test_rows_on_another_device_are_read_there():
    """Shapes and devices, by one that has no values; tests of a GPU see to these."""
    x = SparseRows.of(counts()).to("meta")
    assert _rows.few(x) is x
    assert _rows.few(x.dense()) is None
    weight, bias = torch.empty(G, 5, device="meta"), torch.empty(5, device="meta")
    for rows in (x.map(torch.log1p), x.map(lambda v, d: v / d, torch.empty(7, 1, device="meta")), x.drop(77)):
        assert rows.values.shape == x.values.shape
        y = rows.linear(weight, bias)
        assert (y.shape, y.device.type) == ((7, 5), "meta")


def test_a_resampled_observation_is_dense():
    batch = Batch.of(torch.rand(2, G))
    assert batch.observed(Bernoulli()) is batch
    resampled = Bernoulli(resample=True)
    for x in (batch.x, SparseRows.of(batch.x)):
        drawn = replace(batch, x=x).observed(resampled)
        assert drawn.x.unique().tolist() == [0, 1]


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "normal"])
@pytest.mark.parametrize("numba", [True, False])
def test_a_likelihood_of_rows(likelihood, numba, monkeypatch):
    """Rows with zeros among their values, as files may hold them, against a dense x: the same ELBO and gradients."""
    x = counts(20)
    stored = SparseRows.of(x + (torch.rand(20, G) < 0.05))
    at = torch.arange(20).repeat_interleave(stored.starts.diff())
    stored = SparseRows(stored.starts, stored.columns, x[at, stored.columns.long()], G)
    assert (stored.values == 0).any()
    module = VAE(G, input_dropout=0, likelihood=likelihood)
    if not numba:
        for place in (_rows, kernels):
            monkeypatch.setattr(place, "has_numba", lambda: False)
    found = []
    for given in (x, stored):
        torch.manual_seed(1)
        module.zero_grad()
        loss, _ = module.loss(replace(Batch.of(x), x=given))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in module.parameters())])
    for by_rows, by_dense in zip(*found, strict=True):
        torch.testing.assert_close(by_rows, by_dense, rtol=1e-4, atol=1e-5)


def test_the_trainer_moves_rows_to_its_device():
    rows = SparseRows.of(counts())
    chunk = [{"x": rows, "library": torch.ones(7, 1)}]
    (moved,) = TrainingPlan(VAE(G), Schedule(10)).transfer_batch_to_device(chunk, torch.device("meta"), 0)
    assert {moved["x"].device, moved["library"].device} == {torch.device("meta")}
    assert moved["x"].shape == (7, G)
