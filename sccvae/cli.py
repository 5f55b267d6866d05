"""The ``sccvae`` command. Everything heavy is imported late: ``--help`` needs the standard library only."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sccvae._cli_parsers import parser

if TYPE_CHECKING:
    from anndata import AnnData

OK, FAILED = 0, 1

#: Options of a model that is still to be trained, by what they are handed to.
COVARIATES = ("categorical_covariate_keys", "continuous_covariate_keys")
SETUP = ("layer", "batch_key", "labels_key", "unlabeled_category", "size_factor_key", *COVARIATES)
SETTINGS = ("likelihood", "n_latent", "n_hidden", "n_layers", "n_components")
TRAINING = ("max_epochs", "batch_size", "accelerator", "checkpoint_dir")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv
        Arguments; None for those of the process.

    Returns
    -------
    Exit code: 0; 1 after an error, told in one line on stderr; 130 after Ctrl-C, 143 after SIGTERM. Wrong usage and
    ``--help`` end in ``SystemExit``, with 2 and 0, as argparse does.
    """
    run = {"train": _train, "embed": _embed, "correct": _correct, "counterfactual": _counterfactual}
    run |= {"cluster": _cluster, "map": _map, "demo": _demo}
    args = parser(run).parse_args(argv)
    with _signals() as received, warnings.catch_warnings():
        warnings.showwarning = _show_all_warnings if args.debug else _show_warning
        try:
            args.run(args, received)
        except BaseException as error:
            # A training ends on a signal in several ways; Lightning's are kinds of SystemExit.
            if not received and not isinstance(error, Exception | KeyboardInterrupt):
                raise
            if args.debug:
                traceback.print_exc()
            if received or isinstance(error, KeyboardInterrupt):
                folder = getattr(args, "checkpoint_dir", None)
                _tell("interrupted; no output written" + (f"; run it again to go on from {folder}" if folder else ""))
                return 128 + (received or [signal.SIGINT])[0]
            _tell(f"error: {_text(error)}")
            return FAILED
    return OK


def _train(args: argparse.Namespace, received: list[int]) -> None:
    out, checkpoints = args.out.resolve(), args.checkpoint_dir
    if checkpoints is not None and out in (checkpoints.resolve(), *checkpoints.resolve().parents):
        args.usage_error("--checkpoint-dir must not be --out or lie in it: the saved model is alone in its folder")
    _check_places(args.input, out.parent)
    if out.exists() and not args.force:
        msg = f"{args.out} exists; pass --force to replace the model in it, or choose another folder."
        raise FileExistsError(msg)
    if out.exists() and not (out / "model.json").is_file():
        msg = f"{args.out} exists and is not a saved model, so --force does not replace it; choose another folder."
        raise FileExistsError(msg)
    adata = _read(args.input)

    from sccvae.tl._job import model_class

    setup, settings, training = _given(args, SETUP), _given(args, SETTINGS), _given(args, TRAINING)
    kind, seed = model_class(args.model or "cvae", setup, settings), args.seed or 0
    kind.setup_anndata(adata, **setup)
    model = kind(adata, seed=seed, **settings)
    model.train(seed=seed, progress_bar=not args.quiet, **training)
    _stop_if(received)
    model.save(out, overwrite=args.force)
    curve = model.history.get("elbo_validation", model.history["elbo_train"]).iloc[:, 0]
    kept = model.reference["kept_epoch"]
    elbo = f"−ELBO {float(curve.iloc[kept]):.1f} nats per cell, of epoch {kept + 1} of {len(curve)}"
    _report(args, f"{args.out}: {kind.__name__} of {adata.n_obs} cells x {adata.n_vars} genes, {elbo}")


def _embed(args: argparse.Namespace, received: list[int]) -> None:
    options = _options(args)
    adata = _read(args.input)
    from sccvae import tl

    model = _model(args)
    key = args.key or f"X_{model if isinstance(model, str) else type(model).__name__.lower()}"
    tl.embed(adata, model, key_added=key, **options)
    _stop_if(received)
    write_h5ad(adata, args.output)
    _report(args, f"{args.output}: obsm[{key!r}], {adata.n_obs} cells x {adata.obsm[key].shape[1]} dimensions")


