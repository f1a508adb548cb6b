"""Checkpoints are restored exactly; the latest and best stay; other networks are refused."""

import functools
import os
import pathlib
import shutil
import time

import jax
import numpy as np
import optax
import pytest

from flax_cifar import errors, metrics, optim
from flax_cifar import state as state_lib
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.run import checkpoint, integrity
from tests import tiny

FIXTURES = pathlib.Path(__file__).parents[2] / "tests" / "fixtures" / "checkpoints"
PLATEAU = {"factor": 0.5, "patience": 1, "threshold": 0.1, "cooldown": 0, "final": 0.0}
TOTALS = {
  "loss_sum": np.array(1 / 3),
  "correct": np.array(2.0),
  "count": np.array(3.0),
  "seconds": np.array(0.1),
}


@functools.cache
def create(seed=0, **network):
  return state_lib.create_train_states(
    model=tiny.TinyNet(**network),
    optimizer=optax.sgd(0.1, momentum=0.9),
    plateau=optim.create_plateau(enabled=True, **PLATEAU),
    images=np.zeros((1, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3), np.float32),
    ema_decay=0.9,
    seeds=[seed],
  )[0]


def progress(step, state, totals=None, records=()):
  """The progress at `step` with `state`; `totals` is TOTALS by default."""
  return state_lib.Progress(step, state, totals or TOTALS, list(records))


def leaves(state):
  """Every array; random keys as their data."""
  arrays = jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))
  return [np.asarray(array) for array in arrays]


def save(folder, *steps):
  """Saves (step, accuracy) pairs; accuracy None is a save within an epoch."""
  checkpoints = checkpoint.Checkpoints(folder, keep=1)
  for step, accuracy in steps:
    scores = None if accuracy is None else {"loss": 1.0, "accuracy": accuracy}
    checkpoints.save(progress(step, create(seed=step), records=[{"step": step}]), scores)
  checkpoints.close()


def list_kept_steps(folder):
  return sorted(int(path.name) for path in folder.iterdir())


@pytest.mark.parametrize("devices", [1, 4])
def test_everything_is_restored_on_any_number_of_devices(tmp_path, devices):
  save(tmp_path / "c", (7, 0.5))
  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=1)
  restored = checkpoints.restore_or(start(create()), mesh_lib.create_mesh(devices))
  checkpoints.close()
  assert restored.step == 7
  assert restored.totals == TOTALS
  assert restored.records == [{"step": 7}]
  assert len(restored.state.params["head"]["conv"]["kernel"].sharding.device_set) == devices
  for saved, loaded in zip(leaves(create(seed=7)), leaves(restored.state), strict=True):
    np.testing.assert_array_equal(saved, loaded)


def test_without_a_checkpoint_the_given_progress_is_returned(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=1)
  given = start(create())
  assert checkpoints.restore_or(given, mesh_lib.create_mesh(1)) is given
  checkpoints.close()


def test_state_may_be_donated_right_after_save(tmp_path):
  """The write continues in the background while the buffers are reused."""
  scramble = jax.jit(
    lambda params: jax.tree.map(lambda x: x * 0 - 7, params), donate_argnums=0, keep_unused=True
  )
  state = jax.device_put(create.__wrapped__(features=600))
  expected = leaves(state)
  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=1)
  checkpoints.save(progress(1, state))
  params = state.params
  for _ in range(20):
    params = scramble(params)
  checkpoints.close()
  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=1)
  restored = checkpoints.restore_or(start(create(features=600)), mesh_lib.create_mesh(1))
  checkpoints.close()
  for saved, loaded in zip(expected, leaves(restored.state), strict=True):
    np.testing.assert_array_equal(saved, loaded)


def test_records_may_be_appended_right_after_save(tmp_path, monkeypatch):
  """Records are written in the background, here after the folders, which are slow to create."""
  mkdir, saved = os.mkdir, progress(1, create(), records=[{"step": 1}])

  def mkdir_slowly(*arguments, **options):
    time.sleep(0.1)
    mkdir(*arguments, **options)

  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=1)
  monkeypatch.setattr(os, "mkdir", mkdir_slowly)
  checkpoints.save(saved)
  saved.records.append({"step": 2})
  monkeypatch.undo()
  checkpoints.close()
  assert restore(tmp_path / "c").records == [{"step": 1}]


