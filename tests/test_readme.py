"""The README is true: its commands are the ones that CI runs, its flags exist, its files are there."""

from __future__ import annotations

import re
from pathlib import Path

from greatctl.cli.commands import NAMES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_ci_runs_exactly_the_readmes_test_command() -> None:
    command = next(line for line in README.splitlines() if line.endswith("/pytest -q"))
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_both_set_up_commands_use_the_constraints() -> None:
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert all("-c .ci/constraints.txt" in line for line in commands)
    assert commands[0].endswith("greatctl demo")


def test_every_command_is_in_the_command_table_and_every_named_command_exists() -> None:
    table = README[README.index("## Commands") : README.index("## Plugins")]
    named = set(re.findall(r"`([a-z]+)`", table))
    assert set(NAMES) <= named
    used = set(re.findall(r"^!?greatctl (?:-C \S+ )?([a-z]+)", README, re.M))
    assert used <= set(NAMES)


def test_every_exit_code_is_in_the_table() -> None:
    from greatctl import errors

    table = README[README.index("| exit |") : README.index("## Plugins")]
    codes = {int(n) for n in re.findall(r"\b(\d+)\b", table)}
    known = {
        c.exit_code
        for c in vars(errors).values()
        if isinstance(c, type) and isinstance(getattr(c, "exit_code", None), int)
    }
    assert known <= codes


def test_links_point_at_files_that_are_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_plugin_shown_works(tmp_path: Path) -> None:
    code = README[README.index("from greatctl import hookimpl") :].split("```")[0]
    (tmp_path / "shown.py").write_text(code)
    from greatctl.extend.manager import load_plugins
    from greatctl.extend.testing import check_metric

    plugins = load_plugins(folder=None, paths=[str(tmp_path / "shown.py")])
    assert [p.error for p in plugins.report if p.error] == []
    metric = plugins.registry.get("metrics", "answer-log-prob")
    check_metric(metric)


def test_the_project_speaks_of_itself_alone() -> None:
    hosts = ("pypi" + ".org", "files.pythonhosted" + ".org", "registry.npmjs" + ".org")
    for path in ROOT.rglob("*"):
        if path.suffix not in (".py", ".md", ".toml", ".txt", ".css", ".js", ".html") or not path.is_file():
            continue
        parts = path.relative_to(ROOT).parts
        if parts[0].startswith(".venv") or parts[0] in (".git", ".bench", ".carry", "greatctl-demo", "build", "dist"):
            continue
        text = path.read_text(errors="replace")
        assert not any(host in text for host in hosts), path
        assert ("/" + "work/") not in text, path
