"""Settings that must precede the first import of JAX."""

import atexit
import gc
import importlib.util
import os
import shutil
import tempfile
from typing import Any

import pytest

from flax_cifar import environment

# Four devices on any machine, to test sharding; the processes of pytest-xdist inherit them.
if "PYTEST_XDIST_WORKER" not in os.environ:
  os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
  )
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # docs/gpu.md has tests for others
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
# NumPy's products spin while they wait for a core that another test uses.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Many tests train the same tiny network: compile it once, and never reuse old files. The processes
# of pytest-xdist inherit the folder of the one that starts them.
if "PYTEST_XDIST_WORKER" not in os.environ:
  os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="flax_cifar_tests_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["XDG_CACHE_HOME"], "xla")
  atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# A process reads it when it starts: those of pytest-xdist, and the programs that tests start.
os.environ.setdefault("GLIBC_TUNABLES", environment.VARIABLES["GLIBC_TUNABLES"])
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# XLA compiles in half the time without LLVM's optimizations; see `optimized`.
if os.environ["JAX_PLATFORMS"] == "cpu":
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

# The tests check the annotations of these modules, shapes included, at each call of a function.
# Other modules accept a ConfigDict as a Mapping, or check wrong types themselves.
CHECKED = (
  *("flax_cifar.kernels", "flax_cifar.metrics"),
  *("flax_cifar.data.augment.device", "flax_cifar.data.augment.device_color"),
  *("flax_cifar.data.augment.device_pixels", "flax_cifar.data.augment.device_random"),
  *("flax_cifar.data.augment.host", "flax_cifar.data.augment.mixing"),
  *("flax_cifar.data.augment.normalize", "flax_cifar.models.blocks", "flax_cifar.models.dilated"),
  *("flax_cifar.models.dropout", "flax_cifar.models.five_convs", "flax_cifar.models.ghost"),
  *("flax_cifar.models.keras_base", "flax_cifar.models.keras_fcn", "flax_cifar.models.norms"),
  *("flax_cifar.models.pyramid", "flax_cifar.models.skip", "flax_cifar.models.skip_dilated"),
  *("flax_cifar.models.tiny", "flax_cifar.models.wide"),
)


def check_types(function: Any) -> Any:
  """Wraps `function` so that it checks the types of its arguments and its result.

  As in mypy, an int may stand for a float. Linen's attributes are left out: beartype cannot check
  the protocols among them.
  """
  import beartype

  if function.__name__ == "__init__":
    return function
  return beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))(function)


if importlib.util.find_spec("beartype"):
  import jaxtyping

  jaxtyping.install_import_hook(CHECKED, f"{__name__}.check_types")


def pytest_sessionfinish():
  """At its end pytest-xdist interrupts a process, where JAX's callback would print a traceback."""
  gc.callbacks.clear()


@pytest.fixture
def optimized():
  """Compiles as for users, for tests of what XLA computes or of how many operations it leaves."""
  import jax

  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def tiny_model(monkeypatch):
  """Registers TinyNet, so that a config can name it."""
  from flax_cifar import models
  from tests import tiny

  monkeypatch.setitem(models.MODELS, "tiny", tiny.TinyNet)


@pytest.fixture
def data(tmp_path):
  """The name of a tiny data set."""
  from tests import tiny

  return tiny.write_data(tmp_path / "tiny.npz")
