"""`kvcomp bench`: speed and memory beside transformers' own caches, with random weights in any shape."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperCommand

from kvcomp.cli.evaluate import Dtype, tried
from kvcomp.cli.models import find_device
from kvcomp.cli.quiet import quiet_transformers
from kvcomp.cli.run import Device
from kvcomp.cli.terminal import Advance, emit_json, emit_table, progress
from kvcomp.core.budget import Budget
from kvcomp.core.errors import ConfigError, InputError
from kvcomp.core.stages import STAGES
from kvcomp.lab.bench import SHAPES, Bench, Case, Found, Shape, build_model, find_shape, make_cases
from kvcomp.lab.bench.measure import FIELDS
from kvcomp.lab.bench.peak import can_measure, peak_on_cpu, peak_on_cuda
from kvcomp.lab.bench.plot import save_plot
from kvcomp.lab.bench.timing import clock_of
from kvcomp.lab.document import Document, circumstances
from kvcomp.lab.threads import torch_threads

STRATEGIES = "streaming-llm,snapkv,flowmm,h2o"
LENGTHS, QUICK_LENGTHS = "2048,4096,8192", "512,1024"
REPEATS, QUICK_REPEATS = 5, 3
DECODED, QUICK_DECODED = 32, 12
STDOUT = Path("-")
PLOTS = (".png", ".svg", ".pdf")
INTERRUPTED = 130  # what a shell reports of Ctrl-C


class JsonToStdout(TyperCommand):
    """`--json` without a file means stdout, as in other commands; typer has no option whose value may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what was given."""
        following = [*args[1:], "--"]
        given: list[str] = []
        for word, after in zip(args, following, strict=True):
            given.append(word)
            if word == "--json" and after.startswith("-") and after != str(STDOUT):
                given.append(str(STDOUT))
        return super().parse_args(ctx, given)


@dataclass(frozen=True)
class Request:
    """What is asked for, checked.

    Attributes:
        shape: of the model.
        layers: how many are built; None for all.
        cases: what is timed.
        lengths: of the prompts, in tokens.
        kv_memory: bytes for throughput; None for a few sequences of the stock cache.
    """

    shape: Shape
    layers: int | None
    cases: Sequence[Case]
    lengths: Sequence[int]
    kv_memory: int | None


def bench(
    shape: Annotated[
        str, typer.Option(help=f"Shape of the model: {', '.join(SHAPES)}, or the folder of a model.")
    ] = "llama-6l-64",
    layers: Annotated[int | None, typer.Option(min=1, help="Build so many layers instead of all.")] = None,
    strategies: Annotated[str, typer.Option(help="Recipes with commas between.")] = STRATEGIES,
    budgets: Annotated[str, typer.Option(help="Budgets with commas between, as 0.2,512t.")] = "0.2",
    prompt_lengths: Annotated[
        str | None, typer.Option(help=f"Tokens with commas between; by default {LENGTHS}.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short prompts, few repeats, neither peak memory nor compiled caches.")
    ] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help=f"Turns that count; by default {REPEATS}.")] = None,
    decode: Annotated[int | None, typer.Option(min=1, help=f"Tokens decoded per turn; by default {DECODED}.")] = None,
    throughput: Annotated[bool, typer.Option(help="Decode as many sequences as fit into --kv-memory.")] = True,
    kv_memory: Annotated[
        str | None, typer.Option(help="As 4GiB; by default what four sequences of the stock cache take.")
    ] = None,
    largest_batch: Annotated[
        int, typer.Option(min=1, help="Decode no more sequences at a time, however many fit.")
    ] = 64,
    compiled: Annotated[
        bool | None,
        typer.Option(help="Also a static cache and strategies, decoded with torch.compile; by default unless --quick."),
    ] = None,
    memory: Annotated[
        bool | None, typer.Option(help="Also peak memory, on a CPU each in a fresh process; by default unless --quick.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch; with one, its own CPU time is the clock.")] = 1,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.cpu,
    dtype: Annotated[
        Dtype, typer.Option(help="Of weights and caches; auto is float32 on a CPU, else bfloat16.")
    ] = Dtype.float32,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Gets everything as JSON; - or no file is stdout.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Gets a picture, as .png, .svg or .pdf.")] = None,
) -> None:
    """Time prefill, its stages, and decoding of compressed caches; every ratio is taken inside one run."""
    started = time.monotonic()
    lengths = prompt_lengths or (QUICK_LENGTHS if quick else LENGTHS)
    with_compiled, with_memory = (not quick if wanted is None else wanted for wanted in (compiled, memory))
    request = read_request(shape, layers, strategies, budgets, lengths, kv_memory, with_compiled, json_file, plot)
    target = find_device(device)
    kind = dtype_on(target) if dtype is Dtype.auto else getattr(torch, dtype.value)
    with quiet_transformers(), torch_threads(threads):
        made = Bench(
            request.shape,
            build_model(request.shape, target, kind, seed),
            request.cases,
            repeats=repeats or (QUICK_REPEATS if quick else REPEATS),
            decoded=decode or (QUICK_DECODED if quick else DECODED),
            throughput=throughput,
            kv_memory=request.kv_memory,
            largest=largest_batch,
        )
        found, interrupted = _measure(made, request, with_memory)
        document = _document(made, request, found, time.monotonic() - started) | {"seed": seed}
    document |= {"dtype": str(kind).removeprefix("torch."), "interrupted": interrupted}
    _write(document, json_file, plot)
    if interrupted:
        typer.echo("interrupted: what is written is what was done until then", err=True)
        raise typer.Exit(INTERRUPTED)


def dtype_on(device: torch.device) -> torch.dtype:
    """Return what random weights are made of where nobody says: there is no checkpoint to ask."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def read_request(
    shape: str,
    layers: int | None,
    strategies: str,
    budgets: str,
    lengths: str,
    kv_memory: str | None,
    compiled: bool,
    json_file: Path | None,
    plot: Path | None,
) -> Request:
    """Return what is asked for.

    Raises:
        ConfigError: listing everything that is wrong with it.
    """
    faults: list[str] = []
    found = tried(faults, "--shape", lambda: find_shape(shape, layers))
    kept = tried(faults, "--budgets", lambda: [str(Budget.parse(budget)) for budget in split(budgets)])
    cases = tried(faults, "--strategies", lambda: make_cases(split(strategies), kept or ["0.2"], compiled=compiled))
    tokens = tried(faults, "--prompt-lengths", lambda: [_read_length(text) for text in split(lengths)])
    memory = tried(faults, "--kv-memory", lambda: None if kv_memory is None else _read_bytes(kv_memory))
    faults += [
        f"{file}: must be a file in a folder that exists, and {file.parent} does not"
        for file in (json_file, plot)
        if file not in (None, STDOUT) and not file.parent.is_dir()
    ]
    if plot is not None and plot.suffix not in PLOTS:
        faults.append(f"--plot: must end with one of {', '.join(PLOTS)}, got {plot}")
    if faults:
        raise ConfigError(faults, source="kvcomp bench")
    assert found is not None
    assert cases is not None
    assert tokens is not None
    return Request(found, layers, cases, tokens, memory)


