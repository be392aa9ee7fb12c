"""The example on digits runs, in a few steps."""

import io

import pytest
from rich.console import Console

from onelora_compile.examples.digits.run import compare


@pytest.mark.slow
def test_every_method_has_a_row():
    table = compare(pretrain_steps=4, steps=2, rounds=1)
    assert table.row_count == 8
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    said = console.export_text()
    for method in ("no adaptation", "head only", "BitFit", "LoRA r=1", "MiSS r=1", "1LoRA(norms)", "full fine-tuning"):
        assert method in said
