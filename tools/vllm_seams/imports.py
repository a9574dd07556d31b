"""Where vLLM imports, unpickles or runs what a value names, found in its sources.

`imports.txt` gives for each such function where the name comes from: the setting that reaches it,
which `vllm_hotswap.config.code_settings` knows then, or why none does. A function that is not
there is new.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from tools.vllm_seams.tree import Module, Tree, dotted

RUNS = frozenset(
    [
        "__import__",
        "eval",
        "exec",
        "import_from_path",
        "import_module",
        "load_plugins_by_group",
        "resolve_obj_by_qualname",
        "run_path",
        "spec_from_file_location",
    ]
)
UNPICKLES = frozenset(["cloudpickle.load", "cloudpickle.loads", "pickle.load", "pickle.loads"])

WORDS = (*RUNS, "pickle.load", "torch.load(")
"""A module without any of them is not searched."""

TABLE = Path(__file__).with_name("imports.txt")


def decided() -> Mapping[str, str]:
    """Return `module function` of each place in the table, and the setting that reaches it."""
    lines = [line.split() for line in TABLE.read_text(encoding="utf-8").splitlines()]
    places = [words for words in lines if words and words[0] != "#"]
    return {" ".join(words[:2]): " ".join(words[2:]) for words in places}


def imports_in(tree: Tree, package: str = "vllm") -> dict[str, str]:
    """Return `module function` of each place, with the call that was found there."""
    return {
        f"{module.name} {function}": call
        for module in tree.modules(package, WORDS)
        for function, call in _calls(module)
    }


def _calls(module: Module) -> Iterator[tuple[str, str]]:
    for function, call in _inside(module.root, ""):
        name = dotted(call.func)
        if _runs(name, call) or name in UNPICKLES or _loads_any_tensor(name, call):
            yield function or "-", ast.unparse(call)


def _inside(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Call]]:
    """Yield every call below a node, with the function that it is in."""
    for child in ast.iter_child_nodes(node):
        name = function
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{function}.{child.name}".removeprefix(".")
        if isinstance(child, ast.Call):
            yield name, child
        yield from _inside(child, name)


def _runs(name: str, call: ast.Call) -> bool:
    """Return whether it runs what its argument names, unless that is a literal."""
    is_literal = bool(call.args) and isinstance(call.args[0], ast.Constant)
    is_function = name in RUNS or (
        name.rpartition(".")[2] in RUNS - {"eval", "exec"} and "." in name
    )
    return is_function and not is_literal


def _loads_any_tensor(name: str, call: ast.Call) -> bool:
    """Return whether it is `torch.load` of any pickle."""
    is_safe = any(
        keyword.arg == "weights_only" and getattr(keyword.value, "value", False) is True
        for keyword in call.keywords
    )
    return name == "torch.load" and not is_safe
