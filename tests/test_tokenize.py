"""Token windows: one BOS each, text found again through offsets, documents kept apart, no special ids."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_llama import BOS, EOS, TEXT, context, make_project, save_tiny

from greatctl.corpus.windows import TokenStore, cut
from greatctl.errors import InputError, IntegrityError, ManifestError, UsageError
from greatctl.model.tokenizer import encode_batch, load_tokenizer
from greatctl.stages import tokenize
from greatctl.store.artifact import load, newest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(path)
    return path


TEXTS = {
    "darwin-a": TEXT * 3,
    "wood-b": f"He wrote {BOS} and even {EOS} on the slate. Ünïcödé 漢字 🙂 " * 5,
    "still-c": "Short.",
}


def made(tmp_path: Path, folder: Path, **more: Any) -> tuple[TokenStore, dict]:
    ctx = context(make_project(tmp_path, TEXTS))
    result = tokenize.run(ctx, tokenize.Config(model=str(folder), **{"window": 16, **more}))
    assert result.artifact is not None
    return TokenStore(result.artifact), dict(result.summary)


def test_every_window_has_one_bos_and_padding_only_at_a_documents_end(tmp_path: Path, folder: Path) -> None:
    store, summary = made(tmp_path, folder)
    assert summary["n_windows"] == len(store.input_ids)
    assert summary["n_tokens"] == int((store.length - 1).sum())
    assert (summary["window"], summary["tokenizer"]) == (16, "tiny")
    for row, length in zip(store.input_ids.tolist(), store.length.tolist(), strict=True):
        assert row[0] == 0
        assert 0 not in row[1:length]
        assert 1 not in row[1:length]
        assert row[length:] == [1] * (16 - length)
    short = [i for i, length in enumerate(store.length.tolist()) if length < 16]
    lasts = [max(i for i, d in enumerate(store.windows["document"]) if d == n) for n in range(3)]
    assert set(short) <= set(lasts)


def test_character_spans_tile_each_text_and_say_what_its_tokens_say(tmp_path: Path, folder: Path) -> None:
    store, _ = made(tmp_path, folder)
    tokenizer = load_tokenizer(folder)
    spans = zip(store.windows["document"], store.windows["char_start"], store.windows["char_end"], strict=True)
    pieces: dict[str, str] = {}
    for window, (_, start, end) in enumerate(spans):
        name = store.document_of(window)["source_id"]
        assert start == len(pieces.get(name, ""))
        pieces[name] = pieces.get(name, "") + TEXTS[name][start:end]
        if name == "still-c":
            ids = store.input_ids[window, 1 : store.length[window]].tolist()
            assert tokenizer.decode(ids) == TEXTS[name][start:end]
    assert pieces == TEXTS


def test_windows_put_together_are_the_whole_tokenization(tmp_path: Path, folder: Path) -> None:
    store, _ = made(tmp_path, folder)
    tokenizer = load_tokenizer(folder)
    for document in store.documents:
        rows = [i for i, d in enumerate(store.windows["document"]) if d == document["document"]]
        joined = [t for i in rows for t in store.input_ids[i, 1 : store.length[i]].tolist()]
        assert tokenizer.decode(joined) == TEXTS[document["source_id"]]
        assert len(joined) == document["n_tokens"]
        assert [store.windows["first_token"][i] for i in rows] == [15 * n for n in range(len(rows))]


@pytest.mark.parametrize("n", [0, 1, 6, 7, 8, 14, 30])
def test_cut_keeps_every_token_at_any_length(n: int) -> None:
    ids = np.arange(100, 100 + n, dtype=np.int32)
    ends = np.sort(np.array(random.Random(n).choices(range(1, 50), k=n), dtype=np.int32))
    rows = cut(ids, ends, 50, window=8, bos=3, pad=4)
    kept = [t for row, length in zip(rows.input_ids, rows.length, strict=True) for t in row[1:length]]
    assert kept == ids.tolist()
    assert len(rows.length) == -(-n // 7)
    assert (rows.input_ids[:, 0] == 3).all()
    if n:
        assert (rows.char_start[0], rows.char_end[-1]) == (0, 50)
        assert (rows.char_start[1:] == rows.char_end[:-1]).all()


def test_documents_carry_what_the_manifest_knows(tmp_path: Path, folder: Path) -> None:
    store, _ = made(tmp_path, folder)
    darwin, wood = store.documents[0], store.documents[1]
    assert (darwin["source_id"], darwin["unit"], darwin["character"]) == ("darwin-a", "darwin", "darwin")
    assert (wood["unit"], wood["character"], wood["role"]) == ("wood-b", None, "control")
    assert (wood["author"], wood["work"], wood["era"]) == ("wood-b author", "wood-b title", "19c")
    assert (wood["genre"], wood["topic"], wood["year"], wood["split"]) == ("memoir", "nature", 1859, "train")
    assert store.tokenizer["special_ids"] == [0, 1]


def test_a_second_run_is_up_to_date_and_a_changed_fact_is_not(tmp_path: Path, folder: Path) -> None:
    said: list[str] = []
    project = make_project(tmp_path, TEXTS)
    ctx = context(project, emit=lambda event: said.append(event.message))
    config = tokenize.Config(model=str(folder), window=16)
    first = tokenize.run(ctx, config)
    again = tokenize.run(ctx, config)
    assert again.up_to_date
    assert again.summary == first.summary
    manifest = project.root / "sources.toml"
    manifest.write_text(manifest.read_text().replace('genre = "memoir"', 'genre = "letters"', 1))
    changed = tokenize.run(context(make_again(project)), config)
    assert not changed.up_to_date
    assert TokenStore(changed.artifact).documents[0]["genre"] == "letters"  # type: ignore[arg-type]


def make_again(project: Any) -> Any:
    """The project with its manifest read anew."""
    from dataclasses import replace

    from greatctl import manifest

    return replace(project, manifest=manifest.load(project.root / "sources.toml"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_equal_runs_give_equal_bytes(tmp_path: Path, folder: Path) -> None:
    more = {"export": ["pt", "parquet", "datasets"]}
    made(tmp_path / "a", folder, **more)
    made(tmp_path / "b", folder, **more)
    one, other = (load(tmp_path / name / "data/tokens/tiny-16") for name in "ab")
    assert one.outputs == other.outputs
    assert one.fingerprint == other.fingerprint
    assert files_of(one.path / "exports") == files_of(other.path / "exports")


def test_an_export_is_no_part_of_what_the_tokens_are(tmp_path: Path, folder: Path) -> None:
    store, _ = made(tmp_path, folder)
    before = load(store.path).record
    _, summary = made(tmp_path, folder, export=["pt"])
    exports = store.path / "exports"
    assert summary["export"] == [str(exports / f"{stem}_chunks_16.pt") for stem in ("darwin_a", "wood_b", "still_c")]
    written = files_of(exports)
    assert load(store.path).check().record == before
    (exports / "darwin_a_chunks_16.pt").unlink()
    assert load(store.path).damaged(deep=True) == []
    made(tmp_path, folder, export=["pt"])
    assert files_of(exports) == written
    (store.path / "documents.parquet").write_bytes(b"")
    made(tmp_path, folder)
    assert load(store.path).record == before


def test_a_subset_is_a_folder_of_its_own(tmp_path: Path, folder: Path) -> None:
    made(tmp_path, folder)
    store, _ = made(tmp_path, folder, character=["darwin"])
    assert store.path.name == "tiny-16-darwin"
    assert [d["source_id"] for d in store.documents] == ["darwin-a"]
    assert newest(tmp_path / "data/tokens", "tokenize").path == store.path  # type: ignore[union-attr]
    assert (tmp_path / "data/tokens/tiny-16/artifact.json").exists()
    with pytest.raises(UsageError, match="darwn"):
        made(tmp_path, folder, character=["darwn"])


def test_the_exports_open_in_torch_and_datasets(tmp_path: Path, folder: Path) -> None:
    store, _ = made(tmp_path, folder, export=["pt", "datasets", "parquet"])
    exports = store.path / "exports"
    full = store.input_ids[(torch.tensor(store.windows["document"]) == 0) & (store.length == 16)]
    loaded = torch.load(exports / "darwin_a_chunks_16.pt", weights_only=True)
    assert loaded["input_ids"].dtype == torch.long
    assert torch.equal(loaded["input_ids"], full.long())
    assert loaded["meta"]["author"] == "darwin-a author"
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_from_disk(str(exports / "darwin_a_chunks_16"))
    assert rows["input_ids"][:] == full.tolist()
    assert json.loads(rows.info.description)["window"] == 16


def test_one_export_may_be_given_as_a_word_and_an_unknown_one_is_refused() -> None:
    assert tokenize.Config.model_validate({"export": "pt"}).export == ["pt"]
    with pytest.raises(ValueError, match="csv"):
        tokenize.Config.model_validate({"export": "csv"})


def test_a_window_beyond_the_context_is_refused_before_anything_is_written(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        made(tmp_path, folder, window=65)
    assert "64" in caught.value.why
    assert not (tmp_path / "data/tokens").exists()


def test_without_texts_it_says_to_fetch_first(tmp_path: Path, folder: Path) -> None:
    ctx = context(make_project(tmp_path, {}))
    with pytest.raises(InputError) as caught:
        tokenize.plan(ctx, tokenize.Config(model=str(folder)))
    assert "greatctl fetch" in caught.value.fix


def test_a_changed_text_is_an_integrity_error(tmp_path: Path, folder: Path) -> None:
    project = make_project(tmp_path, TEXTS)
    (project.raw / "darwin-a/text.txt").write_text(TEXTS["darwin-a"].replace("carpenter", "carpentar"))
    with pytest.raises(IntegrityError, match=r"text\.txt"):
        tokenize.run(context(project), tokenize.Config(model=str(folder), window=16))


def test_a_batch_of_texts_is_tokenized_like_each_alone(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    together = encode_batch(tokenizer, list(TEXTS.values()))
    for text, (ids, ends) in zip(TEXTS.values(), together, strict=True):
        alone = encode_batch(tokenizer, [text])[0]
        assert (ids == alone[0]).all()
        assert (ends == alone[1]).all()
        assert ends[-1] == len(text)
