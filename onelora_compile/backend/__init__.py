"""The backend "onelora" of torch.compile."""

from onelora_compile.backend.compile_graph import onelora_backend

__all__ = ["onelora_backend"]
