"""What every test file shares: no display, one thread, the folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Set before matplotlib and torch are first imported; the processes that tests start inherit both.
os.environ["MPLBACKEND"] = "Agg"
# The tests' matrices are too small for threads, and threads that wait for each other on a busy machine cost tenfold.
# numba's counts as well: it shares OpenMP with torch, and its first parallel loop sets torch's number to its own.
for _variable in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real data sets; a test that asks for it is skipped where there is none."""
    folder = os.environ.get("SCCVAE_DATA_DIR")
    if not folder:
        pytest.skip("needs real data: set SCCVAE_DATA_DIR to the folder that holds them")
    path = Path(folder)
    if not path.is_dir():
        pytest.skip(f"needs real data: SCCVAE_DATA_DIR={folder} is not a folder")
    return path
