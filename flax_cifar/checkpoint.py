"""Checkpoints by Orbax: the latest and the best one, saved in the background."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import (
  AnyPreservationPolicy,
  BestN,
  LatestN,
)

from flax_cifar.errors import UserError, list_differences
from flax_cifar.metrics import Totals
from flax_cifar.partition import replicated
from flax_cifar.state import TrainState


class Checkpoints:
  """The checkpoints in `folder`, numbered by step.

  Kept are the latest, to resume from, and the one with the highest validation accuracy (the mean
  over the seeds).
  """

  def __init__(self, folder: pathlib.Path):
    best = BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
      best_fn=_accuracy,  # without it Orbax does not write the metrics down
      preservation_policy=AnyPreservationPolicy([LatestN(1), best]),
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(
      folder.absolute(), item_handlers=ocp.StandardCheckpointHandler(), options=options
    )
    self._folder = folder

  @property
  def latest_step(self) -> int | None:
    """The step of the newest checkpoint; None where there is none."""
    return self._manager.latest_step()

  def save(
    self, step: int, state: TrainState, totals: Totals, validation: Mapping[str, Any] | None
  ) -> None:
    """Starts to save what a run must remember at `step`; returns before it is written.

    Args:
      step: steps done.
      state: the train state; it may be donated as soon as this returns.
      totals: train metrics of the unfinished epoch.
      validation: `accuracy` and `loss` at the end of an epoch, () or (seeds,); None within one.
    """
    if step != self.latest_step:
      tree = {"state": state, "totals": totals}
      means = validation and {name: float(np.mean(value)) for name, value in validation.items()}
      self._manager.save(step, args=ocp.args.StandardSave(tree), metrics=means)

  def restore_or(self, like: TrainState, totals: Totals, mesh: Mesh) -> tuple[TrainState, Totals]:
    """The newest checkpoint, or the arguments where there is none; replicated over `mesh`.

    Args:
      like: the state to start with; a checkpoint must have its shapes and types.
      totals: the totals to start with.
      mesh: where to put the state.

    Raises:
      UserError: the checkpoint is of another network or damaged.
    """
    step = self.latest_step
    if step is None:
      return jax.device_put(like, replicated(mesh)), totals
    self._check_shapes(step, like)
    sharding = replicated(mesh)
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like
    )
    try:
      tree = self._manager.restore(
        step, args=ocp.args.StandardRestore({"state": abstract, "totals": totals})
      )
    except Exception as error:  # Orbax raises ValueError, JSONDecodeError and plain Exception
      raise self._damaged(step, error) from error
    return tree["state"], tree["totals"]

  def _check_shapes(self, step: int, like: TrainState) -> None:
    try:
      metadata = self._manager.item_metadata(step)
      saved = {
        _name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(metadata["state"]["params"])
      }
    except Exception as error:
      raise self._damaged(step, error) from error
    expected = {
      _name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(like.params)
    }
    mismatches = list_differences(saved, expected)
    if mismatches:
      raise UserError(
        f"checkpoint {self._path(step)!r} is of another network: {'; '.join(mismatches[:3])} "
        f"({len(mismatches)} differ). Choose another --workdir or the config it was made with."
      )

  def _damaged(self, step: int, error: Exception) -> UserError:
    return UserError(
      f"checkpoint {self._path(step)!r} is damaged ({_first_line(error)}); delete that folder "
      "to go on from an older one, or choose another --workdir."
    )

  def _path(self, step: int) -> str:
    return str(self._folder / str(step))

  def close(self) -> None:
    """Waits until everything is written."""
    self._manager.wait_until_finished()
    self._manager.close()


def _accuracy(metrics: dict[str, float]) -> float:
  return metrics["accuracy"]


def _name(path: Any) -> str:
  return "/".join(str(getattr(key, "key", key)) for key in path)


def _first_line(error: Exception) -> str:
  return str(error).strip().split("\n")[0][:200] or type(error).__name__
