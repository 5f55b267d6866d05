"""Trainings that end early: Ctrl-C, and going on from a checkpoint with the same bits."""

from __future__ import annotations

import logging
import signal
import time

import numpy as np
import pytest
import torch
from _training import (
    TRAIN,
    G,
    N,
    Raise,
    Scramble,
    a_store,
    a_vae,
    an_ae,
    same,
    same_history,
    state,
    train,
)
from lightning import Callback
from scipy.sparse import csr_matrix

from sccvae.data import Cells, CellStore
from sccvae.distributions import Bernoulli
from sccvae.module import AE, VAE
from sccvae.train import checkpoint
from sccvae.train.checkpoint import FILE_NAME

# Ctrl-C


class Slow(Callback):
    """An epoch that takes longer than there is time."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if len(pl_module.rows) + 1 == self.epoch:
            time.sleep(1.1)


class InterruptedLoss:
    """A module's loss that is hit by Ctrl-C at a step of training."""

    def __init__(self, module, step):
        self.inner, self.module, self.left = module.loss, module, step

    def __call__(self, batch, **weights):
        if self.module.training:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.inner(batch, **weights)


def test_interruption_inside_training_ends_gracefully(caplog):
    ae = an_ae()
    ae.loss = InterruptedLoss(ae, step=10)  # four steps an epoch
    with caplog.at_level(logging.WARNING, logger="sccvae"):
        result = train(ae)
    assert result.interrupted
    assert "interrupted in epoch 3" in caplog.text
    assert len(result.history["loss_train"]) == 2
    assert not ae.training
    assert all(torch.isfinite(v).all() for v in ae.state_dict().values())
    assert train(an_ae()).interrupted is False  # the next training is as ever


@pytest.mark.parametrize(
    "hook", ["on_train_epoch_end", "on_validation_batch_end", "on_train_batch_end", "on_fit_start"]
)
def test_interruption_anywhere_else_ends_gracefully_too(hook):
    """Lightning would call sys.exit: a session or a script would be lost."""
    ae = an_ae()
    result = train(ae, callbacks=[Raise(KeyboardInterrupt(), hook, after=1 if hook == "on_fit_start" else 2)])
    assert result.interrupted
    assert not ae.training
    assert len(result.history.get("loss_train", [])) <= 2


def test_a_real_ctrl_c():
    class Press(Callback):
        def on_train_batch_end(self, *args):
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores Ctrl-C
    try:
        assert train(an_ae(), callbacks=[Press()]).interrupted
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_exit_that_is_no_ctrl_c_goes_through():
    with pytest.raises(SystemExit):
        train(an_ae(), callbacks=[Raise(SystemExit(3))])


# Resuming


