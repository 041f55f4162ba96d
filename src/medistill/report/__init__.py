"""Pages made from result files: whoever writes one never runs anything again."""

from .page import report

__all__ = ["report"]
