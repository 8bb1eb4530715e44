"""Triton implementations: one file per op, under the name that its reference has.

A jitted function whose name begins with an underscore is a kernel; the others are called by one.
"""
