"""Where the time of a step goes, by layer and by operation."""

import json

import pytest

from flax_cifar import errors
from flax_cifar.tools import profile
from tests import tiny

PROGRAM = """
%fused_computation (p: f32[]) -> f32[] {
  %mul.9 = f32[] multiply(%p, %p), metadata={op_name="jit(run)/jvp(Net)/late/mul"}
}
ENTRY %main {
  %conv.1 = f32[] custom-call(%p), metadata={op_name="jit(run)/jvp(Net)/c1/conv/ffi_call"}
  %head.2 = f32[] dot(%p), metadata={op_name="jit(run)/while/body/jvp(Net)/head/dot"}
  %conv.3 = f32[] custom-call(%p), metadata={op_name="jit(run)/transpose(jvp(Net))/c1/ffi_call"}
  ROOT %add.4 = f32[] add(%p, %p), metadata={op_name="jit(run)/add"}
}
"""


def event(name, start, milliseconds):
  return {"ts": start, "dur": 1000 * milliseconds, "args": {"hlo_op": name}}


def test_times_are_those_of_the_layers_forward_and_backward():
  layers = profile.find_layers(PROGRAM)
  assert layers["conv.3"] == ("c1", "backward")
  events = [
    event("add.4", 9, 2),
    event("conv.3", 7, 8),
    event("conv.1", 1, 6),
    event("head.2", 5, 4),
  ]
  assert profile.list_layers(events, layers, num_steps=2) == [
    {"layer": "c1", "forward_ms": 3.0, "backward_ms": 4.0, "percent": 70.0},
    {"layer": "head", "forward_ms": 2.0, "backward_ms": 0.0, "percent": 20.0},
    {"layer": "(rest)", "ms_a_step": 1.0, "percent": 10.0},
  ]
  first, *_ = profile.list_operations(events, num_steps=2)
  assert first == {"operation": "conv", "ms_a_step": 7.0, "percent": 70.0}


@pytest.mark.parametrize("feed", ["device", "albumentations"])  # the latter's images end
def test_a_profile_has_the_layers_of_the_network(tiny_model, data, tmp_path, feed):
  config = tiny.get_config(data, **{"augment.backend": feed, "total_epochs": 1})
  summary = profile.profile_run(config, num_steps=2, folder=tmp_path)
  assert list(tmp_path.glob("**/perfetto_trace.json.gz"))
  layers = {row["layer"] for row in summary["layers"]}
  assert {"unit", "head", "(rest)"} <= layers
  assert sum(row["percent"] for row in summary["layers"]) == pytest.approx(100)
  assert 0 < summary["compiled_percent"] <= 100
  assert "head" in profile.format_summary(summary, None, 3)
  json.dumps(summary)


def test_a_trace_without_operations_is_one_line(tiny_model, data, tmp_path, monkeypatch):
  monkeypatch.setattr(profile, "trace", lambda run, folder: ([], 1.0))
  config = tiny.get_config(data, total_epochs=1)
  with pytest.raises(errors.UserError, match=r"has seen no operation .* CUPTI"):
    profile.profile_run(config, num_steps=2, folder=tmp_path)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(errors.UserError, match=r"--out=.*file.* cannot be made a folder"):
    profile.create_folder(str(tmp_path / "file"))
