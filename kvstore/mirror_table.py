"""One node's objects as a mirror holds them: `NameSet` (compact), `NodeView` (its life). Pure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore.mirror import NAME_BYTES
from penstock.errors import StoreUnavailableError
from protos.penstock.kv.v1 import kv_pb2

Names = npt.NDArray[np.uint64]
MOST_NAMES = 1 << 22
"""Of one node; two tiers with the default `max_objects` have half of it."""
_LEAST_MERGE = 4_096
_NO_NAMES: Names = np.empty(0, np.uint64)


def names_of(raw: bytes) -> Names:
    """[N] names from N times 8 bytes. Raises StoreUnavailableError for another length."""
    if len(raw) % NAME_BYTES:
        raise StoreUnavailableError("the store node sent names of objects that are no whole names")
    return np.frombuffer(raw, np.dtype("<u8")).astype(np.uint64, copy=False)


class NameSet:
    """A set of 64-bit names: a sorted array, and a dictionary of what changed since it was made.

    8 bytes a name, and the dictionary, which is merged when it has more than 1/64 of the names (and
    4,096): a merge of a million names takes some ms.
    """

    def __init__(self, names: Names = _NO_NAMES) -> None:
        self._sorted: Names = np.unique(names)
        self._changed: dict[int, bool] = {}

    def __len__(self) -> int:
        self._merge()
        return len(self._sorted)

    def has(self, names: Names) -> npt.NDArray[np.bool_]:
        """[N] bool for [N] names."""
        found = self._at(names)[1]
        if self._changed:
            changed = self._changed
            for at, name in enumerate(names.tolist()):
                present = changed.get(name)
                if present is not None:
                    found[at] = present
        return found

    def change(self, stored: Names, removed: Names) -> None:
        """Beyond MOST_NAMES more are not taken: they are misses."""
        self._changed.update(dict.fromkeys(removed.tolist(), False))
        if len(self._sorted) + len(self._changed) + len(stored) > MOST_NAMES:
            self._merge()
            stored = stored[: max(0, MOST_NAMES - len(self._sorted))]
        self._changed.update(dict.fromkeys(stored.tolist(), True))
        if len(self._changed) > max(_LEAST_MERGE, len(self._sorted) // 64):
            self._merge()

    def _at(self, names: Names) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
        """Where each name stands in the sorted array, or would, and whether it does."""
        places = np.searchsorted(self._sorted, names)
        if not len(self._sorted):
            return places, np.zeros(len(names), np.bool_)
        return places, self._sorted[np.minimum(places, len(self._sorted) - 1)] == names

    def _merge(self) -> None:
        if not self._changed:
            return
        names: Names = np.fromiter(self._changed, np.uint64, len(self._changed))
        present = np.fromiter(self._changed.values(), np.bool_, len(self._changed))
        places, found = self._at(names)
        kept = np.ones(len(self._sorted), np.bool_)
        kept[places[found & ~present]] = False
        rest = self._sorted[kept]
        fresh = np.sort(names[present & ~found])
        self._sorted = np.insert(rest, np.searchsorted(rest, fresh), fresh)
        self._changed = {}


class NodeView:
    """What one node has said of itself. The picture before stays until a new one is whole."""

    def __init__(self) -> None:
        self.node_id = ""
        self.epoch = 0
        self.seq = 0
        self.names = NameSet()
        self.heard_at = float("-inf")
        """On the caller's clock; the last message of a whole picture."""
        self._parts: list[Names] | None = None

    def begin(self) -> None:
        """A new subscription: its first messages are a snapshot."""
        self._parts = []

    def take(self, events: kv_pb2.IndexEvents, now: float) -> None:
        """Raises StoreUnavailableError for messages that do not follow from one another; then the
        caller subscribes again.
        """
        if events.snapshot != (self._parts is not None):
            raise StoreUnavailableError("the store node's events came in no possible order")
        if self._parts is None:
            if (events.node_id, events.epoch) != (self.node_id, self.epoch):
                raise StoreUnavailableError("the store node changed its name in mid-stream")
            if events.seq < self.seq:
                raise StoreUnavailableError("the store node's events went back")
            self.names.change(names_of(events.stored), names_of(events.removed))
        else:
            if sum(map(len, self._parts)) < MOST_NAMES:
                self._parts.append(names_of(events.stored))
            if not events.complete:
                return
            self.names = NameSet(np.concatenate([_NO_NAMES, *self._parts])[:MOST_NAMES])
            self._parts = None
            self.node_id, self.epoch = events.node_id, events.epoch
        self.seq = events.seq
        self.heard_at = now
