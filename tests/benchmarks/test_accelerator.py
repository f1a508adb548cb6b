"""The accelerator command: limits, records, data in parts, and its tables."""

import json
import sys

import numpy as np
import pytest

from benchmarks import accelerator

ROWS = [{"network": "pyramid", "epoch s": 0.1234}, {"network": "skip", "seeds": 8}]


def write_record(path):
  record = {
    "hardware": "1 x H100",
    "versions": {"jax": "0.11"},
    "commit": "abcdef0123",
    "command": "python -m benchmarks.speed.epoch",
    "rows": ROWS,
  }
  path.write_text(json.dumps(record))


def test_an_item_keeps_its_log_and_its_limit(tmp_path):
  code = "import sys; print('before', flush=True); {}"
  good = accelerator.Item("good", ["-c", code.format("sys.exit(3)")], 60, has_record=False)
  assert accelerator.run_item(good, tmp_path, 60)["ended"] == "status 3"
  slow = accelerator.Item(
    "slow", ["-c", code.format("import time; time.sleep(60)")], 1.5, has_record=False
  )
  assert accelerator.run_item(slow, tmp_path, 60)["ended"] == "stopped at its limit of 2 s"
  assert accelerator.run_item(slow, tmp_path, -1)["ended"] == "left out: no time"
  assert (tmp_path / "good.log").read_text() == (tmp_path / "slow.log").read_text() == "before\n"


def test_the_record_goes_before_what_is_passed_on(tmp_path):
  code = "import sys; print(sys.argv[1:])"
  item = accelerator.Item("a", ["-c", code, "--x", "--", "--y"], 60)
  accelerator.run_item(item, tmp_path, 60)
  expected = ["--x", "--json", str(tmp_path / "a.json"), "--", "--y"]
  assert (tmp_path / "a.log").read_text() == f"{expected}\n"


def test_the_platform_is_that_of_the_device(tmp_path):
  assert accelerator.get_platform(tmp_path) == {}
  device = accelerator.list_items("shapes")[0]
  assert accelerator.run_item(device, tmp_path, 60)["ended"] == "status 0"
  assert accelerator.get_platform(tmp_path) == {"JAX_PLATFORMS": "cpu"}


def test_data_in_parts_is_joined_under_our_names(tmp_path):
  images = np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)
  for number, part in enumerate((images[:2], images[2:])):
    labels = np.full(len(part), number)
    np.savez(tmp_path / f"{number}.npz", train_x=part, train_y=labels, test_images=part)
  name = accelerator.join_data([tmp_path / "0.npz", tmp_path / "1.npz"], tmp_path)
  assert name == f"npz:{tmp_path / 'data.npz'}"
  with np.load(tmp_path / "data.npz") as joined:
    np.testing.assert_array_equal(joined["train_images"], images)
    np.testing.assert_array_equal(joined["test_images"], images)
    assert joined["train_labels"].tolist() == [0, 0, 1, 1, 1]


def test_records_become_tables(tmp_path):
  (tmp_path / "items.json").write_text(
    json.dumps(
      [
        {"item": "epoch", "ended": "status 0", "seconds": 12.3},
        {"item": "seeds", "ended": "left out: no time", "seconds": 0},
      ]
    )
  )
  write_record(tmp_path / "epoch.json")
  text = accelerator.collect(tmp_path)
  assert "| epoch | status 0 | 12 |\n| seeds | left out: no time | 0 |" in text
  assert "1 x H100, JAX 0.11, commit abcdef0" in text
  assert "| network | epoch s | seeds |" in text
  assert "| pyramid | 0.123 |  |\n| skip |  | 8 |" in text


@pytest.mark.parametrize("data", ["shapes", "npz:data.npz"])
def test_every_command_exists(data):
  for item in accelerator.list_items(data):
    program = item.arguments[:2]
    assert program[0] in ("-m", "-c")
    if program[0] == "-m" and program[1] != "pytest":
      __import__(program[1])
      assert program[1] in sys.modules
