"""Disks without room for the output of a run."""

import contextlib
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

from tests.stress.faults import bench as bench_lib
from tests.stress.faults import compare

FILE_LIMIT = 32 * 2**10  # bytes; less than the arrays of a checkpoint
DISK = 128 * 2**20  # a run asks for 100 MiB before it starts
ROOM = 100 * 2**10  # left on it; less than a checkpoint


def inject_full_disk(bench: bench_lib.Bench) -> list[bench_lib.Row]:
  """Limits the size of files; where mounting is permitted, also fills a disk."""
  base = bench.stop_late("stopped")
  rows = [bench_lib.describe("files limited (RLIMIT_FSIZE)", [limit_files(bench, base)])]
  with mount_disk(bench.folder / "disk") as disk:
    if disk is None:
      return [
        *rows,
        bench_lib.describe("disk full (tmpfs)", [], "not run: mounting is not permitted"),
      ]
    return [*rows, bench_lib.describe("disk full (tmpfs)", [fill_disk(bench, disk)])]


def limit_files(bench: bench_lib.Bench, base: pathlib.Path) -> compare.Problems:
  workdir = bench.new_workdir(base)
  before = compare.list_steps(workdir)[-1]
  child = bench.launch(workdir, limit=FILE_LIMIT)
  problems = bench_lib.expect_refusal(child)
  if before not in compare.list_steps(workdir):
    problems.append(f"checkpoint {before} is gone")
  return bench.report(problems) + bench.finish(workdir)[1]


@contextlib.contextmanager
def mount_disk(folder: pathlib.Path) -> Iterator[pathlib.Path | None]:
  """A small disk in memory; None where mounting is not permitted."""
  folder.mkdir()
  command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
  try:
    mounted = subprocess.run(command, capture_output=True).returncode == 0
  except OSError:
    mounted = False
  try:
    yield folder if mounted else None
  finally:
    if mounted:
      subprocess.run(["umount", str(folder)], check=True)


def fill_disk(bench: bench_lib.Bench, disk: pathlib.Path) -> compare.Problems:
  """Fills the disk after the first checkpoint, then makes room again."""
  workdir, filler = disk / "run", disk / "filler"
  child = bench.launch(workdir)
  child.wait_until(lambda: bool(child.saved))
  with filler.open("wb") as file:
    os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - ROOM)
  problems = bench_lib.expect_refusal(child)
  if not compare.list_steps(workdir):
    problems.append("no checkpoint is left")
  filler.unlink()
  return bench.report(problems) + bench.finish(workdir)[1]