STOPS = {
    "error": lambda: {"callbacks": [Raise(RuntimeError("power cut"))]},
    "error in validation": lambda: {"callbacks": [Raise(RuntimeError("power cut"), "on_validation_epoch_end", 3)]},
    "error inside an epoch": lambda: {"callbacks": [Raise(RuntimeError("power cut"), "on_train_batch_end", 3)]},
    "ctrl-c": lambda: {"callbacks": [Raise(KeyboardInterrupt())]},
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_resumed_training_equals_an_uninterrupted_one(stop, tmp_path):
    options = {"max_epochs": 6, "weight_decay": 0.1}
    whole = a_vae(dropout=0.1)
    wanted = train(whole, **options)
    first = a_vae(dropout=0.1)
    try:
        assert train(first, checkpoint_dir=tmp_path, **options, **STOPS[stop]()).interrupted
    except RuntimeError as error:
        assert str(error) == "power cut"  # noqa: PT017
    assert [f.name for f in tmp_path.iterdir()] == [FILE_NAME]
    torch.manual_seed(1234)  # neither the global state nor the initial weights matter
    second = VAE(G, n_latent=2, n_hidden=4, dropout=0.1)
    result = train(second, checkpoint_dir=tmp_path, **options)
    assert same(state(second), state(whole))
    assert same_history(result.history, wanted.history)


def test_a_resumed_training_on_many_genes(tmp_path):
    """As many as real cells have, stored as CSR: the encoder's first layer takes its fast path."""
    rng, n_genes = np.random.default_rng(0), 300
    x = (rng.poisson(3, (N, n_genes)) * (rng.random((N, n_genes)) < 0.1)).astype(np.float32)
    empty = np.zeros((N, 0), np.float32)
    store = CellStore(Cells(csr_matrix(x), empty.astype(np.int64), empty, x.sum(1, keepdims=True) + 1))

    def module():
        torch.manual_seed(7)
        return VAE(n_genes, n_latent=2, n_hidden=4)

    whole, second = module(), module()
    train(whole, store=store)
    assert train(module(), store=store, checkpoint_dir=tmp_path, callbacks=[Raise(KeyboardInterrupt())]).interrupted
    train(second, store=store, checkpoint_dir=tmp_path)
    assert same(state(second), state(whole))


def test_resuming_after_ctrl_c_in_the_middle_of_an_epoch(tmp_path):
    whole = a_vae()
    wanted = train(whole)
    first = a_vae()
    first.loss = InterruptedLoss(first, step=10)
    assert train(first, checkpoint_dir=tmp_path).interrupted
    second = a_vae()
    result = train(second, checkpoint_dir=tmp_path)
    assert same(state(second), state(whole))
    assert same_history(result.history, wanted.history)


def test_a_training_stopped_twice(tmp_path):
    options = {"max_epochs": 6, "store": a_store(unit=True)}

    def model():
        return a_vae(likelihood=Bernoulli(resample=True))

    whole = model()
    wanted = train(whole, **options)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            train(model(), checkpoint_dir=tmp_path, callbacks=[Raise(RuntimeError())], **options)
    last = model()
    result = train(last, checkpoint_dir=tmp_path, **options)
    assert same_history(result.history, wanted.history)
    assert same(state(last), state(whole))


def test_resuming_keeps_the_best_weights_and_the_patience(tmp_path):
    """The best epoch comes before the stop, and the epochs waited since are not forgotten."""
    options = {"max_epochs": 30, "patience": 4, "kl_warmup": 0.0, "lr": 0.03}
    whole = an_ae()
    wanted = train(whole, callbacks=[Scramble(2)], **options)
    assert wanted.history["elbo_validation"]["elbo_validation"].idxmin() == 1
    assert len(wanted.history["lr"]) == 6
    first = an_ae()
    with pytest.raises(RuntimeError):
        train(first, checkpoint_dir=tmp_path, callbacks=[Scramble(2), Raise(RuntimeError(), after=5)], **options)
    second = an_ae()
    result = train(second, checkpoint_dir=tmp_path, callbacks=[Scramble(2)], **options)
    assert same_history(result.history, wanted.history)
    assert same(state(second), state(whole))


def test_a_finished_training_is_read_and_not_repeated(tmp_path):
    options = {"max_epochs": 8, "callbacks": [Scramble(3)], "checkpoint_dir": tmp_path}
    first = an_ae()
    wanted = train(first, **options)
    again = an_ae()
    result = train(again, **(options | {"callbacks": [Raise(AssertionError("trained again"), "on_train_start", 1)]}))
    assert same_history(result.history, wanted.history)
    assert same(state(again), state(first))  # the best weights, not the last
    assert not again.training


def test_an_early_stopped_training_is_finished(tmp_path):
    options = {"max_epochs": 50, "patience": 1, "kl_warmup": 0.0, "checkpoint_dir": tmp_path}
    first = an_ae()
    wanted = train(first, callbacks=[Scramble(2)], **options)
    assert len(wanted.history["lr"]) < 50
    again = an_ae()
    result = train(again, **options)
    assert same_history(result.history, wanted.history)
    assert same(state(again), state(first))


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"max_epochs": 9}, {"batch_size": 5}, {"seed": 1}, {"kl_weight": 2.0}])
def test_resuming_with_other_settings_is_refused(change, tmp_path):
    train(an_ae(), checkpoint_dir=tmp_path)
    name = next(iter(change))
    ae = an_ae()
    before = state(ae)
    with pytest.raises(
        ValueError, match=rf"training with other settings .*'{name}'.*same settings.*another checkpoint_dir"
    ):
        train(ae, checkpoint_dir=tmp_path, **change)
    assert same(state(ae), before)


def test_resuming_with_another_number_of_cells_is_refused(tmp_path):
    train(an_ae(), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"other settings .*'n_train': \(30, 29\)"):
        train(an_ae(), TRAIN[:29], checkpoint_dir=tmp_path)


