"""Nothing that is read is executed, nothing is written elsewhere, no shell sees a user's string.

Other tests cover parts of it: `test_cifar10.py` a malicious batch in an archive, `test_load.py`
arrays of objects, `test_weights.py` damaged and forged weights.
"""

import ast
import builtins
import io
import json
import os
import pathlib
import pickle
import shlex
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from flax_cifar import environment, errors, models
from flax_cifar import train as train_lib
from flax_cifar.data import dataset, load
from flax_cifar.data.sources import catalog, cifar10, cifar_archive, tfds_writer
from flax_cifar.run import weights
from flax_cifar.run import workdir as workdir_lib
from flax_cifar.tools import jobs, sweep
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("flax_cifar", "configs", "benchmarks")
SOURCES = [ROOT / "main.py", *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))]
SHELLS = ("sh", "bash", "dash", "zsh", "cmd.exe")
NASTY = "$(touch x);`touch y`|touch z && 'a' \"b\"\n\t*?[!]~ -rf"


# ---- What the sources may not use

# Must be neither called nor passed on, under any imported name.
FORBIDDEN = {
  *("eval", "exec", "builtins.eval", "builtins.exec"),
  *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
  *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads"),
  *("dill.load", "dill.loads", "joblib.load", "marshal.load", "marshal.loads", "shelve.open"),
  *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
  "shutil.unpack_archive",
  "cv2.VideoCapture",  # OpenCV's wheels carry an FFmpeg and an OpenSSL that lag behind their fixes
}
# Must be called with this argument.
REQUIRED = {"numpy.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}
# Forbidden methods of archives, for any object.
METHODS = ("extract", "extractall")
# Arguments that must have this value wherever they are given.
ARGUMENTS = {"shell": False, "allow_pickle": False}


class Finder(ast.NodeVisitor):
  """Collects the forbidden uses of a module in `found`."""

  def __init__(self):
    self.found = []
    self._imported = {}  # local name -> full name
    self._allowed = set()  # ids of nodes that are used as they must be

  def visit_Import(self, node):
    self._imported |= {alias.asname: alias.name for alias in node.names if alias.asname}

  def visit_ImportFrom(self, node):
    for alias in node.names:
      self._imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"

  def visit_ClassDef(self, node):
    """A class may derive from pickle.Unpickler if it decides what may be unpickled."""
    if any(getattr(item, "name", "") == "find_class" for item in node.body):
      self._allowed |= {id(base) for base in node.bases}
    self.generic_visit(node)

  def visit_Call(self, node):
    arguments = {keyword.arg: keyword.value for keyword in node.keywords}
    for name, value in ARGUMENTS.items():
      if name in arguments and not is_constant(arguments[name], value):
        self.found.append(f"{name}=")
    if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
      self.found.append(node.func.attr)
    name, value = REQUIRED.get(self._full_name(node.func), (None, None))
    if name in arguments and is_constant(arguments[name], value):
      self._allowed.add(id(node.func))
    self.generic_visit(node)

  def visit_Name(self, node):
    name = self._full_name(node)
    if name in {*FORBIDDEN, *REQUIRED} and id(node) not in self._allowed:
      self.found.append(name)

  def visit_Attribute(self, node):
    self.visit_Name(node)
    self.generic_visit(node)

  def _full_name(self, node):
    if isinstance(node, ast.Attribute):
      return f"{self._full_name(node.value)}.{node.attr}"
    return self._imported.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def is_constant(node, value):
  return isinstance(node, ast.Constant) and node.value is value


def find_forbidden(source):
  finder = Finder()
  finder.visit(ast.parse(source))
  return finder.found


def test_the_sources_use_nothing_that_executes_its_input():
  assert len(SOURCES) > 40
  found = {str(path): find_forbidden(path.read_text()) for path in SOURCES}
  assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
  ("source", "name"),
  [
    ("import subprocess; subprocess.run(x, shell=True)", "shell="),
    ("from subprocess import Popen as P; P(x, shell=flag)", "shell="),
    ("import subprocess; subprocess.getoutput(x)", "subprocess.getoutput"),
    ("import os; os.system(x)", "os.system"),
    ("from os import system; system(x)", "os.system"),
    ("from os import popen as p; p(x)", "os.popen"),
    ("import os as o; run = o.system", "os.system"),
    ("eval(x)", "eval"),
    ("values = map(eval, x)", "eval"),
    ("import builtins; builtins.exec(x)", "builtins.exec"),
    ("exec(x)", "exec"),
    ("import pickle; pickle.load(x)", "pickle.load"),
    ("import pickle as p; p.loads(x)", "pickle.loads"),
    ("from pickle import loads; f(loads)", "pickle.loads"),
    ("import pickle; pickle.Unpickler(x).load()", "pickle.Unpickler"),
    ("import pickle\nclass Open(pickle.Unpickler): pass", "pickle.Unpickler"),
    ("import cloudpickle; cloudpickle.loads(x)", "cloudpickle.loads"),
    ("import yaml; yaml.load(x)", "yaml.load"),
    ("import numpy as np; np.load(x)", "numpy.load"),
    ("import numpy; numpy.load(x, allow_pickle=flag)", "numpy.load"),
    ("import numpy as np; f(np.load)", "numpy.load"),
    ("from numpy import load; load(x)", "numpy.load"),
    ("archive.read(x, allow_pickle=True)", "allow_pickle="),
    ("import torch; torch.load(x)", "torch.load"),
    ("import torch; torch.load(x, weights_only=False)", "torch.load"),
    ("import tarfile; tarfile.open(x).extractall(y)", "extractall"),
    ("with tarfile.open(x) as tar: tar.extract(member, y)", "extract"),
    ("import shutil; shutil.unpack_archive(x)", "shutil.unpack_archive"),
    ("import cv2; cv2.VideoCapture(x)", "cv2.VideoCapture"),
  ],
)
def test_each_forbidden_use_is_found(source, name):
  assert name in find_forbidden(source)


