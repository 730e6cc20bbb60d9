"""A pytest plugin: every promise on everything that an installed package registers, one test for each.

    pytest --kvcomp-conformance kvcomp-hello
    pytest --kvcomp-conformance kvcomp-hello -k exact-slots

or in the configuration of pytest, `kvcomp_conformance = kvcomp-hello`. Without either it does nothing. pytest loads
it wherever kvcomp is installed, so it stands beside the package and not in it: `import kvcomp` takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kvcomp.testing.conformance import Case

OPTION = "kvcomp_conformance"
SEEDS = (0, 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option and its setting."""
    help_text = "run every promise of kvcomp on everything that this installed package registers (repeat for several)"
    parser.getgroup("kvcomp").addoption(
        "--kvcomp-conformance", dest=OPTION, metavar="PACKAGE", action="append", default=[], help=help_text
    )
    parser.addini(OPTION, help_text.replace(" (repeat for several)", ", one package a line"), type="linelist")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the tests of the packages that were asked for, before others are deselected."""
    for package in dict.fromkeys([*config.getoption(OPTION), *config.getini(OPTION)]):
        items.extend(Package.from_parent(session, name=package).collect())


class Package(pytest.Collector):
    """Everything that one distribution registers."""

    def collect(self) -> Iterator[pytest.Item]:
        """Yield a test for each promise of each part and recipe; a part that needs settings is one skipped test.

        Raises:
            UsageError: nothing is registered by a package of this name.
        """
        from kvcomp.core.errors import InputError
        from kvcomp.core.registry import registry  # nothing of kvcomp is loaded unless a package is asked for
        from kvcomp.testing.conformance import Case, checkable

        everything = [entry for entry in registry.entries() if checkable(entry)]
        mine = [entry for entry in everything if entry.package == self.name]
        if not mine:
            known = ", ".join(sorted({entry.package for entry in everything}))
            raise pytest.UsageError(
                f"--kvcomp-conformance: no installed package {self.name!r} has parts or recipes; these have: {known}"
            )
        for entry in mine:
            name = f"{entry.kind}-{entry.name}"
            try:
                case = Case.of(entry.name if entry.kind == "recipe" else entry.value)
            except InputError as error:
                yield SkippedItem.from_parent(self, name=name, reason=str(error))
                continue
            for promise in case.promises():
                yield PromiseItem.from_parent(self, name=f"{name}-{promise}", case=case, promise=promise)


class PromiseItem(pytest.Item):
    """One promise of one part or recipe."""

    def __init__(self, *, case: Case, promise: str, **more: Any) -> None:
        super().__init__(**more)
        self.case = case
        self.promise = promise

    def runtest(self) -> None:
        """Ask for the promise."""
        for seed in SEEDS:
            self.case.keep(self.promise, seed)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the message of a broken promise, and the traceback of anything else."""
        from kvcomp.testing.failures import ConformanceError

        return str(excinfo.value) if isinstance(excinfo.value, ConformanceError) else super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[str, int | None, str]:
        """Return the heading of a failure."""
        return self.name, None, f"kvcomp conformance: {self.name}"


class SkippedItem(pytest.Item):
    """A part that cannot be made without settings; its author checks an instance."""

    def __init__(self, *, reason: str, **more: Any) -> None:
        super().__init__(**more)
        self.reason = reason

    def runtest(self) -> None:
        """Say why it is skipped."""
        pytest.skip(self.reason)
