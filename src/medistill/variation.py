"""How much a dataset varies: numbers from a small sample of it, before anything is trained."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .backbones import ConvNet
from .errors import DataError
from .features import extract_fast, fixed
from .rng import Rng
from .sets import RealSet

NETWORKS = 3
WIDTH = 32
NEIGHBORS = 10
SAMPLE = 500
CUT = 0.1  # of the points, in TwoNN


@dataclass(frozen=True)
class Variation:
    """Numbers of a sample of a dataset.

    fisher           spread between class means over spread within classes, in the features of
                     random networks: tr(S_b) / tr(S_w), a mean over networks
    dimension_two_nn, dimension_mle   intrinsic dimension of the images, two estimators
    sharpness        label sharpness: the most that a label changes by distance in pixels
    modes            effective number of modes (Vendi score) of random features
    modes_within     the same within classes, a mean weighted by their sizes
    duplicates       share of images that equal an earlier one, pixel by pixel
    majority         share of the largest class: the score of always naming it
    entropy          of the class frequencies over that of even ones: 1 where classes are even
    """

    fisher: float
    dimension_two_nn: float
    dimension_mle: float
    sharpness: float
    modes: float
    modes_within: float
    duplicates: float
    majority: float
    entropy: float


def variation(real: RealSet, *, seed: int = 0, sample: int = SAMPLE) -> Variation:
    """Measure a sample of at most `sample` images, drawn with the classes' own frequencies.

    Source: Fisher, Annals of Eugenics 1936 (ratio of traces); Facco et al., Scientific Reports
    2017 (TwoNN); Levina and Bickel, NIPS 2004, as MacKay and Ghahramani average it (MLE, 10
    neighbors); Konz and Mazurowski, arXiv 2401.08865 (label sharpness); Friedman and Dieng, TMLR
    2023 (Vendi score, cosine kernel). Departures: random ConvNet-3-32 features in place of trained
    ones; sharpness runs over all pairs of the sample in place of drawn ones, in [0, 1] intensities.
    Raises: DataError when images have several labels, or fewer than three differ.

    Example:
        >>> from medistill.data import load
        >>> alike, unlike = (load(f"phantom:variation={v},n=100").train for v in (0, 1))
        >>> variation(alike).fisher < variation(unlike).fisher
        True
    """
    if real.labels.ndim > 1:
        raise DataError(
            f"found several labels of an image in {real.card.name}; expected one: variation is "
            "measured within and between classes"
        )
    rng = Rng(seed).child("variation")
    index = torch.randperm(len(real), generator=rng.at("sample"))[:sample].sort().values
    labels = real.labels.cpu()[index]
    images = real.normalized(index).cpu()
    pixels = (real.images.cpu()[index].flatten(1).double()) / real.full
    # Not by matrix products, whose rounding would set identical images apart.
    distances = torch.cdist(pixels, pixels, compute_mode="donot_use_mm_for_euclid_dist")
    ratios, scores, within = [], [], []
    for number in range(NETWORKS):
        network = fixed(ConvNet(width=WIDTH).build(real.card, rng.at("network", number)))
        features = extract_fast(network, images).double()
        ratios.append(fisher_ratio(features, labels))
        scores.append(vendi(features))
        parts = [features[labels == label] for label in labels.unique()]
        within.append(sum(len(part) * vendi(part) for part in parts) / len(features))
    counts = torch.bincount(real.labels.cpu()).double()
    shares = counts[counts > 0] / counts.sum()
    even = math.log(max(2, len(real.card.classes)))
    return Variation(
        fisher=sum(ratios) / NETWORKS,
        dimension_two_nn=two_nn(distances),
        dimension_mle=levina_bickel(distances, NEIGHBORS),
        sharpness=sharpness(distances, labels),
        modes=sum(scores) / NETWORKS,
        modes_within=sum(within) / NETWORKS,
        duplicates=1 - len(pixels.unique(dim=0)) / len(pixels),
        majority=float(shares.max()),
        entropy=float(-(shares * shares.log()).sum()) / even,
    )


def fisher_ratio(features: Tensor, labels: Tensor) -> float:
    """Return tr(S_b) / tr(S_w) of features [n, d]: infinite where no class spreads.

    Example:
        >>> x = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
        >>> fisher_ratio(x, torch.tensor([0, 0, 1, 1]))
        25.0
    """
    mean = features.mean(0)
    between = within = 0.0
    for label in labels.unique():
        part = features[labels == label]
        between += len(part) * float((part.mean(0) - mean).square().sum())
        within += float((part - part.mean(0)).square().sum())
    return between / within if within > 0 else math.inf


def vendi(features: Tensor) -> float:
    """Return exp(entropy of the eigenvalues of K / n), K the cosine kernel of features [n, d].

    Example:
        >>> round(vendi(torch.eye(4)), 6), round(vendi(torch.ones(4, 2)), 6)
        (4.0, 1.0)
    """
    unit = features.double()
    unit = unit / unit.norm(dim=1, keepdim=True).clamp_min(1e-12)
    kernel = unit @ unit.T / len(unit)
    values = torch.linalg.eigvalsh(kernel).clamp_min(0)
    values = values[values > 1e-12]
    return float((-(values * values.log()).sum()).exp())


def _different(distances: Tensor) -> Tensor:
    """Return sorted distances [m, n] of each point to the others, identical points once.

    Raises: DataError when fewer than three differ.
    """
    same = distances == 0
    first = ~torch.tril(same, -1).any(1)
    kept = distances[first][:, first]
    if len(kept) < 3:
        raise DataError(
            f"found {len(kept)} different images in the sample; expected 3 or more: the dimension "
            "of fewer cannot be estimated"
        )
    return kept.fill_diagonal_(math.inf).sort(1).values


def two_nn(distances: Tensor) -> float:
    """Return the TwoNN dimension from distances [n, n].

    With mu_i = r_2 / r_1 of the two nearest neighbors, in rising order: the slope through the
    origin of -log(1 - i / n) against log mu_i, the tenth with the largest mu left out. Identical
    points count once. (The likelihood n / sum log mu is no use here: a few near copies rule it.)
    Source: Facco et al., Scientific Reports 2017, algorithm of section "Methods".
    """
    near = _different(distances.clone())
    logs = (near[:, 1] / near[:, 0]).log().sort().values
    n = len(logs)
    kept = max(1, int((1 - CUT) * n))
    heights = -(1 - torch.arange(1, kept + 1, dtype=logs.dtype) / n).log()
    squares = float(logs[:kept].square().sum())
    return float((logs[:kept] * heights).sum()) / squares if squares > 0 else math.inf


def levina_bickel(distances: Tensor, neighbors: int) -> float:
    """Return the maximum-likelihood dimension from distances [n, n].

    1 / d = mean over points of mean_{j < k} log(T_k / T_j), T_j the distance to the j-th neighbor
    (the inverse is averaged, as MacKay and Ghahramani advise). Identical points count once.
    Source: Levina and Bickel, NIPS 2004, equation 8.
    """
    near = _different(distances.clone())
    k = min(neighbors, near.shape[1] - 1)
    logs = (near[:, k - 1 : k] / near[:, : k - 1]).log()
    inverse = float(logs.sum(1).div(max(1, k - 1)).mean())
    return 1 / inverse if inverse > 0 else math.inf


def sharpness(distances: Tensor, labels: Tensor) -> float:
    """Return max over pairs of [y_i != y_j] / ||x_i - x_j||; 0 where all labels are the same.

    Identical images of two classes are left out: they would make it infinite.
    Source: Konz and Mazurowski, arXiv 2401.08865, equation 3, with labels as one-hot corners.
    """
    apart = (labels.unsqueeze(1) != labels) & (distances > 0)
    return float(1 / distances[apart].min()) if apart.any() else 0.0
