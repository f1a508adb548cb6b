"""Settings of a process: what is set, what stays, and the restart that glibc needs."""

import json
import os
import pathlib
import platform
import subprocess
import sys

import pytest

from flax_cifar.settings import VARIABLES, XLA_FLAGS, describe_settings

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = """
import json, os, sys
starts = int(os.environ.get("STARTS", "0")) + 1
os.environ["STARTS"] = str(starts)
from flax_cifar.settings import apply_settings
apply_settings()
print(json.dumps({"environ": dict(os.environ), "starts": starts, "argv": sys.argv[1:],
                  "jax": "jax" in sys.modules}))
"""
GLIBC = platform.libc_ver()[0] == "glibc"


def run(**given):
  """What a process sees after apply_settings when the user has set `given`."""
  environment = {
    name: value for name, value in os.environ.items() if name not in (*VARIABLES, "XLA_FLAGS")
  }
  command = [sys.executable, "-c", SCRIPT, "--flag=two words"]
  done = subprocess.run(
    command, env={**environment, **given}, cwd=ROOT, capture_output=True, text=True, check=True
  )
  return json.loads(done.stdout)


def test_all_are_set_without_importing_jax_and_arguments_survive_the_restart():
  seen = run()
  expected = {k: v for k, v in VARIABLES.items() if GLIBC or k != "GLIBC_TUNABLES"}
  assert expected.items() <= seen["environ"].items()
  assert all(f"{flag}={value}" in seen["environ"]["XLA_FLAGS"] for flag, value in XLA_FLAGS.items())
  assert seen["argv"] == ["--flag=two words"]
  assert not seen["jax"]
  assert seen["starts"] == (2 if GLIBC else 1)


@pytest.mark.parametrize("name", VARIABLES)
def test_a_value_of_the_user_stays(name):
  assert run(**{name: ""})["environ"][name] == ""


def test_no_restart_where_glibc_is_set_already():
  assert run(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")["starts"] == 1


def test_flags_of_the_user_stay_and_ours_are_added_once():
  own, *others = (f"{flag}={value}" for flag, value in XLA_FLAGS.items())
  theirs = own.replace("=false", "=true")
  assert theirs != own
  assert run(XLA_FLAGS=theirs)["environ"]["XLA_FLAGS"].split() == [theirs, *others]
  theirs = "--xla_force_host_platform_device_count=2"
  assert run(XLA_FLAGS=theirs)["environ"]["XLA_FLAGS"].split() == [theirs, own, *others]


def test_the_banner_names_what_holds():
  text = describe_settings({"GLIBC_TUNABLES": "x=1", "XLA_FLAGS": "", "HOME": "/root"})
  assert text == "GLIBC_TUNABLES=x=1"
