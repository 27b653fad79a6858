"""Labels: what a labeler is asked, what its answers may do, and scores that tell a true label from another's."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from labeler_stub import Stub, completion, honest, serving
from rich.console import Console, Group
from test_interpret import SIX, make_world
from test_label_scores import passage
from tiny_llama import context, save_tiny

from greatctl import manifest
from greatctl.cli.views.labels import label_lines, label_table
from greatctl.errors import AccessError, InterruptedRun, ManifestError, NetworkError, StageError, UsageError
from greatctl.events import Event, Run
from greatctl.features.inert import inert
from greatctl.features.label_answers import DESCRIPTION, NAME, read_choices, read_label
from greatctl.features.label_scores import Exam, make_exam
from greatctl.features.labels import TASKS
from greatctl.features.names import fallback_name
from greatctl.stages import interpret, labelers, labels
from greatctl.stages.context import Context, Project
from greatctl.stages.labelers import KEYS, open_labeler, request_of
from greatctl.stages.labels import Wanted, label, labels_by_latent, labels_of
from greatctl.store.artifact import Artifact, Identity, load, work
from greatctl.store.tables import read_rows, write_table

WORDS = ("apple", "river", "king", "snow", "lamp", "horse")
KEY = "sk-test-0123456789"
EVIL = '\x1b[31m<img src=x onerror="alert(1)">\x1b]8;;http://evil.test\x07go\x1b]8;;\x07\u202e</script>\x9b2J[link=file:///]'


def exams(latents: Sequence[int]) -> Mapping[int, Exam]:
    silent = [passage(None, 500 + i) for i in range(20)]
    return {
        n: make_exam(n, [passage(WORDS[n], 20 * n + i) for i in range(20)], silent[:10], silent[10:], 0)
        for n in latents
    }


@pytest.fixture
def ctx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    (tmp_path / "sources.toml").write_text('[model]\nname = "bundled"\n')
    project = Project(tmp_path, manifest.load(tmp_path / "sources.toml"), tmp_path / "data", tmp_path / "results")
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    return replace(context(project, "interpret"), offline=False)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving() as server:
        yield server


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between attempts, noted instead of slept."""
    found: list[float] = []
    monkeypatch.setattr(labelers, "_watchful", lambda run: found.append)
    return found


def features(ctx: Context) -> Artifact:
    rows = [
        {"latent": n, "fired": 9, "top_tokens": [f" {word}"], "top_logit_tokens": [EVIL]}
        for n, word in enumerate(WORDS)
    ]
    with work(ctx.project.features / "tiny", Identity("interpret", {"sae": "tiny"})) as w:
        write_table(w.path / "latents.parquet", pa.Table.from_pylist(rows))
        return w.seal({})


def ask(ctx: Context, base: str, words: str = "hello", environ: Mapping[str, str] = {}) -> str:
    return open_labeler(ctx, base, "some-model", environ).ask([{"role": "user", "content": words}])


def named(ctx: Context, stub: Stub, latents: Sequence[int] = range(4), model: str = "m") -> Artifact:
    return label(ctx, features(ctx), Wanted(stub.base, model, list(latents), 0), exams)


def notices(ctx: Context, stub: Stub, latents: Sequence[int], model: str) -> list[str]:
    """What is said while these latents are named."""
    said: list[Event] = []
    named(replace(ctx, run=Run("interpret", said.append)), stub, latents, model)
    return [event.message for event in said if event.kind == "notice"]


def test_true_labels_score_above_shuffled_ones(ctx: Context, stub: Stub) -> None:
    made = named(ctx, stub)
    rows = read_rows(made.path / "labels.parquet")
    assert [row["name"] for row in rows] == [f"the word {word}" for word in WORDS[:4]]
    assert all(row["source"] == "labeler" and row["shuffled_with"] != row["latent"] for row in rows)
    for task in ("detection", "fuzzing"):
        assert all(row[task] == 1 and row[f"{task}_shuffled"] == 0.5 for row in rows), task
        assert made.summary[task] == 1 and made.summary[f"{task}_shuffled"] == 0.5
        assert made.summary[f"{task}_gain"] == [0.5, 0.5, 0.5]
    assert all(row["n_detection"] == 20 and row["n_fuzzing"] == 10 for row in rows)
    assert all(row["fuzzing_low"] < row["detection_low"] < 1 == row["detection_high"] for row in rows)  # 10 say less


