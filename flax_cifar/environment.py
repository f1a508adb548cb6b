"""The process and the machine: settings before JAX starts, versions, hardware, commit.

Nothing here imports JAX when it is imported: the settings must come first.
"""

import importlib.metadata
import io
import os
import pathlib
import platform
import shlex
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from flax_cifar import errors

PACKAGE = "flax_cifar"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "albumentations")
XLA_FLAGS = {
  # Switched off, XLA:CPU orders a step for memory, which halves it and is faster too.
  "--xla_cpu_enable_concurrency_optimized_scheduler": "false",
  # LLVM keeps to half the width of AVX-512 otherwise; without AVX-512 this changes nothing.
  "--xla_cpu_prefer_vector_width": "512",
}
# A step needs a gigabyte of memory. If glibc returned it to the system after each step, the system
# would clear every page again for the next step.
MALLOC = {
  "hugetlb": 1,  # pages of 2 MiB
  "arena_max": 1,  # one heap for all threads: that of a thread may not grow beyond 64 MiB
  "mmap_threshold": 2**40,  # from the heap, whatever the size
  "trim_threshold": 2**40,  # and the heap keeps what is freed
}


def find_cache(kind: str) -> str:
  """The folder for files of a `kind`; "", no cache, where there is no home directory to write to.

  XDG_CACHE_HOME takes the place of ~/.cache, as its specification says.

  A container may run as a user without one. A folder in /tmp would be no substitute: another user
  could put programs there. For the same reason a folder of another user is none, and so is one that
  all users may write to.
  """
  root = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
  try:
    root = root if root.is_absolute() else pathlib.Path.home() / ".cache"
  except RuntimeError:
    return ""
  cache = root / PACKAGE / kind
  # os.path, because Path.is_dir raises an error below a folder that may not be read.
  existing = next(folder for folder in (cache, *cache.parents) if os.path.isdir(folder))
  return str(cache) if os.access(existing, os.W_OK) and _is_ours(existing) else ""


def _is_ours(folder: pathlib.Path) -> bool:
  """Whether no other user but root can replace what this user puts into `folder`."""
  status, user = os.stat(folder), os.geteuid()
  open_to_all = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
  is_root = user == 0  # in a container, often with folders of the user who started it
  return is_root or (status.st_uid in (0, user) and not open_to_all)


VARIABLES = {
  "JAX_COMPILATION_CACHE_DIR": find_cache("xla"),
  # Many small programs make up a start, and all are worth keeping.
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
  "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items()),
}

# Settings of JAX that would change results, or end a run. Each has JAX's own default here, whatever
# the user has set for other programs.
FIXED_VARIABLES = {
  "JAX_ENABLE_X64": "0",
  "JAX_DEFAULT_DTYPE_BITS": "64",
  "JAX_NUMPY_DTYPE_PROMOTION": "standard",
  "JAX_NUMPY_RANK_PROMOTION": "allow",
  "JAX_DEFAULT_PRNG_IMPL": "threefry2x32",
  "JAX_THREEFRY_PARTITIONABLE": "1",
  "JAX_RANDOM_SEED_OFFSET": "0",
  "JAX_NO_TRACING": "0",
}
# Others of them, whose default is not to be set.
UNSET_VARIABLES = (
  "JAX_DEFAULT_MATMUL_PRECISION",
  *("JAX_TRANSFER_GUARD", "JAX_TRANSFER_GUARD_HOST_TO_DEVICE"),
  *("JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE", "JAX_TRANSFER_GUARD_DEVICE_TO_HOST"),
)


# ---- Settings


def apply_settings(*, restart: bool = True) -> None:
  """Sets the variables that the user has not set, and restarts Python where one needs that.

  glibc reads GLIBC_TUNABLES when a process starts; only Linux has glibc. A letter that the screen
  cannot show, such as the ± of a result, becomes a question mark. Standard output and error that
  are closed become the null device.

  Args:
    restart: False goes on in this process, without what needs a new one.
  """
  _open_closed_streams()
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="replace")
  os.environ.update(FIXED_VARIABLES)
  for name in UNSET_VARIABLES:
    os.environ.pop(name, None)
  missing = {name: value for name, value in VARIABLES.items() if name not in os.environ}
  if not restart or not _has_glibc():
    missing.pop("GLIBC_TUNABLES", None)
  os.environ.update(missing)
  flags = os.environ.get("XLA_FLAGS", "")
  added = [f"{flag}={value}" for flag, value in XLA_FLAGS.items() if flag not in flags]
  os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *added])
  if "GLIBC_TUNABLES" in missing:
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _open_closed_streams() -> None:
  """Opens the null device in place of a closed standard output or error.

  The next file that is opened would else get its number, and what libraries print.
  """
  for number, name in ((1, "stdout"), (2, "stderr")):
    if getattr(sys, name) is None:
      null = os.open(os.devnull, os.O_RDWR)
      if null == number:
        os.set_inheritable(null, True)
      elif not _is_open(number):
        os.dup2(null, number)
      setattr(sys, name, os.fdopen(null, "w", encoding="utf-8"))


