"""The folders that a run may use, and the errors for others."""

import errno
import fcntl
import importlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import pytest
from flax import traverse_util

import tests
from flax_cifar import errors, files
from flax_cifar.kernels import backend
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.run import config as config_lib
from flax_cifar.run import workdir as workdir_lib
from tests import tiny

FILE = "fixtures/default_workdirs.json"


def config(**changes):
  return tiny.get_config("shapes", **changes).to_dict()


def check(workdir, config):
  """Both checks that precede the work of a run."""
  workdir_lib.check_config(workdir, config)
  workdir_lib.check_writable(workdir)


def start(workdir, saved):
  workdir.mkdir()
  files.write_json(workdir / "config.json", saved)


def test_new_and_empty_folders_are_fine(tmp_path):
  check(tmp_path / "new" / "deep", config())
  check(tmp_path, config())
  assert list(tmp_path.iterdir()) == []


def test_the_same_config_may_resume(tmp_path):
  start(tmp_path / "run", config())
  check(tmp_path / "run", config())


@pytest.mark.parametrize(
  "change",
  [
    {"total_epochs": 9, "name": "tiny-epochs-9"},
    *({"log.pictures": True}, {"augment.workers": 2}, {"steps_per_call": 3}),
  ],
)
def test_keys_that_do_not_affect_earlier_steps_may_change(tmp_path, change):
  start(tmp_path / "run", config())
  check(tmp_path / "run", config(**change))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"seed": 1}, "seed is 0 there and 1 here"),
    ({"num_seeds": 2}, "num_seeds is 1 there and 2 here"),
    ({"augment.backend": "albumentations"}, "augment.backend is 'device' there"),
    ({"model.norm": "group"}, "model.norm is 'batch' there and 'group' here"),
    ({"augment.ops": ()}, r"augment.ops is \['horizontal_flip'\] there and \[\] here"),
  ],
)
def test_another_config_is_refused_and_the_change_named(tmp_path, change, message):
  start(tmp_path / "run", config())
  with pytest.raises(errors.UserError, match=f"another config: {message}"):
    check(tmp_path / "run", config(**change))
  assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0


def test_a_run_keeps_its_type_on_another_processor(tmp_path, monkeypatch):
  automatic = tiny.get_config("shapes", compute_dtype="auto")
  monkeypatch.setattr(backend, "has_fast_bfloat16", lambda: True)
  monkeypatch.setattr(backend, "uses_onednn", lambda dtype: True)
  begun = workdir_lib.settle(automatic, tmp_path / "run").to_dict()
  assert begun["compute_dtype"] == "bfloat16"
  start(tmp_path / "run", begun)
  monkeypatch.setattr(backend, "has_fast_bfloat16", lambda: False)
  assert workdir_lib.settle(automatic, tmp_path / "run").to_dict() == begun
  assert workdir_lib.settle(automatic, tmp_path / "new").compute_dtype == "float32"
  with pytest.raises(errors.UserError, match="compute_dtype is 'bfloat16' there"):
    check(tmp_path / "run", config(compute_dtype="float32"))


def test_a_run_goes_on_in_its_default_folder_on_another_processor(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  automatic = tiny.get_config("shapes", compute_dtype="auto")
  monkeypatch.setattr(backend, "has_fast_bfloat16", lambda: True)
  monkeypatch.setattr(backend, "uses_onednn", lambda dtype: True)
  folder = workdir_lib.choose(automatic, None, "--workdir")
  folder.parent.mkdir()
  start(folder, workdir_lib.settle(automatic, folder).to_dict())
  monkeypatch.setattr(backend, "has_fast_bfloat16", lambda: False)
  assert workdir_lib.choose(automatic, None, "--workdir") == folder
  given = tiny.get_config("shapes", compute_dtype="float32")
  plain = workdir_lib.choose(given, None, "--workdir")
  assert plain != folder
  start(plain, given.to_dict())  # which is none of a run that is to be fast
  monkeypatch.setattr(backend, "has_fast_bfloat16", lambda: True)
  assert workdir_lib.choose(automatic, None, "--workdir") == folder
  shutil.rmtree(folder)
  assert workdir_lib.choose(automatic, None, "--workdir") == folder


@pytest.mark.parametrize("content", ["{}", '{"epochs": null}', '{"epochs": "3"}'])
def test_a_result_without_epochs_is_damaged(tmp_path, content):
  (tmp_path / "result.json").write_text(content)
  with pytest.raises(errors.UserError, match=r"result\.json' is damaged .* no number of epochs"):
    workdir_lib.read_result(tmp_path)


def test_a_folder_with_other_files_is_refused(tmp_path):
  (tmp_path / "thesis.tex").write_text("precious")
  with pytest.raises(errors.UserError, match="no run of ours"):
    check(tmp_path, config())


@pytest.mark.parametrize("name", ["file", "device"])
def test_a_workdir_that_is_no_folder_is_refused(tmp_path, name):
  path = pathlib.Path(os.devnull) if name == "device" else tmp_path / "file"
  path.touch()
  with pytest.raises(errors.UserError, match="no run of ours"):
    check(path, config())


def test_a_damaged_config_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"seed": ')
  with pytest.raises(errors.UserError, match=r"config.json' is damaged"):
    check(tmp_path, config())


@pytest.mark.parametrize("content", [{"model": "gpt2"}, {"total_epochs": "5", "model": {}}])
def test_a_config_of_another_program_is_no_concern_of_a_new_run(tmp_path, monkeypatch, content):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs" / "other").mkdir(parents=True)
  (tmp_path / "runs" / "other" / workdir_lib.CONFIG).write_text(json.dumps(content))
  assert workdir_lib.find_workdir(config()) == workdir_lib.default_workdir(config())
  with pytest.raises(errors.UserError):
    workdir_lib.check_config(tmp_path / "runs" / "other", config())


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=3 * 2**20)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(errors.UserError, match="only 3 MiB are free"):
    check(tmp_path / "run", config())
  assert not (tmp_path / "run").exists()


