"""Checkpoints by Orbax: the latest ones and the best one, saved in the background and sealed."""

import contextlib
import pathlib
import re
import time
from collections.abc import Iterator, Mapping
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

from flax_cifar.errors import UserError, list_differences, require
from flax_cifar.metrics import Totals
from flax_cifar.partition import replicated
from flax_cifar.run_log import Record
from flax_cifar.seal import put_out_of_the_way, set_damaged_aside, settle, write_seal
from flax_cifar.state import TrainState, name_leaf

Restored = tuple[TrainState, Totals, list[Record]]


class Checkpoints:
  """The checkpoints in `folder`, numbered by step.

  Each holds all that a run must remember: the train state, the totals of the unfinished epoch and
  the records of the finished ones. Kept are the latest `keep`, to resume from, and the one with
  the highest validation accuracy (the mean over the seeds).

  A checkpoint appears whole and sealed, or not at all. Whatever else is found in the folder is
  set aside at once, in `damaged` beside it: Orbax would take the highest number for the latest
  checkpoint, and save none with a lower one.
  """

  def __init__(self, folder: pathlib.Path, *, keep: int):
    self._saved: tuple[int, int] | None = None
    self._folder = folder
    settle(folder)
    self._set_aside = set_damaged_aside(folder, folder.parent / "damaged")
    best = BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
      best_fn=_accuracy,  # without it Orbax does not write the metrics down
      preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
      cleanup_tmp_directories=True,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
    )
    self._manager = ocp.CheckpointManager(
      folder.absolute(),
      item_handlers={"state": ocp.StandardCheckpointHandler(), "log": ocp.JsonCheckpointHandler()},
      options=options,
    )

  @property
  def latest_step(self) -> int | None:
    """The step of the newest checkpoint; None where there is none."""
    return self._manager.latest_step()

  def save(
    self,
    step: int,
    state: TrainState,
    totals: Totals,
    records: list[Record],
    validation: Mapping[str, Any] | None = None,
  ) -> None:
    """Starts to save what a run must remember at `step`; returns before it is written.

    Args:
      step: steps done. What was saved there is replaced if it had fewer records: it was made
        before the validation.
      state: the train state; it may be donated as soon as this returns.
      totals: train metrics of the unfinished epoch.
      records: of the finished epochs; the list may grow as soon as this returns.
      validation: `accuracy` and `loss` at the end of an epoch, () or (seeds,); None within one.

    Raises:
      UserError: this checkpoint, or the one before it, cannot be written.
    """
    if (step, len(records)) == self._saved:
      return
    sums = {name: value.tolist() for name, value in totals.items()}
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      log=ocp.args.JsonSave({"totals": sums, "records": list(records)}),
    )
    means = validation and {name: float(np.mean(value)) for name, value in validation.items()}
    with self._explain_failure():
      if step == self.latest_step:
        self._manager.wait_until_finished()
        put_out_of_the_way(self._folder / str(step))
        self._manager.reload()
      self._manager.save(step, args=items, metrics=means)
    self._saved = (step, len(records))

  def _seal(self) -> None:
    """Orbax calls this when all is written, before it gives the folder its final name."""
    for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
      write_seal(path)

  def wait(self) -> None:
    """Waits until everything is written.

    Raises:
      UserError: it cannot be.
    """
    with self._explain_failure():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def close(self) -> None:
    """Waits until everything is written, and ends what does it; raises as `wait`."""
    try:
      self.wait()
    finally:
      with contextlib.suppress(Exception):  # what `wait` has raised, once more
        self._manager.close()
      settle(self._folder)

  @contextlib.contextmanager
  def _explain_failure(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax raises OSError, ValueError and others
      raise UserError(
        f"a checkpoint could not be written to {str(self._folder)!r} ({_first_line(error)}); "
        "those before it are kept. Make room, or the folder writable, and the same command goes on."
      ) from error

  def restore_or(self, like: TrainState, totals: Totals, mesh: Mesh) -> Restored:
    """The newest checkpoint, replicated over `mesh`; where there never was one the arguments.

    Args:
      like: the state to start with; a checkpoint must have its shapes and types.
      totals: the totals to start with.
      mesh: where to put the state.

    Returns:
      The state, the totals of the unfinished epoch and the records of the finished ones.

    Raises:
      UserError: the checkpoint is of another network, or every one was damaged.
    """
    step = self.latest_step
    if step is None:
      if self._set_aside:
        raise UserError(
          f"no checkpoint is left: {'; '.join(self._set_aside)}. Choose another --workdir, or "
          "delete this one to start anew."
        )
      return jax.device_put(like, replicated(mesh)), totals, []
    self._check_shapes(step, like)
    sharding = replicated(mesh)
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like
    )
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), log=ocp.args.JsonRestore())
    try:
      restored = self._manager.restore(step, args=items)
    except Exception as error:  # Orbax raises ValueError, JSONDecodeError and plain Exception
      raise self._unreadable(step, error) from error
    sums = {name: np.asarray(value) for name, value in restored["log"]["totals"].items()}
    records = restored["log"]["records"]
    self._saved = (step, len(records))
    return restored["state"], sums, records

  def _check_shapes(self, step: int, like: TrainState) -> None:
    try:
      metadata = self._manager.item_metadata(step)["state"]
      saved = {
        name_leaf(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(metadata["params"])
      }
    except Exception as error:
      raise self._unreadable(step, error) from error
    expected = {
      name_leaf(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(like.params)
    }
    mismatches = list_differences(saved, expected)
    if mismatches:
      raise UserError(
        f"checkpoint {self._path(step)!r} is of another network: {'; '.join(mismatches[:3])} "
        f"({len(mismatches)} differ). Choose another --workdir or the config it was made with."
      )

  def _unreadable(self, step: int, error: Exception) -> UserError:
    return UserError(
      f"checkpoint {self._path(step)!r} is whole but cannot be read ({_first_line(error)}); it "
      "may be of another version. Move it elsewhere to go on from an older one."
    )

  def _path(self, step: int) -> str:
    return str(self._folder / str(step))


class SaveRhythm:
  """When to save: after so many epochs, steps or minutes, whichever comes first."""

  def __init__(self, *, every: int, every_steps: int, every_minutes: float):
    require(every > 0, "checkpoint.every", every, "1 or more epochs")
    require(every_steps >= 0, "checkpoint.every_steps", every_steps, "0 (off) or a number of steps")
    minutes = "0 (off) or a number of minutes"
    require(every_minutes >= 0, "checkpoint.every_minutes", every_minutes, minutes)
    self._epochs = every
    self._steps = every_steps
    self._seconds = 60 * every_minutes
    self._last = time.monotonic()

  def next_step(self, done: int, end: int) -> int:
    """The next step to save at, at most `end`."""
    return min(end, (done // self._steps + 1) * self._steps) if self._steps else end

  def is_time(self) -> bool:
    """Whether the minutes have passed since the last save."""
    return bool(self._seconds) and time.monotonic() - self._last >= self._seconds

  def is_due(self, done: int, epoch: int | None) -> bool:
    """Whether to save now; whoever asks does it then.

    Args:
      done: steps.
      epoch: the epoch that ends here, counted from 1; None within one.
    """
    by_epoch = epoch is not None and epoch % self._epochs == 0
    by_step = self._steps > 0 and done % self._steps == 0
    due = by_epoch or by_step or self.is_time()
    if due:
      self._last = time.monotonic()
    return due


def _accuracy(metrics: dict[str, float]) -> float:
  return metrics["accuracy"]


def _first_line(error: Exception) -> str:
  """The first line, of paths only the file; TensorStore names the same long one twice."""
  line = re.sub(r'"[^"]*?([^"/]*)/?"', r"\1", str(error).strip().split("\n")[0])
  return line[:300] or type(error).__name__
