"""Help pages: every word that was written is shown, switches take no value, and examples can be copied and run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from rich.markup import escape
from typer.testing import CliRunner

from greatctl.cli.app import app
from greatctl.cli.commands import NAMES, register
from greatctl.cli.help import _escaped, copyable

EXAMPLES = {name: __import__(f"greatctl.cli.commands.{name}_", fromlist=["x"]).EXAMPLES for name in NAMES}
CHEAP = {
    "init": ("greatctl init", "greatctl -C my-study init"),
    "status": ("greatctl status", "greatctl -C greatctl-demo status --json"),
    "verify": ("greatctl verify", "greatctl -C greatctl-demo verify --json"),
    "plugins": ("greatctl plugins", "greatctl --plugin my_metric.py plugins --json"),
    "demo": ("greatctl -C greatctl-demo status",),
}
"""Examples that are run as they stand; those of the stages are planned with --dry-run in test_cli.py, since running them
takes minutes or a network; `demo`, `run` and `doctor` (which imports torch) are run by other tests."""


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """The help page of each command, and of the application under the name ""."""
    if not app.registered_commands:
        register(app)
    runner = CliRunner(env={"TERMINAL_WIDTH": "200", "COLUMNS": "200", "NO_COLOR": "1"})
    words = {"": ["--help"], **{name: [name, "--help"] for name in NAMES}}
    return {name: runner.invoke(app, line, prog_name="greatctl").output for name, line in words.items()}


def test_what_stands_in_square_brackets_is_shown(pages: dict[str, str]) -> None:
    command = typer.main.get_command(app)
    seen = 0
    for name, page in pages.items():
        of = command if not name else command.commands[name]  # type: ignore[attr-defined]
        texts = [of.callback.__doc__ if name else "", *(getattr(param, "help", "") for param in of.params)]
        for text in texts:
            for words in re.findall(r"\[[^\]]+\]", (text or "").replace("\\[", "[")):
                seen += 1
                assert words in re.sub(r"\s+", " ", page), f"{name}: {words} is not shown"
    assert seen >= 1
    assert "[train]" in pages["run"]


@pytest.mark.parametrize("text", ["[train] says", "a [/bold] b", r"\[x] [y]", "[1] [link=file:///x]z[/link]", "", None])
def test_escaping_is_that_of_rich(text: str | None) -> None:
    assert _escaped(text) == (escape(text) if text else text)


def test_a_switch_is_not_said_to_take_a_value(pages: dict[str, str]) -> None:
    for name, page in pages.items():
        assert "<bool>" not in page, name


def test_every_example_of_a_page_stands_there_and_can_be_copied(pages: dict[str, str]) -> None:
    for name, examples in EXAMPLES.items():
        assert 2 <= len(examples) <= 4
        for example in examples:
            assert example in pages[name]


@pytest.mark.parametrize("width", [20, 60, 78])
def test_a_broken_example_is_the_same_command_to_a_shell(width: int) -> None:
    for example in (example for examples in EXAMPLES.values() for example in examples):
        lines = copyable(example, width)
        assert shlex.split("\n".join(lines).replace("\\\n", " ")) == shlex.split(example)
        assert width < 78 or max(map(len, lines)) <= width, example


@pytest.mark.parametrize("example", [e for examples in CHEAP.values() for e in examples])
def test_cheap_examples_run_as_they_stand(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "greatctl-demo").mkdir()
    (tmp_path / "my_metric.py").write_text("__version__ = '1'\n")
    words = shlex.split(example)[1:]
    if not app.registered_commands:
        register(app)
    done = CliRunner().invoke(app, ["--offline", *words], prog_name="greatctl")
    assert done.exit_code == 0, done.output


def test_all_examples_of_the_cheap_commands_are_among_those_that_run() -> None:
    for name, examples in CHEAP.items():
        assert set(examples) <= set(EXAMPLES[name]), name
        assert name == "demo" or set(examples) == set(EXAMPLES[name]), name
