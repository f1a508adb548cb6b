"""Each snippet of docs/extending.md runs unchanged, and its addition works."""

import pathlib
import re
import sys
import types

import albumentations as A
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_cifar import errors, models, optim, train
from flax_cifar import state as state_lib
from flax_cifar.configs import common
from flax_cifar.data import dataset, load
from flax_cifar.data.augment import arguments, device, device_pixels, host
from flax_cifar.data.augment import normalize as normalize_lib
from flax_cifar.models import layer_table, norms
from flax_cifar.run import config as config_lib
from tests import tiny

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs/extending.md"
SECTION = re.compile(r"^## ([^\n]+)$|^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The tables that the snippets extend.
TABLES = (
  *((models, "MODELS"), (norms, "NORMS"), (layer_table, "LEAVES")),
  *((device, "DEVICE_OPS"), (host, "OPS"), (arguments, "RULES")),
  *((load, "LOADERS"), (optim, "OPTIMIZERS")),
)


def list_snippets():
  """(section, line of its first line, code) of each snippet, in order."""
  text, snippets, section = DOCUMENT.read_text(), [], None
  for match in SECTION.finditer(text):
    if match[1]:
      section = match[1]
    else:
      snippets.append((section, text[: match.start(2)].count("\n"), match[2]))
  return snippets


@pytest.fixture
def execute(monkeypatch):
  """Executes the snippet of a section and returns its names; the tables are restored afterwards."""
  for module, name in TABLES:
    table = getattr(module, name)
    monkeypatch.setattr(module, name, dict(table) if isinstance(table, dict) else table)

  def run(section):
    ((line, code),) = [(line, code) for title, line, code in list_snippets() if title == section]
    snippet = types.ModuleType("snippet")
    monkeypatch.setitem(sys.modules, "snippet", snippet)
    # The empty lines make the numbers in a traceback those of the document.
    exec(compile("\n" * line + code, str(DOCUMENT), "exec"), vars(snippet))
    return snippet

  return run


def test_each_snippet_is_tested_here_and_the_tables_are_restored():
  sections = [section for section, _, _ in list_snippets()]
  assert sections == ["A network", "A norm", "An augmentation", "A data set", "An optimizer"]
  added = ("stairs", "rms", "solarize", "npy:PATH", "lion", "npy")
  assert not any(name in getattr(module, table) for module, table in TABLES for name in added)


def train_steps(config, steps):
  """The losses of `steps` on one batch of tiny images, and the states before and after each."""
  model = config_lib.create_model(config, num_classes=tiny.CLASSES)
  optimizer = optax.sgd(0.1)
  state = state_lib.create_train_states(
    model=model,
    optimizer=optimizer,
    plateau=optim.create_plateau(enabled=False, **config.schedule.plateau),
    images=jnp.zeros((1, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3)),
    ema_decay=0.0,
    seeds=[0],
  )[0]
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (16, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3), dtype=np.uint8),
    "label": rng.integers(tiny.CLASSES, size=16),
  }

  @jax.jit
  def step(state):
    return train.train_step(
      state,
      batch,
      model=model,
      optimizer=optimizer,
      normalize=normalize_lib.create_normalize((0.5,) * 3, (0.25,) * 3, dtype="float32"),
      mixing=None,
      distillation=None,
      label_smoothing=0.0,
      ema_decay=0.0,
    )

  states, losses = [state], []
  for _ in range(steps):
    state, sums = step(state)
    states.append(state)
    losses.append(float(sums["loss_sum"]))
  return losses, states


def test_the_network_has_logits_and_a_layer_table(execute):
  snippet = execute("A network")
  assert type(snippet.model) is models.MODELS[snippet.config.model.name] is snippet.Stairs
  assert (snippet.logits.shape, snippet.logits.dtype) == ((2, 10), jnp.float32)
  kinds = ["conv 3x3", "BatchNorm", "conv 1x1", "MaxPool"] * 3 + ["GlobalAveragePool", "conv 1x1"]
  assert [row.kind for row in snippet.rows] == kinds
  assert [row.output_shape for row in snippet.rows[3::4]] == [(16, 16, 8), (8, 8, 16), (4, 4, 32)]
  widths = [(3, 16, 8), (8, 32, 16), (16, 64, 32)]
  expected = sum(9 * a * b + 2 * b + b * c for a, b, c in widths) + 32 * 10
  assert sum(row.parameters for row in snippet.rows) == expected
  leaves = jax.tree.leaves(snippet.variables["params"])
  assert sum(leaf.size for leaf in leaves) == expected


def test_the_norm_follows_its_formula(execute):
  snippet = execute("A norm")
  x, scale = np.asarray(snippet.x, np.float64), np.array([1.0, -2.0, 0.5])
  expected = x / np.sqrt((x**2).mean((1, 2, 3), keepdims=True) + 1e-5) * scale
  variables = {"params": {"scale": jnp.asarray(scale, jnp.float32)}}
  for relu, expected_output in ((False, expected), (True, np.maximum(expected, 0))):
    norm = models.get_norm("rms", snippet.config.norm)(relu=relu)
    y = norm.apply(variables, snippet.x, True)
    np.testing.assert_allclose(y, expected_output, rtol=1e-5, atol=1e-6)
  assert norm.apply(variables, snippet.x.astype(jnp.bfloat16), False).dtype == jnp.bfloat16


@pytest.mark.usefixtures("tiny_model")
def test_the_norm_trains_within_a_network(execute):
  config = execute("A norm").config
  config.model.update({"name": "tiny", "dropout_rate": 0.0})
  losses, states = train_steps(config, 3)
  assert losses[-1] < losses[0]
  before, after = (np.asarray(s.params["unit"]["norm"]["scale"]) for s in (states[0], states[-1]))
  assert (before == 1).all()
  assert (before != after).any()


