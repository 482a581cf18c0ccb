"""Repositories of the Hugging Face hub by name, revision and commit: the one place that downloads from there.

Files go to the hub's own cache, and its variables hold: HF_HOME says where the cache lies, HF_TOKEN who asks,
HF_HUB_OFFLINE=1 that nothing is asked, HF_ENDPOINT which server. A file that is whole is never fetched again; a
transfer that is cut goes on where it was. What may be wrong is said in one line each: no network, no such repository
or revision, no access, a transfer that stays cut, a full disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import glob
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sera_jax import stamps

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(@(?P<revision>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHOWN = 12  # names listed in a message


@dataclasses.dataclass(frozen=True)
class Repository:
    """What a name stands for.

    Attributes:
        id: `org/name`. revision: a branch, a tag or a commit; "" is the main branch. kind: `model` or `dataset`.
    """

    id: str
    revision: str = ""
    kind: str = "model"

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A repository at one commit.

    Attributes:
        repository: as it was asked for. commit: its 40 hexadecimal digits.
        folder: where its files lie, or will.
        sizes: file -> bytes, of all that the commit holds (offline, and listed never before: of what lies there).
    """

    repository: Repository
    commit: str
    folder: pathlib.Path
    sizes: dict[str, int]


def parse(name: str, kind: str = "model", *, bare: bool = False) -> Repository | None:
    """The repository of `org/name` or `org/name@revision`; None where that is no such name, or lies here as a path.

    Args:
        bare: a name without `org/` is one, too.
    """
    match = _ID.fullmatch(name)
    if not match or os.path.exists(name) or ("/" not in match["id"] and not bare):
        return None
    return Repository(match["id"], match["revision"] or "", kind)


def name_of(folder: str) -> str:
    """`org/name@commit` of a folder in a hub's cache, wherever the cache lies; of another, the folder as given."""
    match = re.search(rf"(?:model|dataset)s--([^/]+)/snapshots/({_COMMIT.pattern})/?$", folder)
    return f"{match[1].replace('--', '/', 1)}@{match[2]}" if match else folder


def look(repository: Repository, small: Sequence[str]) -> Snapshot:
    """Which commit a name stands for, and what it holds; of its files only the `small` ones are fetched.

    A commit is asked for once only: what was listed is remembered beside the cache.

    Raises:
        ValueError: one line on what is wrong and the way out.
    """
    from huggingface_hub import errors, get_cached_repo_tree

    folder = _fetched(repository, repository.revision, small)
    where = dict(repo_type=repository.kind, revision=folder.name)
    try:
        sizes = {file.path: file.size for file in get_cached_repo_tree(repository.id, **where)}
    except errors.CachedRepoTreeNotFoundError:  # filled by an older program
        sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    return Snapshot(repository, folder.name, folder, sizes)


def fetch(snapshot: Snapshot, files: Sequence[str], say: Callable[[str], None] = lambda text: None) -> list[str]:
    """Bring files of a snapshot into its folder; those that lie there are left alone. Their paths, in order.

    Raises:
        ValueError: one line on what is wrong and the way out.
    """
    paths = [str(snapshot.folder / name) for name in files]
    missing = [name for name in files if not (snapshot.folder / name).exists()]
    if missing:
        size = sum(snapshot.sizes.get(name, 0) for name in missing)
        say(f"downloading {snapshot.repository.id}: {_bytes(size)} in {len(missing)} files, to {_cache()}")
        _check_room(snapshot.repository, size)
        _fetched(snapshot.repository, snapshot.commit, missing)
    return paths


def check_push(id: str) -> None:
    """Raises ValueError where `push` to that name surely cannot succeed, before anything is written for it."""
    from huggingface_hub import constants, get_token

    match = _ID.fullmatch(id)
    if not match or "/" not in id or match["revision"]:
        raise ValueError(f"--push_to_hub={id!r} is no name of a repository; write org/name")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"--push_to_hub={id}: HF_HUB_OFFLINE is set; unset it, or leave --push_to_hub out")
    if not get_token():
        raise ValueError(f"--push_to_hub={id}: no token is given; set HF_TOKEN to one that may write there")


def push(folder: str | os.PathLike, id: str) -> str:
    """Make the repository, a private one where it is new, and put the folder's files there as one commit; its address.

    Raises:
        ValueError: one line on what is wrong and the way out.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(library_name="sera_jax")
    with _said(Repository(id), writing=True):
        url = api.create_repo(id, private=True, exist_ok=True)
        api.upload_folder(repo_id=id, folder_path=str(folder), commit_message="Export of sera_jax")
    return str(url)


def some(names: Sequence[str], shown: int = _SHOWN) -> str:
    """The first few of a list, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def _fetched(repository: Repository, revision: str, files: Sequence[str]) -> pathlib.Path:
    """The folder of the snapshot, with those of the files that the repository has (of a commit: with all of them)."""
    import huggingface_hub

    with _said(repository):
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repository.id,
                repo_type=repository.kind,
                revision=revision or None,
                allow_patterns=[glob.escape(name) for name in files],
                tqdm_class=_bar(),
                library_name="sera_jax",
            )
        )


