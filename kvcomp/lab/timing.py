"""Decode time: every strategy decodes the same prompt, in turns of one token."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kvcomp.core.strategy import Strategy
from kvcomp.runtime.cache import CompressedCache
from kvcomp.runtime.cache_argument import CACHE
from kvcomp.runtime.session import compress


def clock_for(model: Any) -> Callable[[], float]:
    """Return the clock that decode time is read from.

    Where one CPU thread does all the work, its own CPU time: equal to the time on the wall while nothing else runs,
    and unmoved by what else does. Elsewhere the time on the wall.
    """
    alone = model.device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


class _Runner:
    """One strategy's cache, filled with the prompt, and the seconds of each token that it decoded since."""

    def __init__(self, model: Any, inputs: Mapping[str, Tensor], cache: CompressedCache) -> None:
        self.model, self.cache, self.clock = model, cache, clock_for(model)
        self.seconds: list[float] = []
        self.token = self._forward(inputs)

    def step(self) -> None:
        """Decode one token."""
        started = self.clock()
        self.token = self._forward({"input_ids": self.token.to(self.model.device)})
        self.seconds.append(self.clock() - started)

    def _forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the next token on the CPU, `(1, 1)`: by then the device has finished."""
        output = self.model(**inputs, **{CACHE: self.cache}, use_cache=True)
        token: Tensor = output.logits[:, -1:].argmax(dim=-1).cpu()
        return token


def decode_seconds(
    model: Any, inputs: Mapping[str, Tensor], strategies: Sequence[Strategy], tokens: int, order: random.Random
) -> list[list[float]]:
    """Return the seconds of each decoded token, for every strategy in turn.

    All strategies decode one token, in a new random order, before any decodes the next, so that what else the
    machine does hits all alike.

    Args:
        model: in evaluation mode.
        inputs: one prompt, without padding.
        strategies: to be timed.
        tokens: how many each decodes.
        order: draws the orders.
    """
    with torch.inference_mode(), ExitStack() as open_caches:
        runners = [
            _Runner(model, inputs, open_caches.enter_context(compress(model, strategy))) for strategy in strategies
        ]
        for _ in range(tokens):
            for runner in order.sample(runners, len(runners)):
                runner.step()
    return [runner.seconds for runner in runners]
