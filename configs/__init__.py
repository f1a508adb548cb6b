"""One file per network and for the quick start; `common.py` holds every key."""