def _is_open(descriptor: int) -> bool:
  """Whether a file has this number, as one that was opened before JAX was asked for may have."""
  try:
    os.fstat(descriptor)
  except OSError:
    return False
  return True


def _has_glibc() -> bool:
  return platform.libc_ver()[0] == "glibc"


def check_settings_of_jax() -> None:
  """Raises a UserError where this process has set JAX to what changes results, as a notebook may.

  The variables of `apply_settings` come too late for a process that has imported JAX.
  """
  import jax

  for variable, default in FIXED_VARIABLES.items():
    name = variable.lower()
    value = getattr(jax.config, name, default)
    shown = str(int(value)) if isinstance(value, bool) else str(value)
    proper: Any = type(value)(int(default)) if isinstance(value, int) else default
    errors.require(
      shown == default,
      name,
      value,
      f"{proper!r}: call jax.config.update({name!r}, {proper!r}) first",
    )
  for name in map(str.lower, UNSET_VARIABLES):
    value = getattr(jax.config, name, None)
    expected = f"None: call jax.config.update({name!r}, None) first"
    errors.require(value is None, name, value, expected)


def keep_off_devices() -> None:
  """Lets JAX use the CPU alone in this process, because another one has the other devices."""
  import jax

  jax.config.update("jax_platforms", "cpu")


def check_devices() -> None:
  """Raises a UserError where JAX cannot start, as when JAX_PLATFORMS names absent devices."""
  import jax

  try:
    jax.devices()
  except Exception as error:  # RuntimeError, or AssertionError of a plugin
    platforms = os.environ.get("JAX_PLATFORMS", "")
    raise errors.UserError(
      f"JAX finds no devices for JAX_PLATFORMS={platforms!r} ({errors.shorten(error)}); unset it "
      "to use the devices that are here."
    ) from error


def describe_settings(environment: Mapping[str, str]) -> str:
  """One line for the banner: the settings that are the user's own; "" where all are ours."""
  flags = environment.get("XLA_FLAGS", "").split()
  ours = [f"{flag}={value}" for flag, value in XLA_FLAGS.items()]
  own = {"XLA_FLAGS": " ".join(flag for flag in flags if flag not in ours)}
  for name in (*VARIABLES, "OMP_NUM_THREADS"):
    value = environment.get(name, "")
    own[name] = "" if value == VARIABLES.get(name) else value
  return ", ".join(f"{name}={value}" for name, value in own.items() if value)


# ---- Versions, hardware, commit


def get_versions() -> dict[str, str]:
  """Version of Python and of the packages that a result depends on."""
  versions = {"python": platform.python_version()}
  for name in PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "absent"
  return versions


def get_hardware(num_devices: int) -> str:
  """One line: the `num_devices` devices in use, the host's processor and the cores we may use."""
  import jax  # here: the benchmarks count cores for PyTorch without it

  kind = jax.local_devices()[0].device_kind
  cores = count_cores()
  return f"{num_devices} x {kind} ({_processor()}, {cores} core{'s' * (cores != 1)})"


def count_cores() -> int:
  """The number of cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):  # not on macOS
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _processor() -> str:
  return _read_processor("model name") or platform.processor() or platform.machine()


def list_processor_features() -> list[str]:
  """The processor's instruction sets, as Linux calls them; [] on other systems."""
  return _read_processor("flags").split()


def _read_processor(field: str) -> str:
  """The text of a `field` of the first processor in /proc/cpuinfo; "" where it is not there."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
  except OSError:
    return ""
  values = (line.partition(":") for line in lines)
  return next((value.strip() for name, _, value in values if name.strip() == field), "")


def get_command(arguments: Sequence[str] | None = None) -> str:
  """The command line as it was typed, without the places of the interpreter and the program.

  Args:
    arguments: those after the interpreter; None means those of this process.
  """
  arguments = sys.orig_argv[1:] if arguments is None else arguments
  if arguments and pathlib.Path(arguments[0]).name == PACKAGE:  # the console script
    return shlex.join([PACKAGE, *arguments[1:]])
  return shlex.join(["python", *arguments])


def get_commit() -> str:
  """The checkout's commit, with "+" where tracked files differ from it; "unknown" outside git.

  An installed package may lie in the repository of another project, which does not track it.
  """
  try:
    _git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
    return _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def _git(*arguments: str) -> str:
  folder = pathlib.Path(__file__).parent
  done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
  return done.stdout.strip()
