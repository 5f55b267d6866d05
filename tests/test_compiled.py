"""Compiled loops parted between threads."""

import os
import sys
import threading

import numpy as np
import pytest
import torch

from sccvae import _compiled


@pytest.fixture(params=["team", "pool"])
def kind(request, monkeypatch):
    """OpenMP's threads, or those of a fork and of a torch without OpenMP."""
    if request.param == "pool":
        monkeypatch.setattr(_compiled, "_team", lambda process: None)
    elif _compiled._team(os.getpid()) is None:
        pytest.skip("torch has no OpenMP here")
    return request.param


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def switching():
    """Threads take turns as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("n_rows", [1, 2, 3, 1001])
def test_each_row_once(kind, two_threads, switching, n_rows):
    times = np.zeros(n_rows, int)

    def loop(start, stop, out):
        out[start:stop] += 1

    for _ in range(300):
        _compiled.in_threads(loop, n_rows, 2 * _compiled.SHARE, times)
    assert (times == 300).all()


def test_two_threads_at_a_time(kind, two_threads):
    meeting, met = threading.Barrier(2, timeout=20), []
    _compiled.in_threads(lambda start, stop: met.append(meeting.wait()), 2, 2 * _compiled.SHARE)
    assert sorted(met) == [0, 1]


def test_little_work_stays_in_one_thread(kind, two_threads):
    parts = []
    _compiled.in_threads(lambda start, stop: parts.append((start, stop)), 10, 2 * _compiled.SHARE - 1)
    assert parts == [(0, 10)]


def test_an_error_reaches_the_user(kind, two_threads):
    def loop(start, stop):
        if start:
            msg = "of the second part"
            raise ValueError(msg)

    with pytest.raises(ValueError, match="of the second part"):
        _compiled.in_threads(loop, 2, 2 * _compiled.SHARE)


def test_a_fork_has_no_team():
    assert _compiled._team(os.getpid() + 1) is None
