"""Tables that PyTorch makes anew for each export, of what is the same throughout a process: most of a small export."""

import copy
import functools

import torch


def keep():
    """Make each of them once, for all exports of this process; an export gets a table of its own as before."""
    _keep_torchlib()
    _keep_composite_operators()


def _keep_torchlib():
    """torch.onnx parses the sources of 500 functions of onnxscript."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(**options):
        registry = copy.copy(read(**options))
        registry.functions = {target: list(known) for target, known in registry.functions.items()}
        return registry

    setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))  # noqa: B010


def _keep_composite_operators():
    """torch.export looks all composite operators up in torch.ops, once more for each of 30 namespaces."""
    from torch._export import utils

    look_up, last = utils._materialize_cpp_cia_ops, [""]

    def look_up_if_new():
        found = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        if found != last:
            look_up()
            last[:] = found

    utils._materialize_cpp_cia_ops = look_up_if_new
