"""Registries: things are found by kebab-case name, loaded at the first lookup, and never overwritten."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Generic, TypeVar

from .errors import DuplicateNameError, KindError, PluginError, UnknownNameError

if TYPE_CHECKING:
    from robustlab.metrics.base import AnyMetric

    from .attack import Attack
    from .corruption import Corruption
    from .defense import Defense
    from .detector import Detector
    from .shift import Shift

T = TypeVar("T")
C = TypeVar("C")

_KEBAB = r"[a-z0-9]+(-[a-z0-9]+)*"
_NAME = re.compile(rf"^([a-z0-9]+:)?{_KEBAB}(/{_KEBAB})?$")


class Registry(Generic[T]):
    """A table of named things of one kind.

    Args:
        kind: Singular noun used in messages, e.g. ``"corruption"``.
        providers: Modules that register the built-in members when imported.
        group: Entry-point group of third-party members (``vendor:name``).
    """

    def __init__(self, kind: str, *, providers: tuple[str, ...], group: str) -> None:
        self.kind = kind
        self.providers = providers
        self.group = group
        self.failures: dict[str, str] = {}
        self._items: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        """Return a decorator that stores its argument under ``name`` and gives it the attribute ``name``.

        Raises:
            DuplicateNameError: The name is taken by another object, or is not kebab-case.
        """
        if not isinstance(name, str):
            raise KindError(
                f"{self.kind} registry", "a name", repr(name), f'Decorate with @register_{self.kind}("my-name").'
            )
        if not _NAME.match(name):
            raise DuplicateNameError(
                f"{self.kind} registry", "a kebab-case name such as 'gaussian-noise'", repr(name), "Rename it."
            )

        def decorate(item: C) -> C:
            taken = self._items.get(name)
            if taken is not None and _origin(taken) != _origin(item):
                raise DuplicateNameError(
                    f"{self.kind} registry",
                    f"a name that is free; {name!r} belongs to {_origin(taken)}",
                    _origin(item),
                    "Choose another name; plugins use 'vendor:name'.",
                )
            self._items[name] = item  # type: ignore[assignment]
            if isinstance(item, type):
                setattr(item, "name", name)  # noqa: B010 - a class attribute that the decorator owns
            return item

        return decorate

    def get(self, name: str) -> T:
        """Return the member called ``name``.

        Raises:
            UnknownNameError: No such member; the message proposes close matches.
            PluginError: The member belongs to a plugin that failed to load.
        """
        self.load()
        if name in self._items:
            return self._items[name]
        if name in self.failures:
            raise PluginError(
                f"{self.kind} {name!r}", "a plugin that loads", self.failures[name], "Repair or remove the plugin."
            )
        close = difflib.get_close_matches(name, self._items, n=3, cutoff=0.5)
        raise UnknownNameError(
            f"{self.kind} registry",
            f"one of {', '.join(sorted(self._items))}",
            repr(name),
            (f"Did you mean {' or '.join(map(repr, close))}? " if close else "")
            + f"'robustlab list {self.kind}s' shows all of them.",
        )

    def names(self) -> tuple[str, ...]:
        """Return all names, sorted."""
        self.load()
        return tuple(sorted(self._items))

    def items(self) -> Iterator[tuple[str, T]]:
        """Iterate over (name, member), sorted by name."""
        return iter([(name, self._items[name]) for name in self.names()])

    def __contains__(self, name: object) -> bool:
        self.load()
        return name in self._items

    def load(self) -> None:
        """Import the built-in providers and the plugins, once. A broken plugin is noted, not raised."""
        if self._loaded:
            return
        self._loaded = True
        try:
            for module in self.providers:
                importlib.import_module(module)
        except BaseException:
            self._loaded = False
            raise
        for point in entry_points(group=self.group):
            try:
                item = point.load()
                if point.name not in self._items:
                    self.register(point.name)(item)
            except Exception as error:  # a plugin may fail in any way, and must not take the others down
                self.failures[point.name] = f"{type(error).__name__}: {error}"


def _origin(item: object) -> str:
    return f"{getattr(item, '__module__', '?')}.{getattr(item, '__qualname__', type(item).__qualname__)}"


CORRUPTIONS: Registry[type[Corruption]] = Registry(
    "corruption", providers=("robustlab.corruptions",), group="robustlab.corruptions"
)
COMBINATORS: Registry[type[Shift]] = Registry(
    "combinator", providers=("robustlab.corruptions",), group="robustlab.combinators"
)
ATTACKS: Registry[type[Attack]] = Registry("attack", providers=("robustlab.corruptions",), group="robustlab.attacks")
SUITES: Registry[Callable[[], tuple[Shift, ...]]] = Registry(
    "suite", providers=("robustlab.corruptions",), group="robustlab.suites"
)
DETECTORS: Registry[type[Detector]] = Registry(
    "detector", providers=("robustlab.defenses",), group="robustlab.detectors"
)
DEFENSES: Registry[type[Defense]] = Registry("defense", providers=("robustlab.defenses",), group="robustlab.defenses")
METRICS: Registry[type[AnyMetric]] = Registry("metric", providers=("robustlab.metrics",), group="robustlab.metrics")

register_corruption = CORRUPTIONS.register
register_attack = ATTACKS.register
register_detector = DETECTORS.register
register_defense = DEFENSES.register
register_metric = METRICS.register

REGISTRIES: dict[str, Registry[object]] = {
    registry.kind: registry  # type: ignore[misc]
    for registry in (CORRUPTIONS, COMBINATORS, ATTACKS, SUITES, DETECTORS, DEFENSES, METRICS)
}


def resolve(kind: str, name: str) -> object:
    """Return the member ``name`` of the registry ``kind`` without importing its package by hand.

    Args:
        kind: One of ``corruption``, ``combinator``, ``attack``, ``suite``, ``detector``, ``defense``, ``metric``.
        name: A registered name.
    """
    registry = REGISTRIES.get(kind)
    if registry is None:
        raise UnknownNameError("resolve", f"one of {', '.join(sorted(REGISTRIES))}", repr(kind), "Check the spelling.")
    return registry.get(name)
