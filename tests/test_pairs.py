"""Pair files, templates, answers of any shape, and the alignment of marked spans; what is unclear is refused."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greatctl.errors import GreatctlError, ManifestError
from greatctl.patching.pairs import EncodedPair, Pair, clusters_of, encode_pairs, read_pairs
from greatctl.patching.spans import align, unfit
from greatctl.patching.templates import expand

WORDS: dict[str, int] = {}


def by_words(text: str) -> list[int]:
    """A toy tokenizer: BOS, then a token a word, leading space included; a word with `--` is several."""
    pieces = [part for word in re.findall(r" ?[^ ]+| $", text) for part in re.split("(?<=--)", word) if part]
    return [1, *(WORDS.setdefault(piece, len(WORDS) + 2) for piece in pieces)]


def spelled(ids: tuple[int, ...]) -> list[str]:
    names = {number: word for word, number in WORDS.items()}
    return [names.get(i, "<bos>") for i in ids]


def one(**more) -> EncodedPair:
    """The encoded pair, which must not be refused."""
    encoded, refused = encode_pairs([Pair(**{**BASE, **more})], by_words, plain=False)
    assert not refused, refused[0].reason
    return encoded[0]


def reason(**more) -> str:
    """Why the pair is refused, which it must be."""
    encoded, refused = encode_pairs([Pair(**{**BASE, **more})], by_words, plain=False)
    assert not encoded
    return refused[0].reason


BASE = {
    "id": "a",
    "clean": "He was a great",
    "corrupted": "He was a small",
    "answer": " man",
    "wrong_answer": " boy",
}


# --- answers


def test_a_set_of_answers_keeps_its_order_and_is_not_plain():
    pair = one(answer=(" man", " king"))
    assert [spelled(ids) for ids in pair.answers] == [[" man"], [" king"]]
    assert pair.answer_id == pair.answers[0][0] and not pair.plain and one().plain


def test_the_first_tokens_that_all_answers_share_become_part_of_the_prompts():
    pair = one(answer=" vice-- president", wrong_answer=" vice-- admiral")
    assert spelled(pair.clean_ids)[-1] == spelled(pair.corrupted_ids)[-1] == " vice--"
    assert [spelled(ids) for ids in (*pair.answers, *pair.wrong_answers)] == [[" president"], [" admiral"]]
    assert pair.plain and pair.length == 6 and pair.alignment == tuple((i, i) for i in range(6))
    several = one(answer=" vice-- president-- elect", wrong_answer=" boy")
    assert len(several.answers[0]) == 3 and several.length == 5


@pytest.mark.parametrize(
    ("answer", "wrong", "said"),
    [
        (" man", " man", "both answers are token"),
        ((" man", " king"), (" boy", " king"), "both answers are token"),
        (" vice--", " vice-- admiral", "is the beginning of another"),
        ((" vice--", " vice-- admiral"), " boy", "is the beginning of another"),
        ("er", " boy", "merges with the end of the prompt"),
    ],
)
def test_answers_that_cannot_be_told_apart_are_refused(answer, wrong, said):
    assert said in reason(answer=answer, wrong_answer=wrong)


def test_a_method_for_plain_pairs_is_not_handed_others():
    pairs = [Pair(**{**BASE, "id": str(i), **more}) for i, more in enumerate([{}, {"answer": (" man", " king")}])]
    longer = Pair(**{**BASE, "clean": "He was a very great", "spans": {"w": ("very great", "small")}})
    encoded, refused = encode_pairs([*pairs, longer], by_words)
    assert [p.pair.id for p in encoded] == ["0"]
    assert ["2 answers" in refused[0].reason, "6 tokens, the corrupted one 5" in refused[1].reason] == [True, True]


def test_the_answers_count_against_the_context():
    pair = Pair(**{**BASE, "answer": " man-- of-- war"})
    assert encode_pairs([pair], by_words, n_ctx=7, plain=False)[0]
    assert "7 tokens do not fit" in encode_pairs([pair], by_words, n_ctx=6, plain=False)[1][0].reason


# --- spans


def test_marked_spans_are_aligned_at_their_ends():
    pair = one(
        clean="When George Washington spoke he was great",
        corrupted="When Tom spoke he was great",
        spans={"person": ("George Washington", "Tom")},
    )
    assert pair.spans == {"person": ((2, 3), (2,))}
    assert pair.alignment == ((0, 0), (1, 1), (3, 2), (4, 3), (5, 4), (6, 5), (7, 6))
    assert pair.first_difference == 2 and not pair.equally_long
    for clean, corrupted in pair.alignment:
        same = spelled(pair.clean_ids)[clean] == spelled(pair.corrupted_ids)[corrupted]
        assert same != (clean == 3)


def test_spans_of_prompts_of_one_length_are_names_for_places_and_demand_nothing_else():
    pair = one(clean="Grant was a great", corrupted="Tom is no small", spans={"person": ("Grant", "Tom")})
    assert pair.spans == {"person": ((1,), (1,))} and pair.equally_long
    assert pair.alignment == tuple((i, i) for i in range(5))


def test_two_spans_may_make_up_for_each_other():
    pair = one(
        clean="Ulysses Grant rode home",
        corrupted="Tom rode very slowly",
        spans={"person": ("Ulysses Grant", "Tom"), "how": ("home", "very slowly")},
    )
    assert pair.length == len(pair.corrupted_ids) and not pair.equally_long
    assert pair.alignment == ((0, 0), (2, 1), (3, 2), (4, 4))


@pytest.mark.parametrize(
    ("clean", "corrupted", "spans", "said"),
    [
        ("He was a very great", "He was a small", None, "no spans are marked"),
        ("He was a very great", "He is a small", {"w": ("very great", "small")}, "differ outside of the marked spans"),
        ("He was a very great", "He was small", {"w": ("very great", "small")}, "differ outside of the marked spans"),
        ("He was a very-- great", "He was a small", {"w": ("ry-- great", "small")}, "begin and end with a token"),
        ("He was a great", "He was a great", None, "the same tokens"),
    ],
)
def test_unequal_prompts_are_refused_and_never_guessed(clean, corrupted, spans, said):
    assert said in reason(clean=clean, corrupted=corrupted, spans=spans)


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ({"w": ("he", "Tom")}, "stands 2 times"),
        ({"w": ("she", "Tom")}, "stands 0 times"),
        ({"w": ("the old", "Tom"), "v": ("old man", "slept")}, "overlap"),
        ({"w": ("the old", "slept"), "v": ("rose", "Tom")}, "another order"),
    ],
)
def test_spans_that_mark_nothing_are_named_without_a_tokenizer(spans, said):
    assert said in unfit("the old man rose, he", "Tom slept", spans)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_an_alignment_is_increasing_and_agrees_outside_of_the_spans(data):
    """Prompts made of shared pieces and spans of any length: what is aligned outside is the same token."""
    token = st.integers(2, 5)
    clean, corrupted, spans = [1], [1], {}
    for i in range(data.draw(st.integers(1, 3))):
        shared = data.draw(st.lists(token, max_size=3))
        a, b = (data.draw(st.lists(token, min_size=1, max_size=3)) for _ in range(2))
        clean, corrupted = clean + shared, corrupted + shared
        spans[str(i)] = (range(len(clean), len(clean) + len(a)), range(len(corrupted), len(corrupted) + len(b)))
        clean, corrupted = clean + a, corrupted + b
    clean, corrupted = [*clean, 9], [*corrupted, 9]
    found = align(clean, corrupted, spans)
    assert not isinstance(found, str) and found[0] == (0, 0) and found[-1] == (len(clean) - 1, len(corrupted) - 1)
    assert all(a < c and b < d for (a, b), (c, d) in pairwise(found))
    inside = {i for a, _ in spans.values() for i in a}
    assert all(clean[i] == corrupted[j] for i, j in found if i not in inside)
    assert {i for i, _ in found} >= set(range(len(clean))) - inside
    if clean != corrupted:
        pair = EncodedPair(Pair("a", "", "", "", ""), tuple(clean), tuple(corrupted), 2, 3, alignment=found)
        n = pair.first_difference
        assert clean[:n] == corrupted[:n] and all(i == j for i, j in found[:n])


# --- templates

TEMPLATE = {
    "id": "general",
    "clean": "{person} was a {kind} general",
    "answer": " {person}",
    "wrong_answer": [" {person}", " nobody"],
    "slots": {"person": [["Ulysses Grant", "Tom"], ["Lee", "Bob"]], "kind": ["great", ["large", "small"]]},
}


def test_a_template_makes_all_combinations_with_stable_ids_in_one_cluster():
    rows = expand(TEMPLATE)
    assert [(row["clean"], row["corrupted"]) for row in rows] == [
        ("Ulysses Grant was a great general", "Tom was a great general"),
        ("Ulysses Grant was a large general", "Tom was a small general"),
        ("Lee was a great general", "Bob was a great general"),
        ("Lee was a large general", "Bob was a small general"),
    ]
    assert rows[0]["answer"] == " Ulysses Grant" and rows[0]["wrong_answer"] == [" Tom", " nobody"]
    assert {row["cluster"] for row in rows} == {"general"} and len({row["id"] for row in rows}) == 4
    turned = {**TEMPLATE, "slots": {k: v[::-1] for k, v in TEMPLATE["slots"].items()}}
    assert {row["id"] for row in expand(turned)} == {row["id"] for row in rows}
    assert rows[1]["spans"] == {"person": ["Ulysses Grant", "Tom"], "kind": ["large", "small"]}
    assert rows[1]["why"] == "person: Ulysses Grant / Tom, kind: large / small"


def test_a_template_in_a_file_is_aligned_by_its_slots(tmp_path):
    path = tmp_path / "general.toml"
    path.write_text(
        'concept = "rank"\n[[template]]\nid = "general"\nclean = "{person} was a general and"\n'
        'answer = " won"\nwrong_answer = " lost"\nheldout = true\n'
        'slots = { person = [["Ulysses Grant", "Tom"], ["Lee", "Bob"], ["Lee", "Bob"]] }\n'
        '[[pair]]\nid = "alone"\nclean = "He won and"\ncorrupted = "He lost and"\nanswer = " sang"\n'
        'wrong_answer = " wept"\n'
    )
    pairs = read_pairs(path)
    assert [pair.cluster for pair in pairs] == ["alone", "general", "general"]  # equal ones once
    assert all(pair.concept == "rank" for pair in pairs) and pairs[1].heldout
    encoded, refused = encode_pairs(pairs, by_words, plain=False)
    assert not refused and encoded[1].spans["person"] == ((1, 2), (1,))
    assert encoded[1].alignment[:2] == ((0, 0), (2, 1))
    assert clusters_of(pairs) == ["alone", "general", "general"]
    assert clusters_of(pairs[1:]) == [pair.id for pair in pairs[1:]]
    lines = tmp_path / "general.jsonl"
    lines.write_text(json.dumps({**TEMPLATE, "concept": "rank"}) + "\n")
    assert len(read_pairs(lines)) == 4


def test_hundreds_of_pairs_from_one_template():
    slots = {name: [f"{name}{i}" for i in range(7)] for name in ("a", "b", "c")}
    slots["d"] = [["x", "y"]]
    template = {**TEMPLATE, "clean": "{a} {b} {c} {d}", "answer": " p", "wrong_answer": " q", "slots": slots}
    rows = expand(template)
    assert len(rows) == len({row["id"] for row in rows}) == 343


def test_a_value_that_stands_twice_marks_no_span_but_a_marked_one_does():
    template = {
        "id": "t",
        "clean": "{who}, said {who}, and I am {who}",
        "answer": " a",
        "wrong_answer": " b",
        "slots": {"who": [["Grant", "Tom"]]},
    }
    assert "spans" not in expand(template)[0]
    marked = {**template, "spans": {"last": ["am {who}", "am {who}"]}}
    assert expand(marked)[0]["spans"] == {"last": ["am Grant", "am Tom"]}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"slots": {}}, "table of lists"),
        ({"slots": {"person": []}}, "list of fillings"),
        ({"slots": {"person": [["a", "b", "c"]], "kind": ["x"]}}, "a text or two"),
        ({"slots": {"person": [["a", "b"]]}}, "'kind' has no fillings"),
        ({"slots": {**TEMPLATE["slots"], "age": ["old"]}}, "'age' is used nowhere"),
        ({"clean": "{person was"}, "expected '}'"),
        ({"clean": "{person.name} was a {kind}"}, "is no slot"),
        ({"clean": 3}, "a text was expected"),
        ({"answer": ""}, "no answer"),
        ({"spans": [1]}, "pairs of texts"),
        ({"slots": {"person": [str(i) for i in range(200)], "kind": [str(i) for i in range(99)]}}, "19800 pairs"),
    ],
)
def test_a_malformed_template_says_what_is_wrong(changed, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        expand({**TEMPLATE, **changed})


# --- files


def line(**more: object) -> str:
    return json.dumps({**BASE, **more})


@pytest.mark.parametrize(
    ("name", "text", "number", "said"),
    [
        ("a.jsonl", line(answer=[" a", " a"]), 1, "different texts"),
        ("a.jsonl", line(answer=[]), 1, "no answer"),
        ("a.jsonl", line(answer=[" a", 3]), 1, "must be str"),
        ("a.jsonl", line(heldout="yes"), 1, "heldout must be bool"),
        ("a.jsonl", line() + "\n" + line(id="b", spans={"w": ["x"]}), 2, "spans must be a table"),
        ("a.jsonl", line(spans={"w": ["nowhere", "small"]}), 1, "mark nothing"),
        ("a.jsonl", '{"id": "a", "id": "b"}', 1, "there twice"),
        ("a.jsonl", line(clean="\ud800"), 1, "no text"),
        ("a.jsonl", "[" * 100_000, 1, ""),
        ("a.jsonl", line() + "\n\n" + line(slots={}), 3, "the template cannot be used"),
        ("a.toml", "concept = 3\n", 1, "concept must be text"),
        ("a.toml", "pair = 3\n", 1, "list of tables"),
        ("a.toml", "pair = [3]\n", 1, "table of names"),
        ("a.toml", "\n[[template]]\nid = 'a'\n", 2, "no [[template]]"),
        ("a.toml", "\n[[pair]]\nid = 'a'\nslots = {}\n", 2, "no [[pair]]"),
        ("a.toml", "[[pair]]\nid = 'a'\nclean = b\n", 3, "not valid TOML"),
    ],
)
def test_every_malformation_is_a_manifest_error_with_file_and_line(tmp_path, name, text, number, said):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ManifestError) as caught:
        read_pairs(path)
    assert caught.value.where == f"{path}:{number}" and caught.value.exit_code == 3
    assert said in f"{caught.value.message} {caught.value.why}"


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line().encode() + b"\n\xff\n")
    with pytest.raises(ManifestError) as caught:
        read_pairs(path)
    assert caught.value.where == f"{path}:2"


def test_a_line_separator_inside_of_a_text_does_not_end_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({**BASE, "why": "one\u2028two"}, ensure_ascii=False) + "\r\n", newline="")
    assert read_pairs(path)[0].why == "one\u2028two"


@settings(max_examples=12, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)))
def test_no_value_anywhere_is_more_than_a_clean_error(tmp_path_factory, value):
    folder: Path = tmp_path_factory.getbasetemp()
    for key in (*BASE, "spans", "heldout", "cluster", "slots"):
        for row in ({**BASE, key: value}, {**TEMPLATE, key: value}, {**TEMPLATE, "slots": {"person": value}}):
            path = folder / "any.jsonl"
            path.write_text(json.dumps(row))
            try:
                encode_pairs(read_pairs(path), by_words, plain=False)
            except GreatctlError as error:
                assert error.exit_code in (3, 5)


def test_rows_of_tables_have_the_same_types_for_every_pair():
    plain = Pair(**BASE).row()
    rich = one(answer=(" man", " king"), spans={"w": ("great", "small")}).pair.row()
    assert plain.keys() == rich.keys()
    assert rich["answer"] == " man |  king" and plain["answer"] == " man" and plain["cluster"] == "a"
    assert json.loads(rich["spans"]) == [{"name": "w", "clean": "great", "corrupted": "small"}]
    assert plain["spans"] is None
