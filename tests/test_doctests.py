"""The examples in docstrings."""

import doctest
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = [
  ".".join(path.relative_to(ROOT).with_suffix("").parts)
  for folder in ("flax_cifar", "benchmarks")
  for path in sorted((ROOT / folder).rglob("*.py"))
  if ">>> " in path.read_text(encoding="utf-8")
]


def test_examples_were_found():
  assert len(MODULES) > 15


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_the_output_they_show(name):
  result = doctest.testmod(importlib.import_module(name))
  assert result.attempted
  assert not result.failed