def test_latest_and_best_are_kept(tmp_path):
  save(tmp_path / "c", (1, 0.3), (2, 0.9), (3, 0.5), (4, 0.6))
  assert list_kept_steps(tmp_path / "c") == [2, 4]


def test_best_survives_a_restart_and_saves_within_an_epoch(tmp_path):
  save(tmp_path / "c", (1, 0.3), (2, 0.9), (3, None))
  save(tmp_path / "c", (4, 0.5), (5, None))
  save(tmp_path / "c", (6, 0.7))
  assert list_kept_steps(tmp_path / "c") == [2, 6]


def test_saving_the_restored_step_again_does_nothing(tmp_path):
  save(tmp_path / "c", (1, 0.3))
  before = (tmp_path / "c" / "1").stat().st_ino
  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=1)
  restored = checkpoints.restore_or(start(create()), mesh_lib.create_mesh(1))
  checkpoints.save(restored)
  checkpoints.close()
  assert list_kept_steps(tmp_path / "c") == [1]
  assert (tmp_path / "c" / "1").stat().st_ino == before


@pytest.mark.parametrize(
  ("network", "message"),
  [
    ({"features": 5}, r"unit/conv/kernel is \(3, 3, 3, 6\) there and \(3, 3, 3, 5\) here"),
    ({"norm": "none"}, r"unit/norm/bias is \(6,\) there and 'absent' here"),
  ],
)
def test_another_network_is_refused(tmp_path, network, message):
  from flax_cifar.models import norms

  save(tmp_path / "c", (1, 0.3))
  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=1)
  other = create(**{k: norms.NoNorm if v == "none" else v for k, v in network.items()})
  with pytest.raises(errors.UserError, match=f"another network: .*{message}"):
    checkpoints.restore_or(start(other), mesh_lib.create_mesh(1))
  checkpoints.close()


def list_files(path):
  """All files of a checkpoint, also those in its folders."""
  return sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())