def test_a_read_only_folder_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
  with pytest.raises(errors.UserError, match="not writable"):
    check(tmp_path / "run", config())


PINNED = json.loads((pathlib.Path(tests.__file__).parent / FILE).read_text())


@pytest.mark.parametrize("config_name", PINNED)
def test_default_workdirs_are_those_of_earlier_versions(config_name, monkeypatch):
  """In another folder, the command of an earlier run would start from scratch.

  A key that is new belongs into `config.LATER_KEYS`.
  """
  monkeypatch.setattr(backend, "has_fast_bfloat16", lambda: False)
  file, _, variant = config_name.partition(":")
  changed = importlib.import_module(f"flax_cifar.configs.{file}").get_config(variant)
  settled = config_lib.settle(changed)
  assert str(workdir_lib.default_workdir(settled.to_dict())) == PINNED[config_name]


def test_a_config_that_lacks_later_keys_is_the_same_run(tmp_path):
  now = config()
  older = config_lib.without(config_lib.flatten(now), tuple(config_lib.LATER_KEYS))
  saved = traverse_util.unflatten_dict(older, sep=".")
  start(tmp_path / "run", saved)
  check(tmp_path / "run", now)
  assert workdir_lib.default_workdir(saved) == workdir_lib.default_workdir(now)
  with pytest.raises(errors.UserError, match=r"schedule\.exponential\.final.*0\.01.*0\.5"):
    check(tmp_path / "run", config(**{"schedule.exponential.final": 0.5}))


def test_default_workdir_depends_only_on_keys_that_affect_results():
  base = workdir_lib.default_workdir(config())
  assert base.parts[0] == "runs"
  assert base.name.startswith("tiny-")
  assert workdir_lib.default_workdir(config(**{"augment.workers": 3})) == base
  others = {
    workdir_lib.default_workdir(config(**change)) for change in ({"seed": 1}, {"total_epochs": 9})
  }
  assert len(others | {base}) == 3


def test_a_longer_run_goes_on_in_the_default_folder_of_the_shorter_one(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  short, long = config(total_epochs=2), config(total_epochs=9, name="tiny-epochs-9")
  assert workdir_lib.find_workdir(long) == workdir_lib.default_workdir(long)
  runs = pathlib.Path("runs")
  runs.mkdir()
  for number, other in enumerate((config(total_epochs=4, seed=1), config(total_epochs=10))):
    start(runs / f"other-{number}", other)
  (runs / "damaged").mkdir()
  (runs / "damaged" / "config.json").write_text("{")
  assert workdir_lib.find_workdir(long) == workdir_lib.default_workdir(long)
  for epochs in (2, 5):
    start(workdir_lib.default_workdir(config(total_epochs=epochs)), config(total_epochs=epochs))
  assert workdir_lib.find_workdir(long) == workdir_lib.default_workdir(config(total_epochs=5))
  assert workdir_lib.find_workdir(short) == workdir_lib.default_workdir(short)
  start(workdir_lib.default_workdir(long), long)
  assert workdir_lib.find_workdir(long) == workdir_lib.default_workdir(long)


FINGERPRINT = {"class_names": ["a", "b"], "train_images": 4, "train_sha256": "00ff"}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"class_names": ["b", "a"]}, r"class_names is \['a', 'b'\] there and \['b', 'a'\] here"),
    ({"train_images": 5, "train_sha256": "11"}, "train_images is 4 there and 5 here, train_sha256"),
  ],
)
def test_a_run_on_other_data_is_refused_and_the_change_named(tmp_path, change, message):
  workdir_lib.check_data(tmp_path, FINGERPRINT)  # a new run, or one of an earlier version
  files.write_json(tmp_path / "data.json", FINGERPRINT)
  workdir_lib.check_data(tmp_path, FINGERPRINT)
  with pytest.raises(errors.UserError, match=f"on other data: {message}.*another --workdir"):
    workdir_lib.check_data(tmp_path, FINGERPRINT | change)


