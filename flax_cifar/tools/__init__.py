"""Programs beside the main one, flax_cifar NAME, and what they share.

`command_line` reads their flags; `first_steps` serves `find_lr` and `profile`, `jobs` and `shards`
serve `sweep`.
"""
