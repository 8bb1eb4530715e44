"""Training of `ledger`, the small DeepSeek-V4 model shipped with Penstock.

`documents` and `filler` are pure Python, so that `penstock demo` can use them without torch.
"""
