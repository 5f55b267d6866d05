"""Training of bare modules: repeatability, schedules, early stopping, interruption, resuming."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import signal

import numpy as np
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from sccvae.data import Cells, CellStore
from sccvae.distributions import Bernoulli
from sccvae.module import AE, VAE, Batch
from sccvae.train import CellsBar, Schedule, default_max_epochs, fit
from sccvae.train.checkpoint import FILE_NAME

N, G = 40, 6
TRAIN, VALIDATION = np.arange(30), np.arange(30, N)


def a_store(n=N, unit=False):
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(1.0, 3.0, size=(n, G))).astype(np.float32)
    x = x / x.max() if unit else x
    empty = np.zeros((n, 0), np.float32)
    return CellStore(Cells(x, empty.astype(np.int64), empty, x.sum(1, keepdims=True) + 1))


def a_vae(**options):
    torch.manual_seed(7)
    return VAE(G, **({"n_latent": 2, "n_hidden": 4} | options))


def an_ae(**options):
    torch.manual_seed(7)
    return AE(G, n_latent=2, n_hidden=4, **options)


def train(module, train_rows=TRAIN, validation_rows=VALIDATION, store=None, **options):
    settings = {"max_epochs": 4, "batch_size": 8, "accelerator": "cpu", "progress_bar": False}
    return fit(module, store or a_store(), train_rows, validation_rows, **(settings | options))


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_history(a, b):
    return a.keys() == b.keys() and all(a[k].equals(b[k]) for k in a)


def square_error(module, rows=VALIDATION):
    with torch.no_grad():
        x = torch.from_numpy(a_store().cells.x[rows])
        return float(module.loss(Batch.of(x))[1]["elbo"])


class Raise(Callback):
    """Raise an error at a hook once it was called ``after`` times."""

    def __init__(self, error, hook="on_train_epoch_end", after=2):
        self.error, self.left = error, after
        setattr(self, hook, self._count)

    def _count(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.error


class Scramble(Callback):
    """Spoil the weights from an epoch on."""

    def __init__(self, first):
        self.first = first

    def on_train_epoch_start(self, trainer, pl_module):
        if len(pl_module.rows) >= self.first:
            with torch.no_grad():
                for p in pl_module.module.parameters():
                    p.add_(torch.randn(p.shape))


# History


def test_history_and_state_after_training():
    vae = a_vae()
    before = state(vae)
    result = train(vae)
    wanted = {"reconstruction", "kl_z", "elbo", "loss"}
    assert set(result.history) == {f"{t}_{p}" for t in wanted for p in ("train", "validation")} | {"kl_weight", "lr"}
    for name, frame in result.history.items():
        assert list(frame.columns) == [name]
        assert frame.index.name == "epoch"
        assert frame.index.tolist() == [0, 1, 2, 3]
        assert np.isfinite(frame[name]).all()
    h = {k: v[k].to_numpy() for k, v in result.history.items()}
    for part in ("train", "validation"):
        np.testing.assert_allclose(h[f"elbo_{part}"], h[f"reconstruction_{part}"] + h[f"kl_z_{part}"], rtol=1e-5)
    np.testing.assert_allclose(h["loss_validation"], h["elbo_validation"], rtol=1e-5)  # target weight 1
    assert not vae.training
    assert not same(state(vae), before)
    assert not result.interrupted


def test_epoch_means_weigh_every_cell_once():
    """Mini-batches of unequal size: the mean is over cells, not over mini-batches."""
    ae = an_ae(norm=None)
    before = {part: square_error(ae, rows) for part, rows in (("train", TRAIN), ("validation", VALIDATION))}
    result = train(ae, lr=0.0, max_epochs=1)
    for part, wanted in before.items():
        assert float(result.history[f"elbo_{part}"].iloc[0, 0]) == pytest.approx(wanted, rel=1e-5)


def test_loss_of_training_is_weighted():
    result = train(a_vae(), kl_weight=0.5, kl_warmup=0.0)
    h = {k: v[k].to_numpy() for k, v in result.history.items()}
    np.testing.assert_allclose(h["loss_train"], h["reconstruction_train"] + 0.5 * h["kl_z_train"], rtol=1e-5)
    np.testing.assert_allclose(h["elbo_train"], h["reconstruction_train"] + h["kl_z_train"], rtol=1e-5)


def test_training_lowers_the_loss():
    result = train(a_vae(), max_epochs=60, lr=0.01)
    elbo = result.history["elbo_train"]["elbo_train"]
    assert elbo.iloc[-1] < elbo.iloc[0] - 0.3


def test_training_without_validation_keeps_the_last_weights():
    ae = an_ae()
    result = train(ae, np.arange(N), np.array([], np.int64))
    assert not any(k.endswith("_validation") for k in result.history)
    assert len(result.history["loss_train"]) == 4


def test_weight_decay_shrinks_weights():
    sizes = []
    for decay in (0.0, 10.0):
        vae = a_vae(norm=None)
        train(vae, max_epochs=20, weight_decay=decay, lr=0.01)
        sizes.append(float(vae.decoder.linears[0].linear.weight.detach().norm()))
    assert sizes[1] < 0.7 * sizes[0]


# Repeatability


def test_same_seed_same_bits_and_global_states_untouched():
    torch.manual_seed(99)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    found = []
    for draws in (0, 5):
        vae = a_vae()
        torch.manual_seed(99)
        torch.rand(draws)
        wanted = torch.random.get_rng_state()
        result = train(vae, seed=3)
        assert torch.equal(torch.random.get_rng_state(), wanted)
        found.append((state(vae), result.history))
    assert same(found[0][0], found[1][0])
    assert same_history(found[0][1], found[1][1])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]
    vae = a_vae()
    train(vae, seed=4)
    assert not same(state(vae), found[0][0])


# Schedules


@pytest.mark.parametrize("total", [1, 2, 3, 7, 50, 6001])
@pytest.mark.parametrize("warmup", [0, 0.01, 0.2, 0.5, 1])
@pytest.mark.parametrize("weight", [1.0, 0.3, 4.0])
def test_kl_weight_reaches_its_target(total, warmup, weight):
    schedule = Schedule(total, weight, warmup)
    values = [schedule.kl(step) for step in range(total)]
    assert values[-1] == weight
    assert values == sorted(values)
    assert values[0] > 0
    assert sum(v < weight for v in values) == max(0, schedule.warmup_steps - 1)
    assert abs(schedule.warmup_steps - warmup * total) <= 0.5


@pytest.mark.parametrize("n", [2, 9, 30])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("warmup", [0.2, 1.0])
def test_trained_kl_weight_reaches_its_target(n, epochs, warmup):
    result = train(a_vae(), np.arange(n), max_epochs=epochs, kl_weight=0.7, kl_warmup=warmup)
    assert result.history["kl_weight"]["kl_weight"].iloc[-1] == 0.7


@pytest.mark.parametrize("total", [1, 2, 7, 100, 6000])
def test_learning_rate_schedule(total):
    factors = [Schedule(total).lr(step) for step in range(total)]
    assert all(0 < f <= 1 for f in factors)
    assert max(factors) == 1
    if total >= 100:
        assert factors[-1] < 0.02
        top = factors.index(1)
        assert factors[: top + 1] == sorted(factors[: top + 1])
        assert factors[top:] == sorted(factors[top:], reverse=True)


def test_schedule_refuses_values_out_of_range():
    for options in ({"total_steps": 0}, {"kl_weight": -1}, {"kl_warmup": -0.1}, {"kl_warmup": 1.1}):
        with pytest.raises(ValueError, match="needs total_steps >= 1, kl_weight >= 0 and kl_warmup between 0 and 1"):
            Schedule(**({"total_steps": 10} | options))


def test_default_epochs_fall_with_the_number_of_steps():
    epochs = [default_max_epochs(steps) for steps in (1, 10, 100, 1000, 100_000)]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[0] > epochs[-1] >= 1


# Early stopping


def test_best_weights_are_restored_not_the_last():
    ae = an_ae()
    result = train(ae, max_epochs=8, lr=0.03, callbacks=[Scramble(3)], early_stopping=False)
    errors = result.history["elbo_validation"]["elbo_validation"]
    assert len(errors) == 8
    assert errors.idxmin() == 2
    assert errors.iloc[-1] > 1.5 * errors.min()
    assert square_error(ae) == pytest.approx(errors.min(), rel=1e-5)


def test_early_stopping_waits_for_its_patience():
    ae = an_ae()
    result = train(ae, max_epochs=100, callbacks=[Scramble(3)], patience=4, kl_warmup=0.0)
    errors = result.history["elbo_validation"]["elbo_validation"]
    assert len(errors) == errors.idxmin() + 1 + 4
    assert square_error(ae) == pytest.approx(errors.min(), rel=1e-5)


def test_patience_does_not_count_during_the_kl_warmup():
    result = train(an_ae(), max_epochs=20, callbacks=[Scramble(2)], patience=1, kl_warmup=0.5)
    assert len(result.history["kl_weight"]) == 11
    assert result.history["kl_weight"]["kl_weight"].iloc[-1] == 1


# Failures


class Explode(Callback):
    """A weight becomes NaN in an epoch, as with too high a learning rate."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if len(pl_module.rows) == self.epoch:
            with torch.no_grad():
                next(iter(pl_module.module.parameters())).fill_(math.nan)


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("validation", [VALIDATION, VALIDATION[:0]], ids=["validated", "unvalidated"])
def test_a_loss_that_is_not_finite_stops_with_good_weights(epoch, validation):
    """In the first epoch, or without validation, there are no best weights: the model must be usable all the same."""
    ae = an_ae()
    with pytest.raises(
        FloatingPointError, match=r"no longer finite at optimiser step .*reconstruction.*lower learning rate"
    ):
        train(ae, validation_rows=validation, callbacks=[Explode(epoch)])
    assert all(torch.isfinite(v).all() for v in ae.state_dict().values())
    assert math.isfinite(square_error(ae))
    assert not ae.training


