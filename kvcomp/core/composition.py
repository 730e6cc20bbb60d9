"""Which parts of a pipeline have something to do, and what cannot go together."""

from __future__ import annotations

from collections.abc import Sequence

from kvcomp.core.interfaces import Part, PivotSelector, Scorer, Store
from kvcomp.core.trigger import Trigger


def working(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return the parts that have something to do: without a selector the store, and the scorer if that needs one."""
    stores = tuple(part for part in parts if isinstance(part, Store))
    if any(isinstance(part, PivotSelector) for part in parts):
        return tuple(parts)
    needed = frozenset().union(*(store.requires for store in stores))
    return (*(part for part in parts if isinstance(part, Scorer) and part.provides & needed), *stores)


def conflicts(parts: Sequence[Part]) -> list[str]:
    """Return a fault for every part, also inside another, that requires what no part of the pipeline provides, and for
    a store that needs a selector or can do with none.
    """
    members = [member for part in working(parts) for member in part.family()]
    provided = frozenset().union(*(part.provides for part in members))
    return _store_conflicts(parts) + [
        f"{part.kind}: {part.use!r} needs {need}, which no part of this pipeline provides"
        for part in members
        for need in sorted(part.requires - provided)
    ]


def trigger_conflicts(parts: Sequence[Part], trigger: Trigger, turns: str) -> list[str]:
    """Return a fault for everything that cannot go together with compressing while tokens are decoded."""
    if not trigger.decoding:
        return []
    members = [member for part in working(parts) for member in (*part.family(), *part.observations())]
    faults = [
        f"trigger: {part.kind} {part.use!r} cannot compress again while tokens are decoded: {part.prefill_only}"
        for part in dict.fromkeys(members)
        if part.prefill_only
    ]
    if turns == "append":
        faults.append(f"trigger: {trigger} compresses what turns: append says must stay; choose one of them")
    return faults


def _store_conflicts(parts: Sequence[Part]) -> list[str]:
    selects = any(isinstance(part, PivotSelector) for part in parts)
    faults = []
    for store in (part for part in parts if isinstance(part, Store)):
        if store.evicts and not selects:
            faults.append(f"store: {store.use!r} with `evict: true` needs a scorer and a selector that say what goes")
        if selects and store.fits and not store.evicts:
            faults.append(f"store: {store.use!r} keeps every token in the budget's bytes; {_beside_a_selector(store)}")
    return faults


def _beside_a_selector(store: Store) -> str:
    """Return what a store that fits whatever the budget is needs beside a selector."""
    ways = {"bits": "told how precise it is (`bits: 2`)", "evict": "told to evict what does not fit (`evict: true`)"}
    known = [way for field, way in ways.items() if field in type(store).model_fields]
    if not known:
        return "it works without a selector only: leave selector and scorer out, or use another store"
    return f"beside a selector it must be {' or '.join(known)}"
