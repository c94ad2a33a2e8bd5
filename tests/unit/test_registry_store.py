"""Registries: names and what they mean, on a local disk and on an object store; many at once; killed in the middle."""

from __future__ import annotations

import errno
import json
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from ftray.errors import ArtefactError, ConfigError, RunError, UnknownAdapter
from ftray.registry.check import check
from ftray.registry.facts import CARD, FACTS, WEIGHTS
from ftray.registry.publish import publish
from ftray.registry.ref import Ref, check_name, is_name, parse_name
from ftray.registry.store import Registry
from tests.adapters import BASE, change_config, facts_of, seal, write_adapter
from tests.objects import Objects

fsspec.register_implementation("objects", Objects, clobber=True)

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["local", "objects"])
def registry(request, tmp_path):
    yield Registry(str(tmp_path / "registry") if request.param == "local" else "objects://registry/adapters")
    for name in ("objects", "memory"):
        fsspec.filesystem(name).store.clear()


def put(registry: Registry, folder: Path, seed: int, name: str = "cheese", tenant: str = "anna") -> str:
    """Publish adapter number `seed`; returns its digest."""
    write_adapter(folder / str(seed), seed)
    return publish(folder / str(seed), registry, tenant, name, BASE).ref.digest


def sizes_of(registry: Registry, ref: Ref) -> dict[str, int]:
    """{name: bytes} of a version's files."""
    return {path: info["size"] for path, info in registry._find(f"{ref.tenant}/{ref.name}/{ref.digest}").items()}


def digests(registry: Registry, name: str = "cheese") -> set[str]:
    return {version.digest for version in registry.show("anna", name).versions}


# ----------------------------------------------------------------------------------------------------------- the names


@pytest.mark.parametrize("text", ["a", "cheese", "0", "a.b-c_d", "x" * 64])
def test_names(text):
    assert is_name(text)


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", "a..b", ".a", "-a", "_a", "A", "a/b", "a\\b", "a b", "a\n", "x" * 65, "ä", "a@b", "%2e", "a\0"],
)
def test_what_is_no_name(text, registry):
    assert not is_name(text)
    with pytest.raises(ConfigError):
        check_name(text)
    for names in ((text, "cheese"), ("anna", text)):
        for call in (registry.resolve, registry.show, registry.pointer, registry.rollback, registry.remove_name):
            with pytest.raises(ConfigError):
                call(*names)
    with pytest.raises(ConfigError):
        registry.entries(text)


def test_names_with_tenants_and_versions():
    assert parse_name("cheese") == ("default", "cheese", None)
    assert parse_name("anna/cheese@abcdef") == ("anna", "cheese", "abcdef")
    for text in (
        "anna/cheese@",
        "anna/cheese@abc",
        "cheese@ABCDEF",
        "a/b/c",
        "/cheese",
        "../x",
        "x@../../y",
        "@abcdef",
    ):
        with pytest.raises(ConfigError):
            parse_name(text)


# --------------------------------------------------------------------------------------------------- publish, resolve


def test_a_published_adapter_is_found_and_whole(registry, tmp_path):
    digest = put(registry, tmp_path, 1)
    ref = registry.resolve("anna", "cheese")
    assert ref == Ref("anna", "cheese", digest)
    assert registry.resolve("anna", "cheese", digest[:8]) == registry.resolve("anna", "cheese", digest) == ref
    facts, content = registry.facts(ref)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / FACTS).write_bytes(content)
    for name, file in facts.files.items():
        registry.download(ref, name, file.size, tmp_path / "copy" / name)
    check(tmp_path / "copy", BASE, digest=digest)


def test_an_artefact_that_fails_the_check_leaves_nothing(registry, tmp_path):
    write_adapter(tmp_path / "bad")
    change_config(tmp_path / "bad", r=3)
    with pytest.raises(ArtefactError, match="has the shape"):
        publish(tmp_path / "bad", registry, "anna", "cheese", BASE)
    assert registry.entries() == []


