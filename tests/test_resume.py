"""`kill -9` and the same command again end with the bytes of a run that nothing disturbed, through the command line.

One process loads everything once and forks for each command, so that nine commands cost little more than one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from planted import dictionary, planted, project

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 40, 5
ARCHITECTURES = {
    "topk": ["--k", "3"],
    "jumprelu": ["--k", "3"],
    "ista": ["--option", "iterations=3"],
}

_NURSERY = """
import glob, json, os, sys, time
import torch, torch._dynamo, greatctl.cli, greatctl.stages.train, greatctl.sae.produce, greatctl.stages.splice
import greatctl.cli.session, greatctl.cli.views.stages, greatctl.extend.manager, greatctl.model.untrained
from greatctl.corpus import windows

def run(words, log, pattern, number):
    child = os.fork()
    if child == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1); os.dup2(out, 2)
        sys.argv = ["greatctl", *words]
        try:
            greatctl.cli.main()
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code or 0)
        os._exit(0)
    while pattern and not glob.glob(pattern):
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return "it ended before it could be disturbed"
        time.sleep(0.002)
    if pattern:
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for line in sys.stdin:
    print(json.dumps(run(*json.loads(line))), flush=True)
"""


class Nursery:
    """Runs `greatctl` commands in forks of one process."""

    def __init__(self, logs: Path) -> None:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
        )
        self.log = logs / "log"

    def __call__(self, *words: str, until: Path | None = None, number: int = signal.SIGKILL) -> int:
        """The exit code of a command, disturbed with signal `number` once the pattern `until` matches a file."""
        assert self.process.stdin and self.process.stdout
        command = [list(words), str(self.log), until and str(until), number]
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("logs"))
    yield nursery
    assert nursery.process.stdin
    nursery.process.stdin.close()
    nursery.process.wait()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny activations artifact."""
    root = tmp_path_factory.mktemp("data")
    project(root, planted(2000, dictionary(32, 16)))
    return root / "data"


def words_for(root: Path, data: Path, arch: str) -> list[str]:
    """The command line of a small run."""
    root.mkdir()
    (root / "data").symlink_to(data)
    words = ["-C", str(root), "--plugin", str(ROOT / "plugins" / "ista"), "train", "--arch", arch, "--name", "sae"]
    words += ["--d-sae", "32", "--steps", str(STEPS), "--batch-size", "128", "--ce-windows", "0"]
    return [*words, "--checkpoint-every", str(EVERY), "--device", "cpu", "--quiet", *ARCHITECTURES[arch]]


def contents(root: Path, name: str = "sae") -> dict[str, bytes]:
    """Every file of the finished SAE but run.json."""
    folder = root / "results" / "saes" / name
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "run.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fault_53_kill_9_and_resume_end_with_the_bytes_of_a_straight_run(
    nursery: Nursery, data: Path, tmp_path: Path, arch: str
) -> None:
    straight, killed = (words_for(tmp_path / name, data, arch) for name in ("straight", "killed"))
    assert nursery(*straight) == 0, nursery.log.read_text()
    work = tmp_path / "killed" / "results" / "saes" / ".sae.partial"
    assert nursery(*killed, until=work / "checkpoints" / "step-*[2-4]?.safetensors") == -signal.SIGKILL
    assert not (tmp_path / "killed" / "results" / "saes" / "sae").exists()
    points = len((work / "metrics.jsonl").read_text().splitlines())
    assert 10 <= points <= STEPS
    assert nursery(*killed, "--resume") == 0, nursery.log.read_text()
    one, other = contents(tmp_path / "straight"), contents(tmp_path / "killed")
    assert one.keys() == other.keys() and {"sae_weights.safetensors", "metrics.jsonl"} <= one.keys()
    assert [name for name in one if one[name] != other[name]] == []
    steps = [json.loads(line)["step"] for line in one["metrics.jsonl"].splitlines()]
    assert steps == list(range(STEPS))  # no gap and no duplicate


def test_a_killed_sweep_ends_with_the_bytes_of_an_undisturbed_one(nursery: Nursery, data: Path, tmp_path: Path) -> None:
    swept = ["--sweep", "arch=topk,batchtopk", "--sweep", "seed=0,1"]
    straight, killed = ([*words_for(tmp_path / name, data, "topk"), *swept] for name in ("straight", "killed"))
    for words in (straight, killed):
        del words[words.index("--arch") : words.index("--arch") + 2]
    assert nursery(*straight) == 0, nursery.log.read_text()
    saes = tmp_path / "killed" / "results" / "saes"
    pattern = saes / ".sae-topk-seed1.partial" / "checkpoints" / "step-*[1-3]?.safetensors"
    assert nursery(*killed, until=pattern) == -signal.SIGKILL
    assert not list(saes.glob("[!.]*"))
    assert nursery(*killed) == 0, nursery.log.read_text()
    for name in ("sae-topk-seed0", "sae-topk-seed1", "sae-batchtopk-seed0", "sae-batchtopk-seed1"):
        one, other = contents(tmp_path / "straight", name), contents(tmp_path / "killed", name)
        assert len(one) > 8 and one == other


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_fault_31_a_polite_signal_checkpoints_first(
    nursery: Nursery, data: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    words = words_for(tmp_path / "stopped", data, "topk")
    checkpoints = tmp_path / "stopped" / "results" / "saes" / ".sae.partial" / "checkpoints"
    slow = [*words, "--steps", "100000"]
    assert nursery(*slow, until=checkpoints / "step-*.safetensors", number=number) == code, nursery.log.read_text()
    assert max(checkpoints.glob("step-*")).stat().st_size > 0
    assert not (tmp_path / "stopped" / "results" / "saes" / "sae").exists()


def test_fault_55_a_resume_with_other_settings_or_data_is_exit_5(nursery: Nursery, data: Path, tmp_path: Path) -> None:
    words = words_for(tmp_path / "stopped", data, "topk")
    work = tmp_path / "stopped" / "results" / "saes" / ".sae.partial" / "checkpoints"
    assert nursery(*words, until=work / "step-*[2-4]?.safetensors") == -signal.SIGKILL
    for changed in (["--k", "4"], ["--lr", "0.0005"], ["--batch-size", "64"], ["--option", "aux_coefficient=0.1"]):
        assert nursery(*words, *changed, "--resume") == 5
        assert "another configuration" in nursery.log.read_text()
    project(tmp_path / "other", planted(900, dictionary(32, 16)))
    (tmp_path / "stopped" / "data").unlink()
    (tmp_path / "stopped" / "data").symlink_to(tmp_path / "other" / "data")
    assert nursery(*words, "--resume") == 5
    assert "inputs." in nursery.log.read_text()
    assert nursery(*words, "--force") == 0


def test_fault_52_cuda_that_is_not_there_is_exit_9_with_the_cpu_as_remedy(
    nursery: Nursery, data: Path, tmp_path: Path
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    words = words_for(tmp_path / "none", data, "topk")
    words[words.index("--device") + 1] = "cuda"
    assert nursery(*words) == 9 and "--device cpu" in nursery.log.read_text()
    assert not list((tmp_path / "none" / "results").rglob("step-*"))
