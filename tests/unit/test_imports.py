"""Imports point one way, the core never meets transformers, and importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "kvcomp": ROOT / "kvcomp",
    "kvcomp_strategies": ROOT / "strategies" / "kvcomp_strategies",
    "kvcomp_adapters": ROOT / "adapters" / "kvcomp_adapters",
}
# core <- runtime <- {testing, lab} <- minimile <- cli
ALLOWED = {
    "kvcomp.core": {"kvcomp.core"},
    "kvcomp.runtime": {"kvcomp.core", "kvcomp.runtime", "kvcomp.version"},
    "kvcomp.testing": {"kvcomp.core", "kvcomp.runtime", "kvcomp.testing", "kvcomp.version"},
    "kvcomp.lab": {"kvcomp", "kvcomp.core", "kvcomp.runtime", "kvcomp.lab", "kvcomp.version"},
    "kvcomp.minimile": {"kvcomp", "kvcomp.core", "kvcomp.runtime", "kvcomp.lab", "kvcomp.testing", "kvcomp.minimile"},
    "kvcomp.cli": {"*"},
    "kvcomp.__main__": {"kvcomp.cli"},
    "kvcomp.version": set(),
    "kvcomp": {"kvcomp", "kvcomp.core", "kvcomp.runtime", "kvcomp.version"},
    "kvcomp_strategies": {"kvcomp.core", "kvcomp_strategies"},
    "kvcomp_adapters": {"kvcomp.core", "kvcomp.runtime", "kvcomp_adapters"},
}
EFFECTS = {"manual_seed", "seed", "set_num_threads", "set_default_dtype", "set_default_device", "filterwarnings"}
EFFECTS |= {"simplefilter", "basicConfig", "use_deterministic_algorithms", "register", "print", "mkdir"}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


MODULES = dict(modules())


def layer(module: str) -> str:
    """`kvcomp.core` of `kvcomp.core.types`; `kvcomp_strategies` of anything in it; `kvcomp` of the top."""
    first, *rest = module.split(".")
    return f"{first}.{rest[0]}" if first == "kvcomp" and rest else first


def imported(file: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in MODULES else str(node.module)), node.lineno


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    allowed = ALLOWED[layer(module)]
    wrong = [
        f"{MODULES[module]}:{line} imports {target}"
        for target, line in imported(MODULES[module])
        if target.split(".")[0] in PACKAGES and layer(target) not in allowed and "*" not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) in ("kvcomp.core", "kvcomp_strategies")])
def test_pure_tensors_need_no_transformers(module: str) -> None:
    heavy = {"transformers", "huggingface_hub", "PIL", "matplotlib", "typer", "rich"}
    assert not {target.split(".")[0] for target, _ in imported(MODULES[module])} & heavy


@pytest.mark.parametrize("module", MODULES)
def test_nothing_happens_at_import(module: str) -> None:
    wrong = []
    for statement in ast.parse(MODULES[module].read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef | ast.Import | ast.ImportFrom):
            continue
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'":
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).split(".")[-1]
                if name in EFFECTS:
                    wrong.append(f"{MODULES[module]}:{node.lineno} calls {name}")
    assert wrong == []


def test_the_core_and_the_parts_run_without_transformers() -> None:
    """The files of the core are loaded as a package of their own, so that `kvcomp/__init__.py` does not count."""
    code = f"""
import sys, types
package = types.ModuleType("kvcomp"); package.__path__ = [{str(ROOT / "kvcomp")!r}]
sys.modules["kvcomp"] = package
import torch
before = torch.initial_seed(), torch.get_default_dtype(), torch.get_num_threads()
import kvcomp.core.config, kvcomp.core.attention, kvcomp_strategies
assert (torch.initial_seed(), torch.get_default_dtype(), torch.get_num_threads()) == before
assert "transformers" not in sys.modules, "the core imports transformers"
print("pure")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "pure", done.stderr


def test_importing_kvcomp_changes_nothing_and_loads_no_plugin() -> None:
    code = """
import random, warnings, rich.console, torch, transformers  # rich draws a random number when it is imported
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
before = torch.initial_seed(), torch.get_default_dtype(), torch.get_num_threads(), len(warnings.filters)
names, state = sorted(functions.keys()), random.getstate()
import sys, kvcomp
assert before == (torch.initial_seed(), torch.get_default_dtype(), torch.get_num_threads(), len(warnings.filters))
assert names == sorted(functions.keys()), "importing kvcomp registers attention functions"
assert state == random.getstate()
assert "kvcomp_strategies" not in sys.modules, "plugins load on the first look-up"
assert "matplotlib" not in sys.modules and "typer" not in sys.modules
print("quiet")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "quiet", done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)) or not source.strip()
