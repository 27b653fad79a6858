"""The other implementation: SAELens opens our folders (and some that it might have written) and computes the same."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from sae_folders import ARCHITECTURES, BOTH, FOREIGN, ORIGIN, coder_of, foreign, rows
from safetensors.torch import load_file, save_file

from greatctl.sae.folder import load, save

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import sys, torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file
x = load_file(sys.argv[1])["x"]
found = {}
for folder in sys.argv[3:]:
    sae = SAE.load_from_disk(folder).float()  # a bfloat16 file too: the arithmetic is to be compared
    sae.dtype = torch.float32
    with torch.no_grad():
        found[folder + "/latents"], found[folder + "/rebuilt"] = sae.encode(x), sae(x)
        found[folder + "/metadata"] = torch.tensor(list((sae.cfg.metadata.hook_name or "").encode()))
save_file({k: v.contiguous() for k, v in found.items()}, sys.argv[2])
"""


def saelens_python() -> Path | None:
    """An interpreter that has sae-lens, if one was set up."""
    named = os.environ.get("GREATCTL_SAELENS_PYTHON")
    path = Path(named) if named else ROOT / ".bench" / "saelens" / "bin" / "python"
    return path if path.exists() else None


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folders, and what SAELens finds in them: one process for all."""
    python = saelens_python()
    if python is None:
        pytest.skip("no environment with sae-lens (set GREATCTL_SAELENS_PYTHON to its python)")
    root = tmp_path_factory.mktemp("saelens")
    for name in ARCHITECTURES:
        coder = coder_of(name)
        save(root / name, coder, 3.7, BOTH if coder.reads_target else ORIGIN, target_scale=0.3)
    for name in FOREIGN:
        foreign(root / f"their-{name}", name)
    folders = [root / name for name in (*ARCHITECTURES, *(f"their-{name}" for name in FOREIGN))]
    save_file({"x": rows() / 3.7}, root / "x.safetensors")
    command = [python, "-c", CHECK, root / "x.safetensors", root / "out.safetensors", *folders]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return root, load_file(root / "out.safetensors")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saelens_reads_our_folder_and_computes_the_same(theirs: tuple, name: str) -> None:
    root, found = theirs
    sae, x = load(root / name), rows() / 3.7
    assert torch.allclose(found[f"{root / name}/latents"], sae.encode(x), atol=1e-5)
    assert torch.allclose(found[f"{root / name}/rebuilt"], sae.reconstruct(x), atol=1e-5)
    assert float((sae.encode(x) > 0).float().mean()) > 0.02
    assert bytes(found[f"{root / name}/metadata"].tolist()).decode() == ORIGIN.hook_point


@pytest.mark.parametrize("name", FOREIGN)
def test_we_read_what_saelens_might_have_written(theirs: tuple, name: str) -> None:
    root, found = theirs
    folder = root / f"their-{name}"
    sae, x = load(folder), rows() / 3.7
    assert torch.allclose(found[f"{folder}/latents"], sae.encode(x), atol=1e-5)
    assert torch.allclose(found[f"{folder}/rebuilt"], sae.reconstruct(x), atol=1e-5)
