"""Write the reference pages from the registry, the hook specifications, the error tree and the command line.

mkdocs calls `on_files` while it collects pages. What is registered in the environment is what is documented, so these
pages cannot fall behind the code.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import kvcomp
import yaml
from kvcomp.core import errors, hookspecs
from kvcomp.core.config import recipe_document
from kvcomp.core.interfaces import PART_KINDS, Part
from kvcomp.core.registry import Entry, registry
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

HERE = "This page is generated from the code. "
SYMBOLS = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}
PLURALS = {kind: f"{kind}s" for kind in PART_KINDS} | {"policy": "policies"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "parts/index": parts_index(),
        "recipes": recipes_page(),
        "registered": registered_page(),
        "hooks": hooks_page(),
        "errors": errors_page(),
        "api": api_page(),
        "cli": command_line_page(),
    }
    pages |= {f"parts/{kind}": kind_page(kind) for kind in PART_KINDS}
    for path, lines in pages.items():
        files.append(File.generated(config, f"reference/{path}.md", content="\n".join(lines) + "\n"))
    return files


# --- parts ---


def parts_index() -> Iterator[str]:
    """Return the table of all parts."""
    yield from ("# Parts", "", HERE + "One row per part that is registered where these pages were built.", "")
    yield from ("| kind | name | what it does |", "|---|---|---|")
    for kind in PART_KINDS:
        for entry in registry.entries(kind):
            link = f"[`{entry.name}`]({kind}.md#{entry.name})"
            yield f"| [{kind}]({kind}.md) | {link} | {one_line(first_line(entry.value))} |"


def kind_page(kind: str) -> Iterator[str]:
    """Return the page of one kind of part: its interface, then every part."""
    interface = PART_KINDS[kind]
    yield from (f"# {PLURALS[kind].capitalize()}", "", HERE + f"Key in a strategy file: `{kind}`.", "")
    yield from (prose(interface), "", f"Interface: [`kvcomp.{interface.__name__}`](../api.md).", "")
    for entry in registry.entries(kind):
        yield from part_section(entry)


def part_section(entry: Entry) -> Iterator[str]:
    """Return name, docstring, declarations and fields of one part."""
    part: type[Part] = entry.value
    yield from (f"## `{entry.name}` {{: #{entry.name} }}", "", prose(part), "")
    facts = [f"from {entry.package} {entry.version}"]
    facts += [f"needs {', '.join(sorted(part.requires))}"] if part.requires else []
    facts += [f"gives {', '.join(sorted(part.provides))}"] if part.provides else []
    facts += [f"scope `{part.scope}`"] if hasattr(part, "scope") else []
    facts += ["carried to later turns"] if getattr(part, "carried", False) else []
    facts += observed(part)
    yield from (f"*{'; '.join(facts)}.*", "")
    if part.model_fields:
        notes = attributes(part)
        yield from ("| field | type | default | constraint | |", "|---|---|---|---|---|")
        for name, field in part.model_fields.items():
            cells = (f"`{name}`", type_of(field), default_of(field), constraint_of(field), notes.get(name, ""))
            yield f"| {' | '.join(one_line(cell) for cell in cells)} |"
        yield ""


def observed(part: type[Part]) -> list[str]:
    """Return which observations the part reads with its default settings, where it has them."""
    if any(field.is_required() for field in part.model_fields.values()):
        return []
    names = [f"`{seen.use}`" for seen in part().observations()]
    return [f"observes {', '.join(names)}"] if names else []


def type_of(field: FieldInfo) -> str:
    """Return the annotation as one reads it."""
    annotation = field.annotation
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    name = getattr(annotation, "__name__", "") if not typing.get_args(annotation) else ""
    return f"`{name or re.sub(r'[a-z_]+[.]', '', str(annotation))}`"


def default_of(field: FieldInfo) -> str:
    """Return the default, or that there is none."""
    value = field.get_default(call_default_factory=False)
    if field.is_required() or value is PydanticUndefined:
        return "required" if field.is_required() else "made anew"
    return f"`{value.dump() if isinstance(value, Part) else value!r}`".replace("'", "")


def constraint_of(field: FieldInfo) -> str:
    """Return the bounds of the field."""
    bounds = {type(bound).__name__: bound for bound in field.metadata}
    found = [f"{SYMBOLS[name]} {getattr(bound, name.lower()):g}" for name, bound in bounds.items() if name in SYMBOLS]
    return " and ".join(found)


# --- recipes and everything else that is registered ---


def recipes_page() -> Iterator[str]:
    """Return every recipe: what its file says, and the parts that it resolves to."""
    yield from ("# Recipes", "", HERE + "A recipe is a named strategy file: `kvcomp.compress(model, NAME)`.", "")
    for entry in registry.entries("recipe"):
        built = kvcomp.strategy(entry.name)
        yield from (f"## `{entry.name}` {{: #{entry.name} }}", "", f"*from {entry.package} {entry.version}.*", "")
        text = entry.value if isinstance(entry.value, dict) else Path(entry.value).read_text(encoding="utf-8")
        comment = [line.removeprefix("#").strip() for line in str(text).splitlines() if line.startswith("#")]
        yield from (" ".join(comment), "") if comment else ()
        document = {key: value for key, value in recipe_document(entry.name).items() if key != "name"}
        yield from ("```yaml", yaml.safe_dump(document, sort_keys=False, default_flow_style=None).strip(), "```", "")
        links = [f"[`{part.use}`](parts/{part.kind}.md#{part.use})" for part in built.parts]
        yield from ("Resolves to: " + " → ".join(links) + ".", "")


def registered_page() -> Iterator[str]:
    """Return adapters, tasks and testbeds."""
    yield from ("# Adapters, tasks, testbeds", "", HERE + "What is registered beside parts and recipes.", "")
    for kind in ("adapter", "task", "testbed"):
        yield from (f"## {kind.capitalize()}s", "", "| name | package | |", "|---|---|---|")
        for entry in registry.entries(kind):
            text = "" if isinstance(entry.value, Path | str) else one_line(prose(entry.value))
            yield f"| `{entry.name}` | {entry.package} {entry.version} | {text} |"
        yield ""
    for entry in registry.entries("testbed"):
        yield from model_card(Path(entry.value) / "README.md")


def model_card(path: Path) -> Iterator[str]:
    """Return a testbed's card, its headings two levels lower."""
    if path.is_file():
        yield from (re.sub(r"^#(?=#* )", "###", line) for line in path.read_text(encoding="utf-8").splitlines())