def test_every_score_can_be_counted_again_from_what_was_kept(ctx: Context, stub: Stub) -> None:
    stub.answer = lambda body: honest(body) if len(body["messages"][1]["content"]) % 3 else "[]"  # some never readable
    made = named(ctx, stub)
    examples = read_rows(made.path / "exams.parquet")
    shown = {(row["latent"], row["window"]) for row in examples if row["task"] == "shown"}
    assert shown and not any((r["latent"], r["window"]) in shown for r in examples if r["task"] != "shown")
    unread = 0
    for row in read_rows(made.path / "labels.parquet"):
        for task, column, end in [
            (t, c, e) for t in TASKS for c, e in (("answered", ""), ("answered_shuffled", "_shuffled"))
        ]:
            mine = [r for r in examples if r["latent"] == row["latent"] and r["task"] == task and r[column] is not None]
            unread += sum(r["latent"] == row["latent"] and r["task"] == task and r[column] is None for r in examples)
            assert len(mine) == (row[f"n_{task}{end}"] or 0)
            shares = [[r[column] == side for r in mine if r["right"] == side] for side in (True, False)]
            again = sum(sum(s) / len(s) for s in shares) / 2 if all(shares) else None
            assert row[f"{task}{end}"] == (None if again is None else pytest.approx(again))
    assert unread


def test_the_tables_keep_their_seal_and_the_answers_are_kept_with_theirs(ctx: Context, stub: Stub) -> None:
    before = features(ctx)
    made = named(ctx, stub)
    assert load(before.path).fingerprint == before.fingerprint and not load(before.path).damaged(deep=True)
    assert {row["path"] for row in made.outputs} == {"labels.parquet", "answers.parquet", "exams.parquet"}
    assert len(read_rows(made.path / "answers.parquet")) == len(stub.requests)
    assert made.stage == "interpret --labeler" and set(labels_by_latent(ctx.project, before)) == set(range(4))


def test_nothing_is_asked_twice_not_after_a_kill_nor_for_more_latents(ctx: Context, stub: Stub) -> None:
    asked = 0

    def dies(body: dict) -> str:
        nonlocal asked
        asked += 1
        if asked > 6:
            ctx.run.stop.request(15)
        return honest(body)

    stub.answer = dies
    with pytest.raises(InterruptedRun):
        named(ctx, stub)
    first = len(stub.requests)
    again = replace(ctx, run=Run("interpret"))
    stub.answer = honest
    made = named(again, stub)
    bodies = [json.dumps(body, sort_keys=True) for _, body in stub.requests]
    assert first < len(bodies) == len(set(bodies))
    before = made.path.joinpath("labels.parquet").read_bytes()
    assert named(again, stub).path == made.path and len(stub.requests) == len(bodies)  # up to date
    named(again, stub, [2, 3])
    new = [json.dumps(body, sort_keys=True) for _, body in stub.requests[len(bodies) :]]
    assert not set(new) & set(bodies) and all("description" in body for body in new)  # another shuffle, no new name
    stub.requests.clear()
    named(replace(again, force=True), stub)
    assert len(stub.requests) == len(bodies) and made.path.joinpath("labels.parquet").read_bytes() == before


