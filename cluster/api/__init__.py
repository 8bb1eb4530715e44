"""The OpenAI-compatible HTTP API over any `cluster.contracts.Service`."""

from cluster.api.app import create_app

__all__ = ["create_app"]
