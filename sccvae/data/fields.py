"""What `setup_anndata` registers, and the plain facts that the rest of sccvae reads from that registry."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import rich.table
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.data import fields

from sccvae.data.categories import check_plain, is_label, match
from sccvae.data.confounding import confounding

#: Genes for each cell above which networks lose types, and genes that are few enough whatever the cells. Of 1,000
#: simulated cells 0.88, 0.79 and 0.64 of the neighbours are of the same type with 5,000, 8,000 and 15,000 genes (in
#: principal components 0.91 each), and 0.97 with the 2,000 most variable of 15,000.
GENES_A_CELL, MANY_GENES = 5, 4_000


def anndata_fields(
    layer: str | None = None,
    batch_key: str | None = None,
    labels_key: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    unlabeled_category: str | None = None,
) -> list[fields.BaseAnnDataField]:
    """scvi-tools fields for the arguments of ``setup_anndata``; only what was named is registered.

    Parameters
    ----------
    layer
        Layer of the values, None for X.
    batch_key, labels_key, size_factor_key
        ``obs`` columns, or None.
    categorical_covariate_keys, continuous_covariate_keys
        Lists of ``obs`` columns, or None.
    unlabeled_category
        Value of ``labels_key`` that stands for no label, or None.

    Returns
    -------
    Fields for ``scvi.data.AnnDataManager``.
    """
    # is_count_data: we check the values ourselves, against the likelihood, and raise instead of warning.
    # correct_data_format: the user's matrix is left as it is.
    found = [fields.LayerField(REGISTRY_KEYS.X_KEY, layer, is_count_data=False, correct_data_format=False)]
    if batch_key is not None:
        found.append(fields.CategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key))
    if labels_key is not None:
        found.append(LabelsField(labels_key, unlabeled_category))
    if size_factor_key is not None:
        found.append(fields.NumericalObsField(REGISTRY_KEYS.SIZE_FACTOR_KEY, size_factor_key))
    # A condition that is named twice counts once.
    categorical = [key for key in dict.fromkeys(categorical_covariate_keys or ()) if key != batch_key]
    if categorical:
        found.append(fields.CategoricalJointObsField(REGISTRY_KEYS.CAT_COVS_KEY, categorical))
    if continuous_covariate_keys:
        found.append(fields.NumericalJointObsField(REGISTRY_KEYS.CONT_COVS_KEY, list(continuous_covariate_keys)))
    return found


class LabelsField(fields.BaseAnnDataField):
    """Class labels in ``obs``, some of which may be missing (NaN, or ``unlabeled_category``).

    scvi-tools' own field refuses NaN. This one only notes the classes; codes are made when they are read.

    Parameters
    ----------
    attr_key
        Column of ``obs``.
    unlabeled_category
        Value that stands for no label, or None.
    """

    registry_key = REGISTRY_KEYS.LABELS_KEY
    attr_name = "obs"
    attr_key = None
    is_empty = False

    def __init__(self, attr_key: str, unlabeled_category: str | None = None) -> None:
        super().__init__()
        self.attr_key, self.unlabeled_category = attr_key, unlabeled_category

    def validate_field(self, adata: AnnData) -> None:
        """Check that the column is there; :func:`check_setup` says more."""
        if self.attr_key not in adata.obs:
            msg = f"There is no adata.obs[{self.attr_key!r}]; the columns are {list(adata.obs.columns)}."
            raise KeyError(msg)

    def register_field(self, adata: AnnData) -> dict:
        """Note the classes: the categories in their order, else the sorted values."""
        super().register_field(adata)
        column = adata.obs[self.attr_key]
        if isinstance(column.dtype, pd.CategoricalDtype):
            classes = column.cat.remove_unused_categories().cat.categories
        else:
            classes = pd.Index(sorted(column.dropna().unique(), key=lambda v: (str(type(v)), v)))
        classes = np.asarray(classes[is_label(pd.Series(classes), self.unlabeled_category)].tolist())
        return {"categorical_mapping": classes, "unlabeled_category": self.unlabeled_category}

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        """The classes of the training data stay."""
        del kwargs
        self.validate_field(adata_target)
        return state_registry

    def get_summary_stats(self, state_registry: dict) -> dict:
        """Number of classes."""
        return {"n_labels": len(state_registry["categorical_mapping"])}

    def view_state_registry(self, state_registry: dict) -> rich.table.Table:
        """A table of the classes."""
        table = rich.table.Table(title=f"labels: obs[{self.attr_key!r}]")
        table.add_column("class")
        table.add_column("component")
        for i, name in enumerate(state_registry["categorical_mapping"]):
            table.add_row(str(name), str(i))
        return table


def check_setup(
    adata: AnnData,
    layer: str | None = None,
    batch_key: str | None = None,
    labels_key: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    unlabeled_category: str | None = None,
) -> None:
    """Check that everything named for ``setup_anndata`` is there and usable, before anything is written to ``adata``.

    Parameters
    ----------
    adata
        The cells.
    layer
        Layer of the values, None for X.
    batch_key, labels_key, size_factor_key
        ``obs`` columns, or None.
    categorical_covariate_keys, continuous_covariate_keys
        Lists of ``obs`` columns, or None.
    unlabeled_category
        Value of ``labels_key`` that stands for no label, or None.

    Raises
    ------
    TypeError
        If ``adata`` is no AnnData, keys were given as one string, or a condition mixes text with numbers or holds
        neither (intervals, dates).
    KeyError
        If a layer or an ``obs`` column is missing.
    ValueError
        If ``adata`` is a view, is empty, has duplicate gene names, or a column has missing or unusable values.

    Warns
    -----
    UserWarning
        If a categorical covariate or the labels cannot be told from the batch; see :func:`confounding`. If there are
        many genes for so few cells.
    """
    if not isinstance(adata, AnnData):
        msg = f"adata must be an AnnData object, not {type(adata).__name__}."
        raise TypeError(msg)
    if adata.is_view:
        msg = (
            "adata is a view of another AnnData; run `adata = adata.copy()` first, so that the setup has a place "
            "to stay."
        )
        raise ValueError(msg)
    if 0 in adata.shape:
        msg = f"adata has {adata.n_obs} cells and {adata.n_vars} genes; there is nothing to model."
        raise ValueError(msg)
    if not adata.var_names.is_unique:
        twice = adata.var_names[adata.var_names.duplicated()][0]
        msg = f"adata.var_names are not unique ({twice!r} stands twice); run `adata.var_names_make_unique()` first."
        raise ValueError(msg)
    if layer is not None and layer not in adata.layers:
        msg = f"There is no adata.layers[{layer!r}]; the layers are {sorted(adata.layers)}. Use layer=None for adata.X."
        raise KeyError(msg)
    if layer is None and adata.X is None:
        msg = f"adata.X is None; pass layer= with one of {sorted(adata.layers)}."
        raise ValueError(msg)
    for name, keys in [
        ("categorical_covariate_keys", categorical_covariate_keys),
        ("continuous_covariate_keys", continuous_covariate_keys),
    ]:
        if isinstance(keys, str):
            msg = f"{name} must be a list; write {name}=[{keys!r}]."
            raise TypeError(msg)
    categorical = [batch_key, *(categorical_covariate_keys or ())]
    numerical = [size_factor_key, *(continuous_covariate_keys or ())]
    for key in filter(None, [*categorical, labels_key, *numerical]):
        if key not in adata.obs:
            msg = f"There is no adata.obs[{key!r}]; the columns are {list(adata.obs.columns)}."
            raise KeyError(msg)
    for key in filter(None, categorical):
        missing = int(adata.obs[key].isna().sum())
        if missing:
            msg = (
                f"adata.obs[{key!r}] is missing (NaN) for {missing} of {adata.n_obs} cells. Give them a "
                "category of their "
                f"own (`adata.obs[{key!r}] = adata.obs[{key!r}].astype(object).fillna('unknown')`) or leave "
                "these cells out."
            )
            raise ValueError(msg)
        check_plain(adata.obs[key])
        other = [v for v in adata.obs[key].unique() if not isinstance(v, str)]
        if 0 < len(other) < adata.obs[key].nunique():
            msg = (
                f"adata.obs[{key!r}] mixes text with values such as {other[0]!r} ({type(other[0]).__name__}), which "
                f"cannot be sorted. Make all of them text: `adata.obs[{key!r}] = adata.obs[{key!r}].astype(str)`."
            )
            raise TypeError(msg)
    if unlabeled_category is not None and labels_key is None:
        msg = f"unlabeled_category={unlabeled_category!r} needs labels_key, the obs column that it stands in."
        raise ValueError(msg)
    if labels_key is not None:
        check_plain(adata.obs[labels_key])
        if not is_label(adata.obs[labels_key], unlabeled_category).any():
            n = adata.obs[labels_key].count()
            msg = (
                f"adata.obs[{labels_key!r}] has no label at all: {n} of {adata.n_obs} cells are "
                f"{unlabeled_category!r}, the others NaN. Leave labels_key out."
            )
            raise ValueError(msg)
    for key in filter(None, numerical):
        numeric_column(adata.obs[key], positive=key == size_factor_key)
    if adata.n_vars > max(MANY_GENES, GENES_A_CELL * adata.n_obs):
        msg = (
            f"adata has {adata.n_vars} genes and {adata.n_obs} cells: networks learn so few cells by heart, and lose "
            "types that the most variable genes show. Choose some first, such as with "
            "`scanpy.pp.highly_variable_genes(adata, n_top_genes=2000, flavor='seurat_v3', subset=True)` (of counts; "
            "layer= and batch_key= as here)."
        )
        warnings.warn(msg, UserWarning, stacklevel=3)
    _warn_of_confounding(adata, batch_key, labels_key, categorical_covariate_keys, unlabeled_category)


def _warn_of_confounding(
    adata: AnnData,
    batch_key: str | None,
    labels_key: str | None,
    categorical_covariate_keys: Sequence[str] | None,
    unlabeled_category: str | None,
) -> None:
    """Say, in one warning, which columns of the set-up cannot be told from the batch."""
    if batch_key is None:
        return
    columns = {key: adata.obs[key] for key in categorical_covariate_keys or ()}
    if labels_key is not None:
        labels = adata.obs[labels_key].astype(object)
        columns[labels_key] = labels.where(is_label(labels, unlabeled_category))
    found = [confounding(adata.obs[batch_key], column) for key, column in columns.items() if key != batch_key]
    found = [f"adata.obs: {sentence}" for sentence in found if sentence is not None]
    if found:
        found.append(
            "A model of this set-up can give a difference to either, and removing the batch can remove it. If it is "
            "biology that is to stay, name a coarser batch_key (or none)."
        )
        warnings.warn("\n".join(found), UserWarning, stacklevel=4)


def numeric_column(column: pd.Series, *, positive: bool = False) -> np.ndarray:
    """A column of ``obs`` as finite float32 numbers (n,); else an error that names the column.

    Raises
    ------
    ValueError
        If a value is not a number, is NaN or infinite, or, with ``positive``, is not above zero.
    """
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float32, na_value=np.nan)
    bad = ~np.isfinite(values) | (positive & (values <= 0))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        kind = "positive finite" if positive else "finite"
        msg = (
            f"adata.obs[{column.name!r}] must hold {kind} numbers; {int(bad.sum())} of {len(bad)} cells do not "
            f"(first: {column.iloc[first]} in cell {column.index[first]!r})."
        )
        raise ValueError(msg)
    return values


@dataclass(frozen=True)
class Schema:
    """The facts of a setup: where each input lies in an AnnData, and the codes of its categories.

    Attributes
    ----------
    var_names
        Genes, in the order of the model's input.
    layer
        Layer of the values, None for X.
    categories
        ``obs`` column -> its categories in code order, for each condition; the batch comes first.
    continuous
        ``obs`` columns of the continuous covariates.
    size_factor_key
        ``obs`` column of the size factors, or None.
    batch_key, labels_key
        ``obs`` columns, or None.
    classes
        Classes of the labels in code order.
    unlabeled_category
        Value of ``labels_key`` that stands for no label, or None.
    """

    var_names: np.ndarray
    layer: str | None = None
    categories: dict[str, np.ndarray] = field(default_factory=dict)
    continuous: tuple[str, ...] = ()
    size_factor_key: str | None = None
    batch_key: str | None = None
    labels_key: str | None = None
    classes: np.ndarray = field(default_factory=lambda: np.array([], dtype=object))
    unlabeled_category: str | None = None

    @classmethod
    def from_registry(cls, registry: dict[str, Any]) -> Schema:
        """Read the facts from an scvi-tools registry."""
        found = registry["field_registries"]
        args = registry["setup_args"]

        def state(key: str) -> dict:
            return found.get(key, {}).get("state_registry") or {}

        categories = {}
        if args.get("batch_key") is not None:
            categories[args["batch_key"]] = np.asarray(state(REGISTRY_KEYS.BATCH_KEY)["categorical_mapping"])
        categories |= {k: np.asarray(v) for k, v in state(REGISTRY_KEYS.CAT_COVS_KEY).get("mappings", {}).items()}
        return cls(
            var_names=np.asarray(state(REGISTRY_KEYS.X_KEY)["column_names"]),
            layer=args.get("layer"),
            categories=categories,
            continuous=tuple(args.get("continuous_covariate_keys") or ()),
            size_factor_key=args.get("size_factor_key"),
            batch_key=args.get("batch_key"),
            labels_key=args.get("labels_key"),
            classes=np.asarray(state(REGISTRY_KEYS.LABELS_KEY).get("categorical_mapping", np.array([], dtype=object))),
            unlabeled_category=args.get("unlabeled_category"),
        )

    @property
    def n_categories(self) -> tuple[int, ...]:
        """Number of categories of each condition."""
        return tuple(len(c) for c in self.categories.values())

    def code(self, key: str, category: Any) -> int:
        """Code of one category of a condition.

        Raises
        ------
        ValueError
            If the condition has no such category.
        """
        code = match(self.categories[key], pd.Series([category], dtype=object))[0] if np.isscalar(category) else -1
        if code < 0:
            known = [str(k) for k in self.categories[key]]
            msg = f"{category!r} is no category of obs[{key!r}] in this model; it knows {known}."
            raise ValueError(msg)
        return int(code)

    def codes(self, key: str, column: pd.Series) -> np.ndarray:
        """Codes of a column's values, (n,) int64.

        Raises
        ------
        ValueError
            If a value is missing or was not there when the model was set up.
        """
        codes = match(self.categories[key], column)
        if (codes < 0).any():
            new = column[codes < 0]
            what = "missing (NaN)" if new.isna().all() else f"{sorted(set(new.dropna().astype(str)))}"
            msg = (
                f"adata.obs[{key!r}] is {what} in {len(new)} cells, which this model has not seen; it knows "
                f"{[str(k) for k in self.categories[key]]}. Leave these cells out, map them to a known category, train "
                "with them, or map them as a query: `model.load_query(adata)`."
            )
            raise ValueError(msg)
        return codes

    def label_codes(self, column: pd.Series) -> np.ndarray:
        """Codes of class labels, (n,) int64; -1 for NaN and for the unlabeled category.

        Raises
        ------
        ValueError
            If a label is not one of the classes.
        """
        codes = match(self.classes, column)
        unknown = (codes < 0) & is_label(column, self.unlabeled_category)
        if unknown.any():
            new = sorted(set(column[unknown].astype(str)))
            msg = (
                f"adata.obs[{column.name!r}] holds {new}, which are not among the classes of the model: "
                f"{[str(c) for c in self.classes]}. Set them to NaN to leave these cells unlabelled."
            )
            raise ValueError(msg)
        return codes
