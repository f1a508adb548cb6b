"""The command line of every program: the --config flag, and one line for any error."""

import argparse
import contextlib
import difflib
import errno
import os
import pathlib
import re
import runpy
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from flax_cifar import configs, environment, errors, signals, zoo
from flax_cifar.configs import variants

# What a run leaves in its folder, besides pictures and reports.
RUN_FILES = (
  *("config.json", "data.json", "lock", "metrics.jsonl", "result.json", "summary.txt"),
  zoo.WEIGHTS,
)

CONFIGS = pathlib.Path(configs.__file__).parent
STANDARD_OUTPUT = 1  # its file descriptor
CONFIG_HELP = "A file of configs/; variants and key=value may follow it after a colon."
NO_CONFIGS = ("__init__", "common", "recipes", "variants")  # shared by the configs
TOOLS = (
  *("compare", "completion", "evaluate", "export", "extract", "find_lr", "predict", "profile"),
  *("publish", "report", "summary", "sweep"),
)


def leave(message: str, status: int) -> NoReturn:
  """Prints one line on standard error and exits."""
  print(message, file=sys.stderr)
  sys.exit(status)


def explain(error: Exception) -> str:
  """One line for an error of the command line; ml_collections wraps errors and tracebacks."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  shown = error if isinstance(error, OSError) or not error.args else error.args[0]
  text = str(shown).strip()
  text = text.splitlines()[-1] if "Traceback" in text else " ".join(text.split())
  text = re.sub(r' Other fields present: "\{.*\}"', "", text)  # all keys of the config
  return f"unknown config key {text}" if isinstance(error, KeyError) else text or repr(error)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
  """Ends the process with one line and a status where its work raises what a user can cause.

  2: a mistake in what was asked for; 75: another process of the run is lost; 128 + N: stopped by
  signal N, as by that of a pipe whose reader, such as `head`, has seen enough.
  """
  try:
    yield
    if sys.stdout:  # None where standard output is closed
      sys.stdout.flush()  # else Python meets the closed pipe at its end, and says so
  except errors.UserError as error:
    leave(f"error: {explain(error)}", 2)
  except errors.Lost as error:
    leave(f"error: {error}", os.EX_TEMPFAIL)
  except signals.Interrupted as stop:
    leave(str(stop), 128 + stop.signum)
  except PermissionError as error:
    leave(f"error: {error.filename!r} cannot be used ({error.strerror}); check its permissions.", 2)
  except KeyboardInterrupt:
    leave("stopped at once; what was saved stays", 130)
  except BrokenPipeError:
    if _has_reader(STANDARD_OUTPUT):
      raise
    _drop_output()
    sys.exit(128 + signal.SIGPIPE)
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    _drop_output()
    place = repr(error.filename) if error.filename else "the file that takes the output"
    leave(f"error: no space is left for {place}; make room, and start again.", 2)


def _drop_output() -> None:
  """Lets nothing take what is still unwritten: Python's end would meet the same error."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), STANDARD_OUTPUT)


def _has_reader(descriptor: int) -> bool:
  """Whether somebody reads the pipe of a file descriptor."""
  poll = select.poll()
  poll.register(descriptor, 0)
  return not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def find_config(text: str, flag: str = "--config") -> str:
  """The path of a config that the user names, with its variant: FILE, or NAME of our configs.

  >>> find_config("s9:smoke").endswith("configs/s9.py:smoke")
  True

  Raises:
    UserError: there is none; the message lists ours.
  """
  name, colon, variant = text.partition(":")
  path = errors.get_path(flag, name or ".")
  if not path.is_file():
    is_ours = path.parent in (pathlib.Path(), pathlib.Path("configs"))
    ours = {key: CONFIGS / f"{key}.py" for key in list_configs()}
    asked = path.stem if path.suffix == ".py" else path.name
    path = errors.choose(flag, asked if is_ours else name, ours)
  return f"{path}{colon}{variant}"


def list_configs() -> list[str]:
  """The names of our configs.

  >>> list_configs()[:3]
  ['five_convs', 'ghost', 'keras_base']
  """
  return sorted({file.stem for file in CONFIGS.glob("*.py")} - set(NO_CONFIGS))


def is_config(text: str) -> bool:
  """Whether `text` names a config, see `find_config`."""
  try:
    return bool(find_config(text))
  except errors.UserError:
    return False


def load_config(text: str, flag: str) -> ConfigDict:
  """The config that the user names by `flag`, see `find_config`.

  Raises:
    UserError: there is none, its file fails, or it has no such variant.
  """
  path, colon, variant = find_config(text, flag).partition(":")
  try:
    content = runpy.run_path(path)
    if "get_config" not in content:
      raise errors.UserError("the file has no function get_config, which returns the config")
    config = content["get_config"](*([variant] if colon else []))
    if not isinstance(config, ConfigDict):
      raise errors.UserError(f"get_config returns a {type(config).__name__}, and no ConfigDict")
    return config
  except Exception as error:  # a config file may raise anything
    raise errors.UserError(f"{flag}={text!r}: {explain(error)}") from error


class Parser(argparse.ArgumentParser):
  """Raises a UserError where argparse would print its usage and exit."""

  def error(self, message: str) -> NoReturn:
    raise errors.UserError(message)


