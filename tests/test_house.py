"""The house rules that code can break: import order, light imports, unique names, no secrets."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

import lorascope
from lorascope.commands import COMMANDS
from lorascope.config import flag_of
from lorascope.sae.metrics import stability

ROOT = Path(lorascope.__file__).parent
ORDER = (
    "version errors remote sites config arrayfile artifact record_json hub runtime stage kernels "
    "texts subject activations callbacks sae features causal labels dashboard results audit "
    "compare depth run_summary pipeline demo commands inspection completion cli __main__"
).split()


def modules() -> dict[str, Path]:
    files = {file.relative_to(ROOT).with_suffix("").as_posix(): file for file in ROOT.rglob("*.py")}
    return {name.replace("/", "."): file for name, file in sorted(files.items())}


def imported(file: Path) -> set[str]:
    """Names inside lorascope that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".", 1)[1] for name in found if name.startswith("lorascope.")}


def test_imports_point_up_the_list_only():
    wrong = []
    for name, file in modules().items():
        if name == "__init__":
            continue
        here = ORDER.index(name.split(".")[0])
        for target in imported(file):
            top = target.split(".")[0]
            if top in ORDER and ORDER.index(top) > here:
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or through others."""

    def reached(name: str) -> set[str]:
        seen, left = set(), [name]
        while left:
            new = edges[left.pop()] - seen
            seen |= new
            left += new
        return seen

    reach = {name: reached(name) for name in edges}
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in edges
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def test_imports_have_no_circles_even_inside_functions_or_for_types_only():
    known = modules()
    edges = {
        name: {
            module
            for target in imported(file)
            for module in (target, f"{target}.__init__")
            if module in known and module != name
        }
        for name, file in known.items()
        if name != "__init__"  # it imports every public name when that is asked for
    }
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles(edges) == []


def test_nothing_is_taken_from_the_packages_front():
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "lorascope":
                inside = {module.split(".")[0] for module in modules()}
                assert {alias.name for alias in node.names} <= inside, name


# What test files are about that is no module, command or folder.
TOPICS = {
    "accuracy",
    "architectures",
    "damage",
    "docs",
    "file_systems",
    "fuzz",
    "golden_thread",
    "gpu",
    "house",
    "jobs",
    "kill",
    "planted",
    "smollm2",
    "synthetic_features",
}


def test_a_test_file_is_named_for_a_module_a_command_a_folder_or_a_topic():
    """After that name it may say what of it is tested: `test_train_dist.py`."""
    subjects = {part for name in modules() for part in name.split(".")} | set(COMMANDS)
    names = {file.stem.removeprefix("test_") for file in Path(__file__).parent.glob("test_*.py")}
    other = {name for name in names if not any(f"{name}_".startswith(f"{s}_") for s in subjects)}
    assert other <= TOPICS


def test_every_top_level_name_has_its_place_in_the_order():
    assert {name.split(".")[0] for name in modules()} - {"__init__"} <= set(ORDER)


def test_only_the_subject_imports_transformers_and_peft():
    users = set()
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(n.split(".")[0] in ("transformers", "peft") for n in names):
                users.add(name)
    assert {name.split(".")[0] for name in users} == {"subject"}


def test_file_names_are_unique_in_the_package():
    names = [file.name for file in ROOT.rglob("*.py") if not file.name.startswith("__")]
    assert sorted(names) == sorted(set(names))


def test_help_completion_and_import_need_no_torch():
    code = (
        "import sys, lorascope\n"
        "from lorascope.cli import call\nfrom lorascope.commands import COMMANDS\n"
        "calls = [['--help'], ['completion', 'bash'], *([name, '--help'] for name in COMMANDS)]\n"
        "for words in calls:\n"
        "    try:\n"
        "        call(words)\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, words\n"
        "    heavy = {'torch', 'transformers', 'peft', 'datasets', 'h5py', 'fsspec'}\n"
        "    heavy |= {'numpy'} if words == ['--help'] else set()\n"
        "    heavy &= set(sys.modules)\n"
        "    assert not heavy, (words, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
    assert "--max-rollouts" in done.stdout


def test_texts_need_no_torch_directly_or_through_what_they_import():
    names = [name for name in modules() if name.startswith("texts.")]
    code = (
        f"import importlib, sys\nfor name in {names}:\n"
        "    importlib.import_module('lorascope.' + name)\n"
        "heavy = {'torch', 'transformers', 'peft', 'h5py'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(names) >= 5


def test_the_public_names_are_these():
    assert sorted(lorascope.__all__) == [
        "AblateConfig",
        "ActivationStore",
        "AttributeConfig",
        "CollectConfig",
        "DashboardConfig",
        "DirectConfig",
        "EditConfig",
        "EvaluateConfig",
        "FeatureIndex",
        "GenerateConfig",
        "LabelConfig",
        "LorascopeError",
        "Patch",
        "RunConfig",
        "SAE",
        "SiteLayout",
        "SteerConfig",
        "Study",
        "TrainConfig",
        "ablate",
        "attribute",
        "collect",
        "direct",
        "edit",
        "evaluate",
        "generate",
        "label",
        "load_sae",
        "render",
        "report_schema",
        "run",
        "show",
        "steer",
        "train",
    ]
    for name in lorascope.__all__:
        assert getattr(lorascope, name) is not None


def test_no_file_unpickles_or_trusts_remote_code():
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in ("pickle.load", "pickle.loads", "eval", "exec"), name
            assert given.get("trust_remote_code", "False") == "False", name
            if called == "torch.load":
                assert given.get("weights_only") == "True", name


def test_every_promise_in_the_formats_page_names_a_test_that_exists():
    root = Path(__file__).parent.parent
    named = re.findall(
        r"(test_\w+\.py)(?:::(test_\w+))?", (root / "docs" / "formats.md").read_text("utf-8")
    )
    assert len(named) > 20
    for file, test in named:
        text = (root / "tests" / file).read_text("utf-8")
        assert f"def {test}(" in text if test else True, (file, test)


def test_every_test_that_the_documents_name_exists():
    root = Path(__file__).parent
    named = {
        match
        for page in (root.parent / "docs").glob("*.md")
        for match in re.findall(r"(test_\w+\.py)::(test_\w+)", page.read_text(encoding="utf-8"))
    }
    assert named
    missing = [
        f"{file}::{name}"
        for file, name in sorted(named)
        if not (root / file).exists() or f"def {name}(" not in (root / file).read_text()
    ]
    assert missing == []


def test_the_test_run_checks_types_and_shapes():
    with pytest.raises(BeartypeCallHintViolation, match="violates type hint"):
        flag_of(3)
    with pytest.raises(TypeCheckError, match="d_in=2"):
        stability(torch.ones(3, 2), [torch.ones(3, 4)])