def split(text: str) -> list[str]:
    """Return the names in a list with commas between.

    Raises:
        InputError: there is none.
    """
    names = [name for name in map(str.strip, text.split(",")) if name]
    if not names:
        raise InputError(f"must name at least one, got {text!r}")
    return names


def _read_length(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"must be numbers of tokens, as 2048,4096, got {text!r}")
    return int(text)


def _read_bytes(text: str) -> int:
    size = Budget.parse(text).bytes
    if size is None:
        raise InputError(f"must be a number of bytes, as 4GiB, got {text!r}")
    return size


def _measure(made: Bench, request: Request, with_memory: bool) -> tuple[list[Found], bool]:
    """Return what was found, and whether somebody stopped it."""
    found: list[Found] = []
    device = next(made.model.parameters()).device
    with_memory = with_memory and can_measure(device)
    extra = len(request.cases) if with_memory else 0
    with progress("bench", (made.steps + extra) * len(request.lengths)) as advance:
        try:
            for tokens in request.lengths:
                entries = made.run(tokens, advance)
                found += [_with_peak(made, request, entry, advance) for entry in entries] if with_memory else entries
        except KeyboardInterrupt:
            return found, True
    return found, False


def _with_peak(made: Bench, request: Request, found: Found, advance: Advance) -> Found:
    """Return an entry with its peak memory, where the case ran and is not compiled."""
    advance(f"{found.tokens} tokens, memory: {found.case}")
    case = next(case for case in request.cases if case.name == found.case)
    if found.skipped or case.compiled:
        return found
    parameter = next(made.model.parameters())
    if parameter.device.type == "cuda":
        return replace(found, peak_bytes=peak_on_cuda(made.model, made.shape, case, found.tokens))
    peak = peak_on_cpu(made.shape.name, request.layers, case, found.tokens, parameter.dtype)
    return replace(found, peak_bytes=peak)


