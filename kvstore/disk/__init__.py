"""The disk tier: objects in append-only extents, named by an append-only log of their places."""
