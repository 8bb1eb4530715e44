"""Who calls, and how much they may: keys, scopes, quotas. For HTTP and the batch service."""
