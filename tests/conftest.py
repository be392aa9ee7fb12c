"""Every test starts from the same seed and an empty Dynamo cache; long tables are thinned for the default run."""

import gc
import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core; more threads would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import export_tables
import torch
from hub_places import cache, hub, trained  # noqa: F401  (fixtures)
from hypothesis import settings

# Each collection of the old walks all that is imported: a fifth of the time at Python's own thresholds.
gc.set_threshold(20_000, 20, 100)
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("tests")

# The default run walks every n-th case of each test function in these files, the first one always; `-m slow` the rest.
THINNED = {
    "test_all_or_nothing.py": 2,
    "test_attention.py": 9,
    "test_build_engine.py": 6,
    "test_cli_mistakes.py": 12,
    "test_compile.py": 3,
    "test_dispatched.py": 6,
    "test_distributed.py": 3,
    "test_export_axes.py": 5,
    "test_export_cache.py": 3,
    "test_export_decoders.py": 8,
    "test_export_gradients.py": 3,
    "test_export_names.py": 12,
    "test_export_onnx.py": 4,
    "test_first_call.py": 8,
    "test_fold_files.py": 2,
    "test_fold_forms.py": 6,
    "test_fold_graphs.py": 5,
    "test_fold_layouts.py": 6,
    "test_fold_matches.py": 5,
    "test_fold_onnx.py": 5,
    "test_fold_parts.py": 12,
    "test_frozen_copies.py": 9,
    "test_gguf_read.py": 4,
    "test_higher_order.py": 4,
    "test_insert_rank1.py": 8,
    "test_jetson.py": 5,
    "test_jetson_builds.py": 3,
    "test_jetson_double.py": 3,
    "test_jetson_power.py": 2,
    "test_jetson_refusals.py": 5,
    "test_keep_float32.py": 24,
    "test_known_faults.py": 4,
    "test_known_faults_builds.py": 4,
    "test_known_faults_norms.py": 4,
    "test_linear_kinds.py": 6,
    "test_linears.py": 6,
    "test_merged_files.py": 6,
    "test_modes.py": 8,
    "test_named_adapters.py": 2,
    "test_named_copies.py": 2,
    "test_nothing_eaten.py": 3,
    "test_opset_pairs.py": 8,
    "test_oracle.py": 5,
    "test_packaging.py": 10,
    "test_paths.py": 6,
    "test_precision.py": 3,
    "test_quantized.py": 6,
    "test_rank1_matmul.py": 3,
    "test_row_training.py": 3,
    "test_reads_named.py": 5,
    "test_rows.py": 5,
    "test_rows_refused.py": 3,
    "test_saturation.py": 4,
    "test_static_cache.py": 8,
    "test_swaps.py": 8,
    "test_tensor_parallel.py": 2,
    "test_trained.py": 6,
    "test_trainer_checkpoints.py": 4,
    "test_training_loops.py": 4,
    "test_untouched.py": 4,
    "test_untouched_zoo.py": 4,
    "test_weight_reads.py": 5,
    "test_weights_kept.py": 3,
    "test_zoo.py": 8,
}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    torch._dynamo.config.assume_static_by_default = True  # PyTorch 2.11: threads that compile dynamically leave it off
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def pytest_collection_finish():
    if "onelora_compile.exporters" in sys.modules and importlib.util.find_spec("onnxscript"):
        export_tables.keep()


@pytest.hookimpl(tryfirst=True)  # before cases are chosen by their marks
def pytest_collection_modifyitems(config, items):
    seen: Counter[tuple[str, Path]] = Counter()
    for item in items:
        step = THINNED.get(item.path.name)
        if step and hasattr(item, "callspec") and not item.get_closest_marker("slow"):
            if seen[item.originalname, item.path] % step:
                item.add_marker(pytest.mark.slow)
            seen[item.originalname, item.path] += 1
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))
