"""The audit log: what is changed, removed or moved is found; what is killed goes on."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import threading
from contextlib import suppress
from unittest.mock import Mock

import httpx
import pytest

from pronk.cli import main
from pronk.errors import RequestError
from pronk.serve.audit import AuditError, AuditLog, verify, verify_set


def written(path, count: int = 5, **options):
    log = AuditLog(path, **options)
    for number in range(count):
        log.write({"request": f"r{number}", "said": 'a ","hash":" in a text'})
    log.close()
    return path


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "audit.log")


def test_what_was_written_verifies_and_goes_on(file):
    first = verify(file)
    assert (first.lines, first.last, first.cut) == (5, 4, 0)
    written(file, 3)
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert [entry["n"] for entry in entries] == list(range(8))
    assert entries[4]["hash"] == first.hash and verify(file).hash == entries[-1]["hash"]
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("line", [0, 2, 4])
def test_a_changed_line_is_found(file, line):
    lines = file.read_text().splitlines(keepends=True)
    lines[line] = lines[line].replace(f"r{line}", "rX")
    file.write_text("".join(lines))
    with pytest.raises(AuditError, match=f"line {line + 1} of"):
        verify(file)


@pytest.mark.parametrize("line", [0, 1, 3])
def test_a_removed_line_is_found(file, line):
    lines = file.read_text().splitlines(keepends=True)
    del lines[line]
    file.write_text("".join(lines))
    with pytest.raises(AuditError):
        verify(file)


def test_moved_repeated_and_foreign_lines_are_found(file):
    lines = file.read_text().splitlines(keepends=True)
    for wrong in (
        [lines[1], lines[0], *lines[2:]],
        [*lines[:2], lines[1], *lines[2:]],
        [*lines, "{}\n"],
        [*lines, "no json\n"],
        [*lines[:-1], lines[-1].replace('"n":4', '"n":5')],
    ):
        file.write_text("".join(wrong))
        with pytest.raises(AuditError):
            verify(file)


def test_a_cut_line_is_dropped_and_nothing_else(file):
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"n":5,"ti')
    assert verify(file).cut == 10
    written(file, 1)
    assert file.read_bytes().startswith(whole) and verify(file).lines == 6


def test_rotation_goes_on_with_the_chain(tmp_path):
    path = tmp_path / "audit.log"
    for _ in range(6):
        written(path, 4, most=600)
    parts = sorted(tmp_path.glob("audit.log.*"), key=lambda p: int(p.suffix[1:]))
    assert len(parts) >= 2
    previous = None
    for part in [*parts, path]:
        found = verify(part)
        first = json.loads(part.read_text().splitlines()[0])
        if previous is not None:
            assert first["before"] == previous.hash and first["n"] == previous.last + 1
        previous = found


def test_a_disk_that_is_full_for_a_while_costs_no_line(tmp_path, monkeypatch):
    path, full = tmp_path / "audit.log", OSError(errno.ENOSPC, "No space left on device")
    log = AuditLog(path)
    write = os.write

    def half(fd: int, data: bytes) -> int:
        if fd != log._file.fileno():
            return write(fd, data)
        if len(data) < 40:
            raise full
        return write(fd, data[: len(data) // 2])

    log.write({"at": 0})
    log.flush()
    monkeypatch.setattr(os, "write", half)
    for at in (1, 2):
        log.write({"at": at})
        log.flush()
        assert log.error == "No space left on device"
    monkeypatch.setattr(os, "write", write)
    log.write({"at": 3})
    log.close()
    assert log.error is None and verify(path).lines == 4


def test_a_rotation_that_fails_ends_no_log(tmp_path, monkeypatch):
    path = tmp_path / "audit.log"
    log = AuditLog(path, most=1)
    open_ = log._open
    refused = RequestError("the audit log cannot be written")
    monkeypatch.setattr(log, "_open", Mock(side_effect=refused))
    log.write({"at": 0})
    log.flush()
    assert log.error == str(refused) and verify(path).lines == 1
    monkeypatch.setattr(log, "_open", open_)
    log.write({"at": 1})
    log.close()
    assert log.error is None
    assert verify_set(parts_of(path)).lines == 3  # with the new file's first


def parts_of(path):
    """The files of a log, the oldest first."""
    old = sorted(path.parent.glob(f"{path.name}.*"), key=lambda p: int(p.suffix[1:]))
    return [*old, path]


@pytest.fixture
def rotated(tmp_path):
    for _ in range(12):
        written(tmp_path / "audit.log", 4, most=600)
    parts = parts_of(tmp_path / "audit.log")
    assert len(parts) >= 4
    return parts


def test_a_set_of_files_holds_in_any_order(rotated):
    found = verify_set(rotated[::-1])
    assert (found.first, found.cut) == (0, 0)
    assert found.lines == found.last + 1 == sum(verify(part).lines for part in rotated)
    assert found.hash == verify(rotated[-1]).hash
    # Old files may have been put away: that shows in the first number.
    assert verify_set(rotated[1:]).first == verify(rotated[0]).last + 1


def test_a_missing_or_exchanged_file_is_found(rotated, tmp_path):
    with pytest.raises(AuditError, match="a file between them is missing"):
        verify_set([rotated[0], *rotated[2:]])
    with pytest.raises(AuditError, match="a file between them is missing"):
        verify_set([*rotated, rotated[1]])
    # One written anew, with numbers that fit, has other hashes.
    other = tmp_path / "other" / "audit.log"
    other.parent.mkdir()
    for _ in range(12):
        written(other, 4, most=600)
    with pytest.raises(AuditError):
        verify_set([*rotated[:2], *parts_of(other)[2:]])
    lines = rotated[1].read_text().splitlines(keepends=True)
    rotated[1].write_text("".join(lines[:-1]))
    with pytest.raises(AuditError, match="does not go on from"):
        verify_set(rotated)
    rotated[1].write_text("".join(lines) + "{")
    with pytest.raises(AuditError, match="is cut, though"):
        verify_set(rotated)


def test_a_kill_between_two_files_leaves_one_chain(rotated):
    """After the rename, and before the new file's first line."""
    path = rotated[-1]
    last = path.with_name(f"{path.name}.{len(rotated)}")
    path.rename(last)
    for torn in (None, b"", b'{"n":'):
        if torn is not None:
            path.write_bytes(torn)
        written(path, 1)
        found = verify_set([*rotated[:-1], last, path])
        assert found.first == 0 and found.lines == found.last + 1
        assert verify(path).before == verify(last).hash
        path.unlink()
    last.write_bytes(last.read_bytes()[:-30] + b"\n")
    with pytest.raises(AuditError):  # nothing goes on from what does not hold
        AuditLog(path)


