"""Settings, versions and hardware of a process, and the restart that glibc needs."""

import json
import os
import pathlib
import platform
import shlex
import stat
import subprocess
import sys
import types

import pytest

from flax_cifar import environment as environment_lib
from flax_cifar import errors


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
  arguments = ["main.py", "--config=a.py", "--config.ops=('b',)"]
  monkeypatch.setattr(environment_lib.sys, "orig_argv", ["/usr/bin/python3", *arguments])
  command = environment_lib.get_command()
  assert shlex.split(command) == ["python", "main.py", "--config=a.py", "--config.ops=('b',)"]


def test_the_command_of_the_console_script_has_no_path():
  arguments = ["/home/me/.venv/bin/flax_cifar", "--config=s9"]
  assert environment_lib.get_command(arguments) == "flax_cifar --config=s9"


def test_the_commit_is_that_of_git(monkeypatch):
  answers = {"rev-parse": "abc123", "status": "", "ls-files": "environment.py"}
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
  # Without pytest-xdist this process has imported the module before conftest moved the cache.
  expected["JAX_COMPILATION_CACHE_DIR"] = environment_lib.find_cache("xla")
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


def test_the_repository_around_an_installed_package_is_not_ours(monkeypatch):
  def refuse_to_list(command, *_):
    if command == "ls-files":
      raise subprocess.CalledProcessError(1, "git")
    return "abc123"

  monkeypatch.setattr(environment_lib, "_git", refuse_to_list)
  assert environment_lib.get_commit() == "unknown"


def test_settings_of_jax_that_change_results_are_reset():
  environ = run(JAX_ENABLE_X64="1", JAX_NUMPY_RANK_PROMOTION="raise")["environ"]
  assert environ["JAX_ENABLE_X64"] == "0"
  assert environment_lib.FIXED_VARIABLES.items() <= environ.items()


def test_settings_whose_default_is_none_are_removed():
  given = dict.fromkeys(environment_lib.UNSET_VARIABLES, "highest")
  assert not given.keys() & run(**given)["environ"].keys()


def test_what_a_notebook_has_set_is_named(monkeypatch):
  import jax

  environment_lib.check_settings_of_jax()
  with jax.enable_x64(True):
    message = r"jax_enable_x64=True .*must be False: call jax\.config\.update\('jax_enable_x64', Fa"
    with pytest.raises(errors.UserError, match=message):
      environment_lib.check_settings_of_jax()


@pytest.mark.parametrize(
  ("name", "wrong"), [("jax_random_seed_offset", 1), ("jax_threefry_partitionable", False)]
)
def test_what_the_message_tells_to_call_mends_it(name, wrong):
  import jax

  before = getattr(jax.config, name)
  jax.config.update(name, wrong)
  try:
    with pytest.raises(errors.UserError, match=name) as refused:
      environment_lib.check_settings_of_jax()
    call = str(refused.value).partition("call ")[2].removesuffix(" first.")
    eval(call, {"jax": jax})
    environment_lib.check_settings_of_jax()
  finally:
    jax.config.update(name, before)


def test_a_file_that_has_the_number_of_a_closed_stream_keeps_it(tmp_path):
  """As of a script that was started by `>&-` and opens a file before it trains."""
  code = (
    "import sys; file = open(sys.argv[1], 'w'); from flax_cifar import environment\n"
    "environment.apply_settings(restart=False); print('lost'); file.write('kept'); file.close()"
  )
  path = tmp_path / "file"
  command = shlex.join([sys.executable, "-c", code, str(path)])
  subprocess.run(f"{command} >&-", shell=True, check=True, capture_output=True)
  assert path.read_text() == "kept"


def test_the_children_of_a_process_with_a_closed_stream_have_one():
  child = "import sys; sys.exit(sys.stdout is None)"
  code = (
    "import subprocess, sys; from flax_cifar import environment\n"
    "environment.apply_settings(restart=False)\n"
    f"sys.exit(subprocess.call([sys.executable, '-c', {child!r}]))"
  )
  command = shlex.join([sys.executable, "-c", code])
  subprocess.run(f"{command} >&-", shell=True, check=True)


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_a_closed_stream_is_none_that_a_file_takes(tmp_path, closed):
  """As by `main.py >&-`, or under a service that closes them."""
  code = (
    "import os, sys; from flax_cifar import environment\n"
    "environment.apply_settings(restart=False)\n"
    "for stream in (sys.stdout, sys.stderr): stream.isatty(); print('lost', file=stream)\n"
    "with open(sys.argv[1], 'w') as file: os.write(1, b'!'), os.write(2, b'!'), file.write('kept')"
  )
  shell = " ".join(f"{number}>&-" for number in closed)
  path = tmp_path / "file"
  command = shlex.join([sys.executable, "-c", code, str(path)])
  subprocess.run(f"{command} {shell}", shell=True, check=True, capture_output=True)
  assert path.read_text() == "kept"


