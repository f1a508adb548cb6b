"""Data: where images come from, how they are batched and augmented."""
