"""How large an object of a given kind and position must be: the layout's word, in bytes."""

from __future__ import annotations

from penstock.blocks import BLOCK_TOKENS, CacheLayout, ComponentKind, ObjectKind

MAX_HEADER_BYTES = 1 << 18
"""No object's header may be larger: a component table has a few kilobytes."""


def payload_bytes(layout: CacheLayout, kind: ObjectKind, index: int) -> int:
    """Exact payload size of block `index` or of the state at position `index`.

    Raises ValueError for a state at a position below 1.
    """
    return layout.block_bytes if kind is ObjectKind.BLOCK else layout.state_bytes(index)


def largest_object_bytes(layout: CacheLayout) -> int:
    """Upper bound on header and payload of any object of this layout: what a reader will buffer."""
    state = 0
    for component in layout.components:
        match component.kind:
            case ComponentKind.COMPRESSED:
                rows = (BLOCK_TOKENS - 1) // component.ratio
            case ComponentKind.WINDOW:
                rows = component.ratio
            case ComponentKind.CARRY:
                rows = component.ratio - 1
            case ComponentKind.CARRY_OVERLAP:
                rows = 2 * component.ratio - 1
            case ComponentKind.LAST:
                rows = 1
        state += rows * component.row_bytes
    return 4 + MAX_HEADER_BYTES + max(layout.block_bytes, state)
