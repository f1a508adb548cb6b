"""Agreement of one process, where nothing is exchanged; test_processes.py has several."""

import pytest

from flax_cifar import errors
from flax_cifar.parallel import agreement


def raise_error():
  raise errors.UserError("the folder is full")


def test_a_process_alone_agrees_with_itself():
  assert agreement.is_first()
  assert agreement.largest(3, True) == (3, True)
  assert not agreement.agreed(lambda: False)()
  agreement.check_same({"any": object()})


def test_its_function_is_called_as_it_is():
  marker = object()  # no JSON
  assert agreement.by_first(lambda value: value)(marker) is marker


def test_its_errors_are_its_own():
  with pytest.raises(errors.UserError, match="the folder is full"):
    agreement.by_first(raise_error)()
  with (
    pytest.raises(errors.UserError, match="the folder is full") as info,
    agreement.share_errors(),
  ):
    raise_error()
  assert info.traceback[-1].name == "raise_error"
