"""Triton implementations: one file per op, under the name that its reference has."""
