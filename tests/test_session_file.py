"""Sessions on disk: they go on as if they had never left, and a wrong file is refused whole."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from checkpoints import tiny_llama_dir

from pronk import CheckpointError, PronkError, RequestError, SamplingParams, load

RNG = np.random.default_rng(41)
IDS = [int(i) for i in RNG.integers(3, 320, 150)]
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=2)
POLICIES = {
    "global": {},
    "window": {"attention": "window=40,global-every=2,sinks=4"},
    "int8": {"kv_dtype": "int8"},
    "int4": {"kv_dtype": "int4"},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("tiny"))


def opened(tiny, **options):
    return load(tiny, **{"threads": 1, "context": 256, "packed_cache": False, **options})


def turn(model, prompt, session=None):
    return [(p.token, p.logprob) for p in model.generate(prompt, PARAMS, session=session)]


@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
def test_a_restored_session_goes_on_with_the_same_bits(tiny, tmp_path, options):
    path = tmp_path / "session"
    with opened(tiny, **options) as model:
        first = turn(model, IDS[:130], "s")
        size = model.save_session("s", path, {"of": ["any", 1]})
        assert model.session_about(path) == {"of": ["any", 1]}
        follow = [*IDS[:130], *(token for token, _ in first), *IDS[130:]]
        expected = turn(model, follow, "s")
        assert size == path.stat().st_size
        assert list(tmp_path.iterdir()) == [path]
    with opened(tiny, **options) as model:
        assert model.restore_session("t", path) == 149
        engine = model._engine
        pieces = model.generate(follow, PARAMS, session="t")
        (request,) = engine._requests.values()
        assert request.computed == 149
        assert [(p.token, p.logprob) for p in pieces] == expected
        engine.drop_sessions()
        assert engine.kv.free == engine.kv.num_blocks
        # Others that begin alike find its blocks, too.
        model.restore_session("t", path)
        assert turn(model, follow) == expected
        assert engine.counters.prefix_hits > 149
        assert turn(model, IDS[:130]) == first


def test_a_session_of_another_model_is_refused(tiny, tmp_path):
    path = tmp_path / "session"
    with opened(tiny) as model:
        turn(model, IDS, "s")
        model.save_session("s", path)
        with pytest.raises(RequestError, match="no session 'other'"):
            model.save_session("other", path)
        with pytest.raises(PronkError, match="cannot write the session"):
            model.save_session("s", tmp_path / "none" / "session")
    other = tiny_llama_dir(tmp_path / "other", seed=5)
    for where, options in (
        (other, {}),
        (tiny, {"kv_dtype": "int8"}),
        (tiny, {"attention": "window=40"}),
    ):
        with (
            opened(where, **options) as model,
            pytest.raises(CheckpointError, match="of another model, or of other options"),
        ):
            model.restore_session("s", path)
    with (
        opened(tiny, context=64) as model,
        pytest.raises(CheckpointError, match="169 tokens, but the context holds 64"),
    ):
        model.restore_session("s", path)


def test_a_damaged_session_is_refused_and_nothing_kept(tiny, tmp_path):
    path = tmp_path / "session"
    with opened(tiny) as model:
        turn(model, IDS, "s")
        model.save_session("s", path)
        model._engine.drop_sessions()
        whole = path.read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])

        def changed(**changes):
            header = json.loads(whole[8 : 8 + length])
            meta = header["__metadata__"]
            contents = json.loads(meta["contents"])
            for name in set(changes) & set(contents):
                contents[name] = changes.pop(name)
            meta |= {"contents": json.dumps(contents), **changes}
            raw = json.dumps(header).encode()
            return struct.pack("<Q", len(raw)) + raw + whole[8 + length :]

        kv = model._engine.kv
        bad = [
            b"", whole[:7], whole[:100], whole[:-1], whole + b"\0",
            b"\xff" * 8 + whole[8:],
            whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
            changed(tokens=IDS), changed(tokens=[320] * 169), changed(tokens=[True] * 169),
            changed(tokens="abc"), changed(held=[[0, 0, 1, 2, 3, 4]]), changed(held=[]),
            changed(held=[[0, 1, 2, 3, 4, 60]]), changed(held=[[0, 1, 2, 3, 4, -1]]),
            changed(sum="x"), changed(sum="5"), changed(format="other"), changed(contents=7),
            changed(about=[]), changed(contents="{"),
            struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"{}",
        ]  # fmt: skip
        for content in bad:
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match="session"):
                model.restore_session("s", path)
            assert kv.free == kv.num_blocks and not model._engine._sessions
        for read in (model.session_about, lambda path: model.restore_session("s", path)):
            with pytest.raises(CheckpointError, match="cannot read the session"):
                read(tmp_path / "none")
        path.write_bytes(changed(about=[]))
        with pytest.raises(CheckpointError, match="damaged, or no session"):
            model.session_about(path)
        path.write_bytes(whole)
        running = model.generate([5] * 100, SamplingParams(ignore_eos=True))
        next(running)
        with pytest.raises(RequestError, match="no room"):
            model.restore_session("s", path)
        del running
        assert model.restore_session("s", path) == 169
