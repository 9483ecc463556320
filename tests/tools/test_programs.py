"""Every program says what it does, with an example, before it loads anything heavy; its choices are the library's."""

import re
import subprocess
import sys

import pytest
from commands import ROOT, environment, script

TOOLS = sorted((ROOT / "tools").glob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
BENCHMARKS = sorted(p for p in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in p.read_text())


HEAVY = "torch", "torchvision", "hydra", "numpy", "scipy", "matplotlib"


def help_of(path, run, tmp_path):
    """(what --help prints, which heavy packages it loaded)."""
    code = (
        f"import runpy, sys\nsys.argv = [{path.name!r}, '--help']\n"
        f"try: {run}\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print('loaded', *[m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    said, _, loaded = done.stdout.rpartition("loaded")
    assert "usage:" in said
    return said, loaded.split()


@pytest.mark.parametrize("path", [*TOOLS, *SCRIPTS], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_help_has_an_example_and_comes_quickly(path, tmp_path):
    said, loaded = help_of(path, f"runpy.run_path({str(path)!r}, run_name='__main__')", tmp_path)
    assert re.search(rf"(?m)^ *python {path.parent.name}/{path.name}( |$)", said) and loaded == []


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.name)
def test_help_of_benchmarks_has_an_example(path, tmp_path):
    said, _ = help_of(path, f"runpy.run_module('benchmarks.{path.stem}', run_name='__main__')", tmp_path)
    assert re.search(rf"(?m)^ *python -m benchmarks.{path.stem}( |$)", said)


@pytest.mark.parametrize("path", TOOLS, ids=lambda p: p.name)
def test_an_unknown_option_is_a_users_mistake(path, capsys):
    with pytest.raises(SystemExit) as end:
        script(f"tools/{path.name}").main(["--no-such-option", "x", "y"])
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def choices(path, option):
    parser = script(path).parser()
    return tuple(next(a for a in parser._actions if option in a.option_strings).choices)


def test_choices_are_the_librarys():
    from anorm.deploy import export
    from anorm.study import formats, printed, records

    assert choices("tools/table.py", "--format") == tuple(formats.FORMATS)
    assert choices("tools/table.py", "--epoch") == records.EPOCHS
    assert choices("tools/table.py", "--faithful") == choices("tools/audit.py", "--faithful") == printed.FAITHFUL
    assert choices("tools/export.py", "--formats") == tuple(export.FORMATS)


def test_tools_holds_programs_alone():
    for path in TOOLS:
        assert 'if __name__ == "__main__":' in path.read_text(), path
