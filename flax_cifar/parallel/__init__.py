"""Devices, seeds and processes: how one run is spread over many."""