@functools.cache
def _bar() -> Any:
    """The hub's progress bar: seen on a terminal only, and a sign of life."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": not sys.stderr.isatty()})

        def update(self, n: float | None = 1) -> bool | None:
            stamps.moved()
            return super().update(n)

    return Bar


@contextlib.contextmanager
def _said(repository: Repository, *, writing: bool = False) -> Iterator[None]:
    """What goes wrong within, as a ValueError of one line."""
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:
        # of a look into the cache that failed, too, the cause is what the server or the network said
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if writing and status in (401, 403, 404):
            text = f"the hub answers {status} to writing {repository.id}; set HF_TOKEN to a token that may write there"
        elif writing and status is None and type(cause).__module__.startswith(("httpx", "httpcore")):
            text = f"{repository.id}: the hub cannot be reached ({type(cause).__name__}); push again later"
        else:
            text = _of_the_server(repository, cause) or _of_the_way(repository, cause)
        if not text:
            raise
        raise ValueError(text) from error


def _of_the_server(repository: Repository, error: BaseException) -> str:
    """What a server's answer means; "" where there was none."""
    from huggingface_hub import constants, errors, get_token

    id, kind = repository.id, {"model": "model", "dataset": "data set"}[repository.kind]
    page = f"{constants.ENDPOINT}/{'datasets/' if repository.kind == 'dataset' else ''}{id}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    token = "HF_TOKEN is of an account that may not read it" if get_token() else "no token is given: set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"{id} is gated; accept its terms at {page} ({token})"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{id} has no revision {repository.revision!r}; {_revisions(repository)}"
    if isinstance(error, errors.RepositoryNotFoundError) and status == 404:
        return f"{id} is neither a path here nor a {kind} of the hub ({constants.ENDPOINT}); check the name"
    if status in (401, 403):
        return (
            f"the hub answers {status} to {id}: no {kind} of that name is public, or it is private; check the name "
            f"({token})"
        )
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return f"{id} has not all files at {repository.revision or 'main'} that it lists; name another revision"
    if status is not None:
        return f"the hub answers {status} to {id}; start again later: files that are whole are kept"
    return ""


def _of_the_way(repository: Repository, error: BaseException) -> str:
    """What kept an answer from coming, or a file from being kept; "" for what is not known."""
    from huggingface_hub import constants, errors

    id, kind = repository.id, type(error).__name__
    words = (str(error).strip() or kind).splitlines()[0][:200]
    if isinstance(error, errors.HFValidationError):
        return f"{id!r} is no name of a repository ({words})"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return _full(repository)
    option = (" --repo-type dataset" if repository.kind == "dataset" else "") + (
        f" --revision {repository.revision}" if repository.revision else ""
    )
    bring = (
        f"bring it: `hf download {id}{option} --local-dir DIR` where there is a network, copy DIR here, and name "
        f"{'its files' if repository.kind == 'dataset' else 'that folder'} instead"
    )
    if isinstance(error, errors.OfflineModeIsEnabled) or (
        isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
    ):
        return f"{id} is no path here, not (all) in {_cache()}, and HF_HUB_OFFLINE is set; {bring}"
    if kind in ("ConnectError", "ConnectTimeout", "ProxyError", "PoolTimeout"):
        return f"{id} is no path here, and the hub ({constants.ENDPOINT}) cannot be reached ({words}); {bring}"
    transport = type(error).__module__.startswith(("httpx", "httpcore"))
    if transport or isinstance(error, errors.XetDownloadError) or "Consistency check" in words:
        return f"the transfer of {id} was cut ({kind}: {words}); start again: files that are whole are kept"
    return f"{id}: {words}" if isinstance(error, errors.LocalEntryNotFoundError | errors.FileMetadataError) else ""


def _revisions(repository: Repository) -> str:
    """The branches and tags there are, for a message."""
    import huggingface_hub

    try:
        refs = huggingface_hub.HfApi().list_repo_refs(repository.id, repo_type=repository.kind)
    except Exception:  # it would be help only
        return "name a branch, a tag or a commit"
    return f"its branches and tags: {some([ref.name for ref in [*refs.branches, *refs.tags]])}"


def _check_room(repository: Repository, size: int) -> None:
    folder = pathlib.Path(_cache())
    folder = next(path for path in (folder, *folder.parents) if path.exists())
    if size > shutil.disk_usage(folder).free:
        raise ValueError(_full(repository, f" {_bytes(size)} are wanted"))


def _full(repository: Repository, wanted: str = "") -> str:
    return f"{repository.id}: the disk of {_cache()} is full;{wanted or ' make room'}, or set HF_HOME to a larger one"


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
