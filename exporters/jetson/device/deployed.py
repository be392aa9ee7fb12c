"""The model of a bundle, ready to run, with the adapter that is in use.

from onelora_device import Deployed
model = Deployed("/opt/bundle")
outputs = model.run({"x": array})          # arrays of NumPy, or Tensor
model.refresh()                            # takes over an adapter that `update` put in use meanwhile
"""

from __future__ import annotations

from typing import Any, Mapping

from .adapters import BASE, vectors_of
from .core.modes import BASE as NO_ADAPTER
from .core.modes import IDS
from .folder import BundleError, Folder
from .options import PROVIDERS, RUNTIMES, Options
from .tensors import Tensor


class Deployed:
    """A bundle's model in a runtime; not for several threads at once.

    Args:
        path: the folder of the bundle.
        options: runtime and more; the default is TensorRT.
        adapter: name of the adapter; None is the one in use (`status` shows it).

    Raises:
        BundleError: no bundle, no engine yet, or one of another device.
    """

    def __init__(self, path: str, options: Options | None = None, adapter: str | None = None) -> None:
        self.folder = Folder(path)
        self.options = options or Options()
        if self.options.runtime not in RUNTIMES:
            raise BundleError(f"runtime {self.options.runtime!r} is not one of {', '.join(RUNTIMES)}")
        if self.options.provider not in PROVIDERS:
            raise BundleError(f"provider {self.options.provider!r} is not one of {', '.join(PROVIDERS)}")
        self.adapter: dict[str, Any] = self.folder.state()["adapter"] if adapter is None else self.folder.find(adapter)
        self.engine = self._open(self.adapter)
        if absent := [name for name in self._fed() if name not in self.engine.inputs]:
            raise BundleError(f"the engine has no input for {', '.join(absent[:5])}: adapters would do nothing")
        self._set(self.adapter)

    @property
    def mode(self) -> str:
        """How an adapter reaches the model."""
        return self.folder.mode

    @property
    def inputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of what `run` takes; -1 is a dynamic size."""
        own = {*self._fed(), IDS}
        return {name: slot for name, slot in self.engine.inputs.items() if name not in own}

    @property
    def outputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of what `run` gives."""
        return dict(self.engine.outputs)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The outputs by name; `Tensor.numpy()` makes arrays of them.

        A bank takes `adapter_ids` [batch] too, the adapter of each row, -1 the base; without, all rows use the one
        in use.

        Raises:
            BundleError: inputs are missing, unknown, or of another shape or dtype.
        """
        return self.engine.run(self.feed(inputs))

    def feed(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Everything that the engine is given for a call, vectors excepted."""
        known = set(self.inputs)
        extra = set(inputs) - known - ({IDS} if self.folder.traits.feeds_ids else set())
        if extra or known - set(inputs):
            raise BundleError(f"the model takes {', '.join(sorted(known))}; given were {', '.join(sorted(inputs))}")
        found = {name: Tensor.of(value) for name, value in inputs.items()}
        if self.folder.traits.feeds_ids:
            found[IDS] = self._ids(found)
        return found

    def use(self, name: str) -> None:
        """Use another adapter from the next run on; for this object alone, `update` and the like change the state."""
        self._switch(self.folder.find(name))

    def refresh(self) -> bool:
        """Take over the adapter in use if it is another one by now; returns whether it was."""
        current = self.folder.state()["adapter"]
        if current == self.adapter:
            return False
        self._switch(current)
        return True

    def try_on(self, adapter: dict[str, Any]) -> None:
        """Use an adapter that is noted nowhere yet."""
        self._switch(adapter)

    def reopen(self) -> None:
        """Open the engine once more, without any adapter: what it was built with is what it computes."""
        del self.engine
        self.engine = self._open(self.adapter)

    def _switch(self, adapter: dict[str, Any]) -> None:
        if self.folder.traits.fixed:
            raise BundleError(why_fixed(self.folder))
        if self.options.engine_each(self.folder.traits):
            self.engine = self._open(adapter)
        self._set(adapter)
        self.adapter = adapter

    def _open(self, adapter: dict[str, Any]) -> Any:
        if self.options.runtime == "onnxruntime":
            from .ort_run import OnnxRuntime

            return OnnxRuntime(self.folder, self.options, adapter)
        from .trt_run import TensorRT

        return TensorRT(self.folder, self.options, adapter)

    def _set(self, adapter: dict[str, Any]) -> None:
        if self.folder.traits.takes_files:
            self.engine.set_vectors(vectors_of(self.folder, adapter))

    def _fed(self) -> tuple[str, ...]:
        return tuple(self.folder.manifest["vectors"]) if self.folder.traits.feeds_vectors else ()

    def _ids(self, inputs: dict[str, Tensor]) -> Tensor:
        names = self.folder.manifest["bank"]
        batch = inputs[self.folder.manifest["model"]["batch_input"]].shape[0]
        if IDS in inputs:
            ids = inputs[IDS].values()
            if any(not -1 <= number < len(names) for number in ids):
                raise BundleError(f"adapter_ids {ids} are not all between -1 (the base) and {len(names) - 1}")
            if inputs[IDS].shape != (batch,):  # a runtime may repeat one row for all ids
                raise BundleError(f"adapter_ids {ids} are not one for each of the {batch} rows of the batch")
        else:
            own = -1 if self.adapter["name"] == BASE else names.index(self.adapter["name"])
            ids = [own] * batch
        # The last row of the tables is the base.
        return Tensor.from_values("int64", (len(ids),), [number if number >= 0 else len(names) for number in ids])


def why_fixed(folder: Folder) -> str:
    """Why a model without swappable vectors can't take an adapter, and what does."""
    what = "has no adapter" if folder.traits is NO_ADAPTER else "holds its adapter in its weights"
    return (
        f"this model {what} (mode {folder.mode!r}): another adapter is another ONNX model and another engine, so "
        "another bundle. For updates of kilobytes export with adapters='input' (no rebuild), or 'load' (rebuilt here, "
        "no cost at run time)"
    )
