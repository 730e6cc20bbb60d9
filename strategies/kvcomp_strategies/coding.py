"""A storage that holds slots in coded pieces; how they are coded is the store's business."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kvcomp.core.interfaces import Store
from kvcomp.core.storage import SlotStorage
from kvcomp.core.types import Guide, SlotForm
from kvcomp_strategies.cutting import extended, plain_tokens, shortened
from kvcomp_strategies.pieces import Piece, Plain, flat, grown, held, mapped, owned, read_all, tensors
from kvcomp_strategies.reading import Layout, laid_out

ANEW = "what it holds would be coded anew each time, and each time with another error"


@held
@dataclass(frozen=True, eq=False)
class Run:
    """Heads that hold the same number of slots, in the same way: a rectangle, so that nothing is padded.

    Attributes:
        heads: `(count,)` int64 on the CPU, ascending, places in batch x kv_heads.
        keys, values: of their slots, `(count, slots, dim)` when read.
        replaced: slots since the last `replace`; what follows was appended.
        setting: how the store codes them; None for as they are.
    """

    heads: Tensor
    keys: tuple[Piece, ...]
    values: tuple[Piece, ...]
    replaced: int
    setting: Any = None

    @property
    def plain(self) -> tuple[int, int]:
        """Return how many keys and values at the end are held as they are."""
        return plain_tokens(self.keys), plain_tokens(self.values)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Return the heads as numbers."""
        return tuple(self.heads.tolist())


@held
@dataclass(frozen=True, eq=False)
class Slots:
    """Everything that a storage holds: replaced when it changes, so that it is its own snapshot.

    Attributes:
        runs: the heads by length and setting.
        batch, kv_heads: how many there are.
        replaced: slots of the longest head at the last `replace`.
        appended: slots since.
    """

    runs: tuple[Run, ...] = ()
    batch: int = 0
    kv_heads: int = 0
    replaced: int = 0
    appended: int = 0


@dataclass(frozen=True, eq=False)
class Heads:
    """Some heads that are about to be coded: keys, values `(count, slots, dim)`, importance `(count, slots)`.

    `extra` holds what a store asked for in `extras`, `(count, ...)`.
    """

    keys: Tensor
    values: Tensor
    importance: Tensor | None = None
    extra: Tensor | None = None


