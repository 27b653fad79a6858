"""The other implementations: sparsify and dictionary_learning open what greatctl exports, and greatctl what they save;
SAELens's loaders of Llama Scope and Gemma Scope find in a folder what greatctl finds.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from sae_folders import rows
from sae_folders_foreign import gemma_scope, gemma_scope_2, llama_scope
from safetensors.torch import load_file, save_file
from test_formats import TO_DICTIONARY, TO_SPARSIFY, finished

from greatctl.sae.folder import LoadedSAE, export, load

pytestmark = pytest.mark.slow  # importing the peers takes a quarter of a minute
ROOT = Path(__file__).resolve().parents[1]
ATOL = 1e-5
COMMON = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
root = Path(sys.argv[1])
x = load_file(root / "x.safetensors")["x"]
found = {}
def keep(name, latents, rebuilt):
    found[name + "/latents"], found[name + "/rebuilt"] = latents.detach().contiguous(), rebuilt.detach().contiguous()
def shake(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
"""
SPARSIFY = (
    COMMON
    + """
from sparsify import SparseCoder, SparseCoderConfig
def read(name, folder):
    sae = SparseCoder.load_from_disk(folder)
    acts, places, pre_acts = sae.encode(x)
    keep(name, torch.zeros_like(pre_acts).scatter(1, places, acts), sae(x).sae_out)
for folder in sorted((root / "ours").glob("*/exports/sparsify/*")):
    read("ours/" + folder.parents[2].name, folder)
for name, hook, more in (("plain", "layers.1", {}), ("skip", "layers.1", {"skip_connection": True}),
        ("transcode", "layers.1.mlp", {"transcode": True}),
        ("both", "layers.1.mlp", {"transcode": True, "skip_connection": True}),
        ("many", "layers.1.self_attn", {"num_latents": 40})):
    sae = SparseCoder(x.shape[1], SparseCoderConfig(expansion_factor=3, k=4, **more))
    shake(sae)
    sae.save_to_disk(root / "theirs" / name / hook)
    read("theirs/" + name, root / "theirs" / name / hook)
save_file(found, root / "out.safetensors")
"""
)
DICTIONARY = (
    COMMON
    + """
from unittest.mock import MagicMock
for package in ("nnsight", "datasets", "zstandard", "wandb"):  # which it imports for training alone
    try:
        __import__(package)
    except ImportError:
        sys.modules[package] = MagicMock()
from dictionary_learning import utils
d, F, K = x.shape[1], 40, 4
def read(name, folder):
    ae, _ = utils.load_dictionary(str(folder), "cpu")
    latents = ae.encode(x)
    keep(name, latents, ae.decode(latents))
for folder in sorted((root / "ours").glob("*/exports/dictionary_learning/trainer_0")):
    read("ours/" + folder.parents[2].name, folder)
for cls, more in ((utils.AutoEncoder, ()), (utils.AutoEncoderNew, ()), (utils.GatedAutoEncoder, ()),
        (utils.JumpReluAutoEncoder, ()), (utils.AutoEncoderTopK, (K,)), (utils.BatchTopKSAE, (K,)),
        (utils.MatryoshkaBatchTopKSAE, (K, [10, 30]))):
    ae, folder = cls(d, F, *more), root / "theirs" / cls.__name__ / "trainer_0"
    shake(ae)
    if "BatchTopK" in cls.__name__:
        ae.threshold.fill_(0.3)
    folder.mkdir(parents=True)
    torch.save(ae.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": cls.__name__, "activation_dim": d, "dict_size": F, "layer": 1, "lm_name": "toy"}
    trainer |= {"k": K} if more else {}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out"}}))
    read("theirs/" + cls.__name__, folder)
save_file(found, root / "out.safetensors")
"""
)
RELEASES = (  # SAELens has loaders of the released suites; its downloads are turned to the folders here
    COMMON
    + """
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.registry import get_sae_class
from safetensors import safe_open
releases = root / "releases"
def shapes(repo_id, filename):
    with safe_open(releases / filename, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}
loaders.hf_hub_download = lambda repo_id, filename, subfolder="", **more: str(releases / subfolder / filename)
loaders.get_safetensors_tensor_shapes = shapes
for load, repo_id, folder, more in json.loads(sys.argv[2]):
    cfg, state, _ = getattr(loaders, load)(repo_id, folder, "cpu", False, {"dtype": "float32", **more})
    cls, settings = get_sae_class(cfg["architecture"])
    sae = cls(settings.from_dict(loaders.handle_config_defaulting(cfg)))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state, assign=True)
    if cfg["normalize_activations"] == "expected_average_only_in":
        norm = json.loads((releases / folder / "hyperparams.json").read_text())["dataset_average_activation_norm"]["in"]
        sae.fold_activation_norm_scaling_factor(cfg["d_in"] ** 0.5 / norm)
    keep(folder, sae.encode(x), sae(x))
save_file(found, root / "out.safetensors")
"""
)
SIZES = {"d_in": 12, "d_sae": 40}
RELEASED = {  # SAELens's loader, repository, folder, what it would look up by the repository's name
    "Llama Scope": ("llama_scope_sae_huggingface_loader", "any/any", "Llama3_1-8B-Base-L3R-8x", {}),
    "Gemma Scope": (
        "gemma_2_sae_huggingface_loader",
        "google/gemma-scope-2b-pt-res",
        "layer_20/width_16k/average_l0_71",
        {**SIZES, "normalize_activations": "none"},
    ),
    "Gemma Scope 2": (
        "gemma_3_sae_huggingface_loader",
        "google/gemma-scope-2-1b-pt",
        "resid_post/layer_3_width_16k",
        {},
    ),
    "Gemma Scope 2 transcoder": (
        "gemma_3_sae_huggingface_loader",
        "google/gemma-scope-2-1b-pt",
        "transcoder/layer_3_width_16k_affine",
        {},
    ),
}
Theirs = tuple[Path, dict[str, torch.Tensor]]