def damage(file, how):
  content = bytearray(file.read_bytes())
  if how == "deleted":
    file.unlink()
  elif how == "flipped":
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
  else:
    file.write_bytes(content[: {"emptied": 0, "halved": len(content) // 2, "cut": -1}[how]])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """Checkpoints of the steps 1 and 2."""
  folder = tmp_path_factory.mktemp("two") / "c"
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  for step in (1, 2):
    checkpoints.save(progress(step, create(seed=step), records=[{"step": step}]))
  checkpoints.close()
  return folder


def start(state):
  return progress(0, state, metrics.create_totals(1))


def restore(folder, like=None):
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  try:
    return checkpoints.restore_or(start(like or create()), mesh_lib.create_mesh(1))
  finally:
    checkpoints.close()


@pytest.mark.parametrize(
  ("how", "share"),
  [("deleted", 4), ("flipped", 1), ("emptied", 4), ("halved", 4), ("cut", 4)],
)
def test_the_one_before_takes_the_place_of_a_damaged_one(tmp_path, two, how, share, capsys):
  """Whichever file is damaged, or one of `share`; files without a digest do no harm."""
  harmless = {"_CHECKPOINT_METADATA", "commit_success.txt"}
  seen = set()
  for number, name in enumerate(list_files(two / "2")[::share]):
    folder = tmp_path / str(number) / "c"
    shutil.copytree(two, folder)
    damage(folder / "2" / name, how)
    intact = (name.name in harmless and len(name.parts) == 1) or (how, name.name) == (
      "cut",
      integrity.DIGESTS,
    )
    restored = restore(folder)
    expected = 2 if intact else 1
    assert restored.records == [{"step": expected}], name
    assert restored.totals == TOTALS
    for saved, loaded in zip(leaves(create(seed=expected)), leaves(restored.state), strict=True):
      np.testing.assert_array_equal(saved, loaded)
    assert ("is damaged" in capsys.readouterr().err) != intact
    assert (tmp_path / str(number) / "damaged" / "2").is_dir() != intact
    seen.add(intact)
  assert seen == {True, False}


def test_without_any_good_one_it_is_an_error(tmp_path, two):
  shutil.copytree(two, tmp_path / "c")
  for step in "12":
    (tmp_path / "c" / step / "log" / "metadata").unlink()
  with pytest.raises(
    errors.UserError, match=r"no checkpoint is left: .*/1' is damaged .*/2' is damaged"
  ):
    restore(tmp_path / "c")
  assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["1", "2"]


def test_an_incomplete_higher_step_neither_wins_nor_blocks(tmp_path, two):
  """Orbax would treat the highest number as the latest step and save none below it."""
  shutil.copytree(two, tmp_path / "c")
  (tmp_path / "c" / "99" / "state").mkdir(parents=True)
  shutil.copytree(two / "2" / "state", tmp_path / "c" / "50" / "state")
  (tmp_path / "c" / "7.orbax-checkpoint-tmp").mkdir()
  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=2)
  assert checkpoints.latest_step == 2
  checkpoints.save(progress(3, create(seed=3)))
  checkpoints.close()
  assert list_kept_steps(tmp_path / "c") == [2, 3]


def test_the_end_of_an_epoch_replaces_the_save_before_its_validation(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=2)
  checkpoints.save(progress(5, create(seed=1)))
  checkpoints.save(progress(5, create(seed=2), metrics.create_totals(1), [{"step": 5}]))
  checkpoints.save(
    progress(5, create(seed=3), metrics.create_totals(1), [{"step": 5}])
  )  # nothing new
  checkpoints.close()
  restored = restore(tmp_path / "c")
  assert restored.records == [{"step": 5}]
  assert restored.totals == metrics.create_totals(1)
  for saved, loaded in zip(leaves(create(seed=2)), leaves(restored.state), strict=True):
    np.testing.assert_array_equal(saved, loaded)


def test_a_checkpoint_that_was_replaced_does_not_come_back(tmp_path):
  """Even where later ones have pushed its replacement out."""
  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=1)
  checkpoints.save(progress(1, create()))
  for step in (1, 2, 3, 4):
    scores = {"loss": 1.0, "accuracy": 0.1 * step}
    checkpoints.save(progress(step, create(), records=[{"step": step}]), scores)
  checkpoints.close()
  assert list_kept_steps(tmp_path / "c") == [4]


def test_a_failed_replacement_brings_back_what_it_was_to_replace(tmp_path, monkeypatch):
  def fail(path):
    raise OSError(28, "No space left on device")

  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=1)
  checkpoints.save(progress(5, create(seed=1)))
  checkpoints.wait()
  monkeypatch.setattr(integrity, "write_digests", fail)
  checkpoints.save(progress(5, create(seed=2), metrics.create_totals(1), [{"step": 5}]))
  with pytest.raises(errors.UserError, match="No space left"):
    checkpoints.close()
  monkeypatch.undo()
  restored = restore(tmp_path / "c")
  assert (restored.totals, restored.records) == (TOTALS, [])
  for saved, loaded in zip(leaves(create(seed=1)), leaves(restored.state), strict=True):
    np.testing.assert_array_equal(saved, loaded)


@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_are_kept_and_the_best(tmp_path, keep):
  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=keep)
  for step, accuracy in enumerate((0.3, 0.9, 0.5, 0.6, 0.4, 0.2)):
    scores = {"loss": 1.0, "accuracy": accuracy}
    checkpoints.save(progress(step, create(), records=[{"step": step}]), scores)
  checkpoints.close()
  assert list_kept_steps(tmp_path / "c") == [1, *range(6 - keep, 6)]


def test_a_failed_save_keeps_the_ones_before(tmp_path, two, monkeypatch):
  def fail(path):
    raise OSError(28, "No space left on device")

  shutil.copytree(two, tmp_path / "c")
  monkeypatch.setattr(integrity, "write_digests", fail)
  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=2)
  checkpoints.save(progress(3, create(seed=3)))
  with pytest.raises(
    errors.UserError, match=r"could not be written to '.*/c' .*No space left.*Make room"
  ):
    checkpoints.wait()
  checkpoints.close()
  monkeypatch.undo()
  assert (tmp_path / "c" / "1").is_dir()
  assert not (tmp_path / "c" / "3").exists()
  assert restore(tmp_path / "c").records == [{"step": 2}]


