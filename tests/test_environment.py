"""What a result says of where it was made."""

import shlex
import subprocess

import pytest

from flax_cifar import environment


def test_versions_name_python_and_jax():
  versions = environment.get_versions()
  import jax

  assert versions["jax"] == jax.__version__
  assert set(environment.PACKAGES) < set(versions)


def test_hardware_names_devices_and_processor():
  assert environment.get_hardware(3).startswith("3 x cpu (")


def test_hardware_counts_the_cores_this_process_may_use(monkeypatch):
  monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: {3}, raising=False)
  assert environment.get_hardware(1).endswith(", 1 core)")


def test_command_can_be_pasted_into_a_shell(monkeypatch):
  monkeypatch.setattr(environment.sys, "argv", ["main.py", "--config=a.py", "--config.ops=('b',)"])
  command = environment.get_command()
  assert shlex.split(command) == ["python", "main.py", "--config=a.py", "--config.ops=('b',)"]


def test_commit_is_gits(monkeypatch):
  answers = {"rev-parse": "abc123", "status": ""}
  monkeypatch.setattr(environment, "_git", lambda command, *_: answers[command])
  assert environment.get_commit() == "abc123"
  answers["status"] = " M main.py"
  assert environment.get_commit() == "abc123+"


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.CalledProcessError(128, "git")])
def test_outside_git_the_commit_is_unknown(monkeypatch, error):
  def fail(*arguments):
    raise error

  monkeypatch.setattr(environment, "_git", fail)
  assert environment.get_commit() == "unknown"
