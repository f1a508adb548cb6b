"""The comparison of steps: turns, ratios, tables, and another commit."""

import inspect
import pathlib
import sys

import pytest

from benchmarks import common
from benchmarks.speed import regression, step_worker, train_step
from flax_cifar import train

RECORDS = pathlib.Path(__file__).parents[3] / "docs" / "benchmarks"


class Clock:
  """Stands for a worker whose steps take the given seconds, one after the other."""

  def __init__(self, *seconds):
    self.seconds = list(seconds)

  def measure(self, steps):
    return self.seconds.pop(0)


def test_workers_take_turns():
  workers = {"a": Clock(0.5, 1, 2), "b": Clock(0.25, 3, 4)}
  assert train_step.take_turns(workers, 2, 1.0) == {"a": [1, 2], "b": [3, 4]}


def test_a_ratio_compares_with_the_fastest_pytorch_of_the_turn_and_type():
  seconds = {
    "ours": [1.0, 2.0, 1.0],
    "ours bf16": [0.5, 0.5, 0.5],
    "PyTorch": [3.0, 4.0, 9.0],
    "PyTorch channels_last": [2.0, 8.0, 9.0],
    "PyTorch bf16": [1.0, 1.5, 5.0],
  }
  ratio = {
    mode: train_step.describe("skip", mode, seconds, 10, 10**9, 10**9)["x PyTorch"]
    for mode in seconds
  }
  assert ratio["ours"] == 2.0  # of 2, 2 and 9
  assert ratio["ours bf16"] == 3.0  # of 2, 3 and 10
  assert ratio["PyTorch"] == 1.0
  row = train_step.describe("skip", "ours", seconds, 10, 10**9, 10**10)
  assert (row["images/s"], row["slowest"], row["fastest"]) == (10, 5, 10)
  assert (row["GFLOP/s"], row["% of matmul"]) == (1.0, 10.0)


def test_without_pytorch_there_is_no_ratio():
  assert train_step.describe("skip", "ours", {"ours": [1.0]}, 10, 1, 1.0)["x PyTorch"] is None


def test_a_record_is_shown_with_its_origin():
  row = dict.fromkeys(train_step.SHOWN, 1.5) | {"network": "skip", "mode": "ours"}
  record = {
    "rows": [row | {"library": "jax 0.12"}],
    "command": "python -m x",
    "hardware": "1 x cpu",
    "commit": "0123456789",
    "date": "2026-11-27T01:02:03",
  }
  lines = train_step.format_record(record).splitlines()
  assert lines[0] == "`python -m x`, 1 x cpu, jax 0.12, commit `0123456`, 2026-11-27:"
  assert lines[2].startswith("| network | mode | images/s |")
  assert lines[4] == "| skip | ours | 1.5 | 1.5 | 1.5 | 1.5 | 1.5 | 1.5 | 1.5 |"


def test_the_regression_is_the_median_ratio_of_the_turns():
  rows = regression.compare({"base": [1.0, 2.0, 4.0], "now": [1.0, 4.0, 4.0]}, 8)
  assert rows == {"base images/s": 4.0, "now images/s": 2.0, "ratio": 1.0}


def test_another_commit_is_checked_out_and_removed(tmp_path, monkeypatch):
  monkeypatch.setattr(regression, "ROOT", tmp_path)
  author = ("-c", "user.name=A", "-c", "user.email=a@example.org")
  regression.git("init", "--quiet")
  for content in ("old", "new"):
    (tmp_path / "file").write_text(content)
    regression.git("add", "file")
    regression.git(*author, "commit", "--quiet", "--message", content)
  with regression.checked_out("HEAD~1") as folder:
    assert (folder / "file").read_text() == "old"
  assert not folder.exists()
  with pytest.raises(SystemExit, match="no-such-commit"):
    regression.checked_out("no-such-commit").__enter__()


def test_a_step_has_all_its_arguments():
  _, parts = step_worker.create_parts("pyramid")
  _, _, *names = inspect.signature(train.train_step).parameters
  assert set(parts) == set(names)


def test_a_worker_measures_steps_until_it_is_closed():
  worker = train_step.Worker(sys.executable, "matmul", "skip", 2, "predict")
  assert worker.library.startswith("jax")
  assert worker.measure(1) > 0
  assert worker.close() > 0


def test_tables_show_numbers_to_three_digits():
  assert [common.format_cell(value) for value in (1234.5, 0.12345, None, "x")] == [
    *("1,234", "0.123", "", "x")
  ]


@pytest.mark.parametrize(
  "path", sorted(RECORDS.glob("train_step*.json")), ids=lambda path: path.stem
)
def test_every_record_can_be_shown(path):
  for record in common.read_records(path):
    assert record["rows"][0]["network"] in train_step.format_record(record)
