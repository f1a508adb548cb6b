"""Programs beside the main one: python -m flax_cifar.tools.NAME."""
