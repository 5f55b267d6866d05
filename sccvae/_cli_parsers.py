"""The arguments of the ``sccvae`` command. Needs the standard library only."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sccvae import __version__


def parser(run: Mapping[str, Callable[..., None]]) -> argparse.ArgumentParser:
    """The arguments of all commands; ``run`` says what each does."""
    top = argparse.ArgumentParser(
        prog="sccvae",
        description="Conditional variational autoencoders for single-cell data: train, embed, cluster, correct.",
        epilog="`sccvae COMMAND --help` explains a command, with an example. "
        "Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted.",
    )
    top.add_argument("--version", action="version", version=f"sccvae {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    train = _command(commands, "train", run, "train a model on an .h5ad file and save it to a folder", TRAIN_HELP)
    train.add_argument("input", type=Path, metavar="IN.h5ad", help="cells x genes")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the model")
    train.add_argument("--force", action="store_true", help="replace the model that is in DIR")
    _training_options(train, models=("ae", "vae", "cvae", "gmvae"))
    _mixture_options(train)
    train.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="keep the state of the training here after "
                       "every epoch; the same command goes on from it")  # fmt: skip

    embed = _command(commands, "embed", run, "write latent coordinates to obsm", EMBED_HELP)
    _files(embed)
    embed.add_argument("--key", metavar="KEY", help="key of obsm and uns (default: X_cvae, after the model)")
    _training_options(embed)

    correct = _command(commands, "correct", run, "write batch-corrected expression to layers", CORRECT_HELP)
    _files(correct)
    correct.add_argument("--key", default="corrected", metavar="KEY", help="key of layers and uns (default: corrected)")
    correct.add_argument("--reference", action="append", metavar="BATCH", help="batch to transform the cells to; "
                         "repeat it to average several (default: the average of all)")  # fmt: skip
    correct.add_argument("--library-size", type=_library_size, metavar="N", help="sum of a cell's corrected counts, or "
                         "'latent' for the cell's own (default: 10000; only for counts)")  # fmt: skip
    correct.add_argument("--backed", action="store_true", help="for more cells than memory holds: leave the matrices "
                         "on disk, and write obs, var, obsm, uns and the corrected layer to OUT.h5ad")  # fmt: skip
    _training_options(correct, models=("cvae",))

    what_if = _command(
        commands, "counterfactual", run, "write expression under another condition to layers", WHAT_IF_HELP
    )
    _files(what_if)
    what_if.add_argument("--condition", action="append", type=_assignment, required=True, metavar="KEY=VALUE",
                         help="give every cell this value of a column of obs; repeat it for several")  # fmt: skip
    what_if.add_argument("--key", default="counterfactual", metavar="KEY",
                         help="key of layers and uns (default: counterfactual)")  # fmt: skip
    what_if.add_argument("--library-size", type=_library_size, metavar="N", help="sum of a cell's counts, or 'latent' "
                         "for the cell's own (default: 10000; only for counts)")  # fmt: skip
    _training_options(what_if, models=("cvae",))

    cluster = _command(commands, "cluster", run, "write clusters and their probabilities to obs and obsm", CLUSTER_HELP)
    _files(cluster)
    cluster.add_argument("--key", metavar="KEY", help="name of the results (default: gmvae)")
    _training_options(cluster, models=("gmvae",))
    _mixture_options(cluster)

    mapping = _command(commands, "map", run, "map new cells on a saved model, with labels if it has some", MAP_HELP)
    _files(mapping, model_needed=True)
    mapping.add_argument("--key", default="mapped", metavar="KEY", help="name of the results (default: mapped)")
    mapping.add_argument("--unknown-threshold", type=float, default=0.9, metavar="SHARE", help="a cell is unknown if "
                         "it lies further out than this share of held-out cells (default: 0.9)")  # fmt: skip

    demo = _command(commands, "demo", run, "the whole job on real cells with a planted batch effect", DEMO_HELP)
    demo.add_argument("--out", type=Path, default=Path("demo_output"), metavar="DIR", help="folder for the results, "
                      "made if missing; its files of the same names are replaced (default: demo_output)")  # fmt: skip
    demo.add_argument(
        "--seed", type=_not_negative, default=0, help="of the planted effect, the model and the UMAPs (default: 0)"
    )
    return top


TRAIN_HELP = """\
Train a model on the cells of IN.h5ad and save it to a folder, for `sccvae embed --model-dir` or
`sccvae.model.load`.

