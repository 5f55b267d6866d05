"""IDEC: soft assignment, target and loss against numpy; the training; the model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from _models import FAST, TINY
from _toys import toy_values
from _training import TRAIN, VALIDATION, Raise, a_store, same, same_history, state
from _training import G as STORE_G
from lightning import Callback
from sklearn.cluster import KMeans

from sccvae.datasets import blobs
from sccvae.metrics import hungarian_accuracy, majority_accuracy
from sccvae.model import AE, IDEC, load
from sccvae.module import IDEC as Plate
from sccvae.module import Batch
from sccvae.train import TargetDistribution, fit_deep_clustering
from sccvae.train.guide import Communities, Guide

N, G, K = 30, 6, 4
FEW = {"max_epochs": 3, "batch_size": 8, "accelerator": "cpu", "progress_bar": False}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def a_plate(n_features=G, n_components=K, **options):
    return Plate(n_features, n_components, **({"n_latent": 2, "n_hidden": 5} | options))


def a_batch():
    return Batch.of(torch.rand(N, G))


def numpy_q(z, centers):
    kernel = 1 / (1 + ((z[:, None] - centers[None]) ** 2).sum(-1))
    return kernel / kernel.sum(1, keepdims=True)


def numpy_target(q, f):
    p = q**2 / f
    return p / p.sum(1, keepdims=True)


# The module


def test_soft_assignment_and_target():
    plate = a_plate().double().eval()
    z = 3 * torch.randn(N, 2, dtype=torch.float64)
    q = numpy_q(z.numpy(), plate.centers.detach().numpy())
    log_q = plate.log_q_y(z)
    np.testing.assert_allclose(log_q.exp().detach(), q, rtol=1e-10)
    plate.frequencies = torch.from_numpy(q.sum(0))
    target = plate.log_target(log_q).exp()
    np.testing.assert_allclose(target, numpy_target(q, q.sum(0)), rtol=1e-10)
    assert not target.requires_grad
    batch = Batch.of(torch.rand(N, G, dtype=torch.float64))
    z = plate.inference(batch)["z"].detach().numpy()
    np.testing.assert_allclose(plate.classify(batch).detach(), numpy_q(z, plate.centers.detach().numpy()), rtol=1e-10)


def test_soft_assignment_far_away_and_on_a_center():
    plate = a_plate()
    z = torch.cat([plate.centers.detach(), torch.full((1, 2), 1e15)]).requires_grad_()
    log_q = plate.log_q_y(z)
    assert log_q[:K].argmax(1).tolist() == list(range(K))
    assert torch.isfinite(log_q).all()
    log_q.sum().backward()
    assert torch.isfinite(z.grad).all()


def test_loss_and_its_gradient():
    """The gradient by the centres is that of the paper, equation 8 (of DEC: equation 5)."""
    plate = a_plate(gamma=0.3, norm=None).double()
    batch = Batch.of(torch.rand(N, G, dtype=torch.float64))
    z, centers = (v.detach().numpy() for v in (plate.inference(batch)["z"], plate.centers))
    q = numpy_q(z, centers)
    plate.frequencies = torch.from_numpy(2.0 * q.sum(0) + 1)  # of more cells than these
    p = numpy_target(q, 2.0 * q.sum(0) + 1)
    penalty = plate.penalties(batch, 1.0)["clustering"]
    assert penalty.item() == pytest.approx(0.3 * G * (p * np.log(p / q)).sum(1).mean(), rel=1e-10)
    penalty.backward()
    shift = z[:, None] - centers[None]
    pull = ((p - q) / (1 + (shift**2).sum(-1)))[..., None] * shift
    np.testing.assert_allclose(plate.centers.grad, -2 * 0.3 * G * pull.sum(0) / N, rtol=1e-8, atol=1e-12)
    objective, report = plate.loss(batch)
    error = (batch.x - plate.generative(plate.inference(batch), batch).mean).square().sum(1).mean()
    torch.testing.assert_close(objective, error + penalty)
    assert set(report) == {"reconstruction", "clustering", "elbo", "loss"}


def test_error_and_clustering_are_of_the_same_z():
    """One pass of the encoder: with dropout a second would be another z, and batch norm would see each cell twice."""
    plate, passes = a_plate(dropout=0.5), []
    plate.encoder.register_forward_hook(lambda *seen: passes.append(seen[-1]))
    plate.train()
    plate.loss(a_batch())[0].backward()
    assert len(passes) == 1
    plate = a_plate(norm=None).train()
    plate.elbo_terms(a_batch())
    copy.deepcopy(plate)  # a training that ended there can be copied
    other = Batch.of(torch.rand(N, G))
    assert plate.penalties(other, 1.0) == plate.penalties(other, 1.0)  # not of the z that was noted


def test_noise_and_clustering_belong_to_their_stages():
    plate = a_plate(noise="gaussian", noise_level=1.0, norm=None)
    batch = a_batch()
    assert torch.equal(*(plate.inference(batch)["z"] for _ in range(2)))
    assert plate.penalties(batch, 1.0)
    plate.stage = "pretraining"
    assert not torch.equal(*(plate.inference(batch)["z"] for _ in range(2)))
    assert not plate.penalties(batch, 1.0)
    plate.eval()
    assert torch.equal(*(plate.inference(batch)["z"] for _ in range(2)))


def test_module_refuses_bad_settings():
    with pytest.raises(ValueError, match=r"gamma=-1 must not be negative"):
        a_plate(gamma=-1)
    with pytest.raises(ValueError, match="n_components=0 must be at least 1"):
        a_plate(n_components=0)
    with pytest.raises(ValueError, match="n_latent=0 must be at least 1"):
        a_plate(n_latent=0)
    with pytest.raises(ValueError, match="noise='salt'"):
        a_plate(noise="salt")
    with pytest.raises(ValueError, match=r"loc \(3, 2\): \(4, 2\) needed"):
        a_plate().place(torch.zeros(3, 2))


# The training


def fit_few(plate, train_rows=TRAIN, **options):
    return fit_deep_clustering(plate, a_store(), train_rows, VALIDATION, **(FEW | options))


class Spy(Callback):
    """Notes the state at the start of the clustering."""

    def on_train_start(self, trainer, pl_module):
        if pl_module.module.stage == "clustering":
            self.state = state(pl_module.module)


def test_centers_start_at_k_means():
    plate, spy = a_plate(STORE_G), Spy()
    result = fit_few(plate, callbacks=[spy], seed=5, init="kmeans")
    assert result.history["phase"]["phase"].tolist()[:4] == [0, 0, 0, 1]
    start = a_plate(STORE_G)
    start.load_state_dict(spy.state)
    x = torch.from_numpy(a_store().cells.x[TRAIN])
    z = start.eval().inference(Batch.of(x))["z"].detach().numpy()
    wanted = KMeans(K, n_init=20, random_state=5).fit(z)
    found = start.centers.detach().numpy()
    distance = ((found[:, None] - wanted.cluster_centers_[None]) ** 2).sum(-1)
    assert sorted(distance.argmin(1)) == list(range(K))
    assert distance.min(1).max() < 1e-6
    sizes = np.bincount(wanted.labels_)[distance.argmin(1)]
    assert (np.diff(sizes) <= 0).all()


@pytest.mark.parametrize("found", [K, K - 1])
def test_centers_start_at_leiden_communities(found, monkeypatch):
    """At their means; by k-means if there are fewer."""
    plate, spy, seen, of = a_plate(STORE_G), Spy(), {}, Communities.of

    def communities(views, seed):
        seen["z"], seen["labels"] = views[0], np.arange(len(views[0])) % found
        assert len(views) == 2
        return of(views, seed)

    monkeypatch.setattr(Communities, "of", communities)
    monkeypatch.setattr(Communities, "even", lambda self, n: Guide(seen["labels"], found) if found == n else None)
    fit_few(plate, callbacks=[spy], seed=5)
    labels = seen["labels"] if found == K else KMeans(K, n_init=20, random_state=5).fit_predict(seen["z"])
    means = np.stack([seen["z"][labels == k].mean(0) for k in range(K)])
    start = spy.state["centers"].numpy()
    np.testing.assert_allclose(np.sort(start, axis=0), np.sort(means, axis=0), atol=1e-5)


def test_an_unknown_init_is_named():
    with pytest.raises(ValueError, match="init='random' is not known; choose 'leiden' or 'kmeans'"):
        fit_few(a_plate(STORE_G), init="random")


def test_frequencies_are_those_of_all_training_cells():
    plate = a_plate(STORE_G)
    fit_few(plate)
    x = torch.from_numpy(a_store().cells.x[TRAIN])
    torch.testing.assert_close(plate.frequencies, plate.classify(Batch.of(x)).detach().sum(0))
    assert "frequencies" in plate.state_dict()
    assert not plate.training


@pytest.mark.parametrize(("tolerance", "epochs"), [(0.0, 5), (1.1, 1)])
def test_clustering_ends_when_labels_are_stable(tolerance, epochs, monkeypatch):
    made = []

    def make(*args):
        made.append(TargetDistribution(*args))
        return made[-1]

    monkeypatch.setattr("sccvae.train.deep_clustering.TargetDistribution", make)
    monkeypatch.setattr("sccvae.train.deep_clustering.TOLERANCE", tolerance)
    plate = a_plate(STORE_G)
    result = fit_few(plate, max_epochs=10, early_stopping=False)
    assert result.history["phase"]["phase"].tolist() == [0.0] * 10 + [1.0] * epochs
    assert len(made[0].changed) == epochs
    x = torch.from_numpy(a_store().cells.x[TRAIN])
    np.testing.assert_array_equal(made[0].labels, plate.classify(Batch.of(x)).argmax(1))


@pytest.mark.parametrize(("hook", "after", "epochs"), [("on_train_start", 1, 0), ("on_train_epoch_start", 3, 2)])
def test_interrupted_pretraining_leaves_the_centers(hook, after, epochs):
    plate = a_plate(STORE_G)
    before = plate.centers.detach().clone()
    result = fit_few(plate, callbacks=[Raise(KeyboardInterrupt(), hook, after)])
    assert result.interrupted
    assert len(result.history["phase"]) == epochs
    assert torch.equal(plate.centers, before)
    assert plate.stage == "clustering"


@pytest.mark.parametrize(("after", "choose"), [(2, False), (5, True)])
def test_resumed_training_gives_the_same_bits(after, choose, tmp_path):
    options = {"choose_components": choose, "max_epochs": 4, "early_stopping": False}
    torch.manual_seed(1)
    whole = a_plate(STORE_G, 1 if choose else K)
    history = fit_few(whole, **options).history
    torch.manual_seed(1)
    broken = a_plate(STORE_G, 1 if choose else K)
    fresh = state(broken)
    cut = Raise(RuntimeError("power cut"), "on_train_epoch_start", after)
    with pytest.raises(RuntimeError, match="power cut"):
        fit_few(broken, callbacks=[cut], checkpoint_dir=tmp_path, **options)
    again = a_plate(STORE_G, 1 if choose else K)
    again.load_state_dict(fresh)
    resumed = fit_few(again, checkpoint_dir=tmp_path, **options)
    assert same(state(again), state(whole))
    assert same_history(resumed.history, history)


def test_training_refuses_more_centers_than_cells():
    with pytest.raises(ValueError, match="n_components=40, but there are only 30 training cells"):
        fit_few(a_plate(STORE_G, 40))


# The model


@pytest.fixture(scope="module")
def data():
    return blobs(n_per_group=40)


@pytest.fixture(scope="module", params=[5, None], ids=["k-means", "leiden"])
def trained(request, data):
    IDEC.setup_anndata(data)
    model = IDEC(data, n_components=request.param, n_hidden=32)
    model.train(25, batch_size=32, lr=5e-3, accelerator="cpu", progress_bar=False)
    return request.param, model


def test_blobs_are_found(trained, data):
    wanted, model = trained
    found = model.predict()
    if wanted:
        assert model.n_components == 5
        assert hungarian_accuracy(data.obs["class"], found) > 0.95
    else:  # each class comes under two conditions, which IDEC does not know of
        groups = data.obs["class"].astype(str) + data.obs["condition"].astype(str)
        assert model.n_components == 10
        assert hungarian_accuracy(groups, found) > 0.95
        assert majority_accuracy(data.obs["class"], found) > 0.95
    assert model.settings["n_components"] == model.n_components
    q = model.predict_proba()
    assert q.dtype == np.float32
    np.testing.assert_allclose(q.sum(1), 1, rtol=1e-5)
    assert model.get_entropy().min() >= 0
    assert 0.9 * model.n_components < model.effective_n_components() <= model.n_components


def test_saved_model_predicts_the_same(trained, data, tmp_path):
    _, model = trained
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model", data)
    assert isinstance(loaded, IDEC)
    assert loaded.n_components == model.n_components
    assert np.array_equal(loaded.predict_proba(), model.predict_proba())
    assert loaded.predict().equals(model.predict())
    assert same(state(loaded.module), state(model.module))
    assert loaded.history.keys() == model.history.keys()
    without = IDEC.load(tmp_path / "model")
    assert np.array_equal(without.predict_proba(data), model.predict_proba())
    loaded.train(1, accelerator="cpu", progress_bar=False)  # on from there, with as many clusters
    assert loaded.n_components == model.n_components


def test_untrained_model_and_saving_it(tmp_path):
    IDEC.setup_anndata(adata := toy_values())
    model = IDEC(adata, **TINY)
    assert model.n_components == 1
    model.save(tmp_path / "model")
    assert IDEC.load(tmp_path / "model").settings["n_components"] is None


def test_a_failed_training_leaves_a_model_that_can_be_saved(tmp_path):
    IDEC.setup_anndata(adata := blobs(n_per_group=20))
    model = IDEC(adata, **TINY)
    with pytest.raises(RuntimeError, match="broken"):
        model.train(**FAST, callbacks=[Raise(RuntimeError("broken"), "on_train_epoch_start", 3)])
    assert model.settings["n_components"] == model.n_components > 1
    model.save(tmp_path / "model")
    assert same(state(load(tmp_path / "model", adata).module), state(model.module))


def test_errors():
    adata = toy_values()
    IDEC.setup_anndata(adata)
    with pytest.raises(ValueError, match="n_components=0 must be at least 1"):
        IDEC(adata, n_components=0)
    with pytest.raises(ValueError, match=r"gamma=-0.5 must not be negative"):
        IDEC(adata, gamma=-0.5)
    with pytest.raises(ValueError, match=r"n_components=99, but there are only 43 training cells"):
        IDEC(adata, n_components=99, **TINY).train(**FAST)
    with pytest.raises(ValueError, match="max_epochs=0 must be at least 1"):
        IDEC(adata, n_components=2, **TINY).train(**(FAST | {"max_epochs": 0}))
    model = IDEC(adata, n_components=2, **TINY)
    model.train(**FAST)
    with pytest.raises(ValueError, match="deterministic encoder"):
        model.get_latent_representation(return_dist=True)
    with pytest.raises(ValueError, match="does not decode from the batch"):
        model.get_normalized_expression(transform_batch="a")


def test_pretraining_is_that_of_the_autoencoder():
    """The first epochs are bit for bit those of the AE with the same options."""
    adata = toy_values()
    options = TINY | {"noise": "mask", "noise_level": 0.2}
    errors = {}
    for cls in (AE, IDEC):
        cls.setup_anndata(adata)
        model = cls(adata, **options)
        model.train(**FAST)
        errors[cls] = model.history["reconstruction_train"]["reconstruction_train"].iloc[:2].to_numpy()
    np.testing.assert_array_equal(errors[AE], errors[IDEC])
