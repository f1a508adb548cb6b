"""The computations of the fault tests and of the soak test, which are not run here."""

import json
import pathlib
import random

import numpy as np
import pytest

from tests.stress import soak
from tests.stress.faults import __main__, bench, compare, damages, kills, worker


@pytest.mark.parametrize(
  ("call", "path", "phases"),
  [
    ("mkdir", "run/checkpoints/12.orbax-checkpoint-tmp", ("writing", "writing", None)),
    ("mkdir", "run/checkpoints/12.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp", None),
    ("rename", "run/checkpoints/12.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp", None),
    (
      "write_text",
      "run/checkpoints/12.orbax-checkpoint-tmp/.digests.json.7.part",
      ("writing the digests", "writing the digests", None),
    ),
    (
      "replace",
      "run/checkpoints/12.orbax-checkpoint-tmp/.digests.json.7.part",
      ("writing the digests", "before the rename", None),
    ),
    (
      "rename",
      "run/checkpoints/12.orbax-checkpoint-tmp",
      ("before the rename", "after the rename", "between saves"),
    ),
    ("rmtree", "run/checkpoints/9", ("deleting an old one",) * 2 + ("between saves",)),
    ("rmtree", "run/checkpoints/9.orbax-checkpoint-tmp", None),
    ("rename", "run/checkpoints/12", None),  # retired
    ("replace", "run/.metrics.jsonl.7.part", None),
  ],
)
def test_each_call_belongs_to_a_phase(call, path, phases):
  assert worker.name_phases(call, pathlib.PurePath(path)) == phases


class Listener:
  """A trace that collects its lines."""

  def __init__(self):
    self.lines = []
    self.deletes = False
    self.report = self.lines.append

  def pause(self):
    """Does not sleep."""


def test_a_wrapped_rename_reports_its_phases_and_the_saved_step():
  trace, calls = Listener(), []
  rename = worker.wrap(lambda *paths: calls.append(paths), "rename", trace)
  paths = ("run/checkpoints/12.orbax-checkpoint-tmp", pathlib.Path("run/checkpoints/12"))
  rename(*paths)
  assert calls == [paths]
  assert trace.lines == [
    "phase before the rename",
    "saved 12",
    "phase after the rename",
    "phase between saves",
  ]


def test_a_failed_deletion_ends_its_phase_for_the_thread():
  def fail(path):
    raise OSError(path)

  trace = Listener()
  with pytest.raises(OSError, match="9"):
    worker.wrap(fail, "rmtree", trace)("run/checkpoints/9")
  assert trace.lines == ["phase deleting an old one", "deleted 9"]
  assert not trace.deletes


def test_steps_are_counted_as_they_begin():
  trace = Listener()
  chunks = worker.report_chunks(lambda self, steps: iter([(2, "a"), (1, "b")]), trace)
  assert list(chunks(None, range(7, 10))) == [(2, "a"), (1, "b")]
  assert trace.lines == ["from 7", "step 9", "step 10"]


def test_damages_change_the_file_and_differ():
  cases = damages.list_damages({"empty": b"", "one": b"a", "four": b"abcd"})
  assert [how for file, how in cases if file == "empty"] == ["deleted"]
  assert [how for file, how in cases if file == "one"] == [
    "cut to 0 bytes",
    "deleted",
    "a bit flipped",
  ]
  assert [how for file, how in cases if file == "four"] == list(damages.DAMAGES)
  assert damages.flip_bit(b"abcd") == b"abbd"


def test_drawn_damages_alternate_between_the_files():
  cases = damages.list_damages(dict.fromkeys("xyz", b"abcd"))
  drawn = damages.draw_damages(cases, 4, random.Random(0))
  assert {file for file, _ in drawn[:3]} == set("xyz")
  assert len(drawn) == 4
  assert sorted(damages.draw_damages(cases, 0, random.Random(0))) == sorted(cases)


