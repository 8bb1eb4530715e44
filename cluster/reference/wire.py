"""The gRPC services: their `.proto` files are the reference."""

from __future__ import annotations

from pathlib import Path

import protos

_HEAD = """# gRPC

The files below are the contract; stubs for Python lie beside them. Every service has health checks
and, where clients call it, reflection, so `grpcurl` needs no files. Inside a cluster every call
carries its token (`docs/security.md`). `penstock.batch.v1.Batch` is for clients
([batch jobs](../batch.md)); the others are between the cluster's own processes.
"""


def page() -> str:
    root = Path(str(protos.__file__)).parent
    lines = [_HEAD]
    for file in sorted(root.rglob("*.proto")):
        package = ".".join(file.parent.relative_to(root).parts)
        lines += [f"## {package}", "", "```protobuf", file.read_text().rstrip(), "```", ""]
    return "\n".join(lines)
