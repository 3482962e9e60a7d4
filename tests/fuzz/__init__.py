"""Fuzzing of the broker's receive path: see target.py, and `python -m tests.fuzz --help`."""
