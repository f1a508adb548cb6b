"""A run around its steps: its config, parts, folder, checkpoints, log, plots and result."""
