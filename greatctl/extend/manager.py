"""Plugins come in one by one; one that fails is named, undone, and harms nothing.

Order: built-ins; installed entry points; `plugins/` beside sources.toml; each `--plugin`. A plugin is
imported, its hooks are held against the specs, and its own register hooks alone are called. On any exception,
SystemExit included, its registrations, its hooks and its modules are taken back and the cause is kept in the
report. The run fails only when it asks the registry for a name that is not there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pluggy

from .. import __version__
from ..errors import PluginError, did_you_mean
from ..events import Event
from . import builtins, hookspecs
from .hookspecs import PROJECT, REGISTER_HOOKS, Section
from .loading import Candidate, Loaded, describe, forget, from_path, in_folder, installed, stdout_to_stderr
from .registry import BUILTIN, Item, Registry
from .sections import check_sections

__all__ = ["ENVIRONMENT", "LoadedPlugin", "Plugins", "load_plugins"]

ENVIRONMENT = "GREATCTL_PLUGINS"
Notice = Callable[[str], None]
Items = Mapping[tuple[str, str], Item]

# The standard library writes warnings of an unconfigured logger to stderr: a default voice for a library that
# never prints.
_log = logging.getLogger("greatctl.plugins")


@dataclass(frozen=True)
class LoadedPlugin:
    """A line of `greatctl plugins`.

    Attributes:
        origin: `builtin`, `installed: DISTRIBUTION VERSION`, or the path.
        items: what it registered, as "kind/name".
        hooks: the other hooks that it implements (`observe`, `report_sections`).
        replaces: the items of others whose place it took, as "kind/name (plugin)".
        error: why it was not loaded; None where it was.
    """

    name: str
    version: str | None
    origin: str
    items: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()
    error: str | None = None

    def to_json(self) -> dict[str, object]:
        """The fields as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


