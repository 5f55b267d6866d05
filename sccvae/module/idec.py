"""Improved deep embedded clustering: an autoencoder whose latent space is drawn to cluster centres."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sccvae.distributions import Normal, Observation, kl_categorical
from sccvae.module._base import Batch, GenerativeModule
from sccvae.module._factorization import Factorization
from sccvae.nn import MLP, Linear, as_corruption, check_sizes


class IDEC(GenerativeModule):
    """Autoencoder with square error and a clustering head (Guo et al. 2017).

    A cell belongs to centre j with q_j ~ 1 / (1 + ||z - mu_j||^2), Student's t with one degree of freedom (equation 2).
    The head is trained towards the sharpened p_j ~ q_j^2 / f_j (equation 3), f_j being the sum of q_j over all training
    cells, with ``gamma`` G KL(p || q) added to the error; the error keeps the local structure of the data.

    Parameters
    ----------
    n_features
        Number G of features.
    n_components
        Number K of centres.
    gamma
        Weight of the clustering loss beside the mean square error of a feature, as in the authors' program: beside the
        sum over features of equation 5 it counts G times.
    noise, noise_level
        Corruption of the input while the autoencoder is pretrained, as for :class:`sccvae.module.AE`.
    n_latent, n_hidden, n_layers, activation, norm, dropout, skip
        As for :class:`sccvae.module.AE`.

    Attributes
    ----------
    stage
        ``"clustering"``, or ``"pretraining"``: a denoising autoencoder.
    frequencies
        f, (K,); the training brings it up to date.

    Raises
    ------
    ValueError
        If a number is out of range.

    References
    ----------
    Guo, Gao, Liu, Yin 2017, Improved deep embedded clustering with local structure preservation, IJCAI.
    """

    factors = Factorization(p="p(x|z)", q="delta(z|x)")
    #: What begins the names of the weights that a stage learns.
    LEARNED: ClassVar = {
        "pretraining": ("encoder", "latent", "decoder", "likelihood"),
        "clustering": ("",),
    }

    def __init__(
        self,
        n_features: int,
        n_components: int = 10,
        *,
        gamma: float = 0.1,
        noise: Literal["gaussian", "mask"] | None = "mask",
        noise_level: float = 0.2,
        n_latent: int = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        activation: str = "relu",
        norm: Literal["batch", "layer"] | None = "batch",
        dropout: float = 0.0,
        skip: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(n_latent=n_latent)
        if gamma < 0:
            msg = f"gamma={gamma} must not be negative."
            raise ValueError(msg)
        self.weight, self.n_latent = gamma * n_features, n_latent
        self.stage: Literal["pretraining", "clustering"] = "clustering"
        mlp = {"activation": activation, "norm": norm, "dropout": dropout, "skip": skip}
        mlp["n_hidden"] = [n_hidden] * n_layers
        self.corruption = as_corruption(noise, noise_level)
        self.encoder = MLP(n_features, **mlp)
        self.latent = Linear(self.encoder.n_out, n_latent)
        self.decoder = MLP(n_latent, **mlp)
        self.likelihood = Normal(sigma="unit").build(self.decoder.n_out, n_features)
        self._noted: tuple[Batch, Tensor] | None = None  # z of a mini-batch, from its error for its penalty
        self.set_components(n_components)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but z of a mini-batch: it hangs on a graph, which cannot be copied."""
        return self.__dict__ | {"_noted": None}

    def set_components(self, n_components: int) -> None:
        """Make what depends on K anew: the centres, at random."""
        check_sizes(n_components=n_components)
        self.n_components = n_components
        device = self.device
        self.centers = nn.Parameter(torch.randn(n_components, self.n_latent, device=device))
        self.register_buffer("frequencies", torch.ones(n_components, device=device))

    @torch.no_grad()
    def place(self, loc: Tensor) -> None:
        """Put the centres at ``loc``, (K, d)."""
        if loc.shape != self.centers.shape:
            msg = f"loc {tuple(loc.shape)}: {tuple(self.centers.shape)} needed."
            raise ValueError(msg)
        self.centers.copy_(loc)

    def inference(self, batch: Batch) -> dict[str, Tensor]:
        """Give z = E(x), (n, d); of a corrupted x in pretraining."""
        x = self.corruption(batch.dense) if self.stage == "pretraining" else batch.dense
        return {"z": self.latent(self.encoder(x))}

    def generative(self, latents: dict[str, Tensor], batch: Batch) -> Observation:
        """D(z), (..., n, G), as the mean of a unit normal."""
        return self.likelihood(self.decoder(latents["z"]))

    def elbo_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Square error of each observation, (n,)."""
        latents = self.inference(batch)
        self._noted = (batch, latents["z"]) if self.training else None
        p_x = self.generative(latents, batch)
        error = (batch.dense - p_x.mean).square()
        return {"reconstruction": (error if batch.present is None else error[:, batch.present[0]]).sum(-1)}

    def log_q_y(self, z: Tensor) -> Tensor:
        """Log of the soft assignment q, (n, K), for z (n, d) (equation 2)."""
        distance = (z[:, None] - self.centers).square().sum(-1)
        return (-torch.log1p(distance)).log_softmax(-1)

    def classify(self, batch: Batch) -> Tensor:
        """Soft assignment q of each cell to the centres, (n, K)."""
        return self.log_q_y(self.inference(batch)["z"]).exp()

    def log_target(self, log_q: Tensor) -> Tensor:
        """Log of the target p, (n, K), for log q (n, K); without gradient (equation 3)."""
        return (2 * log_q.detach() - self.frequencies.log()).log_softmax(-1)

    def penalties(self, batch: Batch, late: float | Tensor) -> dict[str, Tensor]:
        """``clustering``: ``gamma`` G KL(p || q), the mean over the batch (equation 6); z is that of the error."""
        del late
        (of, z), self._noted = self._noted or (None, None), None
        if self.stage == "pretraining":
            return {}
        log_q = self.log_q_y(z if of is batch else self.inference(batch)["z"])
        return {"clustering": self.weight * kl_categorical(self.log_target(log_q), log_q).mean()}
