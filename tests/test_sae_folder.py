"""A trained SAE's folder: the SAELens layout as it is written, and what of it is read and refused."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from sae_folders import ARCHITECTURES, BOTH, D_IN, D_OUT, D_SAE, FOREIGN, ORIGIN, coder_of, foreign, rows
from safetensors.torch import load_file, save_file
from torch import Tensor

from greatctl.errors import InputError, IntegrityError, StageError
from greatctl.sae.coder import Coder, CoderConfig
from greatctl.sae.folder import export, load, save
from greatctl.sae.layout import LAYOUTS

FOUR = {"W_enc": [D_IN, D_SAE], "b_enc": [D_SAE], "W_dec": [D_SAE, D_IN], "b_dec": [D_IN]}
WRITTEN = {**FOUR, "W_dec": [D_SAE, D_OUT], "b_dec": [D_OUT]}
THRESHOLD = {"threshold": [D_SAE]}
TENSORS = {
    "relu": FOUR,
    "gated": {**{k: v for k, v in FOUR.items() if k != "b_enc"}, "b_gate": [D_SAE], "b_mag": [D_SAE], "r_mag": [D_SAE]},
    "topk": FOUR,
    "batchtopk": FOUR | THRESHOLD,
    "jumprelu": FOUR | THRESHOLD,
    "matryoshka": FOUR | THRESHOLD,
    "transcoder": WRITTEN | THRESHOLD,
    "skip-transcoder": WRITTEN | THRESHOLD | {"W_skip": [D_OUT, D_IN]},
}
KEYS = {"architecture", "d_in", "d_sae", "dtype", "device", "metadata"}
KEYS |= {"apply_b_dec_to_input", "normalize_activations", "reshape_activations"}
EXTRA = {"topk": {"k", "rescale_acts_by_decoder_norm"}, "transcoder": {"d_out"}, "skip-transcoder": {"d_out"}}
each = pytest.mark.parametrize("name", ARCHITECTURES)


class Soft(Coder):
    """A plugin's architecture, unknown to the layout."""

    name = "soft"
    Config = CoderConfig

    def encode(self, x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(self.pre_acts(x))


class Registered:
    """A registry with one architecture."""

    def get(self, kind: str, name: str) -> type:
        assert (kind, name) == ("architectures", "soft")
        return Soft


def saved(folder: Path, name: str, scale: float = 2.0) -> tuple[Path, dict, dict[str, Tensor]]:
    """A saved architecture: folder, cfg.json, tensors."""
    coder = coder_of(name)
    save(folder / name, coder, scale, BOTH if coder.reads_target else ORIGIN, target_scale=0.3)
    cfg = json.loads((folder / name / "cfg.json").read_text())
    return folder / name, cfg, load_file(folder / name / "sae_weights.safetensors")


def changed(folder: Path, **change: object) -> Path:
    """The folder with other values in cfg.json (None: the key is gone)."""
    path = folder / "cfg.json"
    cfg = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))
    return folder


def with_tensors(folder: Path, **change: Tensor | None) -> Path:
    """The folder with other tensors (None: gone)."""
    path = folder / "sae_weights.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return folder


# ---------------------------------------------------------------- written


@each
def test_the_files_have_the_keys_and_tensors_of_the_layout_and_nothing_else(tmp_path: Path, name: str) -> None:
    folder, cfg, tensors = saved(tmp_path, name)
    assert sorted(p.name for p in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert set(cfg) == KEYS | EXTRA.get(name, set())
    assert cfg["architecture"] == ARCHITECTURES[name][2] and cfg["dtype"] == "float32"
    assert (cfg["normalize_activations"], cfg["reshape_activations"], cfg["device"]) == ("none", "none", "cpu")
    assert {k: list(v.shape) for k, v in tensors.items()} == TENSORS[name]
    assert all(v.dtype == torch.float32 for v in tensors.values())
    meta = cfg["metadata"]
    assert int(meta["sae_lens_version"].split(".")[0]) >= 6  # an older or missing version loses the metadata there
    assert meta["training_architecture"] == name and meta["training_architecture_details"]
    assert (meta["hook_name"], meta["seqpos_slice"]) == (ORIGIN.hook_point, [None])
    assert b"__metadata__" not in (folder / "sae_weights.safetensors").read_bytes()[:4000]


@each
def test_a_saved_coder_reads_raw_rows_as_it_read_scaled_ones(tmp_path: Path, name: str) -> None:
    coder, x = coder_of(name), rows() / 3.7
    out = 0.3 if coder.reads_target else 3.7
    save(tmp_path, coder, 3.7, BOTH if coder.reads_target else ORIGIN, target_scale=0.3)
    sae = load(tmp_path)
    coder.eval()
    with torch.no_grad():
        latents, expected = coder.encode(3.7 * x), coder.reconstruct(3.7 * x) / out
        contributions = latents[:, :, None] * coder.W_dec / out
    found = sae.encode(x)
    assert torch.allclose(sae.reconstruct(x), expected, atol=1e-5)
    assert float((found > 0).float().mean()) > 0.02 and torch.equal(found > 0, latents > 0)
    assert torch.allclose(found[:, :, None] * sae.W_dec, contributions, atol=1e-5)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-5)
    assert (sae.arch, sae.d_in, sae.d_sae, sae.d_out) == (name, D_IN, D_SAE, D_OUT if coder.reads_target else D_IN)
    assert sae.hook_point == ORIGIN.hook_point
    assert sae.target_hook_point == (BOTH.target_hook_point if coder.reads_target else None)


