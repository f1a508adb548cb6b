"""The weights file is loaded exactly; damaged and foreign files are refused."""

import dataclasses
import hashlib
import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from flax_cifar import errors, models
from flax_cifar.data.augment import normalize as normalize_lib
from flax_cifar.run import weights as weights_lib
from tests import tiny

SHAPE = (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3)
METADATA = {
  "class_names": ("ok", "ça va", '"quoted"\n'),
  "image_shape": SHAPE,
  "mean": (0.1, 1 / 3, 0.7),
  "std": (0.2, 0.25, 1e-5),
  "data": {"class_names": ["ok"], "test_images": 3, "test_sha256": "00ff"},
}


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
  monkeypatch.setitem(models.MODELS, "tiny", tiny.TinyNet)


def make_config(**changes):
  return tiny.get_config("shapes", **changes).to_dict()


def make_variables(model=None, seed=0):
  """Random parameters and batch statistics, as NumPy arrays."""
  rng = np.random.default_rng(seed)
  init = (model or tiny.TinyNet()).init
  shapes = jax.eval_shape(lambda: init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False))
  return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes)


@pytest.fixture
def path(tmp_path):
  """The path of a valid weights file."""
  path = tmp_path / "weights.safetensors"
  weights_lib.save_weights(path, make_variables(), config=make_config(), **METADATA)
  return path


def read_by_hand(blob):
  """Parses the format by its specification: (metadata, {name: (dtype, shape, bytes)})."""
  (length,) = struct.unpack("<Q", blob[:8])
  header, payload = json.loads(blob[8 : 8 + length]), blob[8 + length :]
  metadata = header.pop("__metadata__")
  return metadata, {
    name: (entry["dtype"], tuple(entry["shape"]), payload[slice(*entry["data_offsets"])])
    for name, entry in header.items()
  }


def rewrite(path, **changes):
  """Changes fields of the metadata as a forger would, with a valid digest."""
  blob = path.read_bytes()
  metadata, _ = read_by_hand(blob)
  content = json.loads(metadata["flax_cifar"]) | changes | {"sha256": "0" * 64}
  content = {name: value for name, value in content.items() if value is not None}
  (length,) = struct.unpack("<Q", blob[:8])
  header = json.loads(blob[8 : 8 + length])
  header["__metadata__"]["flax_cifar"] = json.dumps(content)
  text = json.dumps(header).encode()
  new = struct.pack("<Q", len(text)) + text + blob[8 + length :]
  digest = hashlib.sha256(new).hexdigest().encode()
  path.write_bytes(new.replace(b"0" * 64, digest, 1))


def test_everything_is_loaded_as_it_was_saved(path):
  weights = weights_lib.load_weights(path)
  jax.tree.map(np.testing.assert_array_equal, weights.variables, make_variables())
  assert json.dumps(weights.config) == json.dumps(make_config())
  assert {name: getattr(weights, name) for name in METADATA} == METADATA


def test_the_file_is_what_any_reader_of_safetensors_expects(path):
  _, tensors = read_by_hand(path.read_bytes())
  params, stats = make_variables()["params"], make_variables()["batch_stats"]
  expected = {
    "params/unit/conv/kernel": params["unit"]["conv"]["kernel"],
    "params/unit/norm/scale": params["unit"]["norm"]["scale"],
    "params/unit/norm/bias": params["unit"]["norm"]["bias"],
    "params/head/conv/kernel": params["head"]["conv"]["kernel"],
    "batch_stats/unit/norm/mean": stats["unit"]["norm"]["mean"],
    "batch_stats/unit/norm/var": stats["unit"]["norm"]["var"],
  }
  assert tensors == {name: ("F32", a.shape, a.tobytes()) for name, a in expected.items()}


def test_the_network_is_rebuilt_from_the_file_alone(path):
  weights = weights_lib.load_weights(path)
  model = weights_lib.create_network(weights)
  pixels = np.random.default_rng(1).integers(0, 256, (5, *SHAPE), dtype=np.uint8)
  normalize = normalize_lib.create_normalize(weights.mean, weights.std, dtype=np.float32)
  logits = model.apply(
    jax.device_put(weights.variables), normalize(jnp.asarray(pixels)), train=False
  )
  images = (pixels / 255 - np.array(METADATA["mean"])) / np.array(METADATA["std"])
  params, stats = make_variables()["params"], make_variables()["batch_stats"]
  padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
  maps = np.einsum("nyxcij,ijco->nyxo", windows, params["unit"]["conv"]["kernel"])
  norm, statistics = params["unit"]["norm"], stats["unit"]["norm"]
  maps = (maps - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5) * norm["scale"] + norm[
    "bias"
  ]
  expected = np.maximum(maps, 0).mean((1, 2)) @ params["head"]["conv"]["kernel"][0, 0]
  np.testing.assert_allclose(logits, expected, rtol=1e-4)


def test_the_same_network_gives_the_same_bytes(path, tmp_path):
  copy = tmp_path / "copy.safetensors"
  weights_lib.save_weights(copy, make_variables(), config=make_config(), **METADATA)
  assert copy.read_bytes() == path.read_bytes()


def test_jax_arrays_and_any_memory_order_give_the_same_bytes(path, tmp_path):
  for name, convert in (("jax", jax.numpy.asarray), ("fortran", np.asfortranarray)):
    variables = jax.tree.map(convert, make_variables())
    weights_lib.save_weights(tmp_path / name, variables, config=make_config(), **METADATA)
    assert (tmp_path / name).read_bytes() == path.read_bytes()


