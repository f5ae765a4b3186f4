"""Random draws that depend on nothing but the seed and the name of what is drawn."""

from __future__ import annotations

from hashlib import sha256

import numpy as np


def generator(seed: int, step: str, covariate: str = "", condition: str = "") -> np.random.Generator:
    """Return a generator of its own for one draw (docs/science.md).

    The same (seed, step, covariate, condition) gives the same draw whatever the row order, the number of threads,
    PYTHONHASHSEED, the platform, or what else is drawn before it.

    Parameters
    ----------
    seed : int
        Seed of the draws.
    step : str
        What is drawn, by name.
    covariate : str
        Of the group that is drawn from.
    condition : str
        Its name.

    Returns
    -------
    np.random.Generator
    """
    digest = sha256(f"{step}/{covariate}/{condition}".encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
