"""Small CIFAR-10 networks in JAX and Flax: see README.md."""