def test_a_transcoder_names_its_width_and_target_and_leaves_its_input_as_it_is(tmp_path: Path) -> None:
    for name in ("transcoder", "skip-transcoder"):
        _, cfg, _ = saved(tmp_path, name)
        assert cfg["apply_b_dec_to_input"] is False and cfg["d_out"] == D_OUT
        assert cfg["metadata"]["hook_name_out"] == BOTH.target_hook_point
    assert saved(tmp_path, "topk")[1]["apply_b_dec_to_input"] is True


def test_the_threshold_of_a_batch_is_repeated_and_that_of_a_latent_is_its_own(tmp_path: Path) -> None:
    for name in ("batchtopk", "matryoshka", "transcoder"):
        assert len(saved(tmp_path, name)[2]["threshold"].unique()) == 1
    own = saved(tmp_path, "jumprelu", scale=2.0)[2]["threshold"]
    assert torch.allclose(own, coder_of("jumprelu").threshold.detach() / 2) and len(own.unique()) == D_SAE


def test_topk_is_written_without_rescaling_and_with_unit_rows(tmp_path: Path) -> None:
    _, cfg, tensors = saved(tmp_path, "topk")
    assert cfg["k"] == 4 and cfg["rescale_acts_by_decoder_norm"] is False
    assert torch.allclose(tensors["W_dec"].norm(dim=1), torch.ones(D_SAE), atol=1e-5)


def test_a_zero_decoder_row_stays_zero_and_finite_when_folded(tmp_path: Path) -> None:
    coder = coder_of("relu")
    with torch.no_grad():
        coder.W_dec[3] = 0
    save(tmp_path / "sae", coder, 2.0, ORIGIN)
    sae = load(tmp_path / "sae")
    assert float(sae.W_dec[3].norm()) == 0 and bool(torch.isfinite(sae.encode(rows())).all())


def test_weights_that_are_not_finite_are_neither_saved_nor_read(tmp_path: Path) -> None:
    coder = coder_of("topk")
    save(tmp_path / "good", coder, 1.0, ORIGIN)
    with torch.no_grad():
        coder.W_enc[0, 0] = float("nan")
    with pytest.raises(StageError, match="not finite") as caught:
        save(tmp_path / "bad", coder, 1.0, ORIGIN)
    assert "W_enc" in caught.value.why and not (tmp_path / "bad" / "cfg.json").exists()
    with pytest.raises(IntegrityError) as damaged:
        load(with_tensors(tmp_path / "good", b_enc=torch.full((D_SAE,), float("inf"))))
    assert "b_enc" in damaged.value.why


# ---------------------------------------------------------------- read


def test_the_reader_s_formulas_hold_where_greatctl_does_not_write_them(tmp_path: Path) -> None:
    for name in FOREIGN:
        t, x = foreign(tmp_path / name, name), rows()
        p = x @ t["W_enc"] + t["b_enc"]
        norms, skip = torch.ones(D_SAE), torch.zeros(())
        if name == "topk":
            norms = t["W_dec"].norm(dim=1)
            p = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norms
            a = torch.stack([row.clamp_min(0) * (row >= row.sort().values[-5]) for row in p])
        elif name == "jumprelu":
            a = p.clamp_min(0) * (p > t["threshold"])
        else:
            a = p.clamp_min(0)
        if "W_skip" in t:
            skip = x @ t["W_skip"].T
        sae = load(tmp_path / name)
        assert torch.allclose(sae.encode(x), a, atol=1e-5), name
        assert torch.allclose(sae.decode(a), (a / norms) @ t["W_dec"] + t["b_dec"], atol=1e-5), name
        assert torch.allclose(sae.reconstruct(x), (a / norms) @ t["W_dec"] + t["b_dec"] + skip, atol=1e-4), name


def test_a_bfloat16_file_keeps_its_thresholds_in_float32(tmp_path: Path) -> None:
    tensors = foreign(tmp_path / "sae", "jumprelu")
    assert load_file(tmp_path / "sae" / "sae_weights.safetensors")["W_enc"].dtype == torch.bfloat16
    x = rows(2000)
    p = x @ tensors["W_enc"] + tensors["b_enc"]
    assert not torch.equal(p > tensors["threshold"], p > tensors["threshold"].bfloat16().float())
    assert torch.equal(load(tmp_path / "sae").encode(x) > 0, (p > tensors["threshold"]) & (p > 0))


