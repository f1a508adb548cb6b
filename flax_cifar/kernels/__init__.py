"""Functions equal to JAX's that are faster on a CPU, and the backend that chooses between them."""
