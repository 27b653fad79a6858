"""`import greatctl as g` in a notebook: the README's snippet runs, and every table opens in the tools that people have."""

from __future__ import annotations

import importlib
import re
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import greatctl as g
from greatctl.errors import InputError, InterruptedRun, UsageError
from greatctl.events import Event, Run
from greatctl.notebook import spoken

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


@pytest.fixture
def project(demo: Path, tmp_path: Path) -> Path:
    """A copy of the demonstration project that may be changed."""
    shutil.copytree(demo, tmp_path / "greatctl-demo")
    return tmp_path / "greatctl-demo"


def test_the_readmes_snippet_runs(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("pandas", reason="the snippet prints data frames")
    shown = re.search(r"```python\n(import greatctl as g\n.*?)```", README, re.S)
    monkeypatch.chdir(project.parent)
    monkeypatch.setenv("GREATCTL_TRAIN_CE_WINDOWS", "0")  # what the snippet shows, without what takes long
    monkeypatch.setenv("GREATCTL_TRAIN_BATCH_SIZE", "256")
    names: dict = {}
    assert shown is not None
    exec(compile(shown.group(1), "README", "exec"), names)
    assert names["page"]["latent"] == names["best"]["latent"][0].as_py()
    assert names["made"].artifact.is_dir() and tuple(names["sae"].W_dec.shape) == (256, names["sae"].d_in)
    assert "verdict" in capsys.readouterr().out
    assert names["p"].run("train", arch="topk", k=16, d_sae=256, steps=30).up_to_date


def test_artifacts_and_tables_are_found_by_name(demo: Path) -> None:
    p = g.open(demo)
    found = p.artifacts().to_pylist()
    assert {"fetch", "tokenize", "harvest", "train", "interpret", "patch", "report"} <= {row["stage"] for row in found}
    assert all(Path(row["path"]).is_dir() and row["bytes"] > 0 for row in found)
    (name,) = p.saes
    features = p.features(name)
    assert {"latents", "examples", "units", "contrasts", "hypotheses"} <= set(features.names) <= set(dir(features))
    assert "labels" not in features.names and features.latents.num_rows == p.saes[name].d_sae
    assert "effects" in p.patches().names and name in repr(features) and name in repr(p.saes)


def test_what_is_not_there_is_said_with_what_is(demo: Path, tmp_path: Path) -> None:
    p = g.open(demo)
    with pytest.raises(InputError, match="no tables of interpret named 'nobody'") as none:
        p.features("nobody")
    assert none.value.fix
    with pytest.raises(AttributeError, match=r"no table 'nothing'; there are: .*latents"):
        _ = p.features().nothing
    with pytest.raises(KeyError, match="there are: batchtopk"):
        _ = p.saes["nobody"]
    with pytest.raises(UsageError, match="'trane' is not a stage"):
        p.run("trane")
    with pytest.raises(UsageError, match="no setting 'archs'") as wrong:
        p.run("train", archs="topk")
    assert "arch" in wrong.value.fix
    with pytest.raises(InputError, match="is not a folder"):
        g.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no tables of interpret yet"):
        g.open(tmp_path).features()
    with pytest.raises(InputError, match="no tables of tokenise yet") as meant:
        p.tables("tokenise")
    assert "tokenize" in meant.value.fix


def test_a_traceback_in_a_notebook_shows_why_and_fix(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        g.open(tmp_path / "nowhere")
    shown = "".join(traceback.format_exception(error.value))
    assert "why: a project is one" in shown and "fix: give the folder" in shown


def test_the_tables_of_any_artifact_open_by_stage_and_name(demo: Path) -> None:
    p = g.open(demo)
    assert p.tables("tokenize").documents.num_rows == 30
    (name,) = p.saes
    assert "metrics" in p.tables("train", name).names
    assert p.tables("interpret").path == p.features().path


def test_a_stage_speaks_to_whom_it_is_told_to(demo: Path) -> None:
    said: list[Event] = []
    result = g.open(demo).run("interpret", emit=said.append, offline=True)
    assert result.up_to_date and any("up to date" in event.message for event in said)


def test_progress_in_a_notebook_is_a_line_now_and_then_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("greatctl.notebook.time.monotonic", lambda: now[0])
    said: list[str] = []
    run = Run("train", spoken(said.append))
    run.notice("begins")
    for done in range(0, 1001, 10):
        run.progress("steps", done, 1000, "steps")
        run.metric(done, loss=1.0)
        now[0] += 0.25
    assert said == [
        "begins",
        "train: steps: 400 of 1,000 steps, 15 s left",
        "train: steps: 800 of 1,000 steps, 5 s left",
    ]
    now[0] += 1_000
    run.progress("steps", 0, 100, "steps")
    now[0] += 20
    run.progress("steps", 20, 100, "steps")
    assert said[-1] == "train: steps: 20 of 100 steps, 80 s left"  # another task under the same name


def test_an_interrupt_stops_at_a_safe_point_and_observers_hear_of_the_run(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, heard = g.open(demo), list[str]()
    monkeypatch.setattr(p.plugins, "observe", lambda event: heard.append(event.message))

    def interrupted(event: Event) -> None:
        if event.kind == "progress" and not any("safe point" in message for message in heard):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedRun):
        p.run("train", arch="topk", k=4, d_sae=64, steps=500, ce_windows=0, emit=interrupted, offline=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert any("safe point" in message for message in heard)


def rows_pyarrow(path: Path) -> int:
    return importlib.import_module("pyarrow.parquet").read_table(path).num_rows


def rows_pandas(path: Path) -> int:
    return len(pytest.importorskip("pandas").read_parquet(path))


def rows_polars(path: Path) -> int:
    return pytest.importorskip("polars", reason="polars is not installed").read_parquet(path).height


def rows_duckdb(path: Path) -> int:
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    return len(duckdb.execute("select * from read_parquet(?)", [str(path)]).fetchall())


@pytest.mark.parametrize("read", [rows_pyarrow, rows_pandas, rows_polars, rows_duckdb])
def test_every_table_of_a_project_opens(demo: Path, read: Callable[[Path], int]) -> None:
    tables = sorted(demo.rglob("*.parquet"))
    rows = {path.name: read(path) for path in tables}
    assert {"documents.parquet", "windows.parquet", "metrics.parquet", "latents.parquet", "effects.parquet"} <= set(
        rows
    )
    assert rows["documents.parquet"] == 30 and rows["latents.parquet"] == 2048


def test_no_column_is_of_a_kind_that_only_arrow_knows(demo: Path) -> None:
    parquet = importlib.import_module("pyarrow.parquet")
    plain = {"int32", "int64", "float", "double", "bool", "string", "null"}
    allowed = plain | {f"list<element: {kind}>" for kind in plain}
    for path in demo.rglob("*.parquet"):
        odd = {field.name: str(field.type) for field in parquet.read_schema(path) if str(field.type) not in allowed}
        assert not odd, path.name


def test_the_names_are_lazy_and_a_star_import_hides_nothing() -> None:
    assert "open" in dir(g) and "open" not in g.__all__ and callable(g.open)
    with pytest.raises(AttributeError):
        _ = g.nothing  # type: ignore[attr-defined]
