"""The house of the project: what may import what, how long a file is, what a public name owes its reader."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

import sccvae

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sccvae"
ROOMS = [name for name in sccvae.__all__ if name != "__version__"]
LONGEST_FILE = 420

# room: (rooms it may import, packages it may import beside the standard library). Late imports count as well.
MAY_IMPORT: dict[str, tuple[set[str], set[str]]] = {
    "_compiled": (set(), {"numba", "torch"}),
    "_names": (set(), {"lightning"}),
    "_recording": ({"_rows"}, {"torch"}),
    "_rows": ({"_compiled", "_rows_gpu", "_rows_loops"}, {"numpy", "torch"}),
    "_rows_gpu": (set(), {"torch", "triton"}),
    "_rows_loops": ({"_compiled"}, {"numpy"}),
    "distributions": ({"_compiled", "_rows"}, {"numpy", "torch", "triton"}),
    "nn": ({"_rows"}, {"torch"}),
    "module": ({"_rows", "distributions", "nn"}, {"torch"}),
    "data": (
        {"_rows"},
        {"anndata", "h5py", "numpy", "pandas", "psutil", "rich", "scdataset", "scipy", "scvi", "torch", "tqdm", "zarr"},
    ),
    "datasets": (set(), {"anndata", "numpy", "pandas", "pooch", "scanpy", "scipy"}),
    "train": (
        {"_names", "_recording", "data", "module", "nn"},
        {"igraph", "lightning", "numpy", "pandas", "safetensors", "scipy", "sklearn", "torch", "tqdm"},
    ),
    "model": (
        {"_names", "data", "distributions", "module", "nn", "train"},
        {"anndata", "lightning", "numpy", "pandas", "rich", "safetensors", "scipy", "scvi", "sklearn", "torch"},
    ),
    "metrics": (set(), {"anndata", "numpy", "pandas", "scib_metrics", "scipy", "sklearn"}),
    "tl": (
        {"data", "metrics", "model"},
        {"anndata", "numpy", "pandas", "scipy", "tqdm"},
    ),
    "pl": ({"metrics"}, {"anndata", "matplotlib", "numpy", "pandas", "scanpy", "scipy"}),
    "cli": (
        {"_cli_parsers", "_demo", "data", "model", "tl"},
        {"anndata", "matplotlib"},
    ),
    "_cli_parsers": (set(), set()),
    "_demo": (
        {"datasets", "metrics", "model", "pl", "tl"},
        {"anndata", "numpy", "scanpy"},
    ),
    "__init__": (set(), set()),
    "__main__": ({"cli"}, set()),
}
# What must not even be loaded by way of a third package when a room is imported.
STAYS_UNLOADED = {
    "distributions": {"anndata", "lightning", "numba", "scanpy", "scvi", "triton"},
    "nn": {"anndata", "lightning", "numba", "scanpy", "scvi"},
    "module": {"anndata", "lightning", "scanpy", "scvi"},
    "datasets": {"lightning", "scvi", "torch"},
    "metrics": {"lightning", "scvi", "torch"},
    "pl": {"lightning", "scvi", "torch"},
}
# triton comes with the torch for NVIDIA GPUs, and is done without elsewhere
DISTRIBUTION_OF = {"scib_metrics": "scib-metrics", "scvi": "scvi-tools", "sklearn": "scikit-learn", "triton": "torch"}
# What a function of tl or pl works on comes first and has one of these names.
FIRST_PARAMETERS = {"adata", "images", "model", "model_or_history", "predicted", "table"}
MOST_POSITIONAL = 5


class Import(NamedTuple):
    """One imported name, absolute, and where it stands."""

    name: str
    line: int
    late: bool


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> list[Import]:
    """Every name that a file imports when it runs, at its top or late; those for the type checker alone left out."""
    package = ("sccvae", *file.relative_to(PACKAGE).parent.parts)
    found: list[Import] = []

    def visit(node: ast.AST, late: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, late)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            found.extend(Import(f"{base}.{alias.name}", node.lineno, late) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sccvae":
            found.append(Import(f"sccvae.{node.attr}", node.lineno, late))
        for child in ast.iter_child_nodes(node):
            visit(child, late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(file.read_text(encoding="utf-8")), late=False)
    return found


def broken_rules(file: Path) -> list[str]:
    rooms, packages = MAY_IMPORT[room_of(file)]
    problems = []
    for name, line, _ in imports_of(file):
        top, *rest = name.split(".")
        place = f"{file.relative_to(ROOT)}:{line} imports {name}"
        if top == "sccvae":
            target = rest[0] if rest else ""
            if target in MAY_IMPORT and target != room_of(file) and target not in rooms:
                problems.append(f"{place}: against the direction of the house")
        elif top not in sys.stdlib_module_names:
            if top not in packages:
                problems.append(f"{place}: not among the packages of this room")
            if any(part.startswith("_") and not part.startswith("__") for part in rest):
                problems.append(f"{place}: a private name of another package")
    return problems


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_file_keeps_directions_and_length(file: Path):
    assert room_of(file) in MAY_IMPORT, f"{file.name} is in no room of the house: give it a row in MAY_IMPORT"
    assert not broken_rules(file), "\n".join(broken_rules(file))
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{file.relative_to(ROOT)} has {lines} lines: two files in one?"


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("module", "from ..model import CVAE"),
        ("module", "from .. import data"),
        ("module", "from sccvae import train"),
        ("module", "import sccvae.model._base"),
        ("module", "import sccvae\nsccvae.model.CVAE"),
        ("module", "def f():\n    import anndata"),
        ("nn", "from sccvae.distributions import Normal"),
        ("pl", "import torch.nn as nn"),
        ("metrics", "from torch import Tensor"),
        ("datasets", "import scvi"),
        ("data", "from scvi._settings import settings"),
        ("model", "from scvi.model.base import _utils"),
        ("model", "from sccvae.tl import embed"),
        ("distributions", "if TYPE_CHECKING:\n    pass\nelse:\n    import scvi"),
    ],
)
def test_forbidden_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str, line: str):
    file = tmp_path / "sccvae" / room / "new.py"
    file.parent.mkdir(parents=True)
    file.write_text(line)
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "sccvae")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert len(broken_rules(file)) == 1


def test_imported_packages_are_declared():
    """Required packages may be imported anywhere; those of an extra only late, where nobody comes without it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.match(r"[\w.-]+", r)[0].lower() for r in requirements}

    required = names(project["dependencies"])
    optional = names(project["optional-dependencies"]["bench"] + project["optional-dependencies"]["ondisk"])
    for file in FILES:
        for name, line, late in imports_of(file):
            top = name.split(".")[0]
            if top == "sccvae" or top in sys.stdlib_module_names:
                continue
            package = DISTRIBUTION_OF.get(top, top)
            assert package in required or (late and package in optional), f"{file}:{line} imports {top}: not declared"
    for requirement in project["dependencies"]:
        assert "<" in requirement, f"{requirement} has no upper bound"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_fast_and_light():
    code = """
import sys, time
start = time.perf_counter()
import sccvae
seconds = time.perf_counter() - start
print(seconds, *({"anndata", "lightning", "numpy", "scanpy", "scvi", "torch"} & set(sys.modules)))
"""
    seconds = []
    for _ in range(5):
        took, *heavy = run(code).split()
        assert not heavy, f"import sccvae loads {heavy}"
        seconds.append(float(took))
    # The best of five: the others tell what else the machine was doing.
    assert min(seconds) < 0.3


