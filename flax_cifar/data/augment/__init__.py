"""Augmentation on the device or on the host, mixing of examples, and normalization."""
