"""Lend open file descriptors to other processes, and close them when the last one is back."""

__version__ = "0.1.0"
