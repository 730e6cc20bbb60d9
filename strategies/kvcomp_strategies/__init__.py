"""The built-in parts and recipes: a plugin like any other."""

from collections.abc import Sequence
from pathlib import Path

from kvcomp.core.hookspecs import hookimpl
from kvcomp.core.interfaces import Part
from kvcomp_strategies.allocators.ada_heads import AdaHeads
from kvcomp_strategies.allocators.entropy import EntropyAllocator
from kvcomp_strategies.allocators.global_ import Global
from kvcomp_strategies.allocators.prefix import Prefix
from kvcomp_strategies.allocators.protected_first import ProtectedFirst
from kvcomp_strategies.allocators.pyramid import Pyramid
from kvcomp_strategies.allocators.sparsity import SparsityAllocator
from kvcomp_strategies.allocators.uniform import UniformAllocator
from kvcomp_strategies.allocators.variance import VarianceAllocator
from kvcomp_strategies.matchers.following_window import FollowingWindow
from kvcomp_strategies.matchers.nearby import Nearby
from kvcomp_strategies.matchers.nearest import Nearest
from kvcomp_strategies.matchers.none import NoMatch
from kvcomp_strategies.matchers.same_cluster import SameCluster
from kvcomp_strategies.matchers.sensitivity_gated import SensitivityGated
from kvcomp_strategies.matchers.similarity_threshold import SimilarityThreshold
from kvcomp_strategies.mergers.drop import Drop
from kvcomp_strategies.mergers.gaussian import Gaussian
from kvcomp_strategies.mergers.importance_weighted import ImportanceWeighted
from kvcomp_strategies.mergers.mean import Mean
from kvcomp_strategies.mergers.pivot_mean import PivotMean
from kvcomp_strategies.mergers.sum import Sum
from kvcomp_strategies.mergers.unrotated import Unrotated
from kvcomp_strategies.mergers.values_only import ValuesOnly
from kvcomp_strategies.mergers.weighted import Weighted
from kvcomp_strategies.observations.cross_modal_flow import CrossModalFlow
from kvcomp_strategies.observations.post_vision import PostVisionSums
from kvcomp_strategies.observations.query_peaks import QueryPeaks
from kvcomp_strategies.observations.query_statistics import QueryStatistics
from kvcomp_strategies.observations.received_attention import ReceivedSums
from kvcomp_strategies.observations.reconstruction import LargestReceived, SquaresReceived
from kvcomp_strategies.observations.row_entropy import RowEntropy
from kvcomp_strategies.observations.sparsity import Sparsity
from kvcomp_strategies.observations.window_attention import WindowRows
from kvcomp_strategies.policies.flow_guided import FlowGuided
from kvcomp_strategies.policies.misaligned import Misaligned
from kvcomp_strategies.policies.uniform import UniformPolicy
from kvcomp_strategies.scorers.critical import Critical
from kvcomp_strategies.scorers.early_layer import EarlyLayer
from kvcomp_strategies.scorers.expected_attention import ExpectedAttention
from kvcomp_strategies.scorers.key_diversity import KeyDiversity
from kvcomp_strategies.scorers.key_norm import KeyNorm
from kvcomp_strategies.scorers.last_query import LastQuery
from kvcomp_strategies.scorers.position import Position
from kvcomp_strategies.scorers.post_vision import PostVision
from kvcomp_strategies.scorers.proxy_attention import ProxyAttention
from kvcomp_strategies.scorers.random import Random
from kvcomp_strategies.scorers.received_attention import ReceivedAttention
from kvcomp_strategies.scorers.reconstruction import Reconstruction
from kvcomp_strategies.scorers.text_first import TextFirst
from kvcomp_strategies.scorers.value_norm import ValueNorm
from kvcomp_strategies.scorers.window_attention import WindowAttention
from kvcomp_strategies.selectors.adjacent_clusters import AdjacentClusters
from kvcomp_strategies.selectors.sinks_and_recent import SinksAndRecent
from kvcomp_strategies.selectors.top_k import TopK
from kvcomp_strategies.stores.dense import Dense
from kvcomp_strategies.stores.layer_paired import LayerPairedStore
from kvcomp_strategies.stores.mixed import MixedStore
from kvcomp_strategies.stores.quantized import QuantizedStore
from kvcomp_strategies.stores.ragged import Ragged

PARTS: tuple[type[Part], ...] = (
    UniformPolicy,
    FlowGuided,
    Misaligned,
    UniformAllocator,
    EntropyAllocator,
    VarianceAllocator,
    Pyramid,
    AdaHeads,
    SparsityAllocator,
    Prefix,
    Global,
    ProtectedFirst,
    Critical,
    ExpectedAttention,
    Position,
    ProxyAttention,
    Random,
    ReceivedAttention,
    Reconstruction,
    TextFirst,
    ValueNorm,
    WindowAttention,
    LastQuery,
    PostVision,
    KeyNorm,
    KeyDiversity,
    EarlyLayer,
    SinksAndRecent,
    TopK,
    AdjacentClusters,
    NoMatch,
    Nearby,
    Nearest,
    SensitivityGated,
    SimilarityThreshold,
    SameCluster,
    FollowingWindow,
    Drop,
    Mean,
    PivotMean,
    Weighted,
    ImportanceWeighted,
    Gaussian,
    Sum,
    Unrotated,
    ValuesOnly,
    Dense,
    Ragged,
    QuantizedStore,
    MixedStore,
    LayerPairedStore,
    CrossModalFlow,
    QueryPeaks,
    QueryStatistics,
    ReceivedSums,
    RowEntropy,
    PostVisionSums,
    Sparsity,
    LargestReceived,
    SquaresReceived,
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
