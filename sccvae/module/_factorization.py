"""The text of a model: which factors it declares, for readers, diagrams and tests."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FACTOR = re.compile(r"(?P<kind>p|q|delta)\(\s*(?P<var>\w+)\s*(?:\|\s*(?P<parents>\w+(?:\s*,\s*\w+)*)\s*)?\)")


@dataclass(frozen=True)
class Factor:
    """One factor of a joint distribution, such as ``p(x|z,c)``.

    Attributes
    ----------
    kind
        ``"p"`` (generative), ``"q"`` (inference) or ``"delta"`` (a deterministic map, as in an autoencoder).
    variable
        The variable that the factor describes.
    parents
        The variables it is conditioned on, in the order in which they are written.
    """

    kind: str
    variable: str
    parents: tuple[str, ...] = ()

    def __str__(self) -> str:
        given = f"|{','.join(self.parents)}" if self.parents else ""
        return f"{self.kind}({self.variable}{given})"


@dataclass(frozen=True)
class Factorization:
    """The generative and inference factors of a model, as a reader would write them.

    Parameters
    ----------
    p
        Generative factors, for example ``"p(x|z,c) p(z)"``.
    q
        Inference factors, for example ``"q(z|x,c)"``. A deterministic encoder is written ``"delta(z|x)"``.

    Raises
    ------
    ValueError
        If the text holds anything that is not a factor, or describes a variable twice on one side.

    Examples
    --------
    >>> f = Factorization(p="p(x|z,c) p(z)", q="q(z|x,c)")
    >>> f.latent, f.observed, f.terms
    (('z',), ('x', 'c'), ('reconstruction', 'kl_z'))
    """

    p: str
    q: str

    def __post_init__(self) -> None:
        for side in (self.generative, self.inference):
            names = [f.variable for f in side]
            if len(set(names)) != len(names):
                msg = f"A variable has two factors on one side of p={self.p!r}, q={self.q!r}."
                raise ValueError(msg)

    @property
    def generative(self) -> tuple[Factor, ...]:
        """The factors of p, in the order written."""
        return _parse(self.p, kinds=("p", "delta"))

    @property
    def inference(self) -> tuple[Factor, ...]:
        """The factors of q, in the order written."""
        return _parse(self.q, kinds=("q", "delta"))

    @property
    def latent(self) -> tuple[str, ...]:
        """Variables that inference describes: never observed."""
        return tuple(f.variable for f in self.inference)

    @property
    def observed(self) -> tuple[str, ...]:
        """Variables that stand in the text but are not latent: data and conditions."""
        names: list[str] = []
        for f in (*self.generative, *self.inference):
            names += [v for v in (f.variable, *f.parents) if v not in self.latent and v not in names]
        return tuple(names)

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms of the negative ELBO that these factors imply.

        One ``reconstruction`` for the data x (source text 4.2.2, equation 4.8) and one ``kl_<variable>`` for each
        latent variable with a random q; a deterministic map (``delta``) has no divergence.
        """
        return ("reconstruction", *(f"kl_{f.variable}" for f in self.inference if f.kind == "q"))

    def __str__(self) -> str:
        return f"p: {self.p}\nq: {self.q}"


def _parse(text: str, kinds: tuple[str, ...]) -> tuple[Factor, ...]:
    factors = []
    for m in _FACTOR.finditer(text):
        parents = tuple(v.strip() for v in m["parents"].split(",")) if m["parents"] else ()
        factors.append(Factor(m["kind"], m["var"], parents))
    rest = _FACTOR.sub("", text).strip()
    if rest or not factors or any(f.kind not in kinds for f in factors):
        msg = f"Cannot read {text!r} as factors {' or '.join(kinds)}, such as '{kinds[0]}(x|z,c) {kinds[0]}(z)'."
        raise ValueError(msg)
    return tuple(factors)
