"""Convolutions of the library oneDNN, called from XLA programs on the CPU."""