@pytest.mark.parametrize(
  "source",
  [
    "import subprocess; subprocess.run(['git', x], shell=False)",
    "import numpy as np; np.load(x, allow_pickle=False)",
    "import torch; torch.load(x, weights_only=True)",
    "import pickle\nclass Closed(pickle.Unpickler):\n  def find_class(self, module, name): ...",
    "tar.extractfile(member).read(); model.eval(); self.load(x)",
  ],
)
def test_allowed_uses_are_not_found(source):
  assert find_forbidden(source) == []


# ---- Files that would run code


class Gadget:
  """Unpickles as the result of `function(*arguments)`."""

  def __init__(self, function, *arguments):
    self._call = function, arguments

  def __reduce__(self):
    return self._call


GADGETS = {  # each creates the given folder or file
  "os.mkdir": lambda path: Gadget(os.mkdir, path),
  "os.system": lambda path: Gadget(os.system, f"touch {shlex.quote(path)}"),
  "subprocess.call": lambda path: Gadget(subprocess.call, ["touch", path]),
  "eval": lambda path: Gadget(builtins.eval, f"open({path!r}, 'w')"),
  "exec": lambda path: Gadget(builtins.exec, f"import os; os.mkdir({path!r})"),
}


@pytest.fixture(params=GADGETS)
def gadget(request, tmp_path):
  """A gadget that has been checked to work, and the path that it creates."""
  sentinel = tmp_path / "executed"
  created = GADGETS[request.param](str(sentinel))
  pickle.loads(pickle.dumps([created]))
  assert sentinel.exists()
  if sentinel.is_dir():
    sentinel.rmdir()
  else:
    sentinel.unlink()
  return created, sentinel


def test_a_pickle_as_weights_is_not_executed(tmp_path, gadget):
  created, sentinel = gadget
  path = tmp_path / "weights.safetensors"
  path.write_bytes(pickle.dumps({"params": created}))
  with pytest.raises(errors.UserError, match="is damaged or no weights file"):
    weights.load_weights(path)
  assert not sentinel.exists()


