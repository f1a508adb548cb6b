"""Checkpoints with files that are damaged or gone."""

import collections
import functools
import pathlib
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from tests.stress.faults import bench as bench_lib
from tests.stress.faults import compare


def flip_bit(content: bytes) -> bytes:
  middle = len(content) // 2
  return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {  # None deletes the file
  "cut to 0 bytes": lambda content: b"",
  "cut to 1 byte": lambda content: content[:1],
  "cut to half": lambda content: content[: len(content) // 2],
  "cut by 1 byte": lambda content: content[:-1],
  "deleted": lambda content: None,
  "a bit flipped": lambda content: flip_bit(content) if content else content,
}


def damage(path: pathlib.Path, how: str) -> None:
  content = DAMAGES[how](path.read_bytes())
  if content is None:
    path.unlink()
  else:
    path.write_bytes(content)


def list_damages(contents: Mapping[str, bytes]) -> list[tuple[str, str]]:
  """Every (file, damage) that changes the file; no two of a file give the same content."""
  damages = []
  for file, content in contents.items():
    seen = [content]
    for how, change in DAMAGES.items():
      changed = change(content)
      if changed not in seen:
        seen.append(changed)
        damages.append((file, how))
  return damages


def draw_damages(
  damages: Sequence[tuple[str, str]], number: int, draw: random.Random
) -> list[tuple[str, str]]:
  """Draws `number` damages, alternating between the files; 0 draws all."""
  by_file: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
  for damage in draw.sample(damages, len(damages)):
    by_file[damage[0]].append(damage)
  turns = sorted(
    ((turn, damage) for group in by_file.values() for turn, damage in enumerate(group)),
    key=lambda pair: pair[0],
  )
  return [damage for _, damage in turns][: number or None]


def inject_damages(bench: bench_lib.Bench) -> list[bench_lib.Row]:
  """Damages each file of the newest checkpoint, and all checkpoints at once."""
  base = bench.stop_late("stopped")
  folder = base / "checkpoints" / str(compare.list_steps(base)[-1])
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
  cases = draw_damages(list_damages(contents), bench.options.damages, bench.random)
  unnoticed: list[str] = []
  results = bench.map(functools.partial(damage_file, bench, base, unnoticed), cases)
  notes = f"{len(cases) - len(unnoticed)} named, moved to `damaged/`, and the one before used"
  if unnoticed:
    notes += f"; {len(unnoticed)} in files that Orbax does not need: {name_files(unnoticed)}"
  rows = [bench_lib.describe("a file of the newest checkpoint damaged", results, notes)]
  return [
    *rows,
    bench_lib.describe("all checkpoints damaged", [damage_all(bench, base)], "refused"),
  ]


def damage_file(
  bench: bench_lib.Bench, base: pathlib.Path, unnoticed: list[str], case: tuple[str, str]
) -> compare.Problems:
  """Damages a file, and adds it to `unnoticed` if no warning names the checkpoint."""
  name, how = case
  workdir = bench.new_workdir(base)
  step = compare.list_steps(workdir)[-1]
  damage(workdir / "checkpoints" / str(step) / name, how)
  child, problems = bench.finish(workdir)
  if not is_named(child, step):
    unnoticed.append(name)
  elif not problems and child.start == step:
    problems = [f"step {step} was named as damaged, but was used"]
  elif not problems and not list((workdir / "damaged").glob("*")):
    problems = [f"step {step} was not moved to damaged/"]
  return [f"{name} {how}: {problem}" for problem in problems]


def is_named(child: bench_lib.Child, step: int) -> bool:
  """Whether a warning names the checkpoint of `step`."""
  pattern = rf"warning: checkpoint .*\b{step}\b"
  return any(re.match(pattern, line) for line in child.errors)


def name_files(names: Iterable[str]) -> str:
  return ", ".join(sorted(set(names)))


def damage_all(bench: bench_lib.Bench, base: pathlib.Path) -> compare.Problems:
  """Damages all checkpoints: the run must refuse, and leave its metrics as they are."""
  workdir = bench.new_workdir(base)
  for step in compare.list_steps(workdir):
    files = (workdir / "checkpoints" / str(step)).glob("*/d/*")
    damage(max(files, key=lambda path: path.stat().st_size), "a bit flipped")
  metrics = (workdir / "metrics.jsonl").read_bytes()
  problems = bench.launch(workdir).expect(2)
  if (workdir / "metrics.jsonl").read_bytes() != metrics:
    problems.append("metrics.jsonl was changed")
  return bench.report(problems)
