"""explain: every linear op, adapted or not, with the reason."""

import pytest
import torch
import zoo
from torch import nn

import onelora_compile as onelora


def test_every_site_of_an_adapted_model():
    model, inputs = zoo.bert()
    onelora.adapt(model)
    report = onelora.explain(model, **inputs)
    assert report.graphs == 1
    assert report.breaks == []
    adapted = {site.module for site in report.sites if site.adapted}
    assert adapted == set(onelora.vectors(model))
    (head,) = [site for site in report.sites if not site.adapted]
    assert (head.module, head.reason, head.in_features, head.out_features) == ("classifier", "output head", 48, 2)
    assert {site.lowering for site in report.sites if site.adapted} == {"producer_consumer"}
    assert "modeling_bert.py" in head.source
    text = str(report)
    assert "13 of 14 linear ops adapted, 1 graphs" in text


def test_a_model_that_is_not_adapted_is_not_touched():
    model = zoo.MLP()
    report = onelora.explain(model, torch.randn(2, 8))
    assert [site.reason for site in report.sites] == ["the model is not adapted; the default config would adapt it"] * 3
    assert onelora.vectors(model) == {}
    assert model.a.weight.requires_grad


def test_weights_read_directly_and_graph_breaks_are_reported():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return nn.functional.linear(x, self.w)

    model = onelora.adapt(Net(), onelora.OneLoRAConfig(exclude_modules=["w"]))
    report = onelora.explain(model, torch.randn(2, 4))
    assert report.graphs == 2
    assert len(report.breaks) == 1
    assert [(site.graph, site.adapted) for site in report.sites] == [(0, True), (1, False)]
    assert report.sites[1].reason == "excluded by exclude_modules"


def test_how_each_op_is_adapted_and_what_is_no_linear():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.embed = nn.Conv2d(3, 8, 4, stride=4), nn.Embedding(16, 8)
            self.attention, self.w = nn.MultiheadAttention(8, 2, batch_first=True), nn.Parameter(torch.randn(8, 5))
            self.fc = nn.Linear(5, 5)

        def forward(self, x):
            x = self.patch(x).flatten(2).mT + self.embed.weight
            return self.fc(self.attention(x, x, x)[0] @ self.w) @ torch.eye(5)

    report = onelora.explain(onelora.adapt(Net()), torch.randn(2, 3, 16, 16))
    found = [(site.name, site.how, site.lowering) for site in report.sites]
    assert found == [
        ("attention.in_proj_weight", "weight", "producer_consumer"),
        ("attention.out_proj", "weight", "producer_consumer"),
        ("w", "weight", "producer_consumer"),
        ("fc", "module", "producer_consumer"),
    ]
    assert all("test_report.py" in site.source for site in report.sites if site.how == "module" or site.name == "w")
    text = str(report)
    assert "4 of 4 linear ops adapted" in text
    assert "1 x an embedding, not a linear op (embed)" in text
    assert "1 x a convolution" in text


def test_a_picture_of_the_first_block(tmp_path):
    model, inputs = zoo.tiny_vit()
    report = onelora.explain(onelora.adapt(model), **inputs)
    path = report.draw(tmp_path / "graph.svg")
    text = path.read_text()
    assert text.startswith("<?xml")
    for word in (
        "blocks.0: before",
        "blocks.0: after",
        "rank1_update (fc1)",
        "add_rank1_by_matmul (fc1)",
        "linear (qkv)",
    ):
        assert word in text, word
    assert "(head)" not in text
    assert "(head)" in report.draw(tmp_path / "all.svg", module="").read_text()
    with pytest.raises(ValueError, match=r"'blocks.7'; its modules are .*blocks.0.fc1"):
        report.draw(tmp_path / "no.svg", module="blocks.7")
    with pytest.raises(ValueError, match="no graph 3; the call became 1 graphs"):
        report.draw(tmp_path / "no.svg", graph=3)
    assert not (tmp_path / "no.svg").exists()