def test_a_network_without_statistics_is_saved_and_loaded(tmp_path):
  variables = make_variables()
  del variables["params"]["unit"]["norm"]
  variables["batch_stats"] = {}
  path, config = tmp_path / "weights", make_config(**{"model.norm": "none"})
  weights_lib.save_weights(path, variables, config=config, **METADATA)
  weights = weights_lib.load_weights(path)
  assert weights.variables.keys() == {"params"}
  weights_lib.create_network(weights)


def test_every_flipped_byte_is_noticed(path):
  good = path.read_bytes()
  for position in range(0, len(good), 29):
    blob = bytearray(good)
    blob[position] ^= 1 << position % 8
    path.write_bytes(blob)
    with pytest.raises(errors.UserError, match=r"weights\.safetensors' (is|has|was) ") as caught:
      weights_lib.load_weights(path)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_noticed(path):
  good = path.read_bytes()
  for length in (*range(12), 100, len(good) // 2, len(good) - 1):
    path.write_bytes(good[:length])
    with pytest.raises(errors.UserError, match=r"weights\.safetensors' is damaged"):
      weights_lib.load_weights(path)
  path.write_bytes(good + b"\0")
  with pytest.raises(errors.UserError, match="is damaged"):
    weights_lib.load_weights(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
  with pytest.raises(errors.UserError, match=r"nothing\.safetensors' does not exist"):
    weights_lib.load_weights(tmp_path / "nothing.safetensors")
  with pytest.raises(errors.UserError, match="cannot be read"):
    weights_lib.load_weights(tmp_path)


def test_files_of_other_programs_and_versions_are_refused(path, tmp_path):
  for metadata in (None, {"format": "pt"}):
    safetensors.numpy.save_file({"x": np.ones(3)}, tmp_path / "foreign", metadata=metadata)
    with pytest.raises(errors.UserError, match=r"foreign' was written by another program"):
      weights_lib.load_weights(tmp_path / "foreign")
  rewrite(path, format_version=2)
  with pytest.raises(errors.UserError, match="has format version 2, this program reads version 1"):
    weights_lib.load_weights(path)


@pytest.mark.parametrize(
  "changes",
  [
    {"config": None},
    {"config": 3},
    {"class_names": None},
    {"image_shape": [8, 8]},
    {"image_shape": "8x8x3"},
    {"mean": ["red"]},
    {"std": 0.5},
    {"format_version": None},
  ],
)
def test_a_forged_file_is_refused(path, changes):
  rewrite(path)
  weights_lib.load_weights(path)
  rewrite(path, **changes)
  with pytest.raises(errors.UserError, match="is damaged or no weights file"):
    weights_lib.load_weights(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_values_are_neither_written_nor_read(path, tmp_path, value):
  variables = make_variables()
  variables["batch_stats"]["unit"]["norm"]["var"][2] = value
  with pytest.raises(
    errors.UserError, match=r"not finite, first in 'batch_stats/unit/norm/var' \(1 of 6"
  ):
    weights_lib.save_weights(tmp_path / "new", variables, config=make_config(), **METADATA)
  assert not (tmp_path / "new").exists()
  _, tensors = read_by_hand(path.read_bytes())
  old = tensors["params/unit/norm/scale"][2]
  path.write_bytes(path.read_bytes().replace(old, np.float32(value).tobytes() + old[4:]))
  rewrite(path)
  with pytest.raises(errors.UserError, match="not finite, first in 'params/unit/norm/scale'"):
    weights_lib.load_weights(path)


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
  before = path.read_bytes()

  def fail(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(errors.UserError, match=r"cannot be written.*No space left"):
    weights_lib.save_weights(path, make_variables(seed=1), config=make_config(), **METADATA)
  assert path.read_bytes() == before
  assert list(path.parent.iterdir()) == [path]


def test_variables_of_another_network_are_refused_and_named():
  variables = make_variables()
  weights_lib.check_network(variables, tiny.TinyNet(), SHAPE)
  with pytest.raises(errors.UserError) as caught:
    weights_lib.check_network(variables, tiny.TinyNet(features=5), SHAPE)
  assert "another network: batch_stats/unit/norm/mean is 'float32 (6,)' there" in str(caught.value)
  assert "and 'float32 (5,)' here" in str(caught.value)
  assert "(6 differ)" in str(caught.value)
  del variables["params"]["head"]
  variables["params"]["unit"]["norm"]["bias"] = np.zeros(6, np.float16)
  with pytest.raises(errors.UserError) as caught:
    weights_lib.check_network(variables, tiny.TinyNet(), SHAPE)
  assert "params/head/conv/kernel is 'absent' there" in str(caught.value)
  assert "norm/bias is 'float16 (6,)' there and 'float32 (6,)' here (2 differ)" in str(caught.value)


def test_variables_of_several_seeds_are_refused(tmp_path):
  stacked = jax.tree.map(lambda array: np.stack([array, array]), make_variables())
  weights_lib.save_weights(tmp_path / "weights", stacked, config=make_config(), **METADATA)
  with pytest.raises(
    errors.UserError, match=r"mean is 'float32 \(2, 6\)' there and 'float32 \(6,\)' here"
  ):
    weights_lib.create_network(weights_lib.load_weights(tmp_path / "weights"))


@pytest.mark.parametrize(
  ("section", "value", "message"),
  [
    ("model", {"name": "resnet"}, "model.name='resnet'"),
    ("model", {"norm": "layer"}, "another network: batch_stats/unit"),
    ("model", {"layers": 50}, "builds no network here.*'layers'.*the commit that wrote them"),
    ("norm", {"batch": {"momentum": "high"}}, "builds no network here|another network"),
  ],
)
def test_a_config_that_does_not_fit_is_named(path, section, value, message):
  weights = weights_lib.load_weights(path)
  config = weights.config | {section: weights.config[section] | value}
  with pytest.raises(errors.UserError, match=message):
    weights_lib.create_network(dataclasses.replace(weights, config=config))
