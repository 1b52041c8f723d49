"""The rules of the house, held over every file: names, imports, the path line, `--help`, commands that are promised."""

import ast
import importlib.metadata
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"0": "typos", "2": "capture", "3": "maths", "4": "semantics", "5": "attention"}
MODULES = sorted(path for path in ROOT.glob("[0-9]_*/*/*.py") if path.name != "__init__.py")
SCRIPTS = [path for path in MODULES if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
SHARED = "1_utils"
STAGE_SCRIPTS = [path for path in SCRIPTS if path.parents[1].name != SHARED]
PATH_LINE = (
    'sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]'
)
INNER_IMPORTS = 40
FORMATTER_SKIPS = 5
FUNCTIONS_TWICE = 0
OWN_NAMES = {path.stem for path in MODULES} | set(PACKAGES.values())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def every(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=name_of)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").partition(".")[0])
    return found


def path_uses(path: Path) -> int:
    """How often a file's code touches sys.path."""
    return sum(isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path" for node in ast.walk(tree_of(path)))


@cache
def help_of(path: Path) -> tuple[float, float, str]:
    """(seconds by the clock, seconds of a core, text) of a script's --help from the root folder: the best of three."""
    clock, core, text = float("inf"), float("inf"), ""
    for _ in range(3):
        before, start = os.times(), time.perf_counter()
        done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, cwd="/")
        clock, after = min(clock, time.perf_counter() - start), os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        core, text = min(core, used), done.stdout
        assert done.returncode == 0, done.stderr
        if clock < 1:
            break
    return clock, core, text


def test_there_are_scripts_to_look_at():
    assert {path.parents[1].name[0] for path in MODULES} >= set("012345")
    assert len(SCRIPTS) >= 10


# --- scripts


@every(SCRIPTS)
def test_help_answers_within_a_second_from_any_folder(path):
    clock, core, text = help_of(path)
    assert core < 1, f"--help took {core:.2f} s of a core"
    # Where more processes want a core than there are cores, the clock measures them and not the script.
    assert clock < 1 or os.getloadavg()[0] > (os.cpu_count() or 1), f"--help took {clock:.2f} s"
    first = (ast.get_docstring(tree_of(path)) or "").splitlines()[0]
    assert first in text, "--help does not show the docstring's first line"


@every(SCRIPTS)
def test_a_wrong_flag_is_told_in_one_line(path):
    done = subprocess.run([sys.executable, str(path), "--no_such_flag"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@every(SCRIPTS)
def test_a_script_has_the_common_shape(path):
    functions = {node.name: node for node in tree_of(path).body if isinstance(node, ast.FunctionDef)}
    for name in ("parse_args", "main"):
        assert [argument.arg for argument in functions[name].args.args] == ["argv"], f"{name}(argv=None)"
    lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    assert lines[-2:] == ['if __name__ == "__main__":', "    run_main(main)"]
    assert name_of(path) in (ast.get_docstring(tree_of(path)) or ""), "the docstring shows no command that runs it"


def test_scripts_and_modules_are_told_apart_by_where_they_are():
    for path in MODULES:
        stage, folder = path.parents[1].name, path.parent.name
        assert folder in ("run_scripts", PACKAGES.get(stage[0])), f"{name_of(path)}: in no known folder"
        if stage != SHARED:
            assert (path in SCRIPTS) == (folder == "run_scripts"), f"{name_of(path)}: a script or a module?"


@every(STAGE_SCRIPTS)
def test_the_path_line_is_there_and_the_same(path):
    text = path.read_text(encoding="utf-8")
    assert text.splitlines().count(PATH_LINE) == 1
    assert path_uses(path) == 1, "sys.path is changed by the one path line alone"
    body = tree_of(path).body
    place = next(i for i, node in enumerate(body) if ast.get_source_segment(text, node) == PATH_LINE)
    for node in body[:place]:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module).partition(".")[0]] if isinstance(node, ast.ImportFrom) else []
        assert not OWN_NAMES & set(names), "a helper is imported before the path line"


@every([path for path in MODULES if path not in STAGE_SCRIPTS])
def test_no_other_module_changes_the_path(path):
    assert path_uses(path) == 0


# --- names and imports


def test_module_names_are_unique_and_shadow_nothing():
    counts = Counter([path.stem for path in MODULES] + list(PACKAGES.values()))
    assert [name for name, count in counts.items() if count > 1] == []
    assert counts.keys() & sys.stdlib_module_names == set()
    assert counts.keys() & importlib.metadata.packages_distributions().keys() == set()


@every(MODULES)
def test_no_stage_imports_another(path):
    stage = path.parents[1].name
    foreign = {other.stem for other in SCRIPTS if other.parents[1].name not in (stage, SHARED)}
    foreign |= {package for number, package in PACKAGES.items() if number != stage[0]}
    assert imports_of(path) & foreign == set()


@every(MODULES)
def test_a_module_imports_only_what_is_required(path):
    names = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    required = {name.lower().replace("_", "-") for name in names}
    # What transformers, accelerate and scikit-learn themselves always bring.
    required |= {"huggingface-hub", "tokenizers", "safetensors", "psutil", "threadpoolctl", "regex"}
    distributions = importlib.metadata.packages_distributions()
    for name in imports_of(path) - sys.stdlib_module_names - OWN_NAMES:
        known = {found.lower().replace("_", "-") for found in distributions.get(name, [])}
        assert known & required or name in OPTIONAL, f"{name} is in no requirements file"


OPTIONAL = {"nnsight", "transformer_lens", "pynvml"}  # measured where a user has them


@every(MODULES)
def test_csv_tables_have_one_reader(path):
    """pandas' own defaults take a style named `None`, `NA` or `nan` for a missing one."""
    assert path.stem == "file_output" or "read_csv" not in {
        node.attr for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)
    }


