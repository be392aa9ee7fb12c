"""A checkpointed forward runs again in the backward: with the rows that it had, whatever is open by then."""

import contextlib
import threading

import pytest
import torch
import zoo
from row_models import with_adapters
from torch.utils.checkpoint import checkpoint

import onelora_compile as onelora

IDS = [1, 0, 2]
REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


class Model:
    """A model with three adapters, and the gradient of its vectors."""

    def __init__(self, reentrant):
        torch.manual_seed(0)
        self.model, _ = with_adapters(zoo.MLP().double(), 3, scale=0.5)
        self.x, self.reentrant = torch.randn(3, 8).double().requires_grad_(), reentrant
        with self.rows(IDS):
            self.mixed = self.gradient(self.model(self.x))
        self.plain = self.gradient(self.model(self.x))

    def rows(self, ids):
        return onelora.rows(self.model, ids)

    def forward(self):
        return checkpoint(self.model, self.x, use_reentrant=self.reentrant)

    def gradient(self, out):
        self.model.zero_grad()
        out.sin().sum().backward()
        return torch.cat([vector.grad for vector in onelora.vectors(self.model).values() if vector.grad is not None])


@REENTRANT
def test_without_a_block_after_one(reentrant):
    one = Model(reentrant)
    torch.testing.assert_close(one.gradient(one.forward()), one.plain)


@REENTRANT
def test_a_block_that_opened_since(reentrant):
    one = Model(reentrant)
    out = one.forward()
    with one.rows([2, 0, 2]):
        torch.testing.assert_close(one.gradient(out), one.plain)


@REENTRANT
def test_a_block_inside_the_block(reentrant):
    one = Model(reentrant)
    with one.rows(IDS):
        out = one.forward()
        with one.rows([2, 0, 2]):
            one.model(one.x)
        torch.testing.assert_close(one.gradient(out), one.mixed)


@REENTRANT
@pytest.mark.parametrize("other", [False, True])
def test_a_closed_block_is_an_error(reentrant, other):
    one = Model(reentrant)
    with one.rows(IDS):
        out = one.forward()
    block = one.rows(IDS) if other else contextlib.nullcontext()
    with block, pytest.raises(onelora.StateError, match="its block is closed: call backward inside"):
        one.gradient(out)


@REENTRANT
@pytest.mark.parametrize("served", [True, False])
def test_a_block_of_another_thread(reentrant, served):
    """Of one with gradients it can't be told whose forward it was; of one without, it is no question."""
    one = Model(reentrant)
    out, opened, over = one.forward(), threading.Event(), threading.Event()

    def serve():
        with torch.set_grad_enabled(not served), one.rows([2, 0, 2]):
            one.model(one.x)
            opened.set()
            over.wait()

    one.model._onelora_state.pool.block.recorded.clear()  # the main thread was in none
    thread = threading.Thread(target=serve)
    thread.start()
    opened.wait()
    try:
        if served:
            torch.testing.assert_close(one.gradient(out), one.plain)
        else:
            with pytest.raises(onelora.StateError, match="which block it is of can not be told"):
                one.gradient(out)
    finally:
        over.set()
        thread.join()
