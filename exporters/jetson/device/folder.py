"""The folder of a bundle: what it must hold, what this device adds to it, and writing so that a power cut is harmless.

manifest.json           what the bundle holds, with the SHA-256 of each file; never changed here
local/state.json        the adapter in use, those before it, the newest signed update; replaced in one step
local/adapters/         adapters that came after the bundle, named by their SHA-256
local/engines/          what was built here
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from typing import Any, Iterator

from .core.messages import EngineError
from .core.modes import MODES, Mode
from .core.names import why_no_name

try:
    import fcntl
except ImportError:  # not on Windows; Jetson is Linux
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1
_KEPT = 8  # adapters to go back to, and as many that only have a name
_CHUNK = 1 << 20


BundleError = EngineError  # the name by which a bundle's users catch it


def name_of(path: str) -> str:
    """The name of an adapter: its file's.

    Raises:
        BundleError: it is no name.
    """
    name = os.path.basename(path)
    name = name[: -len(".safetensors")] if name.endswith(".safetensors") else name
    if why := why_no_name(name):
        raise BundleError(f"{path!r}: an adapter's name is its file's, and {name!r} is none, as {why}: rename the file")
    return name


class Folder:
    """A bundle on disk.

    Args:
        path: the folder with manifest.json.

    Raises:
        BundleError: no bundle, a damaged one, or one of a newer format.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.manifest: dict[str, Any] = self._read_json("manifest.json")
        if self.manifest.get("format") != "onelora-bundle":
            raise BundleError(f"{self.path} is no bundle: its manifest.json is of another program")
        version = self.manifest.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise BundleError(f"{self.path} has format version {version}; this script reads up to {FORMAT_VERSION}")

    def file(self, *parts: str) -> str:
        """The path of a file of the bundle."""
        return os.path.join(self.path, *parts)

    @property
    def mode(self) -> str:
        """How an adapter reaches the model: fold, load, input, bank, refit, or base."""
        return str(self.manifest["model"]["mode"])

    @property
    def traits(self) -> Mode:
        """What follows from the mode."""
        return MODES[self.mode]

    def damaged(self) -> list[str]:
        """Files of the bundle that are missing or not as they were packed, with what is wrong."""
        found = []
        for name, entry in self.manifest["files"].items():
            path = self.file(*name.split("/"))
            if not os.path.isfile(path):
                found.append(f"{name}: missing")
            elif os.path.getsize(path) != entry["bytes"]:
                found.append(f"{name}: {os.path.getsize(path)} bytes instead of {entry['bytes']}")
            elif sha256_of(path) != entry["sha256"]:
                found.append(f"{name}: other content")
        return found

    def check(self) -> None:
        """Refuse a bundle that was damaged on its way."""
        if wrong := self.damaged():
            raise BundleError("the bundle is damaged, copy it again:\n" + "\n".join(f"  {line}" for line in wrong[:20]))

    # ---- adapters -----------------------------------------------------------------------------------------------

    def packed(self) -> dict[str, dict[str, Any]]:
        """The adapters that came with the bundle, by name."""
        return {str(entry["name"]): entry for entry in self.manifest["adapters"]}

    @property
    def has_state(self) -> bool:
        """Whether the state of this device is there: an adapter was chosen, and what says so is not lost."""
        return os.path.isfile(self.file("local", "state.json"))

    def state(self) -> dict[str, Any]:
        """`{"adapter": {name, file, sha256}, "previous": [...], "taken": {sequence, sha256} or None}`.

        The default adapter if nothing was chosen yet, and the newest of the updates that are kept.
        """
        if not self.has_state:
            return {"adapter": self.find(self.manifest["default"]), "previous": [], "taken": self._newest_kept()}
        repair = "; remove it to start with the bundle's own adapter"
        state = {"taken": None, **self._read_json("local/state.json", repair)}
        known = isinstance(state.get("adapter"), dict) and isinstance(state.get("previous"), list)
        if not known or not (state["taken"] is None or _is_numbered(state["taken"])):
            raise BundleError(f"{self.file('local', 'state.json')} is damaged{repair}")
        return state

    def _newest_kept(self) -> dict[str, Any] | None:
        kept = [one for one in self.installed().values() if _is_numbered(one)]
        newest = max(kept, key=lambda one: int(one["sequence"]), default=None)
        return newest and {key: newest[key] for key in ("sequence", "sha256")}

    def find(self, name: str) -> dict[str, Any]:
        """An adapter by its name: one of the bundle, or one that was installed."""
        known = {**self.installed(), **self.packed()}
        if name not in known:
            raise BundleError(f"there is no adapter {name!r} here; there are: {', '.join(sorted(known)) or 'none'}")
        return _adapter(known[name])

    def installed(self) -> dict[str, dict[str, Any]]:
        """Adapters that were installed after the bundle, by name."""
        path = self.file("local", "adapters", "index.json")
        if not os.path.isfile(path):
            return {}
        repair = "; remove it: the adapter in use and those to go back to stay"
        return dict(self._read_json("local/adapters/index.json", repair))

    def install(self, source: str, content: bytes, sequence: int | None = None) -> dict[str, Any]:
        """Keep the content of an adapter file on this device; what is in use does not change."""
        digest, state = hashlib.sha256(content).hexdigest(), self.state()
        name = self._free_name(name_of(source), digest, state)
        if sequence is not None and not self.has_state and state["taken"] is None:
            # From now on a state that is not there was lost.
            self._write_state(state["adapter"], [], None)
        entry = {"name": name, "file": f"local/adapters/{digest[:16]}.safetensors", "sha256": digest}
        write_atomically(self.file(*entry["file"].split("/")), content)
        others = {key: one for key, one in self.installed().items() if key != name}
        numbered = entry if sequence is None else {**entry, "sequence": sequence}
        self._write_index({**others, name: numbered})  # the newest last
        return entry

    def _free_name(self, name: str, digest: str, state: dict[str, Any]) -> str:
        """The name, with a part of the hash where another adapter here has it: both can be used and gone back to."""
        known = [state["adapter"], *state["previous"], *self.installed().values()]
        others = {one["name"] for one in known if one["sha256"] != digest}
        return f"{name}-{digest[:8]}" if name in others | set(self.packed()) else name

    def activate(self, adapter: dict[str, Any], sequence: int | None = None) -> None:
        """Make an adapter the one in use; the one before becomes the first to go back to.

        `sequence` is the number of the update that brought it, and is noted in the same step.
        """
        state = self.state()
        same = self.has_state and state["adapter"] == adapter
        previous = state["previous"] if same else [state["adapter"], *state["previous"]][:_KEPT]
        taken = state["taken"] if sequence is None else {"sequence": sequence, "sha256": adapter["sha256"]}
        if not same or taken != state["taken"]:
            self._write_state(adapter, previous, taken)

    def rollback(self) -> dict[str, Any]:
        """The adapter that `activate` would go back to, which `undo` makes the one in use."""
        previous = self.state()["previous"]
        if not previous:
            raise BundleError("there is no adapter to go back to: nothing was changed since the bundle was copied")
        return dict(previous[0])

    def undo(self) -> None:
        """Go back to the adapter before, and forget the one in use, but not the number of the newest update."""
        state = self.state()
        self._write_state(self.rollback(), state["previous"][1:], state["taken"])

    def prune(self) -> None:
        """Forget what came after the bundle but the newest and those to go back to, and remove files without a name."""
        state, index = self.state(), self.installed()
        known = [state["adapter"], *state["previous"]]
        kept = {name: one for name, one in index.items() if _adapter(one) in known or name in list(index)[-_KEPT:]}
        if kept != index:
            self._write_index(kept)
        known += kept.values()
        sweep(self.file("local", "adapters"), ("index.json", *(os.path.basename(one["file"]) for one in known)))

    def _write_index(self, index: dict[str, Any]) -> None:
        write_atomically(self.file("local", "adapters", "index.json"), json.dumps(index, indent=1).encode())

    def _write_state(
        self, adapter: dict[str, Any], previous: list[dict[str, Any]], taken: dict[str, Any] | None
    ) -> None:
        state = {"adapter": adapter, "previous": previous, "taken": taken}
        write_atomically(self.file("local", "state.json"), json.dumps(state, indent=1).encode())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Only one program changes what is in `local` at a time; the lock ends with the process that holds it."""
        make_folder(self.file("local"))
        with open(self.file("local", "lock"), "w") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise BundleError("another program is changing this bundle; try again when it is done") from None
            yield

    def _read_json(self, name: str, repair: str = "") -> dict[str, Any]:
        path = self.file(*name.split("/"))
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
        except FileNotFoundError:
            raise BundleError(f"there is no {path}") from None
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path} is damaged: {error}{repair}") from None
        if not isinstance(found, dict):
            raise BundleError(f"{path} is damaged: no table{repair}")
        return found


def _adapter(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("name", "file", "sha256")}


def _is_numbered(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sequence"), int) and isinstance(entry.get("sha256"), str)


def write_atomically(path: str, content: Any) -> None:
    """Write a file so that a cut of power or a kill leaves the old one or the new one."""
    folder = os.path.dirname(path)
    make_folder(folder)
    beside = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        with open(beside, "wb") as file:
            file.write(content)  # also from what has the buffer protocol: an engine is not copied
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):  # it has its name by now, or another error is on its way
            os.unlink(beside)
    _keep_names(folder)


def make_folder(path: str) -> None:
    """Make a folder, and those above it; a file in it that survives a cut of power is in a folder that does."""
    made = []
    above = path
    while above and not os.path.isdir(above):
        made.append(above)
        above = os.path.dirname(above)
    os.makedirs(path, exist_ok=True)
    for one in made:
        _keep_names(os.path.dirname(one))


def _keep_names(folder: str) -> None:
    """Wait until the names in a folder are on the disk; what gave them is done by now, so this never fails."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_of(path: str) -> str:
    """SHA-256 of a file, in pieces."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(_CHUNK), b""):
            sha.update(chunk)
    return sha.hexdigest()


def sweep(folder: str, keep: tuple[str, ...] | None = None) -> None:
    """Remove what killed programs left in a folder, and, with `keep`, all but the files that begin with one of it."""
    if not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        stale = name.endswith(".tmp") or (keep is not None and not name.startswith(keep))
        if stale and os.path.isfile(os.path.join(folder, name)):
            os.unlink(os.path.join(folder, name))