# --- hooks, errors, API, command line ---


def hooks_page() -> Iterator[str]:
    """Return each hook under its signature."""
    yield from ("# Hooks", "", HERE + prose(hookspecs), "")
    yield "A complete plugin: [Write a part and publish it](../how-to/write-a-part.md)."
    for name, hook in inspect.getmembers(hookspecs, inspect.isfunction):
        if name.startswith("kvcomp_"):
            yield from (
                "",
                f"## `{name}` {{: #{name} }}",
                "",
                "```python",
                f"@kvcomp.hookimpl\ndef {name}{signature(hook)}: ...",
            )
            yield from ("```", "", prose(hook))


def signature(hook: Any) -> str:
    """Return a signature without module names."""
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", str(inspect.signature(hook)).replace("'", ""))


def errors_page() -> Iterator[str]:
    """Return the tree of errors, then each with its docstring."""
    summary, _, tree = inspect.cleandoc(errors.__doc__ or "").partition("\n\n")
    yield from ("# Errors and warnings", "", HERE + summary, "", "```text", tree, "```", "")
    yield "A message says what must hold, what was given, and what to do. All are importable from `kvcomp`."
    for name in errors.__all__:
        yield from ("", f"## `{name}` {{: #{name} }}", "", prose(getattr(errors, name)))


GROUPS = ("Entry points", "Runtime", "Interfaces", "Types", "Errors")


def group_of(value: Any) -> str:
    """Return the heading under which a public name is listed."""
    if not inspect.isclass(value):
        return "Entry points"
    if issubclass(value, Exception):
        return "Errors"
    if inspect.isabstract(value):
        return "Interfaces"
    return "Types" if value.__module__.startswith("kvcomp.core") else "Runtime"


