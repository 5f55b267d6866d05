"""What only a GPU can show: steps of each model can be recorded, and do the same; log masses there."""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from _models import CASES, FAST, TINY, toy_for
from _toys import toy_counts
from _training import Raise
from lightning import Callback

from sccvae import _rows
from sccvae._recording import _room_for
from sccvae._rows import SparseRows
from sccvae.distributions import NegativeBinomial, Poisson, kernels
from sccvae.distributions.masses import log_nb, log_zinb
from sccvae.model import CVAE, GMVAE, VAE
from sccvae.module import Batch
from sccvae.nn.conditions import thin_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
fit = importlib.import_module("sccvae.train.fit")

GMVAES = {
    "gmvae": {"n_components": 3},
    "gmvae-labels": {"n_components": 3},
    "gmvae-learned": {"n_components": 3, "w_prior": "learned", "alpha": 2.0},
    "gmvae-mask": {"n_components": 3, "masking": 0.3, "classifier": "z", "prior": "uniform"},
}


@pytest.fixture
def recorders(monkeypatch):
    """Every recorder of a test, with the recordings it made."""
    made, real = [], fit.Recorder

    def recorder(device):
        made.append(real(device))
        return made[-1]

    monkeypatch.setattr(fit, "Recorder", recorder)
    return made


def a_model(name):
    adata = toy_counts(96)
    if name in GMVAES:
        setup = {"batch_key": "batch"} | ({"labels_key": "donor"} if name == "gmvae-labels" else {})
        cls, options = GMVAE, GMVAES[name]
    else:
        cls, likelihood, options = CASES[name]
        adata = toy_for(likelihood)
        setup = {"batch_key": "batch"}
    cls.setup_anndata(adata, **setup)
    return cls(adata, **TINY | options)


@pytest.mark.parametrize("name", [*CASES, *GMVAES])
def test_each_model_is_recorded_and_trains_as_step_by_step(name, recorders, caplog):
    caplog.set_level(logging.INFO, logger="sccvae")
    histories, options = [], FAST | {"accelerator": "gpu", "max_epochs": 6, "early_stopping": False}
    for graphs in (True, False):
        model = a_model(name)
        model.train(**options, cuda_graphs=graphs)
        histories.append(model.history)
        assert np.isfinite(model.get_latent_representation()).all()
    assert recorders
    assert not [r.getMessage() for r in caplog.records if "not recorded" in r.getMessage()]
    assert any(part.play is not None for recorder in recorders for part in recorder._recordings.values())
    for term in ("loss_train", "elbo_train", "elbo_validation"):
        recorded, plain = (h[term][term].to_numpy() for h in histories)
        np.testing.assert_allclose(recorded[:2], plain[:2], rtol=0.05, err_msg=term)  # other noise
        assert np.isfinite(recorded).all()


@pytest.mark.parametrize("name", ["cvae-nb", "vae-zinb", "gmvae"])
def test_same_seed_same_bits(name):
    found = []
    for _ in range(2):
        model = a_model(name)
        model.train(**FAST | {"accelerator": "gpu", "max_epochs": 6})
        found.append({k: v.cpu() for k, v in model.module.state_dict().items()})
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


@pytest.mark.parametrize("by", ["triton", "torch"])
@pytest.mark.parametrize("inflated", [False, True])
def test_log_masses_on_the_gpu(inflated, by, monkeypatch):
    if by == "torch":
        for file in (kernels, _rows):
            monkeypatch.setattr(file, "has_triton", lambda device: False)
    torch.manual_seed(0)
    x = torch.poisson(torch.full((50, 300), 0.3)) * torch.logspace(0, 4, 300).round()
    inputs = [3 * torch.randn(50, 300), 5 * torch.randn(1, 300)] + [torch.randn(50, 300)] * inflated
    depth = torch.logspace(2, 5, 50)[:, None]
    slow = [t.double().requires_grad_() for t in inputs]
    log_mu = slow[0].log_softmax(-1) + depth.double().log()
    wanted = (log_zinb if inflated else log_nb)(x.double(), log_mu, slow[1].expand_as(log_mu), *slow[2:]).sum(-1)
    wanted.sum().backward()
    fast = [t.cuda().requires_grad_() for t in inputs]
    rows = SparseRows.of(x).to("cuda")
    got = (kernels.zinb_sum if inflated else kernels.nb_sum)(rows, *fast, log_depth=depth.cuda().log())
    got.sum().backward()
    torch.testing.assert_close(got.double().cpu(), wanted, rtol=1e-5, atol=1e-4)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.grad.double().cpu(), b.grad, rtol=1e-4, atol=1e-3)
    for family in (Poisson(), NegativeBinomial()):  # dense counts
        torch.manual_seed(0)
        built, h = family.build(4, 300), torch.randn(50, 4)
        wanted = built(h, depth).log_prob(x)
        got = built.cuda()(h.cuda(), depth.cuda()).log_prob(x.cuda())
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-3)


def test_rows_on_the_gpu():
    """What is done to the values, the product and its gradients; with room for more values."""
    torch.manual_seed(0)
    x = torch.poisson(torch.full((50, 300), 0.2))
    rows = _room_for(SparseRows.of(x).to("cuda"))
    assert torch.equal(rows.dense().cpu(), x)
    depth = torch.rand(50, 1) + 1
    assert torch.equal(rows.map(lambda v, d: v / d, depth.cuda()).dense().cpu(), x / depth)
    kept = rows.drop(77).dense().cpu()
    torch.testing.assert_close(kept[kept != 0], x[kept != 0] * (256 / 179))
    assert abs((kept != 0).sum() / (x != 0).sum() - 179 / 256) < 0.03
    slow = [t.double().requires_grad_() for t in (torch.randn(300, 8), torch.randn(8))]
    fast = [t.detach().float().cuda().requires_grad_() for t in slow]
    wanted, got = torch.addmm(slow[1], x.double(), slow[0]), rows.linear(*fast)
    wanted.square().sum().backward(), got.square().sum().backward()
    for a, b in zip([got, *(t.grad for t in fast)], [wanted, *(t.grad for t in slow)], strict=True):
        torch.testing.assert_close(a.detach().double().cpu(), b.detach(), rtol=1e-4, atol=1e-3)
    every = Batch.of(x.cuda()).every(2)
    assert torch.equal(replace(Batch.of(x.cuda()), x=rows).every(2).x, every.x)


