"""The command line as a user meets it: a process, its output, its exit code."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import tiny_dir, tiny_gguf, tiny_llama_dir

from pronk import SamplingParams, load
from pronk.cli import VERBS
from pronk.commands.run import drafts
from pronk.model import Speculation


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama_dir(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_q4(tiny, tmp_path_factory):
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny, "q4_1")


def pronk(*arguments, stdin="", code=0):
    done = subprocess.run(
        [sys.executable, "-m", "pronk", *map(str, arguments)],
        input=stdin, capture_output=True, text=True, timeout=240, check=False)  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


def sentence(*arguments, stdin=""):
    """The one sentence that an error prints."""
    done = pronk(*arguments, stdin=stdin, code=2)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pronk: error: ")
    assert not done.stdout
    return lines[0].removeprefix("pronk: error: ")


def test_help_names_every_verb():
    out = pronk("--help").stdout
    for verb in VERBS:
        assert f"  {verb} " in out
        assert "usage: pronk " + verb in pronk(verb, "--help").stdout
    assert pronk("--version").stdout.startswith("pronk ")
    assert "there is no verb 'walk'" in sentence("walk")


def test_run_streams_text_and_ends_with_figures(tiny_q4):
    done = pronk("run", tiny_q4, "hello there", "--max-tokens", 5, "--raw", "--threads", 1)
    assert done.stdout.strip()
    assert len(done.stderr.splitlines()) == 1
    for word in ("prompt tokens", "first token", "/s", "peak memory"):
        assert word in done.stderr


@pytest.mark.slow
def test_every_verb_takes_qwen(qwen):
    said = pronk("run", qwen, "Write a Python function that reverses a list").stdout
    assert "def " in said and "return" in said
    assert "4" in pronk("chat", qwen, stdin="What is 2 + 2?\n").stdout
    seen = json.loads(pronk("inspect", qwen, "--json").stdout)
    bench = json.loads(pronk("bench", qwen, "--json", "--runs", 1, "--tokens", 8).stdout)
    # Memory used is memory planned.
    assert abs(bench["peak_memory"] - seen["memory"]["total"]) < 0.03 * seen["memory"]["total"]
    scored = json.loads(pronk("eval", qwen, "--max-tokens", 500, "--json").stdout)
    assert 1 < scored["perplexity"] < 20


def test_a_session_goes_on_where_it_ended(tiny, tmp_path):
    file = tmp_path / "talk"
    options = ("--max-tokens", 6, "--json", "--threads", 1, "--context", 256)
    keep = (*options, "--session", file)
    first = json.loads(pronk("run", tiny, "hello", "--system", "Be kind.", *keep).stdout)
    assert first["session_tokens"] == 0
    second = json.loads(pronk("run", tiny, "and then?", *keep).stdout)
    # All but the last token, whose keys and values nobody needed.
    assert second["session_tokens"] == first["prompt_tokens"] + first["tokens"] - 1
    third = json.loads(pronk("chat", tiny, *keep, stdin="more\n").stdout)
    # The same as one conversation that was never put away.
    with load(tiny, threads=1, context=256, packed_cache=False) as model:
        messages = [{"role": "system", "content": "Be kind."}]
        for asked, answer in (("hello", first), ("and then?", second), ("more", third)):
            messages.append({"role": "user", "content": asked})
            pieces = model.chat(messages, SamplingParams(max_tokens=6), session="x")
            messages.append({"role": "assistant", "content": "".join(p.text for p in pieces)})
            assert messages[-1]["content"] == answer["text"]
        assert model.session_about(file)["messages"] == messages
    before = file.read_bytes()
    assert "--system comes with a new one" in sentence("chat", tiny, "--system", "x", *keep)
    assert "is of a conversation" in sentence("run", tiny, "x", "--raw", *keep)
    assert "of other options" in sentence("run", tiny, "x", "--kv", "int8", *keep)
    assert "no session can be written" in sentence("run", tiny, "x", "--session", "/no/such/f")
    assert "is no file" in sentence("run", tiny, "x", "--session", tmp_path)
    assert file.read_bytes() == before
    pronk("chat", tiny, *keep, stdin="")  # nothing said, nothing written
    assert file.read_bytes() == before

    raw = tmp_path / "raw"
    text = ""
    for more in ("once upon", " a time"):
        found = json.loads(pronk("run", tiny, more, "--raw", *options, "--session", raw).stdout)
        text += more + found["text"]
    with load(tiny, threads=1, context=256, packed_cache=False) as model:
        assert model.session_about(raw) == {"messages": [], "text": text}
        list(model.generate("once", SamplingParams(max_tokens=2), session="s"))
        model.save_session("s", file)
    assert "only Python can use it" in sentence("run", tiny, "x", *keep)


def test_a_chat_that_is_interrupted_keeps_its_whole_turns(tiny, tmp_path):
    file = tmp_path / "talk"
    command = [sys.executable, "-m", "pronk", "chat", str(tiny), "--session", str(file), "--json",
               "--max-tokens", "4", "--threads", "1"]  # fmt: skip

    # A test that runs in the background ignores SIGINT, and its children would.
    def heed():
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipe = subprocess.PIPE
    child = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed
    )
    child.stdin.write("hello\n")
    child.stdin.flush()
    answer = json.loads(child.stdout.readline())["text"]
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=240)
    assert child.returncode == 130
    with load(tiny, threads=1, packed_cache=False) as model:
        said = [(m["role"], m["content"]) for m in model.session_about(file)["messages"]]
    assert said == [("user", "hello"), ("assistant", answer)]


def test_run_as_json(tiny_q4):
    arguments = ("run", tiny_q4, "hello", "--max-tokens", 6, "--json", "--temperature", 0.8,
                 "--seed", 4)  # fmt: skip
    first = json.loads(pronk(*arguments).stdout)
    assert first["tokens"] == 6
    assert first["finish_reason"] == "length"
    assert first["peak_memory"] > 10_000_000
    assert first["ttft"] > 0 < first["decode"]
    assert json.loads(pronk(*arguments).stdout)["text"] == first["text"]


def test_run_uses_the_chat_template_unless_raw(tiny_q4):
    def tokens(*extra):
        out = pronk("run", tiny_q4, "hello", "--max-tokens", 1, "--json", *extra).stdout
        return json.loads(out)["prompt_tokens"]

    assert tokens() > tokens("--raw")
    assert tokens("--system", "be brief") > tokens()


def test_run_stops_before_a_stop_string(tiny_q4):
    whole = json.loads(pronk("run", tiny_q4, "hello", "--max-tokens", 30, "--json").stdout)["text"]
    stop = whole[len(whole) // 2 :][:3]
    cut = json.loads(
        pronk("run", tiny_q4, "hello", "--max-tokens", 30, "--json", "--stop", stop).stdout
    )
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_speculation_is_on_unless_declined(tiny_q4):
    def answer(*extra):
        arguments = ("run", tiny_q4, "one two one two one two", "--max-tokens", 40, "--json")
        return json.loads(pronk(*arguments, *extra).stdout)

    on, off = answer(), answer("--no-speculate")
    assert on["text"] == off["text"]
    assert 0 <= on["accepted"] <= on["drafted"]
    assert off["drafted"] == off["accepted"] == 0
    help_text = " ".join(pronk("run", "--help").stdout.split())
    assert "the tokens are the same (default: on)" in help_text


def test_drafts_are_told_if_there_were_any():
    assert drafts(Speculation(10, 7)) == " (7 of 10 drafted tokens held)"
    assert drafts(Speculation()) == ""


def test_chat_keeps_its_history(tiny_q4):
    done = pronk("chat", tiny_q4, "--json", "--max-tokens", 8, stdin="one\ntwo\n/reset\none\n")
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(turns) == 3
    assert turns[0]["text"] == turns[2]["text"]  # forgotten after /reset
    assert all(turn["tokens"] for turn in turns)
    other = pronk("chat", tiny_q4, "--json", "--max-tokens", 8, stdin="two\n").stdout
    assert json.loads(other)["text"] != turns[1]["text"]  # the second turn saw the first


def test_inspect_counts_memory_without_weights(tiny_q4):
    short = json.loads(pronk("inspect", tiny_q4, "--context", 64, "--json").stdout)
    long = json.loads(pronk("inspect", tiny_q4, "--context", 512, "--json").stdout)
    assert set(short["memory"]) == {"weights", "kv", "arena", "overhead", "total"}
    assert short["memory"]["weights"] == long["memory"]["weights"]
    assert long["memory"]["kv"] == 8 * short["memory"]["kv"]
    for data in (short, long):
        memory = data["memory"]
        assert memory["total"] == sum(v for k, v in memory.items() if k != "total")
    graph = pronk("inspect", tiny_q4, "--graph").stdout
    assert "rope_store(" in graph
    assert "memory at a context of 512" in graph


def test_inspect_shows_the_cache_by_kind(tiny_q4):
    policy = ("--attention", "window=48,global=1,sinks=4", "--context", 512)
    seen = json.loads(pronk("inspect", tiny_q4, *policy, "--json").stdout)
    windows, everything = seen["kv"]
    assert windows["attention"] == "window"
    assert (windows["window"], windows["sinks"], windows["layers"]) == (48, 4, [0])
    assert windows["blocks"] == -(-(48 + 128) // 32) + 1 + 1  # a window and a step, and sinks
    assert (everything["attention"], everything["layers"]) == ("global", [1])
    assert everything["blocks"] == 512 // 32
    for pool in (windows, everything):
        assert pool["bytes"] == pool["blocks"] * pool["block_bytes"]
    assert seen["memory"]["kv"] == windows["bytes"] + everything["bytes"]
    text = pronk("inspect", tiny_q4, *policy).stdout
    assert "1 layer, the last 48 positions and the first 4" in text
    assert "1 layer, all positions" in text
    assert "2 layers, all positions" in pronk("inspect", tiny_q4).stdout


def test_a_policy_and_a_longer_context(tiny_q4):
    long = ("--rope-scaling", "yarn:2", "--context", 1024)
    assert json.loads(pronk("inspect", tiny_q4, *long, "--json").stdout)["context"] == 1024
    assert "[2, 512]" in sentence("inspect", tiny_q4, "--context", 1024)
    options = ("--attention", "window=64,global-every=2", *long)
    answer = pronk("run", tiny_q4, "hello " * 200, *options, "--max-tokens", 4, "--json").stdout
    assert json.loads(answer)["tokens"]


@pytest.mark.parametrize("verb", ["run", "chat", "bench", "eval", "inspect"])
def test_what_is_no_policy_is_refused(tiny_q4, verb):
    prompt = ("hi",) if verb == "run" else ()
    error = sentence(verb, tiny_q4, *prompt, "--attention", "window=0")
    assert "window of the attention policy" in error
    assert "yarn, linear, dynamic or none" in sentence(
        verb, tiny_q4, *prompt, "--rope-scaling", "ntk"
    )


def test_eval_and_its_reference(tiny, tiny_q4, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 500)  # above 4,096 tokens
    arguments = ("--text", text, "--window", 64, "--json")
    whole = json.loads(pronk("eval", tiny, *arguments).stdout)["tokens"]
    with load(tiny, context=64) as model:
        assert whole == len(model.tokenizer.encode(text.read_text())) - 1 > 4096
    arguments += ("--max-tokens", 500)
    same = json.loads(pronk("eval", tiny, "--reference", tiny, *arguments).stdout)
    assert same["kl"] < 1e-6
    assert same["top1_agreement"] == 1
    int8 = json.loads(pronk("eval", tiny, "--reference", tiny, "--kv", "int8", *arguments).stdout)
    assert 1e-9 < int8["kl"] < 1e-2
    int4 = json.loads(pronk("eval", tiny, "--reference", tiny, "--kv", "int4", *arguments).stdout)
    assert int8["kl"] < int4["kl"] < 1e-1
    rounded = ("eval", tiny_q4, "--reference", tiny_q4, *arguments)  # the reference keeps 12 bits
    assert json.loads(pronk(*rounded).stdout)["kl"] < 1e-6
    assert 1e-6 < json.loads(pronk(*rounded, "--activations", "int8").stdout)["kl"] < 1e-2
    yarn = ("eval", tiny, "--reference", tiny, "--rope-scaling", "yarn:2", *arguments)
    assert 1e-6 < json.loads(pronk(*yarn).stdout)["kl"] < 1
    longer = (*yarn, "--window", 600)  # than the context that the reference was made for
    assert 1e-6 < json.loads(pronk(*longer).stdout)["kl"] < 1
    other = json.loads(pronk("eval", tiny_q4, "--reference", tiny, *arguments).stdout)
    assert other["kl"] > same["kl"]
    assert other["tokens"] == same["tokens"] == 499
    assert other["perplexity"] > 1


def test_bench_reports_figures(tiny_q4):
    out = pronk("bench", tiny_q4, "--prompt-tokens", 40, "--tokens", 8, "--runs", 1, "--json")
    data = json.loads(out.stdout)
    for name in ("ttft", "prefill", "decode", "load_time", "peak_memory", "bandwidth",
                 "fraction_of_bandwidth"):  # fmt: skip
        assert data[name] > 0, name
    assert data["isa"] in data["int8_peaks"]
    assert data["int8_peaks"].keys() == data["fraction_of_int8_peaks"].keys()
    assert min(data["int8_peaks"].values()) > 0 < min(data["fraction_of_int8_peaks"].values())


def test_pull_and_list_of_a_path(tiny_q4, tmp_path, monkeypatch):
    monkeypatch.setenv("PRONK_HOME", str(tmp_path))
    assert pronk("pull", tiny_q4).stdout.strip() == str(tiny_q4)
    listed = json.loads(pronk("list", "--json").stdout)
    assert listed["models"] == []
    assert listed["packed"]["models"] == 0


def test_a_truncated_gguf(tiny_q4, tmp_path):
    data = tiny_q4.read_bytes()
    for size in (3, 40, 3000, len(data) - 100):
        path = tmp_path / f"cut{size}.gguf"
        path.write_bytes(data[:size])
        assert str(path) in sentence("run", path, "hi")


def test_a_gguf_with_an_offset_past_its_end(tiny, tmp_path):
    path = tiny_gguf(tmp_path / "m.gguf", tiny, "f32")
    data = bytearray(path.read_bytes())
    name = b"output_norm.weight"
    at = data.index(name) + len(name) + 4 + 8 + 4  # dimensions, one size, the type
    data[at : at + 8] = struct.pack("<Q", 1 << 40)
    path.write_bytes(data)
    assert "output_norm.weight" in sentence("run", path, "hi")


def test_a_safetensors_header_of_10_gb(tiny, tmp_path):
    path = tmp_path / "hf"
    shutil.copytree(tiny, path)
    weights = path / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", 10 << 30) + weights.read_bytes()[8:])
    assert "header" in sentence("run", path, "hi")


def test_an_unknown_architecture(tiny, tmp_path):
    path = tiny_gguf(tmp_path / "m.gguf", tiny, "f32", general__architecture="mamba")
    error = sentence("run", path, "hi")
    assert "mamba" in error
    assert "llama" in error
    config = json.loads((tiny / "config.json").read_text())
    other = tmp_path / "hf"
    shutil.copytree(tiny, other)
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    assert "MambaForCausalLM" in sentence("inspect", other)


def test_bad_prompts(tiny_q4):
    assert "empty" in sentence("run", tiny_q4, "")
    assert "empty" in sentence("run", tiny_q4, "-", stdin="  \n")
    assert "context" in sentence("run", tiny_q4, "hello " * 300, "--context", 32)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--temperature", "-1"), "temperature"),
        (("--top-p", "0"), "top_p"),
        (("--top-k", "-3"), "top_k"),
        (("--max-tokens", "0"), "max_tokens"),
        (("--seed", "-1"), "seed"),
        (("--context", "100000"), "context"),
        (("--threads", "0"), "threads"),
    ],
)
def test_parameters_out_of_range(tiny_q4, arguments, match):
    assert match in sentence("run", tiny_q4, "hi", *arguments)


@pytest.mark.parametrize(
    ("verb", "option", "value", "match"),
    [
        ("eval", "--window", 2, "the window"),
        ("eval", "--stride", 0, "the stride"),
        ("eval", "--max-tokens", -3, "--max-tokens"),
        ("bench", "--runs", 0, "1 run"),
        ("bench", "--tokens", 0, "2 tokens"),
        ("bench", "--prompt-tokens", -1, "--prompt-tokens"),
        ("inspect", "--context", 0, "the context"),
        ("bench", "--experts", "--json", "this model has none"),
        ("bench", "--dynamic-experts", "0.8", "no experts"),
    ],
)
def test_figures_out_of_range(tiny_q4, verb, option, value, match):
    assert match in sentence(verb, tiny_q4, option, value)


def test_options_stand_anywhere(tiny_q4):
    out = pronk("run", "--max-tokens", 2, tiny_q4, "--json", "hello", "--raw").stdout
    assert json.loads(out)["tokens"] == 2
    out = pronk("run", "--max-tokens", 2, "--json", "--", tiny_q4, "-5 + 3").stdout
    assert json.loads(out)["tokens"] == 2


def test_threads_that_the_system_refuses(tiny_q4):
    command = f"ulimit -v 3000000; {sys.executable} -m pronk run {tiny_q4} hi --threads 1024"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "of 1024 threads: use fewer" in done.stderr


def test_a_full_disk_is_one_sentence():
    command = [sys.executable, "-m", "pronk", "list", "--json"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("pronk: error: [Errno 28] No space left")
    assert "Traceback" not in done.stderr


def test_fit_refuses_before_it_writes(tiny, tmp_path):
    broken = tmp_path / "text.txt"
    broken.write_bytes(b"\xff\xfe\xfa")
    fit = ("fit", tiny, "-o", tmp_path / "out", "--memory")
    assert "UTF-8" in sentence(*fit, "900MB", "--text", broken)
    assert "threads" in sentence(*fit, "900MB", "--threads", "0")
    assert "not a size" in sentence(*fit, "lots")
    assert "--memory" in sentence(*fit, "1MB")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt"]


def test_sizes_that_the_kernels_cannot_take(tmp_path):
    odd = tiny_llama_dir(tmp_path / "odd", hidden_size=48, num_attention_heads=4)
    assert "hidden 48" in sentence("run", odd, "hi")


def test_an_unknown_model():
    assert "nosuch" in sentence("run", "nosuch", "hi")


def test_an_unknown_isa(tiny_q4, monkeypatch):
    monkeypatch.setenv("PRONK_ISA", "mmx")
    assert "PRONK_ISA" in sentence("run", tiny_q4, "hi")


def test_a_reader_that_leaves_is_no_error(tiny_q4):
    command = f"{sys.executable} -m pronk run {tiny_q4} hello --max-tokens 100 | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert b"Traceback" not in done.stderr


def test_experts_are_counted_and_may_be_fewer(tmp_path):
    path = tiny_dir(tmp_path / "moe", "mixtral", num_local_experts=4, sliding_window=None)
    bench = ("bench", path, "--runs", 1, "--tokens", 4, "--prompt-tokens", 40, "--experts")
    all_of_them = json.loads(pronk(*bench, "--json").stdout)["experts"]
    assert (all_of_them["experts"], all_of_them["per_token"]) == (4, 2)
    for layer in all_of_them["layers"]:
        assert sum(layer["load"]) == pytest.approx(1)
        assert 0 < layer["entropy"] <= all_of_them["most_entropy"] == 2
    fewer = json.loads(pronk(*bench, "--dynamic-experts", "0.3:1", "--json").stdout)["experts"]
    assert 1 <= fewer["per_token"] < 2
