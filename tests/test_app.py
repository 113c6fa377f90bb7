"""The front door: the keys and exit codes that scripts rely on, and a sentence for all that a person can get wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

import app
from engine import products
from engine.packs import open_pack
from tests.packs.writers import write_pack

ROOT = Path(__file__).resolve().parent.parent
GENERATE_KEYS = "path model backend prompt seed width height steps seconds peak_memory_bytes".split()


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(tmp_path_factory.mktemp("packs") / "tiny", "ternary")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test in a folder of its own, which is also its data folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIWAKI_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("SPACE_ID", raising=False)
    return tmp_path


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def generate(pack: Path, *more: str, prompt: str = "a red circle") -> int:
    return app.main(["generate", prompt, "--model", str(pack), "--backend", "fake", "--steps", "1", *more])


def test_generate_writes_a_png_with_its_recipe_and_says_how(pack: Path, place: Path, capsys) -> None:
    assert generate(pack, "--seed", "7", "--size", "96x64", "--out", "a.png", "--json") == 0
    facts = last_line(capsys)
    assert list(facts) == GENERATE_KEYS
    assert list(facts["seconds"]) == ["load", "encode", "denoise", "decode", "total"]
    assert (facts["path"], facts["model"], facts["backend"]) == ("a.png", str(pack), "fake")
    assert (facts["prompt"], facts["seed"], facts["steps"]) == ("a red circle", 7, 1)
    assert (facts["width"], facts["height"]) == (96, 64)
    with Image.open("a.png") as image:
        assert image.size == (96, 64)
        assert json.loads(image.info["niwaki"])["seed"] == 7
    assert [path.name for path in place.iterdir()] == ["a.png"]  # no data folder, nothing half written


def test_generate_calls_a_demo_model_one_and_names_unknown_words(pack: Path, capsys, monkeypatch) -> None:
    assert generate(pack) == 0
    assert "demo model" in capsys.readouterr().out
    assert Path("niwaki-0.png").exists()

    from dataclasses import replace

    from engine.worker import Worker

    run = Worker.run

    def with_unknown(self: Worker, request: object):
        *steps, picture = run(self, request)  # type: ignore[arg-type]
        yield from steps
        yield replace(picture, unknown_words=("astronaut", "riding"))  # type: ignore[type-var]

    monkeypatch.setattr(Worker, "run", with_unknown)
    assert generate(pack, "--count", "2") == 0
    error = capsys.readouterr().err
    assert error == f"the demo model {pack} does not know: astronaut, riding\n"


def test_count_makes_consecutive_seeds_in_a_folder(pack: Path, capsys) -> None:
    assert generate(pack, "--seed", "5", "--count", "3", "--out", "some/where", "--json") == 0
    facts = last_line(capsys)
    assert list(facts) == [*GENERATE_KEYS, "images"]
    assert facts["path"] == str(Path("some/where")) and facts["seed"] == 5
    assert facts["images"] == [{"path": str(Path("some/where") / f"{seed}.png"), "seed": seed} for seed in (5, 6, 7)]
    assert sorted(path.name for path in Path("some/where").iterdir()) == ["5.png", "6.png", "7.png"]


def test_a_folder_as_out_takes_the_seed_as_name(pack: Path) -> None:
    Path("there").mkdir()
    assert generate(pack, "--seed", "3", "--out", "there") == 0
    assert Path("there/3.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([""], "the prompt is empty"),
        (["  "], "the prompt is empty"),
        (["x" * 20_001], "20001 characters"),
        (["a", "--size", "512x"], "size '512x' is impossible: give WIDTHxHEIGHT"),
        (["a", "--size", "0x0"], "size 0x0 is impossible"),
        (["a", "--size", "127x128"], "size 127x128 is impossible: both sides are multiples of 32"),
        (["a", "--size", "-64x64"], "--size"),
        (["a", "--size", "99999x99999"], "size 99999x99999"),
        (["a", "--size", "64x64x64"], "size '64x64x64'"),
        (["a", "--steps", "0"], "0 steps"),
        (["a", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["a", "--seed", "-1"], "seed -1"),
        (["a", "--seed", str(2**63 - 1), "--count", "2"], f"seed {2**63}"),
        (["a", "--count", "0"], "--count 0"),
        (["a", "--backend", "tpu"], "unknown backend 'tpu'; known: auto"),
        (["a", "--out", "a.jpg"], "a.jpg: pictures are PNG"),
        (["a", "--out", "file/a.png"], "cannot write file/a.png"),
        (["a", "--count", "2", "--out", "file"], "cannot write file"),
        (["a", "--nonsense"], "unrecognized arguments: --nonsense"),
        ([], "required: PROMPT"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(pack: Path, capsys, arguments: list[str], words: str) -> None:
    Path("file").write_text("in the way")
    base = ["generate", *arguments, "--model", str(pack)]
    assert app.main(base if "--backend" in base else [*base, "--backend", "fake"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("app.py: ") and words in error and error.count("\n") == 1


@pytest.mark.parametrize("model", ["nonsense", "bonsai-ternary", "no/such/folder"])
@pytest.mark.parametrize("command", [["generate", "a"], ["doctor"], ["bench"], ["models", "verify"]])
def test_a_model_that_is_not_there_is_exit_2_everywhere(capsys, command: list[str], model: str) -> None:
    assert app.main([*command, *([model] if command[0] == "models" else ["--model", model])]) == 2
    error = capsys.readouterr().err
    assert model in error and error.count("\n") == 1
    assert "known: seedling-ternary" in error or "not installed" in error


def test_a_damaged_pack_is_exit_2(pack: Path, place: Path, capsys) -> None:
    broken = shutil.copytree(pack, place / "broken")
    file = next((broken / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    for command in (["generate", "a", "--model"], ["doctor", "--model"], ["bench", "--model"], ["models", "verify"]):
        assert app.main([*command, str(broken)]) == 2
        error = capsys.readouterr().err
        assert str(file) in error and error.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_an_unwritable_folder_is_exit_2(pack: Path, place: Path, capsys) -> None:
    closed = Path("/proc") if os.geteuid() == 0 else place / "closed"  # root may write anywhere but there
    if closed.name == "closed":
        closed.mkdir(mode=0o500)
    elif not closed.is_dir():
        pytest.skip("this user may write everywhere")
    assert generate(pack, "--out", str(closed / "a.png")) == 2
    assert f"cannot write {closed}/a.png" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["paint", "models", "models burn"])
def test_an_unknown_command_is_exit_2(capsys, command: str) -> None:
    assert app.main(command.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_models_list_knows_what_is_there(capsys) -> None:
    assert app.main(["models", "list", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    models = {model["id"]: model for model in json.loads(out[-1])["models"]}
    assert list(models) == [line[2:].split()[0] for line in out[:-1]]
    assert models["bonsai-ternary"]["installed"] is False and models["bonsai-ternary"]["bytes"] == 3_888_274_558
    assert all("demo model" in line for line in out if "seedling" in line.split()[0])
    assert sum(model["default"] for model in models.values()) == 1


def test_models_verify_finds_a_flipped_bit(pack: Path, place: Path, capsys) -> None:
    assert app.main(["models", "verify", str(pack), "--json"]) == 0
    facts = last_line(capsys)
    assert facts["ok"] is True and len(facts["files"]) > 5
    broken = shutil.copytree(pack, place / "broken")
    file = next((broken / "vae").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert app.main(["models", "verify", str(broken)]) == 2
    out, error = capsys.readouterr()
    assert f"damaged  vae/{file.name}" in out
    assert "is damaged (vae/" in error and error.count("\n") == 1


def test_doctor_says_what_and_why(pack: Path, tmp_path: Path, capsys) -> None:
    opened = open_pack(pack)
    for passes, error in (("torch", 0.5), ("compiled", 0.031)):  # the second is preferred
        products.keep_errors(tmp_path / "data", opened, {"to_q": 0.01, "to_out": error}, passes)
    products.keep_errors(tmp_path / "data", opened, {"q_proj": 0.004}, "compiled", "text_encoder")
    assert app.main(["doctor", "--model", str(pack), "--json"]) == 0
    out = capsys.readouterr().out
    facts = json.loads(out.splitlines()[-1])
    assert list(facts) == ["hardware", "backend", "model", "reason", "int8_errors"]
    assert facts["int8_errors"] == {"transformer": {"to_q": 0.01, "to_out": 0.031}, "text_encoder": {"q_proj": 0.004}}
    assert "to_out, which would be off by 3.1%" in out and "to_q," not in out
    assert list(facts["hardware"]) == ["kind", "name", "memory_bytes"]
    assert facts["backend"] == "torch" and facts["model"] == str(pack)
    assert facts["reason"] in out and "demo model" in out


def test_doctor_shows_the_hardware_even_without_a_model(capsys) -> None:
    assert app.main(["doctor", "--model", "nonsense"]) == 2
    assert capsys.readouterr().out.startswith("hardware ")


def test_bench_prints_a_table_and_its_json(pack: Path, capsys) -> None:
    assert app.main(["bench", "--model", str(pack), "--backend", "fake", "--runs", "2", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1])["runs"] == 2
    assert "demo model" in out[0] and "on disk and" in out[-2] and "in memory (float32)" in out[-2]


@pytest.fixture
def evaluation(monkeypatch: pytest.MonkeyPatch) -> list:
    """Stands in for engine.evaluate; remembers how it was called."""
    calls: list = []
    module = types.ModuleType("engine.evaluate")
    result = {"model": "m", "n": 6, "overall": 0.5, "tasks": {"counting": 0.5}, "languages": {"en": 0.5}, "kinds": {}}
    module.run = lambda *args: calls.append(args) or result  # type: ignore[attr-defined]
    module.export = lambda *args: calls.append(args) or {"images": 4}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "engine.evaluate", module)
    monkeypatch.setattr(sys.modules["engine"], "evaluate", module, raising=False)
    return calls


def test_evaluate_is_wired(evaluation: list, place: Path, capsys) -> None:
    assert app.main("evaluate --model m --limit 6 --lang en --backend fake --json".split()) == 0
    assert evaluation[0][:-1] == ("m", 6, place / "data", "fake", "en")
    assert last_line(capsys)["overall"] == 0.5
    evaluation[0][-1]("counting: 1 of 2 right")
    assert capsys.readouterr().err == "counting: 1 of 2 right\n"
    assert app.main("evaluate --model m --export dpg out --prompts p.csv --json".split()) == 0
    assert evaluation[1] == ("dpg", Path("out"), Path("p.csv"), "m", place / "data", "auto")
    assert last_line(capsys) == {"images": 4}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--export coco out --prompts p", "unknown layout 'coco'"),
        ("--export dpg out", "needs --prompts FILE"),
        ("--prompts p", "belongs to --export"),
        ("--lang fr", "invalid choice: 'fr'"),
    ],
)
def test_evaluate_refuses_what_makes_no_sense(evaluation: list, capsys, arguments: str, words: str) -> None:
    assert app.main(["evaluate", "--model", "m", *arguments.split()]) == 2
    assert words in capsys.readouterr().err and not evaluation


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list:
    from studio import serve

    calls: list = []
    monkeypatch.setattr(serve, "serve", lambda settings, say: calls.append(settings))
    return calls


def test_no_command_serves(served: list, place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert app.main([]) == 0
    assert (served[0].host, served[0].port, served[0].model, served[0].backend) == ("127.0.0.1", 7860, None, "auto")
    assert served[0].open_browser and served[0].data_dir == place / "data"
    assert app.main("--port 8000 --no-browser --model m --data here --json".split()) == 0
    assert (served[1].port, served[1].open_browser, served[1].model) == (8000, False, "m")
    assert served[1].data_dir == place / "here" and "log" in last_line(capsys)


def test_a_space_is_served_to_the_outside_without_a_browser(served: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/niwaki")
    assert app.main([]) == 0
    assert (served[0].host, served[0].open_browser) == ("0.0.0.0", False)


def test_help_is_help(capsys) -> None:
    for arguments in (["--help"], ["generate", "--help"]):
        with pytest.raises(SystemExit) as ended:
            app.main(arguments)
        assert ended.value.code == 0
        assert "Exit status" in capsys.readouterr().out


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def missing(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'gradio'", name="gradio")

    monkeypatch.setattr(app, "_run", missing)
    assert app.main([]) == 1
    assert capsys.readouterr().err.startswith("app.py: the Python package gradio is missing: run make setup")


def test_a_console_that_cannot_show_the_prompt(pack: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, str(ROOT / "app.py"), "generate", "लाल वृत्त", "--out", "लाल.png", "--json"]
    more = ["--model", str(pack), "--backend", "fake"]
    made = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (made.returncode, made.stderr) == (0, "")
    assert json.loads(made.stdout.splitlines()[-1])["prompt"] == "लाल वृत्त"


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe's reader leaves with a signal on POSIX only")
def test_a_reader_that_leaves_early_sees_no_traceback() -> None:
    command = f"{sys.executable} {ROOT / 'app.py'} models list | head -n 0"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_ctrl_c_ends_everything_quietly(pack: Path) -> None:
    command = [sys.executable, str(ROOT / "app.py"), "generate", "a", "--count", "90", "--steps", "50"]
    process = subprocess.Popen(
        [*command, "--backend", "fake", "--model", str(pack)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert process.stdout is not None
    process.stdout.readline()  # the first picture is there: the engine process works on the second
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "app.py: stopped\n"
