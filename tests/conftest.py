"""Settings that must precede the first import of JAX."""

import atexit
import os
import shutil
import tempfile

import pytest

# Four devices, to test sharding, on any machine.
os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # docs/gpu.md has tests for others
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
# Many tests train the same tiny network: compile it once, and never reuse old files.
CACHE = tempfile.mkdtemp(prefix="flax_cifar_tests_")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


@pytest.fixture
def tiny_model(monkeypatch):
  """Makes TinyNet a network that a config can name."""
  from flax_cifar.models import MODELS
  from tests.tiny import TinyNet

  monkeypatch.setitem(MODELS, "tiny", TinyNet)


@pytest.fixture
def data(tmp_path):
  """The name of a tiny data set."""
  from tests.tiny import write_data

  return write_data(tmp_path / "tiny.npz")
