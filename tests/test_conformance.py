"""Conformance: what greatctl ships, and the README's package, pass the checks; and the checks can fail."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from greatctl.errors import IntegrityError
from greatctl.extend.manager import load_plugins
from greatctl.extend.testing import check_architecture, check_metric, check_source, no_network, sample_entry

SHIPPED = Path(__file__).parent.parent / "plugins"


# --- the README, carried out
# --------------------------------------------------------------------------------------------------


def write_readme_package(folder: Path) -> Path:
    blocks = re.findall(
        r"^`(greatctl-example/[\w./-]+)`\n\n```\w+\n(.*?)^```$",
        (SHIPPED / "README.md").read_text(),
        re.M | re.S,
    )
    assert len(blocks) == 6
    for name, text in blocks:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "greatctl-example"


def install(package: Path, site: Path) -> None:
    """With pip where it and the build backend are at hand; otherwise what pip would have written."""
    if importlib.util.find_spec("pip") and importlib.util.find_spec("hatchling"):
        options = "--quiet --no-index --no-deps --no-build-isolation --no-compile --disable-pip-version-check"
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            *options.split(),
            "--target",
            str(site),
            str(package),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    points = "".join(f"{name} = {value}\n" for name, value in project["entry-points"]["greatctl"].items())
    info = site / "greatctl_example.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text(f"[greatctl]\n{points}")
    fields = f"Name: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\n{fields}")
    (package / "greatctl_example").rename(site / "greatctl_example")


def test_the_readme_package_can_be_built_installed_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, site = write_readme_package(tmp_path), tmp_path / "site"
    site.mkdir()
    install(package, site)
    monkeypatch.syspath_prepend(str(site))
    plugins = load_plugins(folder=None)
    row = next(plugin for plugin in plugins.report if plugin.name == "example")
    assert (row.version, row.origin, row.error) == ("0.1.0", "installed: greatctl-example 0.1.0", None)
    used = {"sources": ["example-text"], "architectures": ["hard-threshold"], "metrics": ["answer-logit"]}
    for kind, (name,) in used.items():
        assert plugins.registry.get(kind, name).__module__.startswith("greatctl_example")
    assert len(plugins.digests(used)) == 3
    tests: dict[str, object] = {}
    exec(compile((package / "tests" / "test_example.py").read_text(), "test_example.py", "exec"), tests)
    for name in ("test_source", "test_architecture", "test_metric"):
        tests[name]()  # type: ignore[operator]


def test_the_readme_one_file_plugin_works(tmp_path: Path) -> None:
    first = re.search(r"```python\n(.*?)```", (SHIPPED / "README.md").read_text(), re.S)
    assert first
    (tmp_path / "answer_prob.py").write_text(first[1])
    plugins = load_plugins(folder=None, paths=[str(tmp_path)])
    check_metric(plugins.registry.get("metrics", "answer-log-prob"))


# --- conformance
# ------------------------------------------------------------------------------------------------------------

EVERYTHING = load_plugins(folder=None, paths=[str(SHIPPED)], names=())
SETTINGS = {name: {"k": 3} for name in ("topk", "batchtopk", "gated", "jumprelu", "matryoshka")}
SETTINGS |= {name: {"k": 3, "d_out": 20} for name in ("transcoder", "skip-transcoder")}
WIKI_PAGE = (
    '<div class="mw-content-ltr mw-parser-output" lang="en" dir="ltr"><style>.x{}</style>'
    '<div class="ws-noexport"><p>Header<br>by <b>someone</b></p></div>'
    '<p>Four score and seven years ago<sup class="reference"><a href="#n">[1]</a></sup> our fathers\n brought'
    ' forth.</p><h2>A head<span class="mw-editsection">[edit]</span></h2>'
    "<p>The cafe\u0301 &amp; the\u00ad house<br/>stood.</p></div>"
)
WIKI_URL = "https://en.wikisource.org/wiki/Gettysburg_Address_(Bliss_copy)"


def wikisource():
    return EVERYTHING.registry.get("sources", "wikisource")


@pytest.mark.parametrize("name", EVERYTHING.registry.names("metrics"))
def test_metric_conforms(name: str) -> None:
    check_metric(EVERYTHING.registry.get("metrics", name))


@pytest.mark.parametrize("name", EVERYTHING.registry.names("architectures"))
def test_architecture_conforms(name: str) -> None:
    check_architecture(EVERYTHING.registry.get("architectures", name), SETTINGS.get(name))


@pytest.mark.parametrize("name", EVERYTHING.registry.names("architectures"))
def test_a_saved_architecture_reads_raw_activations_as_it_read_scaled_ones(name: str, tmp_path: Path) -> None:
    import torch

    from greatctl.sae.folder import Origin, load, save

    torch.manual_seed(0)
    cls = EVERYTHING.registry.get("architectures", name)
    coder = cls(cls.Config(d_in=8, d_sae=24, **SETTINGS.get(name, {}))).eval()
    save(tmp_path, coder, 0.5, Origin("bundled", "blocks.1.hook_resid_post", 256))
    sae, x = load(tmp_path, EVERYTHING.registry), torch.randn(32, 8)
    assert sae.arch == name
    expected = coder.reconstruct(0.5 * x).detach() / (1 if coder.reads_target else 0.5)
    assert torch.allclose(sae.reconstruct(x), expected, atol=1e-5)


def test_gutenberg_conforms() -> None:
    book = "A Sample\n[EBook #7]\n*** START OF THIS PROJECT GUTENBERG EBOOK A SAMPLE ***\n"
    book += "\nHe rose early.\n\nHe wrote it down.\n\n*** END OF THIS PROJECT GUTENBERG EBOOK A SAMPLE ***\n"
    entry = sample_entry("gutenberg", pg=7)
    check_source(EVERYTHING.registry.get("sources", "gutenberg"), entry, {"original.txt": book.encode()})


def test_manual_conforms() -> None:
    entry = sample_entry("manual", where="a library")
    check_source(
        EVERYTHING.registry.get("sources", "manual"),
        entry,
        {"original.txt": b"He rose early.\n\nHe wrote.\n"},
    )


def test_wikisource_conforms() -> None:
    check_source(wikisource(), sample_entry("wikisource", WIKI_URL), {"original.html": WIKI_PAGE.encode()})


def test_wikisource_reads_the_paragraphs_and_hands_back_what_it_cut() -> None:
    document = wikisource()().read(sample_entry("wikisource", WIKI_URL), {"original.html": WIKI_PAGE.encode()})
    wanted = [
        "Four score and seven years ago our fathers brought forth.",
        "A head",
        "The caf\u00e9 & the house\nstood.",
    ]
    assert document.text == "\n\n".join(wanted) + "\n"
    assert [(piece.rule, piece.text) for piece in document.removed] == [
        ("style", ".x{}"), ("ws-noexport", "Header by someone"), ("reference", "[1]"),
        ("mw-editsection", "[edit]"),
    ]  # fmt: skip


def test_wikisource_asks_for_the_revision_that_the_manifest_names() -> None:
    entry = sample_entry("wikisource", WIKI_URL, extra={"revision": 123})
    (resource,) = wikisource()().locate(entry, lambda url: b"")
    assert resource.url == (
        "https://en.wikisource.org/w/index.php?title=Gettysburg_Address_(Bliss_copy)&action=render&oldid=123"
    )


# --- the checks themselves can fail (faults 61 and 63)
# -----------------------------------------------------------------------------


def test_no_network_refuses_a_socket() -> None:
    import socket

    with no_network(), pytest.raises(AssertionError, match="network"):
        socket.create_connection(("127.0.0.1", 9))


def test_check_source_finds_a_socket_a_clock_and_trust() -> None:
    good = wikisource()
    files = {"original.html": WIKI_PAGE.encode()}
    entry = sample_entry("wikisource", WIKI_URL)

    class Connects(good):
        def read(self, entry, files):
            import socket

            socket.create_connection(("127.0.0.1", 9))

    class Counts(good):
        n = 0

        def read(self, entry, files):
            Counts.n += 1
            return type(super().read(entry, files))(f"reading {Counts.n}")

    class Trusts(good):
        def read(self, entry, files):
            try:
                return super().read(entry, files)
            except IntegrityError:
                return super().read(entry, {"x": WIKI_PAGE.encode()})

    class Wanders(good):
        hosts = frozenset({"example.org"})

    for broken, words in {
        Connects: "network",
        Counts: "another document",
        Trusts: "no bytes",
        Wanders: "hosts",
    }.items():
        with pytest.raises(AssertionError, match=words):
            check_source(broken, entry, files)


def test_check_architecture_finds_shapes_nan_gradients_and_what_does_not_learn() -> None:
    import torch

    relu = EVERYTHING.registry.get("architectures", "relu")

    class Narrow(relu):
        def encode(self, x):
            return super().encode(x)[:, :-1]

    class NotFinite(relu):
        def losses(self, x, *, dead, step):
            return {"mse": super().losses(x, dead=dead, step=step)["mse"] / 0}

    class Deaf(relu):
        def losses(self, x, *, dead, step):
            return {"mse": (x - self.decode(self.encode(x).detach())).square().mean()}

    class Unseeded(relu):
        def __init__(self, config):
            super().__init__(config)
            torch.nn.init.normal_(self.b_enc, generator=torch.Generator().manual_seed(torch.seed() % 2**31))

    class Lazy(relu):
        def losses(self, x, *, dead, step):
            return {name: term * 1e-12 for name, term in super().losses(x, dead=dead, step=step).items()}

        def after_step(self):
            with torch.no_grad():
                self.W_dec.zero_()

    wrong = {Narrow: "shape", NotFinite: "not finite", Deaf: "W_enc", Unseeded: "same seed", Lazy: "explains"}
    for broken, words in wrong.items():
        with pytest.raises(AssertionError, match=words):
            check_architecture(broken, steps=30)


def test_check_metric_finds_means_nan_and_neighbours() -> None:
    logit = EVERYTHING.registry.get("metrics", "logit-diff")

    class Mean(logit):
        def __call__(self, logits, answers):
            return super().__call__(logits, answers).mean()

    class Centred(logit):
        def __call__(self, logits, answers):
            value = super().__call__(logits, answers)
            return value - value.mean()

    class Log(logit):
        def __call__(self, logits, answers):
            return logits.softmax(-1).gather(-1, answers.answer[:, None])[:, 0].log()

    class InPlace(logit):
        def __call__(self, logits, answers):
            return super().__call__(logits.clamp_(-1, 1), answers)

    class Counting(logit):
        def __call__(self, logits, answers):
            return (super().__call__(logits, answers) > 0).float()

    wrong = {
        Mean: "one number",
        Centred: "the others",
        Log: "not finite",
        InPlace: "changes",
        Counting: "gradient",
    }
    for broken, words in wrong.items():
        with pytest.raises(AssertionError, match=words):
            check_metric(broken)
