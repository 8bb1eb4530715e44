"""How a request outlives the workers and stores that it meets. `cluster/flow.py` tells when."""
