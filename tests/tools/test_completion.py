"""What shells complete, asked of a real bash."""

import importlib
import pathlib
import shutil
import subprocess
import sys

import pytest

from flax_cifar import errors, zoo
from flax_cifar.tools import command_line, completion

ROOT = pathlib.Path(__file__).parents[2]
# Completes the last of its arguments, as bash does at a press of the tab key.
ASK = """
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
$(complete -p flax_cifar | sed 's/.*-F \\([^ ]*\\).*/\\1/') flax_cifar "${@: -1}" "${@: -2:1}"
echo "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script():
  pytest.importorskip("shtab")
  return completion.create_script("bash")


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
@pytest.mark.parametrize(
  ("words", "expected"),
  [
    ("pr", ["predict", "profile"]),
    ("--work", ["--workdir"]),
    ("--config s", ["s9", "skip", "skip_dilated", "sprint"]),
    ("summary --config five", ["five_convs"]),
    ("compare --score va", ["validation"]),
    ("evaluate --model ", zoo.list_models()),
    ("predict --we", ["--weights"]),
    ("predict READ", ["README.md"]),
    ("completion z", ["zsh"]),
  ],
)
def test_bash_completes(script, words, expected):
  words = ["flax_cifar", *words.split(" ")]
  bash = ["bash", "-c", f"{script}\n{ASK}", "bash", *words]
  done = subprocess.run(bash, cwd=ROOT, capture_output=True, text=True, check=True)
  assert sorted(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_shell_has_a_script_with_every_tool(shell):
  pytest.importorskip("shtab")
  script = completion.create_script(shell)
  assert all(tool in script for tool in command_line.TOOLS)


def test_each_tool_that_takes_a_config_is_known():
  for name in command_line.TOOLS:
    path = importlib.import_module(f"flax_cifar.tools.{name}").__file__
    text = pathlib.Path(path).read_text("utf-8")
    takes = "parse_with_config" in text or "load_config" in text
    assert takes == (name in completion.TAKE_CONFIG), name


def test_without_shtab_it_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, "shtab", None)
  with pytest.raises(errors.UserError, match=r"pip install 'flax_cifar\[completion\]'"):
    completion.create_script("bash")
