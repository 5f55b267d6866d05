"""Draw the plate figures of the model pages from the modules' own factors.

python docs/make_plates.py

writes docs/images/plates/*.svg. The files are kept in the repository; run this again when a factorization, or the
drawing, changes. The output is the same byte for byte in the same versions of matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from sccvae import module, pl

FOLDER = Path(__file__).parent / "images" / "plates"
PLATES = {
    "ae": module.AE(2),
    "vae": module.VAE(2),
    "cvae_fixed": module.CVAE(2, [2]),
    "cvae_fixed_free_encoder": module.CVAE(2, [2], encode_condition=False),
    "cvae_learned": module.CVAE(2, [2], prior="learned"),
    "gmvae": module.GMVAE(2, 2, [2]),
    "gmvae_uniform": module.GMVAE(2, 2, prior="uniform", classifier="z"),
    "gmvae_learned": module.GMVAE(2, 2, [2], w_prior="learned"),
}


def main() -> None:
    """Draw every plate."""
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "sccvae"  # else names inside the file are random
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, model in PLATES.items():
        ax = pl.plate_diagram(model)
        # white, so that it can be read on a dark page; no date, so that nothing changes without a reason
        ax.figure.savefig(FOLDER / f"{name}.svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
        plt.close(ax.figure)


if __name__ == "__main__":
    main()
