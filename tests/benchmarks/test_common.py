"""The arguments that the benchmarks share, and the commands in their records."""

import argparse
import importlib
import sys

import pytest

from benchmarks import common


def test_the_command_of_a_record_leaves_out_paths_of_this_machine():
  arguments = "-m benchmarks.x --json /tmp/a --batch 8 --output=/tmp/b --torch-python /p/python"
  assert common.leave_out_paths(arguments.split()) == ["-m", "benchmarks.x", "--batch", "8"]


@pytest.mark.parametrize("text", ["0", "-3"])
def test_numbers_must_be_positive(text):
  with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not above 0"):
    common.positive(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf"])
def test_durations_must_be_positive_and_finite(text):
  with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is no number of seconds above 0"):
    common.duration(text)


def test_a_record_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, capsys):
  parser = common.create_parser(None)
  common.add_json(parser)
  with pytest.raises(SystemExit):
    parser.parse_args(["--json", str(tmp_path / "missing" / "record.json")])
  assert "it must be in a folder that exists" in capsys.readouterr().err
  path = tmp_path / "record.json"
  assert parser.parse_args(["--json", str(path)]).json == path


PROGRAMS = [
  *(f"speed.{name}" for name in ("augment", "cores", "epoch", "regression", "start_up")),
  *("speed.topology", "speed.train_step", "accuracy.results", "accuracy.time_to_accuracy"),
  *("accuracy.zoo", "accelerator"),
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_help_has_the_docstring_and_the_default_of_each_flag(name, monkeypatch, capsys):
  program = importlib.import_module(f"benchmarks.{name}")
  monkeypatch.setattr(sys, "argv", [name, "--help"])
  monkeypatch.setenv("COLUMNS", "1000")
  with pytest.raises(SystemExit):
    getattr(program, "parse_options", program.main)()
  text = capsys.readouterr().out
  assert program.__doc__ in text
  _, *flags = text.split("\n  --")
  assert [flag for flag in flags if "(default: " not in flag] == []


def test_a_config_file_may_have_a_variant():
  assert common.config_file("configs/s9.py:published").protocol == "published"


@pytest.mark.parametrize(
  ("text", "message"),
  [("configs/nope.py", "'nope' is unknown"), ("s9:foo", "'foo' is unknown")],
)
def test_a_missing_config_is_named(text, message):
  with pytest.raises(argparse.ArgumentTypeError, match=message):
    common.config_file(text)


def test_a_record_joins_those_of_other_machines_and_replaces_its_own(tmp_path, monkeypatch):
  path = tmp_path / "records.json"

  def add(hardware, command, speed):
    monkeypatch.setattr(common, "describe_hardware", lambda: hardware)
    monkeypatch.setattr(common.sys, "orig_argv", ["python", "-m", command])
    common.add_record(path, [{"images/s": speed}])

  add("two cores", "benchmarks.x", 1)
  add("four cores", "benchmarks.x", 2)
  add("two cores", "benchmarks.y", 3)
  add("two cores", "benchmarks.x", 4)
  found = [
    (record["hardware"], record["command"], record["rows"][0]["images/s"])
    for record in common.read_records(path)
  ]
  assert found == [
    ("four cores", "python -m benchmarks.x", 2),
    ("two cores", "python -m benchmarks.y", 3),
    ("two cores", "python -m benchmarks.x", 4),
  ]


def test_the_hardware_names_the_instruction_sets(monkeypatch):
  features = ["fpu", "avx512f", "avx2", "avx512_bf16"]
  monkeypatch.setattr(common.environment, "list_processor_features", lambda: features)
  assert common.describe_hardware().endswith(", avx2, avx512f, avx512_bf16")