def write_run(folder, *, accuracy=0.5, seconds=1.0):
  folder.mkdir()
  record = {"epoch": 1, "train_accuracy": accuracy, "seconds": seconds}
  (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
  (folder / "result.json").write_text(json.dumps({"test_accuracy": 0.5, "train_seconds": seconds}))
  return folder


def test_runs_are_compared_except_for_times(tmp_path, monkeypatch):
  monkeypatch.setattr(compare, "compare_arrays", lambda *folders: [])
  reference = write_run(tmp_path / "reference")
  assert compare.compare(reference, write_run(tmp_path / "slow", seconds=9.0)) == []
  other = write_run(tmp_path / "other", accuracy=0.6)
  assert compare.compare(reference, other) == ["metrics.jsonl differs"]
  (other / "metrics.jsonl").write_text("{")
  assert "cannot be read" in compare.compare(reference, other)[0]


def test_bits_are_compared_with_their_type():
  nan = np.array([np.nan, 0.0], np.float32)
  assert compare.same_bits(nan, nan.copy())
  assert not compare.same_bits(nan, np.array([np.nan, -0.0], np.float32))
  assert not compare.same_bits(nan, nan.astype(np.float64))


class Ended:
  """A child that has ended."""

  def __init__(self, *, start, steps, saved=(), deleted=()):
    self.start, self.steps, self.saved, self.deleted = start, steps, list(saved), list(deleted)


def test_a_round_records_the_saved_checkpoints():
  run = kills.Round(pathlib.Path("run"))
  run.add(Ended(start=0, steps=8, saved=[3, 6], deleted=[3]))
  run.add(Ended(start=None, steps=0))  # killed before it trained
  run.add(Ended(start=6, steps=4, saved=[9]))
  assert (run.steps, run.kept, run.problems) == (12, {6, 9}, [])
  run.add(Ended(start=6, steps=1))
  assert run.problems == ["started at step 6, though 9 was saved"]


def test_goodput_counts_repeated_steps():
  assert kills.describe_goodput(80, 100) == "20 steps repeated, goodput 80.0%"
  assert kills.describe_goodput(40, 40) == "0 steps repeated, goodput 100.0%"


def test_rows_add_up():
  rows = [bench.describe("a", [[], ["broken"]], "note"), bench.describe("b", [[]])]
  assert (rows[0]["survived"], rows[0]["lost"], rows[0]["problems"]) == (1, 1, ["broken"])
  lines = __main__.format_rows(rows).splitlines()
  assert lines[2] == "| a | 2 | 1 | 1 | note |"
  assert lines[-1] == "| all | 3 | 2 | 1 |  |"


def test_a_slope_and_its_error():
  levels = np.arange(100.0)
  per_100 = 100 / soak.BLOCK
  assert soak.fit_slope(3 * levels + 1) == (pytest.approx(3 * per_100), pytest.approx(0, abs=1e-9))
  slope, error = soak.fit_slope(np.random.default_rng(0).standard_normal(100))
  assert abs(slope) < 3 * error
  assert error == pytest.approx(per_100 / np.sqrt(100 * (100**2 - 1) / 12), rel=0.3)


def test_correlated_noise_widens_the_error():
  noise = np.random.default_rng(0).standard_normal(200)
  _, independent = soak.fit_slope(noise)
  _, correlated = soak.fit_slope(np.repeat(noise[:20], 10))
  assert correlated > 2 * independent


@pytest.mark.parametrize(
  ("slope", "error", "expected"),
  [
    (5, 1, soak.GROWS),
    (5, 3, soak.UNCLEAR),
    (1, 0.1, soak.STAYS),
    (1, 2, soak.UNCLEAR),
    (-5, 1, soak.STAYS),
    (0, 0, soak.STAYS),
  ],
)
def test_growth_is_beyond_noise_and_tolerance(slope, error, expected):
  assert soak.get_verdict(slope, error, tolerance=2) == expected


@pytest.mark.parametrize(
  ("overall", "later", "expected"),
  [
    (soak.GROWS, soak.GROWS, soak.GROWS),
    (soak.GROWS, soak.STAYS, soak.STAYS),  # a cache that has filled
    (soak.GROWS, soak.UNCLEAR, soak.UNCLEAR),
    (soak.STAYS, soak.GROWS, soak.UNCLEAR),
    (soak.UNCLEAR, soak.STAYS, soak.STAYS),
  ],
)
def test_only_a_leak_grows_in_the_later_half(overall, later, expected):
  assert soak.combine_verdicts(overall, later) == expected


def create_samples(epochs, **changes):
  return [
    {"epoch": epoch, "rss": 500.0, "epoch_seconds": 0.5} | {k: f(epoch) for k, f in changes.items()}
    for epoch in range(1, epochs + 1)
  ]


def test_neither_warm_up_nor_saves_are_growth():
  samples = create_samples(
    140, rss=lambda epoch: 500.0 + 10 * min(epoch, 20) + 90 * (epoch % 3 == 0)
  )
  for name in ("rss", "epoch_seconds"):
    row = soak.describe_slope("device", name, samples)
    assert (row["slope"], row["verdict"]) == (pytest.approx(0), soak.STAYS)


def test_a_leak_is_growth_per_100_epochs():
  samples = create_samples(140, rss=lambda epoch: 500 + 0.1 * epoch, epoch_seconds=lambda e: 1 + e)
  rows = [soak.describe_slope("device", name, samples) for name in ("rss", "epoch_seconds")]
  assert rows[0]["slope"] == pytest.approx(10)
  assert [row["verdict"] for row in rows] == [soak.GROWS] * 2
