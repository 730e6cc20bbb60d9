"""Train a testbed like `minimile-xs` on two CPU cores.

    python -m kvcomp.minimile.training --out training-output/minimile-xs

The run is a function of its seed and of the step count: it can stop at any checkpoint and resume to the same
weights. Only where the clock forces the learning rate down (`--minutes`) does the machine's speed matter.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from kvcomp.minimile.batching import COPY, IGNORED, PAIRS, Batch
from kvcomp.minimile.curriculum import Course, draw_batch
from kvcomp.minimile.model import SIZES, build_model, image_features
from kvcomp.minimile.tasks import HARD_TASKS, TASKS

WARM_UP = 100
DECAY_STEPS = 700
DECAY_SHARE = 0.7
"""The learning rate starts to fall when this share of `--minutes` is left, whatever is learned."""
BUDGET = 3_000
"""Tokens of one step."""


@dataclass
class Progress:
    """Where a run stands: everything but weights and moments."""

    seed: int = 0
    size: str = "xs"
    step: int = 0
    decay_start: int | None = None
    decay_steps: int = DECAY_STEPS
    peak: float = 1.0
    """The share of the learning rate from which it falls."""
    seconds: float = 0.0
    course: Course = field(default_factory=Course)
    log: list[dict[str, Any]] = field(default_factory=list)

    def finished(self) -> bool:
        """Return whether the learning rate has reached zero."""
        return self.decay_start is not None and self.step >= self.decay_start + self.decay_steps

    def learning_rate(self) -> float:
        """Return the rate of the next step: linear warm-up, constant, linear fall."""
        rate = self.peak * SIZES[self.size].learning_rate * min(1.0, (self.step + 1) / WARM_UP)
        if self.decay_start is not None:
            rate *= max(0.0, 1 - (self.step - self.decay_start) / self.decay_steps)
        return rate

    def descend_again(self, peak: float, minutes: float) -> None:
        """Begin once more at a share of the learning rate, to fall to zero in that time at the speed so far."""
        self.peak = peak
        self.decay_start = self.step
        self.decay_steps = max(1, int(60 * minutes * self.step / self.seconds))


class Run:
    """A model in training with its optimizer and progress."""

    def __init__(self, seed: int = 0, size: str = "xs") -> None:
        self.progress = Progress(seed=seed, size=size)
        self.model = build_model(seed, size).train()
        self.optimizer = build_optimizer(self.model)

    def step(self) -> float:
        """Do one step and return its loss."""
        progress = self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = progress.learning_rate()
        batch = draw_batch(progress.seed, progress.step, progress.course, BUDGET)
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):  # a third less time than float32 on this model
            logits = answer_logits(self.model, batch).float()
        loss = answer_loss(logits, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        progress.course.remember(score(logits, batch))
        progress.step += 1
        return float(loss.detach())

    def advance(self) -> None:
        """Go on in the curriculum; where all is learned, start to lower the learning rate."""
        progress = self.progress
        progress.course.advance()
        if progress.decay_start is None and progress.course.finished:
            progress.decay_start = progress.step

    def save(self, folder: Path) -> None:
        """Write weights, moments and progress; an interrupted write leaves a whole checkpoint beside it."""
        fresh, old = (folder.with_name(folder.name + suffix) for suffix in (".new", ".old"))
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_file(dict(self.model.named_parameters()), fresh / "model.safetensors")
        save_file(pack_moments(self.optimizer), fresh / "optimizer.safetensors")
        (fresh / "progress.json").write_text(json.dumps(asdict(self.progress), indent=1))
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Return the run that `save` wrote."""
        written = json.loads((folder / "progress.json").read_text())
        progress = Progress(**written | {"course": Course(**written["course"])})
        run = cls(progress.seed, progress.size)
        run.progress = progress
        run.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        unpack_moments(run.optimizer, load_file(folder / "optimizer.safetensors"))
        return run


def build_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Return the optimizer of the recipe."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)


