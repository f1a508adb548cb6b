"""The choice of a kernel backend."""

import pytest

from flax_cifar import errors
from flax_cifar.kernels import backend


def test_the_variable_selects_a_backend(monkeypatch):
  monkeypatch.setenv(backend.VARIABLE, "definition")
  assert backend.select_backend() == "definition"
  monkeypatch.setenv(backend.VARIABLE, "fast")
  with pytest.raises(errors.UserError, match="FLAX_CIFAR_KERNELS='fast'"):
    backend.select_backend()


def test_onednn_is_refused_where_it_is_missing(monkeypatch):
  monkeypatch.setattr("flax_cifar.kernels.onednn.library.load_library", lambda: None)
  monkeypatch.setenv(backend.VARIABLE, "onednn")
  with pytest.raises(errors.UserError, match="onednn"):
    backend.select_backend()
  monkeypatch.delenv(backend.VARIABLE)
  assert backend.select_backend() == "xla"
