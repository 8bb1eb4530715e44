"""hypothesis-jsonschema's `from_schema`, for the hypothesis that is installed.

Its last release (0.23.1, 2024) drives `many` by `while elements.more()`, which hypothesis has since
replaced by a context manager; the method is added here, in its words.
"""

from __future__ import annotations

from hypothesis.internal.conjecture import utils
from hypothesis_jsonschema import from_schema

__all__ = ["from_schema"]


def _more(elements: utils.many) -> bool:
    if not hasattr(elements, "_steps"):
        elements.__enter__()
        elements._steps = iter(elements)
    try:
        next(elements._steps)
    except StopIteration:
        elements.__exit__(None)
        return False
    return True


if not hasattr(utils.many, "more"):
    utils.many.more = _more
