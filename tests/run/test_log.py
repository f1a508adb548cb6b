"""The log of a run: one JSON line and one TensorBoard point per epoch."""

import io
import json
import os
import struct
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog

from flax_cifar import metrics
from flax_cifar import state as state_lib
from flax_cifar.run import log as log_lib

TRAIN = {
  "loss_sum": np.array(30.0),
  "correct": np.array(15.0),
  "count": np.array(20.0),
  "seconds": np.array(4.0),
}


def write(log, epoch, validation=None):
  record = metrics.create_record(
    epoch=epoch,
    step=10 * epoch,
    total_epochs=12,
    learning_rate=0.1,
    train=TRAIN,
    validation=validation,
    commit="abc",
  )
  log.write(record)


def lines(path):
  return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def open_log(path, records=(), screen=True, tensorboard=False, tracker="none"):
  progress = state_lib.Progress(10 * len(records), None, {}, list(records))
  log = {"screen": screen, "tensorboard": tensorboard, "tracker": tracker}
  config = {"name": "a", "total_epochs": 12, "log": log}
  return log_lib.RunLog(path, progress, config=config)


def test_a_silent_screen_stays_empty(tmp_path, capsys):
  log = open_log(tmp_path, screen=False)
  log.banner({"network": "tiny"})
  write(log, 1, {"loss": 0.5, "accuracy": 0.8})
  log.close()
  assert capsys.readouterr().out == ""
  assert len(lines(tmp_path)) == 1


def test_a_line_has_the_means(tmp_path):
  log = open_log(tmp_path)
  write(log, 1, {"loss": 0.5, "accuracy": 0.8})
  log.close()
  assert lines(tmp_path) == [
    {
      "epoch": 1,
      "step": 10,
      "total_epochs": 12,
      "learning_rate": 0.1,
      "train_loss": 1.5,
      "train_accuracy": 0.75,
      "validation_loss": 0.5,
      "validation_accuracy": 0.8,
      "seconds": 4.0,
      "images_per_second": 5.0,
      "commit": "abc",
    }
  ]


def test_seeds_are_averaged_and_listed(tmp_path, capsys):
  log = open_log(tmp_path, tensorboard=True)
  train = {name: np.stack([values, 2 * values]) for name, values in TRAIN.items()}
  train["seconds"] = TRAIN["seconds"]
  train["correct"] = np.array([15.0, 10.0])
  rates, validation = np.array([0.1, 0.3]), {"loss": np.ones(2), "accuracy": np.array([0.5, 0.9])}
  record = metrics.create_record(
    epoch=1,
    step=10,
    total_epochs=12,
    learning_rate=rates,
    train=train,
    validation=validation,
    commit="abc",
  )
  log.write(record)
  with log.progress(2, done=0, total=8) as report:
    report(train, 1)
  log.close()
  (line,) = lines(tmp_path)
  assert line["train_accuracy"] == 0.5
  assert line["train_accuracy_per_seed"] == [0.75, 0.25]
  assert line["validation_accuracy"] == pytest.approx(0.7)
  assert line["validation_accuracy_per_seed"] == [0.5, 0.9]
  assert line["learning_rate_per_seed"] == [0.1, 0.3]
  assert line["images_per_second"] == 15  # over all seeds
  assert "70.00%" in capsys.readouterr().out


def test_without_validation_no_validation_values_are_written(tmp_path):
  log = open_log(tmp_path)
  write(log, 1)
  log.close()
  assert not any(name.startswith("validation") for name in lines(tmp_path)[0])


