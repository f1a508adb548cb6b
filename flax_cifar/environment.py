"""The process and the machine: settings before JAX starts, versions, hardware, commit.

Nothing here imports JAX when it is imported: the settings must come first.
"""

import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping

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
VARIABLES = {
  "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path.home() / ".cache" / "flax_cifar" / "xla"),
  # Many small programs make up a start, and all are worth keeping.
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
  "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items()),
}


# ---- Settings


def apply_settings() -> None:
  """Sets the variables that the user has not set, and restarts Python where one needs that.

  glibc reads GLIBC_TUNABLES when a process starts; only Linux has glibc.
  """
  missing = {name: value for name, value in VARIABLES.items() if name not in os.environ}
  if not _has_glibc():
    missing.pop("GLIBC_TUNABLES", None)
  os.environ.update(missing)
  flags = os.environ.get("XLA_FLAGS", "")
  added = [f"{flag}={value}" for flag, value in XLA_FLAGS.items() if flag not in flags]
  os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *added])
  if "GLIBC_TUNABLES" in missing:
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _has_glibc() -> bool:
  return platform.libc_ver()[0] == "glibc"


def describe_settings(environment: Mapping[str, str]) -> str:
  """One line for the banner: the settings that hold."""
  names = [*VARIABLES, "XLA_FLAGS", "OMP_NUM_THREADS"]
  return ", ".join(f"{name}={environment[name]}" for name in names if environment.get(name))


# ---- Versions, hardware, commit


def get_versions() -> dict[str, str]:
  """Version of Python and of the packages that a result depends on."""
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {"python": platform.python_version(), **versions}


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
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor() or platform.machine()
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.machine()


def get_command() -> str:
  """The command line of this process, as it was typed after the name of the interpreter."""
  return shlex.join(["python", *sys.argv])


def get_commit() -> str:
  """The checkout's commit, with "+" where tracked files differ from it; "unknown" outside git."""
  try:
    return _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def _git(*arguments: str) -> str:
  folder = pathlib.Path(__file__).parent
  done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
  return done.stdout.strip()
