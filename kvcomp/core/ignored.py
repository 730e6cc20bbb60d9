"""What a strategy was given and does not look at: silence about it would let a user read equal numbers as a result."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from kvcomp.core.composition import working
from kvcomp.core.config import DEFAULT_PARTS
from kvcomp.core.errors import IgnoredSettingWarning
from kvcomp.core.interfaces import Part
from kvcomp.core.strategy import Strategy


def ignored_settings(strategy: Strategy) -> tuple[str, ...]:
    """Return a sentence for every setting that changes nothing: a budget or trigger of a recipe that keeps everything,
    parts that have nothing to do because another one is missing or does nothing.
    """
    return tuple(_without_effect(strategy) if strategy.selector is None else _without_merging(strategy))


def warn_of_ignored(strategy: Strategy, stacklevel: int) -> None:
    """Warn of every setting that changes nothing.

    Args:
        strategy: as it was built from what a user wrote.
        stacklevel: of `warnings.warn`, 1 for the caller of this function.

    Warns:
        IgnoredSettingWarning: once for each of `ignored_settings`.
    """
    for sentence in ignored_settings(strategy):
        warnings.warn(sentence, IgnoredSettingWarning, stacklevel=stacklevel + 1)


def _without_effect(strategy: Strategy) -> Iterator[str]:
    """Yield what a strategy without a selector ignores."""
    if strategy.ignores_budget and strategy.budget.ratio != 1:
        yield (
            f"recipe {strategy.name!r} has no selector, so it keeps everything and ignores the budget {strategy.budget}"
        )
    if strategy.trigger.decoding:
        yield (
            f"recipe {strategy.name!r} has no selector, so it compresses nothing while tokens are decoded and ignores "
            f"the trigger {strategy.trigger}"
        )
    if strategy.mass_preserving:
        yield (
            f"recipe {strategy.name!r} has no selector, so every slot stands for one token and mass_preserving changes "
            "nothing"
        )
    for part in strategy.parts:
        if part not in working(strategy.parts) and not _is_default(part):
            yield (
                f"recipe {strategy.name!r} has no selector, so its {part.kind} {part.use!r} does nothing; give it a "
                f"scorer and a selector, or leave the {part.kind} out"
            )


def _without_merging(strategy: Strategy) -> Iterator[str]:
    """Yield what a strategy that evicts and does not merge ignores."""
    if not _is_default(strategy.matcher):  # a matcher without a merger, and a merger without one, are refused
        return
    nothing = f"recipe {strategy.name!r} merges nothing (its matcher is {strategy.matcher.use!r}), so "
    if not _is_default(strategy.policy):
        yield (
            f"{nothing}its policy {strategy.policy.use!r} measures rho and decides nothing; give it a matcher, such "
            "as nearest, and a merger"
        )
    if strategy.mass_preserving:
        yield f"{nothing}every slot stands for one token and mass_preserving changes nothing"


def _is_default(part: Part) -> bool:
    return part.use == DEFAULT_PARTS.get(part.kind)