@pytest.mark.parametrize("name", ["library", "codes", "covariates"])
def test_resuming_with_other_cells_is_refused(name, tmp_path):
    """As many cells of the same genes: their library sizes and conditions tell them apart."""
    first, other = a_store(), a_store()
    for store in (first, other):
        store.cells.codes, store.cells.covariates = np.zeros((N, 1), np.int64), np.zeros((N, 1), np.float32)
    train(an_ae(), store=first, checkpoint_dir=tmp_path)
    getattr(other.cells, name)[3] += 1
    with pytest.raises(
        ValueError, match="other settings .*" + ("library sizes" if name == "library" else "conditions")
    ):
        train(an_ae(), store=other, checkpoint_dir=tmp_path)
    train(an_ae(), store=first, checkpoint_dir=tmp_path)


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path, monkeypatch):
    """It does not say of which cells it is."""
    with monkeypatch.context() as earlier:
        earlier.setattr(checkpoint, "FORMAT", 2)
        train(an_ae(), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"has training format 2; this sccvae reads format 3\. Delete it, or choose"):
        train(an_ae(), checkpoint_dir=tmp_path)


@pytest.mark.parametrize("other", [lambda: AE(G, n_latent=3, n_hidden=4), lambda: a_vae()])
def test_resuming_another_model_is_refused(other, tmp_path):
    train(an_ae(), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"training\.safetensors holds a training with other settings .*n_weights"):
        train(other(), checkpoint_dir=tmp_path)


def test_settings_of_the_model_are_compared(tmp_path):
    settings = {"alignment": None, "likelihood": {"name": "nb"}, "n_hidden": 4, "seed": 0}
    train(an_ae(), checkpoint_dir=tmp_path, settings=settings)
    train(an_ae(), checkpoint_dir=tmp_path, settings=dict(settings))
    with pytest.raises(ValueError, match=r"other settings .*model's alignment.*another checkpoint_dir"):
        train(an_ae(), checkpoint_dir=tmp_path, settings=settings | {"alignment": 0.0})


def test_a_training_that_ran_out_of_time_goes_on(tmp_path):
    first = train(an_ae(), checkpoint_dir=tmp_path, callbacks=[Slow(2)], max_time={"seconds": 1})
    assert first.interrupted
    assert len(first.history["elbo_train"]) == 2
    rest = train(again := an_ae(), checkpoint_dir=tmp_path)
    whole = train(once := an_ae())
    assert same(state(again), state(once))
    assert same_history(rest.history, whole.history)
    assert rest.kept == whole.kept


def test_a_training_that_a_callback_stopped_has_ended(tmp_path):
    class Enough(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = len(pl_module.rows) == 2

    first = train(once := an_ae(), checkpoint_dir=tmp_path, callbacks=[Enough()])
    second = train(again := an_ae(), checkpoint_dir=tmp_path, callbacks=[Enough()])
    assert not first.interrupted
    assert same(state(again), state(once))
    assert same_history(first.history, second.history)


def test_no_time_at_all():
    with pytest.raises(ValueError, match=r"max_time=.* was over before the first epoch"):
        train(an_ae(), max_time={"seconds": 0})


def test_settings_may_be_numbers_of_numpy(tmp_path):
    numbers = {"max_epochs": np.int64(4), "batch_size": np.int64(8), "lr": np.float32(0.001), "seed": np.int64(3)}
    train(an_ae(), checkpoint_dir=tmp_path, settings={"keys": np.array(["a"])}, **numbers)
    train(an_ae(), checkpoint_dir=tmp_path, settings={"keys": ["a"]}, **numbers)


@pytest.mark.parametrize("content", [b"", b"\x80\x04not a tensor file", b"cos\nsystem\n(S'touch pwned'\ntR."])
def test_a_damaged_checkpoint_is_refused(content, tmp_path):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=r"training\.safetensors is damaged.*another checkpoint_dir"):
        train(an_ae(), checkpoint_dir=tmp_path)


def test_the_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from sccvae.train import checkpoint

    with pytest.raises(RuntimeError):
        train(an_ae(), checkpoint_dir=tmp_path, callbacks=[Raise(RuntimeError())])
    before = (tmp_path / FILE_NAME).read_bytes()

    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        train(an_ae(), checkpoint_dir=tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before
