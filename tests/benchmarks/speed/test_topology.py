"""Compiling for TPUs that are not here: what the program's text says, and one real program."""

import argparse
import importlib.util
import json
import subprocess
import sys

import pytest
from jax.experimental import topologies

from benchmarks.speed import topology
from flax_cifar import errors

PROGRAM = """
  %all-reduce.1 = f32[16]{0:T(128)S(1)} all-reduce(%fusion.2), channel_id=1
  %ar = (f32[64]{0}, bf16[3,3,8,16]{3,2,1,0:T(8,128)(2,1)}, /*index=2*/s32[]) all-reduce(%a, %b)
  %ag = f32[4,2,1,16]{3,2,1,0} all-gather-start(%bitcast), dimensions={1}
  %element = f32[64]{0} get-tuple-element(%ar), index=0
"""


def test_collectives_are_listed_with_their_bytes():
  assert topology.list_collectives(PROGRAM) == [
    ("all-reduce", 64),
    ("all-reduce", 256 + 2 * 9 * 128 + 4),
    ("all-gather", 4 * 128),
  ]


@pytest.mark.parametrize("text", ["v9:2x2", "v5e", "v5e:2", "v5e:0x2", "2x2"])
def test_an_unknown_topology_is_refused(text):
  with pytest.raises(argparse.ArgumentTypeError, match=rf"'{text}' is not KIND:SHAPE.*v5e, v6e"):
    topology.topology_name(text)
  assert topology.topology_name("v5e:16x16") == "v5e:16x16"


def test_a_missing_compiler_is_one_line(monkeypatch):
  def refuse(name, **options):
    raise RuntimeError("not installed")

  monkeypatch.setattr(topologies, "get_topology_desc", refuse)
  with pytest.raises(errors.UserError, match=r"no compiler here \(not installed\).*\.\[tpu\]"):
    topology.create_mesh("v5e:2x2")


def test_the_estimate_is_a_roofline():
  chip = topology.Chip(flops=1e12, memory_bytes=1e9, link_bytes=1e6)
  assert topology.estimate_alone(chip, 2e12, 1e9) == 2
  assert topology.estimate_alone(chip, 1e12, 3e9) == 3
  expected = 2 * 500 / 1e6 + 7 * 2 * (2 + 4) * topology.HOP_SECONDS
  assert topology.estimate_exchange(chip, "2x4", 500, 7) == pytest.approx(expected)


def test_the_batch_of_many_chips_leaves_the_exchange_a_tenth_of_a_step():
  row = {"network": "skip", "topology": "v5e:2x2", "batch a chip": 128, "alone ms": 1.28}
  row |= {"kB moved": 0.0, "collectives": 10}
  wanted = topology.scale(row)
  assert wanted == {"network": "skip", "v5e:2x4": 108, "v5e:8x8": 288, "v5e:16x16": 576}


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="pip install jax[tpu] brings the compiler"
)
def test_a_step_compiles_for_four_chips(tmp_path):
  """In a process of its own, because only one may hold libtpu."""
  path = tmp_path / "record.json"
  flags = ["--networks", "keras_base", "--topologies", "v5e:2x2", "--batch", "8"]
  command = [sys.executable, "-m", "benchmarks.speed.topology", *flags, "--json", str(path)]
  subprocess.run(command, check=True, capture_output=True)
  (row,) = json.loads(path.read_text())["rows"]
  assert row["chips"] == 4
  assert 1 <= row["collectives"] <= 3  # it has no norms
