"""Exported runs on the Hugging Face Hub: ``hf://user/name`` or ``hf://user/name@revision``.

A commit has a copy on this machine, below the cache folder. Only the files of exported runs are copied, and nothing in
them is executed. The endpoint and the token are those of huggingface_hub
(``HF_ENDPOINT``, ``HF_TOKEN``).
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imgcap_jax.errors import UserError
from imgcap_jax.files import cache_folder, disk_full, new_folder, reason, write_text
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
    """The folder of a run that a user named: a local one, the copy of one in a bucket, or that of one on the Hub.

    A commit of the Hub is copied completely or not at all, into a folder that then never changes. Without a network,
    the latest copy of a branch is used.

    Raises:
        UserError: the name is not one of the Hub, or the folder can't be read; see also ``remote.place``.
    """
    found = re.fullmatch(r"hf:/+(.*)", text)  # Path turns hf://x into hf:/x
    if found is None:
        return place(text)
    name, revision = split_name(found[1])
    copies = _copies() / name
    latest = copies / "refs" / (revision or "main").replace("/", "%2F")
    commit = None
    try:
        commit = _commit(name, revision)
    except _UnreachableError as error:
        known = revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else None
        commit = known or (latest.read_text() if latest.is_file() else None)
        if commit is None or not (copies / commit).is_dir():
            raise UserError(str(error)) from error
    folder = copies / commit
    with pulling_alone(copies):
        if not folder.is_dir():
            download(name, commit, folder)
        write_text(latest, commit)
    return folder


def hub_name(folder: Path) -> str | None:
    """The name on the Hub of the run of which a folder is the copy; None if it is another folder."""
    if not folder.absolute().is_relative_to(_copies()):
        return None
    return "/".join(folder.absolute().relative_to(_copies()).parts[:2])


def split_name(text: str) -> tuple[str, str | None]:
    """The name of a folder of the Hub, and the revision or None. Raises UserError if it is not "user/name"."""
    found = _NAME.fullmatch(text.removeprefix("hf://"))
    if found is None or ".." in text or (found[2] or "x").strip(".") == "":
        raise UserError(f"{text} is not a name on the Hugging Face Hub; give USER/NAME, or USER/NAME@REVISION")
    return found[1], found[2]


def download(name: str, revision: str | None, folder: Path) -> None:
    """Copies a folder of the Hub into a new folder, completely or not at all.

    Args:
        name: "user/name".
        revision: a branch, a tag or a commit; None: the main branch.
        folder: must not exist, or must be empty.

    Raises:
        UserError: huggingface_hub is not installed, or the folder can't be read.
    """
    library = _library()
    with _explaining(name, "read"), new_folder(folder) as made:
        library.snapshot_download(name, revision=revision, local_dir=made, allow_patterns=list(FILES))
        shutil.rmtree(made / ".cache", ignore_errors=True)  # what the library knows about the download


def upload(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Creates or replaces a folder of the Hub.

    Args:
        folder: an exported run.
        name: "user/name".
        private: whether it is private.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        UserError: huggingface_hub is not installed, the folder can't be written, it is public but ``private`` is set,
            or it contains something other than a run.
    """
    library = _library()
    if library.get_token() is None:  # without it, a machine without network would report the network first
        raise UserError(f"hf://{name} can't be written without a token; run: hf auth login, or set HF_TOKEN")
    interface = library.HfApi(library_name="imgcap_jax")
    with _explaining(name, "written"):
        interface.create_repo(name, private=private, exist_ok=True)
        if private and not interface.repo_info(name).private:
            raise UserError(f"hf://{name} is public, and --private does not change that; make it private first")
        there = set(interface.list_repo_files(name)) - {".gitattributes", "README.md"}
        if there and "experiment.json" not in there:
            raise UserError(f"hf://{name} contains {min(there)}, but no run of imgcap_jax; choose another name")
        # Files of an earlier export that this one does not have are deleted; others of the owner stay.
        commit = interface.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=message,
            allow_patterns=list(FILES),
            delete_patterns=[file for file in FILES if file != "README.md"],
        )
    return str(commit.commit_url)


class _UnreachableError(UserError):
    """The Hub, or a folder of it, can't be read now."""


def _commit(name: str, revision: str | None) -> str:
    """The commit of a revision. Raises _UnreachableError, or UserError if there is no such folder or revision."""
    interface = _library().HfApi(library_name="imgcap_jax")
    try:
        with _explaining(name, "read"):
            found = interface.repo_info(name, revision=revision).sha
    except UserError as error:
        kind = type(error.__cause__).__name__
        if kind in ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"):
            raise
        raise _UnreachableError(str(error)) from error
    return str(found)


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
