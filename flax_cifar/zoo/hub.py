"""Trained networks on the Hugging Face Hub, named `hf:USER/NAME` or `hf:USER/NAME@REVISION`.

huggingface_hub, of the extra `hub`, is imported where it is needed. It keeps what it downloads in
its cache, and knows who may upload.
"""

import pathlib
import re
from typing import Any

from flax_cifar import errors

PREFIX = "hf:"
WEIGHTS = "weights.safetensors"
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def check_repository(repo: str, what: str, name: str) -> None:
  """Raises a UserError that quotes `what`=`name` unless `repo` has the form USER/NAME."""
  expected = "USER/NAME, each of letters, digits, '-', '_' and '.'"
  errors.require(REPOSITORY.fullmatch(repo) is not None, what, name, expected)


def download(name: str) -> pathlib.Path:
  """The weights file of the network `name`, downloaded or from the cache.

  Weights run no code when they are loaded, whoever wrote them.

  Raises:
    UserError: the name has another form, there is none, or it cannot be reached, or
      huggingface_hub is not installed.
  """
  repo, _, revision = name.removeprefix(PREFIX).partition("@")
  check_repository(repo, f"the name after {PREFIX}", repo)
  library = _import_library(name)
  try:
    return pathlib.Path(library.hf_hub_download(repo, WEIGHTS, revision=revision or None))
  except Exception as error:  # of the name, the network or the server
    raise errors.UserError(
      f"{name!r} cannot be downloaded from the Hugging Face Hub ({errors.shorten(error)}); check "
      f"the name, which is {PREFIX}USER/NAME of a repository with {WEIGHTS}, and the network."
    ) from error


def upload(folder: pathlib.Path, repo: str, *, private: bool) -> str:
  """Uploads the files of `folder` to the repository `repo`, USER/NAME, and returns its address.

  The repository is created, `private` or public, if there is none.

  Raises:
    UserError: it is to be `private` and is public already; it is not allowed, cannot be reached, or
      huggingface_hub is not installed.
  """
  library = _import_library(repo)
  try:
    api = library.HfApi()
    address = api.create_repo(repo, private=private, exist_ok=True)
    is_exposed = private and not api.repo_info(repo).private
    if not is_exposed:
      text = "Upload a run of flax_cifar"
      api.upload_folder(repo_id=repo, folder_path=folder, commit_message=text)
  except Exception as error:  # of the name, the network or the server
    raise errors.UserError(
      f"{repo!r} cannot be uploaded to the Hugging Face Hub ({errors.shorten(error)}); check the "
      "name, USER/NAME, and log in with `hf auth login`."
    ) from error
  if is_exposed:
    raise errors.UserError(
      f"{repo!r} is there already, and public; make it private on the Hub, or leave --private out."
    )
  return str(address)


def _import_library(name: str) -> Any:
  try:
    import huggingface_hub
  except ImportError:
    raise errors.UserError(
      f"{name!r} is on the Hugging Face Hub, which needs a package: pip install huggingface_hub"
    ) from None
  return huggingface_hub