def test_resuming_goes_on_from_the_records_of_the_checkpoint(tmp_path):
  """The content of the file does not matter."""
  log = open_log(tmp_path)
  for epoch in (1, 2, 3):
    write(log, epoch)
  log.close()
  known = lines(tmp_path)[:2]
  (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "st')
  log = open_log(tmp_path, records=known)
  assert lines(tmp_path) == known
  write(log, 3)
  log.close()
  assert [line["epoch"] for line in lines(tmp_path)] == [1, 2, 3]
  assert len(known) == 2


def test_the_screen_shows_percent_and_speed(tmp_path, capsys):
  log = open_log(tmp_path)
  write(log, 1, {"loss": 0.5, "accuracy": 0.8})
  log.close()
  shown = capsys.readouterr().out
  for part in ("epoch  1/12", "lr 0.1", "1.5000", "75.00%", "80.00%", "5 images/s"):
    assert part in shown


def read_events(path):
  """The records of a file in the format of TensorFlow; checksums are not checked."""
  content = path.read_bytes()
  while content:
    (length,) = struct.unpack("<Q", content[:8])
    yield Event.FromString(content[12 : 12 + length])
    content = content[16 + length :]


def test_tensorboard_gets_every_number_at_once(tmp_path):
  """It must not wait for the next epoch, because the process may be killed before."""
  log = open_log(tmp_path, records=[{"epoch": 1}], tensorboard=True)
  (path,) = (tmp_path / "tensorboard").iterdir()
  for epoch in (2, 3):
    write(log, epoch, {"loss": 0.5, "accuracy": 0.8})
    version, start, config, *points = read_events(path)
    assert "| total_epochs | `12` |" in config.summary.value[0].tensor.string_val[0].decode()
    assert len(points) == epoch - 1
    assert points[-1].step == 10 * epoch
    assert {point.tag: point.simple_value for point in points[-1].summary.value} == {
      "learning/rate": pytest.approx(0.1),
      "train/loss": 1.5,
      "train/accuracy": 0.75,
      "validation/loss": 0.5,
      "validation/accuracy": pytest.approx(0.8),
      "seconds": 4.0,
      "images/per_second": 5.0,
    }
  log.close()
  assert version.file_version == "brain.Event:2"  # TensorBoard takes a second one as a restart
  assert (start.step, start.session_log.status) == (11, SessionLog.START)


def test_tensorboard_takes_a_path_that_is_no_utf8():
  text = log_lib._create_text("config", os.fsdecode(b"gr\xfc\xdfe"))
  assert text.tensor.string_val == [b"gr??e"]


def test_without_a_terminal_progress_is_an_occasional_line(tmp_path, capsys, monkeypatch):
  log = open_log(tmp_path)
  with log.progress(1, done=4, total=8) as report:
    report(TRAIN, 1)
  assert capsys.readouterr().out == ""
  monkeypatch.setattr(log_lib, "LINE_SECONDS", 0)
  with log.progress(1, done=4, total=8) as report:
    report(TRAIN, 1)
    report(TRAIN, 3)
  log.close()
  first, second = capsys.readouterr().out.splitlines()
  assert first.startswith("epoch 1  step 5/8  loss 1.500 acc 75.0% 5 images/s")
  assert second.startswith("epoch 1  step 8/8")
  assert lines(tmp_path) == []


@pytest.mark.parametrize("earlier", [0, 4])
def test_time_within_an_epoch_counts_once(tmp_path, capsys, monkeypatch, earlier):
  """`train_chunks` adds its seconds to the totals; each call trains five images per second."""
  now = [100.0]
  monkeypatch.setattr(log_lib.time, "perf_counter", lambda: now[0])
  monkeypatch.setattr(log_lib, "LINE_SECONDS", 0)
  log = open_log(tmp_path)
  with log.progress(1, done=0, total=8) as report:
    for seconds in (earlier, earlier + 4, earlier + 8):
      now[0] += 4
      count = np.array(5.0 * (seconds + 4))
      report({**TRAIN, "count": count, "seconds": np.array(float(seconds))}, 1)
  log.close()
  rates = [line.split("%")[1] for line in capsys.readouterr().out.splitlines()]
  assert rates == [" 5 images/s"] * 3


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path, monkeypatch):
  reading, writing = os.pipe()
  os.close(reading)
  with open(writing, "w") as broken:
    monkeypatch.setattr(sys, "stdout", broken)
    log = open_log(tmp_path)
    log.print("to nobody")
    write(log, 1)
    log.close()
    print("neither", flush=True)
  assert [line["epoch"] for line in lines(tmp_path)] == [1]


def test_a_log_file_gets_no_escapes_whatever_the_environment_asks_for(tmp_path):
  asked = dict.fromkeys(["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"], "1")
  code = f"""
import pathlib
from tests.run import test_log
log = test_log.open_log(pathlib.Path({str(tmp_path)!r}))
with log.progress(2, done=0, total=8) as report:
  report(test_log.TRAIN, 1)
test_log.write(log, 1)
log.close()
"""
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, "")
  assert "\x1b" not in done.stdout
  assert done.stdout.startswith("epoch  1/12")


def test_numbers_that_are_not_finite_are_null(tmp_path):
  log = open_log(tmp_path)
  write(log, 1, {"loss": float("nan"), "accuracy": np.array([np.inf, 0.5])})
  log.close()
  text = (tmp_path / "metrics.jsonl").read_text()
  (record,) = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
  assert record["validation_loss"] is None
  assert record["validation_accuracy_per_seed"] == [None, 0.5]


def test_an_extended_run_says_so(tmp_path, capsys):
  records = [{"epoch": 1, "step": 4, "total_epochs": 2}, {"epoch": 2, "step": 8}]
  log = open_log(tmp_path, records)
  log.print_resumed(state_lib.Progress(8, None, {}, records), 4)
  log.close()
  assert "extended from 2 to 12 epochs; the earlier ones followed" in capsys.readouterr().out


def test_on_a_terminal_progress_is_a_bar(tmp_path):
  log = open_log(tmp_path)
  log.console = Console(file=io.StringIO(), force_terminal=True, width=120)
  with log.progress(2, done=0, total=8) as report:
    report(TRAIN, 1)
  log.close()
  assert "1/8" in log.console.file.getvalue()
  assert "loss 1.500 acc 75.0%" in log.console.file.getvalue()


@pytest.mark.parametrize(("rates", "median"), [([1, 9, 2], 2), ([4, 2], 3)])
def test_median_rate(rates, median):
  assert metrics.get_median_rate([{"images_per_second": rate} for rate in rates]) == median


def test_tensorboard_shows_pictures(tmp_path):
  PIL.Image.new("RGB", (30, 20)).save(tmp_path / "curves.png")
  log = open_log(tmp_path, tensorboard=True)
  log.write_pictures([tmp_path / "curves.png"], step=7)
  (path,) = (tmp_path / "tensorboard").iterdir()
  *_, event = read_events(path)
  (value,) = event.summary.value
  assert (event.step, value.tag, value.image.width, value.image.height) == (7, "curves", 30, 20)
  assert value.image.encoded_image_string == (tmp_path / "curves.png").read_bytes()
  log.close()
  log = open_log(tmp_path)
  log.write_pictures([tmp_path / "missing.png"], step=7)  # nothing to show them in
