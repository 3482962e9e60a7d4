"""What `fdbroker serve` adds to the server: signals, readiness, limits, its owner."""
