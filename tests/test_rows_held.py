"""How a block of rows is held: in one thread, and without an await."""

import asyncio
import contextlib
import threading

import pytest
import torch
import zoo
from row_models import Alone, with_adapters

import onelora_compile as onelora


def test_tasks_of_one_thread_do_not_mix_their_rows():
    """A block over an await: other tasks would have its rows, and a model in an executor none."""
    model, merged = with_adapters(zoo.MLP().double(), 3, scale=0.5)
    x = torch.randn(2, 8).double()

    async def serve(number, wait):
        with onelora.rows(model, [number] * 2):
            await wait()
        return number

    async def short():
        await asyncio.sleep(0.01)

    async def executor():
        await asyncio.get_running_loop().run_in_executor(None, model, x)

    async def whole(number):
        await asyncio.sleep(0)
        with onelora.rows(model, [number] * 2):
            return model(x)

    async def all_of(*tasks):
        return await asyncio.gather(*tasks, return_exceptions=True)

    for tasks in ((serve(1, executor),), (serve(1, short), serve(2, short)), (serve(2, executor), serve(1, short))):
        for result in asyncio.run(all_of(*tasks)):
            assert isinstance(result, onelora.StateError)
            assert "held over an await" in str(result)
        torch.testing.assert_close(model(x), merged[0](x))  # nothing is left open
    for number, result in enumerate(asyncio.run(all_of(*(whole(number) for number in range(3))))):
        torch.testing.assert_close(result, merged[number](x))


def test_a_block_ends_in_its_thread():
    model, _ = with_adapters(zoo.MLP(), 2)
    block, failed = onelora.rows(model, [1]), []

    def end():
        try:
            block.__exit__(None, None, None)
        except onelora.StateError as error:
            failed.append(str(error))

    thread = threading.Thread(target=block.__enter__)
    thread.start()
    thread.join()
    end()
    assert "ends in another thread" in failed[0]


def test_a_block_opens_while_another_thread_compiles(monkeypatch):
    model, _ = with_adapters(zoo.MLP(), 2)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # of the process, not of a thread
    with onelora.rows(model, [1, 0]):
        pass


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("held_before", [False, True])
def test_a_graph_that_is_captured_meanwhile_is_not_taken_for_a_block(held_before, elsewhere):
    """Dynamo makes guards of what is there after the capture, not of what the capture saw."""
    base, x = zoo.MLP(), torch.randn(3, 8)
    model, merged = with_adapters(base, 3, scale=0.5)
    other, _ = with_adapters(zoo.MLP(), 1)
    begun, ready, opened, captured = (threading.Event() for _ in range(4))
    found = []

    def serve():
        if held_before:
            with onelora.rows(model, [2, 1, 0]):
                ready.set()
                begun.wait(60)
        ready.set()
        begun.wait(60)
        with onelora.rows(model, [1, 2, 0]), torch.no_grad():
            opened.set()
            captured.wait(60)
            found.append(compiled(x))

    def inner(gm, given):
        begun.set()
        opened.wait(1)  # the time that the other thread needs, and has not
        return gm

    compiled = torch.compile(model, backend="onelora", options={"inner": inner})
    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(60)
    with torch.no_grad(), onelora.rows(other, [0]) if elsewhere else contextlib.nullcontext():
        first = compiled(x)
    captured.set()
    thread.join()
    alone = Alone(merged, base)
    alone.check(first, {"x": x}, [0, 0, 0])
    alone.check(found[0], {"x": x}, [1, 2, 0])
    with torch.no_grad():
        alone.check(compiled(x), {"x": x}, [0, 0, 0])
