"""The journal: what may not be lost. Jobs, their items and results, uploaded files (ADR 0006)."""
