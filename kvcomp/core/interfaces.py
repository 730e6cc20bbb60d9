"""The interfaces of the parts. One abstract method each; a part is a frozen pydantic model whose fields are its
settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from kvcomp.core.storage import SlotStorage
from kvcomp.core.types import (
    Assignment,
    AttentionBlock,
    LayerPlan,
    LayerView,
    Pivots,
    Repeat,
    Scores,
    SlotForm,
)


class Part(BaseModel, ABC):
    """A small, immutable piece of a strategy. Its `use` name is its registry name, its `kind` the key it has in a file.

    `requires` and `provides` name what must come from, and what it gives to, the other parts of a pipeline; a pipeline
    in which something required is provided by nobody is refused when it is built.

    A part may hold other parts: a field annotated with an interface (`merger: Merger`) is written in a file as
    `{use: NAME, field: value}`, and what the part inside requires, provides and observes counts as its holder's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: ClassVar[str]
    use: ClassVar[str] = ""
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    rotary: ClassVar[bool] = False  # reads `layer.rotary`; an observation, `block.rotary`
    prefill_only: ClassVar[str] = ""  # why the part cannot compress again while tokens are decoded; empty where it can

    def __init_subclass__(cls, use: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if use is not None:
            cls.use = use

    @classmethod
    def part_fields(cls) -> dict[str, type[Part]]:
        """Return the fields that hold another part, each with its interface."""
        annotations = {name: field.annotation for name, field in cls.model_fields.items()}
        return {name: held for name, held in annotations.items() if isinstance(held, type) and issubclass(held, Part)}

    def inner_parts(self) -> tuple[Part, ...]:
        """Return the parts that this part holds."""
        return tuple(getattr(self, name) for name in self.part_fields())

    def family(self) -> tuple[Part, ...]:
        """Return this part and all parts inside it, however deep."""
        return (self, *(member for part in self.inner_parts() for member in part.family()))

    def gives(self) -> frozenset[str]:
        """Return what this part and the parts inside it provide."""
        return frozenset().union(*(part.provides for part in self.family()))

    def observations(self) -> tuple[Observation, ...]:
        """Return the attention statistics that this part reads from `layer.observations`; those of the parts inside it
        unless overridden.
        """
        return tuple(seen for part in self.inner_parts() for seen in part.observations())

    def dump(self) -> dict[str, Any]:
        """Return the part as a strategy file holds it."""
        inner = {name: getattr(self, name).dump() for name in self.part_fields()}
        return {"use": self.use, **self.model_dump(mode="json", exclude=set(inner)), **inner}


class Observation(Part):
    """A statistic of the attention rows, written as a fold: the runtime streams blocks of rows through `update`.

    Nothing ever holds a tokens x tokens matrix. Equal observations are computed once. Results are per query head, and
    no statistic may mix the rows of a batch.

    The rows are those of the forward itself, or of a second pass (`repeat`), in which the context is fed once more and
    attends to its own full cache. A statistic of a second pass is per token, `(batch, heads, tokens)`; each chunk of
    the context gives one, and `join` puts them together.
    """

    kind = "observation"
    carried: ClassVar[bool] = False  # per token, kept for surviving slots and joined with the next turn's
    queries_only: ClassVar[bool] = False  # reads no probabilities, which are then not computed for it: `(..., rows, 0)`

    def repeat(self) -> Repeat | None:
        """Return how the context is fed once more for this statistic; None where it is of the forward itself."""
        return None

    def join(self, before: Tensor, now: Tensor) -> Tensor:
        """Return the statistic of two sets of rows from that of each, `(batch, heads, tokens)`: their sum, unless
        overridden. What has not been looked at yet is 0.
        """
        return before + now

    @property
    def latest(self) -> int | None:
        """Return how many of the latest valid queries it looks at, however many compressions ago they were; None where
        it looks at all queries since the last compression.
        """
        return None

    def rows(self, valid: Tensor, modality: Tensor) -> Tensor | None:
        """Return which queries are needed: `(batch, rows)` int64, ascending, -1 for none; None for all of them.

        Args:
            valid: `(batch, queries)` bool, false on padding.
            modality: of the queries, `(batch, queries)` int8.
        """
        return None

    @abstractmethod
    def update(self, state: Any, block: AttentionBlock) -> Any:
        """Return the state after one more block of rows; `state` is None before the first."""

    def result(self, state: Any) -> Tensor:
        """Return what parts read; the state itself unless overridden."""
        assert isinstance(state, Tensor)
        return state


class LayerPolicy(Part):
    """Decides what a layer may do."""

    kind = "policy"

    @abstractmethod
    def plan(self, layer: LayerView) -> LayerPlan:
        """Return the rule, the measured rho and the share of each row."""


class BudgetAllocator(Part):
    """Divides the budget among layers and heads."""

    kind = "allocator"
    scope: ClassVar[Literal["layer", "model"]] = "layer"  # "model" needs every layer's scores first
    even: ClassVar[bool] = False  # every head of every layer gets the same
    firm: ClassVar[bool] = False  # refuses a budget that does not hold what is protected

    def __init_subclass__(cls, use: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(use=use, **kwargs)
        if cls.scope == "model":
            cls.provides |= {"all-layers"}

    @abstractmethod
    def allocate(self, slots: Tensor, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
        """Return the slots of each head, `(layers, batch, kv_heads)` int64 on the CPU.

        Args:
            slots: the uniform share per KV head and layer, `(batch,)` int64 on the CPU.
            layers: this layer alone, or all layers, as `scope` says.
            scores: of the same layers.
        """

    def reallocate(
        self, slots: Tensor, layers: Sequence[LayerView], scores: Sequence[Scores], granted: Tensor
    ) -> Tensor:
        """Return the slots of each head at a compression while tokens are decoded, for an allocator of scope "model":
        what `allocate` says, unless overridden.

        Args:
            slots: the uniform share per KV head and layer, `(batch,)` int64 on the CPU.
            layers: all layers.
            scores: of the same layers.
            granted: what each head was given by the last compression that was not while decoding, `(layers, batch,
                kv_heads)` int64 on the CPU.
        """
        return self.allocate(slots, layers, scores)

    def least(self, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Tensor:
        """Return the smallest uniform share of each row that `allocate` accepts, `(batch,)` int64 on the CPU; 1 unless
        overridden.
        """
        return torch.ones(layers[0].shape[0], dtype=torch.long)


class Scorer(Part):
    """Says how much each token matters."""

    kind = "scorer"
    provides = frozenset({"scores"})

    @abstractmethod
    def score(self, layer: LayerView, slots: Tensor) -> Tensor:
        """Return the importance of each token, `(batch, kv_heads, tokens)`; higher is kept, ties go to the earlier
        token.

        Args:
            layer: what the layer holds.
            slots: the uniform share per row, `(batch,)` int64 on the CPU, for windows that scale with it.
        """

    def for_samples(self, numbers: Sequence[int]) -> Scorer:
        """Return the scorer for a batch of these samples of a task; this one, unless it draws lots, which an experiment
        wants to be others for every sample.
        """
        return self

    def protect(self, layer: LayerView, slots: Tensor) -> Tensor | None:
        """Return which tokens are kept whatever their score, `(batch, kv_heads, tokens)` bool; None for none.

        Args:
            layer: what the layer holds.
            slots: `(batch,)`, the uniform share, for the allocator; `(batch, kv_heads)`, what was allotted, for the
                selector, unless `protects_by_share`.
        """
        return None

    def tiers(self, layer: LayerView, slots: Tensor) -> Tensor | None:
        """Return the tier of each token, `(batch, kv_heads, tokens)` int16 from 0; None for one tier.

        Tokens of a higher tier are kept before all of a lower one, whatever their scores. Other than protected tokens,
        they can be merged into.

        Args:
            layer: what the layer holds.
            slots: as for `protect`.
        """
        return None

    def together(self, layers: Sequence[LayerView], scores: Sequence[Scores]) -> Sequence[Scores]:
        """Return the scores of all layers once all are known, as they are unless overridden: one layer may speak for
        others. Called with an allocator of scope `model`; a scorer that needs it requires `all-layers`.
        """
        return scores

    def rounds(self, tokens: Tensor, slots: Tensor) -> Sequence[Tensor]:
        """Return the shares, `(batch,)` int64 on the CPU each, to which a second pass narrows the cache on its way.

        After each, it runs again and attends only to what would be kept at that share. None by default: it runs once.

        Args:
            tokens: valid tokens of each row, `(batch,)`.
            slots: the uniform share per row, `(batch,)`.
        """
        return ()

    @property
    def protects_by_share(self) -> bool:
        """Return whether protection and tiers go by the uniform share, whatever a head is allotted: a window whose
        queries vote stays as it is, one that is a share of the slots grows and shrinks with them.
        """
        return False


class PivotSelector(Part):
    """Chooses the tokens that stay."""

    kind = "selector"
    provides = frozenset({"pivots"})
    by_score: ClassVar[bool] = True  # what stays has the highest priority, then score, then comes earlier

    @abstractmethod
    def select(self, layer: LayerView, scores: Scores, slots: Tensor) -> Pivots:
        """Return the pivots. `slots` `(batch, kv_heads)` int64 on the CPU is never more than a head has valid
        tokens.
        """


class Matcher(Part):
    """Says where every other token goes."""

    kind = "matcher"
    requires = frozenset({"pivots"})

    @abstractmethod
    def match(self, layer: LayerView, pivots: Pivots, scores: Scores, rule: Tensor) -> Assignment:
        """Return the edges from the tokens that do not stay to the pivots. `rule` `(batch,)` holds a `Rule` per row."""


class Merger(Part):
    """Folds the other tokens into the pivots."""

    kind = "merger"
    requires = frozenset({"pivots"})

    @property
    def convex(self) -> frozenset[str]:
        """Return which of `keys` and `values` are convex combinations of a slot's members: no coordinate leaves their
        range, and equal vectors merge to themselves.
        """
        return frozenset({"keys", "values"})

    @property
    def alike(self) -> bool:
        """Return whether keys and values are merged by the same formula: equal ones stay equal."""
        return True

    @abstractmethod
    def merge(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
        """Return new keys and values `(batch, kv_heads, slots, head_dim)` and counts `(batch, kv_heads, slots)`
        float32.
        """

    def merge_values(self, layer: LayerView, pivots: Pivots, assignment: Assignment) -> tuple[Tensor, Tensor]:
        """Return the values and counts of `merge`, for a merger around this one that keeps other keys.

        Overridden where that is less work than `merge`.
        """
        _, values, counts = self.merge(layer, pivots, assignment)
        return values, counts


class Store(Part):
    """Says how a layer's slots are held in memory.

    A store that makes slots smaller `shrinks`. Where nothing is evicted, a budget is then of bytes, and the store must
    hold every token in them. One that `fits` chooses how: by the bytes that it may take. One that `evicts` is given as
    many tokens as it can hold in the bytes; otherwise a recipe with a selector keeps the budget's share of the tokens,
    whatever the store makes of them.
    """

    kind = "store"

    @property
    def shrinks(self) -> bool:
        """Return whether slots take fewer bytes than they came in with."""
        return False

    @property
    def fits(self) -> bool:
        """Return whether the bytes that it may take decide how precisely slots are held."""
        return False

    @property
    def evicts(self) -> bool:
        """Return whether the budget of an evicting recipe is of bytes, of which this store makes the most."""
        return False

    def smallest(self, slots: Tensor, form: SlotForm) -> Tensor:
        """Return the fewest bytes that rows of this many slots per head take over all heads and layers.

        Args:
            slots: any shape, int64 on the CPU.
            form: of the slots as they come in.
        """
        return slots * form.heads * form.slot_bytes

    def open_all(self, layers: int, reserve: int | None = None) -> Sequence[SlotStorage]:
        """Return an empty storage for each layer; overridden by stores whose layers share something."""
        return [self.open(reserve) for _ in range(layers)]

    @abstractmethod
    def open(self, reserve: int | None = None) -> SlotStorage:
        """Return an empty storage for one layer; `reserve` slots of room are taken at the first append."""


PART_KINDS: dict[str, type[Part]] = {
    interface.kind: interface
    for interface in (
        LayerPolicy,
        BudgetAllocator,
        Scorer,
        PivotSelector,
        Matcher,
        Merger,
        Store,
        Observation,
    )
}
