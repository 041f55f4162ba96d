"""What an attack reads from models and sets: how sure, or how near, and held against others."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, log_expit
from scipy.stats import norm
from torch import Tensor

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]
GAMMA = 2.0
SHARED = 64  # models, below which all images share one deviation
LEAST = 1e-6


def sureness(logits: Tensor, labels: Tensor) -> Array:
    """Return log(p / (1 - p)) of each image's own class, float64 [n].

    = z_y - log sum over j != y of exp(z_j), without a difference of numbers near 1.
    Source: Carlini et al., IEEE S&P 2022 (arXiv 2112.03570), equation 6.
    Shapes: logits [n, k], labels int64 [n].
    """
    rows = logits.double()
    own = rows.gather(1, labels.view(-1, 1))
    rest = rows.scatter(1, labels.view(-1, 1), -np.inf).logsumexp(1)
    found: Array = (own.squeeze(1) - rest).numpy()
    return found


def lira(target: Array, references: Array, inside: Bools) -> Array:
    """Return the likelihood ratio of each image: in against out, both Gaussian over references.

    score = log N(s; mu_in, d_in) - log N(s; mu_out, d_out), s the target's sureness. With fewer
    than 64 references all images share one deviation within members and one within others.
    Source: as `sureness`, algorithm 1 (online), with its fixed variance for few models.
    Shapes: target [n]; references, inside [models, n].
    Images that are in all references, or in none, have no such ratio: nan.
    """
    sides = []
    for side in (inside, ~inside):
        held = np.where(side, references, np.nan)
        mean = _means(held)
        within = held - mean
        # Means were estimated from the same models: divide by what is left.
        free = np.maximum(side.sum(0) - 1, 0)
        if len(inside) >= SHARED:
            deviation = np.sqrt(np.nansum(within**2, 0) / np.maximum(free, 1))
        else:
            deviation = np.sqrt(np.nansum(within**2) / max(int(free.sum()), 1))
        sides.append(norm.logpdf(target, mean, np.maximum(deviation, LEAST)))
    found: Array = np.clip(sides[0] - sides[1], -1e12, 1e12)
    return found


def _means(held: Array) -> Array:
    """Return means over models of what is known, nan where nothing is."""
    counts = np.isfinite(held).sum(0)
    found: Array = np.where(counts > 0, np.nansum(held, 0) / np.maximum(counts, 1), np.nan)
    return found


def rmia(
    target: Array,
    references: Array,
    inside: Bools,
    population: Array,
    population_references: Array,
    gamma: float = GAMMA,
) -> Array:
    """Return the share of population images that each image beats by gamma.

    LR(x, z) = (P(x | target) / P(x)) / (P(z | target) / P(z)); P(x) the mean over references of
    members and others in equal parts, P(z) the mean over references. Nan as in `lira`.
    Source: Zarifzadeh, Liu and Shokri, ICML 2024 (arXiv 2312.03262), equations 4 to 8, online.
    Shapes: target [n]; references, inside [models, n]; population [z], population_references
    [models, z]; all are log(p / (1 - p)).
    """
    p = expit(references)
    own, rest = (_means(np.where(side, p, np.nan)) for side in (inside, ~inside))
    ratio = log_expit(target) - np.log(np.maximum((own + rest) / 2, LEAST))
    others = log_expit(population) - np.log(np.maximum(expit(population_references).mean(0), LEAST))
    beaten = np.sort(others)
    found: Array = np.searchsorted(beaten, ratio - np.log(gamma), "right") / len(beaten)
    found[np.isnan(ratio)] = np.nan
    return found


def nearness(images: Tensor, synthetic: Tensor) -> Array:
    """Return minus the logarithm of each image's distance to the nearest synthetic one [n].

    Distances are root mean squares over pixels, a millionth added: a copy stands out however near
    an image has others. Shapes: images [n, ...], synthetic [m, ...].
    """
    apart = torch.cdist(images.flatten(1).double(), synthetic.flatten(1).double())
    found: Array = -np.log((apart.amin(1) / math.sqrt(images[0].numel())).numpy() + LEAST)
    return found


def calibrated(target: Array, references: Array, inside: Bools) -> Array:
    """Return how much nearer each image is than it was, on average, without it.

    score = s - mean over references that have not seen it. Some images are near whatever the set.
    Source: difficulty calibration, Watson et al., ICLR 2022 (arXiv 2111.08440), section 4.
    Shapes and nan as in `lira`.
    """
    found: Array = target - _means(np.where(inside, np.nan, references))
    return found
