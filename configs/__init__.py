"""One file per published system and for the quick start; `common.py` holds every key."""
