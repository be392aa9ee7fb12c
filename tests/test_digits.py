"""The example on digits runs, in a few steps."""

import pytest

from onelora_compile.examples.digits.run import compare


@pytest.mark.slow
def test_every_method_has_a_row():
    table = compare(pretrain_steps=4, steps=2, rounds=1)
    assert [*table.columns[0].cells][:3] == ["no adaptation", "head only", "BitFit"]
    assert table.row_count == 8
