"""Figures of the code itself, beside their ceilings: size, closures, lazy imports, long functions, cycles, mypy errors.

python -m benchmarks.house [--list]     # --list: where each counted thing stands
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

HERE = Path(__file__).parent.parent
PACKAGE = HERE / "thinkmid"
LONG, MANY = 40, 6  # code lines of a function; its parameters
# from the lowest: a module imports its own level and those below; a folder's level holds for what is in it
LEVELS = (
    {"types", "errors", "files", "hub", "config", "kernels"},
    {"tokenizer", "thoughts", "sentences", "model", "data", "run"},
    {"rollout", "plan"},
    {"train", "augment", "eval"},
    {"report", "mini"},
)
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip
CEILINGS = {
    "code lines": 15_900,
    "functions that return functions": 8,
    "lambdas and closures per 1,000 lines": 6,
    "imports inside functions": 70,
    f"functions over {LONG} code lines": 4,
    f"functions with over {MANY} parameters": 25,  # the loss library's public functions aside
    "package cycles": 0,
    "mypy errors": 0,
}


@dataclass(frozen=True)
class Module:
    """A source file: its syntax tree, each node's parent, and the numbers of its lines with code."""

    name: str  # from the package's folder, such as train/step.py
    tree: ast.Module
    parents: dict[ast.AST, ast.AST]
    code: set[int]

    def functions(self) -> list[ast.FunctionDef]:
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)]

    def inside_function(self, node: ast.AST) -> bool:
        """Whether a function or lambda is around the node, with no class between."""
        above = self.parents.get(node)
        while above is not None and not isinstance(above, ast.ClassDef):
            if isinstance(above, (ast.FunctionDef, ast.Lambda)):
                return True
            above = self.parents.get(above)
        return False

    def length(self, function: ast.FunctionDef) -> int:
        """Code lines from `def` to the end."""
        return len(self.code.intersection(range(function.lineno, (function.end_lineno or 0) + 1)))


def read(path: Path, root: Path) -> Module:
    source = path.read_text()
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    return Module(path.relative_to(root).as_posix(), tree, parents, code_lines(source, tree))


def code_lines(source: str, tree: ast.Module) -> set[int]:
    """Numbers of the lines that hold more than blanks, comments and docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def returns_function(function: ast.FunctionDef) -> bool:
    own = {node.name for node in ast.walk(function) if isinstance(node, ast.FunctionDef) and node is not function}
    values = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    return any(isinstance(v, ast.Lambda) or (isinstance(v, ast.Name) and v.id in own) for v in values)


def num_parameters(function: ast.FunctionDef) -> int:
    """Without self, cls, *args and **kwargs."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def public_losses(modules: list[Module]) -> set[str]:
    """Names in __all__ of thinkmid.kernels."""
    (init,) = (module for module in modules if module.name == "kernels/__init__.py")
    for node in init.tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError("thinkmid.kernels has no __all__")


def imported(module: Module) -> Iterator[str]:
    """Folders of the package that a module imports, inside functions too."""
    for node in ast.walk(module.tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "thinkmid":
            names = [f"thinkmid.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name.split(".")[1] for name in names if name.startswith("thinkmid."))


def cycles(modules: list[Module]) -> list[str]:
    """Pairs of folders each of which imports the other, by way of others too."""
    folders = {module.name.split("/")[0] for module in modules if "/" in module.name}
    reached = {folder: {folder} for folder in folders}
    edges = {(module.name.split("/")[0], to) for module in modules for to in imported(module)}
    changed = True
    while changed:
        before = sum(map(len, reached.values()))
        for start, end in edges:
            if start in folders and end in folders:
                reached[start] |= reached[end]
        changed = sum(map(len, reached.values())) > before
    return [f"{a} <-> {b}" for a, b in combinations(sorted(folders), 2) if b in reached[a] and a in reached[b]]


def mypy_errors() -> list[str]:
    """Lines of mypy's errors, by the settings in pyproject.toml."""
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=HERE, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr or done.stdout)
    return [line for line in done.stdout.splitlines() if ": error: " in line]


def found(modules: list[Module]) -> dict[str, list[str]]:
    """Everything that is counted, by figure, as "file:line name"."""
    out: dict[str, list[str]] = {name: [] for name in CEILINGS}
    (_, returning, closures, lazy, long, many, cyclic, _) = out
    losses = public_losses(modules)
    for module in modules:
        for node in ast.walk(module.tree):
            at = f"{module.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Lambda):
                out[closures].append(f"{at} lambda")
            elif isinstance(node, (ast.Import, ast.ImportFrom)) and module.inside_function(node):
                out[lazy].append(f"{at} {ast.unparse(node)}")
        for function in module.functions():
            at = f"{module.name}:{function.lineno} {function.name}"
            if module.inside_function(function):
                out[closures].append(at)
            if returns_function(function):
                out[returning].append(at)
            if (lines := module.length(function)) > LONG:
                out[long].append(f"{at}: {lines}")
            of_library = module.name.startswith("kernels/") and function.name in losses
            if (count := num_parameters(function)) > MANY and not of_library:
                out[many].append(f"{at}: {count}")
    out[cyclic] = cycles(modules)
    return out


def figures(package: Path = PACKAGE) -> tuple[dict[str, float], dict[str, list[str]]]:
    """(number by figure, mypy's left out; where the counted things stand)."""
    modules = [read(path, package) for path in sorted(package.rglob("*.py"))]
    places = found(modules)
    lines = sum(len(module.code) for module in modules)
    numbers: dict[str, float] = {name: len(places[name]) for name in CEILINGS if name != "mypy errors"}
    numbers["code lines"] = lines
    closures = "lambdas and closures per 1,000 lines"
    numbers[closures] = round(1000 * len(places[closures]) / lines, 1)
    return numbers, places


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.house", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="list where each counted thing stands")
    args = parser.parse_args()
    numbers, places = figures()
    places["mypy errors"] = mypy_errors()
    numbers["mypy errors"] = len(places["mypy errors"])
    print(f"{'figure':<40}{'now':>8}{'ceiling':>9}")
    for name, ceiling in CEILINGS.items():
        print(f"{name:<40}{numbers[name]:>8,}{ceiling:>9,}{'' if numbers[name] <= ceiling else '  over'}")
        if args.list:
            print(*(f"    {place}" for place in places[name]), sep="\n")


if __name__ == "__main__":
    main()
