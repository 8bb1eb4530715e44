"""The CPU kernel set: C compiled for this machine at first use, called through ctypes."""
