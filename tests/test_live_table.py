"""What a person sees of a training run: a table above the bar on a terminal, a full line now and then in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from greatctl.cli import progress
from greatctl.cli.progress import Display, _Curve
from greatctl.events import Event

POINT = {"step": 123_456, "tokens": 505_675_776, "loss": 0.123456, "explained_variance": 0.7654, "l0": 64.04}
POINT |= {"dead_fraction": 0.031, "lr": 1e-4, "mse": 0.12}


def test_the_table_fits_80_columns_and_keeps_the_last_points(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    curve = _Curve()
    for point in range(9):
        curve.add("", {**POINT, "step": POINT["step"] + point, "tokens": POINT["tokens"] + 455_000 * point})
    sink = io.StringIO()
    Console(file=sink, width=80).print(curve.table())
    lines = sink.getvalue().splitlines()
    assert [len(lines), max(map(len, lines)) <= 80] == [6, True]
    assert lines[0].split() == ["step", "loss", "explained", "variance", "L0", "dead", "tokens/s"]
    assert lines[-1].split() == ["123,464", "0.1235", "0.765", "64.0", "3.1%", "455,000"]


def test_a_log_gets_a_line_every_half_minute_with_all_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert progress._EVERY_SECONDS == 30
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Display(quiet=False) as display:
        for step in range(1, 41):
            now[0] += 1
            display(Event("metric", "train", "", {**POINT, "tokens": 4096 * step}))
            data = {"done": step, "total": 100, "unit": "steps", "already": 0}
            display(Event("progress", "train", "train", data))
    (line,) = capsys.readouterr().err.splitlines()
    for words in ("30 of 100 steps", "loss 0.1235", "explained variance 0.765", "L0 64.0", "dead 3.1%", "s left"):
        assert words in line
    assert "tokens/s 4,096" in line and line.startswith("train: 30 of 100")


def test_a_first_line_that_comes_at_once_guesses_neither_speed_nor_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Display(quiet=False) as display:
        for seconds, done, unit in ((31, 500, "bytes"), (62, 3600, "bytes"), (93, 5000, "")):
            now[0] = seconds
            data = {"done": done, "total": 6700, "unit": unit, "already": 500}
            display(Event("progress", "fetch", "a book", data))
    assert capsys.readouterr().err.splitlines() == [
        "fetch: a book: 500 of 6,700 bytes",
        "fetch: a book: 3,600 of 6,700 bytes, 100 bytes/s, 31 s left",
        "fetch: a book: 5,000 of 6,700, 23 s left",
    ]


def test_a_log_line_names_the_member_of_a_sweep_and_a_curve_stays_with_its_training() -> None:
    curve = _Curve()
    curve.add("topk-16", dict(POINT))
    assert " of topk-16" not in curve.words()
    curve.add("topk-32", dict(POINT))
    assert ", loss of topk-32 " in curve.words()
    curve.reset()
    assert curve.words() == ""


def test_a_second_training_under_the_same_name_has_a_clock_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Display(quiet=False) as display:
        for seconds, done in ((0, 1), (9_000, 100), (9_001, 1), (9_101, 11)):
            now[0] = seconds
            display(Event("progress", "train", "train", {"done": done, "total": 100, "unit": "steps", "already": 0}))
    assert capsys.readouterr().err.splitlines()[-1] == "train: 11 of 100 steps, 0.11 steps/s, 13 min left"
