"""What a result must name to be believed: versions, hardware, command, commit."""

import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "albumentations")


def get_versions() -> dict[str, str]:
  """Version of Python and of the packages that a result depends on."""
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {"python": platform.python_version(), **versions}


def get_hardware(num_devices: int) -> str:
  """One line: the `num_devices` devices in use, the host's processor and the cores we may use."""
  import jax  # here, because PyTorch's side of the benchmarks counts cores without it

  kind = jax.local_devices()[0].device_kind
  cores = count_cores()
  return f"{num_devices} x {kind} ({_processor()}, {cores} core{'s' * (cores != 1)})"


def count_cores() -> int:
  """That this process may use."""
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
