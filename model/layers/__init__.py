"""One file per sublayer of a block."""
