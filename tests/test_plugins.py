"""Plugins: each is loaded alone, undone when it fails, and named; conformance checks pass for all that
greatctl ships.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from greatctl.errors import PluginError, UsageError
from greatctl.events import Event
from greatctl.extend import hookspecs
from greatctl.extend.manager import ENVIRONMENT, Plugins, load_plugins
from greatctl.extend.testing import (
    check_observer,
    check_sections_hook,
)

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "plugins"
BUILT_IN = {
    "sources": {"gutenberg", "manual"},
    "architectures": {
        "batchtopk",
        "gated",
        "jumprelu",
        "matryoshka",
        "relu",
        "skip-transcoder",
        "topk",
        "transcoder",
    },
    "metrics": {"accuracy", "ce", "js", "kl", "log-prob", "logit", "logit-diff", "prob", "prob-diff", "rank"},
}
METRIC = """
from greatctl import hookimpl

class M:
    name, unit, differentiable = "{name}", "logits", True
    def __call__(self, logits, answers):
        return logits[:, 0]

@hookimpl
def register_metrics(register):
    register("{name}", M)
"""


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "sources.toml").write_text("")
    (tmp_path / "plugins").mkdir()
    return tmp_path


def plugin(project: Path, name: str, text: str) -> Path:
    path = project / "plugins" / f"{name}.py"
    path.write_text(text)
    return path


def line(plugins: Plugins, name: str):
    return next(p for p in plugins.report if p.name == name)


# --- what is there
# -----------------------------------------------------------------------------------------------------


def test_built_ins_are_listed_without_importing_torch() -> None:
    code = (
        "import sys; from greatctl.extend.manager import load_plugins;"
        "r = load_plugins(folder=None, enabled=False).registry;"
        "import json; print(json.dumps({k: r.names(k) for k in ('sources', 'architectures', 'metrics')}));"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert {kind: set(names) >= BUILT_IN[kind] for kind, names in listed.items()} == dict.fromkeys(BUILT_IN, True)


def test_shipped_plugins_load_without_torch() -> None:
    code = (
        "import sys; from greatctl.extend.manager import load_plugins;"
        "p = load_plugins(folder=None, paths=['plugins']);"
        "print([x.error for x in p.report if x.error], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[] False", done.stderr


def test_every_hook_is_described_and_stands_in_the_readme() -> None:
    hooks = [name for name, value in vars(hookspecs).items() if hasattr(value, "greatctl_spec")]
    readme = (SHIPPED / "README.md").read_text()
    assert len(hooks) == 5
    for name in hooks:
        assert len(getattr(hookspecs, name).__doc__) > 40
        assert f"`{name}(" in readme
        assert getattr(hookspecs, name).greatctl_spec["firstresult"] is False


def test_a_plugin_of_the_project_gives_its_metric(project: Path) -> None:
    path = plugin(project, "my_metric", '__version__ = "2.5"\n' + METRIC.format(name="first-logit"))
    plugins = load_plugins(folder=project)
    assert plugins.registry.get("metrics", "first-logit").__name__ == "M"
    assert line(plugins, "my-metric").to_json() == {
        "name": "my-metric", "version": "2.5", "origin": str(path.resolve()),
        "items": ["metrics/first-logit"],
        "hooks": [], "replaces": [], "error": None,
    }  # fmt: skip


def test_a_folder_without_manifest_runs_no_code(project: Path) -> None:
    (project / "sources.toml").unlink()
    plugin(project, "evil", "raise SystemError('ran')")
    assert [p.name for p in load_plugins(folder=project).report if p.origin.startswith(str(project))] == []


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_run_no_code_of_the_project(project: Path, flag: str) -> None:
    plugin(project, "evil", f"open({str(project / 'ran')!r}, 'w')\n")
    command = [sys.executable, "-m", "greatctl", "-C", str(project), flag]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (project / "ran").exists()


def test_test_files_and_hidden_files_are_no_plugins(project: Path) -> None:
    for name in ("_draft", "test_mine", "conftest"):
        plugin(project, name, "raise SystemError('ran')")
    assert not load_plugins(folder=project).registry.failed


def test_no_plugins_loads_none_at_all(project: Path) -> None:
    path = plugin(project, "mine", METRIC.format(name="mine"))
    plugins = load_plugins(folder=project, paths=[str(path)], enabled=False)
    assert [p.name for p in plugins.report] == ["greatctl"]


@pytest.mark.parametrize(("setting", "loaded"), [("", []), ("one", ["one"]), ("two, one", ["one", "two"])])
def test_environment_names_the_plugins_to_load(
    project: Path, monkeypatch: pytest.MonkeyPatch, setting: str, loaded: list[str]
) -> None:
    for name in ("one", "two", "three"):
        plugin(project, name, METRIC.format(name=name))
    monkeypatch.setenv(ENVIRONMENT, setting)
    assert [p.name for p in load_plugins(folder=project).report[1:]] == loaded


def test_plugin_flag_takes_a_file_a_package_and_a_folder_and_loads_each_once(project: Path) -> None:
    path = plugin(project, "one", METRIC.format(name="one"))
    package = project / "plugins" / "two"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import register_metrics\n")
    (package / "inner.py").write_text(METRIC.format(name="two"))
    plugins = load_plugins(folder=project, paths=[str(path), str(package), str(project / "plugins")])
    assert [(p.name, p.items) for p in plugins.report[1:]] == [
        ("one", ("metrics/one",)),
        ("two", ("metrics/two",)),
    ]


def test_plugin_flag_with_no_file_is_a_usage_error(project: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.py"):
        load_plugins(folder=project, paths=["nothing.py"])


# --- faults 59 and 60: bad plugins
# ----------------------------------------------------------------------------------------

HOOK = "from greatctl import hookimpl\n\n@hookimpl\n"
BAD = {
    "syntax error": ("def (:\n", "SyntaxError"),
    "missing import": ("import a_module_that_is_not_there\n", "a_module_that_is_not_there"),
    "sys.exit at import": ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    "raises at import": ("1 / 0\n", "ZeroDivisionError"),
    "wrong argument": (HOOK + "def register_metrics(register, extra):\n    pass\n", "extra"),
    "misspelt hook": (HOOK + "def register_metric(register):\n    pass\n", "register_metrics"),
    "no marker": ("def register_metrics(register):\n    pass\n", "@hookimpl"),
    "no hook": ("x = 1\n", "no hook"),
    "wrong type": (HOOK + "def register_metrics(register):\n    register('x', 3)\n", "module:Class"),
    "instance": (HOOK + "def register_metrics(register):\n    register('x', object())\n", "module:Class"),
    "no name": (HOOK + "def register_metrics(register):\n    register('../x', 'a:B')\n", "no name"),
    "broken contract": (HOOK + "def register_metrics(register):\n    register('x', dict)\n", "PatchMetric"),
    "other name": (METRIC.format(name="a") + "    register('b', M)\n", "registered as 'b'"),
    "same name twice": (METRIC.format(name="a") + "    register('a', M, replace=True)\n", "each name once"),
    "duplicate of a built-in": (METRIC.format(name="logit-diff"), "'greatctl' gives already"),
    "half registered, then failing": (METRIC.format(name="half") + "    raise ValueError('half')\n", "half"),
    "half registered, then exiting": (METRIC.format(name="half") + "    raise SystemExit\n", "SystemExit"),
    "fails in its second hook": (
        METRIC.format(name="half") + "\n@hookimpl\ndef observe(event, extra):\n    pass\n", "extra",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_plugin_is_named_undone_and_harmless(project: Path, fault: str) -> None:
    text, cause = BAD[fault]
    plugin(project, "bad", text)
    plugin(project, "good", METRIC.format(name="good"))
    modules = set(sys.modules)
    plugins = load_plugins(folder=project)
    bad = line(plugins, "bad")
    assert bad.error is not None and cause in bad.error and "\n" not in bad.error
    assert bad.items == ()
    assert plugins.registry.get("metrics", "good")
    assert plugins.registry.names("metrics") == sorted({"good", *load_plugins(folder=None).registry.names("metrics")})
    assert plugins.registry.item("metrics", "logit-diff").plugin == "greatctl"
    assert not [name for name in set(sys.modules) - modules if name.startswith("greatctl_local_bad")]
    plugins.observe(Event("notice", "train"))  # no hook of the bad plugin is left behind


def test_an_unknown_name_is_exit_8_while_a_plugin_is_missing_and_2_otherwise(project: Path) -> None:
    with pytest.raises(UsageError, match="'margin'") as unknown:
        load_plugins(folder=project).registry.get("metrics", "margin")
    assert unknown.value.exit_code == 2
    plugin(project, "bad", BAD["missing import"][0])
    with pytest.raises(PluginError) as error:
        load_plugins(folder=project).registry.get("metrics", "margin")
    assert error.value.exit_code == 8
    assert "a_module_that_is_not_there" in error.value.why and "bad" in error.value.why


def test_an_unknown_name_gets_the_nearest_names() -> None:
    with pytest.raises(UsageError) as error:
        load_plugins(folder=None, enabled=False).registry.get("metrics", "logit-dif")
    assert "'logit-diff'" in error.value.fix


def test_what_a_plugin_prints_goes_to_stderr(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noise = "import os, sys\nprint('one')\nos.system('echo two')\nsys.__stdout__.write('three\\n')\n"
    plugin(project, "loud", noise + METRIC.format(name="loud") + "    print('four')\n")
    plugins = load_plugins(folder=project)
    print("result")
    out, err = capfd.readouterr()
    assert out == "result\n"
    assert all(word in err for word in ("one", "two", "four"))
    assert not line(plugins, "loud").error


def test_a_slow_import_is_noticed(project: Path) -> None:
    plugin(project, "slow", "import time\ntime.sleep(0.3)\n" + METRIC.format(name="slow"))
    notices: list[str] = []
    plugins = load_plugins(folder=project, notice=notices.append, slow_after=0.05)
    assert plugins.registry.get("metrics", "slow")
    assert [n for n in notices if "slow is still loading" in n] and len(notices) == 1


def test_ctrl_c_during_an_import_is_not_a_fault_of_the_plugin(project: Path) -> None:
    plugin(project, "stopped", "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_plugins(folder=project)


def test_a_lazy_target_that_fails_is_exit_8_naming_plugin_and_cause(project: Path) -> None:
    target = HOOK + "def register_metrics(register):\n"
    plugin(project, "lazy", target + "    register('a', 'nowhere_at_all:A')\n    register('b', 'json:dumps')\n")
    plugin(project, "wrong", target + "    register('c', 'fractions:Fraction')\n")
    registry = load_plugins(folder=project).registry
    for name, words in {"a": "nowhere_at_all", "b": "not a class", "c": "unit"}.items():
        with pytest.raises(PluginError) as error:
            registry.get("metrics", name)
        assert words in error.value.message + error.value.why
        assert ("wrong" if name == "c" else "lazy") in error.value.message


def test_two_plugins_of_one_item_are_both_named(project: Path) -> None:
    plugin(project, "first", METRIC.format(name="same"))
    plugin(project, "second", METRIC.format(name="same"))
    plugins = load_plugins(folder=project)
    assert plugins.registry.item("metrics", "same").plugin == "first"
    error = line(plugins, "second").error
    assert error and "'second'" in error and "'first'" in error


def test_two_plugins_of_one_name_do_not_mix(project: Path, tmp_path: Path) -> None:
    plugin(project, "mine", METRIC.format(name="mine"))
    other = tmp_path / "elsewhere" / "mine.py"
    other.parent.mkdir()
    other.write_text(METRIC.format(name="other"))
    plugins = load_plugins(folder=project, paths=[str(other)])
    assert "mine" in plugins.registry.names("metrics") and "other" not in plugins.registry.names("metrics")
    assert plugins.report[-1].error and "already" in plugins.report[-1].error
    assert plugins.registry.get("metrics", "mine")


def test_replacing_a_built_in_is_announced_and_recorded(project: Path) -> None:
    plugin(project, "better", METRIC.format(name="prob").replace("M)", "M, replace=True)"))
    notices: list[str] = []
    plugins = load_plugins(folder=project, notice=notices.append)
    assert line(plugins, "better").replaces == ("metrics/prob (greatctl)",)
    assert notices == ["plugin better replaces metrics/prob (greatctl)"]
    assert plugins.registry.item("metrics", "prob").replaces == "greatctl"
    assert plugins.digests({"metrics": ["prob"]})


# --- fault 62: digests
# ----------------------------------------------------------------------------------------------------


def test_the_digest_follows_the_plugin_and_built_ins_have_none(project: Path) -> None:
    plugin(project, "mine", METRIC.format(name="mine"))
    used = {"metrics": ["mine", "logit-diff"], "architectures": ["topk"]}
    first = load_plugins(folder=project).digests(used)
    assert list(first) == ["metrics/mine"] and first == load_plugins(folder=project).digests(used)
    plugin(project, "mine", METRIC.format(name="mine").replace("logits[:, 0]", "logits[:, 1]"))
    changed = load_plugins(folder=project)
    assert changed.digests(used) != first
    assert changed.registry.digest("metrics", "logit-diff") is None


def test_an_edit_of_the_same_size_in_the_same_second_runs_the_new_code(project: Path) -> None:
    path = plugin(project, "mine", METRIC.format(name="mine"))
    load_plugins(folder=project)
    stamp = path.stat().st_mtime_ns
    path.write_text(METRIC.format(name="mine").replace('"logits"', '"wordss"'))
    os.utime(path, ns=(stamp, stamp))
    assert load_plugins(folder=project).registry.get("metrics", "mine").unit == "wordss"


def test_the_digest_of_a_folder_covers_every_file(project: Path) -> None:
    package = project / "plugins" / "two"
    package.mkdir()
    (package / "__init__.py").write_text(METRIC.format(name="two"))
    (package / "table.txt").write_text("1")
    before = load_plugins(folder=project).registry.digest("metrics", "two")
    (package / "table.txt").write_text("2")
    assert load_plugins(folder=project).registry.digest("metrics", "two") != before


# --- observers and sections (fault 64)
# ----------------------------------------------------------------------------------


def test_an_observer_that_raises_is_muted_with_one_notice(project: Path) -> None:
    plugin(project, "broken", HOOK + "def observe(event):\n    raise RuntimeError('no \\x1b[31m tracker')\n")
    plugin(project, "hears", HOOK + "def observe(event):\n    event.data['seen'].append(event.kind)\n")
    notices: list[str] = []
    plugins = load_plugins(folder=project, notice=notices.append)
    seen: list[str] = []
    for _ in range(100):
        plugins.observe(Event("metric", "train", data={"seen": seen}))
    assert len(seen) == 100
    assert len(notices) == 1 and "broken" in notices[0] and "tracker" in notices[0] and "\x1b" not in notices[0]
    assert line(plugins, "hears").hooks == ("observe",)


def test_what_an_observer_prints_stays_off_stdout(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plugin(project, "loud", HOOK + "def observe(event):\n    print('heard')\n")
    load_plugins(folder=project).observe(Event("notice", "train"))
    assert capfd.readouterr() == ("", "heard\n")


def test_a_section_that_fails_says_so_and_costs_no_other(project: Path) -> None:
    good = "return [{'title': 'T', 'blocks': [{'kind': 'table', 'columns': ['a'], 'rows': [['</script>']]}]}]"
    plugin(project, "a_raises", HOOK + "def report_sections(results):\n    1 / 0\n")
    plugin(project, "b_html", HOOK + "def report_sections(results):\n    return ['<b>bold</b>']\n")
    plugin(project, "c_good", HOOK + f"def report_sections(results):\n    {good}\n")
    sections = load_plugins(folder=project).report_sections(project)
    assert [s["plugin"] for s in sections] == ["a-raises", "b-html", "c-good"]
    assert "ZeroDivisionError" in str(sections[0]["blocks"]) and "a section is" in str(sections[1]["blocks"])
    assert sections[2]["blocks"] == [{"kind": "table", "columns": ["a"], "rows": [["</script>"]]}]


@pytest.mark.parametrize(
    "blocks",
    [
        [{"kind": "html", "html": "<b>"}],
        [{"kind": "prose", "text": 3}],
        [{"kind": "table", "columns": ["a"], "rows": [[1, 2]]}],
        [{"kind": "table", "columns": ["a"], "rows": [[object()]]}],
        "prose",
    ],
)
def test_check_sections_hook_finds_wrong_blocks(tmp_path: Path, blocks: object) -> None:
    with pytest.raises(AssertionError):
        check_sections_hook(lambda results: [{"title": "T", "blocks": blocks}], tmp_path)


def test_check_observer_wants_every_kind_of_event_taken() -> None:
    check_observer(lambda event: None)
    with pytest.raises(KeyError):
        check_observer(lambda event: event.data["loss"] and None)


# --- fault 66: installed distributions
# --------------------------------------------------------------------------------------


def distribution(site: Path, name: str, version: str, entry_points: str, **modules: str) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)
    for module, text in modules.items():
        (site / f"{module}.py").write_text(text)


def test_installed_plugins_load_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = "[greatctl]\n{0} = {1}\n".format
    distribution(tmp_path, "b-good", "1.2", point("good", "gp_good"), gp_good=METRIC.format(name="good"))
    distribution(
        tmp_path,
        "a-broken",
        "3.4",
        point("broken", "gp_broken"),
        gp_broken="import a_module_that_is_not_there",
    )
    distribution(tmp_path, "c-again", "5.6", point("good", "gp_again"), gp_again=METRIC.format(name="again"))
    distribution(tmp_path, "d-torn", "7.8", "[greatctl]\nnot a line of this format\n")
    distribution(tmp_path, "e-gone", "9.0", point("gone", "gp_nowhere:plugin"))
    distribution(tmp_path, "f-odd", "1.0", point("odd", "not a module!"))
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = load_plugins(folder=None)
    rows = {p.origin: p for p in plugins.report if p.origin.startswith("installed: ")}
    names = ["a-broken 3.4", "b-good 1.2", "c-again 5.6", "d-torn 7.8", "e-gone 9.0", "f-odd 1.0"]
    assert [origin for origin in rows if origin.removeprefix("installed: ") in names] == [
        f"installed: {n}" for n in names
    ]
    good = rows["installed: b-good 1.2"]
    assert (good.name, good.version, good.items, good.error) == ("good", "1.2", ("metrics/good",), None)
    again = rows["installed: c-again 5.6"].error
    assert again and "b-good 1.2" in again
    for name in (n for n in names if n not in ("b-good 1.2", "c-again 5.6")):
        assert rows[f"installed: {name}"].error
    assert "again" not in plugins.registry.names("metrics")
    assert plugins.registry.digest("metrics", "good")


def test_an_installed_plugin_in_a_fresh_process_with_a_broken_one_beside_it(tmp_path: Path) -> None:
    distribution(tmp_path, "gp-exit", "0.1", "[greatctl]\nexit = gp_exit\n", gp_exit="raise SystemExit(4)")
    code = (
        "import json; from greatctl.extend.manager import load_plugins;"
        "print(json.dumps([p.to_json() for p in load_plugins(folder=None).report]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    row = next(row for row in json.loads(done.stdout) if row["name"] == "exit")
    assert row["origin"] == "installed: gp-exit 0.1" and "SystemExit: 4" in row["error"]
