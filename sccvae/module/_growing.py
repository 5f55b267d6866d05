"""New categories for the conditions of a trained module: which weights are theirs, and training them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sccvae.module._base import GenerativeModule
from sccvae.nn import ConditionedLinear, frozen_statistics, new_columns, widen


def _weights_on_c(module: GenerativeModule) -> list[str]:
    """Names of the weights (n_out, C) that multiply c beside another input."""
    return [
        f"{name}.condition.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, ConditionedLinear) and layer.condition is not None
    ]


def adapt(module: GenerativeModule) -> None:
    """Let new categories scale what the encoder makes of the genes, besides shifting it, if it knows the conditions.

    Another protocol or treatment changes how strongly the genes speak that a hidden unit adds up, which no shift makes
    good (treated cells on untreated ones: scib total 0.689, 0.655 without). For known categories nothing changes.
    """
    first = next((layer for layer in module.encoder.modules() if isinstance(layer, ConditionedLinear)), None)
    if first is not None:
        first.adapt()


def _scales(module: GenerativeModule) -> list[str]:
    """Names of the weights (n_out, C) that scale what c belongs to."""
    return [
        f"{name}.scale.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, ConditionedLinear) and layer.scale is not None
    ]


def _first_weights(module: GenerativeModule) -> list[str]:
    """Names of the weights (C, n_out) of the networks of c alone."""
    nets = [name for name in module.nets_of_c if getattr(module, name) is not None]
    return [f"{name}.body.linears.0.linear.weight" for name in nets]


def _batchwise(module: GenerativeModule) -> list[str]:
    """Names of the weights with a row for each batch."""
    return [f"likelihood.{name}" for name in module.likelihood.batchwise]


def grow(module: GenerativeModule, state: Mapping[str, Tensor], known: Sequence[int]) -> dict[str, Tensor]:
    """Weights and buffers for ``module`` from the ``state`` of one with fewer categories, ``known`` of each condition.

    Those of known categories are the same bits, so cells of known categories keep their outputs; those of a new
    category start at the mean over the known ones, scales at zero.
    """
    grown = dict(state)
    if not hasattr(module, "conditions"):
        return grown
    wanted = module.conditions.n_categories
    for name in _weights_on_c(module):
        grown[name] = widen(state[name], known, wanted)
    for name in _scales(module):
        grown[name] = torch.zeros(module.get_parameter(name).shape)
        if name in state:
            grown[name][:, ~new_columns(known, wanted, len(module.conditions.center))] = state[name].cpu()
    for name in _first_weights(module):
        grown[name] = widen(state[name].T, known, wanted).T.contiguous()
    for name in _batchwise(module):
        grown[name] = widen(state[name].T, known[:1], wanted[:1]).T.contiguous()
    return grown


def new_weights(module: GenerativeModule, known: Sequence[int]) -> dict[str, Tensor]:
    """Which weights belong to new categories, beyond the ``known`` ones of each condition.

    Name of a parameter -> bool mask that broadcasts to it; parameters without a new weight are left out.
    """
    conditions = getattr(module, "conditions", None)
    if conditions is None or tuple(known) == conditions.n_categories:
        return {}
    wanted, n_continuous = conditions.n_categories, len(conditions.center)
    new = new_columns(known, wanted, n_continuous)
    masks = dict.fromkeys(_weights_on_c(module) + _scales(module), new)
    masks |= dict.fromkeys(_first_weights(module), new[:, None])
    if tuple(known[:1]) != tuple(wanted[:1]):
        masks |= dict.fromkeys(_batchwise(module), new_columns(known[:1], wanted[:1])[:, None])
    return masks


def _kept(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """What sets a gradient to zero where the mask is false; the mask goes once to where the gradients are."""

    def keep(g: Tensor) -> Tensor:
        nonlocal mask
        mask = mask.to(g.device)
        return torch.where(mask, g, 0.0)

    return keep


@contextmanager
def only_new(module: GenerativeModule, known: Sequence[int], *, labels: bool = False) -> Iterator[None]:
    """Inside, training moves the weights of new categories and nothing else, not even the statistics of batch norm.

    Weight decay would move them all; the caller must leave it out. Without ``labels``, what a classifier
    (``module.classifiers``) has for new categories stays as it starts: cells would move its borders to where it is
    surest, whatever they are.
    """
    masks = new_weights(module, known)
    if not labels:
        masks = {name: mask for name, mask in masks.items() if name.split(".")[0] not in module.classifiers}
    hooks = []
    try:
        for name, weight in module.named_parameters():
            weight.requires_grad_(name in masks)
            if name in masks:
                hooks.append(weight.register_hook(_kept(masks[name])))
        with frozen_statistics(module):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight in module.parameters():
            weight.requires_grad_(True)
