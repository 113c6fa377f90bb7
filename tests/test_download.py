"""Fetching a model from a hub of our own that breaks connections, corrupts bytes and changes its mind."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from engine import catalog, download, install, records
from engine.download import Terms
from engine.install import Installed
from engine.packs import open_pack
from engine.transfer import Progress
from engine.types import BadRequest, EngineError
from tests.hub import COMMIT, Hub, serving
from tests.packs.writers import Dims, write_pack

ROOT = Path(__file__).parent.parent
ID = "bonsai-binary"  # its branch is not pinned by us
TRANSFORMER = "transformer-packed-mflux/diffusion_pytorch_model.safetensors"
NOTICE = "Bonsai Image 4B\nCopyright PrismML"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository like the published ones: no niwaki.json, LICENSE and NOTICE.md, and things that nobody wants."""
    dims = Dims(layers=28, states=(9, 18, 27), text_length=512)
    folder = write_pack(tmp_path_factory.mktemp("hub") / "released", "binary", dims)
    (folder / "niwaki.json").unlink()
    (folder / "LICENSE").write_text("\n   Apache License\n   Version 2.0, January 2004\n\n  1. Definitions.\n")
    (folder / "NOTICE.md").write_text(NOTICE)
    (folder / "README.md").write_text("a model card")
    (folder / "transformer.safetensors").write_bytes(b"a second copy of everything")
    (folder / "transformer-packed-mflux" / "evil.pt").write_bytes(b"a pickle")
    (folder / "picture.png").write_bytes(b"a picture")
    return folder


@pytest.fixture
def hub(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "PAUSES", (0, 0, 0))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving(released) as hub:
        point_at(hub.address, monkeypatch)
        yield hub


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, for a library that is imported already."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def fetch(data: Path, model: str = ID) -> list[Any]:
    return list(download.get(model, data))


def is_whole(data: Path, released: Path, model: str = ID) -> bool:
    folder = data / "models" / model
    sound = all(ok for _, ok, _ in install.verify(model, data))
    return sound and (folder / TRANSFORMER).read_bytes() == (released / TRANSFORMER).read_bytes()


def nothing_is_there(data: Path, model: str = ID) -> bool:
    return model not in catalog.installed(data) and not (data / "models" / model).exists()


def test_a_model_is_fetched_verified_and_described(hub: Hub, released: Path, tmp_path: Path) -> None:
    steps = fetch(tmp_path)
    assert isinstance(steps[-1], Installed) and steps[-1].folder == tmp_path / "models" / ID
    assert is_whole(tmp_path, released)
    assert catalog.installed(tmp_path)[-1] == catalog.default_id(tmp_path) == ID
    pack = open_pack(catalog.find(ID, tmp_path))
    assert (pack.id, pack.notes.label) == (ID, "Bonsai Image 4B, 1-bit weights")
    assert pack.notes.provenance == {"repository": "prism-ml/bonsai-image-binary-4B-mlx-1bit", "revision": COMMIT}
    there = {file.relative_to(pack.folder).as_posix() for file in pack.folder.rglob("*") if file.is_file()}
    assert there == pack.notes.files.keys() | {"niwaki.json"}
    assert {"LICENSE", "NOTICE.md"} <= there  # they travel with the weights
    assert not any("evil" in name or name.endswith(".png") or name == "transformer.safetensors" for name in there)
    assert not list((tmp_path / "models").glob(".*.get"))


