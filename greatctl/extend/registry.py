"""Who gave what: every source kind, architecture and metric, by name, with the plugin that it came from.

Items are registered as classes or as "module:Class" strings; a string is imported when the item is first
used, so listing names loads no torch. Whatever comes out of `get` has been held against its contract.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..errors import PluginError, UsageError, did_you_mean
from . import contracts
from .hookspecs import Register
from .loading import describe, stdout_to_stderr

__all__ = ["BUILTIN", "Item", "Registry", "check_contract"]

BUILTIN = "greatctl"

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_TARGET = re.compile(r"\.*[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_CONTRACTS: dict[str, type] = {
    "sources": contracts.Source,
    "architectures": contracts.SparseCoder,
    "metrics": contracts.PatchMetric,
}
_WORDS = {"sources": "source kind", "architectures": "architecture", "metrics": "metric"}


@dataclass(frozen=True)
class Item:
    """One registered thing.

    Attributes:
        kind: `sources`, `architectures` or `metrics`.
        target: the class, or "module:Class" until it is used.
        plugin: name of the plugin that gave it; `greatctl` for built-ins.
        version: that plugin's version, where it says one.
        digest: sha256 over that plugin's files; None for built-ins.
        replaces: the plugin whose item of this name it took the place of.
        package: what a relative target is relative to.
    """

    name: str
    kind: str
    target: type | str
    plugin: str
    version: str | None = None
    digest: str | None = None
    replaces: str | None = None
    package: str | None = None


@dataclass
class Registry:
    """Items by kind and name. `failed` maps each plugin that could not be loaded to the reason."""

    failed: dict[str, str] = field(default_factory=dict)
    _items: dict[tuple[str, str], Item] = field(default_factory=dict)

    def names(self, kind: str) -> list[str]:
        """The names of a kind, sorted; imports nothing."""
        return sorted(name for known, name in self._items if known == kind)

    def items(self, plugin: str | None = None) -> list[Item]:
        """All items in the order of registration, or one plugin's."""
        return [item for item in self._items.values() if plugin in (None, item.plugin)]

    def item(self, kind: str, name: str) -> Item:
        """The item of a name.

        Raises:
            PluginError: the name is unknown, and a plugin that might have given it was not loaded (exit 8).
            UsageError: the name is unknown (exit 2).
        """
        if (kind, name) in self._items:
            return self._items[kind, name]
        message = f"{_WORDS[kind]} {name!r} is not known"
        fix = did_you_mean(name, self.names(kind))
        if self.failed:
            causes = "; ".join(f"{plugin}: {error}" for plugin, error in self.failed.items())
            raise PluginError(
                message,
                why=f"it may come from a plugin that was not loaded ({causes})",
                fix=f"mend that plugin; or {fix}",
            )
        raise UsageError(message, why="neither greatctl nor a loaded plugin gives it", fix=fix)

    def get(self, kind: str, name: str) -> type:
        """The class of a name, imported now if need be and held against its contract.

        Raises:
            PluginError: see `item`; or the class cannot be imported, or does not keep its contract (exit 8).
            UsageError: see `item`.
        """
        item = self.item(kind, name)
        target = _imported(item) if isinstance(item.target, str) else item.target
        check_contract(kind, name, target, plugin=item.plugin)
        return target

    def digest(self, kind: str, name: str) -> str | None:
        """What a fingerprint needs: the digest of the item's plugin, None for built-ins. Errors as `item`."""
        return self.item(kind, name).digest

    def digests(self, used: Mapping[str, Iterable[str]]) -> dict[str, str]:
        """{"kind/name": digest} of the items used ({"metrics": ["rank"]}), without built-ins. Errors as
        `item`.
        """
        pairs = [(kind, name) for kind, names in used.items() for name in names]
        return {f"{kind}/{name}": digest for kind, name in pairs if (digest := self.digest(kind, name))}

    def registrar(self, kind: str, template: Item) -> Register:
        """What a plugin's hook is handed for one kind. `template` has its plugin, version, digest and
        package.
        """

        def register(name: str, target: type | str, *, replace: bool = False) -> None:
            self._register(dataclasses.replace(template, name=name, kind=kind, target=target), replace)

        return register

    def snapshot(self) -> dict[tuple[str, str], Item]:
        """All items as they are now, for `restore`."""
        return dict(self._items)

    def restore(self, items: Mapping[tuple[str, str], Item]) -> None:
        """Back to a snapshot: what a plugin registered before it failed is gone."""
        self._items = dict(items)

    def _register(self, item: Item, replace: bool) -> None:
        _check_words(item)
        if not isinstance(item.target, str):
            check_contract(item.kind, item.name, item.target, plugin=item.plugin)
        key = (item.kind, item.name)
        holder = self._items.get(key)
        if holder and not (replace and holder.plugin != item.plugin):
            again = holder.plugin == item.plugin
            thing = f"{_WORDS[item.kind]} {item.name!r}"
            raise PluginError(
                f"plugin {item.plugin!r} registers {thing}, which plugin {holder.plugin!r} gives already",
                why="a plugin gives each name once" if again else "a name has one meaning",
                fix="choose another name" + ("" if again else ", or say register(…, replace=True)"),
            )
        self._items[key] = dataclasses.replace(item, replaces=holder.plugin if holder else None)