def peer(root: Path, name: str, program: str, architectures: Sequence[str] = (), *words: str) -> Theirs:
    """Export ours, let the peer open them and save its own; one process for all. `words` are the program's."""
    named = os.environ.get(f"GREATCTL_{name.upper()}_PYTHON")
    python = Path(named) if named else ROOT / ".bench" / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment with {name} (set GREATCTL_{name.upper()}_PYTHON to its python)")
    for architecture in architectures:
        export(finished(root / "ours" / architecture, architecture), name)
    save_file({"x": rows() / 3.7}, root / "x.safetensors")
    done = subprocess.run(
        [str(python), "-c", program, str(root), *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return root, load_file(root / "out.safetensors")


@pytest.fixture(scope="module")
def sparsify(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    return peer(tmp_path_factory.mktemp("sparsify"), "sparsify", SPARSIFY, TO_SPARSIFY)


@pytest.fixture(scope="module")
def dictionary_learning(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    return peer(tmp_path_factory.mktemp("dictionaries"), "dictionary_learning", DICTIONARY, TO_DICTIONARY)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    root = tmp_path_factory.mktemp("released")
    folders = {name: root / "releases" / words[2] for name, words in RELEASED.items()}
    llama_scope(folders["Llama Scope"])
    gemma_scope(folders["Gemma Scope"])
    gemma_scope_2(folders["Gemma Scope 2"])
    gemma_scope_2(
        folders["Gemma Scope 2 transcoder"],
        hf_hook_point_in="model.layers.3.pre_feedforward_layernorm.output",
        hf_hook_point_out="model.layers.3.post_feedforward_layernorm.output",
        affine_connection=True,
    )
    return peer(root, "saelens", RELEASES, (), json.dumps(list(RELEASED.values())))


def agrees(sae: LoadedSAE, found: dict[str, torch.Tensor], name: str) -> None:
    """Latents and outputs within 1e-5."""
    x = rows() / 3.7
    latents, rebuilt = found[f"{name}/latents"], found[f"{name}/rebuilt"]
    assert torch.allclose(sae.encode(x), latents, atol=ATOL, rtol=0)
    assert torch.allclose(sae.reconstruct(x), rebuilt, atol=ATOL, rtol=0)
    assert 0.02 < float((latents > 0).float().mean()) < 0.9


@pytest.mark.parametrize("name", TO_SPARSIFY)
def test_sparsify_opens_our_export(sparsify: Theirs, name: str) -> None:
    root, found = sparsify
    (folder,) = (root / "ours" / name / "exports" / "sparsify").iterdir()
    agrees(load(folder), found, f"ours/{name}")
    if name == "topk":  # where nothing is lost, against the SAE itself
        agrees(load(root / "ours" / name), found, f"ours/{name}")


@pytest.mark.parametrize("name", ["plain", "skip", "transcode", "both", "many"])
def test_we_open_what_sparsify_saved(sparsify: Theirs, name: str) -> None:
    root, found = sparsify
    (folder,) = (root / "theirs" / name).iterdir()
    sae = load(folder)
    agrees(sae, found, f"theirs/{name}")
    assert sae.hook_point is not None and sae.hook_point.startswith("blocks.1.")


@pytest.mark.parametrize("name", TO_DICTIONARY)
def test_dictionary_learning_opens_our_export(dictionary_learning: Theirs, name: str) -> None:
    root, found = dictionary_learning
    agrees(load(root / "ours" / name), found, f"ours/{name}")


@pytest.mark.parametrize(
    "name",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
        "GatedAutoEncoder",
    ],
)
def test_we_open_what_dictionary_learning_saved(dictionary_learning: Theirs, name: str) -> None:
    root, found = dictionary_learning
    sae = load(root / "theirs" / name / "trainer_0")
    agrees(sae, found, f"theirs/{name}")
    assert sae.hook_point == "blocks.1.hook_resid_post"


@pytest.mark.parametrize("name", RELEASED)
def test_we_find_in_a_release_what_saelens_finds(released: Theirs, name: str) -> None:
    root, found = released
    folder = RELEASED[name][2]
    agrees(load(root / "releases" / folder), found, folder)
