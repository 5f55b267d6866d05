"""What `setup_anndata` registers, and the plain facts that the rest of sccvae reads from that registry."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import rich.table
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.data import fields

from sccvae.data.categories import is_label, match, obs_column

#: Cells of a category below which scvi-tools warns.
FEW_CELLS = 3


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
        found.append(ConditionField(REGISTRY_KEYS.BATCH_KEY, batch_key))
    if labels_key is not None:
        found.append(LabelsField(labels_key, unlabeled_category))
    if size_factor_key is not None:
        found.append(fields.NumericalObsField(REGISTRY_KEYS.SIZE_FACTOR_KEY, size_factor_key))
    # A condition that is named twice counts once.
    categorical = [key for key in dict.fromkeys(categorical_covariate_keys or ()) if key != batch_key]
    if categorical:
        found.append(ConditionsField(REGISTRY_KEYS.CAT_COVS_KEY, categorical))
    if continuous_covariate_keys:
        continuous = list(dict.fromkeys(continuous_covariate_keys))
        found.append(fields.NumericalJointObsField(REGISTRY_KEYS.CONT_COVS_KEY, continuous))
    return found


class ConditionField(fields.CategoricalObsField):
    """A condition in ``obs``, with the categories that cells have.

    scvi-tools' own field counts those of a pandas Categorical that no cell has as well, whose weights nothing trains.
    """

    def register_field(self, adata: AnnData) -> dict:
        """Note the categories that cells have, and their codes."""
        with _in_the_words_of_the_user(adata, [self._original_attr_key]):
            state = super().register_field(adata)
        used, adata.obs[self.attr_key] = np.unique(adata.obs[self.attr_key], return_inverse=True)
        return state | {self.CATEGORICAL_MAPPING_KEY: state[self.CATEGORICAL_MAPPING_KEY][used]}


class ConditionsField(fields.CategoricalJointObsField):
    """Several of :class:`ConditionField`, in ``obsm``."""

    def register_field(self, adata: AnnData) -> dict:
        """Note the categories that cells have, and their codes."""
        with _in_the_words_of_the_user(adata, self.attr_keys):
            state = super().register_field(adata)
        codes, mappings = adata.obsm[self.attr_key], state[self.MAPPINGS_KEY]
        for key in self.attr_keys:
            used, codes[key] = np.unique(codes[key], return_inverse=True)
            mappings[key] = mappings[key][used]
        return state | {self.N_CATS_PER_KEY: [len(mappings[key]) for key in self.attr_keys]}


@contextmanager
def _in_the_words_of_the_user(adata: AnnData, keys: Sequence[str]) -> Iterator[None]:
    """Inside, scvi-tools' warning of a small category is given by its column and name, and for all of them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    small = [warning for warning in said if "fewer than 3 cells" in str(warning.message)]
    for warning in said:
        if warning not in small:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    for key in keys if small else ():
        sizes = adata.obs[key].value_counts()
        rare = sizes[(sizes > 0) & (sizes < FEW_CELLS)].index.astype(str).tolist()
        if rare:
            some = ", ".join(map(repr, rare[:3])) + (", ..." if len(rare) > 3 else "")
            msg = (
                f"adata.obs[{key!r}] has {len(rare)} of {(sizes > 0).sum()} categories with fewer than {FEW_CELLS} "
                f"cells ({some}): a model learns little of them. Unite them with others, or leave these cells out."
            )
            warnings.warn(msg, UserWarning, stacklevel=8)


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
        obs_column(adata, self.attr_key)

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
            continuous=tuple(dict.fromkeys(args.get("continuous_covariate_keys") or ())),
            size_factor_key=args.get("size_factor_key"),
            batch_key=args.get("batch_key"),
            labels_key=args.get("labels_key"),
            classes=np.asarray(state(REGISTRY_KEYS.LABELS_KEY).get("categorical_mapping", np.array([], dtype=object))),
            unlabeled_category=args.get("unlabeled_category"),
        )

    @property
    def where(self) -> str:
        """Where the values lie, for messages."""
        return "adata.X" if self.layer is None else f"adata.layers[{self.layer!r}]"

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
