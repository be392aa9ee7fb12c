"""Ways to find a rate without a grid, on a task of its own: rules for the groups, the range test, one rate for all."""

import json
from typing import Any

import pytest
from clusters import Clusters, new_task, quiet_bar, result
from eval import range_test, rate_study, stages, store
from eval.methods import METHODS
from eval.rates import RULES, sizes
from torch import nn

import onelora_compile as onelora

task, bar = pytest.fixture(new_task), pytest.fixture(quiet_bar)


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
