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

from flax_cifar import environment, errors, files

# Calls of memcpy, which GCC puts in the place of short loops, are slower than these.
OPTIMIZE = ("-std=c++17", "-O3", "-fno-tree-loop-distribute-patterns")
BUILD = ("-shared", "-fPIC", "-pthread")
# GCC takes -mcpu on x86 too, and makes code for processors of twenty years ago.
IS_ARM = platform.machine() in ("aarch64", "arm64")
PROCESSORS = ("-march=native", "-mcpu=native") if IS_ARM else ("-march=native",)
SECONDS = 600  # that a compiler may take, where ten are usual


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
      except subprocess.TimeoutExpired:
        return None, f"{compiler[0]} did not end within {SECONDS} s"
      except OSError as error:  # whatever the options
        return None, errors.shorten(error)
  return None, failures[0]  # the later ones may complain of an option alone


def _load(command: list[str], source: pathlib.Path) -> ctypes.CDLL:
  name = f"{source.stem}-{_get_digest(command, source)}"
  if cache := environment.find_cache("kernels"):
    folder = pathlib.Path(cache)
    with contextlib.suppress(OSError):  # a full disk, or one whose files may not be executed
      return ctypes.CDLL(str(_find(folder, name) or _compile(command, source, folder, name)))
  with tempfile.TemporaryDirectory() as temporary:
    return ctypes.CDLL(str(_compile(command, source, pathlib.Path(temporary), name)))


def _get_digest(command: list[str], source: pathlib.Path) -> str:
  """Of all that the machine code depends on; home folders may be shared by unlike machines."""
  # The compiler's version and the processor's instructions, as macros.
  macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
  sources = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
  content = (shlex.join(command).encode(), macros, *sources)
  return _shorten(hashlib.sha256(b"\0".join(content)).hexdigest())


def _find(folder: pathlib.Path, name: str) -> pathlib.Path | None:
  """The machine code that `_compile` has left in `folder`; None if there is none, or it is damaged.

  Code that was cut would kill the process that loads it.
  """
  return next((path for path in folder.glob(f"{name}-*.so") if _is_whole(path)), None)


def _compile(
  command: list[str], source: pathlib.Path, folder: pathlib.Path, name: str
) -> pathlib.Path:
  """Compiles into `folder`, whole or not at all: other processes may compile the same at this time.

  The digest of the machine code ends the name of its file.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder) as parts:
    part = pathlib.Path(parts, "part.so")
    _run([*command, "-o", str(part), str(source)])
    path = folder / f"{name}-{_shorten(files.digest(part))}.so"
    if not _is_whole(path):  # else another process may run it, from a network drive that forgets it
      os.replace(part, path)
  return path


def _is_whole(path: pathlib.Path) -> bool:
  return path.exists() and path.stem.endswith(_shorten(files.digest(path)))


def _shorten(digest: str) -> str:
  return digest[:16]


def _run(command: list[str]) -> bytes:
  """Returns what `command` prints.

  Raises:
    OSError: it cannot be started.
    subprocess.SubprocessError: it fails, or takes too long.
  """
  done = subprocess.run(
    command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS
  )
  return done.stdout
