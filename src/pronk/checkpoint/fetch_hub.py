"""Checkpoints from the Hugging Face hub and from S3 buckets; never a pickle among them."""

from __future__ import annotations

import hashlib
import importlib
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from pronk.checkpoint.cache import size_of
from pronk.checkpoint.fetch_pypi import Fetched
from pronk.checkpoint.progress import Progress
from pronk.errors import SourceError

__all__ = ["fetch_hf", "fetch_s3"]

_CHUNK = 1 << 20
_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
_FOLDER = "checkpoint"
_HF = re.compile(
    r"(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)"
    r"(?:/(?P<file>[A-Za-z0-9][A-Za-z0-9._-]*\.gguf))?"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?"
)
_S3 = re.compile(r"(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<key>.+)")


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SourceError(
            f"this needs {module.partition('.')[0]}; install it with: pip install 'pronk[{extra}]'"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of another library's message, for the end of a sentence."""
    lines = str(error).strip().splitlines()
    return re.sub(r"//[^/@\s]+@", "//", lines[0])[:300] if lines else type(error).__name__


def fetch_hf(address: str, folder: Path, progress: Progress) -> Fetched:
    """Fetch ``org/name[/file.gguf][@revision]`` into `folder`.

    Raises
    ------
    SourceError
        If the address is malformed, or the repository cannot be had or holds no checkpoint.
    """
    match = _HF.fullmatch(address)
    if match is None:
        raise SourceError(f"hf:{address} is not of the form hf:ORG/NAME[/FILE.gguf][@REVISION]")
    repo, file, revision = match["repo"], match["file"], match["revision"]
    hub = _import("huggingface_hub", "hf")
    _import("huggingface_hub.utils", "hf").disable_progress_bars()
    target = folder / _FOLDER
    target.mkdir()
    try:
        with progress.watch(target, progress.task("downloading")):
            hub.snapshot_download(
                repo,
                revision=revision,
                local_dir=target,
                allow_patterns=[file] if file else list(_PATTERNS),
                # Subfolders hold the same weights in other formats.
                ignore_patterns=["*/*"],
            )
    # The hub's client lets through errors of the several libraries under it.
    except Exception as error:
        raise SourceError(f"hf:{address} cannot be downloaded: {_reason(error)}") from error
    if file:
        if not (target / file).is_file():
            raise SourceError(f"hf:{repo} holds no file {file}")
        return _single(target / file, folder)
    return _whole(target, f"hf:{address}")


def fetch_s3(address: str, folder: Path, progress: Progress) -> Fetched:
    """Fetch ``bucket/key-or-prefix`` into `folder`.

    Raises
    ------
    SourceError
        If the address is malformed, or the bucket cannot be read or holds no checkpoint there.
    """
    match = _S3.fullmatch(address)
    if match is None:
        raise SourceError(f"s3://{address} is not of the form s3://BUCKET/KEY-OR-PREFIX")
    bucket, key = match["bucket"], match["key"]
    boto3 = _import("boto3", "s3")
    errors = _import("botocore.exceptions", "s3")
    target = folder / _FOLDER
    target.mkdir()
    try:
        client = boto3.client("s3")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        sizes = {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", ())}
        wanted = _wanted(sizes, key, address)
        update = progress.task("downloading", sum(sizes[name] for name in wanted))
        done = 0
        for name, file in wanted.items():
            body = client.get_object(Bucket=bucket, Key=name)["Body"]
            with (target / file).open("wb") as out:
                for chunk in body.iter_chunks(_CHUNK):
                    out.write(chunk)
                    done += len(chunk)
                    update(done)
            if (target / file).stat().st_size != sizes[name]:
                raise SourceError(f"s3://{bucket}/{name} ended before its {sizes[name]} bytes")
    except (errors.BotoCoreError, errors.ClientError, ValueError, OSError) as error:
        raise SourceError(f"s3://{address} cannot be downloaded: {_reason(error)}") from error
    if key in wanted:
        return _single(target / wanted[key], folder)
    return _whole(target, f"s3://{address}")


def _wanted(sizes: dict[str, int], key: str, address: str) -> dict[str, str]:
    """The keys to download and the file names to give them.

    A key is one file; a prefix is a folder whose checkpoint files are taken.
    """
    if key in sizes and not key.endswith("/"):
        file = key.rpartition("/")[2]
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._ -]*\.gguf", file):
            raise SourceError(
                f"s3://{address} is one file but not a .gguf; give the folder of a checkpoint"
            )
        return {key: file}
    prefix = key.rstrip("/") + "/"
    wanted = {}
    for name in sizes:
        if not name.startswith(prefix):
            continue
        file = name.removeprefix(prefix)
        if not file:  # the marker of an empty folder
            continue
        if any(part in {"", ".", ".."} for part in file.split("/")) or not file.isprintable():
            raise SourceError(f"s3://{address} holds a key that is no plain path: {name!r}")
        if "/" not in file and "\\" not in file and _allowed(file):
            wanted[name] = file
    if not wanted:
        raise SourceError(f"s3://{address} holds no .gguf, .safetensors or .json file")
    return wanted


def _allowed(file: str) -> bool:
    return any(PurePosixPath(file).match(p) for p in (*_PATTERNS, "*.gguf"))


def _single(path: Path, folder: Path) -> Fetched:
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
    path.replace(folder / path.name)
    _remove_others(folder, path.name)
    return Fetched(path.name, (folder / path.name).stat().st_size, digest.hexdigest())


def _whole(target: Path, name: str) -> Fetched:
    """A directory of checkpoint files, or the one GGUF file in it."""
    _remove_others(target, *(item.name for item in target.iterdir() if _allowed(item.name)))
    files = sorted(item.name for item in target.iterdir())
    gguf = [file for file in files if file.endswith(".gguf")]
    if "config.json" in files and any(file.endswith(".safetensors") for file in files):
        _remove_others(target, *(file for file in files if file not in gguf))
        return Fetched(target.name, size_of(target), None)
    if len(gguf) == 1:
        return _single(target / gguf[0], target.parent)
    if gguf:
        raise SourceError(f"{name} holds several .gguf files; name one of: {', '.join(gguf[:20])}")
    raise SourceError(
        f"{name} holds no config.json with .safetensors files; for a .gguf file, give its name too"
    )


def _remove_others(folder: Path, *keep: str) -> None:
    for item in list(folder.iterdir()):
        if item.is_symlink() or (item.is_file() and item.name not in keep):
            item.unlink()
        elif item.is_dir() and item.name not in keep:
            shutil.rmtree(item)