def test_a_pickle_as_npz_or_in_npz_is_not_executed(tmp_path, gadget):
  created, sentinel = gadget
  path = tmp_path / "data.npz"
  names = ("train_images", "train_labels", "test_images", "test_labels")
  np.savez(path, **{name: np.array([created], dtype=object) for name in names})
  inside = path.read_bytes()
  for blob in (inside, pickle.dumps(created), pickle.dumps(dict.fromkeys(names, created))):
    path.write_bytes(blob)
    with pytest.raises(errors.UserError, match="cannot be read"):
      load.load_dataset(name=f"npz:{path}", dir="", image_size=tiny.IMAGE_SIZE)
    assert not sentinel.exists()


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_as_a_batch_of_cifar_is_not_executed(tmp_path, gadget, protocol):
  created, sentinel = gadget
  folder = tmp_path / "cifar-10-batches-py"
  folder.mkdir()
  for content in (created, {b"data": created, b"labels": []}, {created: 1}):
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
      (folder / name).write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(errors.UserError, match="has no place in a CIFAR batch"):
      cifar_archive.read_archive(folder)
    assert not sentinel.exists()


@pytest.mark.parametrize(
  "name", ["_reconstruct.__globals__", "ndarray.__class__", "fromfile", "memmap", "load"]
)
def test_the_unpickler_accepts_only_arrays(name):
  """Protocol 4 can request attributes of allowed objects."""
  for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
    parts = (f"\x8c{chr(len(part))}{part}" for part in (module, name))
    blob = f"\x80\x04{''.join(parts)}\x93.".encode("latin-1")
    with pytest.raises(pickle.UnpicklingError, match="has no place"):
      cifar_archive._decode_pickled(blob, (b"labels",))


EVIL = "evil_module.Image"
FEATURES = {  # each makes TFDS import the module
  "as TFDS writes it": {"pythonClassName": EVIL},
  "as protobuf has it": {"python_class_name": EVIL},
  "as TFDS wrote it": {"type": EVIL, "content": {}},
  "as JSON within JSON": {
    "type": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
    "proto_cls": "tensorflow_datasets.FeaturesDict",
    "content": json.dumps({"features": {"image": {"pythonClassName": EVIL}}}),
  },
}


@pytest.mark.parametrize("form", FEATURES)
def test_a_prepared_directory_imports_nothing(tmp_path, monkeypatch, form):
  """TFDS finds classes by name, and imports modules that it does not know."""
  monkeypatch.setattr(cifar_archive, "BATCH_SIZE", 2)
  monkeypatch.setattr(cifar_archive, "TRAIN_BATCHES", 1)
  split = dataset.Split(np.zeros((2, 32, 32, 3), np.uint8), np.array([0, 1], np.int32))
  folder = tfds_writer.prepare(catalog.CATALOG["cifar10"], (split, split), data_dir=tmp_path)
  executed = tmp_path / "executed"
  (tmp_path / "evil_module.py").write_text(f"open({str(executed)!r}, 'w')")
  monkeypatch.syspath_prepend(str(tmp_path))
  (folder / "features.json").write_text(json.dumps(FEATURES[form]))
  info = json.loads((folder / "dataset_info.json").read_text())
  info |= {"features": {"pythonClassName": EVIL}, "moduleName": "evil_module"}
  (folder / "dataset_info.json").write_text(json.dumps(info))
  train, _ = cifar10.read_prepared(folder)
  assert sorted(train.labels) == [0, 1]
  assert not executed.exists()
  with pytest.raises(ValueError, match="Unrecognized FeatureConnector"):
    tfds.builder_from_directory(folder)
  assert executed.exists()
  del sys.modules["evil_module"]


# ---- Archives that would write elsewhere


def list_all(folder):
  return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("kind", ["file", "symlink", "hard link", "device"])
