"""Options of the backend: which there are, what is wrong with a value, what reaches Inductor."""

from typing import Any

import pytest
import torch
import zoo

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors


def test_unknown_option_lists_the_valid_ones():
    model = onelora.adapt(zoo.MLP())
    with pytest.raises(Exception, match=r"no option 'iner'; it has config, inner, inner_options"):
        torch.compile(model, backend="onelora", options={"iner": "eager"})(torch.randn(5, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "onelora"}, "would call itself"),
        ({"inner": "no_such_backend"}, "there is no such backend; known are .*inductor"),
        ({"inner": 3}, "name of a backend or a callable"),
        ({"config": {"target_modules": ["a"]}}, "must be a OneLoRAConfig"),
        ({"inner_options": "max_autotune"}, "must be a dict"),
    ],
)
def test_bad_option_values(options, message):
    model = onelora.adapt(zoo.MLP())
    with pytest.raises(Exception, match=message):
        torch.compile(model, backend="onelora", options=options)(torch.randn(5, 8))


def compiled_with(model, inner_options):
    options: dict[str, Any] = {"inner_options": inner_options}
    return torch.compile(model, backend="onelora", options=options)


def test_inductor_options_and_mode_reach_inductor():
    model = fill_vectors(onelora.adapt(zoo.MLP()))
    x = torch.randn(5, 8)
    with pytest.raises(Exception, match="no_such_key"):
        compiled_with(model, {"no_such_key": 1})(x)
    compiled = compiled_with(model, {"epilogue_fusion": False})
    torch.testing.assert_close(compiled(x), model(x))
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend="onelora", mode="reduce-overhead")(x), model(x))
