"""Agreement of one process, where nothing is exchanged; test_processes.py has several."""

import jax
import pytest

from flax_cifar import errors
from flax_cifar.parallel import agreement


def raise_error():
  raise errors.UserError("the folder is full")


def test_a_process_alone_agrees_with_itself():
  assert agreement.is_first()
  assert agreement.largest(3, True) == (3, True)
  assert (agreement.any_process(True), agreement.any_process(False)) == (True, False)
  agreement.check_same({"any": object()})


def test_its_function_is_called_as_it_is():
  marker = object()  # no JSON
  assert agreement.by_first(lambda value: value)(marker) is marker


@pytest.mark.parametrize(
  "exchange", [lambda: agreement.largest(1), lambda: agreement.by_first(raise_error)()]
)
def test_what_the_first_process_does_alone_can_exchange_nothing(exchange):
  with pytest.raises(RuntimeError, match="process 0 is alone"):
    agreement.by_first(exchange)()
  assert agreement.largest(1) == (1,)


def test_a_failed_write_of_the_first_process_ends_all(monkeypatch):
  """The two sides of an exchange between two processes, one after the other."""
  sent = []

  def gather(text):
    sent.append(text)
    return [sent[0], text]

  def fail():
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(agreement, "_gather", gather)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(OSError, match="No space left"):
    agreement.by_first(fail)()
  monkeypatch.setattr(agreement, "is_first", lambda: False)
  with pytest.raises(errors.UserError, match=r"process 0 of the run has failed \(.*No space left"):
    agreement.by_first(fail)()


def test_its_errors_are_its_own():
  with pytest.raises(errors.UserError, match="the folder is full"):
    agreement.by_first(raise_error)()
  with (
    pytest.raises(errors.UserError, match="the folder is full") as info,
    agreement.share_errors(),
  ):
    raise_error()
  assert info.traceback[-1].name == "raise_error"
