"""The hubs as sources: real clients against local servers."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from test_sources import assert_nothing_kept

from pronk.checkpoint.sources import list_models, pull
from pronk.errors import SourceError

BODY = b"GGUF" + bytes(range(256)) * 40
HANDLER = Callable[[http.server.BaseHTTPRequestHandler], None]


pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def serve() -> Iterator[Callable[[HANDLER], str]]:
    """Start a local HTTP server that answers with a function; its address."""
    servers = []

    def start(answer: HANDLER) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            do_HEAD = do_GET  # noqa: N815 (the library's name)

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
        timeout=240,
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
