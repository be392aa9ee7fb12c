"""Make parameters of an exported program inputs of it, after its own.

    forward(x) with the parameters p_a, p_b  ->  forward(x, a, b)

What no node reads becomes an input too, so that one list of names fits every program of a model.  The given program is
left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from onelora_compile.passes.exported.changed_program import copied, rebuilt


def vectors_to_inputs(program: ExportedProgram, inputs: Mapping[str, str]) -> ExportedProgram:
    """A program that is given what it held.

    Args:
        program: not changed.
        inputs: for each new input, in order, the name of the parameter or buffer that it takes the place of.
    """
    gm = copied(program)
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    state = dict(program.state_dict)
    held = {specs[node.name].target: node for node in gm.graph.find_nodes(op="placeholder")}
    last = gm.graph.find_nodes(op="placeholder")[-1]
    for name, target in inputs.items():
        old = held[target]
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(name)
        last.meta = old.meta.copy()
        old.replace_all_uses_with(last)
        specs[last.name] = InputSpec(InputKind.USER_INPUT, TensorArgument(last.name), None)
        del specs[old.name], state[target]
        gm.graph.erase_node(old)
    gm.recompile()
    return rebuilt(program, gm, specs, state)
