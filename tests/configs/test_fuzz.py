"""A hostile config or command line gives an error that quotes the mistake, or a run that starts."""

import io
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flax_cifar import __main__, errors, models, signals, train
from flax_cifar.configs import common
from flax_cifar.data import feeds
from flax_cifar.data.augment import arguments as arguments_lib
from flax_cifar.data.sources import shapes
from flax_cifar.run import config as config_lib
from flax_cifar.tools import command_line
from tests import fuzz, mirror, reference, tiny

ROOT = Path(__file__).parents[2]
KEYS = config_lib.flatten(common.get_config().to_dict())

INTEGERS = (-(10**30), -1, 0, 1, 2, 3, 7, 10**5, 10**6, 10**9, 2**31 - 1, 2**32, 2**63, 10**30)
FLOATS = (math.nan, math.inf, -math.inf, -1.0, -1e-9, 0.0, 1e-300, 1e-9, 0.5, 1 - 1e-16, 1.0)
FLOATS += (1 + 1e-9, 2.0, 181.0, 1e38, 1e300)
TEXTS = ("", " ", "none", "None", "batc", "x" * 5000, "~nobody-here", "..", "a/b", "\0", "\udcff")
TEXTS += ("é\n", "{}", "[bold]", "float32", "float16", "reflect", "fill", "mean", "published")
DATA = ("cifar10", "shapes", "npz:", "npz:/", "npz:~nobody-here/x", "npz:\0", "npz:" + "x" * 5000)
DATA += ("folder:/", "folder:/dev", "folder:x", "folder:~nobody-here", "folder:\0", "npz:/dev/zero")
FILLS = ("black", "mean", "0,0,0", "(1, 2, 3)", "256,0,0", "-1,0,0", "1,2", "1,2,3,4", "1.5,0,0")
FILLS += ("grey", "", ",,", "nan,0,0", "²,0,0")
JUNK = (None, "rotat", "", 0, 0.5, -1, True, math.nan, math.inf, 1e-300, (), [1], {}, b"x", 10**400)


def tuples(values):
  return st.lists(st.sampled_from(values), max_size=4).map(tuple)


def hostile(key):
  """Values of the type of `key`, and some that it must refuse."""
  default = KEYS[key]
  if key == "data.name":
    return st.sampled_from(DATA + TEXTS)
  if key.endswith(".fill"):
    return st.sampled_from(FILLS + TEXTS)
  if key == "augment.ops":
    return tuples((*arguments_lib.RULES, *JUNK))
  if isinstance(default, list):
    return tuples((0.0, 0.4, 0.5, 1.0, *JUNK)) | st.tuples(
      *[st.sampled_from((0.3, 0.5, *JUNK))] * 3
    )
  choices = {bool: (False, True), int: INTEGERS, float: FLOATS, str: TEXTS}[type(default)]
  return st.sampled_from((None, *choices))


SMALL_HOLE = {"augment.coarse_dropout.height": 4, "augment.coarse_dropout.width": 4}


def activate(key):
  """Changes that make the run use `key`, if it belongs to an option that is chosen by name."""
  section, _, rest = key.partition(".")
  name = rest.partition(".")[0]
  if section == "norm":
    return {"model.norm": name}
  if section == "augment" and name in arguments_lib.RULES:
    return {"augment.ops": (name,), **SMALL_HOLE}
  if section in ("optimizer", "schedule", "mixing") and "." in rest:
    return {f"{section}.name": name}
  return {}


@st.composite
def changes(draw):
  """One to three keys with hostile values, and all changes needed for the run to use them."""
  keys = draw(st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=3, unique=True))
  bad = {key: draw(hostile(key)) for key in keys}
  used = {"augment.backend": draw(st.sampled_from(sorted(feeds.BACKENDS)))}
  for key in keys:
    used |= activate(key)
  return bad, used | bad


class Reached(Exception):
  """Raised where the run would start."""


@pytest.fixture(scope="module")
def prepared_run(tmp_path_factory):
  """A tiny data set and a run folder; runs stop before they write, and do not use the network."""
  folder = tmp_path_factory.mktemp("fuzz")

  def stop():
    raise Reached

  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.setitem(models.MODELS, "tiny", tiny.TinyNet)
    patch.setattr(signals, "InterruptGuard", stop)
    patch.setattr(shapes, "NUM_TRAIN", 40)
    patch.setattr(shapes, "NUM_TEST", 20)
    mirror.remove_all(patch)
    patch.setenv("TFDS_DATA_DIR", str(folder / "none"))
    yield tiny.write_data(folder / "tiny.npz"), folder / "run"


