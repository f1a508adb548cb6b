"""Small CIFAR-10 networks in JAX and Flax: see README.md."""

from flax_cifar.zoo import list_models, load_pretrained

__all__ = ["list_models", "load_pretrained"]
