"""The layout rules of the house: imports point downward, heavy libraries live in one place, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from greatctl.cli.commands import NAMES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "greatctl"
FILES = sorted(PACKAGE.rglob("*.py"))

GROUND, SETTINGS, STORE, EXTEND, DOMAIN, STAGES, CLI = range(7)
FLOORS = {
    "errors": GROUND,
    "events": GROUND,
    "urls": GROUND,
    "toml_positions": GROUND,
    "toml_file": GROUND,
    "entries": GROUND,
    "manifest": SETTINGS,
    "settings": SETTINGS,
    "store": STORE,
    "extend": EXTEND,
    "stats": DOMAIN,
    "corpus": DOMAIN,
    "model": DOMAIN,
    "sae": DOMAIN,
    "features": DOMAIN,
    "patching": DOMAIN,
    "report": DOMAIN,
    "reference": DOMAIN,
    "stages": STAGES,
    "notebook": STAGES,
    "cli": CLI,
}
ONE_PLACE = {
    "transformer_lens": {"model/bridge.py"},
    "httpx2": {"store/http.py"},
    "typer": {"cli/"},
    "rich": {"cli/"},
    "jinja2": {"report/"},
    "plotly": {"report/"},
    "pluggy": {"extend/"},
}
NOWHERE = ("pickle", "click", "wandb", "sae_lens", "requests", "httpx")


def _imports(path: Path) -> list[str]:
    """Every absolute module name that a file imports, anywhere in it."""
    package = ["greatctl", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            found.append(module)
            found += [f"{module}.{alias.name}" for alias in node.names if module == "greatctl"]
    return found


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if here in ("__init__", "__main__"):
        return
    for module in _imports(path):
        there = _room(module)
        if not module.startswith("greatctl.") or there in ("", here, "__version__"):
            continue
        assert FLOORS[there] <= FLOORS[here], f"{path.name} imports {module}, which lies above it"
        if FLOORS[here] == DOMAIN and FLOORS[there] == DOMAIN:
            assert there == "stats", f"{path.name} imports {module}: rooms of the domain meet in stages"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_heavy_library_is_imported_in_one_place(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    for module in _imports(path):
        top = module.split(".")[0]
        assert top not in NOWHERE, f"{name} imports {top}"
        if top in ONE_PLACE:
            assert any(name == place or name.startswith(place) for place in ONE_PLACE[top]), f"{name} imports {top}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_file_is_one_idea(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    assert ast.get_docstring(ast.parse(text)), "a module opens with what it is for"


def test_only_the_command_line_prints_or_exits() -> None:
    for path in FILES:
        name = str(path.relative_to(PACKAGE))
        if name.startswith("cli/") or name == "reference/build.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "exit", "quit", "input"), f"{name}:{node.lineno}"
            if isinstance(node, ast.Attribute) and node.attr == "exit" and isinstance(node.value, ast.Name):
                assert node.value.id != "sys", f"{name}:{node.lineno}"


def test_nothing_unpickles() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{path.name}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("words", [["--help"], ["--version"], *[[c, "--help"] for c in NAMES]])
def test_help_works_where_importing_torch_raises(words: list[str]) -> None:
    program = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'transformer_lens', 'scipy', 'pyarrow'):\n"
        "            raise ImportError('not now: ' + name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"sys.argv = ['greatctl', *{words!r}]\n"
        "from greatctl.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "greatctl" in done.stdout


def test_importing_greatctl_loads_nothing_heavy() -> None:
    program = (
        "import sys, greatctl\n"
        "greatctl.hookimpl\n"
        "heavy = {'torch', 'transformers', 'numpy', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
