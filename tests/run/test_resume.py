"""A run that is stopped, killed or copied ends like the uninterrupted one, bit for bit."""

import os
import shutil
import signal

import numpy as np
import pytest

from flax_cifar import errors, evaluate, signals, train
from flax_cifar.run import checkpoint, integrity, plots
from tests import runs, tiny

pytestmark = pytest.mark.usefixtures("tiny_model")

PLATEAU = runs.AVERAGE_AND_PLATEAU | {"checkpoint.every": 1}
ONE_CYCLE = {"schedule.name": "one_cycle", "ema.decay": 0.9}
HOST = {"augment.backend": "albumentations"}


def stop_at(workdir, data, step, changes, *, saved=None):
  """Runs until a signal arrives before the chunk that contains `step` (from 0)."""
  with pytest.MonkeyPatch.context() as patch:
    runs.interrupt_at(patch, step)
    with pytest.raises(signals.Interrupted, match=f"saved at step {saved or step + 1};"):
      runs.run(workdir, data, **changes)
  assert not (workdir / "result.json").exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """The folder of an uninterrupted run whose state has every optional part."""
  folder = tmp_path_factory.mktemp("uninterrupted")
  with tiny.registered():
    runs.run(folder / "run", tiny.write_data(folder / "tiny.npz"), **PLATEAU)
  return folder / "run"


def test_a_run_stopped_at_many_steps_ends_the_same(tmp_path, data, uninterrupted):
  """At the first and the last step, and at the ends of epochs and after them."""
  for step in (0, 1, 4, 5, 7, 9, 14):
    stop_at(tmp_path / "cut", data, step, PLATEAU)
  runs.run(tmp_path / "cut", data, **PLATEAU)
  runs.assert_same_run(uninterrupted, tmp_path / "cut")


@pytest.mark.parametrize(
  ("changes", "stops"),
  [
    ({"model.norm": "layer", "data.validation_size": 0, **ONE_CYCLE}, {9: 10}),
    ({"model.norm": "group", "mixing.name": "cutmix", **PLATEAU}, {12: 13}),
    ({"model.norm": "ghost", "steps_per_call": 3, "optimizer.name": "muon", **PLATEAU}, {6: 8}),
    ({"model.norm": "none", "optimizer.name": "adamw", **ONE_CYCLE, **HOST}, {10: 11}),
    ({"model.norm": "ghost", "num_seeds": 2, **PLATEAU}, {5: 6}),
  ],
)
def test_a_stopped_run_ends_the_same_with_every_norm_schedule_and_backend(
  tmp_path, data, changes, stops
):
  """`stops`: a signal arrives before the chunk with this step: the run is saved at that step."""
  if changes.get("data.validation_size") == 0:
    changes = {**changes, "total_epochs": 3, "batch_size": 19}  # 96 images: five steps again
  runs.run(tmp_path / "uninterrupted", data, **changes)
  for step, saved in stops.items():
    stop_at(tmp_path / "cut", data, step, changes, saved=saved)
  runs.run(tmp_path / "cut", data, **changes)
  runs.assert_same_run(tmp_path / "uninterrupted", tmp_path / "cut")


@pytest.mark.parametrize("name", ["validate", "predict"])
def test_a_run_stopped_in_an_evaluation_ends_the_same(
  tmp_path, data, uninterrupted, monkeypatch, name
):
  """The stopped evaluation is repeated: the validation after epoch 2, or the test."""
  calls = []
  original = getattr(evaluate, name)

  def interrupted(*args, **kwargs):
    calls.append(name)
    if len(calls) == (2 if name == "validate" else 1):
      signal.raise_signal(signal.SIGTERM)
    return original(*args, **kwargs)

  step = 2 * runs.STEPS_PER_EPOCH if name == "validate" else runs.LAST_STEP
  with monkeypatch.context() as patch:
    patch.setattr(evaluate, name, interrupted)
    with pytest.raises(signals.Interrupted, match=f"saved at step {step};") as stop:
      runs.run(tmp_path / "cut", data, **PLATEAU)
  assert stop.value.signum == signal.SIGTERM
  assert len(runs.lines(tmp_path / "cut")) == (1 if name == "validate" else 3)
  assert not (tmp_path / "cut" / "result.json").exists()
  runs.run(tmp_path / "cut", data, **PLATEAU)
  runs.assert_same_run(uninterrupted, tmp_path / "cut")


@pytest.mark.parametrize(
  ("policy", "saved"),
  [
    ({"every": 1}, [5, 10, 15]),
    ({"every": 9, "every_minutes": 1e-9}, list(range(1, 16))),
    ({"every": 9, "every_steps": 4, "steps_per_call": 3}, [4, 8, 12, 15]),
  ],
)
def test_saved_by_epochs_steps_and_minutes(
  tmp_path, data, uninterrupted, monkeypatch, policy, saved
):
  """The save policy changes nothing else."""
  steps = []
  original = checkpoint.Checkpoints.save

  def save(self, progress, *args):
    steps.append(progress.step)
    original(self, progress, *args)

  monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
  changes = {k if k == "steps_per_call" else f"checkpoint.{k}": v for k, v in policy.items()}
  runs.run(tmp_path / "run", data, **(PLATEAU | changes))
  assert steps == saved
  if "steps_per_call" not in policy:
    runs.assert_same_run(uninterrupted, tmp_path / "run")


