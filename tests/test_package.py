"""The package as a whole: what importing it costs, its version, its types, and the size of its files."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fedlight

ROOT = Path(__file__).parents[1]
PACKAGE = Path(fedlight.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = {"wandb", "matplotlib", "curvlinops", "scipy", "sklearn", "torchvision", "tensorboard"}


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imports_on_load(tree: ast.AST) -> set[str]:
    """Top-level packages that a module imports when it is loaded: not within functions, nor for type checkers."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node = ast.Module(node.orelse, [])
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        else:
            found |= imports_on_load(node)
    return found


def test_modules_import_nothing_heavy_when_they_are_loaded():
    found = {name(path): imports_on_load(ast.parse(path.read_text())) & HEAVY for path in MODULES}
    assert not {module: heavy for module, heavy in found.items() if heavy}


def test_the_check_of_imports_sees_what_it_should():
    code = (
        "import a.b\nfrom c.d import e\ntry:\n    import f\nexcept ImportError:\n    pass\n"
        "class C:\n    import g\ndef h():\n    import i\nif TYPE_CHECKING:\n    import j\nelse:\n    import k\n"
    )
    assert imports_on_load(ast.parse(code)) == {"a", "c", "f", "g", "k"}


def test_modules_stay_short():
    lines = {name(path): len(path.read_text().splitlines()) for path in MODULES}
    assert not {module: n for module, n in lines.items() if n > 300}, "split them: 300 lines can be held in mind"


def test_type_information_is_shipped():
    assert (PACKAGE / "py.typed").is_file()
    assert PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["fedlight"]


def test_version_is_a_version_and_the_one_that_is_built():
    assert re.fullmatch(r"\d+\.\d+\.\d+(rc\d+|\.dev\d+)?", fedlight.__version__)
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "fedlight/__init__.py"
    assert f"\nversion: {fedlight.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_changelog_tells_of_this_version_first():
    releases = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert releases[0] == "Unreleased"
    assert releases[1] == fedlight.__version__


def test_console_script_exists():
    module, function = PYPROJECT["project"]["scripts"]["fedlight"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_public_names_exist_once_and_are_documented():
    assert len(fedlight.__all__) == len(set(fedlight.__all__))
    undocumented = [n for n in fedlight.__all__ if not (getattr(fedlight, n).__doc__ or "").strip()]
    assert not undocumented


def test_oldest_supported_versions_are_the_ones_that_ci_tests():
    pinned = dict(
        line.split("==")
        for line in (ROOT / ".github" / "oldest.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    dev = [r for r in PYPROJECT["project"]["optional-dependencies"]["dev"] if re.split("[>\\[]", r)[0] in pinned]
    for requirement in [*PYPROJECT["project"]["dependencies"], *dev]:
        package, bound = re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement).groups()
        found = pinned[package]
        assert found == bound or re.fullmatch(re.escape(bound) + r"(\.0)+", found), (
            f"{requirement}, but CI pins {found}"
        )


@pytest.mark.slow
def test_every_module_can_be_the_first_one_that_is_imported():
    """No cycle of imports depends on where it is entered."""
    code = """
import importlib, sys
import lightning.pytorch.cli
failed = []
for name in sys.argv[1:]:
    for loaded in [m for m in sys.modules if m.split(".")[0] == "fedlight"]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except ImportError as error:
        if error.name != "flwr":  # an extra that need not be installed
            failed.append(f"{name}: {error}")
print("\\n".join(failed))
"""
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in MODULES]
    names = [name.removesuffix(".__init__") for name in names]
    command = [sys.executable, "-W", "ignore", "-c", code, *names]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == ""


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """The modules of the package that one imports anywhere: in functions and for type checkers, too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else name.rpartition(".")[0] for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def circles(imports: dict[str, set[str]]) -> set[str]:
    """What is left when modules that import nothing of the rest are taken away, again and again."""
    left = dict(imports)
    while free := {name for name, uses in left.items() if not uses & left.keys() - {name}}:
        left = {name: uses for name, uses in left.items() if name not in free}
    while unused := left.keys() - {used for name, uses in left.items() for used in uses - {name}}:
        left = {name: uses for name, uses in left.items() if name not in unused}
    return set(left)


def dotted_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_no_modules_import_each_other_in_a_circle():
    trees = {dotted_name(path): ast.parse(path.read_text()) for path in MODULES if path != PACKAGE / "__init__.py"}
    assert circles({name: imported(tree, set(trees)) for name, tree in trees.items()}) == set()


def test_no_module_comes_back_to_itself_by_the_packages_that_it_is_in():
    """To import ``a.b.c`` imports ``a.b`` first, and all that this imports: it must not matter which comes first."""
    trees = {dotted_name(path): ast.parse(path.read_text()) for path in MODULES if path != PACKAGE / "__init__.py"}
    uses = {}
    for name, tree in trees.items():
        at_once = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        found = imported(at_once, set(trees))
        around = {package for package in trees for used in found if used.startswith(f"{package}.")}
        uses[name] = found | {package for package in around if not f"{name}.".startswith(f"{package}.")}
    assert uses["fedlight.run.callbacks"] >= {"fedlight.callbacks", "fedlight.callbacks.progress"}
    assert circles(uses) == set()


def test_the_check_of_circles_finds_them():
    uses = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert circles(uses) == {"b", "c"}
    code = "if TYPE_CHECKING:\n    from a.b import C\ndef f():\n    import d\n    from a import b"
    assert imported(ast.parse(code), {"a", "a.b", "d"}) == {"a.b", "d"}


def test_penalties_can_be_lifted_out():
    trees = {dotted_name(path): ast.parse(path.read_text()) for path in MODULES}
    theirs = {name: imported(tree, set(trees)) for name, tree in trees.items() if name.startswith("fedlight.penalties")}
    assert all(used.startswith("fedlight.penalties") for uses in theirs.values() for used in uses)


@pytest.mark.parametrize("old", sorted(fedlight.MOVED))
def test_old_paths_of_modules_lead_to_the_new_ones(old):
    module = importlib.import_module(f"fedlight.{old}")
    assert module is importlib.import_module(f"fedlight.{fedlight.MOVED[old]}")
    assert module.__spec__.name == module.__name__ == f"fedlight.{fedlight.MOVED[old]}"
