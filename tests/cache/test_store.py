"""Entries on disk: written whole, private, hashed, bounded; whatever is wrong with one is told and never read."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_fx.cache import listing
from moe_fx.cache.store import FORMAT, Store, key_of
from moe_fx.errors import CacheError

COMPONENTS = {"graph": "g" * 64, "options": "o" * 64}
BODY = b'{"nodes": []}\nsecond line\x00\xff'


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "made" / "on demand")


def test_what_is_written_is_read(store: Store) -> None:
    path = store.write("graph", COMPONENTS, BODY, variant="v1", about={"target": "cpu"})
    (found,) = store.find(key_of("graph", COMPONENTS))
    header, body = store.read(found)
    assert found == path and body == BODY
    assert (header.kind, header.components, header.variant, header.about) == (
        "graph",
        COMPONENTS,
        "v1",
        {"target": "cpu"},
    )
    assert store.header(path) == header
    assert abs(header.created - time.time()) < 60


def test_any_other_component_is_another_key() -> None:
    keys = {
        key_of("graph", COMPONENTS),
        key_of("torchair", COMPONENTS),
        key_of("graph", {**COMPONENTS, "options": "p" * 64}),
        key_of("graph", {**COMPONENTS, "more": ""}),
        key_of("graph", {"graph": COMPONENTS["options"], "options": COMPONENTS["graph"]}),
    }
    assert len(keys) == 5
    assert key_of("graph", dict(reversed(COMPONENTS.items()))) == key_of("graph", COMPONENTS)


def test_folder_and_entries_are_private(store: Store) -> None:
    old = os.umask(0)
    try:
        folder = Store(store.folder.parent.parent / "other").folder
        path = store.write("graph", COMPONENTS, BODY)
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_every_truncation_is_noticed(store: Store) -> None:
    path = store.write("graph", COMPONENTS, BODY)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CacheError, match="truncated or damaged"):
            store.read(path)


def test_every_changed_byte_is_noticed(store: Store) -> None:
    path = store.write("graph", COMPONENTS, BODY)
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CacheError):
            store.read(path)


def test_more_at_the_end_is_noticed(store: Store) -> None:
    path = store.write("graph", COMPONENTS, BODY)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CacheError, match="do not have their hash"):
        store.read(path)


def test_another_format_is_named(store: Store) -> None:
    path = store.write("graph", COMPONENTS, BODY)
    path.write_bytes(path.read_bytes().replace(f"moe-fx-cache {FORMAT} ".encode(), b"moe-fx-cache 999 ", 1))
    with pytest.raises(CacheError, match="has format 999; this moe-fx reads format"):
        store.read(path)


def test_an_entry_under_the_name_of_another_is_refused(store: Store) -> None:
    path = store.write("graph", COMPONENTS, BODY)
    other = store.write("graph", {**COMPONENTS, "options": "x"}, b"other")
    other.write_bytes(path.read_bytes())
    with pytest.raises(CacheError, match="made for something else"):
        store.read(other)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602])
def test_an_entry_open_to_others_is_not_trusted(store: Store, mode: int) -> None:
    path = store.write("graph", COMPONENTS, BODY)
    path.chmod(mode)
    with pytest.raises(CacheError, match=rf"open to others \(mode {mode:o}, not 600\)"):
        store.read(path)


def test_an_entry_of_another_user_is_not_trusted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.write("graph", COMPONENTS, BODY)
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(CacheError, match=f"belongs to user {owner}, not to you"):
        store.read(path)


def test_a_link_is_not_followed(store: Store, tmp_path: Path) -> None:
    path = store.write("graph", COMPONENTS, BODY)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(CacheError, match="cannot be read"):
        store.read(path)


def test_a_folder_of_another_user_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = store.folder.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(CacheError, match=f"belongs to user {owner}, who could change its entries; set cache_dir"):
        Store(store.folder.parent)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(store: Store, mode: int) -> None:
    store.folder.chmod(mode)
    with pytest.raises(CacheError, match=r"others may write to the cache directory .*run: chmod 700"):
        Store(store.folder.parent)


def test_a_folder_that_others_may_only_read_is_taken(store: Store) -> None:
    store.folder.chmod(0o755)
    Store(store.folder.parent)


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
def test_a_folder_that_others_may_put_another_in_the_place_of_is_refused(store: Store, mode: int) -> None:
    store.folder.parent.chmod(mode)
    with pytest.raises(CacheError, match=rf"another directory in the place of .* \(mode {mode:o} .*run: chmod go-w"):
        Store(store.folder.parent)


def test_a_folder_in_one_like_tmp_is_taken(store: Store) -> None:
    store.folder.parent.chmod(0o1777)
    Store(store.folder.parent)


def test_a_folder_that_is_swapped_is_never_looked_at(store: Store) -> None:
    path = store.write("graph", COMPONENTS, BODY)
    own = store.folder.rename(store.folder.with_name("moved away"))
    store.folder.mkdir()
    for name in (path.name, "other.entry", "other.tmp"):
        (store.folder / name).write_bytes(b"another's")
    os.utime(store.folder / "other.tmp", (0, 0))
    assert store.find(key_of("graph", COMPONENTS)) == store.files() == [path]
    assert store.read(path)[1] == BODY and store.header(path).kind == "graph"
    assert list(store.verify()) == [(path, "")]
    store.touch(path)
    written = store.write("graph", {**COMPONENTS, "more": ""}, b"new")
    assert sorted(own.iterdir()) == sorted([own / path.name, own / written.name])
    assert store.clear() == 2 and not list(own.iterdir())
    assert sorted(p.name for p in store.folder.iterdir()) == sorted([path.name, "other.entry", "other.tmp"])


def test_looking_at_a_cache_that_is_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path / "none", create=False)
    assert store.files() == store.find("a") == list(store.verify()) == [] and store.clear() == 0
    with pytest.raises(FileNotFoundError):
        store.read(store.folder / "a.entry")
    assert not (tmp_path / "none").exists()


def test_the_open_folder_is_closed_with_the_store(store: Store) -> None:
    another = Store(store.folder.parent)
    descriptor = another._descriptor
    assert descriptor is not None and os.path.sameopenfile(descriptor, store._descriptor or 0)
    del another
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    real = Store(tmp_path / "real").folder
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / real.name).symlink_to(real)
    with pytest.raises(CacheError, match="is no directory"):
        Store(tmp_path / "cache")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot be made \(.*\); set cache_dir or MOE_FX_CACHE_DIR"):
        Store(tmp_path / "file" / "cache")


def test_looking_makes_no_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "none", create=False)
    assert store.files() == [] and store.clear() == 0 and list(store.verify()) == []
    assert not (tmp_path / "none").exists()


def test_the_least_recently_used_are_dropped(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_bytes=4000)
    paths = []
    for number in range(3):
        paths.append(store.write("graph", {"graph": str(number)}, b"x" * 1000))
        os.utime(paths[-1], (0, number + 1))
    store.touch(paths[0])  # Used last, though it was written first.
    new = store.write("graph", {"graph": "new"}, b"x" * 1000)
    assert sum(path.stat().st_size for path in store.files()) <= 4000
    assert set(store.files()) == {paths[0], paths[2], new}


def test_the_entry_just_written_stays_even_if_it_exceeds_the_limit(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_bytes=100)
    store.write("graph", {"graph": "first"}, b"x" * 1000)
    second = store.write("graph", {"graph": "second"}, b"x" * 1000)
    assert store.files() == [second]


def test_what_cannot_be_removed_is_not_counted(store: Store) -> None:
    store.write("graph", COMPONENTS, BODY)
    (store.folder / "x.entry").mkdir()
    assert store.clear() == 1 and [path.name for path in store.files()] == ["x.entry"]


def test_what_a_dead_writer_left_is_swept_and_a_live_one_is_let_be(store: Store) -> None:
    dead, live = store.folder / "a.tmp", store.folder / "b.tmp"
    for path in (dead, live):
        path.write_bytes(b"half")
    os.utime(dead, (0, 0))
    store.write("graph", COMPONENTS, BODY)
    assert not dead.exists() and live.exists()
    assert len(store.files()) == 1


def test_a_failed_write_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CacheError, match="No space left on device"):
        store.write("graph", COMPONENTS, BODY)
    assert list(store.folder.iterdir()) == []


def test_verify_and_listing_tell_good_from_bad(store: Store) -> None:
    good = store.write("graph", COMPONENTS, BODY, about={"target": "cpu", "matched": {"router": 2}})
    bad = store.write("graph", {"graph": "bad"}, BODY)
    bad.write_bytes(bad.read_bytes()[:-1])
    torn = store.write("graph", {"graph": "torn"}, BODY)
    torn.write_bytes(b"")
    problems = dict(store.verify())
    assert problems[good] == "" and "damaged" in problems[bad] and "damaged" in problems[torn]
    assert {row["entry"]: row["verdict"] == "good" for row in listing.verdicts(store)} == {
        good.name: True,
        bad.name: False,
        torn.name: False,
    }
    rows = {row["key"]: row for row in listing.entries(store)}
    assert rows[good.name[:12]]["what"] == "cpu (2 router)" and rows[good.name[:12]]["made"] == "just now"
    assert rows[torn.name[:12]]["kind"] == "unusable"


WRITER = """
import sys
from moe_fx.cache.store import Store
store = Store(sys.argv[1], limit_bytes=60_000)
for number in range(150):
    store.write("graph", {"graph": str(number % 5)}, sys.argv[2].encode() * 5_000)
    for path in store.files():
        try:
            store.read(path)
        except FileNotFoundError:
            pass
"""


def test_concurrent_writers_and_readers_never_see_half_an_entry(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), letter], stderr=subprocess.PIPE, text=True)
        for letter in "abc"
    ]
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], errors
    assert all(problem == "" for _, problem in Store(tmp_path).verify())
    assert not list(Store(tmp_path).folder.glob("*.tmp"))