def test_an_entry_that_cannot_be_prepared_is_a_line_too(tmp_path):
    log = AuditLog(tmp_path / "audit.log", prepare=lambda entry: 1 / 0)
    log.write({"request": "r1", "secret": "x"})
    log.close()
    [line] = (tmp_path / "audit.log").read_text().splitlines()
    assert json.loads(line)["unprepared"] == "ZeroDivisionError" and "secret" not in line


def test_who_may_write(file, tmp_path):
    log = AuditLog(file)
    with pytest.raises(RequestError, match="another server"):
        AuditLog(file)
    log.close()
    with pytest.raises(RequestError, match="cannot be written"):
        AuditLog(tmp_path / "none" / "audit.log")
    file.write_text(file.read_text().replace("r1", "rX"))
    with pytest.raises(AuditError):  # a log that does not hold is not gone on with
        AuditLog(file)


def test_the_command(file, capsys):
    assert main(["audit", "verify", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lines"] == 5
    assert main(["audit", "verify", str(file)]) == 0
    assert "5 lines hold" in capsys.readouterr().out
    file.write_text(file.read_text().replace("r3", "rX"))
    assert main(["audit", "verify", str(file)]) == 2
    assert "line 4 of" in capsys.readouterr().err
    assert main(["audit", "verify", str(file) + ".none"]) == 2


def test_a_server_that_is_killed_leaves_a_log_that_holds(tmp_path):
    from checkpoints import tiny_llama_dir
    from servers import process, until

    tiny = tiny_llama_dir(tmp_path / "tiny")
    log = tmp_path / "audit.log"
    args = (f"tiny={tiny}", "--context", "256", "--threads", "1", "--audit", str(log))
    secret = "the secret of the house"
    ask = {"model": "tiny", "prompt": secret, "max_tokens": 40}
    answered = []  # the ids of requests whose answers came

    def client(url: str) -> None:
        """Ask until the server is gone."""
        with suppress(httpx.TransportError), httpx.Client(timeout=120) as http:
            for at in itertools.count():
                stream = bool(at % 2)
                answer = http.post(f"{url}/v1/completions", json={**ask, "stream": stream})
                answered.append(answer.headers["x-request-id"])

    with process(*args) as (url, child):
        # A line is flushed by itself, not when others fill a buffer.
        alone = httpx.post(f"{url}/v1/completions", json=ask).headers["x-request-id"]
        until(lambda: alone in log.read_text(), "the line is written")
        clients = [threading.Thread(target=client, args=(url,)) for _ in range(6)]
        for thread in clients:
            thread.start()
        until(lambda: log.read_bytes().count(b"\n") >= 20, "20 lines are written")
        flushed = log.read_bytes()
        child.send_signal(signal.SIGKILL)  # under load: all clients wait for answers
        child.wait()
        for thread in clients:
            thread.join()
    before = verify(log)
    left = log.read_bytes()
    assert before.lines >= 20 and left.startswith(flushed)  # nothing that was flushed is lost
    told = {json.loads(line)["request"] for line in left.splitlines()[: before.lines]}
    assert len(told & set(answered)) >= 20 - len(clients)
    with process(*args) as (url, child):
        assert httpx.post(f"{url}/v1/completions", json=ask).is_success
        child.send_signal(signal.SIGTERM)
        assert child.wait(120) == 0
    after = verify(log)
    assert after.lines == before.lines + 1
    assert secret not in log.read_text()
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["route"] == "/v1/completions" and last["status"] == 200
    assert last["key"] == "anyone" and last["model"] == "tiny" and last["completion_tokens"] > 0
