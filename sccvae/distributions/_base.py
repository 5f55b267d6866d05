"""What a likelihood is: the heads that turn a decoder's output into the distribution of one observation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from sccvae._rows import SparseRows


class Observation(ABC):
    """The distribution p(x|...) of a mini-batch of observations; features are independent given the latent variables.

    Attributes
    ----------
    mean
        Expected value of x, (..., n, G).
    takes_rows
        Whether :meth:`log_prob` also takes x as :class:`~sccvae.nn.SparseRows`.
    """

    mean: Tensor
    takes_rows: ClassVar[bool] = False

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log density or mass of ``x`` (n, G) in nats, summed over the G features: (..., n)."""

    def restrict(self, features: Tensor) -> Self:
        """The distribution of some features alone, those where ``features`` (G,) bool is true.

        Every parameter with an axis over the features keeps these; what is shared by all features, and indices, stay.
        """
        some = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] == features.shape:
                setattr(some, name, value[..., features])
        return some

    @abstractmethod
    def sample(self) -> Tensor:
        """Draw x, (..., n, G), without gradient."""

    def expression(self, library_size: Tensor | float = 1.0, out: Tensor | None = None) -> Tensor:
        """Normalised expression, (..., n, G): proportions times ``library_size`` for counts, else the mean.

        It is put into ``out``, of the same shape on any device, if that is given.
        """
        del library_size
        return self.mean if out is None else out.copy_(self.mean)


class Likelihood(nn.Module, ABC):
    """A family of distributions with the network heads that give its parameters.

    A likelihood is made with its settings alone, and handed to a module, which calls :meth:`build` once it knows the
    sizes. It may hold parameters of its own (a dispersion, a sigma).

    Parameters
    ----------
    **settings
        Plain JSON values, kept in ``settings`` and ``config``.

    Attributes
    ----------
    support
        ``"counts"`` (integers >= 0), ``"unit"`` (values in [0, 1]) or ``"real"``; the model checks the data against it.
    zero_stays_zero
        Whether :meth:`encoder_input` works value by value and leaves zero at zero: it may then be given those values
        alone that are not zero, (nnz,), with the library size of the cell of each, (nnz,), if it ``reads_library``.
    reads_library
        Whether :meth:`encoder_input` of such values needs the library size.
    """

    support: ClassVar[Literal["counts", "unit", "real"]]
    zero_stays_zero: ClassVar[bool] = False
    reads_library: bool = True

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    @abstractmethod
    def build(self, n_in: int, n_features: int, n_batch: int | None = None) -> Self:
        """Create the heads for a decoder output of width ``n_in`` and ``n_features`` features; return self.

        ``n_batch`` is the number of batches for batch-wise parameters; None if the decoder does not see the batch.
        """

    @abstractmethod
    def forward(self, h: Tensor, library: Tensor | None = None, batch_index: Tensor | None = None) -> Observation:
        """Give the distribution of x.

        Parameters
        ----------
        h
            Decoder output, (..., n, n_in).
        library
            Library size of each cell, (n, 1); used by count likelihoods only.
        batch_index
            Batch of each cell, (n,) int64; used by batch-wise parameters only.
        """

    def initialise(self, mean: Tensor) -> None:
        """Start the heads at the data: ``mean`` is each feature's mean (for counts: mean proportion), (G,).

        A family without heads to start this way leaves this as it is: nothing happens.
        """

    @property
    def batchwise(self) -> tuple[str, ...]:
        """Names of its parameters that have a row for each batch; none in most families."""
        return ()

    def observe(self, x: Tensor | SparseRows) -> Tensor | SparseRows:
        """What stands for the observation in the ELBO, (n, G): the data themselves unless a family resamples them."""
        return x

    def encoder_input(self, x: Tensor, library: Tensor | None = None) -> Tensor:
        """What the encoder sees of x (n, G) in cells of library size (n, 1): (n, G)."""
        del library
        return x

    @property
    def config(self) -> dict[str, Any]:
        """Name and settings as plain JSON values; :func:`as_likelihood` makes an equal object from it."""
        return {"name": type(self).__name__, **self.settings}


LIKELIHOODS: dict[str, type[Likelihood]] = {}
"""Short name or class name -> likelihood class."""


def register(*names: str):
    """Class decorator: make a likelihood known under its class name and ``names``, to be found when a model is loaded.

    Parameters
    ----------
    *names
        Short names.
    """

    def add(cls: type[Likelihood]) -> type[Likelihood]:
        LIKELIHOODS.update(dict.fromkeys((cls.__name__, *names), cls))
        return cls

    return add


def as_likelihood(spec: str | dict[str, Any] | Likelihood) -> Likelihood:
    """Turn a name, a saved configuration or a likelihood into a fresh, unbuilt likelihood.

    Parameters
    ----------
    spec
        ``"nb"``, ``"zinb"``, ``"poisson"``, ``"normal"``, ``"bernoulli"``, a class name, the ``config`` of a
        likelihood, or a
        likelihood (its settings are copied, so that two models never share parameters).

    Returns
    -------
    A likelihood without heads; see :meth:`Likelihood.build`.

    Raises
    ------
    ValueError
        If the name is not known.
    """
    if isinstance(spec, Likelihood):
        spec = spec.config
    settings = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = settings.pop("name")
    if name not in LIKELIHOODS:
        msg = f"No likelihood is called {name!r}; choose one of {sorted(LIKELIHOODS)} or pass a Likelihood object."
        raise ValueError(msg)
    return LIKELIHOODS[name](**settings)
