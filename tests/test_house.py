"""The house stays as it is drawn: imports run one way, lib/ knows no command line, documents name what exists."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Each room of lib/ once, lowest floor first. A room may import rooms of lower floors, and of its own floor as long as
# no circle arises. "export/" and "report/" stand for all the rooms of these wings.
FLOORS = {
    # orders reads and writes JSON, for every floor
    "ground": "blocks files hub memory families gguf_archs losses records schema orders",
    "model": "model decoder repeated pieces data",
    "measuring": "evaluate trajectories engines similarity task_rows tasks measure",
    "deciding": "search refine importance candidates costs",
    "changing, and writing what was changed": "edits laco repair/ osscar parts width units allocation "
    "recover_text recover export/",
    "keeping": "journal ranks",
    "jobs": "job methods cells",
    "report": "report/",
}
WITHOUT_TORCH = (
    "blocks files hub families gguf_archs schema orders report/"  # of the ground, memory and losses work on tensors
)
SHIPPED = "export/modeling_blockpruned"  # copied into exports, where there is no lib

# Strings of lib/ that are flags of other programs: the room, and what surrounds them.
FOREIGN_FLAGS = {
    "export/decilm": ("mlx_lm.generate --model FOLDER --trust-remote-code --prompt", "vllm serve FOLDER --trust-re"),
    **dict.fromkeys(("export/gguf", "hub", "model"), ("llama-gguf-split --merge",)),
}

IN_ANOTHER_ENVIRONMENT = {"scripts/mlx_logits.py"}  # mlx-lm's; scripts/check_decilm.py calls it
COMMANDS = sorted(
    {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "block_search.py", ROOT / "eval.py", *(ROOT / "scripts").glob("*.py"))
        if "__main__" in path.read_text(encoding="utf-8")
    }
    - IN_ANOTHER_ENVIRONMENT
)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


# ---- rooms and what they import ----------------------------------------------------------------------------------


def rooms():
    """Return {name below lib/, e.g. "export/write": syntax tree} of every room."""
    lib = ROOT / "lib"
    files = sorted(path for path in lib.rglob("*.py") if path.name != "__init__.py")
    return {
        path.relative_to(lib).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files
    }


def imported(tree):
    """Yield (dotted name, line) of every import of a syntax tree, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def room_of(name, house):
    """Return the room that the dotted name of an import is in, None where it is not the library's."""
    if not name.startswith("lib."):
        return None
    parts = name.split(".")[1:]
    names = ("/".join(parts[:k]) for k in range(len(parts), 0, -1))
    return next((room for room in names if room in house), f"{'/'.join(parts)}, which does not exist,")


def floor_of(room):
    """Return the number of a room's floor, None where no floor has it."""
    wing = room.split("/")[0] + "/" if "/" in room else room
    return next((k for k, names in enumerate(FLOORS.values()) if wing in names.split()), None)


def wrong_imports(house):
    """Return a line for everything about the imports of {room: syntax tree} that the floors do not allow."""
    wrong, beside = [], {}
    for room, tree in house.items():
        if floor_of(room) is None:
            wrong.append(f"lib/{room}.py is on no floor: add it to FLOORS in tests/test_house.py")
            continue
        for name, line in imported(tree):
            other = room_of(name, house)
            if other is None or other == room:
                continue
            floors = floor_of(room), floor_of(other)
            if floors[1] is None and other in house:
                continue  # it has a line of its own
            if floors[1] is None or floors[1] > floors[0]:
                wrong.append(f"lib/{room}.py:{line}: imports {other}, which is not below it")
            elif floors[0] == floors[1]:
                beside.setdefault(room, set()).add(other)
    try:
        TopologicalSorter(beside).prepare()
    except CycleError as error:
        wrong.append(f"rooms import each other in a circle: {' -> '.join(error.args[1])}")
    return wrong


def test_imports_run_one_way():
    wrong = wrong_imports(rooms())
    assert not wrong, "\n".join(wrong)


def test_wrong_imports_are_found():
    def found(**sources):
        return wrong_imports({name.replace("__", "/"): ast.parse(source) for name, source in sources.items()})

    assert found(blocks="import torch", decoder="from lib.blocks import Block\nimport lib.blocks") == []
    assert (
        found(export__write="from lib.export import layers", export__layers="from lib import blocks", blocks="") == []
    )
    (line,) = found(blocks="def f():\n    from lib import decoder", decoder="")
    assert line.startswith("lib/blocks.py:2: imports decoder")
    (line,) = found(blocks="import lib.report.page", report__page="")
    assert "lib/blocks.py:1: imports report/page" in line
    (line,) = found(attic="", job="from lib.attic import chest")
    assert "lib/attic.py is on no floor" in line and "FLOORS in tests/test_house.py" in line
    (line,) = found(job="from lib.cellar import wine")
    assert "does not exist" in line
    (line,) = found(search="import lib.candidates", candidates="import lib.importance", importance="import lib.search")
    assert "in a circle" in line


