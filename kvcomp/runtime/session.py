"""Switching a model to kvcomp's attention and back: `compress()` for one request, `attach()` for a server."""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from kvcomp.core import config
from kvcomp.core.errors import InputError, UnsupportedModelError, UnsupportedUseError, UnusedCacheWarning
from kvcomp.core.ignored import warn_of_ignored
from kvcomp.core.strategy import Strategy
from kvcomp.runtime import attention
from kvcomp.runtime.adapter import adapter_for
from kvcomp.runtime.cache import CompressedCache
from kvcomp.runtime.cache_argument import CACHE, given_cache
from kvcomp.runtime.files import fill_cache, saved_strategy
from kvcomp.runtime.incoming import new_token_count
from kvcomp.runtime.rotary import attention_modules
from kvcomp.runtime.trace import Watcher
from kvcomp.runtime.weights import Sample, sample_weights


class Attachment:
    """What is changed on one model while at least one session is open: its attention implementation and its hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.sessions = 0
        self.watching = False
        self.decoder = _decoder(model)
        self.base = _implementation(self.decoder)
        _check_base(self.base)
        name = attention.register(self.base)
        self.decoder.set_attn_implementation(name)
        if _implementation(self.decoder) != name:
            raise UnsupportedModelError(
                f"{type(self.decoder).__name__} does not let its attention implementation be set: its attention does "
                "not go through transformers' AttentionInterface, so its cache cannot be compressed"
            )
        self.handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(_note_inputs, with_kwargs=True),
            self.decoder.register_forward_pre_hook(self._begin_text, with_kwargs=True),
            self.decoder.register_forward_hook(_end_text, with_kwargs=True),
            model.register_forward_hook(_end_forward, with_kwargs=True),
        ]

    def undo(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()
        self.decoder.set_attn_implementation(self.base)

    def _begin_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (noted := _noted(module, args, kwargs)) is not None:
            cache, inputs = noted
            cache.text_begins(inputs)
            if cache.reads_rotary and not self.watching:
                self._watch_rotary()

    def _watch_rotary(self) -> None:
        """Have every attention module tell its cache which rotary embeddings it was given."""
        with _lock:
            if not self.watching:
                modules = attention_modules(self.decoder)
                self.handles += [module.register_forward_pre_hook(_note_rotary, with_kwargs=True) for module in modules]
                self.watching = True


_attachments: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class Session:
    """A model that compressed caches can be used with, until `detach()`. Sessions nest and overlap freely."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.open = True
        self.caches: weakref.WeakSet[CompressedCache] = weakref.WeakSet()
        _decoder(model)  # refuses what is no model before it becomes a key
        with _lock:
            attachment = _attachments.get(model) or Attachment(model)
            attachment.sessions += 1
            _attachments[model] = attachment

    def cache(
        self,
        strategy: Strategy | str | Path | Mapping[str, Any],
        budget: Any = None,
        *,
        defer: bool = False,
        reserve: int | None = None,
        compiled: bool = False,
        watcher: Watcher | None = None,
        **overrides: Any,
    ) -> CompressedCache:
        """Return an empty cache for one request. See `kvcomp.compress` for the arguments."""
        built = _build(strategy, budget, overrides)
        if compiled:
            _check_compilable(_attachments[self.model].base)
        cache = _empty_cache(self.model, built, defer=defer, reserve=reserve, compiled=compiled, watcher=watcher)
        self.caches.add(cache)
        return cache

    def shared_cache(self, strategies: Iterable[Strategy | str | Path | Mapping[str, Any]]) -> CompressedCache:
        """Return an empty cache that reads a prompt once for several strategies, and compresses nothing.

        Strategies do not change what a prefill computes. So a prompt is read by this cache, and its snapshot restored
        in a cache of each strategy and budget, which then holds what it would, had it read the prompt itself:

            shared = session.shared_cache(["snapkv", "flowmm"])
            model(**inputs, past_key_values=shared)
            prompt = shared.snapshot()
            for name in ("snapkv", "flowmm"):
                cache = session.cache(name, budget=0.2)
                cache.restore(prompt)
                cache.finish()

        Args:
            strategies: whose attention statistics are taken; budgets make no difference.

        Raises:
            ConfigError, InputError, UnknownNameError: a strategy cannot be built, or none is given.
        """
        members = [_build(source, None, {}) for source in strategies]
        if not members:
            raise InputError("a shared cache must be given the strategies that it reads the prompt for, and got none")
        keep_all = config.strategy({"name": "shared"})
        return _empty_cache(self.model, keep_all, serves=members)

    def detach(self) -> None:
        """Leave the model as it was, once the last session is detached. Caches stay readable. Calling it again
        changes nothing.
        """
        with _lock:
            if not self.open:
                return
            self.open = False
            for cache in self.caches:
                cache.loosen()  # a compiled step would run stock attention over them now
            attachment = _attachments[self.model]
            attachment.sessions -= 1
            if attachment.sessions == 0:
                del _attachments[self.model]
                attachment.undo()


