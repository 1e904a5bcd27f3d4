"""Recipes on huggingface.co: ``hf://owner/repo[/path][@revision]``.

huggingface_hub is imported on first use. Without a network, or with ``HF_HUB_OFFLINE=1``, its local cache serves.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from headpatch import yamlio
from headpatch.errors import RecipeError
from headpatch.show import short
from headpatch.tensorfile import MAX_TENSOR_BYTES, check_file_name

if TYPE_CHECKING:
    from headpatch.recipe import Recipe

__all__ = ["PREFIX", "HubAddress", "fetch", "parse_address", "push"]

PREFIX = "hf://"
DEFAULT_FILE = "recipe.yaml"
_ADDRESS = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<path>[^@\\\x00-\x1f]*[^@/\\\x00-\x1f]))?/?(?:@(?P<revision>[\w./-]+))?",
    re.ASCII,
)


class HubAddress(NamedTuple):
    """Where a recipe lies on the hub; a `revision` of None is the main branch."""

    repo: str
    file: str
    revision: str | None


def parse_address(address: str) -> HubAddress:
    """Read ``hf://owner/repo[/path][@revision]``; a path that names no YAML file is a folder with a ``recipe.yaml``.

    Raises
    ------
    RecipeError
        It is written differently.
    """
    match = _ADDRESS.fullmatch(address)
    parts = PurePosixPath(match["path"] or "").parts if match else ()
    if match is None or ".." in parts:
        raise RecipeError(
            "is no address on the hub", source=short(address, 120), remedy="hf://owner/repo[/path][@revision]"
        )
    file = PurePosixPath(*parts)
    if file.suffix not in {".yaml", ".yml", ".json"}:
        file /= DEFAULT_FILE
    return HubAddress(match["repo"], str(file), match["revision"])


def fetch(address: str) -> tuple[Any, Path]:
    """Fetch a recipe file and, where it names one, its safetensors file of the same commit.

    Returns
    -------
    data
        The recipe as plain values, unchecked.
    folder
        Where its files lie in the local cache.

    Raises
    ------
    RecipeError
        No such repository, revision or file; no network and nothing in the cache; a file beyond the limits; huggingface_hub is not
        installed.
    """
    where = parse_address(address)
    path, commit = _download(where, yamlio.MAX_BYTES, address)
    data = yamlio.load(path, source=address)
    block = data.get("tensors") if isinstance(data, dict) else None
    name = block.get("file") if isinstance(block, dict) else None
    if isinstance(name, str):  # whatever else is wrong with the block, Recipe.from_dict says
        try:
            file = str(PurePosixPath(where.file).parent / check_file_name(name))
        except RecipeError as error:
            raise error.at(source=address) from None
        _download(HubAddress(where.repo, file, commit), MAX_TENSOR_BYTES, address)
    return data, path.parent


def _download(where: HubAddress, limit: int, source: str) -> tuple[Path, str | None]:
    """A file of a repository in the local cache, and the commit it belongs to. What is too large is not downloaded."""
    hub = _import_hub("an hf:// recipe", source)
    try:
        seen = hub.hf_hub_download(where.repo, where.file, revision=where.revision, dry_run=True)
        if seen.file_size > limit:
            raise RecipeError(
                f"{where.file} has {seen.file_size} bytes, too many for a recipe",
                source=source,
                remedy=f"at most {limit}",
            )
        return Path(hub.hf_hub_download(where.repo, where.file, revision=seen.commit_hash)), seen.commit_hash
    except RecipeError:
        raise
    except Exception as error:  # the hub's errors, and those of its transport, share no base class
        reason = str(error).strip().splitlines() or [""]
        raise RecipeError(
            f"{where.file} cannot be fetched from {where.repo}: {type(error).__name__}: {short(reason[0], 200)[1:-1]}",
            source=source, remedy="check owner, repository, path, revision and access; offline, only what is in the cache is found",
        ) from error  # fmt: skip


def push(
    recipe: Recipe, repo_id: str, *, path_in_repo: str = DEFAULT_FILE, revision: str | None = None, private: bool | None = None,
    token: str | bool | None = None, create_pr: bool = False, commit_message: str | None = None,
) -> str:  # fmt: skip
    """Upload a recipe and its safetensors file in one commit; the repository is made if it does not exist.

    Parameters
    ----------
    repo_id
        ``owner/repo``.
    path_in_repo
        Where the YAML file goes; the safetensors file goes beside it.
    revision, private, token, create_pr, commit_message
        As in huggingface_hub.

    Returns
    -------
    str
        Its ``hf://`` address.

    Raises
    ------
    RecipeError
        The address is wrong, the safetensors file is no longer what the recipe says, or huggingface_hub is not installed. What that
        raises itself (no access, no network) comes through unchanged.
    """
    address = f"{PREFIX}{repo_id}/{path_in_repo}" + (f"@{revision}" if revision else "")
    if parse_address(address) != (repo_id, path_in_repo, revision):
        raise RecipeError(
            f"{short(path_in_repo)} is no place for a recipe", source=address, remedy="as in folder/recipe.yaml"
        )
    hub = _import_hub("push_to_hub", recipe.source)
    operations = [hub.CommitOperationAdd(path_in_repo, yamlio.dumps(recipe.to_dict()).encode())]
    if recipe.tensors is not None:
        recipe.tensors.verify()
        beside = PurePosixPath(path_in_repo).parent / recipe.tensors.file
        operations.append(hub.CommitOperationAdd(str(beside), str(recipe.tensors.path)))
    api = hub.HfApi(token=token)
    api.create_repo(repo_id, exist_ok=True, private=private)
    message = commit_message or f"headpatch recipe {recipe.name or path_in_repo}"
    api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)
    return address


def _import_hub(what: str, source: str | None) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise RecipeError(
            f"{what} needs the package huggingface_hub", source=source, remedy="pip install 'headpatch[hf]'"
        ) from None
