"""Training of bare modules: history, repeatability, schedules, early stopping, failures, Lightning's tools."""

from __future__ import annotations

import contextlib
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _training import (
    TRAIN,
    VALIDATION,
    N,
    Raise,
    Scramble,
    a_store,
    a_vae,
    an_ae,
    same,
    same_history,
    square_error,
    state,
    train,
)
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from sccvae.train import BestWeights, Schedule, default_max_epochs, default_sizes, fit
from sccvae.train.callbacks import CellsBar

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
    result = train(a_vae(), max_epochs=25, lr=0.03)
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
        train(vae, max_epochs=8, weight_decay=decay, lr=0.03)
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


def test_late_penalties_rise_after_the_kl_weight():
    schedule = Schedule(100, kl_weight=0.5, kl_warmup=0.2)
    assert [schedule.late(step) for step in (0, 19, 20, 29, 39, 99)] == [0, 0, 0.05, 0.5, 1, 1]
    assert Schedule(100, kl_warmup=0).late(0) == 1


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


def test_default_sizes_follow_the_number_of_cells():
    sizes = [tuple(default_sizes(n).values()) for n in (1, 999, 1_000, 4_999, 5_000, 10**6)]
    assert sizes == [(64, 20), (64, 20), (128, 10), (128, 10), (256, 10), (256, 10)]


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


def test_patience_counts_epochs_not_validations():
    options = {"max_epochs": 100, "callbacks": [Scramble(6)], "patience": 6, "kl_warmup": 0.0}
    elbo = train(an_ae(), check_val_every_n_epoch=3, **options).history["elbo_validation"]["elbo_validation"]
    assert len(elbo) == elbo.idxmin() + 6 + 1


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


def test_lightning_checkpoints_are_written_where_they_are_asked_for(tmp_path):
    train(an_ae(), callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
    assert (tmp_path / "last.ckpt").is_file()


def test_progress_bar_counts_cells(capsys, tmp_path):
    train(a_vae(), progress_bar=True, checkpoint_dir=tmp_path)
    shown = capsys.readouterr().err
    assert "Epoch 4/4" in shown
    assert "120/120" in shown
    assert "cells/s" in shown
    assert "train=" in shown
    assert "validation=" in shown


def test_scvi_tools_name_of_the_progress_bar(capsys):
    for shown in (False, True):
        rows = {"train_rows": TRAIN, "validation_rows": VALIDATION}
        fit(module=an_ae(), store=a_store(), **rows, max_epochs=1, accelerator="cpu", enable_progress_bar=shown)
        assert ("cells/s" in capsys.readouterr().err) == shown


def test_arguments_that_count_lightnings_batches_are_refused():
    for name in ("limit_val_batches", "max_steps", "fast_dev_run", "val_check_interval", "overfit_batches"):
        with pytest.raises(TypeError, match=f"'{name}': to Lightning one batch is a chunk of many mini-batches here"):
            train(an_ae(), **{name: 1})
    train(an_ae(), max_epochs=1, enable_model_summary=False, min_epochs=1)


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


def test_weights_of_the_warm_up_are_no_candidates():
    module = torch.nn.Linear(1, 1)
    best = BestWeights(warmup_steps=10)
    for n_steps, value, kept in [(5, 1.0, None), (10, 3.0, 3.0), (15, 4.0, 3.0), (20, 2.0, 2.0)]:
        with torch.no_grad():
            module.weight.fill_(value)
        trainer = SimpleNamespace(callback_metrics={"elbo_validation": torch.tensor(value)}, should_stop=False)
        best.on_validation_end(trainer, SimpleNamespace(n_steps=n_steps, module=module, rows=[{}] * n_steps))
        assert (best.weights is None) if kept is None else float(best.weights["weight"]) == kept
    assert (best.best, best.epoch) == (2.0, 20)


@pytest.mark.parametrize(
    "options", [{"early_stopping": False}, {"kl_warmup": 0.9}, {"restore_best": False}, {"lr": 0.3}]
)
def test_the_epoch_that_is_kept(options):
    """The module has the held-out ELBO that the history has there."""
    module = an_ae()
    result = train(module, max_epochs=12, **options)
    elbo = result.history["elbo_validation"].iloc[:, 0]
    assert elbo.iloc[result.kept] == pytest.approx(square_error(module), rel=1e-5)
    if not options.keys() & {"restore_best", "kl_warmup"}:
        assert elbo.iloc[result.kept] == elbo.iloc[2:].min()


def test_epochs_without_a_validation_have_no_values():
    elbo = train(an_ae(), max_epochs=6, check_val_every_n_epoch=2).history["elbo_validation"].iloc[:, 0]
    assert elbo.isna().tolist() == [True, False] * 3


def test_lightnings_checkpoints_and_bar(tmp_path, capsys):
    """Both if they are asked for."""
    callbacks = [ModelCheckpoint(tmp_path, save_last=True), TQDMProgressBar()]
    train(an_ae(), callbacks=callbacks, enable_checkpointing=True)
    assert (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize("name", ["max_epochs", "batch_size"])
@pytest.mark.parametrize("value", [2.0, 2.5, "2", True])
def test_epochs_and_batch_size_are_whole_numbers(name, value):
    with pytest.raises(TypeError, match=f"{name}={value!r} must be a whole number"):
        train(an_ae(), **{name: value})


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_bfloat16_where_it_is_asked_for(likelihood):
    """Products in half the bits, weights and likelihood in all: nearly the same loss."""
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        module = a_vae(likelihood=likelihood)
        result = train(module, max_epochs=6, precision=precision)
        losses.append(float(result.history["elbo_validation"].iloc[-1, 0]))
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_lightning_counts_the_optimiser_steps():
    result = train(a_vae())
    assert result.trainer.global_step == 4 * math.ceil(len(TRAIN) / 8)


# Devices


def test_apples_gpu_is_left_alone(monkeypatch):
    """It has no float64: `auto` takes the CPU, and who asks for it with counts is told."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    result = train(a_vae(), accelerator="auto")
    assert result.trainer.strategy.root_device.type == "cpu"
    for asked in ("mps", "gpu"):
        with pytest.raises(ValueError, match=rf"accelerator='{asked}' is Apple's GPU .* use accelerator='cpu'"):
            train(a_vae(), accelerator=asked)
