"""Settings of libraries that are read when a process starts, chosen for speed.

A value that the user has set stays. Nothing here imports JAX.
"""

import os
import pathlib
import platform
import sys
from collections.abc import Mapping

XLA_FLAGS = {
  # Switched off, XLA:CPU orders a step for memory, which halves it and is faster too.
  "--xla_cpu_enable_concurrency_optimized_scheduler": "false",
  # LLVM keeps to half the width of AVX-512 otherwise; without AVX-512 this changes nothing.
  "--xla_cpu_prefer_vector_width": "512",
}
# A step asks for a gigabyte of memory. Given back to the system after it, it would come back
# cleared, page by page, at each step.
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


def apply_settings() -> None:
  """Sets what the user has not, and starts Python anew where a setting needs that.

  glibc reads GLIBC_TUNABLES when a process starts, and it matters on Linux alone.
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
  """The settings that hold, on one line: for the banner."""
  names = [*VARIABLES, "XLA_FLAGS", "OMP_NUM_THREADS"]
  return ", ".join(f"{name}={environment[name]}" for name in names if environment.get(name))
