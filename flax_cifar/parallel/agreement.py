"""Decisions that all processes of a run share; a single process exchanges nothing.

Every process must call these functions, in the same order.
"""

import contextlib
import contextvars
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_cifar import errors, files
from flax_cifar.parallel import watchdog

P = ParamSpec("P")
T = TypeVar("T")

ROW_BYTES = 4096
_ALONE = contextvars.ContextVar("alone", default=False)  # whether `by_first` calls its function


def is_first() -> bool:
  """Whether this is process 0, which alone writes files and prints."""
  return jax.process_index() == 0


def largest(*values: int) -> tuple[int, ...]:
  """Each value's maximum over all processes; of flags, whether any process has set it."""
  _require_all()
  if jax.process_count() == 1:
    return values
  sharding, reduce = _create_reduce()
  rows = np.tile(np.array(values, np.int32), (jax.local_device_count(), 1))
  placed = jax.make_array_from_process_local_data(sharding, rows)
  found = tuple(np.asarray(reduce(placed)).tolist())
  watchdog.report_progress()
  return found


@functools.cache
def _create_reduce() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
  mesh = Mesh(np.array(jax.devices()), ("device",))
  replicated = NamedSharding(mesh, PartitionSpec())
  reduce = jax.jit(lambda rows: rows.max(0), out_shardings=replicated)
  return NamedSharding(mesh, PartitionSpec("device")), reduce


def any_process(flag: bool) -> bool:
  """Whether `flag` is set in any process."""
  return bool(largest(int(flag))[0])


def by_first(function: Callable[P, T]) -> Callable[P, T]:
  """Lets process 0 alone call `function`, while all others wait for it.

  They return what it returns there, which must be something that JSON can hold. They raise its
  UserError, and for its OSError another UserError, so that all end alike.
  """

  @functools.wraps(function)
  def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
    _require_all()
    if jax.process_count() == 1:
      with _alone():
        return function(*args, **kwargs)
    result: Any = None
    message, cause = "", None
    try:
      if is_first():
        with _alone():
          result = function(*args, **kwargs)
    except errors.UserError as error:
      message, cause = str(error), error
    except OSError as error:
      _exchange_failure(error)
      raise
    shared: Any = _exchange(result, message, cause)[0]
    return result if is_first() else shared

  return wrapped


def _exchange_failure(error: OSError) -> None:
  """Lets the other processes end; this one raises `error`, for which its caller has a remedy."""
  with contextlib.suppress(errors.UserError):
    _exchange(None, f"process 0 of the run has failed ({errors.shorten(error)})")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
  token = _ALONE.set(True)
  try:
    yield
  finally:
    _ALONE.reset(token)


def _require_all() -> None:
  """Raises a RuntimeError in what `by_first` calls: there the other processes take no part."""
  if _ALONE.get():
    raise RuntimeError("process 0 is alone here, so it can exchange nothing")


@contextlib.contextmanager
def share_errors() -> Iterator[None]:
  """Raises the UserError of any process in all of them, at the end of the block."""
  message, cause = "", None
  try:
    yield
  except errors.UserError as error:
    if jax.process_count() == 1:
      raise
    message, cause = str(error), error
  if jax.process_count() > 1:
    _exchange(None, message, cause)


def check_same(values: Mapping[str, Any]) -> None:
  """Raises a UserError in every process unless all have the same `values`, which JSON can hold."""
  _require_all()
  if jax.process_count() == 1:
    return
  ours = json.loads(files.encode_json(values))
  theirs = _exchange(ours if is_first() else None)[0]
  with share_errors():
    differences = errors.list_differences(theirs, ours)
    if differences:
      raise errors.UserError(
        f"differs from process 0: {errors.list_some(differences, 3)}. Start all processes with "
        "the same command, versions and data."
      )


def check_same_file(path: pathlib.Path) -> None:
  """Raises a UserError in every process unless all read the same text in `path`."""
  text = by_first(path.read_text)(encoding="utf-8")
  with share_errors():
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
      raise errors.UserError(
        f"{str(path)!r} is not what process 0 has written; choose a --workdir on a file system "
        "that all machines share."
      )


def _exchange(value: Any, message: str = "", cause: Exception | None = None) -> list[Any]:
  """The value of each process, which JSON can hold.

  Raises:
    UserError: a process has a `message`; it is that of the first one.
  """
  pairs = [json.loads(text) for text in _gather(files.encode_json([value, message]))]
  messages = [text for _, text in pairs]
  number = next((number for number, text in enumerate(messages) if text), None)
  if number is not None:
    from_all = len(set(messages)) == 1
    where = "" if from_all or number == 0 else f"process {number} of {len(messages)}: "
    raise errors.UserError(where + messages[number]) from cause
  return [value for value, _ in pairs]


def _gather(text: str) -> list[str]:
  """The text of each process.

  A row has room for most texts, so that one program serves them all.
  """
  encoded = text.encode()
  (longest,) = largest(len(encoded))
  room = max(ROW_BYTES, 1 << (longest - 1).bit_length())
  row = np.frombuffer(encoded.ljust(room), np.uint8)
  return [bytes(row).decode() for row in np.asarray(multihost_utils.process_allgather(row))]
