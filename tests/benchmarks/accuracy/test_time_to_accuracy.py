"""When runs reach an accuracy: epochs, seconds, and seconds without the first epoch's compiling."""

import json

import pytest

from benchmarks.accuracy import time_to_accuracy


def write_run(folder, accuracies, seconds):
  folder.mkdir()
  lines = [
    json.dumps(
      {
        "epoch": epoch,
        "validation_accuracy": accuracy / 100,
        "seconds": spent,
        "images_per_second": 6000 / spent,
      }
    )
    for epoch, (accuracy, spent) in enumerate(zip(accuracies, seconds, strict=True), start=1)
  ]
  (folder / "result.json").write_text(json.dumps({"epochs": len(lines)}))
  (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  return time_to_accuracy.read(folder)


def test_the_runs_that_reached_a_target_are_averaged(tmp_path):
  one = write_run(tmp_path / "one", [80, 86, 91], [30, 10, 12])
  other = write_run(tmp_path / "other", [70, 84, 89], [31, 10, 10])
  row = time_to_accuracy.describe(85, [one, other])
  assert (row["runs"], row["epochs"], row["seconds"]) == ("2 of 2", 2.5, (40 + 51) / 2)
  assert row["without compiling"] == (2 * 11 + 3 * 10) / 2
  assert (row["last %"], row["of epochs"]) == (90, 3)
  row = time_to_accuracy.describe(90, [one, other])
  assert (row["runs"], row["epochs"], row["seconds"], row["sd"]) == ("1 of 2", 3, 52, None)


def test_pytorch_takes_its_own_time_for_the_same_epochs(tmp_path):
  one = write_run(tmp_path / "one", [80, 86, 91], [30, 10, 12])
  other = write_run(tmp_path / "other", [70, 84, 89], [31, 10, 10])
  row = time_to_accuracy.describe(85, [one, other], pytorch=100)
  assert row["PyTorch s"] == pytest.approx(2.5 * 6000 / 100)
  assert time_to_accuracy.describe(94, [one], pytorch=100)["PyTorch s"] is None


def test_a_target_that_no_run_reached_leaves_blanks(tmp_path):
  run = write_run(tmp_path / "run", [80], [30])
  row = time_to_accuracy.describe(94, [run])
  assert row["runs"] == "0 of 1"
  assert row["epochs"] is row["seconds"] is row["without compiling"] is None
