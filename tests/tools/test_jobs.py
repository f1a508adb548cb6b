"""Processes side by side: their cores, failures, signals and logs."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from flax_cifar.tools import jobs as jobs_lib

ROOT = pathlib.Path(__file__).parents[2]
WAIT = """
import pathlib, time
def wait_for(path):
  deadline = time.monotonic() + 60
  while not pathlib.Path(path).exists():
    assert time.monotonic() < deadline, path
    time.sleep(0.02)
"""
# Waits for a signal as a run does: it saves after the first one; a second one would end it.
GUARDED = """
import pathlib, sys, time
from flax_cifar.signals import InterruptGuard
with InterruptGuard() as guard:
  pathlib.Path(sys.argv[1] + "-ready").touch()
  deadline = time.monotonic() + 60
  while not guard.is_caught() and time.monotonic() < deadline:
    time.sleep(0.01)
  time.sleep(0.3)
  pathlib.Path(sys.argv[1] + "-saved").touch()
sys.exit(128 + guard.signum)
"""
PARENT = f"""
import sys
from flax_cifar.tools.jobs import Job, JobFailed, run_jobs
jobs = [Job(path, [sys.executable, "-c", {GUARDED!r}, path]) for path in sys.argv[2:]]
try:
  run_jobs(jobs, [frozenset()] * int(sys.argv[1]))
except JobFailed as failure:
  sys.exit(failure.status)
