"""Recorded steps and cells on a device, as far as a CPU can show it: the GPU's part is stood in for by a plain call."""

from __future__ import annotations

import importlib
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _training import N, Raise, a_store, a_vae, an_ae, same_history, state, train
from lightning import Callback
from scipy import sparse

from sccvae import _rows
from sccvae._recording import ROOM, WARM_UP, Recorder
from sccvae._rows import SparseRows
from sccvae.data import Cells, CellStore, MaskedStore, ResidentStore
from sccvae.data.residence import resident
from sccvae.distributions import kernels
from sccvae.module import CVAE, GMVAE
from sccvae.train import Schedule

fit = importlib.import_module("sccvae.train.fit")  # the package's attribute of this name is the function


class Repeater(Recorder):
    """Calls again in place of a recording; notes what a GPU would be asked for."""

    def __init__(self, device=None):
        self._recordings, self.asked = {}, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def strictly(self, function):
        self.asked.append("strict")
        function()

    def record(self, function):
        self.asked.append("record")
        return function


@pytest.fixture
def on_gpu(monkeypatch):
    """Trainings run as on a GPU: cells in a resident store, counts by torch, steps through a recorder; gives these."""
    made = []

    def recorder(device):
        made.append(Repeater())
        return made[-1]

    monkeypatch.setattr(fit, "resident", ResidentStore)
    monkeypatch.setattr(fit, "Recorder", recorder)
    for place in (kernels, _rows):
        monkeypatch.setattr(place, "has_numba", lambda: False)
    return made


def sparse_store():
    cells = a_store().cells
    codes = np.arange(N)[:, None] % 2
    return CellStore(Cells(sparse.csr_matrix(cells.x), codes, cells.covariates, cells.library), np.arange(N) % 4 - 1)


def a_cvae(**options):
    torch.manual_seed(7)
    return CVAE(6, [2], n_latent=2, n_hidden=4, **options)


def a_gmvae(**options):
    torch.manual_seed(7)
    return GMVAE(6, 3, [2], n_latent=2, n_hidden=4, **options)


