# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Load and run tools in this process."""
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_tool(path):
    """Load a tool as a module, by its path below ``tools/``."""
    path = ROOT / 'tools' / path
    if str(path.parent) not in sys.path:  # as of a script
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(tool, *words):
    """Run a tool, or the one of a path, with words of any type."""
    tool = load_tool(tool) if isinstance(tool, str) else tool
    return tool.main([str(word) for word in words])


def run(tool, folder, *argv):
    """Run a benchmark; return its results and its page."""
    paths = folder / 'out.json', folder / 'out.md'
    call(tool, *argv, '--out', *paths)
    return json.loads(paths[0].read_text()), paths[1].read_text()


def fails(tool, capsys, *argv):
    """Run a tool where it must fail; return what it says."""
    with pytest.raises(SystemExit) as info:
        call(tool, *argv)
    assert info.value.code not in (0, None)
    return f'{info.value.code} {capsys.readouterr().err}'


def exit_of(path, monkeypatch, capsys, *argv):
    """Run a tool as a script; return its exit code, and what it printed."""
    path = str(ROOT / 'tools' / path)
    monkeypatch.setattr(sys, 'argv', [path, *argv])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(path, run_name='__main__')
    return end.value.code, *capsys.readouterr()
