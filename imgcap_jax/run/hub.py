"""Exported runs on the Hugging Face Hub: ``hf://user/name`` or ``hf://user/name@revision``.

A folder of the Hub has a copy on this machine, below the cache folder. Only the files of exported runs are copied
(``exporting.FILES``): nothing in them is executed. The endpoint and the token are those of huggingface_hub
(``HF_ENDPOINT``, ``HF_TOKEN``).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError
from imgcap_jax.files import cache_folder, disk_errors, disk_full, reason
from imgcap_jax.remote import place, pulling_alone

# What an exported run consists of. The patterns are those of fnmatch.
FILES = (
    "experiment.json",
    "vocabulary.json",
    "weights.json",
    "model.safetensors",
    "confidence.json",
    "document_frequencies.npz",
    "neighbours.npz",
    "scores_*.json",
    "code/*",
    "README.md",
)
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")


def run_place(text: str) -> Path:
    """The folder of a run that a user named: a local one, or the copy of one in a bucket or on the Hub.

    Raises:
        UserError: the name is not one of the Hub; see also ``remote.place``.
    """
    found = re.fullmatch(r"hf:/+(.*)", text)  # Path turns hf://x into hf:/x
    if found is None:
        return place(text)
    name, revision = split_name(found[1])
    return _copies() / name / (revision or "main").replace("/", "%2F")


def split_name(text: str) -> tuple[str, str | None]:
    """The name of a folder of the Hub, and the revision or None. Raises UserError if it is not "user/name"."""
    found = _NAME.fullmatch(text.removeprefix("hf://"))
    if found is None or ".." in text:
        raise UserError(f"{text} is not a name on the Hugging Face Hub; give USER/NAME, or USER/NAME@REVISION")
    return found[1], found[2]


def pull_from_hub(folder: Path) -> None:
    """Brings the copy of a folder of the Hub up to date. Does nothing for other folders.

    Without a network, a copy that is complete is used as it is.

    Raises:
        UserError: huggingface_hub is not installed, or the folder can't be read.
    """
    if not folder.absolute().is_relative_to(_copies()):
        return
    user, name, revision = folder.absolute().relative_to(_copies()).parts
    download(f"{user}/{name}", revision.replace("%2F", "/"), folder)


def download(name: str, revision: str | None, folder: Path) -> None:
    """Copies a folder of the Hub.

    Args:
        name: "user/name".
        revision: a branch, a tag or a commit; None: the main branch.
        folder: where to.

    Raises:
        UserError: huggingface_hub is not installed, or the folder can't be read.
    """
    library = _library()
    with _explaining(name, "read"), pulling_alone(folder), disk_errors(f"writing {folder}"):
        library.snapshot_download(name, revision=revision, local_dir=folder, allow_patterns=list(FILES))


def upload(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Creates or replaces a folder of the Hub.

    Args:
        folder: an exported run.
        name: "user/name".
        private: whether a new folder is private.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        UserError: huggingface_hub is not installed, or the folder can't be written.
    """
    interface = _library().HfApi(library_name="imgcap_jax")
    with _explaining(name, "written"):
        interface.create_repo(name, private=private, exist_ok=True)
        # Files of an earlier export that this one does not have are deleted; others of the owner stay.
        commit = interface.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=message,
            allow_patterns=list(FILES),
            delete_patterns=[file for file in FILES if file != "README.md"],
        )
    return str(commit.commit_url)


def _copies() -> Path:
    return cache_folder("hub").absolute()


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("the Hugging Face Hub needs huggingface_hub; run: pip install huggingface_hub") from error
    return huggingface_hub


@contextmanager
def _explaining(name: str, doing: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many types, by the network, the credentials or the library
        if disk_full(error):
            raise
        kind = type(error).__name__
        why = {
            "RepositoryNotFoundError": "it does not exist, or it is private and your token (HF_TOKEN) may not see it",
            "RevisionNotFoundError": "it has no such revision",
            "GatedRepoError": "your token (HF_TOKEN) may not see it",
            "LocalTokenNotFoundError": "there is no token: set HF_TOKEN, or run hf auth login",
        }.get(kind, reason(error.__cause__ or error))
        raise UserError(f"hf://{name} can't be {doing} ({why}); check the name, the network and your token") from error
