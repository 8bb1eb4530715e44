"""Certificates of a cluster: its own authority, its members, its front."""