@every([path for path in SCRIPTS if path.parents[1].name[0] in "345" and "--run_dir" in help_of(path)[2]])
def test_every_analysis_says_if_the_run_is_not_finished(path):
    assert "warn_unfinished(" in path.read_text(encoding="utf-8")


def test_a_flag_of_stage_5_has_one_meaning():
    """Flags of one name have one default, and `--first_token` one help text, in every script of the stage."""
    shown = [help_of(path)[2].partition("options:")[2] for path in SCRIPTS if path.parents[1].name[0] == "5"]
    told = [re.search(r"--first_token (.*?)(?=\n  --|\n\n)", text, re.DOTALL) for text in shown]
    assert len({" ".join(found[1].split()) for found in told if found}) == 1
    assert sum(found is not None for found in told) == 4


# --- safety and portability


@every(MODULES)
def test_nothing_from_a_file_or_a_model_repository_is_executed(path):
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        trust = keywords.get("trust_remote_code")
        assert not (isinstance(trust, ast.Constant) and trust.value), "trust_remote_code only by the user's flag"
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system"), called
        if called == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True"
        if called.startswith("subprocess."):
            assert "shell" not in keywords


TEXT_FILES = [
    path
    for pattern in ("[0-9]_*/*/*.py", "[0-9]_*/hpc/*", "tests/*.py", "*.md", "Makefile", ".ci/*", "*.toml")
    for path in sorted(ROOT.glob(pattern))
    if path.is_file() and path != Path(__file__)
]


@every(TEXT_FILES)
def test_no_path_of_one_machine(path):
    text = path.read_text(encoding="utf-8")
    found = re.search(r"(?<![\w.})>])/(work|home|root|opt|Users)/[\w.]+", text)
    assert found is None, f"absolute path: {found}"


@every(MODULES)
def test_functions_are_short(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 100, f"{node.name} has {length} lines"


@every(SCRIPTS)
def test_the_docstring_of_a_script_is_short(path):
    docstring = ast.get_docstring(tree_of(path)) or ""
    assert len(docstring.splitlines()) <= 15, "long prose belongs in docs/METHODS.md"


def functions_of(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_imports_are_at_the_top():
    inner = Counter()
    for path in MODULES:
        found = {node for function in functions_of(path) for node in ast.walk(function)}
        inner[name_of(path)] = sum(isinstance(node, ast.Import | ast.ImportFrom) for node in found)
    assert inner.total() <= INNER_IMPORTS, inner.most_common(10)


def test_the_formatter_is_rarely_told_to_skip():
    skips = Counter({name_of(path): path.read_text(encoding="utf-8").count("fmt: skip") for path in MODULES})
    assert skips.total() <= FORMATTER_SKIPS, skips.most_common(10)


def test_a_file_has_few_functions():
    assert statistics.median(len(functions_of(path)) for path in MODULES) <= 12


def test_no_function_is_there_twice():
    """One name with one body in two files is one function that belongs in one of them, or in 1_utils."""
    places: dict[tuple[str, str], set[str]] = {}
    for path in MODULES:
        for function in functions_of(path):
            body = function.body[ast.get_docstring(function) is not None :]
            code = "\n".join(ast.unparse(node) for node in body)
            if function.name not in ("main", "parse_args"):
                places.setdefault((function.name, code), set()).add(name_of(path))
    twice = {name: sorted(files) for (name, _), files in places.items() if len(files) > 1}
    assert len(twice) <= FUNCTIONS_TWICE, twice


# --- commands that the documentation promises


def commands_in(text: str) -> list[list[str]]:
    """The `python <script> …` commands of a text, continuation lines joined, split as a shell would."""
    joined = text.replace("\\\n", " ")
    found = re.findall(r"^[ \t!$]*(?:[A-Z_]+=\S+ )?python3? (\d_\w+/run_scripts/\w+\.py[^\n`]*)$", joined, re.MULTILINE)
    return [shlex.split(command.partition(" #")[0], posix=True) for command in found]


def check_command(words: list[str]) -> None:
    script = ROOT / words[0]
    assert script.is_file(), f"{words[0]} does not exist"
    own = words[: words.index("--")] if "--" in words else words  # what follows goes to another script
    flags = {word.partition("=")[0] for word in own if word.startswith("--")}
    known = set(re.findall(r"--\w+", help_of(script)[2].partition("options:")[2]))
    assert flags <= known, f"{words[0]} has no {flags - known}"


@every(SCRIPTS)
def test_commands_of_the_docstring_work(path):
    commands = commands_in(ast.get_docstring(tree_of(path)) or "")
    assert commands, "no command in the docstring"
    for words in commands:
        check_command(words)


@every(sorted(ROOT.glob("*.md")))
def test_commands_of_the_documentation_work(path):
    for words in commands_in(path.read_text(encoding="utf-8")):
        check_command(words)


def test_the_readme_shows_every_stage():
    commands = commands_in((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {words[0][0] for words in commands} >= set("12345")
