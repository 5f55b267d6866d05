"""Run by `make check-wheel` in an environment that holds the wheel and its dependencies, and none of the extras."""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import sccvae

heavy = {"anndata", "lightning", "scanpy", "scvi", "torch"} & set(sys.modules)
assert not heavy, f"import sccvae loaded {sorted(heavy)}"

home = Path(sccvae.__file__)
assert home.is_relative_to(sysconfig.get_path("purelib")), f"imported from {home}, not from the wheel"
assert version("sccvae") == sccvae.__version__, f"metadata {version('sccvae')}, package {sccvae.__version__}"

names = [f"{room}.{name}" for room in sccvae.__all__ if room != "__version__" for name in getattr(sccvae, room).__all__]
for name in names:
    room, attribute = name.split(".")
    assert hasattr(getattr(sccvae, room), attribute), f"sccvae.{name} is in __all__ and is missing"

sys.stdout.write(f"sccvae {sccvae.__version__} from {home.parent}: {len(names)} public names\n")