@fuzz.fuzz(60)
@given(changed=changes())
def test_a_hostile_config_is_refused_or_starts(prepared_run, changed):
  data, workdir = prepared_run
  bad, used = changed
  with pytest.raises((errors.UserError, Reached)) as caught:
    train.train_and_evaluate(tiny.get_config(data, **used), workdir)
  assert not workdir.exists()
  if caught.type is errors.UserError:
    text = str(caught.value)
    assert any(key in text or repr(value).strip("'") in text for key, value in bad.items()), text


INVALID = {
  "model.residual.squeeze_excite": (math.nan, -0.1, 1.5),
  "augment.trivial_augment.strength": (math.nan, -0.1, 1.5),
  "model.residual.drop_path": (math.nan, -0.1, 1.0),
  "loss.distillation.weight": (math.nan, 0.0, -1.0, 2.0),
  "loss.distillation.temperature": (math.nan, 0.0, -1.0, math.inf),
  "optimizer.learning_rate": (math.nan, math.inf, 0.0, -1.0, 1e300),
  "optimizer.weight_decay": (math.nan, math.inf, -1.0),
  "optimizer.sgd.momentum": (math.nan, -0.1, 1.0, 1 - 1e-16),
  "optimizer.adamw.b1": (math.nan, -0.1, 1.0, 1 - 1e-16),
  "optimizer.adamw.b2": (math.nan, -0.1, 1.0, 1 - 1e-16),
  "optimizer.adamw.epsilon": (math.nan, 0.0, -1.0, 1e-300, math.inf),
  "optimizer.muon.momentum": (math.nan, -0.1, 1.0),
  "optimizer.muon.rms": (math.nan, 0.0, -1.0, math.inf),
  "schedule.step.factor": (math.nan, 0.0, -1.0, 2.0, math.inf),
  "schedule.step.every": (math.nan, 0.0, -1.0, math.inf),
  "schedule.exponential.final": (math.nan, 0.0, -1.0, 1e-30, math.inf),
  "schedule.cosine.warmup": (math.nan, -1e-9, -1.0, 3.0, math.inf, 1e300),
  "schedule.cosine.final": (math.nan, -1.0, 2.0),
  "schedule.one_cycle.initial": (math.nan, -1.0, 2.0),
  "schedule.one_cycle.peak_at": (math.nan, 0.0, 1.0, 2.0),
  "schedule.one_cycle.final": (math.nan, -1.0, 2.0),
  "schedule.plateau.factor": (math.nan, 0.0, 1.0),
  "schedule.plateau.patience": (-1, 10**30),
  "schedule.plateau.threshold": (math.nan, 0.0, 2.0),
  "schedule.plateau.cooldown": (-1, 10**30),
  "schedule.plateau.final": (math.nan, -1.0, 1.0),
  "model.dropout_rate": (math.nan, -0.1, 1.0, 2.0),
  "norm.batch.momentum": (math.nan, -0.1, 1.0, 2.0),
  "norm.batch.epsilon": (math.nan, 0.0, -1.0, 1e-300, math.inf),
  "norm.ghost.num_splits": (-1, 3, 10**30),
  "norm.layer.epsilon": (math.nan, 0.0),
  "norm.group.num_groups": (-1, 0, 4, 10**30),
  "norm.group.epsilon": (math.nan, 0.0),
  "mixing.mixup.alpha": (math.nan, 0.0, -1.0, 1e-300, math.inf),
  "mixing.cutmix.alpha": (math.nan, 0.0, -1.0, 1e300),
  "mixing.ricap.alpha": (math.nan, 0.0, -1.0, 1e300),
  "ema.decay": (math.nan, -0.1, 1.0),
  "loss.label_smoothing": (math.nan, -0.1, 1.0),
  "augment.horizontal_flip.p": (math.nan, -0.1, 1.1),
  "augment.random_crop.padding": (-1, 0, 10**9),
  "augment.coarse_dropout.holes": (-1, 0, 10**6),
  "augment.coarse_dropout.height": (-1, 0, 10**30),
  "augment.color_jitter.hue": (math.nan, -0.1, 0.6),
  "augment.mean": ((0.5,), (0.5, math.nan, 0.5), (0.5, 0.5, 1.5), ("a", "b", "c"), (None,) * 3),
  "augment.std": ((0.5, 0.5), (0.5, 0.0, 0.5), (0.5, math.inf, 0.5), (1e-300,) * 3),
  "augment.ops": (("rotat",), (["rotate"],), (None,)),
  "seed": (-1, 2**32, 10**30),
  "num_seeds": (-1, 0, 10**6),
  "eval_batch_size": (-1, 0, 10**9),
  "total_epochs": (-1, 0, 10**30),
  "data.image_size": (-1, 0, 10**9),
  "name": ("\0", "x" * 200, "\udcff"),
}


