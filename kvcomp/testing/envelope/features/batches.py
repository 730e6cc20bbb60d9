"""Batches: padding, beams, samples, rows that are chosen again, and tokens that are taken back."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.runtime.cache_argument import CACHE
from kvcomp.testing.envelope.bench import TOLERANCE, Bench, require_same_answer
from kvcomp.testing.envelope.engine import NotClaimedError
from kvcomp.testing.envelope.feature import feature
from kvcomp.testing.failures import require, require_close, require_same

BEAMS = {"num_beams": 3, "num_return_sequences": 2}
SAMPLES = {"do_sample": True, "num_return_sequences": 3}
SEED = 7  # of what is sampled


@feature("full-budget", quick=True)
def full_budget(bench: Bench) -> None:
    """A budget of 1.0 gives the stock cache's logits bit for bit; in a padded batch, whose pads go, nearly."""
    prompt, batch = bench.prompt(), bench.padded()
    require_same(bench.answer(prompt, 1.0).logits, bench.stock(prompt).logits, "logits of a prompt at budget 1.0")
    require_same_answer(
        bench.answer(batch, 1.0), bench.stock(batch), "a padded batch at budget 1.0, and of the stock cache"
    )


@feature("padded-batch", quick=True)
def padded_batch(bench: Bench) -> None:
    """Each row of a left-padded batch gives what it gives alone."""
    rows = bench.rows()
    together = bench.answer(bench.padded(rows))
    for place, row in enumerate(rows):
        require_same_answer(together.row(place), bench.answer(row), f"row {place}, in a padded batch and alone")


@feature("beams")
def beams(bench: Bench) -> None:
    """Beam search gives the beams of the stock cache at budget 1.0, and those of each row alone in a padded batch."""
    long, short, _ = bench.rows()
    require_same(_beams(bench, long, 1.0), bench.stock(long, **BEAMS).ids, "the beams at budget 1.0")
    together = _beams(bench, bench.padded([long, short]))
    for place, row in enumerate((long, short)):
        mine = together[place * 2 : place * 2 + 2]
        require_same(mine, _beams(bench, row), f"the beams of row {place}, in a padded batch and alone")


def _beams(bench: Bench, inputs: dict[str, Tensor], ratio: float | None = None) -> Tensor:
    return bench.answer(inputs, ratio, **BEAMS).ids


@feature("samples")
def samples(bench: Bench) -> None:
    """Sampling several sequences with a seed gives those of the stock cache at budget 1.0."""
    prompt = bench.prompt()
    torch.manual_seed(SEED)
    stock = bench.stock(prompt, **SAMPLES)
    torch.manual_seed(SEED)
    require_same(bench.answer(prompt, 1.0, **SAMPLES).ids, stock.ids, "the samples at budget 1.0")


@feature("chosen-rows")
def chosen_rows(bench: Bench) -> None:
    """A cache whose rows are repeated, reordered and selected goes on like the rows it then holds."""
    batch = bench.padded([bench.prompt(seed, media=False) for seed in (0, 1)])
    with bench.prefilled(batch) as cache:
        straight = _next_logits(bench, cache, batch, [0, 1])
    with bench.prefilled(batch) as cache:
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([2, 0, 1, 3]))
        cache.batch_select_indices(torch.tensor([0, 1]))
        swapped = _next_logits(bench, cache, batch, [1, 0])
    require_close(swapped, straight[[1, 0]], TOLERANCE, "logits after the rows changed places")


def _next_logits(bench: Bench, cache: object, batch: dict[str, Tensor], rows: list[int]) -> Tensor:
    """Return `(batch, vocabulary)` of one more token, at its own position in each row."""
    mask = torch.nn.functional.pad(batch["attention_mask"][rows], (0, 1), value=1)
    token = batch["input_ids"][rows, -1:]
    positions = mask.sum(dim=1, keepdim=True) - 1
    output = bench.model(input_ids=token, attention_mask=mask, position_ids=positions, **{CACHE: cache})
    logits: Tensor = output.logits[:, -1]
    return logits


@feature("crop")
def crop(bench: Bench) -> None:
    """Tokens that are cropped away, by their number or to a length, leave the cache as it was before them."""
    if reason := bench.engine.irreversible():
        raise NotClaimedError(reason)
    prompt = bench.prompt(media=False)
    tokens = prompt["input_ids"][:, :3]
    with bench.prefilled(prompt) as cache:
        seen = cache.get_seq_length()
        first = [bench.feed(cache, token) for token in torch.split(tokens, 1, dim=1)]
        for target in (-3, seen):
            cache.crop(target)
            require(cache.get_seq_length() == seen, f"crop({target}) must leave {seen} tokens seen, got {seen}")
            again = [bench.feed(cache, token) for token in torch.split(tokens, 1, dim=1)]
            require_close(torch.stack(again), torch.stack(first), TOLERANCE, f"logits after crop({target})")
