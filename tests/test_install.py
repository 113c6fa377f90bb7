"""Models in the data folder: brought in from elsewhere, verified bit by bit, removed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine import catalog, install, records
from engine.install import Installed
from engine.packs import open_pack
from engine.records import Known, Record
from engine.transfer import Progress
from engine.types import BadRequest

SHARED = Path("/work/shared/bonsai-release-files.json")
TRANSFORMER = "transformer-packed-mflux/diffusion_pytorch_model.safetensors"


@pytest.fixture
def stick(tiny_packs: Path, tmp_path: Path) -> Path:
    """A pack on a USB stick, with licence, pickle and what macOS leaves behind."""
    folder = tmp_path / "stick" / "my pack"
    shutil.copytree(tiny_packs / "ternary", folder)
    (folder / "NOTICE.md").write_text("a notice")
    (folder / "transformer-packed-mflux" / "state.pt").write_bytes(b"a pickle")
    (folder / "transformer-packed-mflux" / "._diffusion_pytorch_model.safetensors").write_bytes(b"macOS")
    return folder


def bring(folder: Path, data: Path, *more: Any) -> Installed:
    *steps, last = install.import_folder(folder, data, *more)
    assert all(isinstance(step, Progress) for step in steps)
    assert isinstance(last, Installed)
    return last


def faults(model: str, data: Path) -> list[str]:
    return [path for path, ok, _ in install.verify(model, data) if not ok]


def flip(file: Path, place: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.unlink()
    file.write_bytes(data)


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_comes_in_verified(stick: Path, tmp_path: Path, link: bool) -> None:
    data = tmp_path / "data"
    installed = bring(stick, data, None, link)
    assert (installed.model, installed.folder) == ("tiny-ternary", data / "models" / "tiny-ternary")
    assert faults("tiny-ternary", data) == [] and catalog.imported(data) == ("tiny-ternary",)
    pack = open_pack(catalog.find("tiny-ternary", data))
    assert os.path.samefile(pack.folder / TRANSFORMER, stick / TRANSFORMER) is link
    assert (pack.folder / "NOTICE.md").read_text() == "a notice"
    assert not list(pack.folder.rglob("*.pt")) and not list(pack.folder.rglob("._*"))
    assert "of its" in installed.note and "recorded now" in installed.note  # the notice was in nobody's list
    assert [path.name for path in (data / "models").iterdir() if path.is_dir()] == ["tiny-ternary"]


def test_links_across_disks_are_symbolic(stick: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def other_disk(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    folder = bring(stick, tmp_path / "data", "mine", True).folder
    assert (folder / TRANSFORMER).is_symlink() and faults("mine", tmp_path / "data") == []
    assert install.remove("mine", tmp_path / "data") < 100_000  # the notes alone: links have no bytes of their own
    assert (stick / TRANSFORMER).exists()


def test_a_damaged_or_incomplete_folder_is_refused_by_file(stick: Path, tmp_path: Path) -> None:
    flip(stick / TRANSFORMER)
    for link in (False, True):
        with pytest.raises(BadRequest, match=f"{TRANSFORMER} is damaged: its SHA-256 is .* copy or fetch it again"):
            bring(stick, tmp_path / "data", None, link)
    flip(stick / TRANSFORMER)
    (stick / "vae" / "config.json").rename(stick / "vae" / "gone")
    with pytest.raises(BadRequest, match=r"vae/config.json"):
        bring(stick, tmp_path / "data")
    (stick / "vae" / "gone").rename(stick / "vae" / "config.json")
    (stick / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(BadRequest, match="lacks scheduler/scheduler_config.json, which tiny-ternary has"):
        bring(stick, tmp_path / "data")
    assert not (tmp_path / "data" / "models" / "tiny-ternary").exists()
    assert [path for path in (tmp_path / "data" / "models").iterdir() if path.is_dir()] == []


def test_the_record_of_an_earlier_download_counts_more_than_the_folders_word(stick: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    files = {
        path.relative_to(stick).as_posix(): Known(path.stat().st_size)
        for path in stick.rglob("*")
        if path.is_file() and install.wanted(path.relative_to(stick).as_posix())
    }
    records.write("bonsai-ternary", data, Record("x/y", "a" * 40, files | {TRANSFORMER: Known(1, "0" * 64)}))
    with pytest.raises(BadRequest, match=f"{TRANSFORMER} is damaged: it has .* bytes where 1 are recorded"):
        bring(stick, data, "bonsai-ternary")
    records.write("bonsai-ternary", data, Record("x/y", "a" * 40, files))
    bring(stick, data, "bonsai-ternary")
    assert catalog.default_id(data) == "bonsai-ternary"
    kept = records.read("bonsai-ternary", data)
    assert kept and kept.revision == "a" * 40 and all(known.sha256 for known in kept.files.values())


def test_a_folder_without_notes_is_known_by_the_release_it_is_named_after(tmp_path: Path) -> None:
    cache = tmp_path / "models--prism-ml--bonsai-image-binary-4B-mlx-1bit" / "snapshots" / "abc"
    assert install._id(cache, None) == "bonsai-binary"
    assert install._id(tmp_path / "bonsai-image-ternary-4B-mlx-2bit", None) == "bonsai-ternary"
    assert install._id(tmp_path / "மரம் (copy)", None) == "copy"
    assert install._id(tmp_path / "...", None) == "imported"


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "x" * 200, "con:"])
def test_a_name_that_can_be_no_folder_is_refused(stick: Path, tmp_path: Path, name: str) -> None:
    if name:
        with pytest.raises(BadRequest, match="cannot be a model's id"):
            bring(stick, tmp_path / "data", name)
    with pytest.raises(BadRequest, match="is not installed in"):
        install.remove(name, tmp_path / "data")


def test_taken_and_shipped_names_are_refused(stick: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with pytest.raises(BadRequest, match="seedling-binary is shipped"):
        bring(stick, data, "seedling-binary")
    bring(stick, data)
    with pytest.raises(BadRequest, match="exists: remove tiny-ternary first, or import under another name"):
        bring(stick, data)
    assert bring(stick, data, "second").model == "second"


def test_a_gemlite_folder_is_held_to_the_published_hashes(tmp_path: Path, monkeypatch: Any) -> None:
    from tests.packs import full
    from tests.packs.content import Content, small

    source = tmp_path / "bonsai-image-ternary-4B-gemlite-2bit"
    full.write(source, "gemlite", Content(small(), "ternary", 0))
    small_ones = {"hidden_states": [1, 2, 3], "text_length": 64, "sizes": [[64, 64]]}
    files = {
        file.relative_to(source).as_posix(): Known(file.stat().st_size, install._sha256(file))
        for file in source.rglob("*")
        if file.is_file()
    }
    (source / "niwaki.json").write_text(json.dumps(small_ones))
    files |= {"transformer-gemlite-int2/gemlite_autotune.json": Known(3)}  # nobody needs it
    monkeypatch.setattr(install, "RELEASES", {"bonsai-ternary": Record("x/y", "a" * 40, files)})
    monkeypatch.setattr(install, "_id", lambda *_: "converted")
    installed = bring(source, tmp_path / "data")
    assert f"the files are those of x/y at {'a' * 40}" in installed.note
    flip(source / "vae" / "config.json", 3)
    install.remove("converted", tmp_path / "data")
    with pytest.raises(BadRequest, match="vae/config.json is damaged: its SHA-256 is"):
        bring(source, tmp_path / "data")
    assert not (tmp_path / "data" / "models" / "converted").exists()
    (source / "vae" / "config.json").unlink()
    with pytest.raises(BadRequest, match="lacks vae/config.json of x/y"):
        bring(source, tmp_path / "data")


def test_every_release_is_known_by_name_and_by_the_size_of_its_transformer(tmp_path: Path) -> None:
    for name, release in install.RELEASES.items():
        folder = tmp_path / str(release.repository).partition("/")[2]
        assert install._id(folder, None) == name and install._release(folder) is None
        (path,) = (path for path in release.files if path.endswith("state_dict.pt"))
        (folder / path).parent.mkdir(parents=True)
        with (folder / path).open("wb") as stream:
            stream.truncate(release.files[path].bytes)  # a hole: no bytes on the disk
        assert install._release(folder) is release
        with pytest.raises(BadRequest, match="lacks manifest.json of prism-ml/"):
            list(install._hold(folder, release))


@pytest.mark.skipif(not SHARED.exists(), reason="the shared page of released files is not on this machine")
def test_the_releases_agree_with_the_shared_page() -> None:
    page = json.loads(SHARED.read_text())
    for release in install.RELEASES.values():
        known = page[release.repository]
        assert release.revision == known["revision"]
        assert {path: (file.bytes, file.sha256) for path, file in release.files.items()} == {
            file["path"]: (file["bytes"], file["sha256"]) for file in known["files"]
        }


def test_no_pack_no_space(stick: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(BadRequest, match="no model folder|has no folder"):
        bring(tmp_path, tmp_path / "data")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(BadRequest, match="are needed in .* 1.00 kB are free there"):
        bring(stick, tmp_path / "data")
    assert bring(stick, tmp_path / "data", None, True).model == "tiny-ternary"  # links need none


def test_any_changed_bit_is_found(stick: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    folder = bring(stick, data).folder
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        before = file.read_bytes()
        place = before.rindex(b"bytes") + 8 if file.name == "niwaki.json" else len(before) // 2
        flip(file, place)
        name = file.relative_to(folder).as_posix()
        try:
            assert name in faults("tiny-ternary", data), name
        except BadRequest as refused:  # it doesn't even open, and says which file
            assert file.name in str(refused), name
        file.write_bytes(before)
    assert faults("tiny-ternary", data) == []


def test_notes_that_were_changed_to_fit_changed_weights_are_found(stick: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    folder = bring(stick, data).folder
    flip(folder / TRANSFORMER)
    notes = json.loads((folder / "niwaki.json").read_text())
    notes["files"][TRANSFORMER]["sha256"] = install._sha256(folder / TRANSFORMER)
    (folder / "niwaki.json").write_text(json.dumps(notes))
    assert "niwaki.json" in faults("tiny-ternary", data)


def test_weights_that_nobody_recorded_are_found(stick: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    folder = bring(stick, data).folder
    empty = b"{}".ljust(8)
    (folder / "vae" / "more.safetensors").write_bytes(len(empty).to_bytes(8, "little") + empty)
    assert faults("tiny-ternary", data) == ["vae/more.safetensors"]


def test_removing_frees_everything_and_keeps_the_record(stick: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    folder = bring(stick, data).folder
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    half = data / "models" / ".tiny-ternary.get"
    half.mkdir()
    (half / "x.part").write_bytes(b"12345")
    assert install.remove("tiny-ternary", data) == total + 5
    assert not folder.exists() and not half.exists() and records.read("tiny-ternary", data)
    with pytest.raises(BadRequest, match="'tiny-ternary' is not installed"):
        install.remove("tiny-ternary", data)
    with pytest.raises(BadRequest, match="shipped with Niwaki and cannot be removed"):
        install.remove("seedling-ternary", data)


def test_removing_a_link_leaves_what_it_points_to(stick: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "models").mkdir(parents=True)
    (tmp_path / "data" / "models" / "bonsai-ternary").symlink_to(stick)
    assert install.remove("bonsai-ternary", tmp_path / "data") == 0
    assert (stick / TRANSFORMER).exists() and catalog.installed(tmp_path / "data") == catalog.installed(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"files": {"../x": {"bytes": 1}}, "repository": null, "revision": null, "notes_sha256": null}',
     '{"files": {"x": {"bytes": -1}}, "repository": null, "revision": null, "notes_sha256": null}',
     '{"files": {"x": {"bytes": 1, "sha256": "z"}}, "repository": null, "revision": null, "notes_sha256": null}',
     '{"files": {}, "repository": 3, "revision": null, "notes_sha256": null}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_record_is_said_so(text: str, tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    records.path_of("x", tmp_path).write_text(text)
    with pytest.raises(BadRequest, match="x.json is damaged .*: delete it"):
        records.read("x", tmp_path)
