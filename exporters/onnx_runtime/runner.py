"""Run a model of any mode in ONNX Runtime, with the adapter that is in use.

ONNX Runtime itself checks neither that an adapter belongs to the model nor, with IOBinding, that it is used at all; and
the modes want their adapters in different places.  This is one interface to all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onelora_compile.errors import ExportError, OneLoRAError, StateError, require
from onelora_compile.exporters.jetson.device.core.modes import IDS
from onelora_compile.exporters.onnx_file.load import load_model, read_tensor
from onelora_compile.exporters.onnx_file.metadata import Metadata, bank_id, checked_ids
from onelora_compile.exporters.onnx_runtime.bank_tables import BankTables
from onelora_compile.exporters.onnx_runtime.declared import fitted, slots_of_session
from onelora_compile.file_names import as_path
from onelora_compile.printable import shortened
from onelora_compile.weights.adapter_file import AdapterFile, read_adapter

if TYPE_CHECKING:
    import onnxruntime

Adapter = str | os.PathLike[str] | AdapterFile | None


_REWRITTEN = (
    "A tool that rewrote the file took the vectors into it, or renamed them, so they can't be given any more (plain "
    "onnx.save does, of a file of mode 'load'; simplifiers do, of inputs with a default): take the file as export_onnx "
    "wrote it, or fold the adapter into that and rewrite the result"
)


class OnnxRunner:
    """A model in ONNX Runtime, and the adapter that its calls use.

    Threads may call one runner at the same time; `use` is for all of them.  For threads with different adapters take
    `with_adapter`, which shares the session wherever the mode allows it.

    Args:
        path: a model written by `export_onnx` or `fold_onnx`.
        adapter: as in `use`.
        providers: execution providers of ONNX Runtime.
        options: makes the `onnxruntime.SessionOptions` of each session that is opened.
        room: of a bank, how many adapters `add_adapter` can add. Room that is not used yet is an address, not memory,
            wherever the system gives memory at the first write, as Linux does.

    Raises:
        ExportError: not an ONNX model, or ONNX Runtime refuses it; or a tool removed inputs that the adapter needs.
        StateError: room in a model that is no bank, or in one that does not say how its tables are filled.
        ConfigError: room for something else than CPUExecutionProvider alone, or a room that is no count.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        adapter: Adapter = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        options: Callable[[], onnxruntime.SessionOptions] | None = None,
        room: int = 0,
    ) -> None:
        self.path = as_path(path, "path")
        self._providers = list(providers)
        self._options = options
        self._vectors: dict[str, np.ndarray] = {}
        self._id = -1
        self._tables = BankTables(self.path, room, self._providers) if room else None
        self.session = self._open({})
        self._slots = slots_of_session(self.session)  # asked once: that takes as long as a small model's run
        self._overridable = {node.name for node in self.session.get_overridable_initializers()}
        self._metadata = Metadata.from_props(self.session.get_modelmeta().custom_metadata_map, str(path))
        if self._metadata.traits.feeds_ids:
            self._require([IDS])
        if adapter is not None:
            self.use(adapter)

    @property
    def metadata(self) -> Metadata:
        """What the model says of its vectors; of a bank, with the adapters that were added."""
        return self._tables.metadata if self._tables else self._metadata

    @property
    def mode(self) -> str:
        """How the model carries its vectors: "base", "fold", "load", "input" or "bank"."""
        return self.metadata.mode

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs."""
        return [node.name for node in self.session.get_outputs()]

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs that a call gives; vectors and ids of a bank are the runner's."""
        traits = self.metadata.traits
        own = set(self.metadata.vectors) if traits.feeds_vectors else {IDS} if traits.feeds_ids else set()
        return [node.name for node in self.session.get_inputs() if node.name not in own]

    def use(self, adapter: Adapter | int) -> None:
        """Let the calls that follow use another adapter.

        Mode "load" opens the session again, "input" and "bank" change what is fed.

        Args:
            adapter: an adapter file, or one that was read; None is what the model was exported with ("load", "input")
                or the base ("bank"). For a bank: the name of an adapter that it holds, or its id.

        Raises:
            BaseMismatchError: the adapter was trained on another base.
            StateError: the model's vectors are in its weights.
            ExportError: the adapter has other vectors than the model.
        """
        if self.metadata.traits.feeds_ids:
            self._id = self.adapter_id(adapter)
            return
        if isinstance(adapter, int | np.integer):
            raise StateError(f"{self.path} is no bank: give an adapter file, not the number {adapter}")
        self._set(self._checked(adapter))

    def add_adapter(self, adapter: str | os.PathLike[str] | AdapterFile, name: str | None = None) -> int:
        """Add an adapter to a bank that was opened with `room`, for this runner and all that share its session.

        Other threads may run the bank meanwhile: the adapter is written into rows that no call reads yet, and no
        session is opened. The file of the bank stays as it is.

        Args:
            adapter: a file, or one that was read. What the bank has and the adapter has not is the base's.
            name: of the adapter; None is the file's.

        Returns:
            Its id.

        Raises:
            StateError: no bank, no room left, or an adapter of that name. Nothing is changed, whatever is raised.
            ConfigError: no name.
            AdapterFileError: a damaged file, or an adapter of what the bank has no tables for.
            BaseMismatchError: the adapter was trained on another base.
            FileNotFoundError: there is no such file.
        """
        if self._tables is None:
            raise StateError(
                f"{self.path} was opened without room for more adapters: OnnxRunner(bank, room=1000)"
                if self.metadata.traits.feeds_ids
                else f"{self.path} is of mode {self.mode!r}: only a bank takes more adapters"
            )
        return self._tables.add(adapter, name)

    def run(
        self, inputs: Mapping[str, Any] | Sequence[Any], adapter_ids: Sequence[int] | np.ndarray | None = None
    ) -> list[np.ndarray]:
        """The outputs of one call.

        Args:
            inputs: arrays by name, or in the order of `input_names`.
            adapter_ids: for a bank, the adapter of each row, -1 the base; None takes that of `use` for all.

        Raises:
            ExportError: ONNX Runtime refuses the inputs.
        """
        try:
            return list(self.session.run(None, self.feed(inputs, adapter_ids)))
        except OneLoRAError:
            raise
        except Exception as error:  # onnxruntime raises classes of its own that share no base but Exception
            raise ExportError(f"ONNX Runtime can't run {self.path}: {error}") from error

    def feed(
        self, inputs: Mapping[str, Any] | Sequence[Any], adapter_ids: Sequence[int] | np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """All inputs of the session for a call: what `run` feeds, also for use with IOBinding."""
        names = self.input_names
        if not isinstance(inputs, Mapping):
            if len(inputs) != len(names):
                raise ExportError(f"the ONNX model takes {len(names)} inputs {names}; {len(inputs)} were given")
            inputs = dict(zip(names, inputs, strict=True))
        if absent := [name for name in names if name not in inputs]:
            raise ExportError(f"the ONNX model takes {names}; {absent} are not among the given {list(inputs)}")
        if unknown := [name for name in inputs if name not in self._slots and name not in self._overridable]:
            raise ExportError(f"the ONNX model takes {names}; {unknown} are none of these")
        feed = fitted(inputs, self._slots, ExportError)
        if self.metadata.traits.feeds_ids:
            rows = next(feed[name].shape[0] for name in names if feed[name].ndim)
            ids = np.full(rows, self._id) if adapter_ids is None else adapter_ids
            feed[IDS] = self._checked_ids(ids, rows)
        elif adapter_ids is not None:
            raise StateError(f"{self.path} is no bank (its mode is {self.mode!r}): adapter_ids means nothing to it")
        return feed | self._vectors if self.metadata.traits.feeds_vectors else feed

    def bind(self, binding: onnxruntime.IOBinding, adapter_ids: Sequence[int] | np.ndarray | None = None) -> None:
        """Bind the adapter in use to an IOBinding of `session`, for which ONNX Runtime ignores its own active adapters.

        Args:
            binding: its data inputs and outputs are the caller's. After another `use` bind again.
            adapter_ids: for a bank, the adapter of each row of the batch that is bound.

        Raises:
            StateError: a bank without ids, or ids without a bank.
            ExportError: ids that the bank does not have.
        """
        runtime = require("onnxruntime", "onnx", "run an ONNX model")
        if self.metadata.traits.feeds_ids != (adapter_ids is not None):
            raise StateError(f"{self.path} is of mode {self.mode!r}: a bank, and only that, is bound with adapter_ids")
        if self.metadata.traits.feeds_ids:
            assert adapter_ids is not None
            binding.bind_cpu_input(IDS, self._checked_ids(adapter_ids))
        elif self.metadata.traits.feeds_vectors:
            # All of them: what an earlier adapter bound would stay.
            for name, value in (self._vectors or self._defaults()).items():
                # Not bind_cpu_input, which does not know inputs that have a default.
                binding.bind_ortvalue_input(name, runtime.OrtValue.ortvalue_from_numpy(value))

    def with_adapter(self, adapter: Adapter | int) -> OnnxRunner:
        """Another runner of the same model with an adapter of its own; for modes "input" and "bank" one session."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.use(adapter)
        return other

    def with_vectors(self, vectors: Mapping[str, np.ndarray]) -> OnnxRunner:
        """As `with_adapter`, of vectors that are no file: float32 by name, unchecked."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._set(dict(vectors))
        return other

    def adapter_id(self, adapter: Adapter | int) -> int:
        """The number of a bank's adapter, from its name, its file (by content), or itself."""
        if adapter is None:
            return -1
        if isinstance(adapter, int | np.integer):
            return int(self._checked_ids([int(adapter)])[0])
        return bank_id(self.metadata, self.path, adapter)

    def _defaults(self) -> dict[str, np.ndarray]:
        """The vectors that a model of mode "input" was exported with."""
        self._require(self.metadata.vectors)
        held = load_model(self.path).graph.initializers
        return {name: read_tensor(held[name].const_value) for name in self.metadata.vectors}

    def _require(self, names: Iterable[str]) -> None:
        """Check that the file has the inputs that an adapter comes in by; without them it still runs as exported."""
        held = {node.name for node in (*self.session.get_inputs(), *self.session.get_overridable_initializers())}
        if gone := [name for name in names if name not in held]:
            raise ExportError(
                f"{self.path} is of mode {self.mode!r}, and has no inputs any more for {shortened(gone)}. {_REWRITTEN}"
            )

    def _set(self, vectors: dict[str, np.ndarray]) -> None:
        if self.metadata.traits.rebuilds:
            self.session = self._open(vectors)
        elif self.metadata.traits.feeds_vectors:
            self._require(vectors)
        self._vectors = vectors

    def _checked_ids(self, adapter_ids: Sequence[int] | np.ndarray, rows: int | None = None) -> np.ndarray:
        return checked_ids(adapter_ids, len(self.metadata.adapters), rows)

    def _checked(self, adapter: Adapter) -> dict[str, np.ndarray]:
        """The vectors that the model takes."""
        if adapter is None:
            return {}
        if not self.metadata.traits.takes_files:
            raise StateError(
                f"the vectors of {self.path} are in its weights (mode {self.mode!r}): export the model with "
                "adapters='load', 'input' or 'bank' to swap them, or fold another file with fold_onnx"
            )
        file = adapter if isinstance(adapter, AdapterFile) else read_adapter(adapter)
        self.metadata.check_fits(file, str(self.path))
        return self.metadata.values_of(file)

    def _open(self, vectors: Mapping[str, np.ndarray]) -> onnxruntime.InferenceSession:
        runtime = require("onnxruntime", "onnx", "run an ONNX model")
        if self._options is not None:
            options = self._options()
        else:
            options = runtime.SessionOptions()
            options.log_severity_level = 3
        if vectors:
            values = [runtime.OrtValue.ortvalue_from_numpy(value) for value in vectors.values()]
            options.add_external_initializers(list(vectors), values)
        if self._tables:
            self._tables.give_to(options)
        try:
            session = runtime.InferenceSession(str(self.path), options, providers=self._providers)
            session.onelora_tables = self._tables  # its memory, which has to live as long as the session
            return session
        except Exception as error:  # see run
            hint = f". {_REWRITTEN}" if vectors and "initializer" in str(error) else ""
            raise ExportError(f"ONNX Runtime can't load {self.path}: {error}{hint}") from error