def attach(model: nn.Module) -> Session:
    """Return a session: the model runs kvcomp's attention until `session.detach()`.

    Caches that are not kvcomp's work as before. For servers, where many requests share a model:

        session = kvcomp.attach(model)
        cache = session.cache("flowmm", budget=0.2)
        model.generate(**inputs, past_key_values=cache)
        session.detach()

    Raises:
        UnsupportedModelError: the model's cache cannot be compressed; the model is left as it was.
    """
    return Session(model)


@contextmanager
def compress(
    model: nn.Module,
    strategy: Strategy | str | Path | Mapping[str, Any],
    budget: Any = None,
    *,
    defer: bool = False,
    reserve: int | None = None,
    compiled: bool = False,
    watcher: Watcher | None = None,
    **overrides: Any,
) -> Iterator[CompressedCache]:
    """Give a cache that compresses itself, for `model.generate(..., past_key_values=cache)` inside the block.

    Args:
        model: a Hugging Face text or multimodal model whose attention goes through transformers' AttentionInterface.
        strategy: a recipe's name (`"flowmm"`), a YAML file, a mapping, or a `Strategy`.
        budget: what is kept: a ratio in (0, 1], `{"tokens": 512}` or `{"bytes": "64MiB"}`; by default the recipe's own.
        defer: keep everything until `cache.finish()` or the first decoded token; for prompts that arrive in chunks.
        reserve: slots of room to take for decoding, where the number of new tokens is known.
        compiled: hold slots at fixed addresses once the prompt is compressed, so that one compiled graph decodes all of
            the `reserve` tokens: `generate()` then compiles the decode step by itself where there is a GPU.
        watcher: is told of every compression, as a `kvcomp.Trace` that remembers what became of every token.
        overrides: `**{"policy.threshold": 0.3}` changes a field, `merger="mean"` replaces a part.

    Raises:
        ConfigError, UnknownNameError, BudgetError, UnsupportedModelError: the strategy or the model cannot be used.
        UnsupportedUseError: `compiled` with a recipe that moves slots while tokens are decoded; or more tokens were
            decoded by a compiled model than there was room for.

    Warns:
        UnusedCacheWarning: the block ended and the cache was never passed to the model.
        IgnoredSettingWarning: something was given that changes nothing: a budget where everything is kept, a part that
            has nothing to do because another one is missing.
    """
    built = _build(strategy, budget, overrides)
    session = attach(model)
    try:
        cache = session.cache(built, defer=defer, reserve=reserve, compiled=compiled, watcher=watcher)
        yield cache
    finally:
        session.detach()
    cache.check_sound()
    if not cache.used:
        warnings.warn(
            f"the cache of compress() was never used; pass it to the model: model.generate(..., {CACHE}=cache)",
            UnusedCacheWarning,
            stacklevel=3,
        )


def load_cache(path: str | Path, model: nn.Module, *, same_weights: bool = True) -> CompressedCache:
    """Return the cache that `cache.save(path)` wrote, on the devices of the model's layers and in the model's dtype.

    It can be read at once; to go on with it, the model must be inside `kvcomp.compress(...)` or `kvcomp.attach(model)`.

    Args:
        path: of the file.
        model: the one that made the cache.
        same_weights: whether to refuse a model with the same configuration whose weights are others. A sample of them
            is compared, exactly where the dtype is the same.

    Raises:
        InputError: the file cannot be read, is damaged, or holds the cache of a model with another configuration or
            other weights.
    """
    path = Path(path)
    cache = _empty_cache(model, saved_strategy(path))
    fill_cache(cache, path, model, same_weights=same_weights)
    return cache


