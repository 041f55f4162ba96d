"""Images that differ little: candidates by a perceptual hash, then a look at both."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..sets import Splits

SIDE = 16  # of the thumbnails that are compared
DIFFERENCE = 0.015  # root mean square of two thumbnails' difference, intensities 0 to 1
CONTRAST = 0.05  # least standard deviation of a thumbnail: flat images are all alike
BITS = 4  # of 64 in which hashes may differ
BUCKET = 64  # candidates of one bucket that are compared with each other


def pairs(splits: Splits, numbers: Tensor) -> Iterator[tuple[int, int]]:
    """Yield positions (train, val and test in a row) of images that are alike but not identical.

    Two are near duplicates when their 16 x 16 thumbnails differ by less than 0.015 of the range of
    intensities (root mean square: 4 of 255 steps, what storing an image as JPEG once more changes),
    and the hashes of both agree but for 4 of 64 bits. The hash says of neighbors in an 8 x 9
    thumbnail which is brighter (difference hash). Hashes are compared where a quarter of their bits
    agrees, and of many alike the nearest 64 in order, so the search stays linear; it may miss some.
    Shapes: numbers int64 [n], equal for identical images.
    """
    seen, hashes = _thumbnails(splits)
    spread = seen.std(1)
    known: set[tuple[int, int]] = set()
    for quarter in range(4):
        key = (hashes >> np.uint64(16 * quarter)) & np.uint64(0xFFFF)
        order = np.lexsort((hashes, key))
        for step in range(1, BUCKET):
            one, other = order[:-step], order[step:]
            near = key[one] == key[other]
            if not near.any():
                break
            one, other = one[near], other[near]
            near = np.bitwise_count(hashes[one] ^ hashes[other]) <= BITS
            one, other = one[near], other[near]
            apart = torch.from_numpy(one), torch.from_numpy(other)
            near = (numbers[apart[0]] != numbers[apart[1]]).numpy()
            one, other = one[near], other[near]
            for start in range(0, len(one), 4096):
                a, b = one[start : start + 4096], other[start : start + 4096]
                gap = np.sqrt(np.square(seen[a] - seen[b]).mean(1))
                close = (gap < DIFFERENCE) & (spread[a] > CONTRAST)
                for x, y in zip(a[close].tolist(), b[close].tolist(), strict=True):
                    pair = (min(x, y), max(x, y))
                    if pair not in known:
                        known.add(pair)
                        yield pair


def _thumbnails(splits: Splits) -> tuple[np.ndarray, np.ndarray]:
    """Return thumbnails float32 [n, 256] and hashes uint64 [n] of all images, gray."""
    thumbs, hashes = [], []
    weights = torch.from_numpy(np.uint64(1) << np.arange(64, dtype=np.uint64).astype(np.uint64))
    for part in splits:
        for whole in part.blocks():
            for block in whole.split(256):
                pixels = block.float().div_(part.full).mean(1)
                if pixels.ndim == 4:  # of volumes the mean along depth
                    pixels = pixels.mean(1)
                gray = pixels.unsqueeze(1)
                thumbs.append(F.adaptive_avg_pool2d(gray, SIDE).flatten(1).numpy())
                small = F.adaptive_avg_pool2d(gray, (8, 9))[:, 0]
                brighter = (small[:, :, 1:] > small[:, :, :-1]).flatten(1).numpy()
                hashes.append((brighter * weights.numpy()).sum(1, dtype=np.uint64))
    return np.concatenate(thumbs), np.concatenate(hashes)
