"""How the files relate: imports run one way, san.py stands alone, lab/README.md draws it."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAB = {f"lab.{path.stem}" for path in (ROOT / "lab").glob("*.py") if path.stem != "__init__"}
OURS = {"san", "models", "train_vision", "train_lm"} | LAB


def path_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


@cache
def imports(module: str) -> frozenset[str]:
    """All that a file imports, anywhere in it; of ours the module, of others the package."""
    found = set()
    for node in ast.walk(ast.parse(path_of(module).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & OURS or {node.module}
    return frozenset(name if name in OURS else name.split(".")[0] for name in found)


def test_san_imports_torch_and_the_standard_library_alone():
    assert imports("san") - sys.stdlib_module_names == {"torch"}


def test_imports_run_from_the_scripts_through_lab_and_models_to_san():
    assert imports("models") & OURS == {"san"}
    for module in LAB:
        assert imports(module) & OURS <= LAB | {"models", "san"}, module
    for module in ("train_vision", "train_lm"):
        assert imports(module) & OURS <= LAB | {"models", "san"}, module


def test_no_two_files_of_lab_import_each_other_however_far_around():
    def below(module: str, above: tuple[str, ...] = ()) -> None:
        assert module not in above, f"a circle: {' → '.join((*above, module))}"
        for other in imports(module) & LAB:
            below(other, (*above, module))

    for module in LAB:
        below(module)


def test_labs_readme_draws_every_file_above_what_it_imports():
    picture = re.search(r"```text\n(.*?)```", (ROOT / "lab" / "README.md").read_text(), re.S)[1]
    row = {
        name: i
        for i, line in enumerate(picture.splitlines())
        for name in re.findall(r"[\w/.]+\.py", line)
    }
    drawn = {f"../{m}.py" if m in OURS - LAB else f"{m.removeprefix('lab.')}.py": m for m in OURS}
    assert row.keys() == drawn.keys()
    for file, module in drawn.items():
        for other in imports(module) & OURS:
            below = next(name for name, m in drawn.items() if m == other)
            assert row[file] < row[below], f"{file} imports {below}, which stands no lower"


def test_lab_is_a_package_without_code_of_its_own():
    assert not (ROOT / "lab" / "__init__.py").read_text().strip()


def test_the_top_level_holds_what_a_reader_of_the_method_needs():
    files = {path.name for path in ROOT.glob("*.py")}
    assert files == {"san.py", "models.py", "train_vision.py", "train_lm.py"}
