"""Training with several processes: every cell once, the same weights everywhere, as good as one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from _two_processes import N_TRAIN, main

from sccvae.train import fit

SCRIPT = Path(__file__).parent / "_two_processes.py"


def launch(folder, strategy, *models):
    """Run the script with two processes of eight cells a mini-batch each."""
    hidden = ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, strategy, "2", "8", *models],
        env={k: v for k, v in os.environ.items() if k not in hidden},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What a single process ends with, with mini-batches of sixteen."""
    folder = tmp_path_factory.mktemp("one")
    main(folder, "auto", 1, 16, ["VAE", "GMVAE"])
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch(folder, "ddp", "GMVAE", "IDEC", "VAE")
    return folder


def test_every_cell_is_seen_once_in_each_epoch_by_one_process(two):
    shares = [read(two, "seen0"), read(two, "seen1")]
    assert len(shares[0]) == len(shares[1]) > 1
    for first, second in zip(*shares, strict=True):
        assert abs(len(first) - len(second)) <= 1
        assert sorted(first + second) == list(range(N_TRAIN))
    assert shares[0][0] != shares[0][1]  # another share in each epoch


@pytest.mark.parametrize("model", ["VAE", "GMVAE", "IDEC"])
def test_processes_end_with_the_same_weights_and_history(two, model):
    assert read(two, f"{model}0") == read(two, f"{model}1")


@pytest.mark.parametrize("model", ["VAE", "GMVAE"])
def test_two_processes_reach_the_loss_of_one(one, two, model):
    """Same cells in a step: half of them in each process. IDEC's square error feels batch norm over eight cells."""
    alone, shared = (min(read(folder, f"{model}0")["losses"]) for folder in (one, two))
    assert shared == pytest.approx(alone, rel=0.01)


def test_forked_processes_give_their_weights_back(two, tmp_path):
    """As in a notebook; what they compute is what launched processes compute."""
    launch(tmp_path, "ddp_fork", "VAE")
    assert read(tmp_path, "VAE0") == read(two, "VAE0")


def test_too_few_cells_for_the_processes():
    from _training import a_store, a_vae

    with pytest.raises(ValueError, match=r"2 processes cannot share 3 training and 1 validation cells.*fewer devices"):
        fit(a_vae(), a_store(), np.arange(3), np.array([5]), devices=2, accelerator="cpu", progress_bar=False)
