"""The chain as a person meets it: the demo, its artifacts, kills, stale and damaged parts, real books."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MIRROR = ROOT.parent / "shared" / "mirror"
Greatctl = Callable[..., "object"]
QUICK = {"GREATCTL_TRAIN_CE_WINDOWS": "2"}  # the language model's loss is measured elsewhere


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **QUICK}


def _copy(demo: Path, target: Path) -> Path:
    shutil.copytree(demo, target / "project")
    return target / "project"


def _bytes(folder: Path) -> dict[str, bytes]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "run.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def _spawn(project: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "greatctl", "-C", str(project), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(), cwd=project
    )


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before it could be disturbed: " + (process.communicate()[1] or "")
        assert time.monotonic() < end, "it never got there"
        time.sleep(0.02)


def test_the_demo_ends_with_a_report_and_three_hedged_findings(demo: Path) -> None:
    document = json.loads((demo.parent / "demo.json").read_text())
    summary = document["summary"]
    assert document["ok"] and document["stage"] == "demo"
    assert set(summary) >= {"project", "report", "findings", "seconds"}
    assert len(summary["findings"]) == 3
    assert "subject" in " ".join(summary["findings"])
    html = Path(summary["report"]).read_text()
    assert 'http-equiv="Content-Security-Policy"' in html and "Latent" in html


def test_everything_is_up_to_date_after_the_demo_and_verifies(greatctl: Greatctl, demo: Path) -> None:
    rows = greatctl("-C", demo, "status", "--json", cwd=demo).document["summary"]["artifacts"]
    stale = [(r["path"], r["reason"]) for r in rows if r["state"] != "up-to-date"]
    assert stale == []
    assert {r["stage"] for r in rows} == {"fetch", "tokenize", "harvest", "train", "interpret", "patch", "report"}
    assert greatctl("-C", demo, "verify", "--json", cwd=demo).document["summary"]["damaged"] == []


def test_nothing_half_written_is_left_behind(demo: Path) -> None:
    stray = [p for p in demo.rglob("*") if ".partial" in p.name or p.name.startswith(".tmp") or p.name.endswith(".old")]
    assert stray == []


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["fetch"], {"sources", "text_bytes", "tokens_estimate", "activation_bytes_per_layer"}),
        (["tokenize"], {"n_windows", "n_tokens", "window", "tokenizer"}),
        (["harvest"], {"n_tokens", "d_model", "hook_point", "dtype", "shards", "tokens_per_second"}),
        (
            ["train"],
            {
                "name", "arch", "d_sae", "l0", "explained_variance", "dead_fraction", "ce_loss_recovered", "steps",
                "tokens_per_second",
            },
        ),
        (["interpret"], {"n_latents", "hypotheses"}),
        (["interpret", "--text", "He kept his head.", "--top-k", "5"], {"tokens", "top"}),
        (["patch"], {"n_pairs", "n_refused", "metric", "site", "n_layers", "n_positions", "clean", "corrupted", "peak"}),
        (["report"], {"path", "bytes"}),
    ],
)  # fmt: skip
def test_each_stage_prints_one_document_with_its_fixed_keys(
    greatctl: Greatctl, demo: Path, words: list[str], keys: set[str]
) -> None:
    out = greatctl("-C", demo, *words, "--json", cwd=demo)
    assert out.code == 0, out.out + out.err
    document = out.document
    assert document["ok"] is True and document["stage"] == words[0]
    assert set(document["summary"]) >= keys
    if "--text" in words:
        assert document["artifact"] is None
        assert {"token", "latent", "activation"} <= set(document["summary"]["top"][0])
        assert "".join(document["summary"]["tokens"]).strip() == "He kept his head."
    else:
        assert Path(document["artifact"]).is_absolute()


def test_one_edited_setting_makes_its_stage_and_the_later_ones_stale(
    greatctl: Greatctl, demo: Path, tmp_path: Path
) -> None:
    project = _copy(demo, tmp_path)
    manifest = project / "sources.toml"
    manifest.write_text(manifest.read_text().replace("k = 32", "k = 16"))
    rows = greatctl("-C", project, "status", "--json", cwd=project).document["summary"]["artifacts"]
    states = {r["stage"]: (r["state"], r["reason"]) for r in rows}
    assert states["tokenize"][0] == states["harvest"][0] == "up-to-date"
    assert states["train"] == ("stale", "config.k 32 -> 16")
    assert states["interpret"][0] == "stale" and states["interpret"][1].endswith("which is stale")
    assert states["report"][0] == "stale" and "made from" in states["report"][1]
    assert states["patch"][0] == "up-to-date"


def test_a_moved_project_stays_up_to_date(greatctl: Greatctl, demo: Path, tmp_path: Path) -> None:
    project = _copy(demo, tmp_path)
    rows = greatctl("-C", project, "status", "--json", cwd=project).document["summary"]["artifacts"]
    assert [r for r in rows if r["state"] != "up-to-date"] == []


def test_one_flipped_bit_is_named_refused_and_mended(greatctl: Greatctl, demo: Path, tmp_path: Path) -> None:
    project = _copy(demo, tmp_path)
    shard = sorted(project.rglob("shard-*.safetensors"))[0]
    before = _bytes(shard.parent)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(bytes(data))
    verify = greatctl("-C", project, "verify", "--json", cwd=project)
    assert verify.code == 6 and shard.name in json.dumps(verify.error)
    train = greatctl("-C", project, "train", "--name", "again", "--json", cwd=project)
    assert train.code == 6 and shard.name in json.dumps(train.error)
    assert greatctl("-C", project, "harvest", "--json", cwd=project).code == 0
    assert _bytes(shard.parent) == before
    assert greatctl("-C", project, "verify", "--json", cwd=project).code == 0


def test_kill_in_the_middle_of_train_ends_with_the_same_bytes(greatctl: Greatctl, demo: Path, tmp_path: Path) -> None:
    words = ["train", "--steps", "30", "--d-sae", "256", "--checkpoint-every", "5", "--batch-size", "256"]
    words += ["--name", "calm"]
    calm, killed = _copy(demo, tmp_path / "calm"), _copy(demo, tmp_path / "killed")
    assert greatctl("-C", calm, *words, cwd=calm, env=QUICK).code == 0
    process = _spawn(killed, *words)
    checkpoints = killed / "results" / "saes" / ".calm.partial" / "checkpoints"
    _wait_for(lambda: checkpoints.is_dir() and len(list(checkpoints.iterdir())) > 1, process)
    process.kill()
    process.communicate()
    assert not (killed / "results" / "saes" / "calm").exists()
    assert greatctl("-C", killed, *words, cwd=killed, env=QUICK).code == 0
    assert _bytes(calm / "results" / "saes" / "calm") == _bytes(killed / "results" / "saes" / "calm")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_polite_signal_stops_after_a_checkpoint(
    greatctl: Greatctl, demo: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    project = _copy(demo, tmp_path)
    words = ["train", "--steps", "4000", "--d-sae", "256", "--batch-size", "256", "--name", "long", "--json"]
    process = _spawn(project, *words)
    partial = project / "results" / "saes" / ".long.partial"
    _wait_for(partial.is_dir, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    error = json.loads(out)["error"]
    assert error["code"] == "interrupted" and "again" in error["fix"]
    assert not (project / "results" / "saes" / "long").exists()


def test_a_second_signal_stops_at_once_and_a_hangup_after_a_checkpoint(demo: Path, tmp_path: Path) -> None:
    words = ["train", "--steps", "4000", "--d-sae", "256", "--batch-size", "256", "--name", "long"]
    for signals, codes in (([signal.SIGINT, signal.SIGINT], (130,)), ([signal.SIGHUP], (129,))):
        project = _copy(demo, tmp_path / str(len(signals)))
        process = _spawn(project, *words)
        _wait_for((project / "results" / "saes" / ".long.partial").is_dir, process)
        began = time.monotonic()
        for number in signals:
            process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode in codes
        assert time.monotonic() - began < 30
        assert not (project / "results" / "saes" / "long").exists()


def test_a_paused_run_goes_on(greatctl: Greatctl, demo: Path, tmp_path: Path) -> None:
    project = _copy(demo, tmp_path)
    words = ["train", "--steps", "20", "--d-sae", "64", "--k", "4", "--batch-size", "128", "--name", "paused"]
    process = _spawn(project, *words)
    _wait_for((project / "results" / "saes" / ".paused.partial").is_dir, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=120)
    assert process.returncode == 0


def test_two_processes_on_one_artifact_are_told_apart(greatctl: Greatctl, demo: Path, tmp_path: Path) -> None:
    project = _copy(demo, tmp_path)
    words = ["train", "--steps", "4000", "--d-sae", "256", "--batch-size", "256", "--name", "mine"]
    first = _spawn(project, *words)
    _wait_for((project / "results" / "saes" / ".mine.holder").exists, first)
    second = greatctl("-C", project, *words, "--json", cwd=project, env=QUICK)
    assert second.code == 10 and str(first.pid) in second.error["why"]
    first.kill()
    first.communicate()


def test_random_schedules_end_as_some_serial_run_would(greatctl: Greatctl, demo: Path, tmp_path: Path) -> None:
    """Three commands at once, in several orders: each ends well or is told to wait, and nothing is torn."""
    project = _copy(demo, tmp_path)
    commands = [["report", "--force"], ["interpret"], ["tokenize", "--window", "64"]]
    for seed in range(2):
        random.Random(seed).shuffle(commands)
        running = [_spawn(project, *words) for words in commands]
        for process in running:
            process.communicate()
            assert process.returncode in (0, 10)
    assert greatctl("-C", project, "verify", cwd=project).code == 0


@pytest.fixture(scope="module")
def mirror() -> Iterator[str]:
    """The loopback server over real Gutenberg files."""
    if not (MIRROR / "serve.py").exists():
        pytest.skip("the mirror of real books is not beside this checkout (../shared/mirror)")
    process = subprocess.Popen([sys.executable, str(MIRROR / "serve.py")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    yield next(word for word in line.split() if word.startswith("http")).rstrip("/")
    process.kill()
    process.communicate()


def test_real_books_to_a_report(greatctl: Greatctl, mirror: str, tmp_path: Path) -> None:
    """The chain on two real books, cut short so that it stays a test: a small autoencoder, one pair."""
    assert greatctl("init", cwd=tmp_path).code == 0
    controls = ["--control", "wood-common-objects"]
    people = ["--source", "darwin-autobiography"]
    out = greatctl("fetch", *people, *controls, "--mirror", mirror, "--json", cwd=tmp_path)
    assert out.code == 0, out.out + out.err
    pair = [
        "--clean",
        "The brave man was a",
        "--corrupted",
        "The idle man was a",
        "--answer",
        " great",
        "--wrong-answer",
    ]
    stages = [
        ["tokenize", "--model", "bundled"],
        ["harvest", "--batch-size", "32"],
        ["train", "--arch", "topk", "--d-sae", "512", "--steps", "30", "--batch-size", "1024"],
        ["interpret"],
        ["patch", "--metric", "logit-diff", *pair, " poor"],
        ["report"],
    ]
    for stage in stages:
        out = greatctl(*stage, "--json", cwd=tmp_path, timeout=600)
        assert out.code == 0, (stage, out.out, out.err)
    assert "Darwin" in Path(out.document["summary"]["path"]).read_text()
