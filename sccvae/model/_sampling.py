"""New cells from the generative model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch.distributions import Normal

from sccvae.model._base import evaluating, inference_batch
from sccvae.module import Batch
from sccvae.nn import check_sizes


class SamplingMixin:
    """Generation: z from the prior, then x from p(x|z,c) (source text 4.2.6)."""

    def sample(self, n: int, *, batch: Any | None = None, mean: bool = False, seed: int = 0) -> AnnData:
        """Generate ``n`` cells that never existed.

        Conditions are drawn as often as in the training data, continuous covariates stand at their training mean, and
        library sizes (for counts) are drawn from those of the training cells.

        Parameters
        ----------
        n
            Number of cells.
        batch
            Category of ``batch_key`` for all of them; None draws it. Only for models that read it (CVAE, GMVAE).
        mean
            Give the expected values instead of draws (for images: grey instead of black and white).
        seed
            Of all draws.

        Returns
        -------
        AnnData (n, genes): X sparse for counts, else dense, float32; obs with the conditions that the model reads;
        ``obsm["z"]``; where the set-up reads a layer, that too, a copy of X.

        Raises
        ------
        ValueError
            If the batch is not known, or the model does not read it, or ``n`` is not positive.
        TypeError
            If ``n`` is no whole number.
        """
        return self._sample(n, batch, mean=mean, seed=seed)

    def _sample(self, n: int, batch: Any | None, *, mean: bool, seed: int, **prior: Any) -> AnnData:
        """:meth:`sample`, with ``prior`` for :meth:`_prior_z`."""
        check_sizes(n=n)
        rng = np.random.default_rng(seed)
        frequencies, codes = np.asarray(self.reference["frequencies"]), self._known_codes
        if batch is not None:
            if self.schema.batch_key is None or not self._reads_conditions:
                why = "the model was set up without batch_key"
                if self.schema.batch_key is not None:
                    why = f"a {type(self).__name__} knows no batch; use a CVAE or a GMVAE"
                msg = f"batch={batch!r}: {why}."
                raise ValueError(msg)
            keep = codes[:, 0] == self._category_code(self.schema.batch_key, batch)
            codes, frequencies = codes[keep], frequencies[keep] / frequencies[keep].sum()
        codes = codes[rng.choice(len(codes), n, p=frequencies)]
        quantiles = self.reference["library_quantiles"]
        library = np.interp(rng.uniform(0, 100, n), np.arange(101), quantiles).astype(np.float32).reshape(-1, 1)
        return self._generate(codes, library, mean=mean, seed=seed, **prior)

    def _generate(self, codes: np.ndarray, library: np.ndarray, *, mean: bool, seed: int, **prior: Any) -> AnnData:
        """Cells with these codes (n, n_keys) and library sizes (n, 1), z from :meth:`_prior_z`."""
        self._check_if_trained(warn=True)
        module, schema = self.module.eval(), self._read_schema
        parts, latents = [], []
        counts = module.likelihood.support == "counts"
        with evaluating(seed):
            n_parts = -(-len(codes) // inference_batch(len(schema.var_names)))
            for rows in np.array_split(np.arange(len(codes)), max(1, n_parts)):
                batch = self._empty_batch(codes[rows], library[rows])
                z = self._prior_z(batch, rows, **prior)
                p_x = module.generative({"z": z}, batch)
                values = (p_x.mean if mean else p_x.sample()).cpu().numpy()
                parts.append(sparse.csr_matrix(values) if counts else values)
                latents.append(z.cpu().numpy())
        obs = pd.DataFrame(index=[f"generated-{i}" for i in range(len(codes))])
        for i, (key, categories) in enumerate(schema.categories.items()):
            obs[key] = pd.Categorical.from_codes(codes[:, i], categories=categories)
        for i, key in enumerate(schema.continuous):
            obs[key] = float(module.conditions.center[i])
        generated = AnnData(
            sparse.vstack(parts, format="csr") if counts else np.concatenate(parts),
            obs=obs,
            var=pd.DataFrame(index=schema.var_names),
            obsm={"z": np.concatenate(latents)},
        )
        # so that the model can read what it made
        if schema.layer is not None:
            generated.layers[schema.layer] = generated.X.copy()
        if schema.size_factor_key is not None:
            generated.obs[schema.size_factor_key] = library[:, 0] / self.reference["library_unit"]
        if "image_shape" in self.reference:
            generated.uns["image_shape"] = list(self.reference["image_shape"])
        return generated

    def _prior_z(self, batch: Batch, rows: np.ndarray, *, center: bool = False) -> torch.Tensor:
        """Draws of z from its prior, or its mean, (len(rows), d)."""
        p = self.module.prior(batch)["z"]
        shape = (len(rows), self.settings["n_latent"])
        if not isinstance(p, Normal):
            return p.mean.expand(shape) if center else p.sample(shape[:1])
        loc, scale = p.loc.expand(shape), p.scale.expand(shape)
        return loc if center else loc + scale * torch.randn(shape, device=loc.device)

    def _empty_batch(self, codes: np.ndarray, library: np.ndarray | None = None) -> Batch:
        """A batch with these codes (n, n_keys) whose x is not read; continuous covariates stand at their mean."""
        n, device = len(codes), self.module.device
        covariates = torch.zeros(n, len(self.schema.continuous), device=device)
        if self.schema.continuous and hasattr(self.module, "conditions"):
            covariates = covariates + self.module.conditions.center
        library = np.ones((n, 1), np.float32) if library is None else library
        x = torch.zeros(n, len(self.schema.var_names), device=device)
        return Batch(x, torch.from_numpy(codes).to(device), covariates, torch.from_numpy(library).to(device))
