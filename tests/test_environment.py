"""Settings, versions and hardware of a process, and the restart that glibc needs."""

import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys

import pytest

from flax_cifar import environment as environment_lib


def test_versions_name_python_and_jax():
  versions = environment_lib.get_versions()
  import jax

  assert versions["jax"] == jax.__version__
  assert set(environment_lib.PACKAGES) < set(versions)


def test_hardware_names_devices_and_processor():
  assert environment_lib.get_hardware(3).startswith("3 x cpu (")


def test_hardware_counts_the_cores_this_process_may_use(monkeypatch):
  monkeypatch.setattr(environment_lib.os, "sched_getaffinity", lambda _: {3}, raising=False)
  assert environment_lib.get_hardware(1).endswith(", 1 core)")


def test_command_can_be_pasted_into_a_shell(monkeypatch):
  monkeypatch.setattr(
    environment_lib.sys, "argv", ["main.py", "--config=a.py", "--config.ops=('b',)"]
  )
  command = environment_lib.get_command()
  assert shlex.split(command) == ["python", "main.py", "--config=a.py", "--config.ops=('b',)"]


def test_the_commit_is_that_of_git(monkeypatch):
  answers = {"rev-parse": "abc123", "status": ""}
  monkeypatch.setattr(environment_lib, "_git", lambda command, *_: answers[command])
  assert environment_lib.get_commit() == "abc123"
  answers["status"] = " M main.py"
  assert environment_lib.get_commit() == "abc123+"


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.CalledProcessError(128, "git")])
def test_outside_git_the_commit_is_unknown(monkeypatch, error):
  def fail(*arguments):
    raise error

  monkeypatch.setattr(environment_lib, "_git", fail)
  assert environment_lib.get_commit() == "unknown"


ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = """
import json, os, sys
starts = int(os.environ.get("STARTS", "0")) + 1
os.environ["STARTS"] = str(starts)
from flax_cifar.environment import apply_settings
apply_settings()
print(json.dumps({"environ": dict(os.environ), "starts": starts, "argv": sys.argv[1:],
                  "jax": "jax" in sys.modules}))
"""
GLIBC = platform.libc_ver()[0] == "glibc"


def run(**given):
  """The state of a process after apply_settings when the user has set `given`."""
  environment = {
    name: value
    for name, value in os.environ.items()
    if name not in (*environment_lib.VARIABLES, "XLA_FLAGS")
  }
  command = [sys.executable, "-c", SCRIPT, "--flag=two words"]
  done = subprocess.run(
    command, env={**environment, **given}, cwd=ROOT, capture_output=True, text=True, check=True
  )
  return json.loads(done.stdout)


def test_all_variables_are_set_without_importing_jax_and_arguments_survive_the_restart():
  state = run()
  expected = {k: v for k, v in environment_lib.VARIABLES.items() if GLIBC or k != "GLIBC_TUNABLES"}
  assert expected.items() <= state["environ"].items()
  assert all(
    f"{flag}={value}" in state["environ"]["XLA_FLAGS"]
    for flag, value in environment_lib.XLA_FLAGS.items()
  )
  assert state["argv"] == ["--flag=two words"]
  assert not state["jax"]
  assert state["starts"] == (2 if GLIBC else 1)


@pytest.mark.parametrize("name", environment_lib.VARIABLES)
def test_a_value_of_the_user_stays(name):
  assert run(**{name: ""})["environ"][name] == ""


def test_no_restart_where_glibc_is_set_already():
  assert run(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")["starts"] == 1


def test_flags_of_the_user_stay_and_ours_are_added_once():
  own, *others = (f"{flag}={value}" for flag, value in environment_lib.XLA_FLAGS.items())
  theirs = own.replace("=false", "=true")
  assert theirs != own
  assert run(XLA_FLAGS=theirs)["environ"]["XLA_FLAGS"].split() == [theirs, *others]
  theirs = "--xla_force_host_platform_device_count=2"
  assert run(XLA_FLAGS=theirs)["environ"]["XLA_FLAGS"].split() == [theirs, own, *others]


def test_the_banner_has_the_variables_that_are_set():
  text = environment_lib.describe_settings(
    {"GLIBC_TUNABLES": "x=1", "XLA_FLAGS": "", "HOME": "/root"}
  )
  assert text == "GLIBC_TUNABLES=x=1"
