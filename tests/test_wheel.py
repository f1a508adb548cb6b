"""The package as pip installs it, without a checkout: it trains, and its tools work anywhere."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from flax_cifar import zoo
from flax_cifar.tools import command_line
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
# Stands for an environment in which these cannot be imported; Python runs it at its start.
BLOCKER = """
import sys
sys.modules["albumentations"] = sys.modules["clu"] = None
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """The folder of an installed wheel that was built from a copy of the sources."""
  folder = tmp_path_factory.mktemp("wheel")
  sources = folder / "sources"
  sources.mkdir()
  for name in ("flax_cifar", "configs"):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=ignored)
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, sources / name)
  pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
  build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources]
  subprocess.run([*pip, *build], check=True, capture_output=True)
  (wheel,) = folder.glob("*.whl")
  install = ["install", "--no-deps", "--no-index", "--target", folder / "site", wheel]
  subprocess.run([*pip, *install], check=True, capture_output=True)
  (folder / "site" / "sitecustomize.py").write_text(BLOCKER)
  return folder / "site"


def call(installed, cwd, *arguments):
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": str(installed), "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_the_wheel_holds_the_configs_and_nothing_beside_the_package(installed):
  names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
  assert names - {"sitecustomize.py", "__pycache__"} == {"bin", "flax_cifar"}
  shipped = {path.name for path in (installed / "flax_cifar" / "configs").glob("*.py")}
  assert shipped == {path.name for path in (ROOT / "configs").glob("*.py")}
  native = pathlib.Path("flax_cifar", "kernels", "native")
  for name in ("kernels.cc", "pool.h", "winograd.h"):
    assert (installed / native / name).read_bytes() == (ROOT / native / name).read_bytes()
  code = "import flax_cifar; print(flax_cifar.list_models())"
  assert call(installed, installed.parent, "-c", code).stdout == f"{zoo.list_models()}\n"


def test_the_installed_package_trains_in_an_empty_folder(installed, tmp_path):
  """Even where neither albumentations nor clu can be imported."""
  (tmp_path / "empty").mkdir()
  flags = tiny.write_quick_run(tmp_path, total_epochs=1)
  done = call(
    installed,
    tmp_path / "empty",
    *("-m", "flax_cifar", "--config=quickstart", *flags),
  )
  assert (done.returncode, done.stderr) == (0, "")
  (run,) = (tmp_path / "empty" / "runs").iterdir()
  result = json.loads((run / "result.json").read_text())
  assert result["command"].startswith("python -m flax_cifar --config=quickstart ")
  assert result["commit"] == "unknown"
  assert result["parameters"] == 48_656 - 7 * 64  # three classes instead of ten
  weights = f"--weights={run / 'weights.safetensors'}"
  done = call(installed, tmp_path, "-m", "flax_cifar.tools.evaluate", weights, "--split=test")
  assert done.returncode == 0, done.stderr
  assert f"test accuracy {result['test_accuracy']:.2%}" in done.stdout
  done = call(installed, tmp_path, "-m", "flax_cifar.tools.report", run)
  assert done.returncode == 0, done.stderr
  assert f"{result['test_accuracy']:.2%}" in (run / "report.html").read_text()


def test_every_tool_has_a_help_text_anywhere(installed, tmp_path):
  files = (ROOT / "flax_cifar" / "tools").glob("*.py")
  programs = {path.stem for path in files if '__name__ == "__main__"' in path.read_text()}
  assert programs == set(command_line.TOOLS)
  script = str(installed / "bin" / "flax_cifar")
  for number, tool in enumerate(command_line.TOOLS):
    program = ("-m", f"flax_cifar.tools.{tool}") if number % 2 else (script, tool)
    done = call(installed, tmp_path, *program, "--help")
    assert done.stdout.startswith(f"usage: flax_cifar {tool}"), done.stderr


def test_the_console_script_is_the_program(installed, tmp_path):
  done = call(installed, tmp_path, str(installed / "bin" / "flax_cifar"), "--config=s10")
  assert done.returncode == 2
  assert done.stderr.startswith("error: --config='s10' is unknown; choose one of five_convs")


def test_albumentations_is_needed_only_where_it_is_asked_for(installed, tmp_path):
  flags = tiny.write_quick_run(tmp_path, **{"augment.backend": "albumentations"})
  done = call(installed, tmp_path, "-m", "flax_cifar", "--config=quickstart", *flags)
  assert (done.returncode, done.stderr.count("\n")) == (2, 1)
  assert "Albumentations cannot be imported" in done.stderr
  assert "set augment.backend=device" in done.stderr
  assert [path.name for path in tmp_path.iterdir()] == ["tiny.npz"]
