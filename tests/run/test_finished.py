"""Reading of runs that have finished, and refusal of those that have not."""

import json
import pathlib

import pytest

from flax_cifar import errors
from flax_cifar.run import finished


def write_run(folder, *, epochs, lines):
  (folder / "result.json").write_text(json.dumps({"epochs": epochs}))
  (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def test_a_finished_run_has_its_result_and_every_epoch(tmp_path):
  write_run(tmp_path, epochs=2, lines=['{"epoch": 1, "train_loss": null}', '{"epoch": 2}'])
  run = finished.read_run(tmp_path)
  assert run.result == {"epochs": 2}
  assert run.records == [{"epoch": 1, "train_loss": None}, {"epoch": 2}]


def test_a_run_without_a_result_is_not_finished(tmp_path):
  with pytest.raises(errors.UserError, match=r"no finished run: it has no result\.json"):
    finished.read_run(tmp_path)


@pytest.mark.parametrize("records", [0, 1, 3])
def test_a_run_that_has_gone_on_is_not_finished(tmp_path, records):
  write_run(tmp_path, epochs=2, lines=[f'{{"epoch": {i + 1}}}' for i in range(records)])
  message = rf"result\.json is of 2 epochs and metrics\.jsonl of {records}"
  with pytest.raises(errors.UserError, match=message):
    finished.read_run(tmp_path)


@pytest.mark.parametrize("line", ['{"epoch": 1', "3", "\x00"])
def test_a_damaged_line_is_named_with_a_remedy(tmp_path, line):
  write_run(tmp_path, epochs=1, lines=[line])
  with pytest.raises(errors.UserError, match=r"metrics\.jsonl' cannot be read .*delete result"):
    finished.read_run(tmp_path)


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl"])
def test_a_file_that_may_not_be_read_is_no_damaged_one(tmp_path, monkeypatch, name):
  write_run(tmp_path, epochs=1, lines=['{"epoch": 1}'])
  read = pathlib.Path.read_text

  def refuse(path, **options):  # no mode of a file keeps root from reading it
    if path.name == name:
      raise PermissionError(13, "Permission denied")
    return read(path, **options)

  monkeypatch.setattr(pathlib.Path, "read_text", refuse)
  with pytest.raises(errors.UserError, match=f"{name}' cannot be read; make it readable"):
    finished.read_run(tmp_path)
