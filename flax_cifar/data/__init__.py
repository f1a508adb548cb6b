"""Loading of data sets, their splits, and the batches that feed the training steps."""
