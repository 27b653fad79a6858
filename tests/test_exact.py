"""The float32 truth that two ways of rounding are measured against, and what is decided by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llama import save_tiny

from greatctl.model import load
from greatctl.model.exact import exact
from greatctl.model.lean import LeanModel
from greatctl.model.oracle import row_difference

SITES = ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_post"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(path)
    return path


def tokens() -> torch.Tensor:
    return torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(0))


def test_the_truth_of_a_bfloat16_model_is_its_weights_in_float32(folder: Path) -> None:
    half = load(folder, name="tiny", dtype="bfloat16")
    whole = load(folder, name="tiny", dtype="float32")
    assert isinstance(half, LeanModel) and isinstance(whole, LeanModel)
    for ours, theirs in zip(whole._decoder.parameters(), half._decoder.parameters(), strict=True):
        ours.data.copy_(theirs.data)
    truth = exact(half._family, half._homes, tokens(), SITES)  # type: ignore[arg-type]
    expected = whole.capture(tokens(), SITES)
    for site in SITES:
        torch.testing.assert_close(truth[site], expected[site], rtol=1e-5, atol=1e-5)
        assert row_difference(half.capture(tokens(), SITES)[site], truth[site]) > 1e-4
    assert next(half._decoder.layers[0].parameters()).dtype == torch.bfloat16


def test_faster_rows_are_taken_when_as_near_to_the_truth_and_refused_when_not(folder: Path) -> None:
    model = load(folder, name="tiny", dtype="bfloat16")
    assert isinstance(model, LeanModel)
    plain = model.capture(tokens(), SITES)
    truth = exact(model._family, model._homes, tokens(), SITES)  # type: ignore[arg-type]
    other_way = {site: truth[site] + (truth[site] - plain[site].float()) for site in SITES}  # as far, elsewhere
    worse = {site: truth[site] + 2 * (plain[site].float() - truth[site]) for site in SITES}
    assert model._as_exact(tokens(), SITES, other_way, plain)
    assert not model._as_exact(tokens(), SITES, worse, plain)
    assert not model._as_exact(tokens(), ["blocks.1.hook_attn_out"], {}, {})