def test_an_artefact_on_an_object_store_is_published_and_its_litter_refused(registry, tmp_path):
    write_adapter(tmp_path / "a")
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "a") + "/", "/runs/a/artefact/", recursive=True)
    ref = publish("memory://runs/a/artefact", registry, "anna", "cheese", BASE).ref
    assert registry.resolve("anna", "cheese") == ref
    fs.pipe("/runs/a/artefact/inner/x.bin", b"")
    with pytest.raises(ArtefactError, match=r"inner/x\.bin"):
        publish("memory://runs/a/artefact", registry, "anna", "cheese", BASE)
    with pytest.raises(ArtefactError, match="no such folder"):
        publish("memory://runs/b", registry, "anna", "cheese", BASE)


def test_publishing_again_changes_nothing(registry, tmp_path):
    put(registry, tmp_path, 1)
    before = registry.pointer("anna", "cheese")
    again = publish(tmp_path / "1", registry, "anna", "cheese", BASE)
    assert (again.uploaded, again.moved) == (False, False)
    assert registry.pointer("anna", "cheese") == before


@pytest.mark.parametrize("name", [WEIGHTS, CARD, FACTS])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_publishing_again_mends_what_was_damaged(registry, tmp_path, name, how):
    digest = put(registry, tmp_path, 1)
    at = f"{registry.root}/anna/cheese/{digest}/{name}"
    content = registry.fs.cat_file(at)
    if how == "remove":
        registry.fs.rm_file(at)
    else:
        registry.fs.pipe_file(at, content[:-1] + (bytes([content[-1] ^ 1]) if how == "flip" else b""))
    again = publish(tmp_path / "1", registry, "anna", "cheese", BASE)
    assert (again.uploaded, again.moved) == (True, False)
    assert registry.fs.cat_file(at) == content
    assert not publish(tmp_path / "1", registry, "anna", "cheese", BASE).uploaded