def _document(made: Bench, request: Request, found: Sequence[Found], seconds: float) -> Document:
    """Return everything that was found, and what it takes to find it again."""
    return {
        "found": [entry.to_dict() for entry in found],
        "fields": FIELDS,
        "shape": made.shape.describe(),
        "reference": request.cases[0].name,
        "repeats": made.repeats,
        "decoded": made.decoded,
        "clock": clock_of(made.model)[1],
        "device": str(next(made.model.parameters()).device),
        "strategies": {case.name: case.strategy.dump() for case in request.cases if case.strategy is not None},
        **circumstances(seconds),
    }


def _write(document: Document, json_file: Path | None, plot: Path | None) -> None:
    if json_file == STDOUT:
        emit_json(document)
    else:
        emit_found(document)
    try:
        if json_file not in (None, STDOUT):
            json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if plot is not None and any(not entry["skipped"] for entry in document["found"]):
            save_plot(document["found"], plot)
    except OSError as error:
        raise InputError(f"the results cannot be written: {error}") from error


# --- the table ---


def emit_found(document: Document) -> None:
    """Write a line per prompt length and case; ratios are to the first case."""
    stages = [*STAGES]
    head = ["tokens", "case", "prefill", *stages, "decode", "decode mean", "KV", "batch", "tokens/s", "peak MiB"]
    body = [_line(entry, document["found"]) for entry in document["found"]]
    emit_table(head, body, numbers=[title for title in head if title != "case"])
    for entry in document["found"]:
        if entry["skipped"]:
            typer.echo(f"{entry['case']} at {entry['tokens']} tokens was left out: {entry['skipped']}")
    shape = document["shape"]
    typer.echo(
        f"\n{shape['name']}, {shape['layers']} layers, {document['dtype']} on {document['device']}, "
        f"{document['torch_threads']} threads, {document['clock']}; medians over {document['repeats']} turns of ratios "
        f"to {document['reference']} [least, most]; stages in % of its prefill; {document['seconds']:.0f} s"
    )


def _line(entry: Document, found: Sequence[Document]) -> list[str]:
    tokens, case = f"{entry['tokens']:,}", str(entry["case"])
    if entry["skipped"]:
        return [tokens, case, *[""] * (len(STAGES) + 7)]
    stock = next(other for other in found if other["tokens"] == entry["tokens"])
    overhead, rate, peak = entry["overhead"], entry["throughput"], entry["peak_bytes"]
    return [
        tokens,
        case,
        _spread(entry["prefill_ratio"]),
        *("" if overhead is None else f"{100 * overhead[name]:.1f}" for name in STAGES),
        _spread(entry["decode_ratio"]),
        f"{entry['decode_mean_ratio']['median']:.2f}",
        f"{entry['kv_bytes'] / stock['kv_bytes']:.3f}",
        "" if rate is None else f"{rate['largest_batch']}",
        "" if rate is None else f"{rate['ratio']['median']:.2f}",
        "" if peak is None else f"{peak / 2**20:.1f}",
    ]


def _spread(ratio: Document) -> str:
    return f"{ratio['median']:.2f} [{ratio['least']:.2f}, {ratio['most']:.2f}]"