def test_a_precision_that_a_notebook_has_set_is_named():
  import jax

  with (
    jax.default_matmul_precision("bfloat16"),
    pytest.raises(
      errors.UserError, match=r"jax_default_matmul_precision='bfloat16' .*, None\) first"
    ),
  ):
    environment_lib.check_settings_of_jax()


def test_the_fixed_settings_are_the_defaults_of_jax():
  import jax

  code = "import jax, json; print(json.dumps({n: str(getattr(jax.config, n)) for n in NAMES}))"
  names = [
    name.lower() for name in environment_lib.FIXED_VARIABLES if hasattr(jax.config, name.lower())
  ]
  unset = {k: v for k, v in os.environ.items() if k not in environment_lib.FIXED_VARIABLES}
  values = [
    json.loads(
      subprocess.run(
        [sys.executable, "-c", code.replace("NAMES", repr(names))],
        env={**unset, **given},
        capture_output=True,
        text=True,
        check=True,
      ).stdout
    )
    for given in ({}, environment_lib.FIXED_VARIABLES)
  ]
  assert len(names) >= 5
  assert values[0] == values[1]


@pytest.mark.parametrize("home", [None, "missing", "read-only"])
def test_without_a_home_to_write_to_there_is_no_cache(monkeypatch, tmp_path, home):
  def find_home():
    if home is None:
      raise RuntimeError("Could not determine home directory.")
    return tmp_path / home

  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setattr(pathlib.Path, "home", find_home)
  monkeypatch.setattr(os, "access", lambda path, mode: home == "missing")
  cache = environment_lib.find_cache("xla")
  assert cache == (str(tmp_path / "missing/.cache/flax_cifar/xla") if home == "missing" else "")


def test_a_home_that_may_not_be_read_has_no_cache(monkeypatch):
  """A container may run as another user than the one whose HOME it has."""
  stat = os.stat

  def refuse(path, *args, **kwargs):
    if str(path).startswith("/hidden/"):
      raise PermissionError(13, "Permission denied", str(path))
    return stat(path, *args, **kwargs)

  monkeypatch.setenv("XDG_CACHE_HOME", "/hidden/cache")
  monkeypatch.setattr(os, "stat", refuse)
  monkeypatch.setattr(os, "access", lambda path, mode: False)
  assert environment_lib.find_cache("xla") == ""


@pytest.mark.parametrize(
  ("user", "owner", "mode", "is_used"),
  [
    (1000, 1000, 0o775, True),
    (1000, 1001, 0o777, False),  # another user made it, and could put programs there
    (1000, 1000, 0o777, False),
    (1000, 0, 0o1777, True),  # /tmp, where nobody replaces a folder of this user
    (0, 1000, 0o755, True),  # a container that runs as root, and has a folder of its user
  ],
)
def test_a_cache_is_not_where_other_users_could_write(
  monkeypatch, tmp_path, user, owner, mode, is_used
):
  stat_of_all = os.stat

  def fake_stat(path, *args, **kwargs):
    if str(path) == str(tmp_path):
      return types.SimpleNamespace(st_uid=owner, st_mode=stat.S_IFDIR | mode)
    return stat_of_all(path, *args, **kwargs)

  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(os, "geteuid", lambda: user)
  monkeypatch.setattr(os, "stat", fake_stat)
  assert bool(environment_lib.find_cache("xla")) == is_used


def test_the_cache_follows_xdg_cache_home(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert environment_lib.find_cache("data") == str(tmp_path / "flax_cifar" / "data")
  monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says to ignore it
  monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
  assert environment_lib.find_cache("data") == str(tmp_path / ".cache" / "flax_cifar" / "data")


@pytest.mark.parametrize("platforms", ["cuda", "tpu", "bogus,cuda"])
def test_devices_that_are_not_here_are_one_error(platforms):
  code = "from flax_cifar import environment; environment.check_devices()"
  done = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "JAX_PLATFORMS": platforms},
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  last = done.stderr.splitlines()[-1]
  assert last.startswith("flax_cifar.errors.UserError: JAX finds no devices for")
  assert f"JAX_PLATFORMS={platforms!r}" in last
  assert "unset it" in last


def test_a_screen_that_is_not_utf_8_shows_question_marks():
  code = "from flax_cifar import environment as e; e.apply_settings(); print('1 ± 2')"
  done = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "PYTHONIOENCODING": "ascii"},
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert (done.stdout, done.stderr) == ("1 ? 2\n", "")


def test_the_banner_has_the_settings_of_the_user():
  flags = [f"{flag}={value}" for flag, value in environment_lib.XLA_FLAGS.items()]
  ours = {**environment_lib.VARIABLES, "XLA_FLAGS": " ".join(flags), "HOME": "/root"}
  assert environment_lib.describe_settings(ours) == ""
  theirs = {"GLIBC_TUNABLES": "x=1", "XLA_FLAGS": " ".join(["--xla_own=2", *flags])}
  text = environment_lib.describe_settings(ours | theirs)
  assert text == "XLA_FLAGS=--xla_own=2, GLIBC_TUNABLES=x=1"