def answer_logits(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> Tensor:
    """Return the logits that predict the answer tokens (answer tokens, vocabulary)."""
    images: Any = None
    if len(batch.pixel_values):
        features = image_features(model.model.visual, batch.pixel_values)
        images = {"image": BaseModelOutputWithPooling(pooler_output=(features,))}  # type: ignore[arg-type]
    states = model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        mm_encoder_outputs=images,
        use_cache=False,
    ).last_hidden_state
    logits: Tensor = model.lm_head(states[batch.targets != IGNORED])
    return logits


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean loss of the answers to questions plus that of the drills."""
    wanted = batch.targets != IGNORED
    losses = F.cross_entropy(logits, batch.targets[wanted], reduction="none")
    drill_kinds = torch.tensor([kind in (COPY, PAIRS) for kind in batch.kinds])
    drills = drill_kinds[batch.answers[wanted]]
    return sum((losses[part].mean() for part in (drills, ~drills) if part.any()), losses.new_zeros(()))


def score(logits: Tensor, batch: Batch) -> dict[str, float]:
    """Return for each kind of question the share of answers whose every token is the most likely one, and for each
    kind of drill the share of such tokens.
    """
    wanted = batch.targets != IGNORED
    right = (logits.detach().argmax(dim=-1) == batch.targets[wanted]).float()
    zeros = torch.zeros(len(batch.kinds))
    tokens = zeros.index_add(0, batch.answers[wanted], torch.ones_like(right))
    parts = zeros.index_add(0, batch.answers[wanted], right) / tokens
    shares = {}
    for kind in sorted(set(batch.kinds)):
        part = parts[[index for index, name in enumerate(batch.kinds) if name == kind]]
        shares[kind] = float((part if kind in (COPY, PAIRS) else part == 1).float().mean())
    return shares


def pack_moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as a flat dictionary of tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, slots in state.items() for name, value in slots.items()}


def unpack_moments(optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    """Put back what `pack_moments` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def train(run: Run, folder: Path, minutes: float, log_every: int = 50, save_seconds: float = 60) -> None:
    """Train until the learning rate has fallen to zero, printing progress and saving once a minute."""
    progress = run.progress
    began = saved = time.perf_counter()
    before, losses = progress.seconds, []
    while not progress.finished():
        losses.append(run.step())
        run.advance()
        now = time.perf_counter()
        progress.seconds = before + now - began
        _watch_the_clock(progress, minutes)
        if progress.step % log_every == 0:
            _report(progress, sum(losses) / len(losses))
            losses = []
        if now - saved > save_seconds:
            run.save(folder)
            saved = now
    run.save(folder)


def _watch_the_clock(progress: Progress, minutes: float) -> None:
    left = 60 * minutes - progress.seconds
    if progress.decay_start is None and left < 60 * minutes * DECAY_SHARE:
        progress.decay_start = progress.step
        progress.decay_steps = max(1, int(left * progress.step / progress.seconds))


def _report(progress: Progress, loss: float) -> None:
    course = progress.course
    line: dict[str, Any] = {"step": progress.step, "seconds": round(progress.seconds), "loss": round(loss, 4)}
    line |= {kind: round(course.right.get(kind, 0.0), 3) for kind in (COPY, PAIRS)}
    for task in (*TASKS, *HARD_TASKS):
        if task.name in course.levels:
            line[task.name.removeprefix("mini/")] = [course.levels[task.name], round(course.share(task), 3)]
    progress.log.append(line)
    print(json.dumps(line), flush=True)  # noqa: T201 - the trainer's job is to show progress


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=100, help="wall-clock budget of the whole run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=SIZES, default="xs")
    parser.add_argument(
        "--again",
        type=float,
        metavar="SHARE",
        help="with --resume: begin again at this share of the learning rate, to fall to zero in --minutes more",
    )
    options = parser.parse_args(arguments)
    if options.again is not None and not options.resume:
        parser.error("--again goes on from a checkpoint: add --resume")
    torch.set_num_threads(options.threads)
    folder = options.out / "last"
    run = Run.load(folder) if options.resume else Run(options.seed, options.size)
    if options.again is not None:
        run.progress.descend_again(options.again, options.minutes)
    train(run, folder, options.minutes)


if __name__ == "__main__":
    main()
