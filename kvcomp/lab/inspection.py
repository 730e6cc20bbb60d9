"""One prompt under a few strategies: which tokens each layer and head kept, merged and evicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kvcomp.core.errors import InputError
from kvcomp.core.strategy import Strategy
from kvcomp.lab.codec import Codec
from kvcomp.lab.evidence import locate
from kvcomp.lab.pictures import Picture, find_pictures
from kvcomp.lab.tasks import Sample, Task
from kvcomp.runtime.adapter import adapter_for
from kvcomp.runtime.cache import CompressedCache
from kvcomp.runtime.cache_argument import CACHE
from kvcomp.runtime.session import compress
from kvcomp.runtime.trace import EVICTED, Trace


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the model is asked.

    Attributes:
        title: where it comes from.
        inputs: of `model.generate`, one row without padding.
        tokens: each as text.
        modality: of each token, a `Modality`.
        pictures: see `Picture`.
        evidence: positions of the tokens that the answer rests on; empty where they are not known.
        reference: the right answer; None where nobody knows it.
    """

    title: str
    inputs: Mapping[str, Any]
    tokens: tuple[str, ...]
    modality: tuple[int, ...]
    pictures: tuple[Picture, ...]
    evidence: tuple[int, ...] = ()
    reference: str | None = None


@dataclass(frozen=True, eq=False)
class LayerFate:
    """What became of the prompt in one layer.

    Attributes:
        number: of the layer in the model.
        homes: `(kv_heads, tokens)` int64, the position of the token in whose slot each token lives, its own where it is
            kept, `EVICTED` where it is gone.
        rho: share of attention that crosses modalities; None where not measured.
    """

    number: int
    homes: Tensor
    rho: float | None

    def counts(self, head: int) -> tuple[int, int, int]:
        """Return how many tokens a head kept, merged into others and evicted."""
        homes = self.homes[head]
        kept = int((homes == torch.arange(len(homes))).sum())
        evicted = int((homes == EVICTED).sum())
        return kept, len(homes) - kept - evicted, evicted

    def mean_counts(self) -> tuple[float, float, float]:
        """Return how many tokens were kept, merged and evicted, mean over heads."""
        every = torch.tensor([self.counts(head) for head in range(len(self.homes))]).double()
        kept, merged, evicted = every.mean(dim=0).tolist()
        return kept, merged, evicted


@dataclass(frozen=True, eq=False)
class Fate:
    """What one strategy made of a prompt.

    Attributes:
        strategy: its name.
        budget: as it is spelled.
        threshold: rho above which a layer merges across modalities; None for a strategy without one.
        answer: what the model said.
        right: whether that is the reference; None where nobody knows it.
        share: bytes of keys and values held, of what all tokens would take, the answer's included.
        layers: the compressed ones.
    """

    strategy: str
    budget: str
    threshold: float | None
    answer: str
    right: bool | None
    share: float
    layers: tuple[LayerFate, ...]


def prompt_of_sample(model: Any, codec: Codec, task: Task, split: str, number: int) -> Prompt:
    """Return the prompt of a task's sample.

    Raises:
        InputError: the task has no such sample, or its evidence cannot be located.
    """
    if task.size is not None and number >= task.size:
        raise InputError(f"{task.name} has samples 0 to {task.size - 1}, got {number}")
    sample = task.sample(split, number)
    inputs = {name: value.to(model.device) for name, value in codec.encode([sample]).items()}
    images = [part for part in sample.context if not isinstance(part, str)]
    prompt = make_prompt(f"{task.name}, sample {number} of {split}", model, codec.tokenizer, inputs, images)
    return _with_answer(prompt, codec, sample)


def make_prompt(
    title: str, model: Any, tokenizer: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> Prompt:
    """Return the prompt that the inputs of a model hold.

    Args:
        title: where it comes from.
        model: that is asked.
        tokenizer: which writes single tokens.
        inputs: of `model.generate`, one row without padding.
        images: of the prompt, in order.
    """
    ids = inputs["input_ids"][0].tolist()
    found = adapter_for(model.config).modality(inputs)
    modality = (0,) * len(ids) if found is None else tuple(found[0].tolist())
    return Prompt(
        title=title,
        inputs=inputs,
        tokens=tuple(tokenizer.decode([token]) for token in ids),
        modality=modality,
        pictures=find_pictures(images, modality, inputs, model.config),
    )


def _with_answer(prompt: Prompt, codec: Codec, sample: Sample) -> Prompt:
    visual = [kind > 0 for kind in prompt.modality]
    evidence = locate(codec, sample, prompt.inputs["input_ids"][0].tolist(), visual)
    return Prompt(**{**vars(prompt), "evidence": evidence, "reference": sample.answer})


def follow(model: Any, tokenizer: Any, prompt: Prompt, strategy: Strategy, max_new_tokens: int) -> Fate:
    """Return what a strategy makes of a prompt, once the model has answered it greedily.

    Raises:
        KVCompError: the strategy cannot serve this model or this budget.
    """
    trace, length = Trace(), len(prompt.tokens)
    with torch.inference_mode(), compress(model, strategy, watcher=trace) as cache:
        output = model.generate(**prompt.inputs, **{CACHE: cache}, max_new_tokens=max_new_tokens, do_sample=False)
    answer: str = tokenizer.decode(output[0, length:], skip_special_tokens=True).strip()
    report = cache.report()
    return Fate(
        strategy=strategy.name,
        budget=report.budget,
        threshold=getattr(strategy.policy, "threshold", None) if strategy.selector is not None else None,
        answer=answer,
        right=None if prompt.reference is None else answer.split() == prompt.reference.split(),
        share=report.allocated_bytes / report.full_bytes,
        layers=tuple(_layers(cache, trace, length)),
    )


def _layers(cache: CompressedCache, trace: Trace, tokens: int) -> list[LayerFate]:
    entries, layers = cache.report().layers, cache.compressed_layers.values()
    fates = []
    for entry, layer in zip(entries, layers, strict=True):
        homes = trace.of(layer.number, tokens)
        home = torch.arange(tokens).expand(layer.form.kv_heads, -1) if homes is None else homes[0]
        fates.append(LayerFate(entry.layer, home, entry.rho[0]))
    return fates
