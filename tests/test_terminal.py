"""What people see at 80 columns: whole words, aligned columns, the finding first and the next step last."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from greatctl.cli import output, progress
from greatctl.cli.next_step import next_step
from greatctl.cli.options import Root
from greatctl.cli.output import hanging, print_error
from greatctl.cli.progress import Display
from greatctl.cli.views import render
from greatctl.cli.views.plan import render_plan
from greatctl.cli.views.status import render_status
from greatctl.cli.views.table import STATE_STYLE, Flow, facts, near
from greatctl.errors import UsageError
from greatctl.events import Event
from greatctl.stages.context import Plan, Result

SAE = "batchtopk-2048-k32-blocks.4.hook_resid_post"
TRAINED = {
    "arch": "batchtopk", "ce_loss_recovered": 0.992, "d_sae": 2048, "dead_fraction": 0.00146, "l0": 32.007,
    "explained_variance": 0.8512, "hook_point": "blocks.4.hook_resid_post", "name": SAE, "steps": 264,
    "tokens": 268_496, "tokens_per_second": 4091.2, "waited_for_rows": 0.011,
}  # fmt: skip


def _shown(renderable: Any, width: int = 80, **options: Any) -> str:
    sink = io.StringIO()
    Console(file=sink, width=width, highlight=False, **options).print(renderable)
    return sink.getvalue()


def _terminal(sink: io.StringIO) -> Console:
    return Console(file=sink, width=80, force_terminal=True, color_system=None, highlight=False, legacy_windows=False)


def _result(stage: str, summary: dict[str, object], artifact: str | None = "a") -> Result:
    return Result(stage=stage, artifact=Path(artifact).absolute() if artifact else None, summary=summary)


def test_a_sentence_is_the_first_line_of_a_result_and_figures_have_units() -> None:
    lines = _shown(render(_result("train", TRAINED))).splitlines()
    assert lines[0] == "32.0 latents a token explain 85.1% of the held-out variance"
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for words in ("99.2% of what the layer is worth", "0.15% of the latents", "268,496 tokens", "4,091 tokens/s"):
        assert words in text
    unmeasured = {**TRAINED, "explained_variance": None, "l0": None, "ce_loss_recovered": None}
    assert "not measured" in _shown(render(_result("train", unmeasured)))
    tokens = {"n_tokens": 50_324, "n_windows": 213, "window": 256, "tokenizer": "bundled"}
    assert _shown(render(_result("tokenize", tokens))).startswith("50,324 tokens in 213 windows of 256\n")


def test_status_breaks_no_name_and_says_the_count_first() -> None:
    row = {"stage": "train", "path": f"/x/results/saes/{SAE}", "state": "up-to-date", "reason": "", "bytes": 4_300_000}
    stale = {
        **row,
        "path": "/x/results/report",
        "stage": "report",
        "state": "stale",
        "reason": "config.layout 12 -> 13",
    }
    gone = {**row, "path": "/x/results/patches", "stage": "patch", "state": "missing", "reason": "run `greatctl patch`"}
    text = _shown(render_status([row, stale, gone]))
    assert text.startswith("1 of 2 artifacts up to date, 1 stale, 1 missing")
    assert SAE in text and "config.layout 12 -> 13" in text and max(map(len, text.splitlines())) <= 80


def test_a_plan_shows_what_was_chosen_apart_from_the_defaults() -> None:
    plan = Plan(stage="train", final=None, identity=None, facts={"weight_bytes": 4_203_520, "rows": 5})  # type: ignore[arg-type]
    given = {"k": {"value": 16, "origin": "flag --k"}, "lr": {"value": None, "origin": "default"}}
    text = _shown(render_plan(plan, given), color_system="standard", force_terminal=True)
    assert "4.2 MB" in text and "None" not in text
    (chosen,) = (line for line in text.splitlines() if "flag --k" in line)
    (default,) = (line for line in text.splitlines() if "default" in line)
    assert "\x1b[2m" in default and "\x1b[2m" not in chosen


def test_items_with_spaces_are_not_broken() -> None:
    text = _shown(facts([("raises", Flow([f"' item {n}'" for n in range(30)]))]), width=60)
    assert len(re.findall(r"' item \d+'", text)) == 30 and max(map(len, text.splitlines())) <= 60


def test_an_error_hangs_below_its_first_word_on_a_terminal_and_stays_whole_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "it must be " + ", ".join(f"value-{n}" for n in range(12))
    error = UsageError("site = 'resid' is not possible", why=words, fix="one\ntwo", where="sources.toml:3")
    print_error(error, as_json=False)
    log = capsys.readouterr().err.splitlines()
    assert log[0].startswith("error: sources.toml:3: site") and log[1] == f"  why: {words}"
    assert log[2:4] == ["  fix: one", "       two"]
    sink = io.StringIO()
    monkeypatch.setattr(output, "stderr", lambda: _terminal(sink))
    print_error(error, as_json=False)
    seen = [re.sub(r"\x1b\[\d*m", "", line).rstrip() for line in sink.getvalue().splitlines()]
    assert max(map(len, seen)) <= 80
    assert seen[2].startswith("       value-") and all(f"value-{n}" in "\n".join(seen) for n in range(12))


def test_notices_stand_in_a_column_on_a_terminal_and_are_sentences_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notices = ["train: not made yet", "train: " + "word " * 30, "patch: up to date", "no contact: is set"]
    with Display(quiet=False) as display:
        for words in notices:
            display(Event("notice", "train", words))
    assert capsys.readouterr().err.splitlines() == notices
    sink = io.StringIO()
    monkeypatch.setattr(progress, "stderr", lambda: _terminal(sink))
    with Display(quiet=False) as display:
        for words in notices:
            display(Event("notice", "train", words))
    lines = [re.sub(r"\x1b\[\d*m", "", line).rstrip() for line in sink.getvalue().splitlines()]
    assert lines[0] == "train      not made yet" and lines[1].startswith("           word")
    assert "patch      up to date" in lines and lines[-1] == "no contact: is set"
    assert max(map(len, lines)) <= 80


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(quiet=True) as display:
        display(Event("notice", "train", "train: not made yet"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("stage", "flags", "summary", "words"),
    [
        ("fetch", {}, {}, "greatctl -C 'my study' tokenize"),
        ("fetch", {"estimate": True}, {}, "greatctl -C 'my study' fetch"),
        ("fetch", {"audit": True}, {}, ""),
        ("tokenize", {}, {}, "greatctl -C 'my study' harvest"),
        ("interpret", {}, {}, "greatctl -C 'my study' patch"),
        ("interpret", {"latent": 3, "sae": "mine"}, {}, "greatctl -C 'my study' steer --sae mine --latent 3"),
        (
            "interpret",
            {"text": "x"},
            {"top": [{"latent": 5, "activation": 1.0}, {"latent": 7, "activation": 2.0}]},
            "greatctl -C 'my study' interpret --latent 7",
        ),
        ("report", {"open_browser": True}, {}, ""),
        ("steer", {}, {}, ""),
    ],
)
def test_the_next_step_can_be_typed_as_it_stands(
    stage: str, flags: dict[str, object], summary: dict[str, object], words: str
) -> None:
    from greatctl.cli.app import app
    from greatctl.cli.commands import register

    assert next_step(_result(stage, summary), Root(project=Path("my study")), flags) == words
    if words:
        if not app.registered_commands:
            register(app)
        known = {command.name for command in app.registered_commands}
        assert shlex.split(words)[3] in known


def test_a_worker_that_sealed_nothing_names_no_next_stage() -> None:
    assert next_step(_result("harvest", {}, artifact=None), Root(), {}) == ""


def test_colours_are_those_of_the_theme_or_bring_their_own_ground() -> None:
    """A fixed foreground without a background is unreadable in a light or in a dark theme."""
    from rich.style import Style

    from greatctl.cli.views.heat import _cold, _warm

    for words in STATE_STYLE.values():
        style = Style.parse(words)
        assert style.color is None or (style.color.number is not None and style.color.number in range(1, 7))
    for style in (_warm(0.1), _warm(1.0), _cold(0.5)):
        assert style.color is not None and style.bgcolor is not None
        ground = style.bgcolor.get_truecolor()
        assert 0.3 * ground.red + 0.59 * ground.green + 0.11 * ground.blue > 90  # black letters on it can be read


def test_a_path_below_is_short_and_any_other_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        near(tmp_path / "a" / "b") == "a/b" and near("/elsewhere/x") == "/elsewhere/x" and near("builtin") == "builtin"
    )


@pytest.mark.parametrize(("columns", "width"), [("20", 60), ("72", 72), ("", 100)])
def test_a_table_is_never_narrower_than_its_words(columns: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert output.stdout().width == width


def test_a_label_without_a_terminal_keeps_its_lines() -> None:
    sink = io.StringIO()
    console = Console(file=sink, width=30)
    console.print(hanging(Text("fix: "), Text("one two three four five six seven\nb"), console), soft_wrap=True)
    assert sink.getvalue() == "fix: one two three four five six seven\n     b\n"


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        (["trian"], "no command 'trian'", "'train'"),
        (["train", "--kk", "3"], "no option --kk", "--k?"),
        (["train", "--k", "x"], "--k takes a whole number", "train --help"),
        (["train", "--k"], "--k needs a value", "--k VALUE"),
        (["--json", "status"], "no option --json", "greatctl status --json"),
        (["status", "-C", "x"], "no option -C", "greatctl -C … status"),
        (["status", "extra"], "extra", "status --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_slip_on_the_command_line_is_explained(line: list[str], what: str, fix: str) -> None:
    import typer

    from greatctl.cli.app import _as_error, app
    from greatctl.cli.commands import register

    if not app.registered_commands:
        register(app)
    with pytest.raises(typer.TyperException) as slip:
        app(line, standalone_mode=False, prog_name="python -m greatctl")
    error = _as_error(slip.value)
    assert error.exit_code == 2 and what in error.message and fix in error.fix
    assert "python -m" not in error.message + error.fix


@pytest.mark.parametrize("words", [["-C", "file", "status"], ["demo", "file"], ["harvest", "--device", "cudaa"]])
def test_a_file_for_a_folder_and_an_unknown_device_are_named(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from greatctl.cli.app import app
    from greatctl.cli.commands import register
    from greatctl.errors import GreatctlError

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    if not app.registered_commands:
        register(app)
    with pytest.raises(GreatctlError) as refused:
        app(words, standalone_mode=False)
    assert refused.value.exit_code in (2, 3) and words[-1] in refused.value.message + "status" and refused.value.fix
    assert "mkdir" not in refused.value.fix
