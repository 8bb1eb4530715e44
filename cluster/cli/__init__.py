"""`penstock`: the command line. A command imports what it needs when it runs: help is fast."""

from cluster.cli.main import main

__all__ = ["main"]
