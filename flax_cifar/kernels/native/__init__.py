"""Kernels in C++, which a compiler of this machine compiles at their first use."""
