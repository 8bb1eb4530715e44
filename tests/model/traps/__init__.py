"""The traps of deepseek-v4.md section 7 as tests; docs/traps.md says which test holds which."""
