"""The values of a config that a run settles before it starts."""

import re

import jax
import jax.numpy as jnp
import pytest

from flax_cifar import errors
from flax_cifar.configs import common
from flax_cifar.run import config as config_lib


@pytest.mark.parametrize("fast", ["bfloat16", "float32"])
def test_a_run_keeps_the_type_that_auto_meant(monkeypatch, fast):
  monkeypatch.setattr(
    config_lib.backend, "settle_dtype", lambda name: fast if name == "auto" else name
  )
  config = common.get_config()
  config.compute_dtype = "auto"
  settled = config_lib.settle(config)
  assert settled.compute_dtype == fast
  assert config.compute_dtype == "auto"
  assert config_lib.settle(settled).to_dict() == settled.to_dict()
  assert jnp.dtype(config_lib.create_model(config, num_classes=10).dtype) == fast
  settled.compute_dtype = "auto"
  assert settled.to_dict() == config.to_dict()  # nothing else changes


def test_an_unknown_type_is_an_error_that_lists_all_of_them():
  config = common.get_config()
  config.compute_dtype = "fp16"
  message = r"compute_dtype='fp16' is unknown; choose one of auto, float32, bfloat16\."
  with pytest.raises(errors.UserError, match=message):
    config_lib.settle(config)
  with pytest.raises(errors.UserError, match=message):
    config_lib.create_model(config, num_classes=10)


def test_a_value_that_no_key_may_have_is_an_error():
  config = common.get_config()
  config.optimizer.learning_rate = float("nan")
  with pytest.raises(errors.UserError, match="learning_rate=nan"):
    config_lib.settle(config)


def test_an_error_that_names_no_keys_is_explained_by_all_of_the_network():
  config = common.get_config()
  with pytest.raises(errors.UserError) as caught, config_lib.explain_misfit(config):
    raise ValueError("shapes differ")
  named = re.findall(r"([\w.]+)=", str(caught.value))
  flat = config_lib.flatten(config.to_dict())
  sections = ("model.", "norm.batch.")
  expected = {key for key in flat if key.startswith(sections)} | {"data.image_size", "batch_size"}
  assert len(named) == len(set(named))
  assert set(named) == expected
  assert str(caught.value).startswith("shapes differ; change one of ")


def test_a_config_without_a_key_says_where_all_are():
  config = common.get_config()
  with config.unlocked():
    del config.ema
  with pytest.raises(errors.UserError, match=r"the config lacks ema\.decay; start from get_config"):
    config_lib.settle(config)


def test_a_config_with_an_unknown_key_says_where_all_are():
  config = common.get_config()
  with config.unlocked():
    config.model.dept = 3
  with pytest.raises(errors.UserError, match=r"unknown keys: model\.dept; start from get_config"):
    config_lib.settle(config)


def test_too_little_memory_is_one_line():
  error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
  config, message = common.get_config(), "too little memory for batch_size=128, .*Out of memory"
  with pytest.raises(errors.UserError, match=message), config_lib.explain_exhausted(config):
    raise error
  with pytest.raises(jax.errors.JaxRuntimeError), config_lib.explain_exhausted(config):
    raise jax.errors.JaxRuntimeError("INTERNAL: another one")
