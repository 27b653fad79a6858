"""The graph of a model: names, order, and refusals that help."""

from __future__ import annotations

import pytest

from greatctl.errors import UsageError
from greatctl.patching.graph import Graph, Input, Node, parse_edge, parse_input, parse_node

GRAPH = Graph(n_layers=3, n_heads=4, n_kv_heads=2)


def test_every_name_is_read_back():
    assert all(parse_node(node.name) == node == GRAPH.node(node.name) for node in GRAPH.nodes)
    assert all(parse_input(one.name) == one == GRAPH.input(one.name) for one in GRAPH.inputs)
    edges = list(GRAPH.edges)
    assert all(parse_edge(edge.name) == edge == GRAPH.edge(edge.name) for edge in edges)
    assert len(set(edges)) == len(edges) == GRAPH.n_edges


def test_a_grouped_query_model_has_one_k_and_one_v_input_for_each_key_value_head():
    names = [one.name for one in GRAPH.inputs_of(1)]
    assert names == [*(f"a1.h{h}.q" for h in range(4)), "a1.kv0.k", "a1.kv1.k", "a1.kv0.v", "a1.kv1.v", "m1.in"]
    assert GRAPH.nodes_at(Input("k", 1, 1)) == (Node("head", 1, 2), Node("head", 1, 3))
    assert [one.name for one in GRAPH.inputs_to(Node("head", 1, 2))] == ["a1.h2.q", "a1.kv1.k", "a1.kv1.v"]


def test_an_input_reads_what_was_written_before_it_and_no_more():
    def read(name: str) -> list[str]:
        return [node.name for node in GRAPH.senders[: GRAPH.reach(GRAPH.input(name))]]

    assert read("a0.kv0.v") == ["embed"]
    assert read("m0.in") == ["embed", "a0.h0", "a0.h1", "a0.h2", "a0.h3"]
    assert read("a1.h3.q") == [*read("m0.in"), "m0"]
    assert read("logits.in") == [node.name for node in GRAPH.senders]
    assert all(GRAPH.index(node) == at for at, node in enumerate(GRAPH.senders))


def test_the_sizes_of_an_8b_shape():
    large = Graph(32, 32, 8)
    assert (len(large.senders), len(large.inputs), large.n_edges) == (1057, 1569, 805_681)


def test_patterns_select_edges_in_the_graphs_order():
    found = [edge.name for edge in GRAPH.select(["a0.*->a1.kv?.k", "embed->m0.in", "a0.h1->a1.kv0.k"])]
    assert found == ["embed->m0.in", *(f"a0.h{h}->a1.kv{kv}.k" for kv in range(2) for h in range(4))]
    with pytest.raises(UsageError, match="no edge matches"):
        GRAPH.select(["a2.*->a1.*"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a0.h9->a1.kv0.k", "'a0.h3'"),
        ("a0.h0->a1.kv2.k", "a1.kv"),
        ("a1.h0->a1.kv0.k", "before a1.kv0.k"),
        ("logits->m0.in", "before"),
        ("a0.h0", "a0.h0->a1.kv0.k"),
    ],
)
def test_an_edge_that_is_none_is_refused_with_what_was_meant(name, said):
    with pytest.raises(UsageError) as error:
        GRAPH.edge(name)
    assert said in f"{error.value.why} {error.value.fix}"
    with pytest.raises(UsageError, match="unknown edge"):
        parse_edge("a0h0->a1.kv0.k".replace("->", "="))
