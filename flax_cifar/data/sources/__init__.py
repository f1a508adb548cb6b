"""The data sets by kind: how each is found, downloaded, read, drawn or written."""
