"""What holds for the code as a whole: the directions of imports, sizes, types, errors, what an
import costs, and that no file knows whose machine it was written on."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import fdbroker
from fdbroker import errors

PACKAGE = Path(fdbroker.__file__).parent
ROOT = Path(__file__).parents[1]
LINES = 480  # "under about 400"
METHODS = 27  # "no more than about 25"


# --- layers and sizes ---


def test_imports_point_down_only() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def contracts() -> dict[str, Any]:
    """The import contracts of pyproject.toml, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {contract["name"]: contract for contract in project["tool"]["importlinter"]["contracts"]}


def test_every_module_is_in_a_layer() -> None:
    contract = contracts()["imports point down only"]
    layers = {name for layer in contract["layers"] for name in re.findall(r"[\w.]+", layer)}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {f"fdbroker.{name}" for name in modules | folders} == layers


def platform_modules() -> list[str]:
    """The modules that may know the platform, as patterns."""
    ignored = contracts()["few modules know the platform"]["ignore_imports"]
    return [line.split(" -> ")[0] for line in ignored]


def names_the_platform(path: Path) -> list[str]:
    """Where a module asks which platform it is on, or opens something in /proc."""
    found, tree = [], ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            asked = f"{node.value.id}.{node.attr}"
            if asked in ("sys.platform", "os.name", "os.uname", "os.register_at_fork"):
                found.append(f"{node.lineno}: {asked}")
        elif (
            isinstance(node, ast.Constant)
            and id(node) not in docstrings
            and str(node.value).startswith("/proc")
        ):
            found.append(f"{node.lineno}: {node.value}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_module_outside_the_list_does_not_ask_for_the_platform(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    module = module.removesuffix(".__init__")
    patterns = [pattern.replace(".**", "*") for pattern in platform_modules()]
    if not any(fnmatch(module, pattern) for pattern in patterns):
        assert names_the_platform(path) == []


def test_documented_platform_modules_are_those_of_the_contract() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.partition("## Modules that know the platform")[2].partition("\n## ")[0]
    documented = {f"fdbroker.{name}" for name in re.findall(r"^\| `([\w.*]+)` \|", section, re.M)}
    assert documented == set(platform_modules())


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                yield f"{path.relative_to(PACKAGE)}:{node.name}", node


def test_no_class_of_the_server_or_the_lender_is_wide_or_deep() -> None:
    """A class has a job and owns its parts, so it has few methods and inherits from none of ours
    but the abstract `Job`, which has no method that calls a subclass."""
    for name, node in classes():
        if name.startswith(("ipc/server", "lender")):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            assert len(methods) <= METHODS, f"{name} has {len(methods)} methods"
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            assert bases <= {"ABC", "Job", "NamedTuple", "Protocol", "Exception"}, name


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_a_file_opens_with_its_idea_and_is_small(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert len(text.splitlines()) <= LINES


# --- the public interface ---


def test_the_public_names_are_there() -> None:
    assert {"Broker", "Client", "Loan", "SharedFD", "attach", "borrow", "errors", "put", "rc"} == {
        *fdbroker.__all__
    }
    for name in fdbroker.__all__:
        assert getattr(fdbroker, name).__doc__
    with pytest.raises(AttributeError):
        _ = fdbroker.no_such_name


def methods(cls: type) -> dict[str, Callable[..., Any]]:
    """The public methods of a class by name, inherited ones and the code of properties too."""
    found = {}
    for name, value in inspect.getmembers_static(cls):
        if isinstance(value, property):
            value = value.fget
        value = getattr(value, "__func__", value)  # of a classmethod
        public = not name.startswith("_") or name in ("__init__", "__enter__", "__exit__")
        if public and inspect.isfunction(value):
            found[f"{cls.__name__}.{name}"] = value
    return found


def callables() -> dict[str, Callable[..., Any]]:
    """All that a user can call."""
    public = {name: getattr(fdbroker, name) for name in fdbroker.__all__}
    public |= {name: getattr(fdbroker.rc, name) for name in fdbroker.rc.__all__}
    found = {name: value for name, value in public.items() if inspect.isfunction(value)}
    for value in public.values():
        found |= methods(value) if inspect.isclass(value) else {}
    return found


@pytest.mark.parametrize("function", callables().values(), ids=callables())
def test_the_public_interface_is_typed(function: Callable[..., Any]) -> None:
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for name, parameter in signature.parameters.items():
        assert name == "self" or parameter.annotation is not inspect.Parameter.empty, name


@pytest.mark.parametrize("verb", ["borrow", "put"])
def test_the_default_client_is_called_as_any_other(verb: str) -> None:
    method = inspect.signature(getattr(fdbroker.Client, verb))
    _, *parameters = method.parameters.values()
    function = inspect.signature(getattr(fdbroker, verb))
    assert list(function.parameters.values()) == parameters
    assert function.return_annotation == method.return_annotation


def test_the_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").exists()


SAMPLES: dict[str, Any] = {
    "int": 7,
    "float": 0.5,
    "str": "some",
    "list[str]": ["one", "two"],
    "list[tuple[int, int, float, bool]]": [(812, 1000, 240.0, True)],
}


@pytest.mark.parametrize("error", errors.by_code().values(), ids=lambda cls: cls.__name__)
def test_an_error_is_part_of_the_interface(error: type[errors.FDBrokerError]) -> None:
    """It pickles with its data, its text is one line, and it is a builtin that is expected."""
    types: dict[str, str] = {}
    for base in error.__mro__:
        types |= vars(base).get("__annotations__", {})
    raised = error(*(SAMPLES[types[field]] for field in error.fields))
    copy = pickle.loads(pickle.dumps(raised))
    assert type(copy) is error
    assert copy.data == raised.data
    assert str(copy) == str(raised)
    assert "\n" not in str(raised)
    builtins = {base for base in error.__mro__ if base.__module__ == "builtins"}
    assert builtins - {object, BaseException, Exception}


def test_no_two_errors_share_a_code() -> None:
    classes = [value for value in vars(errors).values() if inspect.isclass(value)]
    codes = [cls.code for cls in classes if issubclass(cls, errors.FDBrokerError) and cls.code]
    assert len(codes) == len(set(codes)) == len(errors.by_code())


# --- what an import costs ---


@pytest.mark.parametrize(
    "code",
    [
        "import fdbroker",
        "import fdbroker.rc",
        "import fdbroker.cli",
        "import fdbroker.cli.exec",
        "import fdbroker as f; f.Client",
    ],
)
def test_an_import_brings_only_what_is_used(code: str) -> None:
    heavy = {"asyncio", "multiprocessing", "psutil", "click", "rich", "numpy"}
    if "Client" not in code:  # a client imports all that it will ever need: see client.py
        heavy |= {"difflib"}
    if code in ("import fdbroker", "import fdbroker.rc"):
        heavy |= {"msgpack", "typing", "socket", "threading"}
    if code == "import fdbroker.cli.exec":
        heavy |= {"argparse", "contextlib", "enum", "re", "socket", "threading", "typing"}
    script = (
        f"import sys; sys.path[:0] = {sys.path!r}; {code}; print(*({heavy} & {{*sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


# --- the repository ---


def test_no_file_knows_this_machine() -> None:
    """The path of a checkout, a home or an index on one machine helps nobody else."""
    try:
        names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    foreign = re.compile(rb"(?<![\w.$}~])/(?:work|root|opt|home)/[\w.]")
    paths = [ROOT / name for name in names.split("\0") if name]
    assert [p for p in paths if p.is_file() and foreign.search(p.read_bytes())] == []