def test_floors_name_each_room_once():
    names = [name for names in FLOORS.values() for name in names.split()]
    assert len(names) == len(set(names))


def test_library_knows_no_command_line():
    wrong = []
    for room, tree in rooms().items():
        at = f"lib/{room}.py"
        for name, line in imported(tree):
            if name.split(".")[0] in ("scripts", "argparse", "block_search", "eval"):
                wrong.append(f"{at}:{line}: imports {name}")
            if name.startswith("."):
                wrong.append(f"{at}:{line}: imports {name}; write lib.{name.lstrip('.')}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                wrong.append(f"{at}:{node.lineno}: prints")
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                wrong += [f"{at}:{node.lineno}: says {flag}" for flag in flag_names(room, node.value)]
    assert not wrong, "\n".join(wrong)


def flag_names(room, text):
    """Return the flags of our command lines that a string of a room names."""
    for allowed in FOREIGN_FLAGS.get(room, ()):
        text = text.replace(allowed, "")
    return re.findall(r"(?<![\w(-])--[a-z][a-z-]*", text)  # var(--color) is CSS


def test_flag_names_are_found():
    assert flag_names("model", "--model-path {path}: pass --offload, a - b, -- and ---- no") == [
        "--model-path",
        "--offload",
    ]
    assert flag_names("export/gguf", "join them with llama-gguf-split --merge, or --format hf") == ["--format"]
    assert flag_names("report/page", "color: var(--ink)") == []


def test_shipped_file_stands_alone():
    assert [name for name, _ in imported(rooms()[SHIPPED]) if name.startswith("lib")] == []


def test_results_are_read_without_torch():
    names = [f"lib.{room.replace('/', '.')}" for room in rooms() if room.split("/")[0] in WITHOUT_TORCH.split()]
    names += [f"lib.{room.replace('/', '.')}" for room in rooms() if room.startswith("report/")]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} imports torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(names) > len(WITHOUT_TORCH.split())


# ---- scripts -----------------------------------------------------------------------------------------------------


def test_no_script_imports_another_command():
    wrong = []
    for path in (ROOT / "scripts").glob("*.py"):
        for name, line in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if name.split(".")[0] in ("block_search", "eval"):
                wrong.append(f"scripts/{path.name}:{line}: imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("script", COMMANDS)
def test_help_comes_at_once(script):
    names_a_table = script in (
        "block_search.py",
        "scripts/compare.py",
        "scripts/repair.py",
    )  # whose functions need torch
    code = (
        "import runpy, sys\n"
        "sys.argv = [sys.argv[1], '--help']\n"
        "try:\n"
        "    runpy.run_module(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    if 'torch' in sys.modules: print('torch was imported', file=sys.stderr)\n"
    )
    module = script.removesuffix(".py").replace("/", ".")
    done = subprocess.run([sys.executable, "-c", code, module], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "torch was imported\n" if names_a_table else "")
    assert done.stdout.startswith("usage:")


# ---- documents ---------------------------------------------------------------------------------------------------


def test_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_name_what_exists(path):
    assert missing(path.read_text(encoding="utf-8"), path.parent) == []


def missing(text, folder):
    """Return what a Markdown text in `folder` names and the repository does not hold: commands, files, links."""
    modules = re.findall(r"\b(?:python3? -m )?(scripts\.\w+)\b(?!\()", text)
    wrong = {name for name in modules if not (ROOT / (name.replace(".", "/") + ".py")).is_file()}
    named = re.findall(
        r"(?<![\w/.$-])(?<!-file )((?:lib|scripts|tests|docs|ppls|lm_eval)/[\w./-]*\w\.(?:py|sh|md|json|png|svg))\b",
        text,
    )
    named += re.findall(r"\b(?:bash|python) ([\w./-]+\.(?:sh|py))\b", text)
    wrong |= {name for name in named if not (ROOT / name).is_file()}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        file = (folder / target).resolve() if target else None
        if file and not file.exists():
            wrong.add(link)
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8") if file else text):
            wrong.add(link)
    return sorted(wrong)


def anchors(text):
    """Return the names under which GitHub links to the headings of a Markdown text."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)  # a comment of a shell is no heading
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_what_is_missing_is_found():
    text = """# What it does: a `list`
    python -m scripts.export, python -m scripts.nothing, `bash scripts/none.sh`, `lib/blocks.py`, `tests/test_none.py`,
    [here](#what-it-does-a-list) [there](#elsewhere) [code](eval.py) [gone](docs/gone.md) [hub](https://example.com/x)
    """
    found = ["#elsewhere", "docs/gone.md", "scripts.nothing", "scripts/none.sh", "tests/test_none.py"]
    assert missing(text, ROOT) == found
