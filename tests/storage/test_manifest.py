"""An altered manifest is recognised, one of a later format is believed, and one without a checksum still opens."""

from __future__ import annotations

import errno
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.errors import CheckpointError
from lowvram.storage.checkpoint import Store, find_checkpoint, open_checkpoint
from lowvram.storage.disk import sha256
from lowvram.storage.json_files import read_object
from lowvram.storage.manifest import MANIFEST, OtherVersionError, checksum, is_sealed, read_manifest, seal
from tests.resign import remove_checksum, sign_anew, write_manifest


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the checkpoints of steps 1 and 2."""
    home = tmp_path_factory.mktemp("template")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (home / name).write_text("{}", encoding="utf-8")
    for step in (1, 2):
        weights, state = {"w": torch.full((3, 5), float(step))}, {"exp_avg.w": torch.ones(15)}
        Store(home / "run").save(weights, state, {"step": step}, {"model": {}}, home, {"data": "abc"})
    return home / "run"


@pytest.fixture
def two(template: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run directory with the checkpoints of steps 1 and 2, and the directory of the newer one."""
    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run", tmp_path / "run/step-00000002"


@pytest.mark.nightly
def test_every_bit_of_a_manifest_is_protected(two: tuple[Path, Path]) -> None:
    _, newest = two
    path = newest / "manifest.json"
    whole, data = read_manifest(newest), path.read_bytes()
    # Every byte, and of each byte another bit, drawn with a fixed seed; the heavy tests flip more.
    draw, refused = random.Random(13), 0
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            assert read_manifest(newest) == whole
        except OtherVersionError:
            pytest.fail(f"byte {place}: damage was believed to be a newer format")
        except CheckpointError:
            refused += 1
    assert refused > 0.9 * len(data), "white space alone may change"


ODD: dict[str, dict[str, Any]] = {
    "no files": {"files": {}},
    "null files": {"files": None},
    "a list of files": {"files": ["weights.safetensors"]},
    "a path out of the directory": {"files": {"../a": {"bytes": 1, "sha256": "0" * 64}}},
    "a negative step": {"step": -2},
    "a step of another directory": {"step": 1},
    "a step that is true": {"step": True},
    "a step that is a text": {"step": "2"},
    "a text as format": {"format": "1"},
    "a format that is true": {"format": True},
    "no format": {"format": None},
    "a negative format": {"format": -1},
    "versions of numbers": {"versions": {"lowvram": 1}},
    "versions that are a text": {"versions": "0.1.0"},
    "hashes that are a list": {"hashes": ["abc"]},
    "hashes of lists": {"hashes": {"data": ["abc"]}},
}


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])
def test_a_manifest_of_another_form_is_passed_over(
    two: tuple[Path, Path], changes: dict[str, Any], is_signed: bool
) -> None:
    run, newest = two
    if isinstance(changes.get("files"), dict) and changes["files"]:
        changes = {"files": read_manifest(newest)["files"] | changes["files"]}
    (sign_anew if is_signed else remove_checksum)(newest, **changes)
    found, passed_over = find_checkpoint(run)
    assert (found.step, len(passed_over)) == (1, 1)
    assert "manifest.json was altered" in str(passed_over[0])


