"""The example server: every answer is that of its adapter's merged model, whatever else the server does meanwhile."""

import copy
import http.client
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from served import HELD, Tagger, World
from torch import nn

import onelora_compile as onelora
from onelora_compile.examples.serving.app import make_app
from onelora_compile.examples.serving.backends import OnnxBank
from onelora_compile.examples.serving.client import RefusedError, connected
from onelora_compile.examples.serving.in_thread import serving
from onelora_compile.testing import fill_vectors

BACKENDS = ["bank", "compiled"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def compiled(world):
    return world.backend("compiled")


@pytest.fixture
def order():
    return np.random.default_rng(0)


def raw(port, method, target, body=b""):
    """Status, headers and JSON of any request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, target, body)
    answer = connection.getresponse()
    found = answer.status, answer.headers, json.loads(answer.read())
    connection.close()
    return found


@pytest.mark.parametrize("kind", BACKENDS)
def test_mixed_requests_while_adapters_come(kind, world):
    backend, uploaded, seen = world.backend(kind), threading.Event(), []
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run = backend.run

    def counted(names, inputs):
        seen.append(list(names))
        return run(names, inputs)

    backend.run = counted

    def requests(seed):
        order = np.random.default_rng(seed)
        with connected(port) as client:
            for turn in itertools.count():
                names = [None, *client.adapters()]
                for _ in range(10):
                    world.ask(client, names[order.integers(len(names))], order)
                if turn > 5 and uploaded.is_set():
                    return

    with serving(make_app(backend)) as port, ThreadPoolExecutor(8) as threads:
        running = [threads.submit(requests, seed) for seed in range(8)]
        with connected(port) as client:
            try:
                for name in list(world.files)[HELD:]:
                    client.add(world.files[name], name)
                    world.ask(client, name, np.random.default_rng(0))
            finally:
                uploaded.set()
            assert client.adapters() == list(world.files)
        for one in running:
            one.result()
    assert sum(map(len, seen)) >= 480
    assert max(len(set(names)) for names in seen) > 2, "no batch had several adapters"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_wrong_upload_leaves_everything_as_it_was(kind, world, tmp_path, order, request):
    backend = world.backend("bank") if kind == "bank" else request.getfixturevalue("compiled")
    good = world.files["a2"].read_bytes()
    torch.manual_seed(99)
    other = fill_vectors(onelora.adapt(Tagger()), 0.1)
    onelora.save_adapter(other, tmp_path / "other.safetensors")
    more = fill_vectors(onelora.adapt(nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))), 0.1)
    onelora.save_adapter(more, tmp_path / "more.safetensors")
    headed = onelora.adapt(copy.deepcopy(world.base), onelora.OneLoRAConfig(modules_to_save=["layers.2"]))
    onelora.save_adapter(fill_vectors(headed, 0.1), tmp_path / "headed.safetensors")
    folder = tmp_path / "kept"
    with serving(make_app(backend, folder, max_bytes=1 << 20)) as port, connected(port) as client:
        for name, content, status, message in (
            ("cut", good[:-30], 422, "is damaged"),
            ("empty", b"", 422, "is damaged"),
            ("other", (tmp_path / "other.safetensors").read_bytes(), 409, "trained on another base"),
            ("more", (tmp_path / "more.safetensors").read_bytes(), 422, "vectors"),
            ("headed", (tmp_path / "headed.safetensors").read_bytes(), 422, "layers.2"),
            ("a1", good, 409, "'a1' already"),
            ("..%2Fa", good, 422, "letters, digits"),
            (".a", good, 422, "letters, digits"),
            ("a.safetensors", good, 422, "without .safetensors"),
            ("", good, 422, "letters, digits"),
            ("large", bytes((1 << 20) + 1), 413, "1048576 bytes"),
        ):
            found, _, answer = raw(port, "POST", f"/adapters?name={name}", content)
            assert (found, list(answer)) == (status, ["error"]), answer
            assert message in answer["error"]
            assert str(tmp_path) not in answer["error"]
            assert client.adapters() == ["a0", "a1"]
            assert list(folder.iterdir()) == []
        for one in (None, "a0", "a1"):
            world.ask(client, one, order)


def test_a_wrong_request_is_one_clear_message(world, order):
    with serving(make_app(world.backend("bank"), max_bytes=10000)) as port, connected(port) as client:
        for body, status, message in (
            (b"{", 400, "no JSON"),
            (b"[" * 5000, 400, "no JSON"),
            (b"\xff\xfe", 400, "no JSON"),
            (b"[]", 422, "a request is"),
            (b'{"adapter": "a0"}', 422, "a request is"),
            (b'{"adapters": "a0", "inputs": [1]}', 422, "a request is"),
            (b'{"adapter": 1, "inputs": [1]}', 422, "adapter is a name"),
            (b'{"adapter": "fr", "inputs": [1]}', 404, "no adapter 'fr'"),
            (b'{"adapter": "a0", "inputs": {"x": [1]}}', 422, "inputs ['tokens']; the request has ['x']"),
            (b'{"adapter": "a0", "inputs": [1.5]}', 422, "float64 [1]; the model takes int64 [any]"),
            (b'{"adapter": "a0", "inputs": ["1"]}', 422, "the model takes int64"),
            (b'{"adapter": "a0", "inputs": [[1, 2]]}', 422, "has the shape [1, 2]"),
            (b'{"adapter": "a0", "inputs": [[1, 2], [3]]}', 422, "different lengths"),
            (b'{"adapter": "a0", "inputs": []}', 422, "the model takes int64"),
            (b'{"adapter": "a0", "inputs": null}', 422, "the model takes int64"),
            (b" " * 10001, 413, "10000 bytes"),
        ):
            found, _, answer = raw(port, "POST", "/predict", body)
            assert (found, list(answer)) == (status, ["error"]), (body[:60], answer)
            assert message in answer["error"]
        assert raw(port, "GET", "/nothing")[0] == 404
        assert raw(port, "GET", "/predict")[0] == 405
        world.ask(client, "a0", order)


class Gated(OnnxBank):
    """A bank whose batches wait."""

    gate: threading.Event
    entered: threading.Event

    def run(self, names, inputs):
        self.entered.set()
        assert self.gate.wait(60)
        return super().run(names, inputs)


@pytest.fixture
def gated(world):
    backend = Gated(world.bank, room=1)
    backend.gate, backend.entered = threading.Event(), threading.Event()
    yield backend
    backend.gate.set()


def test_one_row_that_fails_fails_alone(world, gated, order):
    with serving(make_app(gated)) as port, ThreadPoolExecutor(8) as threads:

        def right(seed):
            with connected(port) as client:
                world.ask(client, "a1", np.random.default_rng(seed))

        def wrong():
            with connected(port) as client, pytest.raises(RefusedError, match=r"500: .*ONNX Runtime can't run"):
                client.predict("a0", np.array([1, 99, 2]))

        running = [threads.submit(right, seed) for seed in range(6)] + [threads.submit(wrong)]
        time.sleep(0.5)
        gated.gate.set()
        for one in running:
            one.result()
        right(0)


def test_a_full_queue_is_said_and_what_waits_is_answered(world, gated):
    with serving(make_app(gated, max_batch=2, max_queue=3)) as port, ThreadPoolExecutor(12) as threads:
        body = json.dumps({"adapter": "a1", "inputs": [1, 2]}).encode()
        running = [threads.submit(raw, port, "POST", "/predict", body) for _ in range(12)]
        deadline = time.monotonic() + 30
        while sum(one.done() for one in running) < 7 and time.monotonic() < deadline:
            time.sleep(0.01)
        gated.gate.set()
        answers = [one.result() for one in running]
    want = world.merged["a1"](torch.tensor([[1, 2]]))[0].detach().numpy()
    full = [answer for answer in answers if answer[0] == 503]
    assert len(full) == 12 - 3 - 2 or len(full) == 12 - 3 - 1  # three wait, one or two run
    for _, headers, answer in full:
        assert "3 requests wait already" in answer["error"]
        assert headers["Retry-After"] == "1"
    for status, _, answer in answers:
        if status == 200:
            np.testing.assert_allclose(answer["outputs"]["output"], want, rtol=1e-4, atol=1e-4)
    assert sum(answer[0] == 200 for answer in answers) + len(full) == 12


def test_the_end_waits_for_requests_that_run(world, gated, order):
    with ThreadPoolExecutor(2) as threads:
        with serving(make_app(gated)) as port:

            def ask():
                with connected(port) as client:
                    world.ask(client, "a0", order)

            running = threads.submit(ask)
            assert gated.entered.wait(60)
            threading.Timer(0.5, gated.gate.set).start()
        assert gated.gate.is_set()  # the server did not end before
        running.result()
