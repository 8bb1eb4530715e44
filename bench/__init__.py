"""Benchmarks. They measure through public doors only: HTTP, the command line, /proc."""
