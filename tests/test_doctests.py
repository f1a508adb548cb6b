"""The examples in docstrings."""

import doctest
import importlib

import pytest

MODULES = (
  *(
    "flax_cifar.api",
    "flax_cifar.configs.variants",
    "flax_cifar.errors",
    "flax_cifar.optim",
    "flax_cifar.state",
  ),
  *("flax_cifar.data.augment.arguments", "flax_cifar.models.layer_table"),
  *("flax_cifar.run.config", "flax_cifar.run.plots", "flax_cifar.run.tables"),
  *("flax_cifar.run.workdir", "flax_cifar.files"),
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_the_output_they_show(name):
  result = doctest.testmod(importlib.import_module(name))
  assert result.attempted
  assert not result.failed
