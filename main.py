"""Trains a small image network: python main.py --config=configs/s9.py

Any key of the config can be overridden, for instance --config.optimizer.learning_rate=0.1.
"""

from flax_cifar import __main__

if __name__ == "__main__":
  __main__.main()
