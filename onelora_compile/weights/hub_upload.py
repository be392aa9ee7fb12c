"""An adapter to the Hugging Face Hub: `push_to_hub`, in one commit."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from onelora_compile.adapting.adapter import unwrap
from onelora_compile.errors import ConfigError, HubError, OneLoRAWarning, one_of
from onelora_compile.sharded import together
from onelora_compile.weights.adapter_file import ONELORA, read_adapter, save_adapter
from onelora_compile.weights.file_kinds import IN_FOLDERS
from onelora_compile.weights.hub_download import FILES, HUB, LIBRARY, Token, hub_library, is_id, told
from onelora_compile.weights.model_card import model_card
from onelora_compile.weights.peft_folder import PEFT_FORMATS

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, ModelCard

CARD = "README.md"


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    format: str = ONELORA,
    adapter_name: str | None = None,
    card: ModelCard | str | None = None,
    private: bool | None = None,
    token: Token = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo | None:
    """Write an adapter of the model to a repository of the Hugging Face Hub, with a model card, in one commit.

    `load_adapter(model, repo_id)` reads it. The repository is made if there is none. An adapter that is in it is
    replaced, in whichever format. Of a model that is sharded over processes every process must call this; one pushes.

    Args:
        model: the adapted model.
        repo_id: "owner/name".
        format: "onelora" is this package's file, as `onelora.safetensors`; "peft" and "peft-miss" are what
            `save_adapter` writes, for programs that know PEFT.
        adapter_name: which adapter of the model; None is the active one.
        card: the README.md, as `model_card` makes it, or its text. None makes one for a repository that has none, and
            leaves one that is there, with a `OneLoRAWarning`.
        private: whether a new repository is; None is the owner's default.
        token: a token that may write; None is the one that you are logged in with.
        revision: the branch, which is made if there is none; None is the default one.
        commit_message: None names the format.

    Returns:
        huggingface_hub's `CommitInfo`: `commit_url`, and `oid`, which `load_adapter(revision=)` takes; None in the
        other processes of a sharded model.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        HubError: the Hub can't be reached, or refuses; the message is its own. It holds what it held.
        ConfigError: no such id; an unknown format; PEFT has no place for a part of the adapter, which is named.
        StateError: the model is not adapted, or has no such adapter; a `disabled` block is open.
        AdapterFileError: a vector holds NaN or infinity.
    """
    hub = hub_library(f"push to the {HUB}")
    one_of("format", format, [ONELORA, *PEFT_FORMATS])
    if not isinstance(repo_id, str) or not is_id(repo_id):
        raise ConfigError(f"repo_id={repo_id!r} is no id on the {HUB}: give 'owner/name'")
    with tempfile.TemporaryDirectory(prefix="onelora-") as temporary:
        folder = Path(temporary, "adapter")
        written = _saved(model, folder, format, adapter_name)
        with together(list(unwrap(model).parameters()), Path(repo_id)) as mine:
            if not mine:
                return None
            made = str(card or model_card(read_adapter(written), repo_id, format=format))
            message = commit_message or f"1LoRA adapter, format {format}"
            try:
                api = hub.HfApi(token=token, **LIBRARY)
                _prepare(api, repo_id, private, revision)
                there = set(api.list_repo_files(repo_id, revision=revision))
                if card is not None or CARD not in there:
                    (folder / CARD).write_text(made, encoding="utf-8")
                commit: CommitInfo = api.create_commit(
                    repo_id, _operations(hub, folder, there), commit_message=message, revision=revision
                )
            except Exception as error:  # of the package, of httpx or requests: they share no other base
                raise HubError(f"{repo_id} was not pushed to the {HUB}: {told(error)}") from error
    if card is None and CARD in there:
        text = f"{repo_id} has a {CARD}, which stays: card=onelora.model_card(model, {repo_id!r}) writes another"
        warnings.warn(text, OneLoRAWarning, stacklevel=2)
    return commit


def _saved(model: nn.Module, folder: Path, format: str, adapter_name: str | None) -> Path:
    """Save the adapter as what a repository holds: a file in the folder, or the folder of PEFT."""
    path = folder
    if format == ONELORA:
        folder.mkdir()
        path = folder / IN_FOLDERS
    save_adapter(model, path, format, adapter_name=adapter_name)
    return path


def _prepare(api: Any, repo_id: str, private: bool | None, revision: str | None) -> None:
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not revision.startswith("refs/"):  # pull requests are made otherwise
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _operations(hub: Any, folder: Path, there: set[str]) -> list[Any]:
    """All files of the folder, in the place of any adapter that is there."""
    new = {path.name: path for path in sorted(folder.iterdir())}
    added = [hub.CommitOperationAdd(name, path) for name, path in new.items()]
    return added + [hub.CommitOperationDelete(name) for name in FILES if name in there and name not in new]