class Coder(Protocol):
    """What a storage asks of its store."""

    def setting(self, slots: int, limit: int | None, form: SlotForm) -> Hashable:
        """Return how a head of so many slots is coded in so many bytes; without a limit, as the store is set."""

    def extras(self, guide: Guide) -> Tensor | None:
        """Return what coding needs of the guide's observations, `(batch, kv_heads, ...)`."""

    def encode(self, heads: Heads, setting: Any) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Return the pieces of keys and of values."""

    def settle(self, runs: Sequence[Run]) -> Sequence[Run]:
        """Return runs that have settings with what is no longer recent coded."""


class CodedStorage(SlotStorage):
    """Slots in runs of heads that are alike. Until the first `replace` everything is held as it comes.

    What is appended stays as it is until the next append: the attention of the step that brings it sees it exactly.
    No room is taken in advance: codes grow by whole blocks.
    """

    def __init__(self, coder: Coder) -> None:
        self._coder = coder
        self._slots = Slots()
        self._settings: tuple[Any, ...] = ()  # of each head, once something was compressed

    def replace(self, keys: Tensor, values: Tensor, mask: Tensor | None = None, guide: Guide | None = None) -> None:
        """Hold these slots, coded as the guide's bytes ask for, or as they were where there is no guide."""
        batch, kv_heads, slots, _ = keys.shape
        lengths = [slots] * (batch * kv_heads) if mask is None else mask.sum(dim=-1).flatten().tolist()
        form = SlotForm(1, 1, keys.shape[-1], values.shape[-1], keys.element_size())
        self._settings = self._decide(lengths, guide, form)
        alike: dict[tuple[int, Any], list[int]] = defaultdict(list)
        for head, key in enumerate(zip(lengths, self._settings, strict=True)):
            alike[key].append(head)
        source = Heads(
            keys.flatten(0, 1),
            values.flatten(0, 1),
            None if guide is None else guide.importance.flatten(0, 1),
            self._extra(guide),
        )
        runs = [self._run(source, torch.tensor(heads), length, how) for (length, how), heads in alike.items()]
        self._slots = Slots(tuple(runs), batch, kv_heads, slots)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add slots at the end as they are, after what is no longer recent was coded."""
        batch, kv_heads, new, _ = keys.shape
        if not self._slots.runs:
            run = Run(torch.arange(batch * kv_heads), (), (), 0)
            self._slots = Slots((run,), batch, kv_heads)
        runs = self._settled()
        parts = zip(runs, _shared_out(keys, runs), _shared_out(values, runs), strict=True)
        added = tuple(
            replace(run, keys=extended(run.keys, key), values=extended(run.values, value)) for run, key, value in parts
        )
        self._slots = replace(self._slots, runs=added, appended=self._slots.appended + new)

    def removable(self) -> int:
        """Return how many slots at the end are held as they came: slots of every head that were appended and are not
        yet coded, and those before them where all heads are alike.
        """
        held = self._slots
        plain = min((min(run.plain) for run in held.runs), default=0)
        alike = all(run.replaced == held.replaced for run in held.runs)
        return plain if alike else min(plain, held.appended)

    def shorten(self, slots: int) -> None:
        """Let go of slots that are held as they came; what was coded because of them stays coded."""
        held, replaced = self._slots, max(slots - self._slots.appended, 0)
        runs = tuple(
            replace(
                run,
                keys=shortened(run.keys, slots),
                values=shortened(run.values, slots),
                replaced=run.replaced - replaced,
            )
            for run in held.runs
        )
        self._slots = replace(
            held, runs=runs, replaced=held.replaced - replaced, appended=held.appended - (slots - replaced)
        )

    def read(self) -> tuple[Tensor, Tensor]:
        """Return what the codes stand for, and what is held as it is."""
        runs = self._slots.runs
        return self._laid_out([run.keys for run in runs]), self._laid_out([run.values for run in runs])

    def select(self, rows: Tensor) -> None:
        """Hold these rows, their codes unchanged."""
        held = self._slots
        places = (rows.cpu()[:, None] * held.kv_heads + torch.arange(held.kv_heads)).flatten()
        runs = [taken for run in held.runs if (taken := _taken(run, places)) is not None]
        self._slots = replace(held, runs=tuple(runs), batch=len(rows))
        if self._settings:
            self._settings = tuple(self._settings[place] for place in places.tolist())

    def move(self, device: torch.device) -> None:
        """Hold everything on a device; head numbers stay on the CPU."""
        runs = [
            replace(run, keys=keys, values=values)
            for run in self._slots.runs
            for keys, values in [mapped((run.keys, run.values), lambda tensor: tensor.to(device))]
        ]
        self._slots = replace(self._slots, runs=tuple(runs))

    def nbytes(self) -> int:
        """Return the bytes of all codes, scales, zeros, corrections, outliers, and of what is held as it is."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for run in self._slots.runs
            for tensor in tensors((run.keys, run.values))
        }
        return sum(storages.values())

    def filled_nbytes(self, slots: int, slot_bytes: int) -> int:
        """Return all bytes: nothing is padded and no room is taken."""
        return self.nbytes()

    def dump(self) -> tuple[dict[str, Tensor], Any]:
        """Return the codes and everything else as they are."""
        found: dict[str, Tensor] = {}
        return found, flat((self._slots, self._settings), found)

    def load(self, tensors: Mapping[str, Tensor], data: Any) -> None:
        """Hold what was dumped."""
        self._slots, self._settings = grown(data, tensors)
        runs = [replace(run, heads=run.heads.cpu()) for run in self._slots.runs]
        self._slots = replace(self._slots, runs=tuple(runs))

    def snapshot(self) -> tuple[Slots, tuple[Any, ...]]:
        """Return what is held, which never changes."""
        return self._slots, self._settings

    def restore(self, snapshot: tuple[Slots, tuple[Any, ...]]) -> None:
        """Hold what a snapshot holds."""
        self._slots, self._settings = snapshot

    def _decide(self, lengths: list[int], guide: Guide | None, form: SlotForm) -> tuple[Any, ...]:
        if guide is not None:
            limits = guide.limit.flatten().tolist()
            return tuple(self._coder.setting(n, limit, form) for n, limit in zip(lengths, limits, strict=True))
        if len(self._settings) == len(lengths):
            return self._settings
        return tuple(self._coder.setting(length, None, form) for length in lengths)

    def _extra(self, guide: Guide | None) -> Tensor | None:
        extra = None if guide is None else self._coder.extras(guide)
        return None if extra is None else extra.flatten(0, 1)

    def _run(self, source: Heads, heads: Tensor, length: int, setting: Any) -> Run:
        chosen = _picked(source, heads, length)
        if setting is None or length == 0:
            keys: tuple[Piece, ...] = (Plain(owned(chosen.keys)),)
            return Run(heads, keys, (Plain(owned(chosen.values)),), length, setting)
        return Run(heads, *self._coder.encode(chosen, setting), length, setting)

    def _settled(self) -> Sequence[Run]:
        """Return the runs with what is no longer recent coded."""
        runs = self._slots.runs
        settled = iter(self._coder.settle([run for run in runs if run.setting is not None]))
        return [run if run.setting is None else next(settled) for run in runs]

    def _laid_out(self, pieces: Sequence[tuple[Piece, ...]]) -> Tensor:
        """Return the slots of all runs on one axis, `(batch, kv_heads, slots, dim)`, zeros where a head has none."""
        held = self._slots
        if len(held.runs) == 1 and held.runs[0].replaced == held.replaced:
            slots = read_all(pieces[0])
        else:
            runs = [(run.places, run.replaced, parts) for run, parts in zip(held.runs, pieces, strict=True)]
            slots = laid_out(runs, Layout(held.batch * held.kv_heads, held.replaced, held.appended))
        return slots.view(held.batch, held.kv_heads, *slots.shape[1:])


