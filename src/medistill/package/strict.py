"""Readers that refuse what other readers read in two ways: JSON, and the header of safetensors."""

import json
import math
import re
from typing import Any, NamedTuple, NoReturn

from ..errors import PackageRefused
from ..records import Json

DEPTH = 16
# One pass: a string that nobody closed is one as well, else each quote in it would be tried anew.
STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
BRACKETS = re.compile(rb"[][{}]")
LARGEST = 2**53
MOST_HEADER = 64 << 10
MOST_TENSORS = 64
MOST_NUMBERS = 1 << 26
WIDTHS = {"U8": 1, "F16": 2, "I64": 8, "F32": 4}


class Held(NamedTuple):
    """Where a tensor lies in a file: its type, its shape, and its bytes from `begin` to `end`."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parsed(content: bytes, name: str, most: int) -> Json:
    """Return the object that a JSON text holds.

    Refused are more bytes than `most`, other encodings than UTF-8, keys that stand twice, numbers
    that are not finite or not exact in a double, more than 16 levels, and control characters.
    Raises: PackageRefused.
    """
    if len(content) > most:
        raise PackageRefused(f"found {name} of {len(content):,} bytes; expected {most:,} at most")
    _check_depth(content, name)
    try:
        found = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_once,
            parse_constant=_constant,
            parse_float=_finite,
            parse_int=_exact,
        )
    except (ValueError, RecursionError) as error:
        raise PackageRefused(f"{name} is no plain JSON ({error}); expected one object") from None
    if not isinstance(found, dict):
        raise PackageRefused(f"found no object in {name}; expected one")
    _check_texts(found, name)
    return found


def _check_depth(content: bytes, name: str) -> None:
    """Count brackets outside of strings before anything recurses over them."""
    depth = 0
    for bracket in BRACKETS.findall(STRINGS.sub(b"", content)):
        depth += 1 if bracket in b"[{" else -1
        if depth > DEPTH:
            raise PackageRefused(f"found more than {DEPTH} levels in {name}; expected fewer")


def _check_texts(value: Any, name: str) -> None:
    """Refuse what a terminal would obey, and halves of characters, which no file can hold."""
    if not "".join(texts_of(value)).replace("\n", " ").isprintable():
        raise PackageRefused(f"found a character in {name} that cannot be shown; expected text")


def texts_of(value: Any) -> list[str]:
    """Return all texts of a record, keys too, in no order."""
    found, left = [], [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, list):
            left += one
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError("a number is too large")
    return found


def _exact(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > LARGEST:
        raise ValueError("a whole number is too large")
    return int(text)


def header_of(head: bytes, total: int, name: str) -> dict[str, Held]:
    """Return what tensors a safetensors file holds, if it holds them in one way only.

    `head` is its first 8 + MOST_HEADER bytes of `total`, or all there are. Refused are a header
    that does not fit, keys that stand twice, metadata, types beside u8, f16, f32 and i64, sizes of
    0, and bytes that no tensor, or more than one, owns. A size is computed exactly, and before
    memory is asked for.
    Raises: PackageRefused.
    """
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > min(MOST_HEADER, len(head) - 8):
        raise PackageRefused(f"found a header beyond {name} or above {MOST_HEADER:,} bytes")
    text = head[8 : 8 + length]
    record = parsed(text.rstrip(b" "), f"the header of {name}", MOST_HEADER)
    if not 1 <= len(record) <= MOST_TENSORS:
        raise PackageRefused(f"found {len(record)} tensors in {name}; expected 1 to {MOST_TENSORS}")
    found = {key: _held(key, value, name) for key, value in record.items()}
    at = 0
    for held in sorted(found.values(), key=lambda one: one.begin):
        if held.begin != at:
            raise PackageRefused(f"found a hole or an overlap in {name}; expected neither")
        at = held.end
    if 8 + length + at != total:
        raise PackageRefused(f"found bytes of no tensor in {name}, or too few; expected all owned")
    return found


def _held(key: str, value: Any, name: str) -> Held:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise PackageRefused(f"found no tensor under {key[:40]!a} in {name}; expected one")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    if any(type(n) is not int or n < 0 for n in numbers) or len(offsets) != 2 or len(shape) > 6:
        raise PackageRefused(f"found a shape or place that is none in {name}; expected counts")
    if (
        not isinstance(kind, str)
        or kind not in WIDTHS
        or not shape
        or 0 in shape
        or math.prod(shape) > MOST_NUMBERS
    ):
        raise PackageRefused(f"found {ascii(kind)[:20]} of shape {shape[:6]} in {name}")
    begin, end = offsets
    if end - begin != WIDTHS[kind] * math.prod(shape):
        raise PackageRefused(f"found {end - begin} bytes for shape {shape} in {name}")
    return Held(kind, tuple(shape), begin, end)
