"""A directory as a store: killed writers, full disks, planted links."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fimo.orchestrator.store import LocalStore, NotFound
from fimo.orchestrator.store.local import STALE_AFTER_S, UNFINISHED
from fimo.workers.errors import StoreError

SIZE = 300_000


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore("runs", tmp_path / "runs")


def _write_for_ever(local: LocalStore, run: int) -> None:
    """The body of a writer process: creates and overwrites objects, each of one repeated byte."""
    number = 0
    while True:
        local.create(f"parts/{run:03d}-{number:05d}", bytes([number % 256]) * SIZE)
        local.put("heartbeat", bytes([number % 256]) * SIZE)
        number += 1


def test_a_writer_killed_at_any_moment_leaves_no_torn_object(local: LocalStore) -> None:
    rng = random.Random(0)
    for run in range(60):
        child = os.fork()
        if child == 0:
            try:
                _write_for_ever(local, run)
            finally:
                os._exit(1)
        # The last one has its time: on a slow disk nothing is written in a moment.
        time.sleep(rng.uniform(0.0, 0.03) if run < 59 else 1.0)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        for entry in local.list(f"parts/{run:03d}"):
            data = local.get(entry.key)
            assert len(data) == SIZE == entry.size
            assert data == data[:1] * SIZE
    assert {e.size for e in local.list("")} == {SIZE}
    heartbeat = local.get("heartbeat")
    assert heartbeat == heartbeat[:1] * SIZE
    # The kills did hit writes half-way, else this test has tested nothing.
    assert list((local.root / UNFINISHED).iterdir())
    assert not any(UNFINISHED in entry.key for entry in local.list(""))


def test_the_check_removes_temporaries_of_dead_writers_and_no_others(local: LocalStore) -> None:
    local.create("parts/kept", b"x")
    stale, young = local.root / UNFINISHED / "stale", local.root / UNFINISHED / "young"
    for file in (stale, young):
        file.write_bytes(b"half")
    a_day_ago = time.time() - STALE_AFTER_S - 60
    os.utime(stale, (a_day_ago, a_day_ago))
    os.utime(local.root / "parts/kept", (a_day_ago, a_day_ago))
    local.check()
    assert not stale.exists()
    assert young.exists()
    assert local.get("parts/kept") == b"x"


def test_a_full_disk_is_one_line_and_leaves_no_object(tmp_path: Path) -> None:
    """The file-size limit stands in for a full disk where mounting one needs rights we lack."""
    script = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        from fimo.orchestrator.store import LocalStore
        from fimo.workers.errors import StoreError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        store = LocalStore("runs", Path(sys.argv[1]))
        assert store.create("small", b"x" * 50_000)
        for write in (store.create, store.put):
            try:
                write("large", b"x" * 200_000)
            except StoreError as error:
                print(error)
        print(sorted(e.key for e in store.list("")))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "runs")], capture_output=True, text=True, check=True
    )
    first, second, listed = done.stdout.splitlines()
    assert first == second
    assert first.startswith("store runs: cannot write 'large': the file-size limit")
    assert listed == "['small']"
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [UNFINISHED, "small"]
    assert list((tmp_path / "runs" / UNFINISHED).iterdir()) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Path:
    """A file system of 1 MiB; needs root."""
    mount = tmp_path / "tiny"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    return mount


def test_a_really_full_disk_is_one_line_and_recovers(tiny_disk: Path) -> None:
    store = LocalStore("runs", tiny_disk / "runs")
    try:
        assert store.create("a", b"a" * 600_000)
        with pytest.raises(StoreError, match="disk is full; free some space") as caught:
            store.create("b", b"b" * 600_000)
        assert "\n" not in str(caught.value)
        with pytest.raises(StoreError, match="disk is full"):
            store.put("a", b"A" * 600_000)
        assert store.get("a") == b"a" * 600_000
        assert [e.key for e in store.list("")] == ["a"]
        store.delete("a")
        assert store.create("b", b"b" * 600_000)
    finally:
        subprocess.run(["umount", str(tiny_disk)], check=True)


def test_links_planted_in_the_store_lead_nowhere(local: LocalStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    local.create("parts/real", b"x")
    (local.root / "parts/folder").symlink_to(outside)
    (local.root / "parts/file").symlink_to(outside / "secret")
    (local.root / "parts/dangling").symlink_to(outside / "new")
    for key in ("parts/folder/secret", "parts/file"):
        with pytest.raises(StoreError):
            local.get(key)
    for write in (local.create, local.put):
        with pytest.raises(StoreError, match="stands"):
            write("parts/folder/new", b"x")
    assert local.create("parts/dangling", b"x") is False
    local.put("parts/file", b"replaced")
    local.delete("parts/folder/secret")
    assert [e.key for e in local.list("")] == ["parts/file", "parts/real"]
    assert list(local.list("parts/folder/")) == []
    assert {p.name: p.read_bytes() for p in outside.iterdir()} == {"secret": b"secret"}


def test_a_pipe_in_the_store_does_not_hang_a_reader(local: LocalStore) -> None:
    local.create("real", b"x")
    os.mkfifo(local.root / "pipe")
    with pytest.raises(NotFound):
        local.get("pipe")
    assert [e.key for e in local.list("")] == ["real"]


def test_a_file_where_a_folder_is_needed_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for store in (LocalStore("file", tmp_path / "file"), LocalStore("file/deep", tmp_path / "file/deep")):
        with pytest.raises(StoreError, match="a file or link stands where the store needs a folder") as caught:
            store.check()
        assert "\n" not in str(caught.value)


def test_a_directory_one_may_not_write_is_one_line() -> None:
    for name in ("/proc/fimo", "/sys/fimo"):
        if Path(name).parent.is_dir():
            with pytest.raises(StoreError, match=r"cannot (write|list)") as caught:
                LocalStore(name, Path(name)).check()
            assert "\n" not in str(caught.value)


def test_a_directory_of_someone_else_is_one_line(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:  # root may write anywhere; nobody may not
                os.setuid(65534)
            LocalStore("locked", locked).create("k", b"x")
        except StoreError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, "rb") as told:
        assert told.read().startswith(b"store locked: cannot write 'k': permission denied; make the directory")
    assert list(locked.iterdir()) == []


def test_descriptors_are_not_leaked(local: LocalStore) -> None:
    local.create("a/b/c", b"x")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        local.create("a/b/c", b"x")
        local.put(f"a/{number}", b"x")
        local.get("a/b/c")
        list(local.list(""))
        with pytest.raises(NotFound):
            local.get("no/such/key")
        with pytest.raises(StoreError):
            local.create("a/b/c/d", b"x")
    assert len(os.listdir("/proc/self/fd")) == before


def test_only_folders_without_a_file_in_them_are_removed(local: LocalStore) -> None:
    for key in ("sweep/parts/a/x", "sweep/empty/b/y", "sweep-2/z"):
        local.put(key, b"x")
    local.delete("sweep/empty/b/y")
    local.remove_empty("sweep")
    assert (local.root / "sweep" / "parts" / "a" / "x").exists()
    assert not (local.root / "sweep" / "empty").exists()
    local.delete("sweep/parts/a/x")
    local.remove_empty("sweep")
    local.remove_empty("sweep")
    assert not (local.root / "sweep").exists()
    assert local.get("sweep-2/z") == b"x"


def test_a_link_in_the_place_of_a_folder_is_not_followed_to_be_emptied(local: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "empty").mkdir(parents=True)
    local.put("sweep/x", b"x")
    local.delete("sweep/x")
    (local.root / "sweep" / "link").symlink_to(tmp_path / "elsewhere")
    local.remove_empty("sweep")
    assert (tmp_path / "elsewhere" / "empty").is_dir()
