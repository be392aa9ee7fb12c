"""The ways to make an update fast, one file each, and the choice between them."""

from onelora_compile.passes.lowerings.chosen import DEFAULT, LOWERINGS, choose
from onelora_compile.passes.lowerings.lowering import LOWERING, Choice, Lowering, Update, update_of

__all__ = ["DEFAULT", "LOWERING", "LOWERINGS", "Choice", "Lowering", "Update", "choose", "update_of"]
