"""Who may import whom, and what may stand where: read from the source, nothing is run."""

import ast
from pathlib import Path

import pytest

import thinkmid
from benchmarks import house

ROOT = Path(thinkmid.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {".".join(("thinkmid", *f.relative_to(ROOT).with_suffix("").parts)): ast.parse(f.read_text()) for f in FILES}
TREES = {name.removesuffix(".__init__"): tree for name, tree in TREES.items()}
PROGRAMS = {name for name, tree in TREES.items() if "'__main__'" in ast.dump(tree)}

LOWEST = {"thinkmid", "_csrc"}
LEVELS = [
    *({*names, *(LOWEST if not n else ())} for n, names in enumerate(house.LEVELS)),
    {"cli"} | {name.removeprefix("thinkmid.") for name in PROGRAMS},
]


def level(module):
    """Of the longest name in LEVELS that the module lies in."""
    parts = module.removeprefix("thinkmid.").split(".")
    for n in range(len(parts), 0, -1):
        for at, names in enumerate(LEVELS):
            if ".".join(parts[:n]) in names:
                return at
    raise AssertionError(f"{module} has no level: add it to LEVELS")


def imports(module):
    """Modules of thinkmid that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in TREES or name == "thinkmid._csrc" else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "thinkmid"}


def where(check):
    """Modules and lines of the nodes for which check is true."""
    return {f"{name}:{node.lineno}" for name, tree in TREES.items() for node in ast.walk(tree) if check(node)}


def called(node):
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


@pytest.mark.parametrize("module", sorted(set(TREES) - {"thinkmid"}))  # whose load() imports when it is called
def test_a_module_imports_nothing_above_its_level(module):
    above = {name for name in imports(module) if level(name) > level(module)}
    assert not above, f"{module} imports {above}"


def folder(module):
    return module.split(".")[1]


def test_no_two_folders_import_each_other_lazy_imports_counted():
    pairs = {(folder(a), folder(b)) for a in set(TREES) - {"thinkmid"} for b in imports(a) - {"thinkmid"}}
    assert not {(a, b) for a, b in pairs if a < b and (b, a) in pairs}


def test_nobody_imports_a_program():
    assert {"thinkmid.train.sft", "thinkmid.train.rlmt"} <= PROGRAMS
    assert not {(a, b) for a in TREES for b in imports(a) if b in PROGRAMS}


def test_kernels_types_errors_and_config_stand_on_nothing():
    base = LEVELS[0] - {"thinkmid"}
    for module in TREES:
        if module.removeprefix("thinkmid.").split(".")[0] in base:
            assert {name.split(".")[1] for name in imports(module) if name != "thinkmid"} <= base


def test_the_loss_library_imports_nothing_of_thinkmid_but_errors():
    for module in TREES:
        if folder(f"{module}.") == "kernels":
            assert {name for name in imports(module) if folder(name) != "kernels"} <= {
                "thinkmid.errors",
                "thinkmid._csrc",
            }


def test_the_step_holds_the_only_backward():
    assert {at.split(":")[0] for at in where(lambda n: called(n).endswith(".backward"))} == {"thinkmid.train.step"}


def test_one_module_knows_the_tokenizers_library():
    def imports_it(node):
        return isinstance(node, (ast.Import, ast.ImportFrom)) and "tokenizers" in ast.unparse(node)

    assert {at.split(":")[0] for at in where(imports_it)} == {"thinkmid.tokenizer"}


def test_no_code_comes_from_data():
    forbidden = {"eval", "exec", "compile", "torch.load", "os.system", "os.popen", "sympify", "sympy.sympify"}
    modules = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}

    def unsafe(node):
        if isinstance(node, ast.Import):
            return any(alias.name.split(".")[0] in modules for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            return (node.module or "").split(".")[0] in modules
        if isinstance(node, ast.keyword):
            unsafe_when_true = node.arg in ("shell", "trust_remote_code", "allow_pickle")
            return unsafe_when_true and ast.unparse(node.value) != "False"
        return called(node) in forbidden

    assert not where(unsafe)
