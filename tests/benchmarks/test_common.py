"""The arguments that the benchmarks share, and the commands in their records."""

import argparse

import pytest

from benchmarks import common


def test_the_command_of_a_record_leaves_out_paths_of_this_machine():
  arguments = "-m benchmarks.x --json /tmp/a --batch 8 --output=/tmp/b --torch-python /p/python"
  assert common.leave_out_paths(arguments.split()) == ["-m", "benchmarks.x", "--batch", "8"]


@pytest.mark.parametrize("text", ["0", "-3"])
def test_numbers_must_be_positive(text):
  with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not above 0"):
    common.positive(text)


def test_a_config_file_may_have_a_variant():
  assert common.config_file("configs/s9.py:published").protocol == "published"


@pytest.mark.parametrize(
  ("text", "message"),
  [("configs/nope.py", "configs/nope.py"), ("configs/s9.py:foo", "'foo' is unknown")],
)
def test_a_missing_config_is_named(text, message):
  with pytest.raises(argparse.ArgumentTypeError, match=message):
    common.config_file(text)