def test_progress_counts_every_byte_once_and_tells_rate_and_time_left(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(x / 10 for x in range(100_000))
    monkeypatch.setattr("engine.transfer.time", SimpleNamespace(monotonic=lambda: next(clock)))
    steps = [step for step in fetch(tmp_path) if isinstance(step, Progress)]
    total = records.read(ID, tmp_path).bytes  # type: ignore[union-attr]
    assert len(steps) > 5 and {step.total for step in steps} == {total}
    assert [step.done for step in steps] == sorted(step.done for step in steps) and steps[-1].done <= total
    rated = [step for step in steps if step.rate]
    assert rated and all(step.seconds_left == (total - step.done) / step.rate for step in rated)  # type: ignore[operator]


def test_licence_and_notice_come_before_anything_else(hub: Hub, tmp_path: Path) -> None:
    steps = download.get(ID, tmp_path)
    terms = next(step for step in steps if not isinstance(step, Progress))
    assert isinstance(terms, Terms) and (terms.licence, terms.notice, terms.pinned) == ("Apache-2.0", NOTICE, False)
    assert "Version 2.0, January 2004" in terms.licence_text and terms.revision == COMMIT
    assert set(hub.paths()) == {"LICENSE", "NOTICE.md"}
    steps.close()  # the person says no
    assert set(hub.paths()) == {"LICENSE", "NOTICE.md"} and nothing_is_there(tmp_path)


def test_nothing_but_the_models_files_is_asked_for_and_nothing_told(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path)
    for path, headers in hub.asked:
        assert path.removeprefix("/api/models").startswith("/prism-ml/bonsai-image-binary-4B-mlx-1bit")
        assert "authorization" not in headers and "cookie" not in headers
        assert not any(word in headers["user-agent"] for word in ("torch", "agent/", "diffusers"))
    assert {f"/resolve/{COMMIT}/" in path for path, _ in hub.asked if "/resolve/" in path} == {True}
    assert sorted(hub.paths()) == sorted(records.read(ID, tmp_path).files)  # type: ignore[union-attr]


def test_a_token_is_sent_only_when_it_was_set_for_this(hub: Hub, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(tmp_path)
    assert {headers.get("authorization") for _, headers in hub.asked} == {"Bearer hf_secret"}


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_connections_are_taken_up_where_they_broke(
    hub: Hub, released: Path, tmp_path: Path, ranges: bool
) -> None:
    hub.ranges = ranges
    size = (released / TRANSFORMER).stat().st_size
    hub.cut[TRANSFORMER] = [size // 2, 10, 0, size // 2 + 100 if not ranges else 100]
    steps = fetch(tmp_path)
    assert is_whole(tmp_path, released) and hub.cut[TRANSFORMER] == []
    starts = [headers.get("range") for path, headers in hub.asked if path.endswith(TRANSFORMER)]
    assert starts[:2] == [None, f"bytes={size // 2}-"] and len(starts) == 5
    assert any(isinstance(step, Progress) and step.path == TRANSFORMER for step in steps)


def test_a_connection_that_never_gets_further_is_given_up_and_resumed_later(
    hub: Hub, released: Path, tmp_path: Path
) -> None:
    hub.cut[TRANSFORMER] = [1000, *[0] * 100]
    with pytest.raises(EngineError, match=r"broke 4 times in a row at byte 1000 of \d+ .* it goes on there"):
        fetch(tmp_path)
    assert nothing_is_there(tmp_path)
    hub.cut.clear()
    hub.asked.clear()
    fetch(tmp_path)
    assert is_whole(tmp_path, released)
    assert [headers.get("range") for path, headers in hub.asked if path.endswith(TRANSFORMER)] == ["bytes=1000-"]


@pytest.mark.parametrize("path", [TRANSFORMER, "model_index.json"])  # with a SHA-256 of the hub, with a git hash only
def test_wrong_bytes_are_fetched_again_once_and_never_installed(
    hub: Hub, released: Path, tmp_path: Path, path: str
) -> None:
    hub.corrupt[path] = 1
    fetch(tmp_path / "a")
    assert is_whole(tmp_path / "a", released) and hub.paths().count(path) == 2
    hub.corrupt[path] = 2
    with pytest.raises(EngineError, match=f"{path} of .* came twice with wrong bytes .*(SHA-256|git hash) is"):
        fetch(tmp_path / "b")
    assert nothing_is_there(tmp_path / "b")
    fetch(tmp_path / "b")
    assert is_whole(tmp_path / "b", released)


def test_what_changed_on_the_disk_between_two_calls_is_found(hub: Hub, released: Path, tmp_path: Path) -> None:
    hub.cut[TRANSFORMER] = [1000, *[0] * 100]
    with pytest.raises(EngineError):
        fetch(tmp_path)
    aside = tmp_path / "models" / f".{ID}.get"
    for file in (aside / "tokenizer" / "tokenizer.json", aside / f"{TRANSFORMER}.part"):
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
    (aside / "transformer-packed-mflux" / "left-over.safetensors").write_bytes(b"of an earlier version")
    hub.cut.clear()
    fetch(tmp_path)
    assert is_whole(tmp_path, released)
    assert not (tmp_path / "models" / ID / "transformer-packed-mflux" / "left-over.safetensors").exists()


def test_a_busy_hub_is_asked_again_and_a_closed_one_is_not(hub: Hub, tmp_path: Path) -> None:
    hub.status[TRANSFORMER] = [503, 429]
    hub.status["NOTICE.md"] = [403]
    with pytest.raises(EngineError, match=r"does not hand out .*\(403\).*HF_TOKEN"):
        fetch(tmp_path)
    assert hub.paths().count("NOTICE.md") == 1
    fetch(tmp_path)
    assert hub.paths().count(TRANSFORMER) == 3
    hub.status["LICENSE"] = [404]
    with pytest.raises(EngineError, match="404 for LICENSE"):
        fetch(tmp_path / "other")


def test_closing_stops_and_the_next_call_goes_on(hub: Hub, released: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("engine.transfer.REPORT_SECONDS", 0)
    steps = download.get(ID, tmp_path)
    for step in steps:
        if isinstance(step, Progress) and step.path == TRANSFORMER:
            break
    steps.close()
    assert nothing_is_there(tmp_path)
    assert (tmp_path / "models" / f".{ID}.get" / f"{TRANSFORMER}.part").stat().st_size > 0
    before = len(hub.asked)
    fetch(tmp_path)
    assert is_whole(tmp_path, released)
    assert not any(path.startswith("/api/") for path, _ in hub.asked[before:])  # the record knows the files


def test_two_downloads_of_one_model_do_not_mix(hub: Hub, released: Path, tmp_path: Path) -> None:
    steps = download.get(ID, tmp_path)
    next(steps)
    with pytest.raises(BadRequest, match="by another process: wait"):
        fetch(tmp_path)
    with pytest.raises(BadRequest, match="by another process"):
        install.remove(ID, tmp_path)
    assert isinstance(list(steps)[-1], Installed)
    assert is_whole(tmp_path, released)


def test_what_is_installed_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path)
    before = len(hub.asked)
    (again,) = fetch(tmp_path)
    assert isinstance(again, Installed) and "was there already" in again.note and len(hub.asked) == before
    (tmp_path / "models" / ID / TRANSFORMER).write_bytes(b"")
    with pytest.raises(BadRequest, match="cut short or foreign"):
        fetch(tmp_path)


def test_an_unpinned_branch_is_resolved_once_and_held_to(hub: Hub, released: Path, tmp_path: Path) -> None:
    fetch(tmp_path)
    install.remove(ID, tmp_path)
    assert nothing_is_there(tmp_path)
    other = tmp_path / "changed"
    shutil.copytree(released, other)
    hub.folder, hub.commit, hub.asked = other, "f" * 40, []
    fetch(tmp_path)  # the branch moved on: still the recorded commit
    assert {path.split("/resolve/")[1].partition("/")[0] for path, _ in hub.asked} == {COMMIT}
    install.remove(ID, tmp_path)
    (other / "model_index.json").write_text('{"_class_name": "SomethingElse"}')  # the same commit, other bytes
    with pytest.raises(EngineError, match="model_index.json of .* has 32 bytes where 81 are recorded"):
        fetch(tmp_path)
    assert nothing_is_there(tmp_path)


def test_a_pinned_commit_is_asked_for_and_no_other_taken(hub: Hub, released: Path, tmp_path: Path) -> None:
    pinned = catalog.MODELS["bonsai-ternary"].revision
    with pytest.raises(EngineError, match=f"answers with commit {COMMIT} where {pinned} was asked for"):
        fetch(tmp_path, "bonsai-ternary")
    hub.commit = str(pinned)
    terms = next(step for step in download.get("bonsai-ternary", tmp_path) if isinstance(step, Terms))
    assert terms.pinned and terms.revision == pinned
    assert all(f"/revision/{pinned}" in path for path, _ in hub.asked if path.startswith("/api/"))
    records.write("bonsai-ternary", tmp_path, records.Record(terms.repository, "a" * 40))  # an older pin's record
    fetch(tmp_path, "bonsai-ternary")
    assert records.read("bonsai-ternary", tmp_path).revision == pinned  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ["../../evil.safetensors", "transformer/..\\x.json", "vae/c:x.json"])
def test_a_list_that_leaves_the_folder_is_refused(hub: Hub, tmp_path: Path, path: str) -> None:
    hub.extra = [{"rfilename": path, "size": 1, "blobId": "0" * 40}]
    if install.wanted(path):
        with pytest.raises(EngineError, match="not to be trusted"):
            fetch(tmp_path)
    else:
        fetch(tmp_path)
    assert not list(tmp_path.parent.glob("evil*"))


def test_a_list_without_hashes_or_weights_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.extra = [{"rfilename": "vae/x.json", "size": 1}]
    with pytest.raises(EngineError, match="no size or hash for vae/x.json"):
        fetch(tmp_path)
    hub.extra = []
    hub.folder = tmp_path / "empty"
    hub.folder.mkdir()
    with pytest.raises(EngineError, match="holds no weights in safetensors"):
        fetch(tmp_path)


def test_too_little_space_is_said_before_the_weights_come(hub: Hub, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=200_100_000))
    with pytest.raises(BadRequest, match=r"\d.* are needed in .* and 200.10 MB are free there"):
        fetch(tmp_path)
    assert set(hub.paths()) == {"LICENSE", "NOTICE.md"}
    free = shutil.disk_usage(tmp_path).free
    assert free == 200_100_000 and nothing_is_there(tmp_path)


def test_a_full_disk_is_no_broken_connection(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(BadRequest, match=r"cannot write .*models.*: free some space"):
        fetch(tmp_path)


def test_offline_is_said_with_a_way_out(hub: Hub, tmp_path: Path, monkeypatch: Any) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)  # nobody listens there
    with pytest.raises(EngineError, match="hub cannot be reached .*: check the network, or bring the folder on a"):
        fetch(tmp_path)
    records.write(ID, tmp_path, records.Record(catalog.MODELS[ID].repository, COMMIT, {"LICENSE": records.Known(5)}))
    with pytest.raises(EngineError, match="hub cannot be reached .*models import FOLDER"):
        fetch(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for data in (tmp_path, tmp_path / "new"):
        with pytest.raises(EngineError, match="HF_HUB_OFFLINE is set"):
            fetch(data)


def test_klein_comes_without_its_second_copy_and_draws(hub: Hub, tmp_path: Path) -> None:
    """The unpacked diffusers layout, sharded as Klein's encoder is, on the same engine."""
    from engine.hardware import detect
    from engine.torch_backend.backend import TorchBackend
    from engine.types import Picture, Request
    from tests.packs import full, layouts
    from tests.packs.content import Configs, Content, small

    tiny = small()
    configs = Configs(tiny.transformer, tiny.text_encoder | {"num_hidden_layers": 28}, tiny.vae)
    hub.folder = layouts.write_unpacked(
        tmp_path / "klein", Content(configs, "ternary", 0),
        lambda folder: full.write_tokenizer(folder, 512 - len(full.SPECIAL + full.ADDED)), shards=2,
    )  # fmt: skip
    (hub.folder / "flux-2-klein-4b.safetensors").write_bytes(b"the same weights once more")
    (hub.folder / "LICENSE.md").write_text("Apache License")
    fetch(tmp_path / "data", "klein-dense")
    pack = open_pack(catalog.find("klein-dense", tmp_path / "data"))
    assert pack.variant == "dense" and len(pack.text_encoder.files) == len(pack.transformer.files) == 2
    assert (pack.folder / "LICENSE.md").exists() and not (pack.folder / "flux-2-klein-4b.safetensors").exists()
    request = Request("a red circle", "klein-dense", 0, 64, 64, 1)
    *_, picture = TorchBackend(detect(), tmp_path / "data").generate(request, lambda: False)
    assert isinstance(picture, Picture) and picture.pixels.std() > 0


@pytest.mark.parametrize("model", ["seedling-ternary", "nonsense", "../x"])
def test_only_published_models_can_be_fetched(model: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="bonsai-ternary, bonsai-binary, klein-dense can be fetched"):
        fetch(tmp_path, model)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_download_is_no_model_and_goes_on(hub: Hub, released: Path, tmp_path: Path) -> None:
    """The real command in a process of its own, ended in the middle without a chance to tidy up."""
    hub.stall = threading.Event()
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "NIWAKI_DATA": str(tmp_path)}
    command = [sys.executable, str(ROOT / "app.py"), "models", "get", ID, "--json"]
    with (tmp_path / "output").open("w") as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        aside = tmp_path / "models" / f".{ID}.get"
        limit = time.monotonic() + 60
        while not list(aside.rglob("*.part")) and time.monotonic() < limit:
            time.sleep(0.05)
        child.kill()
        child.wait()
    hub.stall.set()
    hub.stall = None
    assert list(aside.rglob("*.part")) and nothing_is_there(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["path"] == str(tmp_path / "models" / ID) and is_whole(tmp_path, released)
    assert NOTICE in done.stdout and "Apache License, Version 2.0" in done.stdout and "not pinned by us" in done.stdout