def _empty_cache(
    model: nn.Module,
    strategy: Strategy,
    *,
    defer: bool = False,
    reserve: int | None = None,
    compiled: bool = False,
    watcher: Watcher | None = None,
    serves: Sequence[Strategy] = (),
) -> CompressedCache:
    model_config: Any = model.config
    reference = weakref.ref(model)

    def decoder() -> Any:
        owner = reference()
        attachment = None if owner is None else _attachments.get(owner)
        return None if attachment is None else attachment.decoder

    def weights() -> Sample:
        owner = reference()
        return [] if owner is None else sample_weights(_decoder(owner))

    adapter = adapter_for(model_config)
    return CompressedCache(
        strategy,
        model_config,
        adapter,
        decoder,
        weights,
        defer=defer,
        reserve=reserve,
        compiled=compiled,
        watcher=watcher,
        serves=serves,
    )


def _build(source: Strategy | str | Path | Mapping[str, Any], budget: Any, overrides: dict[str, Any]) -> Strategy:
    if isinstance(source, Strategy) and budget is None and not overrides:
        return source
    built = config.strategy(source, budget, **overrides)
    warn_of_ignored(built, stacklevel=4)
    return built


def _decoder(model: nn.Module) -> Any:
    """Return the text model whose layers hold the cache."""
    model_config = getattr(model, "config", None)
    if model_config is None or not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(f"the model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if getattr(model_config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model; kvcomp compresses the cache of decoder-only models"
        )
    if obstacle := adapter_for(model_config).obstacle:
        raise UnsupportedModelError(f"{type(model).__name__} {obstacle}; use it without kvcomp")
    return model.get_decoder()  # type: ignore[operator]


def _implementation(decoder: Any) -> str:
    # transformers has a public setter and no public getter; attention modules themselves read this field.
    return str(decoder.config._attn_implementation)


def _check_base(base: str) -> None:
    if base.startswith(attention.PREFIX):
        raise UnsupportedUseError(
            "the model must be attached once, and its text model runs kvcomp's attention already, for a session with "
            "another model that it is a part of; use that session, or detach it first"
        )
    if not attention.supports(base):
        raise UnsupportedModelError(
            f"the attention implementation must be one of {', '.join(attention.BASES)}, got {base!r}; call "
            "model.set_attn_implementation('sdpa') first"
        )


def _check_compilable(base: str) -> None:
    if base not in ("sdpa", "eager"):
        raise UnsupportedUseError(
            f"compiled=True runs on sdpa and eager attention, and the model's is {base!r}, which needs its masks built "
            "anew for each token; call model.set_attn_implementation('sdpa') first"
        )


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what a forward was called with, positional arguments under their names."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs} if args else kwargs


def _noted(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[CompressedCache, dict[str, Any]] | None:
    """Return the cache of a forward and its inputs by name; None where there is none of ours, or where nothing is to be
    noted: one token for slots at fixed addresses, which is the step that is compiled.
    """
    cache = given_cache(kwargs)
    if isinstance(cache, CompressedCache) and cache.is_fixed and new_token_count(kwargs) == 1:
        return None
    inputs = _named(module, args, kwargs)
    cache = given_cache(inputs)
    if not isinstance(cache, CompressedCache) or (cache.is_fixed and new_token_count(inputs) == 1):
        return None
    return cache, inputs


def _note_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (noted := _noted(module, args, kwargs)) is not None:
        cache, inputs = noted
        cache.note_inputs(inputs)


def _note_rotary(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (noted := _noted(module, args, kwargs)) is not None:
        cache, inputs = noted
        cache.note_rotary(module, inputs.get("position_embeddings"))


def _end_text(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if (noted := _noted(module, args, kwargs)) is not None:
        cache, inputs = noted
        cache.text_ended(inputs)


def _end_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if (noted := _noted(module, args, kwargs)) is not None:
        noted[0].forward_ended()