@pytest.mark.parametrize("room", STAYS_UNLOADED)
def test_room_loads_no_more_than_it_should(room: str):
    loaded = run(f"import sys, sccvae.{room}; print(*sys.modules)").split()
    assert not STAYS_UNLOADED[room] & set(loaded)


def test_lazy_names():
    assert set(sccvae.__all__) <= set(dir(sccvae))
    with pytest.raises(AttributeError, match=r"'sccvae' has no attribute 'modle'; it has .*\bmodel\b"):
        _ = sccvae.modle


def public_names(room: str) -> list[tuple[str, object]]:
    place = importlib.import_module(f"sccvae.{room}")
    assert place.__doc__, f"sccvae.{room} has no docstring"
    return [(name, getattr(place, name)) for name in place.__all__]


def section(doc: str, *titles: str) -> str:
    """Text of the sections of a numpydoc docstring that have one of these titles."""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}\n", inspect.cleandoc(doc), flags=re.MULTILINE)
    return "\n".join(text for title, text in zip(parts[1::2], parts[2::2], strict=True) if title in titles)


def missing_in_doc(label: str, doc: str | None, signature: inspect.Signature | None) -> list[str]:
    """What a numpydoc docstring leaves out of a signature: a parameter, or what is returned."""
    if not doc:
        return [f"{label} has no docstring"]
    problems = []
    parameters = [p for p in signature.parameters if p not in ("self", "cls")] if signature else []
    described = re.findall(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: *:.*)?$", section(doc, "Parameters", "Attributes"), re.M)
    described = {name.strip(" *") for line in described for name in line.split(",")}
    problems += [f"{label} does not describe {p!r} under 'Parameters'" for p in parameters if p not in described]
    returned = signature.return_annotation if signature else None
    if returned not in (inspect.Signature.empty, None, "None") and not section(doc, "Returns", "Yields"):
        problems.append(f"{label} has no section 'Returns'")
    return problems


def undocumented_in_class(label: str, cls: type, whole_methods: bool) -> list[str]:
    ours = [c for c in cls.__mro__ if c.__module__.startswith("sccvae.")]
    init = next((c for c in cls.__mro__ if "__init__" in vars(c)), object)
    signature = inspect.signature(init.__init__).replace(return_annotation="None") if init in ours else None
    problems = missing_in_doc(label, cls.__doc__, signature)
    for name in sorted({n for c in ours for n in vars(c) if not n.startswith("_")}):
        member = inspect.getattr_static(cls, name)
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if not inspect.isfunction(function):
            continue
        # A method of ours is documented where it is first defined; what torch or scvi says of theirs does not count.
        doc = next((vars(c)[name].__doc__ for c in ours if name in vars(c) and vars(c)[name].__doc__), None)
        whole = whole_methods and not isinstance(member, property)
        problems += missing_in_doc(f"{label}.{name}", doc, inspect.signature(function) if whole else None)
    return problems


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_are_documented(room: str):
    problems = []
    for name, value in public_names(room):
        label = f"sccvae.{room}.{name}"
        if inspect.isclass(value):
            problems += undocumented_in_class(label, value, whole_methods=room == "model")
        elif inspect.isfunction(value):
            problems += missing_in_doc(label, inspect.getdoc(value), inspect.signature(value))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("room", ["tl", "pl"])
def test_functions_have_the_shape_of_scanpys(room: str):
    for name, function in public_names(room):
        label = f"sccvae.{room}.{name}"
        assert inspect.isfunction(function), f"{label} is not a function"
        parameters = list(inspect.signature(function).parameters.values())
        assert parameters, f"{label} works on nothing"
        assert parameters[0].name in FIRST_PARAMETERS, f"{label}: the first parameter is {parameters[0].name!r}"
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        assert len(positional) <= MOST_POSITIONAL, f"{label}: make some of {positional} keyword-only"
        if room == "pl":
            assert "Axes" in section(function.__doc__, "Returns"), f"{label} must return the Axes it drew on"
