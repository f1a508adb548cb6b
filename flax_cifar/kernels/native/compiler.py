"""Compiles C++ for this machine's processor, once, and loads the result.

A wheel could hold machine code only for processors of twenty years ago. Compilers of Linux and
macOS are `c++`; the environment variable CXX names another.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import subprocess
import tempfile

from flax_cifar import environment, errors

# Calls of memcpy, which GCC puts in the place of short loops, are slower than these.
OPTIMIZE = ("-std=c++17", "-O3", "-fno-tree-loop-distribute-patterns")
BUILD = ("-shared", "-fPIC", "-pthread")
# GCC takes -mcpu on x86 too, and makes code for processors of twenty years ago.
IS_ARM = platform.machine() in ("aarch64", "arm64")
PROCESSORS = ("-march=native", "-mcpu=native") if IS_ARM else ("-march=native",)


def load(source: pathlib.Path, macros: tuple[str, ...] = ()) -> ctypes.CDLL | None:
  """Loads the C++ file `source`, compiled for this processor, with `macros` defined.

  Returns None where there is no compiler that can compile it; `get_failure` says why. The machine
  code is kept in the user's cache, under a name that depends on the source, the compiler and the
  processor.
  """
  return _try_to_load(source, macros)[0]


def get_failure(source: pathlib.Path, macros: tuple[str, ...] = ()) -> str:
  """Returns one line on why `load` returns None, or "" where it does not."""
  return _try_to_load(source, macros)[1]


@functools.cache
def _try_to_load(source: pathlib.Path, macros: tuple[str, ...]) -> tuple[ctypes.CDLL | None, str]:
  try:
    compiler = shlex.split(os.environ.get("CXX") or "c++")
  except ValueError as error:  # an open quotation mark
    return None, f"CXX: {error}"
  failures = []
  for optimize in (OPTIMIZE, OPTIMIZE[:-1]):  # Clang may not know the last one
    for processor in PROCESSORS:
      options = [*BUILD, *optimize, processor, *(f"-D{name}" for name in macros)]
      try:
        return _load([*compiler, *options], source), ""
      except subprocess.CalledProcessError as error:
        failures.append(errors.shorten(error.stderr.decode(errors="replace") or error))
      except OSError as error:
        failures.append(errors.shorten(error))
  return None, failures[0]  # the later ones may complain of an option alone


def _load(command: list[str], source: pathlib.Path) -> ctypes.CDLL:
  name = f"{source.stem}-{_get_digest(command, source)}.so"
  if not (cache := environment.find_cache("kernels")):
    with tempfile.TemporaryDirectory() as folder:
      return _compile(command, source, pathlib.Path(folder, name))
  path = pathlib.Path(cache, name)
  with contextlib.suppress(OSError):  # it is missing, or damaged
    return ctypes.CDLL(str(path))
  return _compile(command, source, path)


def _get_digest(command: list[str], source: pathlib.Path) -> str:
  """Of all that the machine code depends on; home folders may be shared by unlike machines."""
  # The compiler's version and the processor's instructions, as macros.
  macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
  sources = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
  content = (shlex.join(command).encode(), macros, *sources)
  return hashlib.sha256(b"\0".join(content)).hexdigest()[:16]


def _compile(command: list[str], source: pathlib.Path, path: pathlib.Path) -> ctypes.CDLL:
  """Compiles to `path`, whole or not at all: other processes may compile the same at this time."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    part = os.path.join(folder, path.name)
    _run([*command, "-o", part, str(source)])
    os.replace(part, path)
  return ctypes.CDLL(str(path))


def _run(command: list[str]) -> bytes:
  """Returns what `command` prints; raises an OSError or a CalledProcessError if it fails."""
  return subprocess.run(command, check=True, capture_output=True).stdout