class Hold(Callback):
    """Holds on to weights and what was computed of them, as somebody may who looks at them."""

    def __init__(self):
        self.held = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.held += [p.clone() for p in pl_module.parameters()]


def test_what_others_hold_does_not_disturb_a_recording(recorders):
    model = a_model("gmvae")
    model.train(**FAST | {"accelerator": "gpu", "max_epochs": 6}, callbacks=[Hold()])
    held = [p * 2 for p in model.module.parameters()]
    model.train(**FAST | {"accelerator": "gpu", "max_epochs": 6}, callbacks=[Hold()])
    assert all(p.is_cuda for p in held)
    assert any(part.play is not None for recorder in recorders for part in recorder._recordings.values())


def test_a_callback_inside_a_step_is_called_at_each(recorders, caplog):
    caplog.set_level(logging.INFO, logger="sccvae")

    class Look(Callback):
        norms = ()

        def on_after_backward(self, trainer, pl_module):
            norm = next(p.grad for p in pl_module.parameters() if p.grad is not None).norm()
            self.norms = (*self.norms, float(norm))

    look = Look()
    model = a_model("vae-nb")
    model.train(**FAST | {"accelerator": "gpu", "max_epochs": 6}, callbacks=[look])
    assert len(look.norms) == model.trainer.global_step
    assert np.isfinite(look.norms).all()
    assert "Steps are taken one by one, as callbacks are called inside them: Look." in caplog.text
    assert not recorders


def test_a_loss_that_waits_for_the_gpu_is_not_recorded(recorders, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="sccvae")
    model = a_model("vae-nb")
    loss = model.module.loss

    def waits(*given, **more):
        objective, report = loss(*given, **more)
        assert objective.item() < 1e9
        return objective, report

    monkeypatch.setattr(model.module, "loss", waits)
    model.train(**FAST | {"accelerator": "gpu", "max_epochs": 6})
    assert "Steps are not recorded, as one waits for the GPU" in caplog.text
    assert all(part.play is None for recorder in recorders for part in recorder._recordings.values())
    assert np.isfinite(model.history["elbo_validation"]["elbo_validation"]).all()


def test_a_stopped_training_goes_on(tmp_path):
    options = FAST | {"accelerator": "gpu", "max_epochs": 8, "early_stopping": False, "checkpoint_dir": tmp_path}
    model = a_model("cvae-nb")
    with pytest.raises(KeyError, match="stop here"):
        model.train(**options, callbacks=[Raise(KeyError("stop here"), after=4)])
    again = a_model("cvae-nb")
    again.train(**options)
    assert len(again.history["elbo_train"]) == 8
    assert np.isfinite(again.history["elbo_train"]["elbo_train"]).all()


def test_a_gpu_without_room_for_the_cells_trains_from_memory(recorders, monkeypatch):
    monkeypatch.setattr("sccvae.data.residence.SHARE", 0.0)
    model = a_model("vae-nb")
    model.train(**FAST | {"accelerator": "gpu"})
    assert not recorders
    assert np.isfinite(model.history["elbo_validation"]["elbo_validation"]).all()


def test_memory_is_given_back():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = a_model("cvae-nb")
    model.train(**FAST | {"accelerator": "gpu", "max_epochs": 6})
    weights = sum(t.numel() * t.element_size() for t in model.module.state_dict().values())
    assert torch.cuda.memory_allocated() - before < 10 * weights + 2**20


def test_mapping_and_bfloat16(recorders):
    reference = a_model("cvae-nb")
    reference.train(**FAST | {"accelerator": "gpu", "max_epochs": 6})
    query = toy_counts(40, seed=1)
    query.obs["batch"] = "new"
    mapped = reference.load_query(query)
    mapped.train(**FAST | {"accelerator": "gpu", "max_epochs": 6})
    assert np.isfinite(mapped.get_latent_representation(query)).all()
    model = a_model("vae-nb")
    model.train(**FAST | {"accelerator": "gpu", "max_epochs": 6}, precision="bf16-mixed")
    assert len(recorders) == 3
    assert {type(model) for model in (reference, mapped)} == {CVAE}
    assert isinstance(model, VAE)


@pytest.mark.parametrize(("m", "k"), [(10, 128), (128, 10), (3, 3)])
def test_thin_products(m, k):
    """Over draws and cells; as on the CPU, in float32 and under autocast."""
    torch.manual_seed(0)
    inputs = [torch.randn(*s) for s in ((2, 50, m), (m, k), (k,))]
    there, here = ([t.to(device).detach().requires_grad_() for t in inputs] for device in ("cuda", "cpu"))
    for given in (there, here):
        thin_linear(*given).square().sum().backward()
    for a, b in zip(there, here, strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-4, atol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        assert thin_linear(*there).dtype == torch.bfloat16


def test_what_is_seeded_leaves_the_random_state_of_the_gpu():
    before = torch.cuda.get_rng_state()
    with fit.seeded(3):
        torch.randn(2, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)
