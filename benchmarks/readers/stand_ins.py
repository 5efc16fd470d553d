"""Import single files of a runtime whose dependencies are not installed: what is not there is a stand-in."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


class _Meta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn()


class StandIn(metaclass=_Meta):
    """Any class, function, decorator or object that is imported and not used."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *args: Any, **_: Any) -> Any:
        """As a decorator, return what is decorated."""
        return args[0] if len(args) == 1 and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __bool__(self) -> bool:
        return False


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of one package: the listed ones in their files, all others as stand-ins."""

    def __init__(
        self, package: str, root: Path, real: Callable[[str], bool], values: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.package, self.root, self.real, self.values = package, root, real, values

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:  # noqa: ARG002 - the protocol
        if fullname.partition(".")[0] != self.package:
            return None
        place = self.root / fullname.replace(".", "/")
        if self.real(fullname) and fullname not in self.values:
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if file.is_file():
                    folders = [str(place)] if file.name == "__init__.py" else None
                    return importlib.util.spec_from_file_location(fullname, file, submodule_search_locations=folders)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        module = ModuleType(spec.name)
        vars(module).update(self.values.get(spec.name, {}))

        def missing(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            made = type(name, (StandIn,), {})
            setattr(module, name, made)
            return made

        module.__getattr__ = missing  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in_for(
    package: str,
    root: Path,
    real: Callable[[str], bool],
    values: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Make ``package`` importable: the modules that ``real`` accepts from ``root``, all others as stand-ins.

    Args:
        package: Name of the top package.
        root: The folder that holds the package.
        real: Whether a module's own file is used.
        values: Attributes of stand-ins that matter, by module.
    """
    sys.meta_path.insert(0, _Finder(package, root, real, values or {}))