def test_rate_limits_are_obeyed_and_passing_failures_asked_again(ctx: Context, stub: Stub, slept: list[float]) -> None:
    stub.replies = [(429, {"Retry-After": "7"}, b""), (503, {"Retry-After": "3"}, b""), (500, {}, b"oops")]
    assert ask(ctx, stub.base) and slept == [7.0, 3.0, 4.0] and len(stub.requests) == 4
    stub.replies = [(429, {"Retry-After": "9000"}, b"")]
    with pytest.raises(NetworkError, match="does not answer") as long:
        ask(ctx, stub.base)
    assert "9,000 s" in long.value.why and "kept" in long.value.fix
    stub.replies = [(502, {}, b"")] * 6
    with pytest.raises(NetworkError) as down:
        ask(ctx, stub.base)
    assert "6 attempts" in down.value.why


def test_the_request_is_one_that_any_such_server_takes(ctx: Context, stub: Stub) -> None:
    ask(ctx, stub.base + "/chat/completions/", "é\x1b")
    headers, body = stub.requests[0]
    assert headers["path"] == "/v1/chat/completions" and "Authorization" not in headers
    assert body == {"model": "some-model", "messages": [{"role": "user", "content": "é\x1b"}], "temperature": 0}
    stub.replies = [(400, {}, b'{"error": {"message": "temperature is not supported"}}')]
    ask(ctx, stub.base)
    assert "temperature" in stub.requests[1][1] and "temperature" not in stub.requests[2][1]