def _correct(args: argparse.Namespace, received: list[int]) -> None:
    if args.model_dir is None and args.batch_key is None:
        args.usage_error("--batch-key is needed to train a model (or --model-dir)")
    options = _options(args) | {"reference": args.reference, "library_size": args.library_size, "key_added": args.key}
    adata = _read(args.input, backed=args.backed)
    from sccvae import tl

    if args.backed:
        with _whole_or_not(args.output) as unfinished:
            tl.correct(adata, _model(args), out=unfinished, **options)
            _stop_if(received)
    else:
        tl.correct(adata, _model(args), **options)
        _stop_if(received)
        write_h5ad(adata, args.output)
    to = ", ".join(str(batch) for batch in adata.uns[args.key]["reference"])
    _report(args, f"{args.output}: layers[{args.key!r}] (as in {to}) and obsm[{adata.uns[args.key]['embedding']!r}]")


def _counterfactual(args: argparse.Namespace, received: list[int]) -> None:
    options = _options(args) | {"library_size": args.library_size, "key_added": args.key}
    condition = dict(args.condition)
    if len(condition) < len(args.condition):
        args.usage_error("--condition names a column twice; a cell is under one condition of each")
    adata = _read(args.input)
    from sccvae import tl

    model = _model(args)
    numbers = (args.continuous_covariate_keys or ()) if isinstance(model, str) else model.schema.continuous
    for key in condition.keys() & set(numbers):
        try:
            condition[key] = float(condition[key])
        except ValueError:
            args.usage_error(f"--condition {key}={condition[key]}: {key} is a continuous covariate; give a number")
    tl.counterfactual(adata, condition, model, **options)
    _stop_if(received)
    write_h5ad(adata, args.output)
    conditions = ", ".join(f"{key} = {value}" for key, value in args.condition)
    _report(args, f"{args.output}: layers[{args.key!r}] ({conditions}) and obsm[{adata.uns[args.key]['embedding']!r}]")


def _cluster(args: argparse.Namespace, received: list[int]) -> None:
    options = _options(args)
    adata = _read(args.input)
    from sccvae import tl

    model = _model(args, "gmvae")
    key = args.key or (model if isinstance(model, str) else type(model).__name__.lower())
    tl.cluster(adata, model, key_added=key, **options)
    _stop_if(received)
    write_h5ad(adata, args.output)
    sizes = adata.obs[key].value_counts()
    used = f"{(sizes > 0).sum()} clusters of {sizes[sizes > 0].min()} to {sizes.max()} cells"
    _report(args, f"{args.output}: obs[{key!r}], {used}; obsm['{key}_proba'] and obsm['X_{key}']")


def _map(args: argparse.Namespace, received: list[int]) -> None:
    _options(args)
    adata = _read(args.input)
    from sccvae import tl

    options = {"key_added": args.key, "unknown_threshold": args.unknown_threshold}
    tl.map_query(adata, args.model_dir, train_options={"progress_bar": not args.quiet}, **options)
    _stop_if(received)
    write_h5ad(adata, args.output)
    found = adata.uns[args.key]["query"]
    new = {key: list(values) for key, values in found["new_categories"].items()}
    text = f"obsm['X_{args.key}'], {adata.n_obs} cells; new: {new or 'nothing'}"
    if f"{args.key}_label" in adata.obs:
        text += f"; {(adata.obs[f'{args.key}_label'] == 'unknown').sum()} unknown"
    _report(args, f"{args.output}: {text}, {len(found['missing_genes'])} genes masked")