@pytest.mark.parametrize("key", INVALID)
def test_invalid_values_are_refused(prepared_run, key):
  """Some would fail only later in training, or start a run that learns nothing."""
  data, workdir = prepared_run
  for value in INVALID[key]:
    with pytest.raises(errors.UserError) as caught:
      train.train_and_evaluate(tiny.get_config(data, **(activate(key) | {key: value})), workdir)
    assert key in str(caught.value)


def test_the_number_of_workers_is_bounded(prepared_run):
  data, workdir = prepared_run
  changed = {"augment.backend": "albumentations", "augment.workers": 10**5}
  with pytest.raises(errors.UserError, match=r"augment\.workers=100000"):
    train.train_and_evaluate(tiny.get_config(data, **changed), workdir)


@pytest.mark.parametrize("name", reference.DISTINCT)
@pytest.mark.parametrize("size", [1, 2, 6, 21])
def test_images_too_small_for_a_network_are_refused(name, size):
  config = common.get_config()
  config.model.name = name
  model = config_lib.create_model(config, num_classes=3)
  images = jnp.zeros((2, size, size, 3))
  refusal = None
  try:
    with config_lib.explain_misfit(config):
      jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False))
  except errors.UserError as error:
    refusal = str(error)
  assert refusal is None or "data.image_size" in refusal


# ---- Command lines


def parse(monkeypatch, *arguments):
  """The config, or None if a one-line error was printed."""
  screen = io.TextIOWrapper(io.BytesIO(), errors="backslashreplace")  # as Python opens stderr
  with monkeypatch.context() as patch:
    patch.chdir(ROOT)
    patch.setattr(sys, "stderr", screen)
    try:
      with command_line.one_line_errors():
        return __main__.parse(arguments)[1]
    except SystemExit as stop:
      status = stop.code
  screen.flush()
  text = screen.buffer.getvalue().decode()
  assert status == 2
  assert text.startswith("error: ")
  assert text.strip() != "error:"
  assert text.count("\n") == 1
  assert "Traceback" not in text
  return None


WORDS = ("ours", "smoke", "full", "norm", "seed", "epochs", "=", ",", "batch", "1", "-1", "²", "é")
VALUES = (
  "",
  "nan",
  "1e999",
  "-1",
  "None",
  "True",
  "{}",
  "{'name': 1}",
  "(1,",
  "[" * 300,
  "9" * 5000,
)
VALUES += (
  "(None,)",
  "rotate,",
  "('rotate',)",
  "'",
  '"',
  "\n",
  "a\nb,c",
  "\0",
  "\udcff",
  "%s",
  "{x}",
)
PATHS = (
  "",
  ".",
  "..",
  "=",
  "name.x",
  "model..name",
  "augment.ops[0]",
  "optimzer",
  "optimizer",
  "a b",
)
anything = st.text(st.characters(), max_size=20)


@fuzz.fuzz(100)
@given(
  variant=st.lists(st.sampled_from(WORDS), max_size=6).map("".join) | anything,
  overrides=st.lists(
    st.tuples(st.sampled_from([*KEYS, *PATHS]) | anything, st.sampled_from(VALUES) | anything),
    max_size=3,
  ),
)
@example(variant="seed=" + "9" * 5000, overrides=[])
@example(variant="", overrides=[("optimizer", "{'name': 'sgd'}")])
@example(variant="", overrides=[("optimizer", "{}"), ("optimizer.name", "sgd")])
def test_a_hostile_command_line_gives_one_line_or_a_whole_config(monkeypatch, variant, overrides):
  arguments = [f"--config.{key}={value}" for key, value in overrides]
  config = parse(monkeypatch, f"--config=configs/quickstart.py:{variant}", *arguments)
  if config is not None:
    flat = config_lib.flatten(config.to_dict())
    assert {key: type(value) for key, value in flat.items()} == {
      key: type(value) for key, value in KEYS.items()
    }


@fuzz.fuzz(50)
@given(arguments=st.lists(anything.filter(lambda text: "flagfile" not in text), max_size=3))
@example(arguments=["--config"])
@example(arguments=["--config=README.md"])
@example(arguments=["--config=/"])
@example(arguments=["--config=\0"])
@example(arguments=["--config=tests/tiny.py"])
@example(arguments=["--config=configs/quickstart.py", "--config.model.name.x=3"])
def test_hostile_arguments_give_a_one_line_error(monkeypatch, arguments):
  assert parse(monkeypatch, *arguments) is None
