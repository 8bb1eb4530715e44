"""With and without: one small seeded experiment for each stabiliser, and Muon against AdamW.

`python -m training.experiments NAME...` writes JSON and PNG beside this file's `results`.
"""
