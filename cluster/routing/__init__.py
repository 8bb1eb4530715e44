"""Routing: the board of workers, the policies over it, and what each worker costs. Pure."""
