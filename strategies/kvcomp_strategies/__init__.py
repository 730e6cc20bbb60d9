"""The built-in parts and recipes: a plugin like any other."""

from collections.abc import Sequence
from pathlib import Path

from kvcomp.core.hookspecs import hookimpl
from kvcomp.core.interfaces import Part
from kvcomp_strategies.allocators.uniform import UniformAllocator
from kvcomp_strategies.matchers.nearest import Nearest
from kvcomp_strategies.matchers.none import NoMatch
from kvcomp_strategies.matchers.sensitivity_gated import SensitivityGated
from kvcomp_strategies.mergers.drop import Drop
from kvcomp_strategies.mergers.mean import Mean
from kvcomp_strategies.mergers.pivot_mean import PivotMean
from kvcomp_strategies.observations.cross_modal_flow import CrossModalFlow
from kvcomp_strategies.observations.query_peaks import QueryPeaks
from kvcomp_strategies.observations.received_attention import ReceivedSums
from kvcomp_strategies.observations.window_attention import WindowRows
from kvcomp_strategies.policies.flow_guided import FlowGuided
from kvcomp_strategies.policies.misaligned import Misaligned
from kvcomp_strategies.policies.uniform import UniformPolicy
from kvcomp_strategies.scorers.position import Position
from kvcomp_strategies.scorers.proxy_attention import ProxyAttention
from kvcomp_strategies.scorers.random import Random
from kvcomp_strategies.scorers.received_attention import ReceivedAttention
from kvcomp_strategies.scorers.window_attention import WindowAttention
from kvcomp_strategies.selectors.top_k import TopK
from kvcomp_strategies.stores.dense import Dense
from kvcomp_strategies.stores.layer_paired import LayerPairedStore
from kvcomp_strategies.stores.mixed import MixedStore
from kvcomp_strategies.stores.quantized import QuantizedStore

PARTS: tuple[type[Part], ...] = (
    UniformPolicy,
    FlowGuided,
    Misaligned,
    UniformAllocator,
    Position,
    ProxyAttention,
    Random,
    ReceivedAttention,
    WindowAttention,
    TopK,
    NoMatch,
    Nearest,
    SensitivityGated,
    Drop,
    Mean,
    PivotMean,
    Dense,
    QuantizedStore,
    MixedStore,
    LayerPairedStore,
    CrossModalFlow,
    QueryPeaks,
    ReceivedSums,
    WindowRows,
)


@hookimpl
def kvcomp_parts() -> Sequence[type[Part]]:
    """Return the built-in parts."""
    return PARTS


@hookimpl
def kvcomp_recipes() -> Sequence[Path]:
    """Return the recipe files beside this module."""
    return sorted((Path(__file__).parent / "recipes").glob("*.yaml"))