def test_the_norm_is_in_the_layer_table(execute):
  config = execute("A norm").config
  config.model.name = "pyramid"
  model = config_lib.create_model(config, num_classes=10)
  rows = layer_table.get_layer_table(model, (32, 32, 3))
  assert [row.parameters for row in rows if row.kind == "RMSNorm"][:2] == [16, 32]
  assert layer_table.get_receptive_field(rows) == (44, 44)


def test_the_augmentation_matches_albumentations(execute):
  snippet = execute("An augmentation")
  create, images = device.DEVICE_OPS["solarize"], snippet.images
  thresholds = np.random.default_rng(1).uniform(size=len(images)).astype(np.float32)
  pixels = device_pixels.pack(jnp.asarray(images))
  actual = device_pixels.unpack(
    create(lowest=0.0, p=1.0).apply(pixels, threshold=jnp.asarray(thresholds))
  )
  transform = A.Solarize()
  expected = [transform.apply(*pair) for pair in zip(images, thresholds.tolist(), strict=True)]
  np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("lowest", "p"), [(0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (0.0, 0.0)])
def test_both_backends_augment_only_bright_pixels(execute, lowest, p):
  snippet = execute("An augmentation")
  chosen = {"ops": ("solarize",), "mean": (0.5,) * 3, "solarize": {"lowest": lowest, "p": p}}
  images, count = snippet.images, len(snippet.images)
  augment = device.create_device_augment(**chosen)
  on_host = host.create_host_augment(**chosen)
  outputs = {
    "device": augment(images, jax.random.key(1), jnp.int32(0), jnp.arange(count)),
    "host": [on_host(image, (1, 0, number)) for number, image in enumerate(images)],
  }
  for backend, output in outputs.items():
    output = np.asarray(output)
    changed = output != images
    assert (output[changed] == 255 - images[changed]).all(), backend
    assert not changed[images < int(255 * lowest)].any(), backend
    fraction = changed.any((1, 2, 3)).mean()
    assert abs(fraction - p) < 0.2 if lowest < 1 else fraction <= 1, backend


def test_the_augmentation_has_arguments_with_rules(execute):
  config = execute("An augmentation").config
  wrong = {"ops": config.augment.ops, "mean": (0.5,) * 3, "solarize": {"lowest": 1.5, "p": 0.5}}
  for create in (device.create_device_augment, host.create_host_augment):
    with pytest.raises(errors.UserError, match=r"augment\.solarize\.lowest=1\.5 .*a fraction"):
      create(**wrong)
  given = config_lib.get_feed_arguments(config)
  assert given["op_arguments"]["solarize"] == {"lowest": 0.5, "p": 0.5}


def test_the_data_set_loads(execute, tmp_path):
  execute("A data set")
  rng = np.random.default_rng(0)
  (tmp_path / "class_names.txt").write_text("a\nb\nc\n")
  splits = {}
  for part, count in (("train", 9), ("test", 6)):
    images = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    splits[part] = dataset.Split(images, np.arange(count) % 3)
    np.save(tmp_path / f"{part}_images.npy", splits[part].images)
    np.save(tmp_path / f"{part}_labels.npy", splits[part].labels)
  data = load.load_dataset(name=f"npy:{tmp_path}", dir="", image_size=8)
  assert data.class_names == ("a", "b", "c")
  for part, split in splits.items():
    loaded = getattr(data, part)
    np.testing.assert_array_equal(loaded.images, split.images)
    np.testing.assert_array_equal(loaded.labels, split.labels)
    assert loaded.labels.dtype == np.int32
  with pytest.raises(errors.UserError, match="image_size=9"):
    load.load_dataset(name=f"npy:{tmp_path}", dir="", image_size=9)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"junk", None])
def test_the_data_set_refuses_damaged_files_in_one_line(execute, tmp_path, content):
  execute("A data set")
  (tmp_path / "class_names.txt").write_text("a\nb\n")
  if content is not None:
    (tmp_path / "train_images.npy").write_bytes(content)
  with pytest.raises(errors.UserError, match=rf"npy:{tmp_path} cannot be read") as caught:
    load.load_dataset(name=f"npy:{tmp_path}", dir="", image_size=8)
  assert "\n" not in str(caught.value)


def test_the_optimizer_follows_the_rule_of_its_source(execute):
  settings = execute("An optimizer").config.optimizer.to_dict()
  settings |= {"learning_rate": 0.1, "weight_decay": 0.01}
  optimizer = optim.create_optimizer(lambda step: 1.0, **settings)
  params, average, expected = {"kernel": jnp.full((2, 2), 3.0)}, 0.0, 3.0
  state = optimizer.init(params)
  for gradient in (1.0, -3.0, -2.0, 0.3):
    updates, state = optimizer.update({"kernel": jnp.full((2, 2), gradient)}, state, params)
    params = optax.apply_updates(params, updates)
    sign = np.sign(0.9 * average + 0.1 * gradient)
    expected -= 0.1 * (sign + 0.01 * expected)
    average = 0.99 * average + 0.01 * gradient
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-5)


def test_the_optimizer_lowers_a_loss_and_names_bad_arguments(execute):
  snippet = execute("An optimizer")
  assert (jnp.square(snippet.params["kernel"]) < 9).all()
  settings = snippet.config.optimizer.to_dict() | {"lion": {"b1": 1.0, "b2": 0.9}}
  with pytest.raises(errors.UserError, match=r"optimizer\.lion\.b1=1\.0 .*below 1"):
    optim.create_optimizer(lambda step: 1.0, **settings)
  assert "lion" not in common.get_config().optimizer
