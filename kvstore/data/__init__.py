"""Bytes of large objects between hosts, beside gRPC: `docs/store.md`, "The data port"."""
