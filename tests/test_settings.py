"""Settings: who wins, where a value came from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from greatctl import manifest
from greatctl.errors import BugError, GreatctlError, ManifestError, UsageError
from greatctl.settings import Resolved, project_paths, resolve, resolve_device


class Config(BaseModel):
    """A stage's settings in miniature."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    k: int = Field(default=64, ge=1, le=4096)
    d_sae: int | None = Field(default=None, ge=1)
    lr: float = Field(default=1e-4, gt=0)
    arch: Literal["relu", "topk", "batchtopk"] = "batchtopk"
    hook_point: list[str] = Field(default_factory=list)
    pairs: Path | None = None
    model: str | None = None
    stream: bool = False
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.d_sae is not None and self.k > self.d_sae:
            raise ValueError(f"k = {self.k} is larger than d_sae = {self.d_sae}")
        return self


def made(tmp_path: Path, table: str = "") -> manifest.Manifest:
    path = tmp_path / "sources.toml"
    path.write_text(table, encoding="utf-8")
    return manifest.load(path)


def settle(
    tmp_path: Path,
    table: str = "",
    *,
    flags: dict[str, object] | None = None,
    env: dict[str, str] | None = None,
) -> Resolved[Config]:
    return resolve(Config, "train", flags=flags or {}, manifest=made(tmp_path, table), environ=env or {})


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    table, env, flags = "[train]\nk = 2\n", {"GREATCTL_TRAIN_K": "3"}, {"k": 4, "lr": None}
    steps = [
        (settle(tmp_path), 64, "default"),
        (settle(tmp_path, table), 2, "sources.toml [train]"),
        (settle(tmp_path, table, env=env), 3, "env GREATCTL_TRAIN_K"),
        (settle(tmp_path, table, env=env, flags=flags), 4, "flag --k"),
    ]
    for found, k, origin in steps:
        assert (found.config.k, found.origins["k"], found.origins["lr"]) == (k, origin, "default")
    assert settle(tmp_path, flags={"d_sae": 99}).origins["d_sae"] == "flag --d-sae"


def test_every_field_has_an_origin(tmp_path: Path) -> None:
    assert set(settle(tmp_path).origins) == set(Config.model_fields)


def test_seed_can_be_set_for_all_stages_and_the_stage_wins(tmp_path: Path) -> None:
    shared = {"GREATCTL_SEED": "7"}
    assert settle(tmp_path, env=shared).origins["seed"] == "env GREATCTL_SEED"
    both = settle(tmp_path, env=shared | {"GREATCTL_TRAIN_SEED": "8"})
    assert (both.config.seed, both.origins["seed"]) == (8, "env GREATCTL_TRAIN_SEED")
    assert settle(tmp_path, env={"GREATCTL_K": "7", "GREATCTL_TRAIN_K": ""}).config.k == 64


def test_values_of_the_environment_are_parsed_by_type(tmp_path: Path) -> None:
    env = {"GREATCTL_TRAIN_HOOK_POINT": "a, b", "GREATCTL_TRAIN_STREAM": "true", "GREATCTL_TRAIN_LR": "1e-3"}
    config = settle(tmp_path, env=env | {"GREATCTL_TRAIN_PAIRS": "p.toml"}).config
    assert (config.hook_point, config.stream, config.lr, config.pairs) == (
        ["a", "b"],
        True,
        1e-3,
        Path("p.toml"),
    )


