"""KV-cache compression for multimodal and text models, composed from parts in a config file.

with kvcomp.compress(model, "flowmm", budget=0.2) as cache:
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=128)
"""

from kvcomp.core.budget import Budget
from kvcomp.core.config import strategy
from kvcomp.core.errors import (
    BudgetError,
    ConfigError,
    DataError,
    DuplicateNameError,
    IgnoredSettingWarning,
    InputError,
    KVCompError,
    KVCompWarning,
    PluginWarning,
    ResultsError,
    UnknownNameError,
    UnsupportedModelError,
    UnsupportedUseError,
    UnusedCacheWarning,
    WorkerError,
)
from kvcomp.core.hookspecs import hookimpl
from kvcomp.core.interfaces import (
    BudgetAllocator,
    LayerPolicy,
    Matcher,
    Merger,
    Observation,
    PivotSelector,
    Scorer,
    Store,
)
from kvcomp.core.rotary import Rotary
from kvcomp.core.storage import SlotStorage
from kvcomp.core.strategy import Strategy
from kvcomp.core.types import (
    Assignment,
    AttentionBlock,
    CompressedLayer,
    Guide,
    LayerPlan,
    LayerView,
    MergePlan,
    Modality,
    Pivots,
    Repeat,
    Rule,
    Scores,
    SlotForm,
)
from kvcomp.runtime.adapter import ModelAdapter
from kvcomp.runtime.cache import CompressedCache
from kvcomp.runtime.report import LayerReport, Report
from kvcomp.runtime.session import Session, attach, compress, load_cache
from kvcomp.runtime.snapshots import Snapshot
from kvcomp.runtime.trace import Trace, Watcher
from kvcomp.version import __version__

__all__ = [
    "Assignment",
    "AttentionBlock",
    "Budget",
    "BudgetAllocator",
    "BudgetError",
    "CompressedCache",
    "CompressedLayer",
    "ConfigError",
    "DataError",
    "DuplicateNameError",
    "Guide",
    "IgnoredSettingWarning",
    "InputError",
    "KVCompError",
    "KVCompWarning",
    "LayerPlan",
    "LayerPolicy",
    "LayerReport",
    "LayerView",
    "Matcher",
    "MergePlan",
    "Merger",
    "Modality",
    "ModelAdapter",
    "Observation",
    "PivotSelector",
    "Pivots",
    "PluginWarning",
    "Repeat",
    "Report",
    "ResultsError",
    "Rotary",
    "Rule",
    "Scorer",
    "Scores",
    "Session",
    "SlotForm",
    "SlotStorage",
    "Snapshot",
    "Store",
    "Strategy",
    "Trace",
    "UnknownNameError",
    "UnsupportedModelError",
    "UnsupportedUseError",
    "UnusedCacheWarning",
    "Watcher",
    "WorkerError",
    "__version__",
    "attach",
    "compress",
    "hookimpl",
    "load_cache",
    "strategy",
]