example:
  sccvae train cells.h5ad --layer counts --batch-key batch --out cvae_model
"""
EMBED_HELP = """\
Write the latent coordinates of the cells of IN.h5ad to obsm["X_cvae"] in OUT.h5ad, with a saved
model (--model-dir) or with one trained on the fly on the same cells.

examples:
  sccvae embed cells.h5ad embedded.h5ad --layer counts --batch-key batch
  sccvae embed cells.h5ad embedded.h5ad --model-dir cvae_model
"""
CORRECT_HELP = """\
Write the expression of the cells of IN.h5ad, as it would be in the reference batch, to
layers["corrected"] in OUT.h5ad (counts per 10,000; take log1p to compare), and the embedding to
obsm["X_cvae"]. The model is a saved one (--model-dir) or trained on the fly on the same cells.

examples:
  sccvae correct cells.h5ad corrected.h5ad --layer counts --batch-key batch --reference donor1
  sccvae correct cells.h5ad corrected.h5ad --model-dir cvae_model
"""
WHAT_IF_HELP = """\
Write the expression that the cells of IN.h5ad would have under another condition to
layers["counterfactual"] in OUT.h5ad (counts per 10,000; take log1p to compare), and the embedding to
obsm["X_cvae"]. The model is a saved one (--model-dir) or trained on the fly on the same cells; then
the first condition is its --batch-key, unless you name another.

examples:
  sccvae counterfactual cells.h5ad stimulated.h5ad --layer counts --condition treatment=stim
  sccvae counterfactual cells.h5ad stimulated.h5ad --model-dir cvae_model --condition treatment=stim
"""
CLUSTER_HELP = """\
Cluster the cells of IN.h5ad with a Gaussian-mixture VAE. Writes obs["gmvae"] (the cluster),
obs["gmvae_entropy"], obsm["gmvae_proba"] (probabilities of all clusters) and obsm["X_gmvae"] (the
embedding) to OUT.h5ad. With a batch, clusters run across batches; with some labels, the other
cells get one of these classes. The model is a saved one (--model-dir) or trained on the fly.

examples:
  sccvae cluster cells.h5ad clustered.h5ad --layer counts --batch-key batch
  sccvae cluster cells.h5ad clustered.h5ad --layer counts --batch-key batch --components 20
  sccvae cluster cells.h5ad labelled.h5ad --layer counts --labels-key cell_type --unlabeled-category Unknown
"""
MAP_HELP = """\
Map the cells of IN.h5ad on a saved model (--model-dir) without its data: batches that it does not
know get weights of their own, genes that are missing are masked. Writes obsm["X_mapped"] and, if the
model was trained with --labels-key, obs["mapped_label"] (with "unknown"), obs["mapped_uncertainty"]
and obs["mapped_outlier_score"] to OUT.h5ad.

example:
  sccvae map new_cells.h5ad mapped.h5ad --model-dir my_reference
"""
DEMO_HELP = """\
Plant a batch effect with known truth in 700 real blood cells (they come with scanpy: no
download), remove it with a CVAE, and compare with the truth. Writes demo.h5ad and pictures to a
folder and prints a table. Takes one to two minutes.

example:
  sccvae demo --out demo_output