def api_page() -> Iterator[str]:
    """Return the public names of `kvcomp`, grouped, for mkdocstrings to render."""
    yield from ("# Python API", "", HERE + "Everything that `kvcomp` exports.", "")
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in sorted(set(kvcomp.__all__) - {"__version__"}):
        groups[group_of(getattr(kvcomp, name))].append(name)
    for group, names in groups.items():
        yield from (f"## {group}", "")
        if group == "Errors":
            yield from ("See [Errors and warnings](errors.md): " + ", ".join(f"`{name}`" for name in names) + ".", "")
            continue
        for name in names:
            yield from directive(name)


def directive(name: str) -> Iterator[str]:
    """Return the mkdocstrings directive of one public name, at the place where it is defined."""
    value = getattr(kvcomp, name)
    if not inspect.isclass(value) and not inspect.isfunction(value):
        yield from (
            f"### `{name}`",
            "",
            f"`kvcomp.{name}` marks a function as an implementation of a [hook](hooks.md).",
            "",
        )
        return
    yield from (f"::: {value.__module__}.{value.__name__}", "")


def command_line_page() -> Iterator[str]:
    """Return the help of every command."""
    import click
    import typer
    from kvcomp import cli

    command = typer.main.get_command(cli.app)
    yield from ("# Command line", "", HERE + "`kvcomp COMMAND --help` prints the same.", "")
    yield from command_sections(command, click.Context(command, info_name="kvcomp"))


def command_sections(command: Any, context: Any) -> Iterator[str]:
    """Return one command, its parameters, then its subcommands."""
    yield from (f"## `{context.command_path}`", "", dedent_help(command.help or ""), "")
    parameters = [parameter for parameter in command.params if parameter.name not in ("help",)]
    if parameters:
        yield from ("| parameter | default | |", "|---|---|---|")
        for parameter in parameters:
            names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
            if parameter.param_type_name == "argument":
                names = f"`{(parameter.name or '').upper()}`" + ("" if parameter.required else " (optional)")
            default = parameter.default or None
            shown = (
                "" if default is None or callable(default) or str(default).startswith("Sentinel") else f"`{default}`"
            )
            yield f"| {names} | {shown} | {one_line(getattr(parameter, 'help', '') or '')} |"
        yield ""
    import click

    for name, child in sorted(getattr(command, "commands", {}).items()):
        if not child.hidden:
            yield from command_sections(child, click.Context(child, info_name=name, parent=context))


def dedent_help(text: str) -> str:
    """Return help text as Markdown."""
    return inspect.cleandoc(text).replace("\b", "").split("\f")[0].strip()


# --- docstrings ---


def first_line(value: Any) -> str:
    """Return the first sentence of a docstring."""
    return re.split(r"(?<=[.:])\s", " ".join(prose(value).split()) + " ", maxsplit=1)[0]


def prose(value: Any) -> str:
    """Return a docstring as Markdown without its Attributes and Args; other sections lose their indentation."""
    kept = [part for part in sections(value) if part[0] not in ("Attributes", "Args")]
    return "\n\n".join(f"{title}: {body}" if title else body for title, body in kept).strip()


def attributes(value: Any) -> dict[str, str]:
    """Return what the Attributes section says of each field, those of base classes included."""
    found: dict[str, str] = {}
    bases: Iterable[Any] = reversed(value.__mro__)
    for base in bases:
        body = dict(sections(base)).get("Attributes", "") if base.__dict__.get("__doc__") else ""
        for item in re.split(r"\n(?=\w+: )", body):
            name, _, text = item.partition(": ")
            found[name.strip()] = text
    return found


def sections(value: Any) -> list[tuple[str, str]]:
    """Return `(title, text)` of a Google-style docstring; the leading text has no title."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in inspect.cleandoc(value.__doc__ or "").splitlines():
        header = re.fullmatch(r"([A-Z][a-z]+):", line)
        if header or (line and not line.startswith(" ") and parts[-1][0]):
            parts.append((header[1] if header else "", []))
        if not header:
            parts[-1][1].append(line)
    return [(title, inspect.cleandoc("\n".join(lines)).strip()) for title, lines in parts]


def one_line(text: str) -> str:
    """Return text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
