"""The command line in this process, in a folder of the user's."""

import sys

import pytest
from typer.testing import CliRunner

from onelora_compile.cli import app


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})


def run_in(folder, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delitem(sys.modules, "mymodels", raising=False)
        result = run(*args)
        patch.delitem(sys.modules, "mymodels", raising=False)
    return result
