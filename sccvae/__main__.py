"""``python -m sccvae`` is the ``sccvae`` command."""

from __future__ import annotations

from sccvae.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