def test_the_key_goes_into_a_header_and_nowhere_else(
    ctx: Context, stub: Stub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[Event] = []
    monkeypatch.setenv(KEYS[1], KEY)
    made = named(replace(ctx, run=Run("interpret", said.append)), stub, [0, 1])
    assert {headers["Authorization"] for headers, _ in stub.requests} == {f"Bearer {KEY}"}
    assert not any(KEY.encode() in path.read_bytes() for path in ctx.project.root.rglob("*") if path.is_file())
    assert KEY not in "".join(capfd.readouterr()) + str(said) and made.summary["n_named"] == 2
    assert any(f"with the key of {KEYS[1]}" in event.message for event in said)
    stub.replies = [(404, {}, f"no model for {KEY} \x1b[2J".encode())]
    with pytest.raises(StageError) as error:
        ask(ctx, stub.base, environ={KEYS[0]: KEY})
    assert KEY not in str(error.value.to_json()) and error.value.why == "no model for …"
    stub.replies = [(401, {}, KEY.encode())]
    with pytest.raises(AccessError) as refused:
        ask(ctx, stub.base, environ={KEYS[0]: KEY})
    assert KEY not in str(refused.value.to_json()) and f"the key of {KEYS[0]} was refused" in refused.value.why
    stub.replies = [(307, {"Location": "http://127.0.0.1:9/elsewhere"}, b"")]
    with pytest.raises(StageError, match="307"):
        ask(ctx, stub.base, environ={KEYS[0]: KEY})


def test_the_key_never_crosses_the_network_in_the_clear() -> None:
    assert labelers._key("http://10.0.0.7:8000/v1", {KEYS[1]: KEY})[0] == ""
    assert labelers._key("https://api.example.org/v1", {KEYS[1]: KEY}) == (KEY, KEYS[1])
    assert labelers._key("http://localhost:8000/v1", {KEYS[1]: "general", KEYS[0]: KEY}) == (KEY, KEYS[0])
    with pytest.raises(UsageError, match="in the clear"):
        labelers._key("http://10.0.0.7:8000/v1", {KEYS[0]: KEY})


@pytest.mark.parametrize(
    ("labeler", "model", "error"),
    [
        ("http://127.0.0.1:1/v1", None, UsageError),
        (None, "m", UsageError),
        ("ftp://x/v1", "m", UsageError),
        ("http://user:secret@x/v1", "m", UsageError),
        ("hf:", None, UsageError),
    ],
)
def test_settings_that_name_nobody_are_refused(ctx: Context, labeler: Any, model: Any, error: type) -> None:
    with pytest.raises(error) as refused:
        request_of(ctx, labeler, model)
    assert refused.value.why and refused.value.fix and "secret" not in str(refused.value.to_json())


def test_a_manifest_cannot_send_the_key_anywhere_and_offline_means_offline(
    ctx: Context, stub: Stub, tmp_path: Path
) -> None:
    named_in_file = replace(ctx, origins={"labeler": "sources.toml [interpret]"})
    with pytest.raises(ManifestError, match="not taken from sources"):
        open_labeler(named_in_file, stub.base, "m", {KEYS[1]: KEY})
    save_tiny(tmp_path / "long", max_position_embeddings=2048)
    request_of(named_in_file, f"hf:{tmp_path / 'long'}", None)
    with pytest.raises(NetworkError, match="no connection"):
        ask(replace(ctx, offline=True), stub.base)
    assert not stub.requests


def test_malformed_answers_are_asked_again_and_then_leave_the_fallback(ctx: Context, stub: Stub) -> None:
    parts = {"choices": [{"message": {"content": [{"type": "text", "text": '{"label": '}, {"text": '"x"}'}]}}]}
    stub.replies = [completion("I would rather not."), (200, {}, json.dumps(parts).encode())]
    made = named(ctx, stub, [0])
    assert read_rows(made.path / "labels.parquet")[0]["name"] == "the word apple"
    again = stub.requests[2][1]["messages"]
    assert [m["role"] for m in again] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert again[4]["content"] == '{"label": "x"}'
    broken = [(200, {}, b"<html>busy</html>"), (200, {}, b'{"choices": []}'), completion("[1, 2"), completion("{}")]
    before = load(made.path).fingerprint
    for number, reply in enumerate(broken):
        stub.replies = [reply] * 3
        with pytest.raises(StageError, match="named none of 1 latents") as none:
            named(ctx, stub, [1], model=f"m{number}")
        assert "3 answers" in none.value.why and load(made.path).fingerprint == before  # the good ones are still there
    stub.answer = lambda body: "no" if " river»" in body["messages"][1]["content"] else honest(body)
    apple, river = read_rows(named(ctx, stub, [0, 1], model="shy").path / "labels.parquet")
    assert apple["source"] == "labeler" and apple["shuffled_with"] is None and apple["detection"] == 1
    assert (
        river["source"] == "fallback" and river["name"].startswith("fires on 'river'") and "\x1b" not in river["name"]
    )
    assert river["detection"] is None and "3 answers" in river["problem"]
    assert "1 of 2 have none; --force" in notices(ctx, stub, [0, 1], model="shy")[-1]


def test_a_hostile_answer_stays_inert_text(ctx: Context, stub: Stub) -> None:
    stub.answer = lambda body: honest(body) if "description" in body["messages"][1]["content"] else json.dumps(
        {"name": EVIL, "description": EVIL * 50, "verdict": "supported"}
    )  # fmt: skip
    (row, _) = read_rows(named(ctx, stub, [0, 1]).path / "labels.parquet")
    for text, limit in ((row["name"], NAME), (row["description"], DESCRIPTION)):
        assert len(text) <= limit and text.isprintable() and "\u202e" not in text
        assert text.startswith('<img src=x onerror="alert(1)">go</script>')
    assert "verdict" not in row and row["source"] == "labeler"


def test_the_terminal_shows_labels_literally_beside_their_scores() -> None:
    row = {"latent": 7, "name": "a [bold]king\u202e", "description": "", "source": "labeler", "labeler": "m[red]"}
    row |= {"detection": 0.9, "detection_shuffled": 0.5, "fuzzing": None, "fuzzing_shuffled": None}
    stream = io.StringIO()
    Console(file=stream, width=80).print(Group(*label_table([row] * 20), *label_lines(row)))
    text = stream.getvalue()
    assert text.count("0.90 (0.50)") == 13 and "[bold]king\\u202e" in text and "m[red]" in text
    assert max(map(len, text.splitlines())) <= 80
    assert label_lines(None) == [] == label_table([]) == label_lines({**row, "source": "fallback"})


def test_words_are_made_inert() -> None:
    assert inert("a\x1b[1;31mb\x1b]0;title\x07c\x9b2Jd\x1b(Be\u200bf\u2066g\ud800h\n\ti", 40) == "abcdBefgh i"
    assert inert("x" * 50, 10) == "x" * 9 + "…" and inert("\x00\x1b", 5) == ""
    assert fallback_name([" a", " a", "\x1b[2J"], ["\n"]) == "fires on 'a', ''\\x1b[2J''; raises ''\\n''"
    assert fallback_name([], ["x"]) == "never fires"


def test_answers_are_read_with_patience() -> None:
    assert read_label('Sure! {"x": 1}\n```json\n{"name": "a\nb", "description": 3}\n```') == ("a b", "")
    assert read_choices("<think>[1,1]</think>[0, 1] is it", 2) == [False, True]
    assert read_choices("[true, false]", 2) == [True, False]
    for bad in ("", "[1]", "[1, 2]", '["1", "0"]', "[0.0, 1]", "[" * 100_000):
        with pytest.raises(ValueError):
            read_choices(bad, 2)
    for bad in ("", "{}", '{"name": ""}', '{"name": "\\u001b"}', '{"name": 3}', "{" * 100_000):
        with pytest.raises(ValueError):
            read_label(bad)


def test_what_leaves_the_machine_is_said_before_it_leaves(ctx: Context, stub: Stub, tmp_path: Path) -> None:
    said: list[Event] = []
    before: list[int] = []

    def hear(event: Event) -> None:
        said.append(event)
        before.append(len(stub.requests))

    label(replace(ctx, run=Run("interpret", hear)), features(ctx), Wanted(stub.base, "m", [0, 1], 0), exams)
    words = f"up to 32 passages of the corpus for each of 2 latents are sent to {stub.base.removesuffix('/v1')}"
    (place,) = [i for i, event in enumerate(said) if words in event.message]
    assert before[place] == 0
    assert any("detection +0.50 (95 % +0.50 to +0.50)" in event.message for event in said)
    save_tiny(tmp_path / "long", max_position_embeddings=2048)
    local = open_labeler(ctx, f"hf:{tmp_path / 'long'}", None)
    assert "nothing leaves this machine" in labels._what_is_sent(local, 3)


def test_a_wrong_port_is_found_at_once_and_offline_opens_nothing(ctx: Context) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(NetworkError, match="nobody answers") as nobody:
        label(ctx, features(ctx), Wanted(base, "m", [0], 0), exams)
    assert "refused" in nobody.value.why and "--labeler" in nobody.value.fix
    open_labeler(replace(ctx, offline=True), base, "m", {}).reach()


def test_an_endless_answer_is_no_answer_and_is_not_kept(ctx: Context, stub: Stub) -> None:
    stub.replies = [completion("x" * 5_000_000)]
    made = named(ctx, stub, [0])
    assert made.summary["n_named"] == 1
    kept = read_rows(made.path / "answers.parquet")
    assert len(kept) == len(stub.requests) - 1 and all(row["answer"] for row in kept)


def test_a_long_wait_is_announced_once(ctx: Context) -> None:
    said: list[str] = []
    run = Run("interpret", lambda event: said.append(event.message))
    sleep = labelers._watchful(run)
    run.stop.request(2)
    for seconds in (1.0, 30.0, 30.0):
        with pytest.raises(InterruptedRun):
            sleep(seconds)
    assert said == ["interpret: the labeler asks for patience: waiting 30 s"]


def test_a_refusal_says_what_the_server_said_and_where_v1_may_be_missing(ctx: Context, stub: Stub) -> None:
    stub.replies = [(404, {}, b'{"error": {"message": "no such model", "type": "x"}}')]
    with pytest.raises(StageError) as refused:
        ask(ctx, stub.base.removesuffix("/v1"))
    assert refused.value.why == "no such model" and "/v1" in refused.value.fix
    stub.replies = [(401, {}, b"")]
    with pytest.raises(AccessError) as nokey:
        ask(ctx, stub.base)
    assert "no key was sent" in nokey.value.why and KEYS[0] in nokey.value.fix


def test_a_local_model_answers_from_its_folder_alone(
    ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelers, "_NEW_TOKENS", 8)
    save_tiny(tmp_path / "long", max_position_embeddings=2048)
    labeler = open_labeler(ctx, f"hf:{tmp_path / 'long'}", None)
    assert labeler.workers == 1 and labeler.name == "long" and len(labeler.revision) == 64
    messages = [{"role": "user", "content": "He mended the door"}]
    assert isinstance(labeler.ask(messages), str) and labeler.ask(messages) == labeler.ask(messages)
    assert labeler.ask([{"role": "user", "content": "door " * 3000}]) == ""
    save_tiny(tmp_path / "short")
    with pytest.raises(UsageError, match="64 tokens at once"):
        request_of(ctx, f"hf:{tmp_path / 'short'}", None)  # before any table is made
    with pytest.raises(AccessError, match="not on this machine") as absent:
        request_of(ctx, "hf:nobody/such-model", None)
    assert "download" in absent.value.fix


def test_a_chat_template_is_used_where_there_is_one(tmp_path: Path) -> None:
    from greatctl.model.tokenizer import load_tokenizer

    save_tiny(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    messages = [{"role": "system", "content": "He rose"}, {"role": "user", "content": "early"}]
    assert tokenizer.decode(labelers._prompt(tokenizer, messages)) == "<|begin_of_text|>He rose\n\nearly\n\nJSON: "
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }};{% endfor %}he:"
    assert tokenizer.decode(labelers._prompt(tokenizer, messages)) == "[system] He rose;[user] early;he:"