"""


def _command(commands: Any, name: str, run: Mapping[str, Any], short: str, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=short, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--quiet", action="store_true", help="no progress bar, nothing on stdout")
    command.add_argument("--debug", action="store_true", help="show tracebacks and all warnings")
    command.set_defaults(run=run[name], usage_error=command.error)
    return command


def _files(command: argparse.ArgumentParser, *, model_needed: bool = False) -> None:
    command.add_argument("input", type=Path, metavar="IN.h5ad", help="cells x genes; never changed")
    command.add_argument("output", type=_h5ad, metavar="OUT.h5ad", help="where to; appears whole or not at all")
    command.add_argument("--force", action="store_true", help="replace OUT.h5ad if it exists")
    what = "saved model to map on; needed" if model_needed else "saved model; without it one is trained"
    command.add_argument("--model-dir", type=Path, required=model_needed, metavar="DIR", help=what)


def _mixture_options(command: argparse.ArgumentParser) -> None:
    """Options of the model that clusters."""
    add = command.add_argument_group("clusters (gmvae)").add_argument
    add("--components", dest="n_components", type=_positive, metavar="K", help="number of components (default: the "
        "training chooses it; with labels, one for each class)")  # fmt: skip


def _training_options(command: argparse.ArgumentParser, models: Sequence[str] = ("ae", "vae", "cvae")) -> None:
    """Options of a model that is still to be trained; all None by default, so that it is known which were given."""
    add = command.add_argument_group("data to train on").add_argument
    add("--layer", metavar="NAME", help="layer with the values; nb, zinb and poisson need raw counts (default: X)")
    add("--batch-key", metavar="KEY", help="column of obs with the batch")
    for kind, what in (("categorical", "category"), ("continuous", "number")):
        text = f"column of obs with another {what} to correct for; repeat it for several"
        name = f"{kind}_covariate"
        add(f"--{kind}-covariate", dest=f"{name}_keys", action="append", metavar="KEY", help=text)
    add("--size-factor-key", metavar="KEY", help="column of obs with size factors, in place of the sums of counts")
    if "gmvae" in models:  # the commands whose model may have labels
        text = "column of obs with known classes, for gmvae and for label transfer by `sccvae map`"
        add("--labels-key", metavar="KEY", help=text)
        add("--unlabeled-category", metavar="NAME", help="value in it that stands for no class, beside missing values")
    add = command.add_argument_group("model").add_argument
    add("--model", choices=models, help=f"default: {'cvae' if 'cvae' in models else models[0]}")
    text = (
        "default: nb; for cvae and gmvae with a batch, nb with an offset and a dispersion for each gene and batch, "
        "read at the median depth (cvae then aligns batches more strongly, too), where naming nb gives the plain one"
    )
    add("--likelihood", choices=("nb", "zinb", "poisson", "normal", "bernoulli"), help=text)
    text = "latent dimensions (default: 20 below 1,000 cells, else 10; ae: 10)"
    add("--n-latent", type=_positive, metavar="N", help=text)
    text = "width of the hidden layers (default: 64 to 256, by the number of cells; ae: 128)"
    add("--n-hidden", type=_positive, metavar="N", help=text)
    add("--n-layers", type=_positive, metavar="N", help="number of hidden layers (default: 1)")
    add = command.add_argument_group("training").add_argument
    add("--max-epochs", type=_positive, metavar="N", help="default: by the number of cells, 20 to 400")
    add("--batch-size", type=_positive, metavar="N", help="default: 128")
    add("--accelerator", metavar="NAME", help="auto, cpu, gpu, ... (default: auto)")
    add("--seed", type=_not_negative, metavar="N", help="same seed, same result (default: 0)")


def _h5ad(text: str) -> Path:
    if not text.endswith(".h5ad"):
        msg = f"{text!r} must end in .h5ad"
        raise argparse.ArgumentTypeError(msg)
    return Path(text)


def _assignment(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not (key and sign and value):
        msg = f"{text!r} must be KEY=VALUE"
        raise argparse.ArgumentTypeError(msg)
    return key, value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        msg = f"{text!r} is not a whole number above 0"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        msg = f"{text!r} is not a whole number, 0 or more"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _library_size(text: str) -> float | str:
    if text == "latent":
        return text
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        msg = f"{text!r} is neither a number above 0 nor 'latent'"
        raise argparse.ArgumentTypeError(msg)
    return value
