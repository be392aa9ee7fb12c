"""Classes that hear of their subclasses: what adapting makes of a module's class is none of the user's."""

from __future__ import annotations

import abc
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import onelora_compile as onelora
from onelora_compile.testing import fill_vectors, merged_copy

HEARD: list[str] = []


class WithKeyword(nn.Module):
    label: str

    def __init_subclass__(cls, *, label, **kwargs):
        super().__init_subclass__(**kwargs)
        HEARD.append(cls.__name__)
        cls.label = label


class Registering(nn.Module):
    def __init_subclass__(cls, **kwargs):
        assert cls.__name__ not in HEARD, f"{cls.__name__} is registered already"
        HEARD.append(cls.__name__)


class LinearWithKeyword(nn.Linear):
    def __init_subclass__(cls, *, label):
        HEARD.append(cls.__name__)


class Meta(type):
    def __new__(mcs, name, bases, namespace, *, label):
        HEARD.append(name)
        return super().__new__(mcs, name, bases, namespace)

    def __init__(cls, name, bases, namespace, *, label):
        super().__init__(name, bases, namespace)


class AbstractMeta(abc.ABCMeta):
    def __new__(mcs, name, bases, namespace, *, label):
        return super().__new__(mcs, name, bases, namespace)

    def __init__(cls, name, bases, namespace, *, label):
        HEARD.append(name)
        super().__init__(name, bases, namespace)


class Forward:
    def __init__(self):
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(8, 8) / 3), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(self.fc(x), self.w)


class Keyword(Forward, WithKeyword, label="keyword"):
    pass


class Registered(Forward, Registering):
    pass


class OfMeta(Forward, nn.Module, metaclass=Meta, label="meta"):
    pass


class OfAbstractMeta(Forward, nn.Module, metaclass=AbstractMeta, label="abstract"):
    pass


class CalledLinear(LinearWithKeyword, label="linear"):
    def __init__(self):
        super().__init__(8, 8)


KINDS = (Keyword, Registered, OfMeta, OfAbstractMeta, CalledLinear)


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_hears_nothing_and_the_model_is_adapted(kind):
    heard, x = list(HEARD), torch.randn(5, 8)
    model = nn.Sequential(kind())
    base = copy.deepcopy(model)
    onelora.adapt(model)
    assert list(onelora.vectors(model)) == (["0"] if kind is CalledLinear else ["0.w", "0.fc"])
    torch.testing.assert_close(model(x), base(x))
    fill_vectors(model, 0.5)
    expected = merged_copy(model)(x)
    assert not torch.equal(expected, base(x))
    torch.testing.assert_close(model(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="onelora", options={"inner": "aot_eager"})
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected)
    assert type(type(model[0])) is type(kind)
    assert isinstance(model[0], kind)
    onelora.detach(model)
    assert type(model[0]) is kind
    assert heard == HEARD


def test_an_abstract_class_still_tells_its_own():
    model = OfAbstractMeta()
    onelora.adapt(model)
    adapted, other = type(model), OfAbstractMeta()
    assert isinstance(other, OfAbstractMeta)
    assert not isinstance(other, adapted)
    assert isinstance(model, adapted)
