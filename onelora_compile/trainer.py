"""For `Trainer` of transformers: checkpoints that hold the adapter.  It is imported by those who use that alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from onelora_compile.adapting.adapter import unwrap, vectors
from onelora_compile.adapting.adapter_state import state_of
from onelora_compile.errors import StateError
from onelora_compile.sharded import is_sharded
from onelora_compile.weights.adapter_file import save_adapter
from onelora_compile.weights.atomic_write import remove_file, replacing
from onelora_compile.weights.file_kinds import IN_FOLDERS

_WEIGHTS = "model.safetensors"  # the name in a checkpoint that Trainer resumes from


class SaveAdapterCallback(TrainerCallback):
    """Writes the adapter into every checkpoint of a `Trainer`, as `onelora.safetensors`.

        Trainer(model, arguments, train_dataset=data, callbacks=[SaveAdapterCallback()])

    `onelora.load_adapter(base, "out/checkpoint-500/onelora.safetensors")` reads it. `from_pretrained` of a checkpoint
    does not: it takes the base's weights and drops the vectors.

    Args:
        full_weights: whether the checkpoint keeps the weights of the whole model. If not, its `model.safetensors` holds
            what is trained alone, and its `config.json` goes, so that `AutoModel.from_pretrained` of it is an error and
            no model of random weights (a class's own `from_pretrained` lists the base's as missing).
            `resume_from_checkpoint` and `load_best_model_at_end` work both ways; without the base's weights Trainer
            warns of missing keys, which are those of the base.
    """

    def __init__(self, full_weights: bool = True) -> None:
        self.full_weights = full_weights

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check before the first step that there is an adapter to save.

        Raises:
            StateError: the model is not adapted; or it is sharded, and full_weights is False.
        """
        root = unwrap(kwargs["model"])
        state_of(root, "save the adapters of checkpoints")
        if not self.full_weights and _is_sharded(root):
            raise StateError("full_weights=False: the model is sharded over processes, whose checkpoints are folders")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by Trainer when it has written a checkpoint."""
        model = kwargs["model"]
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        if state.is_world_process_zero or _is_sharded(unwrap(model)):  # of a sharded one all processes have a part
            save_adapter(model, folder / IN_FOLDERS)
        if not self.full_weights and state.is_world_process_zero:
            _leave_the_base_out(model, folder)


def _is_sharded(root: nn.Module) -> bool:
    return any(map(is_sharded, vectors(root).values()))


def _leave_the_base_out(model: nn.Module, folder: Path) -> None:
    """Replace the weights in a checkpoint by those that are trained, and buffers, under the names of the model."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    with replacing(folder / _WEIGHTS) as path:
        save_file({name: tensor.detach().cpu().clone() for name, tensor in own.items()}, path, {"format": "pt"})
    for other in (*folder.glob("model-*.safetensors"), *folder.glob("pytorch_model*.bin*")):
        remove_file(other)
    for name in (f"{_WEIGHTS}.index.json", "config.json"):
        remove_file(folder / name)