@pytest.mark.parametrize(
    "architecture", ["abstopk", "matching_pursuit", "batchtopk", "matryoshka_batchtopk", "unknown"]
)
def test_an_architecture_that_is_not_known_is_refused_by_name(tmp_path: Path, architecture: str) -> None:
    with pytest.raises(InputError, match=f"'{architecture}' cannot be read") as caught:
        load(changed(saved(tmp_path, "topk")[0], architecture=architecture))
    assert caught.value.exit_code == 5
    assert ("checkpoint" in caught.value.why) == ("batchtopk" in architecture)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in"),
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
        ({"dtype": "int8"}, "int8"),
        ({"metadata": None}, "earlier SAELens"),
        ({"metadata": {"sae_lens_version": "5.10.0"}}, "earlier SAELens"),
    ],
)
def test_settings_that_would_misread_the_weights_are_refused_by_name(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load(changed(saved(tmp_path, "topk")[0], **change))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("topk", {"d_sae": 41}, "W_enc is"),
        ("topk", {"k": None}, "k None"),
        ("topk", {"metadata": ["6.1.0"]}, "metadata is no object"),
        ("topk", {"k": 41}, "above d_sae"),
        ("topk", {"d_in": None}, "missing: d_in"),
        ("topk", {"dtype": None}, "missing: dtype"),
        ("topk", {"d_in": "12"}, "d_in '12'"),
        ("transcoder", {"d_out": None}, "d_out None"),
        ("transcoder", {"apply_b_dec_to_input": True}, "bias of its output"),
        ("transcoder", {"apply_b_dec_to_input": None}, "bias of its output"),
        ("skip-transcoder", {"architecture": "jumprelu_transcoder"}, "W_skip is .* does not have"),
        ("jumprelu", {"architecture": "standard"}, "threshold is .* does not have"),
        ("relu", {"architecture": "jumprelu"}, "threshold is missing"),
        ("gated", {"architecture": "standard"}, "b_enc is missing"),
    ],
)
def test_a_cfg_that_does_not_fit_its_tensors_is_damage(tmp_path: Path, name: str, change: dict, words: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        load(changed(saved(tmp_path, name)[0], **change))
    assert re.search(words, caught.value.why), caught.value.why


def test_a_scaling_factor_is_tolerated_where_it_changes_nothing(tmp_path: Path) -> None:
    folder, _, _ = saved(tmp_path, "relu")
    before = load(folder).encode(rows())
    assert torch.equal(load(with_tensors(folder, scaling_factor=torch.ones(D_SAE))).encode(rows()), before)
    with pytest.raises(IntegrityError) as caught:
        load(with_tensors(folder, scaling_factor=torch.full((D_SAE,), 1.5)))
    assert "scaling_factor" in caught.value.why


def test_a_threshold_that_is_one_number_is_refused(tmp_path: Path) -> None:
    folder, _, _ = saved(tmp_path, "batchtopk")
    with pytest.raises(IntegrityError) as caught:
        load(with_tensors(folder, threshold=torch.tensor(0.5)))
    assert "threshold is []" in caught.value.why


def test_damaged_files_are_damage(tmp_path: Path) -> None:
    folder, _, _ = saved(tmp_path, "topk")
    whole = json.loads((folder / "cfg.json").read_text())
    for text in ("{", "[]", "{}", json.dumps({**whole, "dtype": None}), json.dumps({**whole, "architecture": None})):
        (folder / "cfg.json").write_text(text)
        with pytest.raises(IntegrityError, match="damaged"):
            load(folder)
    folder, _, _ = saved(tmp_path, "relu")
    (folder / "sae_weights.safetensors").write_bytes(b"torn")
    with pytest.raises(IntegrityError, match="damaged"):
        load(folder)


def test_a_pickle_in_the_place_of_the_weights_is_not_unpickled(tmp_path: Path) -> None:
    folder, _, _ = saved(tmp_path, "topk")
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple:
            return (canary.write_text, ("unpickled",))

    (folder / "sae_weights.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(IntegrityError):
        load(folder)
    assert not canary.exists()


def test_a_plugin_s_architecture_keeps_its_name_and_is_read_through_the_registry(tmp_path: Path) -> None:
    torch.manual_seed(0)
    coder = Soft(CoderConfig(d_in=D_IN, d_sae=D_SAE))
    save(tmp_path, coder, 1.5, ORIGIN)
    with pytest.raises(InputError, match="'soft' cannot be read") as caught:
        load(tmp_path)
    assert all(name in caught.value.why for name in LAYOUTS)
    sae = load(tmp_path, Registered())
    assert (sae.arch, sae.d_out, sae.target_hook_point) == ("soft", D_IN, None)
    with torch.no_grad():
        assert torch.allclose(sae.reconstruct(rows()), coder.reconstruct(1.5 * rows()) / 1.5, atol=1e-5)


def test_exports_are_written_beside_the_folder_s_files(tmp_path: Path) -> None:
    folder, _, tensors = saved(tmp_path, "gated")
    copy = export(folder, "saelens")
    assert sorted(p.name for p in copy.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert torch.equal(load(copy).W_dec, load(folder).W_dec)
    path = export(folder, "pth")
    assert path == folder / "exports" / "gated.pth"
    assert set(torch.load(path, weights_only=True)["state_dict"]) == set(tensors)
