"""The object tier: a bucket behind fsspec, shared by nodes."""
