"""What a query brings, beside what the reference knows: categories, genes, labels; and how that is told."""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData

from sccvae.data import Schema
from sccvae.data.categories import check_filled, check_once, is_label, match
from sccvae.data.masked import measured

#: Least share of the reference's genes that a query must have.
LEAST_GENES = 0.5


def new_categories(adata: AnnData, schema: Schema) -> dict[str, list[Any]]:
    """Categories of each condition that the reference does not have, by ``obs`` column."""
    found = {}
    for key, known in schema.categories.items():
        if key not in adata.obs:
            msg = (
                f"The reference was set up with obs[{key!r}], which the query lacks; its columns are "
                f"{list(adata.obs.columns)}. For cells of one new category: `adata.obs[{key!r}] = 'query'`."
            )
            raise KeyError(msg)
        check_once(adata, key)
        column = adata.obs[key]
        check_filled(column, "query cells", "query")
        new = column[match(known, column) < 0].unique()
        if known.dtype.kind in "iu":  # a column of whole numbers with a gap, once, is one of floats
            new = [int(v) if isinstance(v, float) and v.is_integer() else v for v in new]
        if len(new):
            found[key] = sorted(new, key=str)
    return found


def genes_of(adata: AnnData, schema: Schema, maskable: bool) -> np.ndarray:
    """Which of the reference's genes the query has, (G,) bool, if they are enough; all, if none can be masked."""
    if not adata.n_obs:
        msg = "The query has no cells; was it filtered by a value that none has?"
        raise ValueError(msg)
    if not adata.var_names.is_unique:
        msg = "adata.var_names are not unique, so genes cannot be matched: run `adata.var_names_make_unique()`."
        raise ValueError(msg)
    present = measured(adata, schema)
    if present.mean() < LEAST_GENES:
        some = [str(g) for g in schema.var_names[~present][:3]]
        msg = (
            f"The query has {present.sum()} of the reference's {len(present)} genes, fewer than "
            f"{LEAST_GENES:.0%}: too few to map. Are the names of the same kind (symbols or Ensembl ids)? The "
            f"reference has {some}, the query {[str(g) for g in adata.var_names[:3]]}."
        )
        raise ValueError(msg)
    if not present.all() and not maskable:
        msg = (
            f"The query lacks {(~present).sum()} genes, and this model was trained or saved by a version of "
            "sccvae that did not note what stands for them. Train the reference again."
        )
        raise ValueError(msg)
    return present


def known_labels(adata: AnnData, schema: Schema) -> np.ndarray | None:
    """Codes of the query's labels, -1 where there is none or the reference does not know it; None without any."""
    key = schema.labels_key
    if key is None or key not in adata.obs:
        return None
    codes = match(schema.classes, adata.obs[key])
    return codes if (codes >= 0).any() else None


def labels_of(adata: AnnData, schema: Schema) -> dict[str, Any]:
    """How many cells have no label, and which labels the reference does not have."""
    key = schema.labels_key
    if key is None or key not in adata.obs:
        return {"n_unlabelled": int(adata.n_obs), "unknown_labels": []}
    column = adata.obs[key]
    known = is_label(column, schema.unlabeled_category)
    unknown = column[known & (match(schema.classes, column) < 0)]
    return {"n_unlabelled": int((~known).sum()), "unknown_labels": sorted(set(unknown.astype(str)))}


def report_text(found: dict[str, Any], n_genes: int) -> str:
    """What is new, masked or left out, for the log and for what the model prints."""
    lines = [f"query of {found['n_cells']} cells"]
    lines += [f"new in obs[{key!r}]: {values}" for key, values in found["new_categories"].items()]
    missing = found["missing_genes"]
    if missing:
        share = len(missing) / n_genes
        lines.append(f"{len(missing)} of {n_genes} genes ({share:.0%}) are missing and masked: {missing[:5]}")
    if found["n_genes_left_out"]:
        lines.append(f"{found['n_genes_left_out']} genes are not known to the reference and left out")
    if found["unknown_labels"]:
        lines.append(f"labels that the reference does not have are not used: {found['unknown_labels']}")
    return "; ".join(lines)
