"""A Secret as helm's own record keeper sends it: Kubernetes' protobuf, which this reads by hand.

Only what a Secret holds: `Unknown{typeMeta=1, raw=2}` behind four bytes of magic; in it
`Secret{metadata=1, data=2, type=3}`, `ObjectMeta{name=1, namespace=3, labels=11}`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\x00"


def secret_of(body: bytes) -> dict[str, Any]:
    """The Secret in the body of a request. Raises ValueError for anything else."""
    if not body.startswith(MAGIC):
        raise ValueError("no protobuf of Kubernetes")
    outer = dict(_fields(body[len(MAGIC) :]))
    kind = dict(_fields(outer[1]))[2].decode()
    if kind != "Secret":
        raise ValueError(f"a {kind} came as protobuf; only Secrets are read here")
    metadata: dict[str, Any] = {"labels": {}}
    found: dict[str, Any] = {"apiVersion": "v1", "kind": kind, "metadata": metadata, "data": {}}
    for number, value in _fields(outer[2]):
        if number == 1:
            for part, text in _fields(value):
                if part in (1, 3):
                    metadata[{1: "name", 3: "namespace"}[part]] = text.decode()
                elif part == 11:
                    pair = dict(_fields(text))
                    metadata["labels"][pair[1].decode()] = pair[2].decode()
        elif number == 2:
            pair = dict(_fields(value))
            found["data"][pair[1].decode()] = base64.b64encode(pair[2]).decode()
        elif number == 3:
            found["type"] = value.decode()
    return found


def _fields(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each field that has a length; numbers are passed over."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        if tag & 7 == 0:
            _, at = _varint(raw, at)
        elif tag & 7 == 2:
            size, at = _varint(raw, at)
            yield tag >> 3, raw[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {tag & 7} is in no Secret")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
