"""Sphinx configuration. The build needs no network and runs no notebook: `make tutorials` does that."""

import shutil
from datetime import date
from pathlib import Path

import sccvae

HERE = Path(__file__).parent

# Notebooks live in tutorials/; Sphinx reads below docs/ only. The copies are ignored by git.
for notebook in sorted((HERE.parent / "tutorials").glob("*.ipynb")):
    shutil.copy2(notebook, HERE / "tutorials")

project = "sccvae"
author = "sccvae developers"
copyright = f"{date.today().year}, {author}"
version = release = sccvae.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"sccvae {release}"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

# A subpackage's page lists its __all__, wherever the names are defined.
autosummary_ignore_module_all = False
autosummary_imported_members = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"

napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
# Taken as it is written, so that it may be prose as well as "type, indented description".
napoleon_custom_sections = ["Returns"]


def skip_foreign(app, what, name, obj, skip, options):
    """Leave out what a class inherits from torch, lightning or scvi-tools: their pages describe it."""
    function = getattr(obj, "__func__", getattr(obj, "fget", obj))
    module = getattr(function, "__module__", None)
    return True if what == "class" and module and not module.startswith("sccvae") else None


def setup(app):
    app.connect("autodoc-skip-member", skip_foreign)
