"""Checkpoints by Orbax: the latest ones and the best one, saved in the background with digests."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from flax_cifar import errors, metrics, signals
from flax_cifar import state as state_lib
from flax_cifar.parallel import agreement, cluster
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.run import integrity

ELSEWHERE = "Move it elsewhere to go on from an older one."


class Checkpoints:
  """The checkpoints in `folder`, numbered by step.

  Each holds a Progress. The latest `keep` stay, to resume from, and the one with the highest
  validation accuracy (the mean over the seeds).

  A checkpoint appears whole and with its digests, or not at all. One that is damaged or unfinished
  is moved at once to `damaged` beside the folder: Orbax would take the highest number for the
  latest checkpoint, and save none with a lower one.

  Of several processes, which share the folder, each must make the same calls.
  """

  def __init__(self, folder: pathlib.Path, *, keep: int):
    self._saved: tuple[int, int] | None = None
    self._replaces = False  # whether the latest save did
    self._folder = folder
    agreement.by_first(integrity.finish_replacements)(folder)
    damaged = folder.parent / "damaged"
    self._quarantined = agreement.by_first(integrity.quarantine)(folder, damaged)
    best = BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
      best_fn=_accuracy,  # without it Orbax does not write the metrics down
      preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
      cleanup_tmp_directories=True,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
    )
    self._manager = _open(folder, options)

  @property
  def latest_step(self) -> int | None:
    """The step of the newest checkpoint; None where there is none."""
    return self._manager.latest_step()

  def save(self, progress: state_lib.Progress, validation: Mapping[str, Any] | None = None) -> None:
    """Starts to save `progress`; returns before it is written.

    A checkpoint of the same step is replaced if it has fewer records: it was made before the
    validation. The state may be donated, and the records may grow, as soon as this returns.

    Args:
      progress: at any step.
      validation: `accuracy` and `loss` at the end of an epoch, () or (seeds,); None within one.

    Raises:
      UserError: this checkpoint, or the one before it, cannot be written.
    """
    step, records = progress.step, list(progress.records)
    if (step, len(records)) == self._saved:
      return
    sums = {name: value.tolist() for name, value in progress.totals.items()}
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(progress.state),
      log=ocp.args.JsonSave({"totals": sums, "records": records}),
    )
    means = validation and {name: float(np.mean(value)) for name, value in validation.items()}
    with self._explain_failure():
      if self._replaces:  # before Orbax deletes the replacement, too, as an old checkpoint
        self._manager.wait_until_finished()
        agreement.by_first(integrity.finish_replacements)(self._folder)
      self._replaces = step == self.latest_step
      if self._replaces:
        self._manager.wait_until_finished()
        agreement.by_first(integrity.retire)(self._folder / str(step))
        self._manager.reload()
      self._manager.save(step, args=items, metrics=means)
    self._saved = (step, len(records))

  @contextlib.contextmanager
  def save_when_stopped(
    self, progress: state_lib.Progress, guard: signals.InterruptGuard
  ) -> Iterator[None]:
    """Turns Stopped into Interrupted, with `progress` saved."""
    try:
      yield
    except signals.Stopped:
      self.save(progress)
      (signum,) = agreement.largest(guard.signum or 0)
      raise signals.Interrupted(signum, progress.step) from None

  def _write_digests(self) -> None:
    """Orbax calls this when all is written, before it gives the folder its final name."""
    if not agreement.is_first():
      return
    for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
      integrity.write_digests(path)

  def wait(self) -> None:
    """Waits until everything is written.

    Raises:
      UserError: it cannot be.
    """
    with self._explain_failure():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def close(self) -> None:
    """Waits until everything is written and ends the threads that write; raises as `wait`."""
    try:
      self.wait()
    finally:
      with contextlib.suppress(Exception):  # the error of `wait`, once more
        self._manager.close()
      if agreement.is_first():
        integrity.finish_replacements(self._folder)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    """Closes; a UserError that ends the run is not replaced by one of the last save."""
    try:
      self.close()
    except errors.UserError as failure:
      if not isinstance(error, errors.UserError):
        raise
      errors.warn(str(failure))

  @contextlib.contextmanager
  def _explain_failure(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax raises OSError, ValueError and others
      if cluster.is_loss(error):
        raise
      raise errors.UserError(
        f"a checkpoint could not be written to {str(self._folder)!r} ({errors.shorten(error)}); "
        "those before it are kept. Make room, or the folder writable, and the same command goes on."
      ) from error

  def restore_or(self, start: state_lib.Progress, mesh: Mesh) -> state_lib.Progress:
    """The newest checkpoint, on the devices of `mesh`; `start` where there never was one.

    Args:
      start: the progress before the first step; a checkpoint must have its shapes and types.
      mesh: where to put the state.

    Raises:
      UserError: the checkpoint is of another network, or every one was damaged.
    """
    step = self.latest_step
    if step is None:
      if self._quarantined:
        raise errors.UserError(
          f"no checkpoint is left: {'; '.join(self._quarantined)}. Choose another --workdir, or "
          "delete this one to start again."
        )
      return start
    self._check_shapes(step, start.state)
    sharding = mesh_lib.split_seeds(mesh)
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), start.state
    )
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), log=ocp.args.JsonRestore())
    try:
      restored = self._manager.restore(step, args=items)
    except Exception as error:  # Orbax raises ValueError, JSONDecodeError and plain Exception
      raise _unreadable(self._folder / str(step), error, ELSEWHERE) from error
    totals = {name: np.asarray(value) for name, value in restored["log"]["totals"].items()}
    records = restored["log"]["records"]
    self._saved = (step, len(records))
    return state_lib.Progress(step, restored["state"], totals, records)

  def _check_shapes(self, step: int, state: state_lib.TrainState) -> None:
    try:
      params = self._manager.item_metadata(step)["state"]["params"]
      saved = {name: tuple(leaf.shape) for name, leaf in state_lib.name_leaves(params).items()}
    except Exception as error:
      raise _unreadable(self._folder / str(step), error, ELSEWHERE) from error
    expected = {name: leaf.shape for name, leaf in state_lib.name_leaves(state.params).items()}
    mismatches = errors.list_differences(saved, expected)
    if mismatches:
      raise errors.UserError(
        f"checkpoint {str(self._folder / str(step))!r} is of another network: "
        f"{'; '.join(mismatches[:3])} ({len(mismatches)} differ). Choose another --workdir or the "
        "config it was made with."
      )


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """The network of a checkpoint.

  Attributes:
    step: steps done.
    variables: to evaluate; of several seeds stacked.
    records: of the finished epochs.
  """

  step: int
  variables: Mapping[str, Any]
  records: Sequence[metrics.Record]


def read(folder: pathlib.Path, *, best: bool) -> Snapshot:
  """Reads a checkpoint of a run, and writes nothing.

  Args:
    folder: of the checkpoints; the run may still train.
    best: read the one with the highest validation accuracy (of equal ones the last), and not the
      newest.

  Raises:
    UserError: there is none, or it is damaged.
  """
  options = ocp.CheckpointManagerOptions(best_fn=_accuracy, read_only=True)
  if not folder.is_dir():
    raise errors.UserError(f"{str(folder)!r} does not exist; name the folder of a run.")
  with contextlib.closing(_open(folder, options)) as manager:
    step = manager.best_step() if best else manager.latest_step()
    if step is None:
      raise errors.UserError(
        f"{str(folder)!r} holds no checkpoint"
        f"{' with a validation accuracy; --checkpoint=latest takes any' if best else ' yet'}."
      )
    if damage := integrity.find_damage(folder / str(step)):
      raise errors.UserError(
        f"checkpoint {str(folder / str(step))!r} is damaged ({damage}), or the run has just "
        "deleted it; try again."
      )
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    items = ocp.args.Composite(
      state=ocp.args.StandardRestore(fallback_sharding=device), log=ocp.args.JsonRestore()
    )
    try:
      restored = manager.restore(step, args=items)
      state = state_lib.TrainState(**restored["state"])
    except Exception as error:  # as in restore_or
      remedy = "Use the commit that wrote it."
      raise _unreadable(folder / str(step), error, remedy) from error
  return Snapshot(step, state.eval_variables, restored["log"]["records"])


def _open(folder: pathlib.Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
  handlers = {"state": ocp.StandardCheckpointHandler(), "log": ocp.JsonCheckpointHandler()}
  return ocp.CheckpointManager(folder.absolute(), item_handlers=handlers, options=options)


def _unreadable(path: pathlib.Path, error: Exception, remedy: str) -> errors.UserError:
  return errors.UserError(
    f"checkpoint {str(path)!r} is whole but cannot be read ({errors.shorten(error)}); it may be of "
    f"another version. {remedy}"
  )


def create_policy(options: Mapping[str, Any]) -> "SavePolicy":
  """The policy of the section `checkpoint` of a config; a UserError for a number out of range."""
  return SavePolicy(
    every=options["every"],
    every_steps=options["every_steps"],
    every_minutes=options["every_minutes"],
  )


class SavePolicy:
  """When to save: after so many epochs, steps or minutes, whichever comes first."""

  def __init__(self, *, every: int, every_steps: int, every_minutes: float):
    epochs, steps = "1 or more epochs", "0 (off) or a number of steps"
    minutes = "0 (off) or a number of minutes"
    errors.require(every > 0, "checkpoint.every", every, epochs)
    errors.require(every_steps >= 0, "checkpoint.every_steps", every_steps, steps)
    errors.require(every_minutes >= 0, "checkpoint.every_minutes", every_minutes, minutes)
    self._epochs = every
    self._steps = every_steps
    self._seconds = 60 * every_minutes
    self._saved_at = time.monotonic()

  def next_step(self, step: int, end: int) -> int:
    """The next step after `step` to save at, at most `end`."""
    return min(end, (step // self._steps + 1) * self._steps) if self._steps else end

  def is_time(self) -> bool:
    """Whether the minutes have passed since the last save."""
    return bool(self._seconds) and time.monotonic() - self._saved_at >= self._seconds

  def is_due(self, step: int, epoch: int | None) -> bool:
    """Whether to save after `step` steps.

    Args:
      step: steps done.
      epoch: the epoch that ends here, counted from 1; None within one.
    """
    by_epoch = epoch is not None and epoch % self._epochs == 0
    by_step = self._steps > 0 and step % self._steps == 0
    return by_epoch or by_step or agreement.any_process(self.is_time())

  def mark_saved(self) -> None:
    """Starts the minutes again."""
    self._saved_at = time.monotonic()


def _accuracy(metrics: dict[str, float]) -> float:
  return metrics["accuracy"]
