"""Uses of a weight that are no linear op, or in code that adapt can't follow: named by adapt, or by the graph."""

import copy
import warnings

import pytest
import torch
from form_parts import weight
from forms import FORMS, LONG, build
from named_uses import NAMED
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy
from onelora_compile.weight_uses.weight_reads import NOT_TOLD


def compiled(model, inner="eager"):
    return torch.compile(model, backend="onelora", options={"inner": inner}, fullgraph=True)


@pytest.mark.parametrize("name", NAMED)
def test_every_other_use_in_a_contraction_is_named(name):
    form, x, expected = build(name, NAMED)
    model = nn.ModuleDict({"form": form, "fc": nn.Linear(3, 3)})
    base = form(x)
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == ["fc"]
    report = onelora.summary(model)
    named = report.skipped | report.not_linear
    assert {key.removeprefix("form.") for key in named} == set(expected)
    assert all(expected[key.removeprefix("form.")] in why for key, why in named.items())
    assert torch.equal(form(x), base)


@pytest.mark.parametrize("name", [*NAMED, *LONG])
def test_what_adapt_could_not_follow_is_named_by_the_graph(name):
    form, x, expected = build(name, FORMS | NAMED)
    kind = type(form)

    def forward(self, x):
        {x.shape: 0}[torch.Size([*x.shape])]  # a KeyError while adapt follows the code without values
        return kind.forward(self, x)

    form.__class__ = type("Hidden", (kind,), {"forward": forward})
    model = nn.Sequential(nn.Linear(x.shape[-1], x.shape[-1]), form)
    onelora.adapt(model)
    skipped, names = onelora.summary(model).skipped, {f"1.{key}".removesuffix(".") for key in expected}
    inside = {f"1.{key}" for key, child in form.named_children() if isinstance(child, nn.Linear)}
    assert {*onelora.vectors(model)} == {"0", *inside}  # the weight of a linear inside is adapted, whoever reads it
    names -= inside
    added = getattr(form, "c", None)
    others = {"1.c"} - names if isinstance(added, nn.Parameter) and added.ndim > 1 else set()  # looks like a weight
    assert {
        *skipped,
        *onelora.summary(model).not_linear,
    } == names | others  # by adapt, which does not know what they are
    known = {*(key for key, why in skipped.items() if NOT_TOLD not in why), *onelora.summary(model).not_linear}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(compiled(model)(x), form(model[0](x)))
    report = onelora.summary(model)
    assert names | others == {*report.skipped, *report.not_linear}
    new = [str(one.message) for one in caught if issubclass(one.category, onelora.OneLoRAWarning)]
    assert len(new) == (names != known)
    assert all(f"{key!r} at " in message and "target_parameters" in message for message in new for key in names - known)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_graph_names_no_parameter_that_is_an_input_or_of_a_module_that_is_known_as_a_whole():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.pool = weight(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.q, self.k, self.cell = nn.Linear(8, 8), nn.Linear(8, 8), nn.GRUCell(8, 8)
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(5, 5, 3, padding=1))
            self.old, self.spectral = nn.utils.weight_norm(nn.Conv1d(5, 5, 1)), nn.Linear(8, 8)
            nn.utils.parametrizations.spectral_norm(self.spectral)

        def forward(self, x):
            q = self.q(self.queries).expand(len(x), -1, -1)
            x = self.old(self.conv(F.scaled_dot_product_attention(q, self.k(self.queries * 2), x)))
            pooled = self.pool(self.queries.repeat(len(x), 1, 1), x, x, need_weights=False)[0]
            return self.cell(self.spectral(pooled[:, 0]))

    model = Whole().eval()
    onelora.adapt(model)
    known = onelora.summary(model).skipped
    assert "old" in onelora.summary(model).not_linear  # its weight is computed: no linear map of patches
    compiled(model)(torch.randn(2, 5, 8))  # a warning would be an error
    assert onelora.summary(model).skipped == known


def test_a_weight_used_both_ways_is_reported():
    model, _, _ = build("slices")
    with pytest.raises(onelora.TargetError, match="as W and as its transpose"):
        onelora.adapt(model)
    model = nn.Sequential(model, nn.Linear(1, 3))
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == ["1"]
    assert "as W and as its transpose" in str(onelora.summary(model))


class Opaque(nn.Module):
    """A forward that no symbolic trace follows."""

    def __init__(self):
        super().__init__()
        self.fc, self.w = nn.Linear(8, 8), weight(8, 6)

    def forward(self, x):
        x = self.fc(x)
        scale = {x.shape: 2.0}[torch.Size([*x.shape])]  # a KeyError without values
        return (x @ self.w) * scale


def test_what_adapt_could_not_find_is_named_and_can_be_asked_for(tmp_path):
    model, x = Opaque(), torch.randn(5, 8)
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == ["fc"]
    fast = compiled(model, "aot_eager")
    with pytest.warns(onelora.OneLoRAWarning, match=r"not adapted: .*'w' at .*x @ self\.w.*target_parameters"):
        fast(x)
    assert "w" in onelora.summary(model).skipped
    onelora.detach(model)
    onelora.adapt(model, onelora.OneLoRAConfig(target_parameters={"w": 0}))
    assert {name: len(v) for name, v in onelora.vectors(model).items()} == {"fc": 8, "w": 6}
    fill_vectors(model, 0.5)
    torch.testing.assert_close(fast(x), merged_copy(model)(x))
    onelora.save_adapter(model, tmp_path / "a.safetensors")
    twin = copy.deepcopy(onelora.detach(copy.deepcopy(model)))
    assert torch.equal(onelora.load_adapter(twin, tmp_path / "a.safetensors")(x), model(x))
    for bad, message in (
        ({"v": 0}, "matches no parameter"),
        ({"w": 2}, "no input axis 2"),
        ({"fc.bias": 0}, "weight of"),
    ):
        with pytest.raises(onelora.TargetError, match=message):
            onelora.adapt(Opaque(), onelora.OneLoRAConfig(target_parameters=bad))
    with pytest.raises(onelora.ConfigError, match="dict of names and input axes"):
        onelora.OneLoRAConfig(target_parameters=["w"])  # type: ignore[arg-type]