"""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


def create_job(name, code, log=None):
  return jobs_lib.Job(name, [sys.executable, "-c", code], log)


def get_failure(jobs, shares):
  with pytest.raises(jobs_lib.JobFailed) as caught:
    jobs_lib.run_jobs(jobs, shares)
  return caught.value


def wait_for(*paths):
  deadline = time.monotonic() + 60
  while not all(path.exists() for path in paths):
    assert time.monotonic() < deadline, paths
    time.sleep(0.02)


@pytest.mark.parametrize(
  ("count", "shares"),
  [(1, [{1, 3, 4, 7, 9}]), (2, [{1, 3}, {4, 7, 9}]), (3, [{1}, {3, 4}, {7, 9}])],
)
def test_shares_cover_the_cores_that_may_be_used(monkeypatch, count, shares):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {9, 3, 1, 7, 4}, raising=False)
  assert jobs_lib.split_cores(count) == shares


def test_no_process_is_pinned_where_the_system_cannot(monkeypatch):
  monkeypatch.delattr(os, "sched_getaffinity", raising=False)
  assert jobs_lib.split_cores(3) == [frozenset()] * 3


def test_as_many_jobs_run_at_once_as_there_are_shares_of_the_cores(tmp_path):
  """The first two wait for each other; the third may only begin when one of them has ended."""

  def create_code(own, other):
    own, other = tmp_path / own, tmp_path / other
    return f"{WAIT}\nopen({str(own)!r}, 'w')\nwait_for({str(other)!r})\ntime.sleep(0.3)"

  ended = tmp_path / "ended"
  a = create_job("a", create_code("a", "b") + f"\nopen({str(ended)!r}, 'w')")
  b = create_job("b", create_code("b", "a") + f"\nwait_for({str(ended)!r})")
  c = create_job("c", f"import os; raise SystemExit(not os.path.exists({str(ended)!r}))")
  jobs_lib.run_jobs([a, b, c], [frozenset()] * 2)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system pins no process")
def test_each_job_runs_on_its_cores_and_the_parent_keeps_its_own(tmp_path):
  before = os.sched_getaffinity(0)
  shares = [frozenset({core}) for core in sorted(before)]
  paths = [tmp_path / str(core) for core in sorted(before)]
  code = f"{WAIT}\nimport os, sys\nopen(sys.argv[1], 'w').write(str(os.sched_getaffinity(0)))"
  code += "\nfor path in sys.argv[1:]: wait_for(path)"
  commands = [[sys.executable, "-c", code, str(path), *map(str, paths)] for path in paths]
  jobs_lib.run_jobs(
    [jobs_lib.Job(path.name, c) for path, c in zip(paths, commands, strict=True)], shares
  )
  assert [path.read_text() for path in paths] == [str(set(share)) for share in shares]
  assert os.sched_getaffinity(0) == before


def test_a_log_gets_all_output_and_is_appended_to(tmp_path, capfd):
  log = tmp_path / "a.log"
  job = create_job("a", "import sys; print('out'); sys.stdout.flush(); sys.exit('err')", log)
  for _ in range(2):
    failure = get_failure([job], jobs_lib.split_cores(1))
  assert log.read_text() == "out\nerr\n" * 2
  assert str(failure) == (
    f"run a ended with status 1 ({log} says why); the same command goes on from there"
  )
  assert capfd.readouterr() == (f"run 1/1: a, in {log}\n" * 2, "")


def test_after_a_failure_none_starts_and_those_beside_it_are_waited_for(tmp_path, capsys):
  failing, beside, later = (tmp_path / name for name in "abc")
  jobs = [
    create_job("failing", f"open({str(failing)!r}, 'w'); raise SystemExit(3)"),
    create_job(
      "beside", f"{WAIT}\nwait_for({str(failing)!r}); time.sleep(0.5); open({str(beside)!r}, 'w')"
    ),
    create_job("later", f"open({str(later)!r}, 'w')"),
  ]
  failure = get_failure(jobs, [frozenset()] * 2)
  assert failure.status == 3
  assert "run failing ended with status 3" in str(failure)
  assert "run failing ended with status 3; waiting for beside\n" in capsys.readouterr().out
  assert beside.exists()
  assert not later.exists()


def test_a_log_that_cannot_be_opened_leaves_nothing_running(tmp_path):
  done = tmp_path / "done"
  jobs = [
    create_job("a", f"import time; time.sleep(0.5); open({str(done)!r}, 'w')"),
    create_job("b", "", tmp_path / "missing" / "b.log"),
  ]
  with pytest.raises(FileNotFoundError):
    jobs_lib.run_jobs(jobs, [frozenset()] * 2)
  assert done.exists()


@pytest.mark.parametrize(
  ("signum", "send"),
  [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill), (signal.SIGUSR1, os.killpg)],
)
def test_a_signal_reaches_each_run_once_and_is_waited_for(tmp_path, signum, send):
  """Sent to the parent or, as terminals do, to its group; a second one would prevent the save."""
  paths = [tmp_path / name for name in "abc"]
  command = [sys.executable, "-c", PARENT, "2", *map(str, paths)]
  process = subprocess.Popen(command, start_new_session=True)
  wait_for(tmp_path / "a-ready", tmp_path / "b-ready")
  send(process.pid, signum)
  assert process.wait(30) == 128 + signum
  created = {path.name for path in tmp_path.iterdir()}
  assert created == {"a-ready", "a-saved", "b-ready", "b-saved"}


def signal_the_parent(signum):
  """Runs a job that signals its parent, this process, and succeeds, and then another job."""
  code = f"""
import os, signal, time
for signum in ({signal.SIGTERM:d}, {signal.SIGHUP:d}):
  signal.signal(signum, signal.SIG_IGN)
os.kill(os.getppid(), {signum:d})
time.sleep(0.2)
"""
  jobs_lib.run_jobs([create_job("first", code), create_job("second", "")], jobs_lib.split_cores(1))


def test_a_signal_that_comes_too_late_for_a_run_is_its_status():
  with pytest.raises(jobs_lib.JobFailed, match="run first ended") as caught:
    signal_the_parent(signal.SIGTERM)
  assert caught.value.status == 128 + signal.SIGTERM


def test_the_parent_ignores_sighup_under_nohup():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    signal_the_parent(signal.SIGHUP)
  finally:
    signal.signal(signal.SIGHUP, before)


def test_status_of_a_killed_run_is_that_of_a_shell():
  code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
  assert (
    get_failure([create_job("a", code)], jobs_lib.split_cores(1)).status == 128 + signal.SIGKILL
  )
