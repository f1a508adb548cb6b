"""A tracker gets the numbers of a run, and its failures do not end the run."""

import sys
import types

import pytest

from flax_cifar import errors
from flax_cifar.run import tracker
from tests import runs


class Library(types.ModuleType):
  """Records the calls; `broken` names a function that fails."""

  def __init__(self, broken=""):
    super().__init__("trackio")
    self.__spec__ = types.SimpleNamespace()
    self.calls = []
    for name in ("init", "log", "finish"):
      setattr(self, name, self._record(name, name == broken))

  def _record(self, name, fails):
    def call(*args, **kwargs):
      self.calls.append((name, args, kwargs))
      if fails:
        raise ConnectionError("no network\nat all")

    return call


@pytest.fixture
def library(monkeypatch):
  library = Library()
  monkeypatch.setitem(sys.modules, "trackio", library)
  return library


@pytest.mark.usefixtures("tiny_model")
def test_a_run_sends_its_config_and_every_epoch(library, tmp_path, data):
  runs.run(tmp_path / "run", data, **{"log.tracker": "trackio", "total_epochs": 2})
  (_, _, init), *logged, last = library.calls
  identity = (tmp_path / "run" / tracker.IDENTITY).read_text()
  assert (init["project"], init["name"]) == ("flax_cifar", f"tiny-{identity}")
  assert init["config"]["optimizer.learning_rate"] > 0
  assert [name for name, _, _ in logged] == ["log", "log"]
  records = runs.lines(tmp_path / "run")
  for (_, (numbers,), keywords), record in zip(logged, records, strict=True):
    assert keywords == {"step": record["step"]}
    assert numbers["train/loss"] == record["train_loss"]
    assert numbers["validation/accuracy"] == record["validation_accuracy"]
  assert last == ("finish", (), {})


def test_a_library_whose_import_fails_is_one_warning(monkeypatch, tmp_path, capsys):
  (tmp_path / "trackio.py").write_text("raise TypeError('descriptors')")
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "trackio", raising=False)
  tracker.check_tracker("trackio")
  tracker.Tracker("trackio", {"name": "a"}, tmp_path).log({"loss": 1.0}, step=1)
  assert capsys.readouterr().err.count("trackio gets nothing from now on: its init failed") == 1


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_run_that_resumes_goes_on_as_the_same_run(name, monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, name, library := Library())
  for folder in ("one", "one", "other"):
    (tmp_path / folder).mkdir(exist_ok=True)
    tracker.Tracker(name, {"name": "a"}, tmp_path / folder)
  inits = [keywords for _, _, keywords in library.calls]
  identities = [(init["name"], init.get("id")) for init in inits]
  assert identities[0] == identities[1]
  assert identities[0][0] != identities[2][0]
  assert (identities[0][1] is not None) == (name == "wandb")
  assert {init["resume"] for init in inits} == {"allow"}


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failure_is_one_warning(broken, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "trackio", library := Library(broken))
  one = tracker.Tracker("trackio", {"name": "a"}, tmp_path)
  for step in range(3):
    one.log({"loss": 1.0}, step=step)
  one.finish()
  assert [name for name, _, _ in library.calls].count(broken) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"warning: trackio gets nothing from now on: its {broken} failed")


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("mlflow", "log.tracker='mlflow' is unknown"),
    ("wandb", "log.tracker='wandb' is not valid; it must be none, unless you pip install wandb"),
  ],
)
def test_a_tracker_that_is_not_there_is_refused_before_the_run(name, message, tmp_path, data):
  if name == "wandb" and tracker.importlib.util.find_spec("wandb"):
    pytest.skip("wandb is installed")
  with pytest.raises(errors.UserError, match=message):
    runs.run(tmp_path / "run", data, **{"log.tracker": name})
  assert not (tmp_path / "run").exists()
