"""Runs of one and two processes with one and two devices each: equal, resumed, stopped, broken."""

import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest

from flax_cifar import files
from tests import runs, tiny
from tests.parallel import launch

CHANGES = {
  "stopped": {"augment.backend": "albumentations"},
  "seeds": {"num_seeds": 4, "ema.decay": 0.9},
}

# What Gloo prints itself, piece by piece: the threads of two devices write into each other's lines.
GLOO = re.compile(
  r"\[Gloo\] Rank |\d+| is connected to | peer ranks\. "
  r"|Expected number of connected peer ranks is : |\n"
)

pytestmark = pytest.mark.usefixtures("tiny_model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The runs of `make_runs`, which one of the processes of pytest-xdist makes for all."""
  base = tmp_path_factory.getbasetemp()
  path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "processes"
  with path.with_suffix(".lock").open("a") as lock:
    files.lock(lock, wait=True)
    if not (path / "outputs.json").exists():
      path.mkdir()
      make_runs(path)
  return path


def make_runs(path):
  """Makes the runs `stopped` and `seeds` by two processes with one or two devices each.

  `stopped` is stopped at step 7 by a signal to process 1, and goes on with twice the devices. Then
  it is finished, and asked for once more.
  """
  data = tiny.write_data(path / "tiny.npz")
  outputs = {}
  for devices, names in ((1, ("stopped",)), (2, ("stopped", "stopped", "seeds"))):
    plan = [{"workdir": str(path / name), "data": data, "changes": CHANGES[name]} for name in names]
    plan[names.index("stopped")]["stop"] = [1, 7]  # which a run that goes on is past
    with launch.Launch(plan, processes=2, devices=devices) as started:
      outputs[f"2x{devices}"] = started.wait()
  (path / "outputs.json").write_text(json.dumps(outputs))


@pytest.fixture
def outputs(folder):
  return json.loads((folder / "outputs.json").read_text())


def assert_close(one, other):
  """Two runs have the same curves and weights but for the order of sums; counts are equal."""
  ours, theirs = runs.lines(one), runs.lines(other)
  assert len(ours) == len(theirs) == 3
  for mine, expected in zip(ours, theirs, strict=True):
    assert mine.keys() == expected.keys()
    for name, value in mine.items():
      np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)
      if "accuracy" in name:
        np.testing.assert_allclose(value, expected[name], rtol=1e-12, err_msg=name)
  weights, expected = (runs.flat_checkpoint(path, runs.LAST_STEP) for path in (one, other))
  assert weights.keys() == expected.keys()
  for name, value in weights.items():
    np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", CHANGES)
def test_every_layout_gives_the_run_of_one_device(folder, tmp_path, name):
  data = f"npz:{folder / 'tiny.npz'}"
  runs.run(tmp_path / "one", data, **CHANGES[name])
  runs.run(tmp_path / "four", data, **CHANGES[name], num_devices=4)
  assert_close(folder / name, tmp_path / "one")
  assert_close(tmp_path / "four", tmp_path / "one")


def test_a_signal_to_one_process_stops_all_at_the_same_step(outputs):
  for number, (status, _, errors) in enumerate(outputs["2x1"]):
    assert status == 128 + signal.SIGTERM
    assert "stopped and saved at step 7; the same command goes on" in errors
    assert ("SIGTERM: saving after this step" in errors) == (number == 1)


def test_a_stopped_run_goes_on_with_other_processes_and_devices(folder, outputs, tmp_path):
  assert [status for status, *_ in outputs["2x2"]] == [0, 0]
  assert "resumed at step 7" in outputs["2x2"][0][1]
  assert "stopped is finished: test accuracy" in outputs["2x2"][0][1]  # and process 1 goes on, too
  shutil.copytree(folder / "stopped", tmp_path / "longer")
  changes = CHANGES["stopped"] | {"total_epochs": 4}
  runs.run(tmp_path / "longer", f"npz:{folder / 'tiny.npz'}", **changes)  # as one process
  before, after = runs.lines(folder / "stopped"), runs.lines(tmp_path / "longer")
  assert after[:3] == before
  assert after[3]["step"] == 20


def test_only_the_first_process_prints_and_names_all(outputs):
  (_, first, _), (_, second, _) = outputs["2x2"]
  assert "joined 2 processes, found by flags; process 0 on " in first
  assert "4 x " in first
  assert GLOO.sub("", second).strip() == ""


def test_a_killed_process_ends_the_others_with_status_75(tmp_path):
  plan = [{"workdir": str(tmp_path / "run"), "data": tiny.write_data(tmp_path / "tiny.npz")}]
  plan[0] |= {"changes": {"total_epochs": 500, "checkpoint.every": 1}, "pause": 0.05}
  with launch.Launch(plan, processes=2, devices=1) as started:
    launch.wait_for_step(tmp_path / "run", 12)
    started.processes[1].kill()
    killed = time.monotonic()
    (status, _, errors), _ = started.wait()
  assert status == 75, errors
  assert time.monotonic() - killed < 4 * launch.HEARTBEAT_SECONDS
  assert "another process of the run has ended or lost contact; start all of them again" in errors
  assert list((tmp_path / "run" / "checkpoints").glob("*/digests.json"))


def test_a_stuck_process_ends_all_with_stacks_and_status_75(tmp_path):
  plan = [{"workdir": str(tmp_path / "run"), "data": tiny.write_data(tmp_path / "tiny.npz")}]
  plan[0] |= {"changes": {}, "hang": [1, 7]}
  with launch.Launch(plan, processes=2, devices=1, flags=["--stall_timeout=12"]) as started:
    ended = started.wait()
  for status, _, errors in ended:
    assert status == 75, errors
    assert "so a process of the run is stuck" in errors
  assert "tests/parallel/worker.py" in ended[1][2]  # where it sleeps