class Killed(BaseException):
  """Stands for kill -9."""


def test_a_run_killed_between_two_saves_ends_the_same(tmp_path, data, uninterrupted, monkeypatch):
  """The process dies at step 12; its last checkpoint is of step 10."""
  original = train._collect

  def die(progress, chunks, report):
    if progress.step + sum(len(chunk["count"]) for chunk in chunks) >= 12:
      raise Killed
    return original(progress, chunks, report)

  with monkeypatch.context() as patch:
    patch.setattr(train, "_collect", die)
    with pytest.raises(Killed):
      runs.run(tmp_path / "cut", data, **PLATEAU)
  assert max(runs.checkpoint_steps(tmp_path / "cut")) == 10
  runs.run(tmp_path / "cut", data, **PLATEAU)
  runs.assert_same_run(uninterrupted, tmp_path / "cut")


def test_a_workdir_may_be_moved_and_linked(tmp_path, data, uninterrupted):
  stop_at(tmp_path / "cut", data, 6, PLATEAU)
  shutil.move(tmp_path / "cut", tmp_path / "moved")
  stop_at(tmp_path / "moved", data, 8, PLATEAU)
  (tmp_path / "linked").symlink_to(tmp_path / "moved")
  runs.run(tmp_path / "linked", data, **PLATEAU)
  runs.assert_same_run(uninterrupted, tmp_path / "linked")


def test_what_the_clock_said_does_not_matter(tmp_path, data, uninterrupted):
  """The latest checkpoint is the one of the highest step, not of the latest time."""
  stop_at(tmp_path / "cut", data, 11, PLATEAU)
  future = 4e9
  for path in (tmp_path / "cut" / "checkpoints" / "10").rglob("*"):
    os.utime(path, (future, future))
  os.utime(tmp_path / "cut" / "checkpoints" / "10", (future, future))
  os.utime(tmp_path / "cut" / "checkpoints" / "12", (0, 0))
  stop_at(tmp_path / "cut", data, 12, PLATEAU)
  runs.run(tmp_path / "cut", data, **PLATEAU)
  runs.assert_same_run(uninterrupted, tmp_path / "cut")


@pytest.fixture
def blank_plots(monkeypatch):
  """Writes empty files, because drawing takes seconds."""
  monkeypatch.setattr(plots, "save_figure", lambda figure, path: path.touch())


def test_pictures_that_cannot_be_written_are_warnings(tmp_path, data, monkeypatch, capsys):
  def fail(figure, path):
    if path.name == "curves.png":
      raise OSError(28, "No space left on device")
    path.touch()

  monkeypatch.setattr(plots, "save_figure", fail)
  runs.run(tmp_path / "run", data, **{"total_epochs": 1, "log.pictures": True})
  written = {path.name for path in (tmp_path / "run").glob("*.png")}
  assert written == {"augmented.png", "learning_rate.png", "misclassified.png"}
  assert (tmp_path / "run" / "result.json").exists()
  assert "curves.png' is not drawn ([Errno 28] No space left" in capsys.readouterr().err


@pytest.mark.usefixtures("blank_plots")
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_stopped_after_its_first_epoch_still_plots_its_images(tmp_path, data, epochs):
  """Without validation; a run that is stopped in it would not have ended the epoch."""
  changes = {"total_epochs": epochs, "data.validation_size": 0, "batch_size": 19}
  changes["log.pictures"] = True
  stop_at(tmp_path / "run", data, runs.STEPS_PER_EPOCH - 1, changes)
  assert not (tmp_path / "run" / "augmented.png").exists()
  runs.run(tmp_path / "run", data, **changes)
  assert (tmp_path / "run" / "augmented.png").exists()


def test_a_workdir_that_vanishes_ends_the_run_in_one_line(tmp_path, data, monkeypatch):
  def vanish(*args, **kwargs):
    shutil.rmtree(tmp_path / "run")
    return {"loss": np.zeros(()), "accuracy": np.zeros(())}

  monkeypatch.setattr(evaluate, "validate", vanish)
  with pytest.raises(errors.UserError, match=r"run.* cannot be written to .*goes on"):
    runs.run(tmp_path / "run", data)


def test_a_save_that_fails_leaves_the_one_before(tmp_path, data, uninterrupted, monkeypatch):
  """The disk is full from the second save on; once it has room again, the run continues."""
  original, calls = integrity.write_digests, []

  def fail(path):
    calls.append(path)
    if len(calls) > 1:
      raise OSError(28, "No space left on device")
    original(path)

  with monkeypatch.context() as patch:
    patch.setattr(integrity, "write_digests", fail)
    with pytest.raises(errors.UserError, match=r"could not be written .*No space left.*goes on"):
      runs.run(tmp_path / "cut", data, **PLATEAU)
  runs.run(tmp_path / "cut", data, **PLATEAU)
  runs.assert_same_run(uninterrupted, tmp_path / "cut")


def test_the_last_save_must_succeed_before_a_run_is_finished(tmp_path, data, monkeypatch):

  def fail(path):
    if path.name.startswith(str(runs.LAST_STEP)):
      raise OSError(28, "No space left on device")

  monkeypatch.setattr(integrity, "write_digests", fail)
  with pytest.raises(errors.UserError, match="No space left"):
    runs.run(tmp_path / "run", data)
  assert not (tmp_path / "run" / "result.json").exists()
