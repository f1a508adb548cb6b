"""The programs as a user calls them, each in its own process."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import flax_cifar
from flax_cifar import errors, zoo
from flax_cifar.tools import command_line
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
QUICK = "--config=configs/quickstart.py"


def call(*arguments, cwd=ROOT, **environment):
  done = subprocess.run(
    [sys.executable, *arguments],
    cwd=cwd,
    env=os.environ | {"XLA_FLAGS": ""} | environment,  # with one device, as users have
    capture_output=True,
    text=True,
    timeout=300,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "--config is missing"),
    (("--config=configs/nope.py",), "--config='nope' is unknown; choose one of five_convs,"),
    ((f"{QUICK}:smoky",), "'smoky' is unknown; choose from ours, smoke"),
    (
      (QUICK, "--config.optimzer.name=sgd"),
      "unknown; did you mean 'optimizer.name'?",
    ),
    (
      (QUICK, "--config.optimizer.learning_rat=1"),
      "did you mean 'optimizer.learning_rate'?",
    ),
    (
      ("--config", "quickstart", "--config.optimizer.lr=1"),
      "did you mean 'optimizer.learning_rate'?",
    ),
    ((QUICK, "--config.optimizer=adamw"), "'optimizer' is a section; set its keys, optimizer.KEY."),
    (
      ("--config=configs/recipes.py",),
      "the file has no function get_config",
    ),
    ((QUICK, "--config.batch_size=many"), "--config.batch_size=many"),
    ((QUICK, "--cofnig=3"), "'cofnig'"),
    ((QUICK, "extra"), "'extra' is not a flag"),
    (("sumary",), "'sumary' is no tool; there are compare, completion,"),
    (("s9:smoke",), "; to train, write --config=s9:smoke."),
  ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message):
  status, _, stderr = call("main.py", *arguments)
  assert status == 2
  assert message in stderr
  assert stderr.startswith("error: ")
  assert stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["rotate", "rotate,horizontal_flip", "('rotate',)", "()"])
def test_words_with_commas_are_a_tuple(text):
  arguments = [f"--config={ROOT}/{QUICK.partition('=')[2]}", f"--config.augment.ops={text}"]
  parser = command_line.create_parser("test", None)
  _, config = command_line.parse_with_config(parser, arguments)
  words = [word for word in ("rotate", "horizontal_flip") if word in text]
  assert config.augment.ops == tuple(words)


def test_the_order_of_flags_is_free_and_the_config_is_loaded_once(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "from flax_cifar.configs import s9\n"
    f"get_config = lambda text='': open({str(tmp_path / 'loads')!r}, 'a').write('x') and "
    "s9.get_config(text)\n"
  )
  arguments = ["--config.seed", "3", "--config=s8", "--config", f"{file}:norm=layer"]
  parser = command_line.create_parser("test", None)
  _, config = command_line.parse_with_config(parser, arguments)
  assert (config.seed, config.model.norm) == (3, "layer")
  assert (tmp_path / "loads").read_text() == "x"


@pytest.mark.parametrize("returned", ["None", "{'seed': 3}"])
def test_a_config_file_that_returns_no_config_is_refused(tmp_path, returned):
  (tmp_path / "mine.py").write_text(f"get_config = lambda: {returned}")
  with pytest.raises(errors.UserError, match=r"get_config returns a .*, and no ConfigDict"):
    command_line.load_config(f"{tmp_path}/mine.py", "config")


def test_an_error_quotes_the_config_as_it_was_typed():
  parser = command_line.create_parser("test", None)
  with pytest.raises(errors.UserError, match=r"^--config='s9:foo': config variant"):
    command_line.parse_with_config(parser, ["--config=s9:foo"])


def find_network(*arguments):
  parser = command_line.create_parser("test", None)
  command_line.add_network(parser)
  return command_line.find_network(parser.parse_args(arguments))


def test_weights_may_be_named_by_their_run_but_not_as_a_model(tmp_path, monkeypatch):
  assert find_network(f"--weights={tmp_path}") == tmp_path / "weights.safetensors"
  with pytest.raises(errors.UserError, match="is a path; write --weights="):
    find_network(f"--model={tmp_path}")
  monkeypatch.chdir(tmp_path)
  (tmp_path / "tiny50k").mkdir()  # of the same name as a network of the package
  assert find_network("--model=tiny50k") == zoo.find_weights("tiny50k")


@pytest.mark.parametrize("text", ["a line", "many lines\n" * 10_000])  # within the buffer, beyond
def test_a_reader_that_has_seen_enough_ends_a_tool_quietly(text):
  reader, writer = os.pipe()
  os.close(reader)
  code = f"with command_line.one_line_errors(): print({text!r})"
  done = subprocess.run(
    [sys.executable, "-c", f"from flax_cifar.tools import command_line\n{code}"],
    stdout=writer,
    stderr=subprocess.PIPE,
  )
  os.close(writer)
  assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full device")
def test_a_full_disk_that_takes_the_output_is_one_line():
  code = "with command_line.one_line_errors(): print('x' * 100_000)"
  with open("/dev/full", "w") as full:
    done = subprocess.run(
      [sys.executable, "-c", f"from flax_cifar.tools import command_line\n{code}"],
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
    )
  message = (
    "error: no space is left for the file that takes the output; make room, and start again.\n"
  )
  assert (done.returncode, done.stderr) == (2, message)


def test_an_unknown_key_in_a_file_is_named_without_all_others(tmp_path):
  path = tmp_path / "own.py"
  text = "from flax_cifar.configs import s9\ndef get_config(arg=''):\n  config = s9.get_config()\n"
  path.write_text(text + "  config.optimizer.learning_rte = 1\n  return config\n")
  with pytest.raises(errors.UserError, match=r'unknown config key .*"learning_rte"') as caught:
    command_line.load_config(str(path), "--config")
  assert 'Did you mean "learning_rate"' in str(caught.value)
  assert "nesterov" not in str(caught.value)


def test_another_broken_pipe_is_not_hidden(capsys):
  with pytest.raises(BrokenPipeError), command_line.one_line_errors():
    raise BrokenPipeError


def test_the_version_is_that_of_the_package():
  assert call("main.py", "--version")[1] == f"flax_cifar {flax_cifar.__version__}\n"


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ("s9", "s9.py"),
    ("s9.py", "s9.py"),
    ("s9:smoke,seed=1", "s9.py:smoke,seed=1"),
    ("configs/skip.py:full", "skip.py:full"),
  ],
)
def test_our_configs_are_found_from_any_directory(tmp_path, monkeypatch, text, found):
  monkeypatch.chdir(tmp_path)
  path = command_line.find_config(text)
  assert path == f"{command_line.CONFIGS}/{found}"
  assert os.path.exists(path.split(":")[0])


def test_a_config_of_the_user_comes_first(tmp_path, monkeypatch):
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "s9.py").touch()
  monkeypatch.chdir(tmp_path)
  assert command_line.find_config("configs/s9.py:a") == "configs/s9.py:a"
  monkeypatch.setenv("HOME", str(tmp_path))
  assert command_line.find_config("~/configs/s9.py") == f"{tmp_path}/configs/s9.py"


@pytest.mark.parametrize(
  "text",
  [
    *("s8", "configs/common.py", "elsewhere/s9.py", "variants", ""),
    *("s9.trial", "configs/s9.trial"),  # a dot in place of the colon
  ],
)
def test_an_unknown_config_lists_ours(tmp_path, monkeypatch, text):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.UserError, match=r"--config='.*' is unknown; choose one of five_convs"):
    command_line.find_config(text)


def test_every_program_works_from_any_directory(tmp_path):
  """Called by its path, or as a module of the installed package."""
  environment = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
  for program in ((str(ROOT / "main.py"),), ("-m", "flax_cifar")):
    status, stdout, stderr = call(
      *program,
      "--config=quickstart",
      "--config.ema.decay=nan",
      "--workdir=~/x",
      cwd=tmp_path,
      **environment,
    )
    assert (status, stdout) == (2, "")
    assert "ema.decay=nan is not valid" in stderr
  assert list(tmp_path.glob("*")) == []
  status, stdout, _ = call(
    "-m", "flax_cifar.tools.summary", "--config=configs/s9.py", cwd=tmp_path, **environment
  )
  assert status == 0
  assert stdout.splitlines()[-1].split() == ["total", "192,672", "154,845,568", "99"]


def test_devices_that_are_not_here_are_one_line():
  for program in (("main.py",), ("-m", "flax_cifar.tools.summary")):
    status, _, stderr = call(*program, QUICK, JAX_PLATFORMS="tpu")
    assert (status, stderr.count("\n")) == (2, 1)
    assert stderr.startswith("error: JAX finds no devices for JAX_PLATFORMS='tpu' (")


def test_an_unknown_choice_is_one_line_and_writes_nothing(tmp_path):
  workdir = tmp_path / "run"
  status, _, stderr = call("main.py", QUICK, "--config.model.norm=bach", f"--workdir={workdir}")
  assert (status, stderr.count("\n")) == (2, 1)
  assert "model.norm='bach' is unknown; choose one of batch, ghost" in stderr
  assert not workdir.exists()


def tiny_run(tmp_path, **changes):
  # Long enough that a slow machine still interrupts it.
  flags = tiny.write_quick_run(tmp_path, total_epochs=5, **changes)
  return ["main.py", QUICK, f"--workdir={tmp_path / 'run'}", *flags]


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path):
  """A real signal to a real process; augmentation in worker processes."""
  signum = signal.SIGUSR1  # tests/test_signals.py has the others
  arguments = tiny_run(tmp_path, **{"augment.workers": 1, "checkpoint.every": 2})
  process = subprocess.Popen(
    [sys.executable, *arguments],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": ""},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  deadline = time.monotonic() + 200
  metrics = tmp_path / "run" / "metrics.jsonl"
  while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
    time.sleep(0.05)
  os.killpg(process.pid, signum)  # as terminals and schedulers do: the workers get it too
  _, stderr = process.communicate(timeout=100)
  assert process.returncode == 128 + signum
  assert "stopped and saved at step" in stderr
  saved = int(stderr.split("at step ")[1].split(";")[0].replace(",", ""))
  assert 20 <= saved < 100
  status, stdout, _ = call(*arguments)
  assert status == 0
  assert f"resumed at step {saved}, epoch" in stdout
  lines = [json.loads(line) for line in metrics.read_text().splitlines()]
  assert [line["step"] for line in lines] == [20, 40, 60, 80, 100]
  assert (tmp_path / "run" / "tensorboard").is_dir()
  assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 5


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("folder", "a file, and no folder"),
    ("new/", "a file, and no folder"),
    ("pipe", "a file, and no folder, device or pipe"),
    ("missing/a.png", "in a folder that exists"),
    ("a.jpg", r"a name that ends with \.png"),
  ],
)
def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path, name, expected):
  (tmp_path / "folder").mkdir()
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(errors.UserError, match=f"--out='.*{name}' .*{expected}"):
    command_line.get_out("--out", f"{tmp_path}/{name}", ".png")
  assert command_line.get_out("--out", f"{tmp_path}/a.PNG", ".png") == tmp_path / "a.PNG"


@pytest.mark.parametrize("flag", ["--weights", "--model"])
def test_an_empty_name_of_a_network_is_refused(flag):
  parser = command_line.create_parser("predict", None)
  command_line.add_network(parser)
  with pytest.raises(errors.UserError, match=f"{flag}='' is not valid"):
    command_line.find_network(parser.parse_args([f"{flag}="]))


def test_a_file_of_a_run_is_not_overwritten(tmp_path):
  path = tmp_path / "weights.safetensors"
  assert command_line.get_out("--out", str(path)) == path
  path.touch()
  with pytest.raises(errors.UserError, match="a run has written this one"):
    command_line.get_out("--out", str(path))


def test_what_may_not_be_read_is_one_line(capsys):
  with pytest.raises(SystemExit) as ended, command_line.one_line_errors():
    raise PermissionError(13, "Permission denied", "/secret")
  assert ended.value.code == 2
  assert capsys.readouterr().err == (
    "error: '/secret' cannot be used (Permission denied); check its permissions.\n"
  )


def test_a_closed_standard_output_is_no_error(monkeypatch):
  monkeypatch.setattr(command_line.sys, "stdout", None)
  with command_line.one_line_errors():
    pass
