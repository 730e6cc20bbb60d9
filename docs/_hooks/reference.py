"""Write the reference pages from the registry, the hook specifications, the error tree and the command line.

mkdocs calls `on_files` while it collects pages. What is registered in the environment is what is documented, so these
pages cannot fall behind the code.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kvcomp
from docstrings import attributes, constraint_of, default_of, first_line, one_line, prose, type_of
from envelope import envelope_page
from kvcomp.core import errors, hookspecs
from kvcomp.core.interfaces import PART_KINDS, Part
from kvcomp.core.registry import Entry, registry
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from models import models_page
from recipes import index_page, recipe_page

HERE = "This page is generated from the code. "
RECIPES = "reference/recipes/"
PLURALS = {kind: f"{kind}s" for kind in PART_KINDS} | {"policy": "policies"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the page of every recipe under that of all recipes."""
    (reference,) = (pages for section in config.nav for pages in section.values() if section.keys() == {"Reference"})
    (recipes,) = (section for section in reference if isinstance(section, dict) and "Recipes" in section)
    names = [entry.name for entry in registry.entries("recipe")]
    recipes["Recipes"] = [f"{RECIPES}index.md", *({name: f"{RECIPES}{name}.md"} for name in names)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "parts/index": parts_index(),
        "recipes/index": index_page(HERE),
        "registered": registered_page(),
        "hooks": hooks_page(),
        "errors": errors_page(),
        "api": api_page(),
        "cli": command_line_page(),
        "envelope": envelope_page(HERE),
        "models": models_page(),
    }
    pages |= {f"parts/{kind}": kind_page(kind) for kind in PART_KINDS}
    pages |= {f"recipes/{entry.name}": recipe_page(entry) for entry in registry.entries("recipe")}
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


# --- what else is registered ---


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