def test_an_archive_writes_nothing_and_follows_no_link(tmp_path, kind):
  """Members outside the folder are skipped; one that is not a regular file counts as missing."""
  (tmp_path / "inner").mkdir()
  path = tmp_path / "inner" / cifar_archive.ARCHIVE
  secret = tmp_path / "secret"
  secret.write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0]}))
  types = {"symlink": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
  inside = "cifar-10-batches-py/data_batch_1"
  outside = ["../escaped", f"{tmp_path}/escaped", f"cifar-10-batches-py/../../escaped/{inside}"]
  with tarfile.open(path, "w:gz") as tar:
    for name in (*outside, *([inside] if kind in types else [])):
      member = tarfile.TarInfo(name)
      if kind in types:
        member.type, member.linkname = types[kind], str(secret)
        tar.addfile(member)
      else:
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
  before = list_all(tmp_path)
  with pytest.raises(errors.UserError, match="data_batch_1 is not in it"):
    cifar_archive.read_archive(path)
  assert list_all(tmp_path) == before


# ---- Strings of a user

_events = []  # new processes, as Python itself reports them


def _record(event, arguments):
  if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
    _events.append((event, arguments))


@pytest.fixture(scope="module")
def audit_hook():
  """Adds one hook for all tests, because hooks cannot be removed."""
  sys.addaudithook(_record)


@pytest.fixture
def processes(audit_hook):
  """The processes that were started: (event, its arguments)."""
  _events.clear()
  return _events


def uses_shell(event, arguments):
  program = arguments[1][0] if event == "subprocess.Popen" else arguments[0]
  return event == "os.system" or pathlib.Path(os.fsdecode(program)).name in SHELLS


@pytest.mark.parametrize(
  ("start", "shell"),
  [
    (lambda: subprocess.run("true", shell=True, check=True), True),
    (lambda: subprocess.run(["true"], check=True), False),
    (lambda: os.system("true"), True),
  ],
)
def test_a_shell_would_be_detected(processes, start, shell):
  start()
  assert {uses_shell(*process) for process in processes} == {shell}


def test_a_run_in_a_folder_with_any_name_starts_no_shell(tmp_path, monkeypatch, processes):
  monkeypatch.setitem(models.MODELS, "tiny", tiny.TinyNet)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "argv", ["main.py", f"--workdir={NASTY}"])
  data = tiny.write_data(tmp_path / f"data {NASTY}.npz")
  config = tiny.get_config(
    data,
    **{"total_epochs": 1, "name": "".join(filter(str.isprintable, NASTY)), "log.tensorboard": True},
  )
  result = train_lib.train_and_evaluate(config, pathlib.Path(NASTY))
  assert json.loads((tmp_path / NASTY / "result.json").read_text()) == result
  assert {path.name for path in tmp_path.iterdir()} == {NASTY, f"data {NASTY}.npz"}
  assert processes  # git
  assert not any(uses_shell(*process) for process in processes)
  assert NASTY not in str([arguments for _, arguments in processes])


def test_the_recorded_command_is_safe_to_paste(monkeypatch):
  arguments = ["main.py", f"--workdir={NASTY}", f"--config.name={NASTY}"]
  monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", *arguments])
  assert shlex.split(environment.get_command()) == ["python", *arguments]


def test_a_sweep_passes_strings_on_unchanged(tmp_path, processes):
  spec = sweep.Sweep(f"configs/{NASTY}.py", {}, [f"--config.name={NASTY}"], tmp_path / NASTY)
  arguments = sweep.get_command(spec, {"norm": NASTY})[3:]
  program = "import json, sys; json.dump(sys.argv[2:], open(sys.argv[1], 'w'))"
  seen = tmp_path / "seen"
  jobs.run_jobs(
    [jobs.Job(NASTY, [sys.executable, "-c", program, str(seen), *arguments])], jobs.split_cores(1)
  )
  assert json.loads(seen.read_text()) == [
    f"--config=configs/{NASTY}.py:norm={NASTY}",
    f"--config.name={NASTY}",
    f"--workdir={tmp_path / NASTY / f'norm={NASTY}'}",
    "--cluster=none",
  ]
  assert list(tmp_path.iterdir()) == [seen]
  assert not any(uses_shell(*process) for process in processes)


@pytest.mark.parametrize(
  "name",
  [
    "",
    "tiny",
    "..",
    "~",
    "a b",
    NASTY,
    "../../up",
    "/tmp/root",
    "a/b",
    "nul\0",
    "x" * 300,
    "ü" * 9,
  ],
)
def test_a_default_folder_is_in_runs_for_any_name(name):
  workdir = workdir_lib.default_workdir(tiny.get_config("shapes", name=name).to_dict())
  assert workdir.parts == ("runs", workdir.name)
  assert workdir.name not in ("", ".", "..")
  assert "\0" not in workdir.name
  assert len(os.fsencode(workdir.name)) <= 255


@pytest.mark.parametrize("config", ["../../up.py", "/tmp/root.py:norm=layer/../..", f"{NASTY}.py"])
def test_a_default_folder_of_a_sweep_is_in_runs(config):
  workdir = sweep.default_workdir(config, ["norm"], [f"--config.name=../{NASTY}"])
  assert workdir.parts == ("runs", workdir.name)