class Plugins:
    """The loaded plugins: their items, their observers, their report sections.

    Attributes:
        registry: items by kind and name.
        report: one line a plugin, failed ones included, in the order of loading.
    """

    def __init__(self, notice: Notice, *, slow_after: float = 10.0) -> None:
        self.registry = Registry()
        self.report: list[LoadedPlugin] = []
        self._notice = lambda text: notice("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))
        self._slow_after = slow_after
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._observers: dict[str, pluggy.HookCaller] | None = None

    def load(self, candidate: Candidate) -> None:
        """Bring one plugin in, or undo it and say why in the report. The same one a second time is passed
        over.
        """
        if any((p.name, p.origin) == (candidate.name, candidate.origin) for p in self.report):
            return
        self._observers = None
        items, modules = self.registry.snapshot(), frozenset(sys.modules)
        try:
            self._refuse_second(candidate)
            with stdout_to_stderr(), self._patience(candidate.name):
                self._enter(candidate, candidate.load())
        except (Exception, SystemExit) as error:  # foreign code fails in any way; Ctrl-C is not its failure
            self._undo(candidate, items, modules)
            name, origin, cause = candidate.name, candidate.origin, describe(error)
            self.registry.failed[f"{name} [{origin}]"] = cause
            self.report.append(LoadedPlugin(name, candidate.version, origin, error=cause))

    def observe(self, event: Event) -> None:
        """Pass an event to every observer. One that raises is muted, with one notice."""
        if self._observers is None:
            self._observers = {name: self._only(name, "observe") for name in self._named("observe")}
        for name, call in list(self._observers.items()):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    call(event=event)
            except (Exception, SystemExit) as error:  # a tracker that breaks does not break the run
                del self._observers[name]
                self._notice(f"plugin {name} failed and no longer hears of this run: {describe(error)}")

    def report_sections(self, results: Path) -> list[Section]:
        """Every plugin's report sections, with `plugin` added; one that fails gives one that says so."""
        sections: list[Section] = []
        for name in self._named("report_sections"):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    given = self._only(name, "report_sections")(results=results)
                checked = [section for part in given for section in check_sections(part)]
                sections += [{**section, "plugin": name} for section in checked]
            except (Exception, SystemExit) as error:  # one plugin's section does not cost the report
                text = f"This plugin's sections could not be made: {describe(error)}"
                sections.append({"title": name, "plugin": name, "blocks": [{"kind": "prose", "text": text}]})
        return sections

    def digests(self, used: Mapping[str, Iterable[str]]) -> dict[str, str]:
        """`Identity.plugins` for `{"architectures": ["topk"]}`: "kind/name" -> digest, built-ins left out."""
        return self.registry.digests(used)

    def _refuse_second(self, candidate: Candidate) -> None:
        for other in self.report:
            if other.name == candidate.name and not other.error:
                message = f"there is a plugin named {candidate.name!r} already"
                raise PluginError(message, why=f"from {other.origin}")

    def _enter(self, candidate: Candidate, loaded: Loaded) -> None:
        version = loaded.version or candidate.version
        self._manager.register(loaded.plugin, candidate.name)
        hooks = self._hooks_of(loaded.plugin)
        source = Item("", "", "", candidate.name, version, loaded.digest, package=loaded.package)
        for kind, hook in REGISTER_HOOKS.items():
            if hook in hooks:
                self._only(candidate.name, hook)(register=self.registry.registrar(kind, source))
        items = self.registry.items(candidate.name)
        replaces = tuple(f"{item.kind}/{item.name} ({item.replaces})" for item in items if item.replaces)
        others = tuple(hook for hook in hooks if hook not in REGISTER_HOOKS.values())
        names = tuple(f"{item.kind}/{item.name}" for item in items)
        self.report.append(LoadedPlugin(candidate.name, version, candidate.origin, names, others, replaces))
        for replaced in replaces:
            self._notice(f"plugin {candidate.name} replaces {replaced}")

    def _hooks_of(self, plugin: object) -> list[str]:
        """The plugin's hooks by name. An unknown one, or none, is an error: pluggy passes over both in
        silence.
        """
        callers = self._manager.get_hookcallers(plugin) or []
        known = [name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), f"{PROJECT}_spec")]
        for caller in callers:
            if not caller.has_spec():
                raise PluginError(f"there is no hook {caller.name!r}", why=did_you_mean(caller.name, known))
        if not callers:
            bare = [name for name in known if callable(getattr(plugin, name, None))]
            cause = f"{bare[0]} is not marked" if bare else "no function is marked"
            raise PluginError("it implements no hook", why=f"{cause} with @hookimpl")
        return sorted(caller.name for caller in callers)

    def _only(self, name: str, hook: str) -> pluggy.HookCaller:
        """The hook of one plugin alone, to be called before more come in: pluggy lets it reach those too."""
        others = [plugin for other, plugin in self._manager.list_name_plugin() if other != name]
        return self._manager.subset_hook_caller(hook, others)

    def _named(self, hook: str) -> list[str]:
        return [plugin.name for plugin in self.report if hook in plugin.hooks and not plugin.error]

    def _undo(self, candidate: Candidate, items: Items, modules: frozenset[str]) -> None:
        """Take back what a failed plugin left behind; an earlier plugin of the same name stays."""
        self.registry.restore(items)
        if not any(p.name == candidate.name and not p.error for p in self.report):
            if self._manager.has_plugin(candidate.name):
                self._manager.unregister(name=candidate.name)
            forget(candidate.modules, modules)

    @contextmanager
    def _patience(self, name: str) -> Iterator[None]:
        """A notice while a plugin takes suspiciously long: only its author knows whether it will end."""
        words = f"plugin {name} is still loading after {self._slow_after:g} s; --no-plugins goes without"
        timer = threading.Timer(self._slow_after, self._notice, [words])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def load_plugins(
    *,
    folder: Path | None,
    paths: Sequence[str] = (),
    enabled: bool = True,
    names: Sequence[str] | None = None,
    notice: Notice = _log.warning,
    slow_after: float = 10.0,
) -> Plugins:
    """Load built-ins and, where `enabled`, every plugin that is found; failures go to `Plugins.report`.

    Args:
        folder: the project's folder; `plugins/` in it is read only where it holds a sources.toml.
        paths: files or folders of `--plugin`, loaded last and whatever `names` says.
        enabled: False (`--no-plugins`) loads built-ins alone.
        names: the only installed and project plugins to load; None asks GREATCTL_PLUGINS ("a,b"; empty: none;
            unset: all).
        notice: hears of replaced items, muted observers and slow imports.
        slow_after: seconds until an import counts as slow.

    Raises:
        UsageError: a path of `--plugin` is not there.
    """
    plugins = Plugins(notice, slow_after=slow_after)
    plugins.load(Candidate(BUILTIN, "builtin", lambda: Loaded(builtins, __version__, None), "", __version__))
    if not enabled:
        return plugins
    if names is None and (setting := os.environ.get(ENVIRONMENT)) is not None:
        names = [name.strip() for name in setting.split(",")]
    local = in_folder(folder / "plugins") if folder and (folder / "sources.toml").is_file() else []
    for candidate in [*installed(), *local]:
        if names is None or candidate.name in names:
            plugins.load(candidate)
    for path in paths:
        for candidate in from_path(path):
            plugins.load(candidate)
    return plugins