def _demo(args: argparse.Namespace, received: list[int]) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    _report(args, "loading (the first import takes a few seconds)")
    # Small matrices keep one thread busy; two would wait for each other, for minutes on a busy machine. And numba (in
    # scanpy) gives torch as many threads as it takes itself.
    if not {"numba", "torch"} & set(sys.modules):
        for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ.setdefault(name, "1")
    import matplotlib as mpl

    mpl.use("Agg")  # pictures go to files only
    from sccvae import _demo

    done = _demo.run(seed=args.seed, progress_bar=not args.quiet, say=lambda text: _report(args, text))
    _stop_if(received)
    write_h5ad(done.adata, args.out / "demo.h5ad")
    for name, figure in done.figures.items():
        figure.savefig(args.out / f"{name}.png", dpi=150)
    names = ["demo.h5ad", *(f"{name}.png" for name in done.figures)]
    _report(args, f"\n{done.table}\n\nin {args.out}: {', '.join(names)}")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Options for ``tl``, after every check that needs no import."""
    setup, settings, training = _given(args, SETUP), _given(args, SETTINGS), _given(args, TRAINING)
    if args.model_dir is not None:
        given = [*setup, *settings, *training, *_given(args, ("model", "seed"))]
        if given:
            names = [
                name.replace("covariate_keys", "covariate").replace("n_components", "components") for name in given
            ]
            flags = ", ".join("--" + name.replace("_", "-") for name in names)
            args.usage_error(f"{flags}: the model in --model-dir is trained already; leave this out")
    _check_places(args.input, args.output.parent)
    if args.output.exists() and args.output.samefile(args.input):
        msg = f"{args.output} is the input, which is never overwritten; choose another output."
        raise FileExistsError(msg)
    if args.output.exists() and not args.force:
        msg = f"{args.output} exists; pass --force to replace it."
        raise FileExistsError(msg)
    if args.model_dir is not None:
        return {}
    more = {"seed": args.seed or 0, "train_options": training | {"progress_bar": not args.quiet}}
    return setup | {"model_options": settings} | more


def _model(args: argparse.Namespace, default: str = "cvae") -> Any:
    """The saved model, or the name of one to be trained."""
    if args.model_dir is None:
        return args.model or default
    from sccvae.model import load

    return load(args.model_dir)


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    found = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _check_places(source: Path, folder: Path) -> None:
    """There must be an input, and a folder for the output: both are found out before any work."""
    if source.is_dir():
        msg = f"{source} is a folder, but the input must be a .h5ad file."
        if source.suffix == ".zarr":
            new = f"{source.stem}.h5ad"
            msg += f" Convert it in Python first: `anndata.read_zarr({str(source)!r}).write_h5ad({new!r})`."
        raise IsADirectoryError(msg)
    if not source.is_file():
        msg = f"there is no file {source}."
        raise FileNotFoundError(msg)
    if not folder.is_dir():
        msg = f"there is no folder {folder}; make it first."
        raise FileNotFoundError(msg)


def _read(path: Path, *, backed: bool = False) -> AnnData:
    try:
        if backed:
            from sccvae.data import open_anndata

            return open_anndata(path)
        import anndata

        return anndata.read_h5ad(path)
    except Exception as error:
        msg = f"{path} cannot be read as .h5ad: {_text(error)}"
        raise OSError(msg) from error


def write_h5ad(adata: AnnData, path: Path) -> None:
    """Write ``adata`` to ``path`` whole or not at all, whatever happens meanwhile.

    Parameters
    ----------
    adata
        What to write.
    path
        Where to; a file that is there is replaced at the very end.
    """
    with _whole_or_not(path) as unfinished:
        adata.write_h5ad(unfinished)


@contextmanager
def _whole_or_not(path: Path) -> Iterator[Path]:
    """Where to write a file that takes its place at the end."""
    # In the same folder, since a file can be moved in one step only within a file system; in a folder of its own, so
    # that the file gets the usual permissions.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        whole = Path(folder) / path.name
        yield whole
        os.replace(whole, path)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Note Ctrl-C and SIGTERM: a training ends on the first and goes on to return."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_if(received: list[int]) -> None:
    if received:
        raise KeyboardInterrupt


def _text(error: BaseException) -> str:
    """The message of an error in one line; unexpected kinds of errors with their name."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split())
    expected = isinstance(error, ValueError | KeyError | OSError | FloatingPointError) and text
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    # The others are for developers, and of other packages: --debug shows them.
    if issubclass(category, UserWarning) and not issubclass(category, FutureWarning):
        _tell(f"warning: {' '.join(str(message).split())}")


def _show_all_warnings(message: Warning | str, category: type[Warning], filename: str, line: int, *rest: Any) -> None:
    _tell(f"{filename}:{line}: {category.__name__}: {message}")


def _tell(text: str) -> None:
    print(f"sccvae: {text}", file=sys.stderr)


def _report(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text, flush=True)