def test_without_a_base_its_shapes_are_looked_up(registry, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    write_adapter(tmp_path / "a")
    facts = facts_of(tmp_path / "a")
    seal(tmp_path / "a", facts | {"base": {"path": str(base), "revision": None, "sha256": BASE.digest}})
    from tests.adapters import LLAMA

    (base / "config.json").write_text(json.dumps(LLAMA | {"hidden_size": 32}))
    with pytest.raises(ArtefactError, match="has the shape"):
        publish(tmp_path / "a", registry, "anna", "cheese")
    (base / "config.json").write_text(json.dumps(LLAMA))
    assert publish(tmp_path / "a", registry, "anna", "cheese").moved


def test_names_lead_to_the_latest_and_others_stay(registry, tmp_path):
    first, second = put(registry, tmp_path, 1), put(registry, tmp_path, 2)
    other = put(registry, tmp_path, 1, tenant="berta")
    assert other == first
    assert registry.resolve("anna", "cheese").digest == second
    assert registry.resolve("berta", "cheese").digest == first
    assert digests(registry) == {first, second}
    assert [entry.full_name for entry in registry.entries()] == ["anna/cheese", "berta/cheese"]
    [entry] = registry.entries("berta")
    assert (entry.digest, len(entry.versions), entry.held) == (first, 1, False)
    assert entry.versions[0].size == sum(p.stat().st_size for p in (tmp_path / "1").iterdir())
    assert entry.versions[0].published is not None
    assert registry.entries("clara") == []


@pytest.mark.parametrize(("tenant", "name"), [("anna", "wine"), ("berta", "cheese")])
def test_unknown_names(registry, tmp_path, tenant, name):
    digest = put(registry, tmp_path, 1)
    for call in (registry.resolve, registry.show, registry.rollback, registry.remove_name):
        with pytest.raises(UnknownAdapter):
            call(tenant, name)
    with pytest.raises(UnknownAdapter):
        registry.resolve(tenant, name, digest)
    with pytest.raises(UnknownAdapter):
        registry.resolve("anna", "cheese", "0" * 8)
    with pytest.raises(UnknownAdapter):
        registry.facts(Ref("anna", "cheese", "0" * 64))


def test_a_beginning_that_several_versions_have(registry, tmp_path):
    made: dict[str, int] = {}
    for seed in range(400):
        digest = write_adapter(tmp_path / "x", seed)
        if digest[:2] in made:
            put(registry, tmp_path, seed)
            put(registry, tmp_path, made[digest[:2]])
            with pytest.raises(ArtefactError, match="2 versions begin"):
                registry.resolve("anna", "cheese", digest[:2])
            return
        made[digest[:2]] = seed
    raise AssertionError


@pytest.mark.parametrize("text", [b"", b"{}", b'{"format": 1, "digest": "x", "moved": ""}', b"\x00" * 100_000, b"[1]"])
def test_a_damaged_pointer_is_told_and_mended(registry, tmp_path, text):
    digest = put(registry, tmp_path, 1)
    at = f"{registry.root}/anna/cheese/current.json"
    registry.fs.pipe_file(at, text)
    with pytest.raises(ArtefactError, match=r"current\.json"):
        registry.resolve("anna", "cheese")
    [entry] = registry.entries()
    assert entry.digest is None
    assert "current.json" in entry.damaged
    registry.rollback("anna", "cheese", digest[:8])
    assert registry.resolve("anna", "cheese").digest == digest


def test_a_pointer_cannot_lead_out_of_the_registry(registry, tmp_path):
    put(registry, tmp_path, 1)
    pointer = {"format": 1, "digest": "../../../etc", "before": [], "moved": "now"}
    registry.fs.pipe_file(f"{registry.root}/anna/cheese/current.json", json.dumps(pointer).encode())
    with pytest.raises(ArtefactError, match="digest"):
        registry.resolve("anna", "cheese")


def test_a_store_that_cannot_be_reached_is_no_unknown_adapter(tmp_path, monkeypatch):
    registry = Registry(str(tmp_path))
    put(registry, tmp_path, 1)

    def broken(*_args, **_options):
        raise ConnectionError("no route to user:secret@host https://key:secret@host/x")

    for name in ("cat_file", "find"):
        monkeypatch.setattr(registry.fs, name, broken)
    for call in (lambda: registry.resolve("anna", "cheese"), registry.entries):
        with pytest.raises(RunError, match="cannot be reached") as error:
            call()
        assert "key:secret" not in str(error.value)


def test_registries_that_cannot_be():
    with pytest.raises(ConfigError, match="no registry can be there"):
        Registry("nothing://here")


# ------------------------------------------------------------------------------------------- rollback, pins, removal


def test_rollback_goes_back_step_by_step_and_to_any_version(registry, tmp_path):
    first, second, third = (put(registry, tmp_path, seed) for seed in (1, 2, 3))
    assert registry.rollback("anna", "cheese").digest == second
    assert registry.rollback("anna", "cheese").digest == first
    with pytest.raises(ArtefactError, match="no version before"):
        registry.rollback("anna", "cheese")
    assert registry.rollback("anna", "cheese", third[:10]).digest == third
    assert registry.resolve("anna", "cheese").digest == third
    assert registry.rollback("anna", "cheese").digest == first  # what it meant before that
    assert put(registry, tmp_path, 2) == registry.resolve("anna", "cheese").digest


def test_rollback_passes_over_what_was_removed(registry, tmp_path):
    first, second, _ = (put(registry, tmp_path, seed) for seed in (1, 2, 3))
    registry.remove(Ref("anna", "cheese", second))
    assert registry.rollback("anna", "cheese").digest == first


def test_a_pinned_version_stays(registry, tmp_path):
    first, second = put(registry, tmp_path, 1), put(registry, tmp_path, 2)
    ref = Ref("anna", "cheese", first)
    registry.pin(ref)
    assert registry.resolve("anna", "cheese").digest == second  # it was not a hold
    with pytest.raises(ArtefactError, match="pinned"):
        registry.remove(ref)
    with pytest.raises(ArtefactError, match="pinned"):
        registry.remove_name("anna", "cheese")
    assert digests(registry) == {first, second}
    assert registry.unpin(ref)
    assert not registry.unpin(ref)
    registry.remove(ref)
    assert digests(registry) == {second}


def test_a_hold_outlasts_publishing(registry, tmp_path):
    first = put(registry, tmp_path, 1)
    ref = Ref("anna", "cheese", first)
    registry.pin(ref, hold=True)
    write_adapter(tmp_path / "2", 2)
    published = publish(tmp_path / "2", registry, "anna", "cheese", BASE)
    assert published.held == first
    assert registry.resolve("anna", "cheese") == ref
    assert registry.show("anna", "cheese").held
    with pytest.raises(ArtefactError, match="held"):
        registry.remove(ref)
    with pytest.raises(ArtefactError, match="pinned"):
        registry.remove_name("anna", "cheese")
    registry.unpin(ref)
    assert registry.resolve("anna", "cheese") == published.ref


def test_a_damaged_hold_is_told_and_mended(registry, tmp_path):
    digest = put(registry, tmp_path, 1)
    ref = Ref("anna", "cheese", digest)
    registry.fs.pipe_file(f"{registry.root}/anna/cheese/hold.json", b"{")
    for call in (registry.resolve, registry.remove_name):
        with pytest.raises(ArtefactError, match=r"hold\.json"):
            call("anna", "cheese")
    registry.pin(ref, hold=True)
    assert registry.resolve("anna", "cheese") == ref
    registry.unpin(ref)
    assert registry.remove_name("anna", "cheese") == [digest]


def test_what_is_not_there_cannot_be_pinned(registry, tmp_path):
    put(registry, tmp_path, 1)
    with pytest.raises(UnknownAdapter):
        registry.pin(Ref("anna", "cheese", "0" * 64), hold=True)
    entry = registry.show("anna", "cheese")
    assert not entry.held
    assert not any(version.pinned for version in entry.versions)


def test_the_current_version_goes_with_its_name_alone(registry, tmp_path):
    first, second = put(registry, tmp_path, 1), put(registry, tmp_path, 2)
    put(registry, tmp_path, 1, name="wine")
    with pytest.raises(ArtefactError, match="what the name means") as error:
        registry.remove(Ref("anna", "cheese", second))
    assert "anna/cheese --all" in str(error.value)
    registry.remove(Ref("anna", "cheese", first))
    assert registry.remove_name("anna", "cheese") == [second]
    with pytest.raises(UnknownAdapter):
        registry.resolve("anna", "cheese")
    assert [entry.full_name for entry in registry.entries()] == ["anna/wine"]
    assert not [path for path in registry.fs.find(registry.root) if "/cheese/" in path]
    put(registry, tmp_path, 1)  # the name can be taken again
    assert registry.resolve("anna", "cheese").digest == first


@pytest.mark.parametrize("file", ["current.json", "hold.json"])
def test_a_removal_that_could_not_begin_keeps_no_publisher_waiting(registry, tmp_path, file):
    ref = Ref("anna", "cheese", put(registry, tmp_path, 1))
    registry.fs.pipe_file(f"{registry.root}/anna/cheese/{file}", b"{")
    with pytest.raises(ArtefactError, match=re.escape(file)):
        registry.remove(ref)
    assert not registry.is_being_removed(ref)
    assert registry.confirm(ref)


# --------------------------------------------------------------------------------------------------- many at once


def test_concurrent_publishes_lose_no_version(registry, tmp_path):
    for seed in range(8):
        write_adapter(tmp_path / str(seed), seed)
    start = threading.Barrier(16)

    def one(number: int) -> str:
        start.wait()
        return publish(tmp_path / str(number % 8), registry, "anna", "cheese", BASE).ref.digest

    with ThreadPoolExecutor(16) as pool:
        published = set(pool.map(one, range(16)))
    assert digests(registry) == published
    assert len(published) == 8
    assert all(version.complete for version in registry.show("anna", "cheese").versions)
    assert registry.resolve("anna", "cheese").digest in published


def test_publishing_and_removing_one_version_at_once_ends_whole_or_gone(registry, tmp_path):
    """The name never means a version that is not whole, once both have returned."""
    put(registry, tmp_path, 0)
    digest = write_adapter(tmp_path / "1", 1)
    ref = Ref("anna", "cheese", digest)
    for _ in range(25):
        start = threading.Barrier(2)

        def remover(start=start) -> bool:
            start.wait()
            try:
                registry.remove(ref)
            except ArtefactError:
                return False
            return True

        def publisher(start=start) -> None:
            start.wait()
            publish(tmp_path / "1", registry, "anna", "cheese", BASE)

        with ThreadPoolExecutor(2) as pool:
            removing, publishing = pool.submit(remover), pool.submit(publisher)
            removing.result()
            publishing.result()
        meant = registry.resolve("anna", "cheese")
        assert meant == ref
        [version] = [v for v in registry.show("anna", "cheese").versions if v.digest == digest]
        assert version.complete
        assert version.size == sum(p.stat().st_size for p in (tmp_path / "1").iterdir())
        assert not registry.is_being_removed(ref)
        registry.rollback("anna", "cheese")


@pytest.mark.parametrize("folder", ["the version's", "pins"])
def test_a_folder_that_is_removed_as_it_is_looked_for_is_made_again(tmp_path, monkeypatch, folder):
    """`mkdir` finds it there and, before it has looked whether it is a folder, somebody has removed it."""
    registry, removed = Registry(str(tmp_path / "registry")), list[Path]()
    digest, mkdir = write_adapter(tmp_path / "1", 1), Path.mkdir

    def beaten(path: Path, *args, **options) -> None:
        if path.name == (folder if folder == "pins" else digest) and not removed:
            removed.append(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", beaten)
    publish(tmp_path / "1", registry, "anna", "cheese", BASE)
    registry.pin(Ref("anna", "cheese", digest))
    assert removed
    [version] = registry.show("anna", "cheese").versions
    assert (version.complete, version.pinned) == (True, True)


def test_what_a_removal_took_from_under_an_upload_is_put_there_again(registry, tmp_path, monkeypatch):
    """A publisher that saw the weights but no `ftray.json`, while both were being removed, writes the latter alone."""
    put(registry, tmp_path, 0)
    ref = Ref("anna", "cheese", write_adapter(tmp_path / "1", 1))
    upload, uploads = registry.upload, []

    def into_a_removal(ref, folder, facts):
        uploads.append(upload(ref, folder, facts))
        if len(uploads) == 1:
            registry.fs.rm_file(f"{registry.root}/{ref.tenant}/{ref.name}/{ref.digest}/adapter_model.safetensors")
        return uploads[-1]

    monkeypatch.setattr(registry, "upload", into_a_removal)
    publish(tmp_path / "1", registry, "anna", "cheese", BASE)
    assert len(uploads) == 2
    assert sizes_of(registry, ref) == {p.name: p.stat().st_size for p in (tmp_path / "1").iterdir()}


def test_a_file_that_changes_its_name_does_not_end_a_removal(registry, tmp_path, monkeypatch):
    """What is written under another name first is gone when its turn comes; the others must go all the same."""
    put(registry, tmp_path, 0)
    ref = Ref("anna", "cheese", put(registry, tmp_path, 1))
    registry.rollback("anna", "cheese")
    remove, calls = registry.fs.rm, []

    def renamed(path, recursive=False, maxdepth=None):
        calls.append(path)
        if len(calls) == 1:
            raise FileNotFoundError(f"{path}/.adapter_model.safetensors.tmp")
        return remove(path, recursive=recursive, maxdepth=maxdepth)

    monkeypatch.setattr(registry.fs, "rm", renamed)
    registry.remove(ref)
    assert len(calls) == 2
    assert sizes_of(registry, ref) == {}
    assert not registry.is_being_removed(ref)


def test_a_removal_that_broke_off_is_told_to_who_publishes(registry, tmp_path, monkeypatch):
    monkeypatch.setattr("ftray.registry.publish._REMOVAL_SECONDS", 0.2)
    put(registry, tmp_path, 0)
    digest = put(registry, tmp_path, 1)
    registry.rollback("anna", "cheese")
    ref = Ref("anna", "cheese", digest)
    registry._write(f"{registry.root}/anna/cheese/removing/{digest}", b"")
    with pytest.raises(ArtefactError, match="broke off") as error:
        put(registry, tmp_path, 1)
    assert f"anna/cheese@{digest}" in str(error.value)
    registry.remove(ref)  # as the hint says
    assert put(registry, tmp_path, 1) == registry.resolve("anna", "cheese").digest


# ------------------------------------------------------------------------------------------------------------- killed

KILLED = """
import os, signal, shutil, sys
from pathlib import Path
from ftray.registry import store
from ftray.registry.publish import publish
from ftray.registry.ref import Ref
from tests.adapters import BASE

what, at, half, where, folder, digest = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "half", *sys.argv[4:]
steps = 0

def die(): os.kill(os.getpid(), signal.SIGKILL)

def counted(name):
    real = getattr(store.Registry, name)
    def step(self, *args, **options):
        global steps
        steps += 1
        if steps != at:
            return real(self, *args, **options)
        if half and name == "_put":
            source, path = args
            def some(content, file, *_):
                file.write(content.read(100)); file.flush(); die()
            store.shutil.copyfileobj = some
            return real(self, *args, **options)
        die()
    setattr(store.Registry, name, step)

for name in ("_put", "_write", "_delete", "_delete_folder"):
    counted(name)
if what == "publish":
    publish(folder, where, "anna", "cheese", BASE)
else:
    store.Registry(where).remove(Ref("anna", "cheese", digest))
print("steps", steps)
"""


def killed(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("half", ["before", "half"])
def test_a_publish_killed_anywhere_loses_nothing_and_the_next_completes_it(tmp_path, half):
    """SIGKILL before, or in the middle of, each write to the store in turn."""
    old_digest = write_adapter(tmp_path / "old", 1)
    new_digest = write_adapter(tmp_path / "new", 2)
    for at in range(1, 20):
        registry = Registry(str(tmp_path / f"registry-{at}"))
        publish(tmp_path / "old", registry, "anna", "cheese", BASE)
        done = killed("publish", at, half, registry.uri, tmp_path / "new", new_digest)
        if done.returncode == 0:
            assert done.stdout == "steps 5\n"  # card, configuration, weights, ftray.json, pointer
            assert at == 6
            return
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert registry.resolve("anna", "cheese").digest == old_digest
        assert registry.is_complete(Ref("anna", "cheese", new_digest)) == (at == 5)
        publish(tmp_path / "new", registry, "anna", "cheese", BASE)
        ref = registry.resolve("anna", "cheese")
        assert ref.digest == new_digest
        for name in (CARD, WEIGHTS, FACTS):
            there = Path(registry.root, "anna", "cheese", new_digest, name).read_bytes()
            assert there == (tmp_path / "new" / name).read_bytes()
        assert registry.rollback("anna", "cheese").digest == old_digest
    raise AssertionError("it was killed every time")


def test_a_removal_killed_anywhere_is_ended_by_the_next(tmp_path):
    for at in range(1, 20):
        registry = Registry(str(tmp_path / f"registry-{at}"))
        digest, other = put(registry, tmp_path, 1), put(registry, tmp_path, 2)
        done = killed("remove", at, "before", registry.uri, "-", digest)
        if done.returncode == 0:
            assert at == 5
            return
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert registry.resolve("anna", "cheese").digest == other
        ref = registry.version("anna", "cheese", digest)
        if at == 4:  # all was gone but the mark
            with pytest.raises(UnknownAdapter):
                registry.remove(ref)
        else:
            registry.remove(ref)
        assert digests(registry) == {other}
        assert put(registry, tmp_path, 1) == digest
    raise AssertionError("it was killed every time")
