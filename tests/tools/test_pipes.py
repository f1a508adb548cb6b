"""A tool whose reader has seen enough, as in `evaluate ... | true`, ends quietly."""

import os
import signal
import subprocess
import sys

import pytest

# What each tool does in place of its work, and its arguments.
STAND_INS = {
  "evaluate": (
    "evaluate_weights = lambda options: evaluate.Score("
    "'test', 'tiny', 1, 0.5, 0.5, 0.5, False, None, {})",
    ["--weights=weights.safetensors"],
  ),
  "compare": (
    "compare = lambda *options: compare.Difference("
    "'test', (False, False), [0], ([], []), [0.5], [0.5], [])",
    ["a", "b"],
  ),
  "report": ("create_page = lambda options: 'page'", ["run", "--out=page.html"]),
  "publish": ("publish = lambda options: 'address'", ["run", "--out=folder"]),
}


@pytest.mark.parametrize("tool", STAND_INS)
def test_a_closed_pipe_ends_a_tool_quietly(tool, tmp_path):
  stand_in, arguments = STAND_INS[tool]
  code = f"import sys\nfrom flax_cifar.tools import {tool}\n{tool}.{stand_in}\n"
  code += f"sys.argv = [{tool!r}, *{arguments!r}]\n{tool}.main()"
  reader, writer = os.pipe()
  os.close(reader)
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE
  )
  os.close(writer)
  assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