def number_leaves(state):
  """A state with known numbers, which do not depend on the initializers."""

  def count(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(np.array([3, 4], np.uint32))
    return (np.arange(leaf.size) / 7).astype(leaf.dtype).reshape(leaf.shape)

  return jax.tree.map(count, state)


@pytest.mark.parametrize("version", ["0.1.0"])
def test_checkpoints_of_every_version_load(tmp_path, version):
  """`save_fixture` wrote each checkpoint once, with the version of its name."""
  shutil.copytree(FIXTURES / version, tmp_path / "c")
  restored = restore(tmp_path / "c")
  assert restored.totals == TOTALS
  assert restored.records == [{"epoch": 1, "step": 7}]
  for expected, leaf in zip(leaves(number_leaves(create())), leaves(restored.state), strict=True):
    np.testing.assert_array_equal(expected, leaf)


def save_fixture(folder):
  """Saves a checkpoint to be moved to FIXTURES / VERSION; Orbax records its first place."""
  checkpoints = checkpoint.Checkpoints(folder, keep=1)
  checkpoints.save(progress(7, number_leaves(create()), records=[{"epoch": 1, "step": 7}]))
  checkpoints.close()


class TestSavePolicy:
  def test_epochs(self):
    policy = checkpoint.SavePolicy(every=3, every_steps=0, every_minutes=0.0)
    assert [e for e in range(1, 10) if policy.is_due(5 * e, e)] == [3, 6, 9]
    assert not policy.is_due(15, None)
    assert policy.next_step(7, 10) == 10

  def test_steps(self):
    policy = checkpoint.SavePolicy(every=99, every_steps=4, every_minutes=0.0)
    assert [policy.next_step(done, 10) for done in (0, 3, 4, 8, 9)] == [4, 4, 8, 10, 10]
    assert policy.is_due(8, None)
    assert not policy.is_due(10, 2)

  def test_minutes(self, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    policy = checkpoint.SavePolicy(every=99, every_steps=0, every_minutes=2.0)
    due = []
    for seconds in range(0, 600, 50):
      now[0] = float(seconds)
      assert policy.is_due(seconds, None) == policy.is_due(seconds, None) == policy.is_time()
      if policy.is_time():
        policy.mark_saved()
        due.append(seconds)
    assert due == [150, 300, 450]


@pytest.mark.parametrize(("best", "step"), [(True, 2), (False, 5)])
def test_the_best_or_the_newest_is_read_while_the_run_goes_on(tmp_path, best, step):
  """The newest one was saved within an epoch; nothing is moved or deleted."""
  checkpoints = checkpoint.Checkpoints(tmp_path / "c", keep=2)
  for number, accuracy in [(1, 0.3), (2, 0.9), (3, 0.5), (4, 0.7), (5, None)]:
    scores = None if accuracy is None else {"loss": 1.0, "accuracy": accuracy}
    records = [{"step": number}]
    checkpoints.save(progress(number, create(seed=number), records=records), scores)
  checkpoints.wait()
  before = sorted((tmp_path / "c").rglob("*"))
  found = checkpoint.read(tmp_path / "c", best=best)
  assert sorted((tmp_path / "c").rglob("*")) == before
  checkpoints.close()
  assert (found.step, found.records) == (step, [{"step": step}])
  jax.tree.map(np.testing.assert_array_equal, create(seed=step).eval_variables, found.variables)


def test_a_folder_without_checkpoints_has_none_to_read(tmp_path):
  with pytest.raises(errors.UserError, match=r"does not exist; name the folder of a run"):
    checkpoint.read(tmp_path / "c", best=True)
  save(tmp_path / "c", (1, None))
  with pytest.raises(errors.UserError, match=r"holds no checkpoint with .*--checkpoint=latest"):
    checkpoint.read(tmp_path / "c", best=True)


def test_what_ends_a_run_is_not_hidden_by_a_save_that_failed(tmp_path, monkeypatch, capsys):
  def fail(self):
    raise errors.UserError("no room")

  monkeypatch.setattr(checkpoint.Checkpoints, "wait", fail)
  with (
    pytest.raises(errors.UserError, match="diverged"),
    checkpoint.Checkpoints(tmp_path / "a", keep=1),
  ):
    raise errors.UserError("diverged")
  assert capsys.readouterr().err == "warning: no room\n"
  with pytest.raises(errors.UserError, match="no room"), checkpoint.Checkpoints(tmp_path, keep=1):
    pass
