"""explain: every linear op, adapted or not, with the reason."""

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

    report = onelora.explain(onelora.adapt(Net()), torch.randn(2, 4))
    assert report.graphs == 2
    assert len(report.breaks) == 1
    assert [(site.graph, site.adapted) for site in report.sites] == [(0, True), (1, False)]
    assert report.sites[1].reason == "not a call of a linear module"