@pytest.mark.parametrize("make", [a_vae, an_ae, a_cvae, a_gmvae])
def test_a_recorded_training_is_the_same_training(make, on_gpu):
    plain, recorded = make(norm=None), make(norm=None)
    histories = []
    for module, graphs in ((plain, False), (recorded, True)):
        store = a_store() if make is an_ae else sparse_store()
        histories.append(train(module, store=store, cuda_graphs=graphs, max_epochs=8, weight_decay=0.1).history)
    assert len(on_gpu) == 1
    assert on_gpu[0].asked.count("record") >= 3  # two sizes of mini-batches, and the held-out cells
    assert histories[0].keys() == histories[1].keys()
    for name, frame in histories[0].items():
        np.testing.assert_allclose(histories[1][name], frame, rtol=1e-4, atol=1e-4, err_msg=name)
    for a, b in zip(state(plain).values(), state(recorded).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_same_seed_same_bits(on_gpu):
    found = [train(a_cvae(), store=sparse_store(), seed=3).history for _ in range(2)]
    assert same_history(*found)


def test_nothing_of_the_gpu_is_kept(on_gpu):
    result = train(a_vae(), store=sparse_store())
    plan = result.trainer.lightning_module
    assert plan.recorder is None
    assert all(p.grad is None for p in plan.parameters())
    assert type(result.trainer.train_dataloader.store) is CellStore


def test_lightning_counts_the_steps(on_gpu):
    steps = [train(a_vae(), store=sparse_store(), cuda_graphs=graphs).trainer.global_step for graphs in (False, True)]
    assert steps == [16, 16]


def test_a_recorded_training_can_be_resumed(on_gpu, tmp_path):
    whole, halves = a_vae(), a_vae()
    train(whole, store=sparse_store(), early_stopping=False)
    with pytest.raises(KeyError, match="stop here"):
        train(
            halves,
            store=sparse_store(),
            early_stopping=False,
            checkpoint_dir=tmp_path,
            callbacks=[Raise(KeyError("stop here"), after=3)],
        )
    train(halves, store=sparse_store(), early_stopping=False, checkpoint_dir=tmp_path)
    for a, b in zip(state(whole).values(), state(halves).values(), strict=True):
        assert torch.equal(a, b)


class AfterEach(Callback):
    """Counts backward passes."""

    n = 0

    def on_after_backward(self, trainer, pl_module):
        self.n += 1


class FromOutside(Callback):
    """The same by an attribute of its own."""

    n = 0

    def __init__(self):
        self.on_before_optimizer_step = self.count

    def count(self, *_):
        self.n += 1


@pytest.mark.parametrize("make", [AfterEach, FromOutside])
def test_a_callback_inside_a_step_is_called_at_each(make, on_gpu):
    callback = make()
    train(a_vae(), store=sparse_store(), callbacks=[callback])
    assert callback.n == 16
    assert not on_gpu


def test_a_loss_that_is_not_finite_is_seen(on_gpu):
    with pytest.raises(FloatingPointError, match=r"no longer finite at optimiser step .* lower learning rate"):
        train(a_vae(), store=sparse_store(), lr=1e30)


def test_other_precisions_and_several_processes_are_not_recorded(on_gpu):
    plan = SimpleNamespace(recorder=None)
    for other in ({"precision": "16-mixed"}, {"world_size": 2}):
        given = {"strategy": SimpleNamespace(root_device=torch.device("cpu")), "world_size": 1, "precision": "32-true"}
        given["callbacks"] = []
        with fit._on_gpu(plan, SimpleNamespace(**given | other), [SimpleNamespace(store=sparse_store())]):
            assert plan.recorder is None
    assert not on_gpu


def test_a_recording_reads_its_own_mini_batch():
    """First as they come, then once recorded; more values than there is room for are recorded anew."""
    recorder, seen = Repeater(), []
    for total in (4, 4, 4, 4, 5, 2, 20, 21, 3):
        x = torch.zeros(3, 40)
        x.view(-1)[torch.randperm(120)[:total]] = 1.0 + torch.rand(total)
        rows = SparseRows.of(x)
        recorder.run("step", lambda given: seen.append(given["x"].dense()), {"x": rows, "codes": torch.ones(3)})
        torch.testing.assert_close(seen[-1], x, rtol=0, atol=0)
    assert recorder.asked == ["strict", "record", "record"]
    assert ROOM * 20 >= 21
    assert WARM_UP == 3


def test_each_size_and_key_has_a_recording():
    recorder, seen = Repeater(), []
    for _ in range(5):
        for key in ("a", "b"):
            for n in (2, 3):
                x = torch.rand(n, 4)
                recorder.run(key, lambda given, key=key: seen.append((key, given["x"])), {"x": x})
                assert seen[-1][0] == key
                assert torch.equal(seen[-1][1], x)
    assert recorder.asked.count("record") == 4


def test_a_step_that_waits_for_the_gpu_is_never_recorded(caplog):
    caplog.set_level(logging.INFO, logger="sccvae")
    recorder, seen = Repeater(), []

    def strictly(function):
        raise RuntimeError("called a synchronizing CUDA operation\nmore")

    recorder.strictly = strictly
    for i in range(5):
        recorder.run("step", lambda given: seen.append(float(given["x"][0, 0])), {"x": torch.full((2, 2), float(i))})
    assert seen == [0, 1, 2, 3, 4]
    assert not recorder.asked
    assert [r.getMessage() for r in caplog.records] == [
        "Steps are not recorded, as one waits for the GPU (called a synchronizing CUDA operation)."
    ]


def test_other_errors_of_a_step_are_its_own():
    def fail(given):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Repeater().run("step", fail, {"x": torch.ones(2, 2)})


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("make", [sparse.csr_matrix, np.asarray], ids=["sparse", "dense"])
def test_a_resident_store_gives_what_the_store_gives(make, labels):
    cells = a_store().cells
    cells.x[5] = 0
    codes, covariates = np.arange(2 * N).reshape(N, 2) % 3, np.random.default_rng(0).random((N, 1), np.float32)
    store = CellStore(Cells(make(cells.x), codes, covariates, cells.library), np.arange(N) if labels else None)
    near = ResidentStore(store, torch.device("cpu"))
    assert (len(near), near.n_features) == (N, 6)
    for rows in (np.array([7, 5, 0, 39, 7]), np.array([5]), np.array([], np.int64)):
        wanted, got = store.gather(rows), near.gather(rows)
        assert wanted.keys() == got.keys()
        for name, t in wanted.items():
            a, b = (v.dense() if isinstance(v, SparseRows) else v for v in (t, got[name]))
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_cells_go_to_a_gpu_if_they_fit(monkeypatch):
    store, cuda = sparse_store(), torch.device("cuda", 0)
    made = []
    monkeypatch.setattr("sccvae.data.residence.ResidentStore", lambda store, device: made.append(device) or "near")
    x = store.cells.x
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 8 * (x.nnz + N), 0))
    assert resident(store, cuda) == "near"
    assert made == [cuda]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 8 * (x.nnz + N) - 1, 0))
    assert resident(store, cuda) is store
    assert resident(store, torch.device("cpu")) is store
    masked = MaskedStore(store.cells, np.ones(6, bool), np.zeros(6))
    assert resident(masked, cuda) is masked


def test_the_schedule_as_one():
    schedule = Schedule(20, 0.5, 0.3)
    assert schedule.at(7) == {"kl_weight": schedule.kl(7), "late": schedule.late(7), "lr": schedule.lr(7)}


def test_rows_split_as_their_matrix():
    x = torch.poisson(torch.full((9, 5), 0.4))
    x[0], x[8] = 0, 0
    for part, wanted in zip(SparseRows.of(x).split([1, 4, 0, 3, 1]), x.split([1, 4, 0, 3, 1]), strict=True):
        assert torch.equal(part.dense(), wanted)