def test_only_one_process_may_use_a_folder(tmp_path):
  """Neither the check before loading data nor the start itself lets another one in."""
  with workdir_lib.open_workdir(tmp_path / "run", config()):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    owner = f"in use by process {os.getpid()} on "
    with pytest.raises(errors.UserError, match=owner):
      check(tmp_path / "run", config())
    with (
      pytest.raises(errors.UserError, match=owner),
      workdir_lib.open_workdir(tmp_path / "run", config()),
    ):
      pass
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
  check(tmp_path / "run", config())


def test_a_dead_process_leaves_no_lock(tmp_path):
  """Its note stays in the file, but does not lock the folder."""
  code = f"""
import os, pathlib, signal
from flax_cifar.run.workdir import open_workdir
with open_workdir(pathlib.Path({str(tmp_path / "run")!r}), {config()!r}):
  os.kill(os.getpid(), signal.SIGKILL)
"""
  done = subprocess.run([sys.executable, "-c", code], timeout=60)
  assert done.returncode == -signal.SIGKILL
  assert (tmp_path / "run" / "lock").read_text().startswith("process ")
  check(tmp_path / "run", config())
  with workdir_lib.open_workdir(tmp_path / "run", config()):
    assert f"process {os.getpid()} on" in (tmp_path / "run" / "lock").read_text()


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
  def refuse(file, operation):
    raise OSError(errno.ENOSYS, "Function not implemented")

  monkeypatch.setattr(fcntl, "flock", refuse)
  with workdir_lib.open_workdir(tmp_path / "run", config()):
    check(tmp_path / "run", config())
  assert "run' cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_a_config_written_meanwhile_is_noticed(tmp_path):
  """Another run may begin and end there while this one loads its data."""
  check(tmp_path / "run", config())
  start(tmp_path / "run", config(seed=1))
  with (
    pytest.raises(errors.UserError, match="another config"),
    workdir_lib.open_workdir(tmp_path / "run", config()),
  ):
    pass
  assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 1


@pytest.mark.parametrize(
  "left",
  [
    ["lock"],
    ["lock", ".config.json.7.part"],
    ["lock", ".config.json.part"],
    ["lock", "config.part"],
    [],
  ],
)
def test_a_run_killed_at_its_start_may_start_again(tmp_path, left):
  for name in left:
    (tmp_path / name).write_text("{")
  check(tmp_path, config())
  with workdir_lib.open_workdir(tmp_path, config()):
    assert json.loads((tmp_path / "config.json").read_text())["name"] == "tiny"


@pytest.mark.parametrize("content", ["[1, 2]", "7", "null", b"\xff\xfe", "{}}"])
def test_json_that_is_not_an_object_is_damage(tmp_path, content):
  (tmp_path / "config.json").write_bytes(
    content if isinstance(content, bytes) else content.encode()
  )
  with pytest.raises(errors.UserError, match=r"config.json' is damaged"):
    check(tmp_path, config())


def test_failed_writes_say_what_to_do(tmp_path):
  message = r"cannot be written to \(.*No space left.*the same command"
  with pytest.raises(errors.UserError, match=message), workdir_lib.explain_failed_writes(tmp_path):
    pathlib.Path("/dev/full").write_text("x")


def test_other_errors_of_the_system_do_not_blame_the_folder(tmp_path):
  message = "the system refused what the run needs .*Too many open files.*stays"
  with pytest.raises(errors.UserError, match=message), workdir_lib.explain_failed_writes(tmp_path):
    raise OSError(errno.EMFILE, "Too many open files")


def test_flatten_names_every_leaf():
  assert config_lib.flatten({"a": {"b": (1, 2), "c": {}}, "d": 3}) == {"a.b": [1, 2], "d": 3}


def test_json_is_written_completely_or_not_at_all(tmp_path):
  path = tmp_path / "x.json"
  files.write_json(path, {"good": 1})
  with pytest.raises(TypeError):
    files.write_json(path, {"bad": object()})
  assert json.loads(path.read_text()) == {"good": 1}


def test_ghost_batches_of_devices_keep_the_number_of_devices(tmp_path):
  changes = {"model.norm": "ghost", "norm.ghost.num_splits": 0}
  one, two = (tiny.get_config("shapes", **changes, num_devices=n).to_dict() for n in (1, 2))
  files.write_json(tmp_path / "config.json", one)
  workdir_lib.check_config(tmp_path, one)
  with pytest.raises(errors.UserError, match="num_devices"):
    workdir_lib.check_config(tmp_path, two)


def test_ghost_batches_of_all_devices_are_those_of_the_first_start(tmp_path, monkeypatch):
  changes = {"model.norm": "ghost", "norm.ghost.num_splits": 0, "num_devices": 0}
  config = tiny.get_config("shapes", **changes)
  begun = config_lib.settle(config).to_dict()
  assert begun["num_devices"] == 4  # see tests/conftest.py
  files.write_json(tmp_path / "config.json", begun)
  monkeypatch.setattr(mesh_lib.jax, "devices", jax.devices()[:2].copy)
  with pytest.raises(errors.UserError, match="num_devices"):
    workdir_lib.check_config(tmp_path, config_lib.settle(config).to_dict())
  files.write_json(tmp_path / "config.json", {**begun, "num_devices": 0})  # as older runs have it
  workdir_lib.check_config(tmp_path, config_lib.settle(config).to_dict())
