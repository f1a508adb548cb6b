"""Compares two finished runs bit for bit."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

VARYING_FIELDS = ("seconds", "images_per_second", "train_seconds", "date", "command", "commit")

Problems = list[str]  # why a fault was not survived; empty if it was


def compare(reference: pathlib.Path, workdir: pathlib.Path) -> Problems:
  """The differences between two finished runs, except in VARYING_FIELDS."""
  problems = []
  for name, read in (("metrics.jsonl", read_metrics), ("result.json", read_result)):
    try:
      if read(workdir / name) != read(reference / name):
        problems.append(f"{name} differs")
    except (OSError, ValueError) as error:
      problems.append(f"{name} cannot be read: {error}")
  return problems or compare_arrays(reference, workdir)


def read_metrics(path: pathlib.Path) -> list[Any]:
  return [drop_varying_fields(json.loads(line)) for line in path.read_text().splitlines()]


def read_result(path: pathlib.Path) -> Any:
  return drop_varying_fields(json.loads(path.read_text()))


def drop_varying_fields(record: Mapping[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in record.items() if key not in VARYING_FIELDS}


def compare_arrays(reference: pathlib.Path, workdir: pathlib.Path) -> Problems:
  """The differences between the last checkpoints of two runs."""
  try:
    theirs, ours = (restore_last(folder) for folder in (reference, workdir))
  except Exception as error:  # whatever Orbax raises
    return [f"the last checkpoint cannot be restored: {type(error).__name__}: {error}"]
  if theirs.keys() != ours.keys():
    return [f"the last checkpoint has other arrays: {sorted(theirs.keys() ^ ours.keys())[:3]}"]
  names = [name for name in theirs if not same_bits(theirs[name], ours[name])]
  return [f"{len(names)} arrays of the last checkpoint differ, {names[0]} first"] if names else []


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
  return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def restore_last(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of the last checkpoint by name, and its step, as Orbax alone reads them."""
  import jax
  import orbax.checkpoint as ocp

  step = list_steps(workdir)[-1]
  metadata = next((workdir / "checkpoints" / str(step)).glob("*/_METADATA"))
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(metadata.parent.absolute())
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    "step of the checkpoint": np.asarray(step),
    **{jax.tree_util.keystr(path): as_numpy(leaf) for path, leaf in leaves},
  }


def as_numpy(leaf: Any) -> np.ndarray:
  """`leaf` as a NumPy array; a random key becomes its data."""
  import jax

  if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf)


def list_steps(workdir: pathlib.Path) -> list[int]:
  """The steps of the committed checkpoints, in order."""
  names = (path.name for path in (workdir / "checkpoints").glob("*"))
  return sorted(int(name) for name in names if name.isdecimal())
