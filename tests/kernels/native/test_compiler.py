"""Compiling C++: what is kept, and what happens without a compiler."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from flax_cifar.kernels.native import compiler

if not shutil.which("c++"):
  pytest.skip("there is no C++ compiler", allow_module_level=True)


@pytest.fixture
def load(tmp_path, monkeypatch):
  """Loads a source with a cache of its own, as a new process would."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(compiler, "_try_to_load", compiler._try_to_load.__wrapped__)
  return compiler.load


def write(folder, value):
  source = pathlib.Path(folder, "answer.cc")
  source.write_text(f'extern "C" int answer() {{ return {value}; }}')
  return source


def list_kept(tmp_path):
  return sorted((tmp_path / "cache").rglob("*.so"))


def test_it_is_compiled_once_and_again_when_the_source_changes(load, tmp_path):
  source = write(tmp_path, 41)
  assert load(source).answer() == 41
  (kept,) = list_kept(tmp_path)
  written = kept.stat().st_mtime_ns
  assert load(source).answer() == 41
  assert kept.stat().st_mtime_ns == written
  assert load(write(tmp_path, 42)).answer() == 42
  assert len(list_kept(tmp_path)) == 2


@pytest.mark.parametrize("part", [0, 0.5])
def test_a_library_that_was_cut_is_compiled_again_for_this_processor(
  load, tmp_path, monkeypatch, part
):
  source = write(tmp_path, 41)
  assert load(source).answer() == 41
  (whole,) = list_kept(tmp_path)
  # In another cache, because a process opens a path that it has opened no second time.
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
  kept = tmp_path / "other" / whole.relative_to(tmp_path / "cache")
  kept.parent.mkdir(parents=True)
  kept.write_bytes(whole.read_bytes()[: int(part * whole.stat().st_size)])
  assert load(source).answer() == 41
  assert list(kept.parent.glob("*.so")) == [kept]
  assert kept.stat().st_size == whole.stat().st_size


def test_macros_make_a_library_of_their_own(load, tmp_path):
  source = write(tmp_path, "ANSWER")
  assert load(source, ("ANSWER=45",)).answer() == 45
  assert load(source, ("ANSWER=46",)).answer() == 46


def test_without_a_cache_it_is_compiled_each_time(load, tmp_path, monkeypatch):
  monkeypatch.setattr("flax_cifar.environment.find_cache", lambda kind: "")
  assert load(write(tmp_path, 43)).answer() == 43
  assert list_kept(tmp_path) == []


def test_where_the_cache_cannot_be_used_it_is_compiled_elsewhere(load, tmp_path):
  kernels = tmp_path / "cache" / "flax_cifar" / "kernels"
  kernels.parent.mkdir(parents=True)
  kernels.write_text("a file, where a folder should be")
  assert load(write(tmp_path, 48)).answer() == 48
  assert list_kept(tmp_path) == []


def test_a_compiler_that_hangs_is_none(load, tmp_path, monkeypatch):
  script = tmp_path / "c++"
  script.write_text("#!/bin/sh\nexec sleep 60\n")
  script.chmod(0o755)
  monkeypatch.setenv("CXX", str(script))
  monkeypatch.setattr(compiler, "SECONDS", 0.1)
  source = write(tmp_path, 49)
  assert load(source) is None
  assert compiler.get_failure(source) == f"{script} did not end within 0.1 s"


@pytest.mark.parametrize("command", ["no-such-compiler", "false", "true", "c++ '", "/"])
def test_a_compiler_that_does_not_work_is_none(load, tmp_path, monkeypatch, command):
  monkeypatch.setenv("CXX", command)
  source = write(tmp_path, 44)
  assert load(source) is None
  assert compiler.get_failure(source)


def test_a_source_that_does_not_compile_leaves_nothing(load, tmp_path):
  source = tmp_path / "wrong.cc"
  source.write_text("int wrong(")
  assert load(source) is None
  assert "wrong.cc" in compiler.get_failure(source)
  assert "\n" not in compiler.get_failure(source)
  assert list(tmp_path.rglob("*.so")) == []


def test_a_compiler_that_does_not_know_gccs_options_is_enough(load, tmp_path, monkeypatch):
  script = tmp_path / "c++"
  script.write_text('#!/bin/sh\ncase "$*" in *-fno-tree*) exit 1;; esac\nexec c++ "$@"\n')
  script.chmod(0o755)
  monkeypatch.setenv("CXX", str(script))
  assert load(write(tmp_path, 45)).answer() == 45


def test_a_header_beside_the_source_counts(load, tmp_path):
  header = tmp_path / "value.h"
  header.write_text("#define VALUE 47")
  source = tmp_path / "answer.cc"
  source.write_text('#include "value.h"\nextern "C" int answer() { return VALUE; }')
  assert load(source).answer() == 47
  header.write_text("#define VALUE 48")
  assert load(source).answer() == 48


def test_processes_that_compile_at_once_all_get_it(load, tmp_path):
  source = write(tmp_path, 46)
  code = f"""
import pathlib
from flax_cifar.kernels.native import compiler
assert compiler.load(pathlib.Path({str(source)!r})).answer() == 46
"""
  processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
  assert [process.wait() for process in processes] == [0] * 4
  assert len(list_kept(tmp_path)) == 1