@pytest.mark.parametrize("name", ["GREATCTL_SEED", "GREATCTL_TRAIN_K", "GREATCTL_TRAIN_LR", "GREATCTL_TRAIN_STREAM"])
def test_a_wrong_type_in_the_environment_is_a_usage_error_that_names_the_variable(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        settle(tmp_path, env={name: "abc"})
    assert name in caught.value.message and "abc" in caught.value.message


@pytest.mark.parametrize(
    ("where", "origin"),
    [("flag", "flag --k"), ("env", "env GREATCTL_TRAIN_K"), ("file", "sources.toml [train]")],
)
@pytest.mark.parametrize(("value", "bound"), [(0, "1"), (5000, "4096")])
def test_a_value_out_of_range_names_value_bound_and_origin(
    tmp_path: Path, where: str, origin: str, value: int, bound: str
) -> None:
    table = f"# defaults\n[train]\n k = {value}\n" if where == "file" else ""
    flags: dict[str, object] = {"k": value} if where == "flag" else {}
    env = {"GREATCTL_TRAIN_K": str(value)} if where == "env" else {}
    with pytest.raises(ManifestError) as caught:
        settle(tmp_path, table, flags=flags, env=env)
    assert f"k = '{value}'" in caught.value.message or f"k = {value}" in caught.value.message
    assert origin in caught.value.message and bound in caught.value.why
    assert (where == "file") == str(caught.value.where).endswith("sources.toml:3:2")


def test_settings_that_do_not_fit_together_are_refused_with_their_origins(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        settle(tmp_path, "[train]\nd_sae = 16\n", flags={"k": 32})
    assert "larger than d_sae" in caught.value.why
    assert "flag --k" in caught.value.fix and "sources.toml [train]" in caught.value.fix


@pytest.mark.parametrize("line", ["k = '32'", "k = 3.5", "lr = 'fast'", "stream = 1", "hook_point = 'a'", "model = 3"])
def test_the_file_is_read_strictly_and_located(tmp_path: Path, line: str) -> None:
    with pytest.raises(ManifestError) as caught:
        settle(tmp_path, f"[train]\n{line}\n")
    assert str(caught.value.where).endswith(":2:1")


def test_an_unknown_key_in_a_stage_table_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        settle(tmp_path, "[train]\nhook-point = ['a']\n")
    assert "'hook_point'" in caught.value.fix and str(caught.value.where).endswith(":2:1")


@pytest.mark.parametrize(
    ("where", "kind"), [("flag", UsageError), ("env", UsageError), ("file", ManifestError)]
)  # fmt: skip
def test_an_unknown_choice_names_the_nearest(tmp_path: Path, where: str, kind: type[GreatctlError]) -> None:
    with pytest.raises(kind) as caught:
        settle(
            tmp_path,
            "[train]\narch = 'topkk'\n" if where == "file" else "",
            flags={"arch": "topkk"} if where == "flag" else {},
            env={"GREATCTL_TRAIN_ARCH": "topkk"} if where == "env" else {},
        )
    assert "'topk'" in caught.value.fix


def test_relative_paths_of_the_file_start_at_the_manifest(tmp_path: Path) -> None:
    config = settle(tmp_path, "[train]\npairs = 'mine/p.toml'\nmodel = './tiny'\n").config
    assert config.pairs == tmp_path / "mine" / "p.toml"
    assert config.model == str(tmp_path / "tiny")
    assert settle(tmp_path, "[train]\nmodel = 'org/name'\n").config.model == "org/name"
    assert settle(tmp_path, flags={"pairs": Path("p.toml")}).config.pairs == Path("p.toml")


def test_a_flag_without_a_field_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(BugError, match="nope"):
        settle(tmp_path, flags={"nope": 1})


def test_the_device_follows_the_same_order(tmp_path: Path) -> None:
    table = "[train]\ndevice = 'cuda:1'\n"
    m, env = made(tmp_path, table), {"GREATCTL_DEVICE": "cpu"}
    assert resolve_device("train", flag="mps", manifest=m, environ=env) == ("mps", "flag --device")
    assert resolve_device("train", flag=None, manifest=m, environ=env) == ("cpu", "env GREATCTL_DEVICE")
    assert resolve_device("train", flag=None, manifest=m, environ={}) == ("cuda:1", "sources.toml [train]")
    assert resolve_device("patch", flag=None, manifest=m, environ={}) == ("auto", "default")
    assert settle(tmp_path, table).config.k == 64


def test_folders_follow_the_same_order_and_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, elsewhere = tmp_path / "project", tmp_path / "shell"
    root.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    bare, told = made(root), made(root, "[project]\ndata_dir = '../big/data'\n")
    data, results, origins = project_paths(root, bare, None, None, {})
    assert (data, results) == (root / "data", root / "results")
    assert origins == {"data_dir": "default", "results_dir": "default"}
    data, _, origins = project_paths(root, told, None, None, {})
    assert data.resolve() == tmp_path / "big" / "data" and origins["data_dir"] == "sources.toml [project]"
    env = {"GREATCTL_DATA_DIR": "d", "GREATCTL_RESULTS_DIR": "r"}
    data, results, origins = project_paths(root, told, Path("flag"), None, env)
    assert (data, results) == (elsewhere / "flag", elsewhere / "r")
    assert origins == {"data_dir": "flag --data-dir", "results_dir": "env GREATCTL_RESULTS_DIR"}


def test_a_path_in_the_file_starts_at_the_file_and_a_name_stays_a_name(tmp_path: Path) -> None:
    (tmp_path / "saes" / "mine").mkdir(parents=True)
    (tmp_path / "bundled").mkdir()
    (tmp_path / "mine.toml").write_text("")
    cases = {
        "saes/mine": str(tmp_path / "saes" / "mine"),
        "mine.toml": str(tmp_path / "mine.toml"),
        "./other": str(tmp_path / "other"),
        "bundled": "bundled",
        "org/name": "org/name",
        "x" * 5000 + "/y": "x" * 5000 + "/y",
    }
    for value, wanted in cases.items():
        assert settle(tmp_path, f'[train]\nmodel = "{value}"\n').config.model == wanted
    assert settle(tmp_path, flags={"model": "saes/mine"}).config.model == "saes/mine"