def create_parser(program: str, description: str | None) -> Parser:
  """A parser of the tool `program`, or of the program itself.

  Its help has the lines of `description` as they are.
  """
  return Parser(
    program if program == environment.PACKAGE else f"{environment.PACKAGE} {program}",
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


def add_network(parser: argparse.ArgumentParser) -> None:
  """Adds the flags --weights and --model, one of which names a trained network."""
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--weights", help="weights.safetensors, or the folder of a run")
  source.add_argument("--model", help=f"{', '.join(zoo.list_models())}, or hf:USER/NAME")


def find_network(options: argparse.Namespace) -> pathlib.Path:
  """The weights file that the flags of `add_network` name; a UserError for an unknown name."""
  if options.weights is not None:
    errors.require(
      bool(options.weights), "--weights", options.weights, "a file or the folder of a run"
    )
    path = errors.get_path("--weights", options.weights)
    return path / zoo.WEIGHTS if path.is_dir() else path
  errors.require(bool(options.model), "--model", options.model, "the name of a network")
  known = options.model in zoo.list_models()
  if not known and errors.get_path("--model", options.model).exists():
    raise errors.UserError(f"--model={options.model!r} is a path; write --weights={options.model}")
  return zoo.find_weights(options.model)


def add_data_dir(parser: argparse.ArgumentParser) -> None:
  """Adds the flag --data_dir, which takes the place of the run's `data.dir`."""
  parser.add_argument(
    "--data_dir", help="where CIFAR-10 and other data of TFDS are; default: the run's"
  )


def get_out(flag: str, text: str, suffix: str = "") -> pathlib.Path:
  """The file that a flag asks to write, checked before any work is done for it.

  Raises:
    UserError: it is a folder, lies in none that can be written to, does not end with `suffix`, or
      is a file that a run has written.
  """
  path = errors.get_path(flag, text)
  is_file = (path.is_file() or not path.exists()) and not text.endswith(os.sep)
  errors.require(is_file, flag, text, "a file, and no folder, device or pipe")
  folder = path.parent
  fits = folder.is_dir() and os.access(folder, os.W_OK)
  errors.require(fits, flag, text, "in a folder that exists and can be written to")
  belongs = path.name in RUN_FILES and path.exists()
  errors.require(not belongs, flag, text, "another file, because a run has written this one")
  named = path.suffix.lower() == suffix or not suffix
  errors.require(named, flag, text, f"a name that ends with {suffix}")
  return path


def parse_with_config(
  parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, ConfigDict]:
  """The options of `parser`, and the config that --config and --config.KEY=VALUE describe.

  Raises:
    UserError: something is missing or unknown, or the file of the config fails.
  """
  parser.epilog = f"--config=NAME|FILE[:VARIANT]  {CONFIG_HELP}\n--config.KEY=VALUE  Sets a key."
  options, rest = parser.parse_known_args(arguments)
  text, rest = _take_config(rest)
  if not text:
    raise errors.UserError("--config is missing; try --config=configs/quickstart.py")
  config = load_config(text, "--config")
  overrides = [_check_override(config, argument) for argument in rest]
  try:
    _override(config, [parser.prog, *overrides])
  except Exception as error:  # an override may be anything
    raise errors.UserError(explain(error)) from error
  return options, config


def _take_config(arguments: Sequence[str]) -> tuple[str, list[str]]:
  """The value of --config, "" if it is missing, and the other arguments; the last one counts."""
  text, rest, left = "", [], iter(arguments)
  for argument in left:
    flag, equals, value = argument.partition("=")
    if flag in ("--config", "-config"):
      text = value if equals else next(left, "")
    else:
      rest.append(argument)
  return text, rest


def _override(config: ConfigDict, argv: list[str]) -> None:
  """Sets the keys that the flags of `argv` name; raises for what is no flag."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
  rest = values(argv)
  if len(rest) > 1:
    raise errors.UserError(
      f"{rest[1]!r} is not a flag; write --config=FILE and --config.KEY=VALUE."
    )


def _check_override(config: ConfigDict, argument: str) -> str:
  key, equals, value = argument.removeprefix("--config.").partition("=")
  if key == argument.partition("=")[0] or "[" in key:  # another flag, or a place in a list
    return argument
  default = get_value(config, key)
  if equals and isinstance(default, tuple) and re.fullmatch(r"[a-z_]+(,[a-z_]+)*,?", value):
    return f"--config.{key}={tuple(filter(None, value.split(',')))!r}"
  return argument


def get_value(config: ConfigDict, key: str) -> Any:
  """The value of `key`, such as "optimizer.name".

  Raises:
    UserError: there is no such key, or it is that of a section.
  """
  value: Any = config
  for name in key.split("."):
    if not isinstance(value, ConfigDict) or name not in value:
      raise errors.UserError(f"config key {key!r} is unknown{_suggest(config, key)}")
    value = value[name]
  if isinstance(value, ConfigDict):
    raise errors.UserError(f"config key {key!r} is a section; set its keys, {key}.KEY.")
  return value


def _suggest(config: ConfigDict, key: str) -> str:
  """The key that was meant: one like it, or one whose last part is like that of `key`."""
  keys = list(_list_keys(config, ""))
  ends = {one.rpartition(".")[2]: one for one in keys} | variants.SHORT_KEYS
  close = difflib.get_close_matches(key, keys, n=1, cutoff=0.8)
  close += [ends[end] for end in difflib.get_close_matches(key.rpartition(".")[2], ends, n=1)]
  return f"; did you mean {close[0]!r}?" if close else "; configs/common.py has all keys."


def _list_keys(config: ConfigDict, prefix: str) -> Iterator[str]:
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _list_keys(value, f"{prefix}{key}.")
    else:
      yield prefix + key
