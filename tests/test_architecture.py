"""The house's rules about who may know whom, read from the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([ROOT / "app.py", *(ROOT / "engine").rglob("*.py"), *(ROOT / "studio").rglob("*.py")])

# Who may import what. A path or package stands for everything under it.
ALLOWED = {
    "torch": ("engine/torch_backend", "engine/seedling", "engine/importers/checkpoint.py"),
    "diffusers": ("engine/seedling",),
    "transformers": ("engine/seedling",),
    "safetensors": ("engine/torch_backend", "engine/seedling"),
    "tokenizers": ("engine/prompt.py", "engine/seedling"),
    "mlx": ("engine/mlx_backend",),
    "gradio": ("studio",),
    "starlette": ("studio",),
    "sqlalchemy": ("studio",),
    "scipy": ("engine/seedling", "engine/evaluate.py"),
    "pickle": (),
    "numpy": ("engine", "studio"),
    "PIL": ("engine", "studio"),
    "app": (),
    "studio": ("app.py", "studio"),
    "engine.torch_backend": (
        "engine/torch_backend",
        "engine/worker.py",
        "engine/accept_subject.py",
        "engine/seedling",
        "engine/evaluate.py",
    ),
    "engine.mlx_backend": ("engine/mlx_backend", "engine/worker.py", "engine/accept_subject.py"),
    "engine.seedling": ("engine/seedling", "engine/evaluate.py", "engine/retention.py"),
}
# Of the seedling's own files, those that the world of its pictures is made of: who of them may know whom.
GARDEN = {
    "engine/seedling/backdrops.py": (),
    "engine/seedling/scenes.py": ("backdrops",),
    "engine/seedling/drawing.py": ("backdrops", "scenes"),
    "engine/seedling/captions/core.py": (),
    **{f"engine/seedling/captions/{word}.py": ("captions",) for word in ("english", "hindi", "marathi", "tamil")},
    "engine/seedling/captions/__init__.py": ("captions", "scenes"),
}
HEAVY = ("torch", "diffusers", "transformers", "gradio", "mlx", "PIL", "tokenizers", "safetensors")


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, in an empty folder, with this source tree in reach."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=60)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything a file imports, wherever in the file; `from a import b` gives a.b."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def stray(path: Path) -> list[str]:
    """Imports of one file that the table forbids, as sentences."""
    name = name_of(path)
    return [
        f"{name}:{line} imports {imported}, which only {', '.join(places) or 'nobody'} may"
        for imported, line in imports(path)
        for what, places in ALLOWED.items()
        if (imported == what or imported.startswith(what + "."))
        and not any(name == place or name.startswith(place + "/") for place in places)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nobody_imports_what_is_not_theirs(path: Path) -> None:
    assert stray(path) == []


@pytest.mark.parametrize(("name", "known"), GARDEN.items())
def test_captions_know_no_pixels_and_pictures_no_captions(name: str, known: tuple[str, ...]) -> None:
    ours = {imported.split(".")[2] for imported, _ in imports(ROOT / name) if imported.startswith("engine.seedling.")}
    assert ours <= set(known)
    assert not [imported for imported, _ in imports(ROOT / name) if imported.split(".")[0] in ("torch", "scipy")]


def test_the_rules_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "engine").mkdir()
    wrong = tmp_path / "engine" / "plan.py"
    inside = "def f():\n    import torch.nn\n"
    wrong.write_text(f"{inside}from studio import ui\nfrom engine import torch_backend\nfrom . import fake")
    found = {sentence.split()[2].strip(",") for sentence in stray(wrong)}
    assert found == {"studio.ui", "engine.torch_backend", "torch.nn"}
    assert ("engine.fake", 5) in imports(wrong)


def test_types_imports_nothing_of_ours() -> None:
    ours = ("engine", "studio", "app")
    assert not [name for name, _ in imports(ROOT / "engine" / "types.py") if name.split(".")[0] in ours]


QUIET = [path for path in SOURCES if "engine" in path.parts and "seedling" not in path.parts]  # that one is a command


@pytest.mark.parametrize("path", QUIET, ids=name_of)
def test_the_engine_neither_prints_nor_exits(path: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not {ast.unparse(call) for call in calls} & {"print", "input", "exit", "quit", "sys.exit"}


def light_modules() -> list[str]:
    """Everything that must be quick to import: all but what is heavy by trade, and commands run with -m."""
    heavy = ("engine/torch_backend", "engine/mlx_backend", "engine/seedling", "studio")
    light = [path for path in SOURCES if not name_of(path).startswith(heavy)]
    # the tokenizer; the checker of pictures, twice
    by_trade = {"engine/prompt.py", "engine/evaluate.py", "engine/retention.py"}
    names = [name_of(path).removesuffix(".py").replace("/", ".") for path in light if name_of(path) not in by_trade]
    return [name.removesuffix(".__init__") for name in names]


def test_importing_the_front_door_and_the_engine_loads_nothing_heavy(tmp_path: Path) -> None:
    """And does nothing: no folder appears, no thread starts, nothing is printed."""
    code = (
        f"import threading, {', '.join(light_modules())}\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], threading.active_count())"
    )
    done = python(code, tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("[] 1", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["models", "list"], ["generate", ""]])
def test_small_commands_load_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = (
        f"import app\ntry:\n    app.main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in ('torch', 'diffusers', 'transformers', 'gradio') if name in sys.modules])"
    )
    done = python(code, tmp_path)
    assert done.stdout.splitlines()[-1] == "[]" and "Traceback" not in done.stderr


def test_importing_the_studio_does_not_load_gradio(tmp_path: Path) -> None:
    code = (
        "import studio.serve, studio.settings, studio.pictures\n"
        "print([name for name in ('torch', 'gradio') if name in sys.modules])"
    )
    done = python(code, tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
    assert list(tmp_path.iterdir()) == []