def test_interpret_asks_only_when_told_to_and_names_what_it_shows(
    tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = replace(make_world(tmp_path, SIX), offline=False)
    plain = interpret.run(world, interpret.Config(causal=0))
    assert not stub.requests and all(row["name"].startswith("fires on") for row in plain.summary["hypotheses"])
    sealed = load(plain.artifact).fingerprint
    wanted = interpret.Config(causal=0, labeler=stub.base, labeler_model="m", labels=2, export="neuronpedia")
    made = interpret.run(world, wanted)
    assert made.up_to_date and load(made.artifact).fingerprint == sealed
    verdicts = [{k: v for k, v in row.items() if k != "name"} for row in made.summary["hypotheses"]]
    assert verdicts == [{k: v for k, v in row.items() if k != "name"} for row in plain.summary["hypotheses"]]
    assert made.summary["labels"]["n_latents"] == 2 and made.summary["hypotheses"][0]["name"].startswith("the word")
    assert list(Path(made.summary["export"]).glob("batch-*.json"))
    named_latent = made.summary["hypotheses"][0]["latent"]
    page = interpret.run(world, interpret.Config(causal=0, latent=named_latent)).summary
    assert page["label"]["source"] == "labeler" and page["name"] == page["label"]["name"]
    for wrong in ({"labeler": stub.base, "labeler_model": "m"}, {"export": "neuronpedia"}):
        with pytest.raises(UsageError, match="--text goes with neither"):
            interpret.run(world, interpret.Config(text="He rose", **wrong))


def test_labels_of_other_tables_are_no_labels(ctx: Context, stub: Stub) -> None:
    before = features(ctx)
    made = named(ctx, stub, [0, 1])
    found = labels_of(ctx.project, before)
    assert found is not None and found.path == made.path
    with work(before.path, Identity("interpret", {"sae": "tiny", "seed": 1})) as w:
        write_table(w.path / "latents.parquet", {"latent": [0]})
        other = w.seal({})
    assert labels_of(ctx.project, other) is None and labels_by_latent(ctx.project, other) == {}
    (made.path / "labels.parquet").write_bytes(b"not what was sealed")
    assert labels_of(ctx.project, before) is None
