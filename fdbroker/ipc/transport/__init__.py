"""How a message and its descriptors get from one process to another, on this platform."""
