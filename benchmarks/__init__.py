"""How long lending takes, always beside the least that lending can be.  See README.md."""