def test_nan_after_the_best_epoch_leaves_the_best_weights():
    ae, stopped = an_ae(), an_ae()
    with pytest.raises(FloatingPointError):
        train(ae, callbacks=[Explode(2)])
    with pytest.raises(RuntimeError, match="stop"):
        train(stopped, callbacks=[Raise(RuntimeError("stop"))])
    assert same(state(ae), state(stopped))


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"at least 2 cells, there are 1 of 40; raise train_size"):
        train(an_ae(), TRAIN[:1])
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        train(an_ae(), batch_size=0)
    for epochs in (0, -1):
        with pytest.raises(ValueError, match=f"max_epochs={epochs} must be at least 1"):
            train(an_ae(), max_epochs=epochs)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_mini_batches_of_one_cell(batch_size):
    """29 cells in pairs leave one alone: batch norm cannot work on it, the rest can."""
    with pytest.raises(ValueError, match=rf"batch_size={batch_size} .*single cell.*batch_size.*norm='layer'"):
        train(an_ae(), TRAIN[:29], batch_size=batch_size)
    train(an_ae(norm="layer"), TRAIN[:29], batch_size=batch_size, max_epochs=1)
    train(an_ae(), TRAIN, batch_size=2, max_epochs=1)


def test_a_single_validation_cell_works():
    result = train(an_ae(), validation_rows=VALIDATION[:1])
    assert np.isfinite(result.history["loss_validation"]["loss_validation"]).all()


