"""A task of the evaluation, small and made up, and the result of a run of it."""

import torch
from eval.task import Scores, Task
from torch import nn

from onelora_compile.progress import counting

WIDTH = 8


class Tiny(nn.Module):
    """Without biases, but in its head."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.RMSNorm(2 * WIDTH)
        self.second, self.head = nn.Linear(2 * WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 3, bias=False)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x)).relu()))


class Clusters(Task):
    """Three clusters of points."""

    name, base, linears, head, head_rate, batch = "clusters", "nothing", ["first", "second"], "head", 1e-2, 8

    def __init__(self):
        self.steps = 6
        self.asked: list[str] = []

    def load(self):
        torch.manual_seed(5)
        return Tiny()

    def part(self, part):
        generator = torch.Generator().manual_seed(["train", "validation", "test"].index(part))
        labels = torch.arange(60) % 3
        return torch.randn(60, WIDTH, generator=generator) + labels[:, None], labels

    def batches(self, steps, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            rows = torch.randint(0, 60, (self.batch,), generator=generator)
            yield tuple(one[rows] for one in self.part("train"))

    def answers(self, model, rows):
        return model(rows[0]), rows[1]

    def evaluate(self, model, part) -> Scores:
        self.asked.append(part)
        return super().evaluate(model, part)


def result(task, method, rate, seed, accuracy, loss=1.0, rule="", **more):
    fields = {"task": task.name, "method": method, "rule": rule, "rate": rate, "seed": seed, "numbers": 1234}
    scores = {"validation": {"accuracy": accuracy, "loss": loss}, "settings": task.settings()}
    return fields | scores | {"step_cpu_ms": 2.0} | more


def new_task():
    """A fixture: the task, which nobody has asked for anything."""
    return Clusters()


def quiet_bar():
    """A fixture: a progress bar that nobody sees."""
    with counting("test", show=False) as count:
        yield count
