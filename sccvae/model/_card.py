"""The model card: what a saved model is, for those who find its folder."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sccvae import __version__

if TYPE_CHECKING:
    from sccvae.model._base import BaseModel

#: Names that a card lists at most of one kind.
LISTED = 20


def model_card(model: BaseModel) -> str:
    """Describe a model in Markdown: data, model, training, label transfer, versions; all from the model itself.

    Parameters
    ----------
    model
        Trained or not, with or without data.

    Returns
    -------
    The text.
    """
    name, schema = type(model).__name__, model.schema
    parts = [
        f"# {name} on {len(schema.var_names):,} genes",
        "A model saved by sccvae: weights and their description, no cells. Nothing in this folder is pickled.",
        _code(name, model),
        "## Data\n\n" + _table(_data(model)),
        f"## Model\n\n```text\n{model.module.factors}\n```\n\n" + _table(model._in_use() | {"seed": model.seed}),
        "## Training\n\n" + _table(_training(model)),
    ]
    if "transfer" in model.reference:
        parts.append("## Labels of held-out cells\n\n" + _table(model.calibration))
    if "mapping" in model.reference:
        parts.append("## Query mapped on the reference\n\n" + _table(model.query_report))
    packages = ["torch", "scvi-tools", "lightning", "anndata", "numpy"]
    versions = {"sccvae": __version__, "python": platform.python_version()} | {p: version(p) for p in packages}
    parts.append("## Versions\n\n" + _table(versions))
    return "\n\n".join(parts) + "\n"


def _code(name: str, model: BaseModel) -> str:
    lines = ["import sccvae", "", 'model = sccvae.model.load("this_folder")']
    if "mapping" in model.reference or not hasattr(model, "load_query"):
        lines.append("z = model.get_latent_representation(adata)")
        if hasattr(model, "predict"):
            lines.append("clusters = model.predict(adata)")
    else:
        lines += ["query = model.load_query(adata)  # new cells, other batches", "query.train()"]
        lines.append('adata.obsm["X_mapped"] = query.get_latent_representation()')
        if "transfer" in model.reference:
            lines.append("labels = query.transfer_labels()")
    return "```python\n" + "\n".join(lines) + "\n```"


def _data(model: BaseModel) -> dict[str, Any]:
    schema = model.schema
    where = "`adata.X`" if schema.layer is None else f"`adata.layers[{schema.layer!r}]`"
    splits = (model.train_indices, model.validation_indices, model.test_indices)
    sizes = [0 if rows is None else len(rows) for rows in splits]
    found: dict[str, Any] = {}
    if any(sizes):
        found["cells"] = f"{sum(sizes):,}: {sizes[0]:,} trained on, {sizes[1]:,} held out, {sizes[2]:,} for tests"
    found["genes"] = _listed(schema.var_names)
    found["values"] = f"{where} ({model.module.likelihood.support})"
    for key, categories in schema.categories.items():
        what = "batch" if key == schema.batch_key else "covariate"
        found[f"{what} `{key}`"] = _listed(categories)
    for key in schema.continuous:
        found[f"covariate `{key}`"] = "continuous"
    if schema.labels_key is not None:
        found[f"labels `{schema.labels_key}`"] = _listed(schema.classes)
    if schema.size_factor_key is not None:
        found["size factors"] = f"`{schema.size_factor_key}`"
    if model.reference.get("library_quantiles") and model.module.likelihood.support == "counts":
        low, middle, high = (model.reference["library_quantiles"][i] for i in (5, 50, 95))
        found["library size"] = f"median {middle:,.0f} (5 % to 95 %: {low:,.0f} to {high:,.0f})"
    return found


def _training(model: BaseModel) -> dict[str, Any]:
    if not model.is_trained or not model.history:
        return {"trained": "yes" if model.is_trained else "no"}
    found: dict[str, Any] = {"epochs": len(next(iter(model.history.values())))}
    for part in ("train", "validation"):
        if f"elbo_{part}" in model.history:
            elbo = model.history[f"elbo_{part}"].iloc[model.reference.get("kept_epoch", -1), 0]
            found[f"negative ELBO, {part} cells"] = f"{elbo:.2f} nats per cell"
    found["weights"] = f"{sum(p.numel() for p in model.module.parameters()):,}"
    return found


def _listed(names: Iterable[Any]) -> str:
    names = [str(n) for n in names]
    more = f", ... ({len(names):,} in all)" if len(names) > LISTED else f" ({len(names)})"
    return ", ".join(names[:LISTED]) + more


def _table(rows: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        value = _listed(value) if isinstance(value, list) else str(value)
        return value.replace("|", "\\|").replace("\n", " ")

    return "\n".join(["| | |", "|---|---|", *(f"| {text(k)} | {text(v)} |" for k, v in rows.items())])