# Ctrl-C


class InterruptedLoss:
    """A module's loss that is hit by Ctrl-C at a step of training."""

    def __init__(self, module, step):
        self.inner, self.module, self.left = module.loss, module, step

    def __call__(self, batch, kl_weight=1.0):
        if self.module.training:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.inner(batch, kl_weight)


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

    before = signal.getsignal(signal.SIGINT)
    assert train(an_ae(), callbacks=[Press()]).interrupted
    assert signal.getsignal(signal.SIGINT) is before


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


@pytest.mark.parametrize("other", [lambda: AE(G, n_latent=3, n_hidden=4), lambda: a_vae()])
def test_resuming_another_model_is_refused(other, tmp_path):
    train(an_ae(), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"training\.safetensors holds a training with other settings .*n_weights"):
        train(other(), checkpoint_dir=tmp_path)


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


# Lightning's own tools


def test_a_logger_sees_every_term(tmp_path):
    import pandas as pd

    result = train(a_vae(), logger=CSVLogger(tmp_path, name="log", version="0"))
    table = pd.read_csv(tmp_path / "log" / "0" / "metrics.csv")
    assert set(result.history) <= set(table.columns)
    for name in ("elbo_train", "elbo_validation", "kl_weight"):
        np.testing.assert_allclose(table[name].dropna(), result.history[name][name], rtol=1e-5)


def test_user_callbacks_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Watch(Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.seen.append(float(trainer.callback_metrics["elbo_validation"]))

    watch = Watch()
    stopping = EarlyStopping("elbo_validation", patience=1, min_delta=1e6)
    result = train(a_vae(), callbacks=[watch, stopping])
    assert len(watch.seen) == len(result.history["lr"]) == 2
    assert watch.seen == pytest.approx(result.history["elbo_validation"]["elbo_validation"].tolist())
    assert not list(tmp_path.iterdir())  # nothing is written that nobody asked for


def test_lightning_checkpoints_are_refused_loudly(tmp_path):
    """They would pickle, and never be written, since Lightning does not count our optimiser steps."""
    with pytest.raises(MisconfigurationException, match="found `ModelCheckpoint`"):
        train(an_ae(), callbacks=[ModelCheckpoint(tmp_path)])


def test_progress_bar_counts_cells(capsys, tmp_path):
    train(a_vae(), progress_bar=True, checkpoint_dir=tmp_path)
    shown = capsys.readouterr().err
    assert "Epoch 4/4" in shown
    assert "120/120" in shown
    assert "cells/s" in shown
    assert "train=" in shown
    assert "validation=" in shown


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_progress_bar_is_closed_on_errors(error, monkeypatch):
    bars = []
    start = CellsBar.on_train_start

    def spy(self, *args):
        start(self, *args)
        bars.append(self.bar)

    monkeypatch.setattr(CellsBar, "on_train_start", spy)
    with contextlib.suppress(RuntimeError):
        train(an_ae(), progress_bar=True, callbacks=[Raise(error())])
    assert bars[0].disable  # tqdm's own mark of a closed bar