def _picked(source: Heads, heads: Tensor, length: int) -> Heads:
    """Return these heads, and of each the first `length` slots."""
    importance = source.importance
    return Heads(
        _heads(source.keys, heads)[:, :length],
        _heads(source.values, heads)[:, :length],
        None if importance is None else _heads(importance, heads)[:, :length],
        None if source.extra is None else _heads(source.extra, heads),
    )


def _heads(numbers: Tensor, heads: Tensor) -> Tensor:
    """Return these heads; all of them without a copy."""
    return numbers if len(heads) == len(numbers) else numbers[heads.to(numbers.device)]


def _shared_out(numbers: Tensor, runs: Sequence[Run]) -> Sequence[Tensor]:
    """Return what is new, `(batch, kv_heads, tokens, dim)`, of the heads of each run."""
    heads = numbers.flatten(0, 1)
    if len(runs) == 1:
        return [heads]
    order = torch.cat([run.heads for run in runs])
    return torch.split_with_sizes(heads.index_select(0, order.to(heads.device)), [len(run.heads) for run in runs])


def _taken(run: Run, places: Tensor) -> Run | None:
    """Return the run with the heads that stand at these old places, `(new heads,)`, at their new ones."""
    new = torch.isin(places, run.heads).nonzero()[:, 0]
    if not len(new):
        return None
    index = torch.searchsorted(run.heads, places[new])
    keys, values = mapped((run.keys, run.values), lambda tensor: tensor.index_select(0, index.to(tensor.device)))
    return replace(run, heads=new, keys=keys, values=values)


class CodedStore(Store):
    """A store that codes slots one by one in `bits`, or in as many as the bytes of the budget leave room for.

    Attributes:
        bits: of a code; by default the budget decides.
        evict: let a budget that is too small for every token evict.
    """

    prefill_only = ANEW

    bits: Literal[1, 2, 4, 8] | None = None
    evict: bool = False

    @property
    def shrinks(self) -> bool:
        """Return that slots take fewer bytes."""
        return True

    @property
    def fits(self) -> bool:
        """Return whether the bytes decide."""
        return self.bits is None

    @property
    def evicts(self) -> bool:
        """Return whether as many tokens stay as can be held."""
        return self.evict

    def open(self, reserve: int | None = None) -> CodedStorage:
        """Return an empty storage. It takes no room in advance: codes grow by whole blocks."""
        return CodedStorage(self)

    @abstractmethod
    def setting(self, slots: int, limit: int | None, form: SlotForm) -> Hashable:
        """See `Coder`."""

    def extras(self, guide: Guide) -> Tensor | None:
        """Return that nothing more is needed; see `Coder`."""
        return None

    @abstractmethod
    def encode(self, heads: Heads, setting: Any) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """See `Coder`."""

    @abstractmethod
    def settle(self, runs: Sequence[Run]) -> Sequence[Run]:
        """See `Coder`."""