def _check_words(item: Item) -> None:
    if not isinstance(item.name, str) or not _SLUG.fullmatch(item.name) or len(item.name) > 64:
        raise PluginError(
            f"plugin {item.plugin!r} registers {_WORDS[item.kind]} {item.name!r}: this is no name",
            why="names become flags and folders: a-z, 0-9 and single '-' between them, at most 64 characters",
            fix="choose such a name",
        )
    target = item.target
    if not (isinstance(target, type) or (isinstance(target, str) and _TARGET.fullmatch(target))):
        raise PluginError(
            f"plugin {item.plugin!r} registers {_WORDS[item.kind]} {item.name!r} with {target!r}",
            why='the target is a class or "package.module:Class"',
            fix="pass the class itself, not an instance or a function",
        )


def check_contract(kind: str, name: str, target: type, *, plugin: str) -> None:
    """Hold a class against its contract: every member there, methods callable, its own name as registered.

    Raises:
        PluginError: naming plugin, contract and what is missing (exit 8).
    """
    contract = _CONTRACTS[kind]
    found = {member: value for base in reversed(target.__mro__) for member, value in vars(base).items()}
    functions = [member for member, value in vars(contract).items() if inspect.isfunction(value)]
    methods = [member for member in functions if member == "__call__" or not member.startswith("_")]
    attributes = list(contract.__annotations__)
    wrong = [f"attribute {a!r} is missing" for a in attributes if a not in found]
    wrong += [f"method {m!r} is missing" for m in methods if not callable(found.get(m))]
    own = "kind" if kind == "sources" else "name"
    if not wrong and found[own] != name:
        wrong = [f"its {own} is {found[own]!r}, but it is registered as {name!r}"]
    if wrong:
        raise PluginError(
            f"plugin {plugin!r}: {target.__name__} breaks {contract.__name__}: {'; '.join(wrong)}",
            why=f"greatctl uses {_WORDS[kind]}s through greatctl.extend.contracts.{contract.__name__} alone",
            fix="mend the class; greatctl.extend.testing checks it",
        )


def _imported(item: Item) -> type:
    module, _, attribute = str(item.target).partition(":")
    if item.digest is None:  # a built-in that does not import is a broken installation: say all of it
        return getattr(importlib.import_module(module), attribute)
    try:
        with stdout_to_stderr():
            target = getattr(importlib.import_module(module, item.package), attribute)
    except (Exception, SystemExit) as error:  # foreign code may fail in any way
        thing = f"{_WORDS[item.kind]} {item.name!r}"
        raise PluginError(
            f"plugin {item.plugin!r}: {thing} cannot be imported from {item.target}",
            why=describe(error),
            fix="mend the plugin, or update it",
        ) from error
    if not isinstance(target, type):
        raise PluginError(
            f"plugin {item.plugin!r}: {item.target} is not a class",
            why=f"it is {target!r}",
            fix="name the class itself",
        )
    return target
