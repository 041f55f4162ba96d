"""What a page of any form is put together from: paragraphs, tables and lists, by section."""

from typing import NamedTuple


class Table(NamedTuple):
    """Rows of text below a head; a head of empty words is none."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Listed(NamedTuple):
    """Points of a list."""

    points: list[str]


Block = str | Table | Listed


class Section(NamedTuple):
    """A titled part of the page: paragraphs, tables and lists."""

    title: str
    blocks: list[Block]
