"""The layer table of one network, and the sums of several side by side."""

import json
import sys

import pytest

from flax_cifar import errors
from flax_cifar.tools import command_line, summary


@pytest.fixture
def run(monkeypatch, capsys):
  """Calls the program; returns what it prints."""

  def call(*arguments):
    monkeypatch.setattr(sys, "argv", ["summary", *arguments])
    summary.main()
    return capsys.readouterr().out

  return call


def test_networks_stand_side_by_side(run):
  text = run("--config=pyramid", "--beside=skip:norm=layer", "--beside=tiny50k")
  header, *rows = (line.split() for line in text.splitlines())
  assert header[:3] == ["config", "layers", "parameters"]
  assert [(row[0], row[2], row[-1]) for row in rows] == [
    ("pyramid", "48,656", "44x44"),
    ("skip-norm-layer", "48,072", "44x44"),
    ("tiny50k", "48,090", "71x71"),
  ]


def test_json_has_the_sums_and_the_layers(run):
  (row,) = json.loads(run("--config=pyramid", "--json"))
  assert (row["parameters"], row["receptive field"]) == (48_656, "44x44")
  assert len(row["table"]) == row["layers"]
  assert sum(layer["parameters"] for layer in row["table"]) == 48_656
  assert row["table"][0]["receptive_field"]["size"] == [3, 3]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--beside=nothing"], "error: --beside='nothing' is unknown"),
    (["--beside=skip:norm=odd"], "error: model.norm='odd' is unknown"),
    (["--beside=skip:odd"], "error: --beside='skip:odd': config variant 'odd' is unknown"),
  ],
)
def test_a_wrong_name_is_one_line(run, capsys, arguments, message):
  with pytest.raises(SystemExit) as end:
    run("--config=pyramid", *arguments)
  assert end.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith(message)
  assert error.count("\n") == 1


@pytest.mark.parametrize("size", [0, 40_000])
def test_an_image_size_that_no_run_has_is_refused(size):
  config = command_line.load_config("s9", "config")
  config.data.image_size = size
  with pytest.raises(errors.UserError, match=f"data.image_size={size}"):
    summary.get_rows(config, 10)
