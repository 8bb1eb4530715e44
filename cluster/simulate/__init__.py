"""The cluster under a virtual clock: the router, plans and store of serving, workers by cost."""
