"""Several seeds at once: their arrays are stacked along a first axis, which those of one seed lack.

So a run of one seed computes what it would if there were no others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def over_seeds(
  function: Callable[..., Any], num_seeds: int, in_axes: Any, out_axes: Any = 0
) -> Callable[..., Any]:
  """`function` for each seed at once, with the axes as `jax.vmap` takes them."""
  return function if num_seeds == 1 else jax.vmap(function, in_axes, out_axes)


def stack_seeds(trees: Sequence[Any]) -> Any:
  """Joins a tree per seed."""
  return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def take_seed(tree: Any, num_seeds: int, number: int) -> Any:
  """The tree of one seed, counted from 0."""
  return tree if num_seeds == 1 else jax.tree.map(lambda leaf: leaf[number], tree)


def first_seed(tree: Any, num_seeds: int) -> Any:
  """The tree of the first seed."""
  return take_seed(tree, num_seeds, 0)


def create_keys(seed: int, num_seeds: int) -> jax.Array:
  """The random key of each of the runs with `seed`, `seed` + 1, ..."""
  return stack_seeds([jax.random.key(seed + number) for number in range(num_seeds)])


def describe_seeds(name: str, values: Any) -> dict[str, Any]:
  """What a record holds of `values`, () or (seeds,): their mean, and of several seeds a list."""
  fields: dict[str, Any] = {name: float(np.mean(values))}
  if np.ndim(values):
    fields[f"{name}_per_seed"] = np.asarray(values).tolist()
  return fields
