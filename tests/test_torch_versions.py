"""What a PyTorch outside of the tested range says, and that the document names the same releases."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import onelora_compile as onelora
from onelora_compile.torch_versions import TESTED, warn_if_untested


@pytest.mark.parametrize("version", [*TESTED, "2.12.0+cpu", "2.15.3", "2.14.0a0+git123"])
def test_a_tested_release_says_nothing(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested(version)


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0.dev20270101", "3.0.0", "main"])
def test_another_one_warns(version):
    with pytest.warns(onelora.OneLoRAWarning, match=rf"tested with PyTorch 2\.11\.0 to 2\.15\.0, this is {version}"):
        warn_if_untested(version)


def test_an_import_warns_once():
    code = "import torch; torch.__version__ = '9.9.0'; import onelora_compile, onelora_compile.backend"
    done = subprocess.run(
        [sys.executable, "-P", "-W", "always", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stderr.count("this is 9.9.0") == 1


def test_the_document_names_them():
    text = (Path(__file__).parents[1] / "docs" / "pytorch.md").read_text()
    assert all(f"| {version} |" in text for version in TESTED)