@pytest.mark.parametrize("name", ["weights.safetensors", "state.safetensors", "state.json", "config.json"])
@pytest.mark.parametrize(
    "facts",
    [None, {}, {"bytes": -1, "sha256": "0" * 64}, {"bytes": 1.0, "sha256": "0" * 64}, {"bytes": 1, "sha256": 5}],
)
def test_every_file_must_be_listed_with_size_and_hash(
    two: tuple[Path, Path], name: str, facts: dict[str, Any] | None
) -> None:
    run, newest = two
    files = read_manifest(newest)["files"]
    rest = {other: files[other] for other in files if other != name}
    sign_anew(newest, files=rest if facts is None else rest | {name: facts})
    found, passed_over = find_checkpoint(run)
    assert found.step == 1
    assert name in str(passed_over[0])


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 1}', '{"a":' * 100_000, '{"step": NaN}', '{"step": ' + "9" * 5_000 + "}", "\0"],
    ids=["empty", "torn", "list", "null", "short", "deep", "NaN", "5,000 digits", "NUL"],
)
def test_a_text_that_is_no_manifest_is_passed_over(two: tuple[Path, Path], text: str) -> None:
    run, newest = two
    (newest / "manifest.json").write_text(text, encoding="utf-8")
    for look in (lambda: find_checkpoint(run)[0], lambda: Store(run).latest()[0]):
        found = look()
        assert found is not None
        assert found.step == 1


def test_a_checkpoint_without_a_checksum_opens_and_says_so(two: tuple[Path, Path]) -> None:
    run, newest = two
    assert find_checkpoint(run)[0].notice is None
    remove_checksum(newest)
    found, passed_over = find_checkpoint(run)
    assert (found.step, passed_over) == (2, [])
    assert (
        found.notice == f"{newest} was saved by an older lowvram: its manifest has no checksum. The next save has one."
    )


def test_a_checksum_whose_name_is_damaged_is_no_older_lowvram(two: tuple[Path, Path]) -> None:
    run, newest = two
    manifest = read_manifest(newest)
    write_manifest(newest, {"shb256" if key == "sha256" else key: value for key, value in manifest.items()})
    found, passed_over = find_checkpoint(run)
    assert found.step == 1
    assert "no checksum but an entry 'shb256'" in str(passed_over[0])


def test_a_version_before_the_checksum_finds_all_that_it_reads(two: tuple[Path, Path]) -> None:
    manifest = json.loads((two[1] / "manifest.json").read_text(encoding="utf-8"))
    assert manifest.keys() == {"format", "step", "versions", "hashes", "files", "sha256"}
    assert (manifest["format"], manifest["step"], manifest["hashes"]) == (1, 2, {"data": "abc"})
    assert "manifest.json" not in manifest["files"]


def test_a_signed_newer_format_is_never_passed_over_and_an_unsigned_one_is_damage(two: tuple[Path, Path]) -> None:
    run, newest = two
    for versions, last in (({"lowvram": "7.8.9"}, r"wrote it: 7\.8\.9\."), (None, r"the version that wrote it\.$")):
        # A later format may mean anything else by its other entries.
        write_manifest(newest, seal({"format": 2, "versions": versions, "files": []}))
        for look in (Store(run).latest, lambda: find_checkpoint(run), lambda: open_checkpoint(newest)):
            with pytest.raises(OtherVersionError, match=rf"format 2\..*reads format 1\. Update lowvram .*{last}"):
                look()
    assert newest.is_dir()
    manifest = read_manifest(run / "step-00000001") | {"format": 2, "step": 2}
    write_manifest(newest, manifest)  # whose checksum is of the format before
    assert find_checkpoint(run)[0].step == 1
    del manifest["sha256"]
    write_manifest(newest, manifest)
    assert find_checkpoint(run)[0].step == 1


def test_the_checksum_depends_on_contents_and_on_nothing_else() -> None:
    manifest = {"step": 3, "b": {"y": "ğ", "x": [1, 2.5, None]}}
    sealed = seal(manifest)
    assert (is_sealed(manifest), is_sealed(sealed)) == (False, True)
    assert sealed["sha256"] == checksum(sealed) == checksum(dict(reversed(sealed.items())))
    # Written down, since checkpoints of today must open in every later version.
    assert checksum(manifest) == "01083a92c0748e1e90dcf30c6042472afb15faa47b50af33311c5b8fadb5f07f"
    assert checksum(manifest | {"step": 4}) != sealed["sha256"]


@pytest.mark.parametrize("unreadable", ["weights.safetensors", MANIFEST])
@pytest.mark.parametrize("number, is_damage", [(errno.EIO, True), (errno.EACCES, False)], ids=["drive", "permission"])
def test_a_drive_that_cannot_read_a_file_is_damage_and_a_missing_permission_is_not(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: int, is_damage: bool, unreadable: str
) -> None:
    run, newest = two

    def refusing(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(path: Path, *more: object) -> Any:
            if path == newest / name:
                raise OSError(number, "refused", str(path))
            return read(path, *more)

        return refuse

    if unreadable == MANIFEST:
        monkeypatch.setattr("lowvram.storage.manifest.read_object", refusing(unreadable, read_object))
    else:
        monkeypatch.setattr("lowvram.storage.checkpoint.sha256", refusing(unreadable, sha256))
    if is_damage:
        found, passed_over = find_checkpoint(run)
        assert found.step == 1
        assert f"{unreadable} cannot be read. The drive says: refused." in str(passed_over[0])
    else:
        with pytest.raises(OSError, match="refused"):
            find_checkpoint(run)
