"""Runs from the command line, end to end: what they print, leave, refuse and survive."""

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, t, write_shard

spm = pytest.importorskip("sentencepiece")
SCRIPT = ROOT / "train_gpt_mlx_kl.py"
NUMBER = r"\d+\.\d+"

# A run of a second. On CPUs the same seed gives the same bits.
TINY = """DEVICE=cpu WORKERS=2 NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1 EVAL_STRIDE=16
TRAIN_SEQ_LEN=64 TRAIN_BATCH_TOKENS=512 ITERATIONS=6 WARMDOWN_ITERS=3 WARMUP_STEPS=1
MAX_WALLCLOCK_SECONDS=0 ENGRAM_HASH_SIZE=64 ENGRAM_EMBED_DIM=8 TRAIN_LOG_EVERY=1 MIXER_MEMORY_MB=4
PACK_TEXT_BYTES=3000 COMPLEMENT_BY=bigram"""
TINY = dict(pair.split("=") for pair in TINY.split())
# For tests of something else: no context models, no checks, so no seconds for them.
NET = {"MIXER": "off", "AUDIT": 0}
KNOWN = {field.name.upper() for field in t.dataclasses.fields(t.Knobs)}
CLEAN = {name: value for name, value in os.environ.items() if name not in KNOWN}
# What two equal runs may differ in.
FLEETING = {"run_id", "train_time_ms", "step_avg_ms", "tok_s", "eval_time_ms", "train_seconds"}
FLEETING |= {"eval_seconds", "peak_memory_bytes", "gflops", "prime_seconds", "pack_seconds"}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A folder of shards in the public layout, its tokenizer two folders up."""
    home = tmp_path_factory.mktemp("home")
    folder, model = home / "datasets" / "tiny_sp300", home / "tokenizers" / "tiny_300_bpe.model"
    folder.mkdir(parents=True)
    model.parent.mkdir()
    rng = random.Random(1)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 7))) for _ in range(60)]
    texts = [" ".join(rng.choices(words, k=rng.randint(20, 120))) + " né\n" for _ in range(120)]
    options = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(model.with_suffix("")), **options
    )
    sp = spm.SentencePieceProcessor(model_file=str(model))
    ids = [[1, *sp.encode(text)] for text in texts]
    parts = {"train_000000": ids[:60], "train_000001": ids[60:108]}
    parts |= {"val_000000": ids[108:113], "val_000001": ids[113:]}
    for name, part in parts.items():
        write_shard(folder / f"tiny_{name}.bin", [token for document in part for token in document])
    value = sum(len(document) for document in ids[108:])
    text_bytes = sum(len(sp.decode(document[1:]).encode()) for document in ids[108:])
    return SimpleNamespace(path=folder, tokenizer=model, val_tokens=value, val_bytes=text_bytes)


def start(cwd, **env):
    """The script's process, in its own folder and with `env` only."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        cwd=cwd,
        env=CLEAN | {name: str(value) for name, value in env.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(process, cwd, run_id, read=""):
    """What a process printed and left: out, err, status, folder, events."""
    out, err = process.communicate()
    # Slow machines are shown a running score, which the log leaves out.
    out = re.sub(r"^eval [^:]+: \d+/.*\n", "", read + out, flags=re.M)
    folder = cwd / "logs" / run_id
    log = folder / "metrics.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    status = process.returncode
    return SimpleNamespace(out=out, err=err, status=status, folder=folder, events=events)


def run(cwd, run_id, **env):
    return end_of(start(cwd, RUN_ID=run_id, **env), cwd, run_id)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The folder that the runs start in."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def train(dataset, home):
    """train(run_id, NAME=value, ...) runs the tiny training with changed knobs."""
    return lambda run_id, **env: run(home, run_id, **{**TINY, "DATA_PATH": dataset.path, **env})


@pytest.fixture(scope="session")
def plain(train):
    """The run that the others are compared with."""
    result = train("plain", VAL_LOSS_EVERY=3)
    assert result.status == 0, result.err
    return result


def final(result):
    """The final record of a run that has to have ended well."""
    assert result.status == 0, result.err
    assert result.events[-1]["event"] == "final"
    return result.events[-1]


def error_of(result, status):
    """The error's text of a run that has to have failed without a traceback."""
    assert result.status == status, result.err
    assert "Traceback" not in result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    return errors[0]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------
# A whole run


def test_lines_that_parsers_look_for(plain):
    def lines(form):
        return re.findall(rf"^{form}", plain.out, re.M)

    end = r"(?= |$)"
    step = rf"step:(\d)/6 train_loss:{NUMBER} train_time:\d+ms step_avg:{NUMBER}ms tok_s:\d+$"
    assert lines(step) == list("123456")
    assert lines(rf"step:(\d)/6 val_loss:{NUMBER} val_bpb:{NUMBER}$") == ["3", "6"]
    (size,) = lines(rf"serialized_int6_zstd:(\d+) bytes{end}")
    assert int(size) == (plain.folder / "artifact.bin").stat().st_size
    score = (
        rf"final_int6_zstd_roundtrip val_loss:({NUMBER}) val_bpb:({NUMBER}) val_bpb_net:({NUMBER}) "
        rf"val_bpb_context:({NUMBER}) eval_time:\d+ms{end}"
    )
    exact = r"\d+\.\d{8}"
    exact = rf"final_int6_zstd_roundtrip_exact val_loss:({exact}) val_bpb:({exact}){end}"
    (score,), (exact,) = lines(score), lines(exact)
    record = final(plain)
    names = ("val_loss", "val_bpb", "val_bpb_net", "val_bpb_context")
    assert score == tuple(f"{record[name]:.4f}" for name in names)
    assert exact == tuple(f"{record[name]:.8f}" for name in names[:2])
    assert "PART" not in plain.out


def test_records(plain, dataset):
    kinds = [event["event"] for event in plain.events]
    assert kinds == [
        "config",
        *["train"] * 3,
        "val",
        *["train"] * 3,
        "val",
        "export",
        "audit",
        "eval",
        "final",
    ]
    assert {name.lower() for name in KNOWN} <= set(plain.events[0])
    record = final(plain)
    required = """val_bpb val_loss val_bpb_net val_tokens val_bytes code_bytes model_bytes
    total_bytes train_tokens train_seconds tok_s eval_seconds peak_memory_bytes device
    mlx_version audit"""
    assert set(required.split()) <= set(record)
    assert (record["val_tokens"], record["val_bytes"]) == (
        dataset.val_tokens - 1,
        dataset.val_bytes,
    )
    assert record["val_whole"] is True
    assert record["train_tokens"] == 6 * 512
    assert record["code_bytes"] == SCRIPT.stat().st_size
    assert record["model_bytes"] == (plain.folder / "artifact.bin").stat().st_size
    assert record["total_bytes"] == record["code_bytes"] + record["model_bytes"]
    assert record["audit"] == "pass" and record["mixer"] == "logistic"
    checked = " ".join(plain.events[kinds.index("audit")]["lines"])
    for words in ("causal in 3", f"{dataset.val_bytes} bytes", "tokens decoded from"):
        assert words in checked
    assert 500 < record["packed_bytes"] <= 3000 and record["packed_tokens"] > 1000
    assert math.isclose(
        record["val_bpb"],
        record["val_loss"] * record["val_tokens"] / record["val_bytes"] / math.log(2),
    )
    losses = [event["train_loss"] for event in plain.events if event["event"] == "train"]
    assert losses[-1] < losses[0]


def test_files(plain):
    names = {path.name for path in plain.folder.iterdir()}
    assert names == {"train.log", "metrics.jsonl", "model.safetensors", "artifact.bin"}
    log, source = (plain.folder / "train.log").read_text(), SCRIPT.read_text()
    assert log.startswith(source) and log.endswith(plain.out)
    assert log[len(source) : -len(plain.out)].strip("=\n") == ""
    weights, meta = t.mx.load(str(plain.folder / "model.safetensors"), return_metadata=True)
    assert json.loads(meta["knobs"])["num_layers"] == 2
    artifact = t.read_artifact(plain.folder / "artifact.bin")
    stored, packed = artifact.params, artifact.packed
    assert len(packed.code) == final(plain)["packed_bytes"]
    assert packed.token_count == final(plain)["packed_tokens"]
    assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in stored.items()}
    assert (weights["skips"] == stored["skips"]).all()  # float32 in both


def test_nothing_is_overwritten(plain, train):
    before = contents(plain.folder)
    error = error_of(train("plain"), 2)
    assert "RUN_ID=plain" in error and "RESUME" not in error  # it has no checkpoint
    checkpoint = plain.folder.parent / "cut" / "checkpoint" / "state.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert "RESUME=1" in error_of(train("cut"), 2)
    assert contents(plain.folder) == before


def test_the_same_seed_gives_the_same_run(plain, train):
    def lasting(result):
        events = [{k: v for k, v in e.items() if k not in FLEETING} for e in result.events]
        for event in events:
            if event["event"] == "audit":
                event["lines"] = [x for x in event["lines"] if not x.startswith("checks took")]
        return events

    again = train("again", VAL_LOSS_EVERY=3)
    assert lasting(again) == lasting(plain)
    artifact = plain.folder / "artifact.bin"
    assert (again.folder / "artifact.bin").read_bytes() == artifact.read_bytes()
    # Validation on the way changes nothing; another seed does.
    silent = train("silent", AUDIT=0)
    assert final(silent)["val_bpb"] == final(plain)["val_bpb"]
    assert final(train("seed", SEED=2, **NET))["val_bpb"] != final(plain)["val_bpb_net"]


def test_packed_text_teaches_the_net_the_same_again(plain, train):
    """Without a clock, weights from the contexts do not depend on how fast text is packed."""
    runs = [train(f"contexts-{i}", COMPLEMENT_BY="contexts", AUDIT=0) for i in range(2)]
    first, second, other = (final(run)["val_bpb_net"] for run in (*runs, plain))
    assert first == second != other
    one, two = ((run.folder / "artifact.bin").read_bytes() for run in runs)
    assert one == two


# --------------------------------------------------------------------------------------------------
# Scoring a file


def test_a_file_is_scored_alone(plain, dataset, tmp_path):
    """In another folder, with validation shards and nothing else: the same digits."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in dataset.path.glob("*_val_*.bin"):
        shutil.copy(path, shards)
    artifact = shutil.copy(plain.folder / "artifact.bin", tmp_path / "moved.bin")
    cwd = tmp_path / "elsewhere"
    cwd.mkdir()
    env = {"EVAL_ONLY": artifact, "DATA_PATH": shards}
    record = final(run(cwd, "alone", **env))
    names = """val_bpb val_loss val_bpb_net val_bpb_context val_tokens val_bytes model_bytes
    total_bytes audit mixer"""
    for name in names.split():
        assert record[name] == final(plain)[name], name
    assert record["train_tokens"] == 0
    checked = run(cwd, "checked", TOKENIZER_PATH=dataset.tokenizer, **env)
    assert final(checked)["val_bpb"] == record["val_bpb"] and "tokens have when" in checked.out
    # Without the audit's message, whose tokens are scored while they are decoded, too.
    assert final(run(cwd, "unchecked", AUDIT=0, **env))["val_bpb"] == record["val_bpb"]
    # The window may be longer than the one of the preset that fits this machine.
    long = final(run(cwd, "long", EVAL_SEQ_LEN=2048, EVAL_STRIDE=2048, **NET, **env))
    assert long["val_bpb"] != record["val_bpb_net"]
    damaged = tmp_path / "damaged.bin"
    damaged.write_bytes(artifact.read_bytes()[:-9])
    error = error_of(run(cwd, "bad", **{**env, "EVAL_ONLY": damaged}), 2)
    assert "damaged.bin" in error


def test_the_artifacts_own_window_counts(train, dataset, tmp_path):
    """EVAL_STRIDE fits the window in the file, whatever this machine's preset has."""
    made = train("window", EVAL_SEQ_LEN=2048, EVAL_STRIDE=512, **NET)
    env = {"EVAL_ONLY": made.folder / "artifact.bin", "DATA_PATH": dataset.path}
    again = run(tmp_path, "again", EVAL_STRIDE=2048, DEVICE="cpu", **env)
    assert final(again)["val_bpb"] != final(made)["val_bpb"]


def test_a_part_is_called_a_part(train, plain):
    result = train("part", VAL_MAX_TOKENS=900, VAL_LOSS_EVERY=2)
    record = final(result)
    assert 300 < record["val_tokens"] < 900
    scored = [event for event in result.events if "val_bpb" in event]
    assert len(scored) == 5 and not any(event["val_whole"] for event in scored)
    shown = [line for line in result.out.splitlines() if re.search("bpb|validation:", line)]
    assert len(shown) >= 7 and all("PART" in line for line in shown), shown
    # A limit that holds the whole text makes no part.
    limit = final(plain)["val_tokens"] + 1
    whole = train("whole", VAL_MAX_TOKENS=limit, **NET)
    assert final(whole)["val_whole"] and "PART" not in whole.out


def test_both_modes(train, plain):
    result = train("both", EVAL_MODE="both")
    scores = {e["mode"]: e["val_bpb"] for e in result.events if e["event"] == "eval"}
    assert list(scores) == ["standard", "sliding"]
    assert final(result)["val_bpb"] == scores["sliding"] == final(plain)["val_bpb"]
    assert scores["standard"] != scores["sliding"]
    exact = re.findall(rf"_exact val_loss:{NUMBER} val_bpb:({NUMBER})(.*)", result.out)
    assert [digits for digits, _ in exact] == [f"{bpb:.8f}" for bpb in scores.values()]
    assert [mode in label for mode, (_, label) in zip(scores, exact, strict=True)] == [True, True]
    net = {e["mode"]: e["val_bpb_net"] for e in result.events if e["event"] == "eval"}
    standard = final(train("standard", EVAL_MODE="standard", **NET))
    assert standard["val_bpb"] == net["standard"]
    equal = final(train("equal", EVAL_STRIDE=64, **NET))
    assert math.isclose(equal["val_bpb"], net["standard"], rel_tol=1e-6)


# --------------------------------------------------------------------------------------------------
# Context models


def test_packed_text_lowers_the_score_of_the_contexts(plain, train):
    """The packed text is read: the contexts know more, and the net is what it was."""
    bare = train("unpacked", PACK_TEXT_BYTES=0)
    record, packed = final(bare), final(plain)
    assert record["packed_tokens"] == 0 and record["packed_bytes"] < 10
    assert record["val_bpb_net"] == packed["val_bpb_net"]
    assert packed["val_bpb_context"] < record["val_bpb_context"] - 0.1
    assert packed["val_bpb"] < record["val_bpb"] < record["val_bpb_net"]
    one, two = (t.read_artifact(r.folder / "artifact.bin") for r in (plain, bare))
    assert (one.packed.leaf == two.packed.leaf).all()
    assert all((one.params[name] == two.params[name]).all() for name in one.params)


def test_the_mixer_can_be_switched_off_in_two_ways(plain, train):
    off, disabled = train("off", MIXER="off"), train("disabled", NGRAM_MIXER_ENABLED=0)
    for result in (off, disabled):
        record = final(result)
        assert (record["mixer"], record["audit"]) == ("off", "pass")
        assert (record["packed_bytes"], record["packed_tokens"]) == (0, 0)
        assert record["val_bpb"] == record["val_bpb_net"] == final(plain)["val_bpb_net"]
        assert record["val_bpb_context"] == record["val_bpb"]
        for name in ("MIXER_MEMORY_MB", "PACK_TEXT_BYTES"):
            assert f"warning: {name} has no effect with MIXER=off" in result.out
    assert "NGRAM" not in off.out
    artifacts = [t.read_artifact(result.folder / "artifact.bin") for result in (off, disabled)]
    assert artifacts[0].packed is artifacts[1].packed is None
    assert artifacts[0].header["tensors"] == artifacts[1].header["tensors"]


def test_a_file_can_be_scored_with_another_mixer(plain, train):
    """Without its text, where the mixer does not need it; never with text that it lacks."""
    artifact = plain.folder / "artifact.bin"
    backoff = train("backoff", EVAL_ONLY=artifact, MIXER="backoff", NGRAM_ALPHA="auto")
    record = final(backoff)
    assert (record["mixer"], record["audit"]) == ("backoff", "pass")
    assert record["val_bpb"] < record["val_bpb_net"] == final(plain)["val_bpb_net"]
    assert record["val_bpb_context"] not in (record["val_bpb"], final(plain)["val_bpb_context"])
    order = train("order", EVAL_ONLY=artifact, MIXER="backoff", NGRAM_MAX_ORDER=1, AUDIT=0)
    assert final(order)["val_bpb_context"] != record["val_bpb_context"]
    made = train("made-without", **NET)
    assert final(made)["mixer"] == "off"
    env = {"EVAL_ONLY": made.folder / "artifact.bin", "MIXER": "logistic"}
    assert "MIXER=logistic" in error_of(train("without-text", **env), 2)


def test_tables_of_another_size_cannot_read_the_text(plain, train):
    env = {"EVAL_ONLY": plain.folder / "artifact.bin"}
    error = error_of(train("other-memory", MIXER_MEMORY_MB=5, **env), 2)
    assert "MIXER_MEMORY_MB=5" in error and "has 4" in error
    # Other mixers have no such tables.
    off = train("off-memory", MIXER="off", **{**env, "MIXER_MEMORY_MB": 5, "AUDIT": 0})
    assert final(off)["val_bpb"] == final(plain)["val_bpb_net"]


def test_more_text_than_there_is_room_for_is_refused_before_training(train):
    result = train("crowded", PACK_TEXT_BYTES=16_000_000)
    error = error_of(result, 2)
    assert "PACK_TEXT_BYTES=16000000" in error
    room = int(re.search(r"leave about (\d+)", error)[1])
    assert 15_000_000 < room < 16_000_000 - SCRIPT.stat().st_size
    assert [event["event"] for event in result.events] == ["config"]
    assert not (result.folder / "artifact.bin").exists()


def test_a_message_that_does_not_decode_is_no_score(plain, dataset, tmp_path, monkeypatch, capsys):
    """The evaluating process decodes what this one sends, and says where it went wrong."""
    whole = t.encode_message

    def wrong(*args):
        message = whole(*args)
        code = bytearray(message.code)
        code[len(code) // 2] ^= 128
        return message._replace(code=bytes(code))

    monkeypatch.setattr(t, "encode_message", wrong)
    env = {**TINY, "DATA_PATH": str(dataset.path), "OUT_DIR": str(tmp_path), "RUN_ID": "r"}
    monkeypatch.setattr(t.os, "environ", {**CLEAN, **env})
    env["EVAL_ONLY"] = t.os.environ["EVAL_ONLY"] = str(plain.folder / "artifact.bin")
    with pytest.raises(t.AuditFailed, match="message"):
        t.main(*t.knobs_from_env(env))
    record = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (record["event"], record["audit"]) == ("final", "fail")
    assert "message" in record["audit_failure"] and "val_bpb" not in record
    assert t.AuditFailed.status == 3


def test_what_fails_in_the_other_process_is_told(plain, dataset, tmp_path, monkeypatch):
    """Also if it has ended by the time that its message is ready."""
    artifact = t.read_artifact(plain.folder / "artifact.bin")
    sizes = artifact.tokens.piece_bytes.copy()
    sizes[270] += 1  # now a byte table of another tokenizer
    tokens = t.dataclasses.replace(artifact.tokens, piece_bytes=sizes)
    cfg, groups = t.Knobs(**artifact.header["knobs"]), t.group_parameters(list(artifact.params))
    path = tmp_path / "artifact.bin"
    t.write_artifact(path, artifact.params, groups, cfg, tokens, artifact.packed)
    whole = t.encode_message

    def late(*args):
        (process,) = t.multiprocessing.active_children()
        process.join(60)
        assert process.exitcode == 0
        return whole(*args)

    monkeypatch.setattr(t, "encode_message", late)
    cfg = t.dataclasses.replace(cfg, device="cpu", workers=1)
    with t.make_workers(cfg) as workers, pytest.raises(t.AuditFailed, match="bytes"):
        t.evaluate(cfg, path, dataset.path, workers, None, dataset.tokenizer)


# --------------------------------------------------------------------------------------------------
# Runs that are cut short


def checkpoint_of(result):
    """(the arrays, the state) of a run's checkpoint; every number has to be finite."""
    (path,) = (result.folder / "checkpoint").iterdir()
    arrays, meta = t.mx.load(str(path), return_metadata=True)
    assert arrays and all(t.mx.isfinite(a).all().item() for a in arrays.values())
    return arrays, json.loads(meta["state"])


def test_a_loss_that_is_not_finite_stops_the_run(train):
    result = train("nan", SCALAR_LR=1e25)
    error = error_of(result, 1)
    assert re.search("nan|inf", error) and "checkpoint" in error and "MATRIX_LR" in error
    _, state = checkpoint_of(result)
    trained = [event["step"] for event in result.events if event["event"] == "train"]
    assert trained and state["step"] == trained[-1]
    assert not (result.folder / "artifact.bin").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on(number, train, dataset, home):
    name, knobs = (
        f"cut-{number}",
        {"ITERATIONS": 90, "WARMDOWN_ITERS": 60, "EMA_START_FRAC": 0.01, "AUDIT": 0},
    )
    whole = train(f"uncut-{number}", **knobs)
    env = {**TINY, "DATA_PATH": dataset.path, **knobs}
    process, read = start(home, RUN_ID=name, **env), ""
    while "step:9/" not in read:
        line = process.stdout.readline()
        assert line, process.communicate()
        read += line
    process.send_signal(number)
    cut = end_of(process, home, name, read)
    error = error_of(cut, 1)
    assert "RESUME=1" in error and f"RUN_ID={name}" in error
    _, state = checkpoint_of(cut)
    assert 9 <= state["step"] < 90
    # Settings that would make another run of it are refused, and nothing is lost by that.
    before = contents(cut.folder)
    assert "MODEL_DIM" in error_of(train(name, RESUME=1, **{**knobs, "MODEL_DIM": 64}), 2)
    assert contents(cut.folder / "checkpoint").items() <= before.items()
    rest = train(name, RESUME=1, **knobs)
    assert final(rest)["val_bpb"] == final(whole)["val_bpb"]
    steps = [event["step"] for event in rest.events if event["event"] == "train"]
    assert steps == list(range(1, 91))
    artifacts = [(r.folder / "artifact.bin").read_bytes() for r in (rest, whole)]
    assert artifacts[0] == artifacts[1]


def test_only_a_checkpoint_can_be_resumed(train):
    first = train("no-checkpoint", **NET)
    assert "checkpoint" in error_of(train("no-checkpoint", RESUME=1, **NET), 2)
    assert final(train("kept", CHECKPOINT_EVERY=6, **NET)) and final(first)
    extended = train("kept", RESUME=1, ITERATIONS=8, **NET)
    assert [e["step"] for e in extended.events if e["event"] == "train"] == list(range(1, 9))
    assert "RUN_ID" in error_of(train("", RESUME=1), 2)


def test_a_run_without_a_name_can_be_resumed(train):
    first = train("", CHECKPOINT_EVERY=4, **NET)
    name = re.search(r"everything is in logs/(\S+)", first.out)[1]
    resumed = train(name, RESUME=1, ITERATIONS=8, **NET)
    assert final(resumed)["train_steps"] == 8


# --------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "env, status, words",
    [
        ({"VOCAB_SIZE": 301}, 2, ["VOCAB_SIZE=301", "300"]),
        ({"TOKENIZER_PATH": "absent.model"}, 2, ["TOKENIZER_PATH", "absent.model"]),
        ({"DATA_PATH": "absent"}, 2, ["DATA_PATH", "absent"]),
        ({"EVAL_ONLY": "absent.bin"}, 2, ["EVAL_ONLY", "absent.bin"]),
        ({"VAL_MAX_TOKENS": 1}, 2, ["fewer than 2 tokens"]),
        ({"OUT_DIR": str(SCRIPT)}, 2, ["OUT_DIR"]),
    ],
)
def test_mistakes_take_a_line(train, env, status, words):
    error = error_of(train("mistake-" + "-".join(env), **env), status)
    assert all(word in error for word in words)


def test_shards_of_another_tokenizer_are_refused(train, plain, dataset, tmp_path):
    folder = tmp_path / "datasets" / "other_sp300"
    shutil.copytree(dataset.path, folder)
    (folder / "manifest.json").write_text(json.dumps({"tokenizer_sha256": "0" * 64}))
    knobs = {"DATA_PATH": folder, "TOKENIZER_PATH": dataset.tokenizer}
    assert "another tokenizer" in error_of(train("other-tokenizer", **knobs), 2)
    artifact = plain.folder / "artifact.bin"
    assert "another tokenizer" in error_of(train("other", EVAL_ONLY=artifact, **knobs), 2)


def test_a_file_is_not_scored_with_another_shape(train, plain):
    result = train("reshaped", EVAL_ONLY=plain.folder / "artifact.bin", NUM_LAYERS=3)
    assert "NUM_LAYERS=3" in error_of(result, 2)
    other = train("other-vocabulary", EVAL_ONLY=plain.folder / "artifact.bin", VOCAB_SIZE=9)
    assert "VOCAB_SIZE=9" in error_of(other, 2)


def test_more_workers_than_work(train, plain):
    many = final(train("many-workers", WORKERS=64, **NET))
    assert math.isclose(many["val_bpb"], final(plain)["val_bpb_net"], rel_tol=1e-6)


@pytest.mark.skipif(t.mx.is_available(t.mx.gpu), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named(train):
    assert "DEVICE=gpu" in error_of(train("gpu", DEVICE="gpu"), 2)


def test_a_model_that_is_too_large_is_refused_before_training(train):
    tables = {"BIGRAM_HASH_SIZE": 65536, "SKIPGRAM_HASH_SIZE": 65536}
    result = train("large", ENGRAM_LITE_ENABLED=0, **tables)
    error = error_of(result, 1)
    excess = re.search(r"([\d,]+) bytes, ([\d,]+) over the limit of 16,000,000", error)
    total, over = (int(number.replace(",", "")) for number in excess.groups())
    assert total - over == 16_000_000
    assert "bigram.table" in error and "skipgram.table" in error
    assert [event["event"] for event in result.events] == ["config"]


# --------------------------------------------------------------------------------------------------
# Variants: each runs to its end, and does something


VARIANTS = {
    "baseline": "PRESET=baseline",
    "h100": "PRESET=h100",
    "bigram-hash": "ENGRAM_LITE_ENABLED=0 BIGRAM_HASH_SIZE=64",
    "no-hashes": "ENGRAM_HASH_SIZE=0",
    "skipgram": "SKIPGRAM_HASH_SIZE=64",
    "qat": "LATE_QAT_THRESHOLD=1",
    "swa": "USE_SWA=1 EMA_START_FRAC=0.2",
    "no-average": "EMA_DECAY=0",
    "clip": "GRAD_CLIP_NORM=0.01 ADAM_EPS=0.001",
    "bits": "WEIGHT_BITS=4",
    "plain-loss": "COMPLEMENT_ALPHA=0",
    "more-complement": "COMPLEMENT_ALPHA=1",
    "one-layer": "NUM_LAYERS=1",
    "odd-layers": "NUM_LAYERS=3 XSA_LAST_N=2",
    "xsa": "XSA_LAST_N=2",
    "no-smear": "SMEAR_ENABLED=0",
    "no-ln-scale": "LN_SCALE_ENABLED=0",
    "not-orthogonal": "USE_ORTHO_INIT=0",
    "relu": "MLP_LEAK=0",
    "mlp": "MLP_MULT=3",
    "rope": "ROPE_DIMS=8",
    "no-warmup": "WARMUP_STEPS=0 MUON_MOMENTUM_WARMUP_STEPS=0",
    "decay": "MUON_WEIGHT_DECAY=0.1 ADAM_WEIGHT_DECAY=0.1",
}
# These change how a run is computed, not what: the score stays within rounding.
EQUAL = {
    "chunks": "LOGIT_CHUNK_TOKENS=100",
    "microbatches": "MLX_MAX_MICROBATCH_TOKENS=64 GRAD_ACCUM_STEPS=3 MLX_EAGER_EVAL=0",
    "workers": "WORKERS=1",
    "eval-batch": "EVAL_BATCH_SEQS=1",
    "checkpoints": "CHECKPOINT_EVERY=2",
}


@pytest.mark.parametrize("name", [*VARIANTS, *EQUAL])
def test_variants(name, plain, dataset, tmp_path, monkeypatch, capsys):
    """The net's score without a process of its own or another's, to save the seconds they take."""

    def evaluate(cfg, path, folder, workers, mixer, tokenizer):
        result = t.Evaluation(cfg, path, folder, workers).run(lambda: None, tokenizer)
        return {**result, "peak_memory_bytes": 0}

    monkeypatch.setattr(t, "evaluate", evaluate)
    text = VARIANTS.get(name) or EQUAL[name]
    env = {**TINY, "MIXER": "off", "AUDIT": "0", "DATA_PATH": str(dataset.path)}
    env |= {"OUT_DIR": str(tmp_path), "RUN_ID": "r"}
    env |= dict(pair.split("=") for pair in text.split())
    t.main(*t.knobs_from_env(env))
    record = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    bpb, usual = record["val_bpb"], final(plain)["val_bpb_net"]
    assert math.isfinite(bpb) and bpb < 9  # a byte at a time, at random, costs 8
    if name in EQUAL:
        assert math.isclose(bpb, usual, rel_tol=1e-6)
    else:
        assert bpb != usual


# --------------------------------------------------------------------------------------------------
# Several processes
def start_ranks(cwd, count, own=None, **env):
    """The processes that `mlx.launch -n count --backend ring` would start here; `own` settings."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    for s in sockets:
        s.close()
    file = cwd / f"hosts-{env['RUN_ID']}.json"
    file.write_text(json.dumps(hosts))
    own = own or [{}] * count
    return [start(cwd, MLX_HOSTFILE=file, MLX_RANK=i, **{**env, **own[i]}) for i in range(count)]


def wait_for(process, text):
    """Read what a process prints until a line has the text."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.communicate())


RANKS = {"WORKERS": 1, "ITERATIONS": 20, "WARMDOWN_ITERS": 10, **NET}


def weights_of(result):
    return t.mx.load(str(result.folder / "model.safetensors"))


@pytest.mark.parametrize("partner", ["bigram", "contexts"])
def test_two_ranks_train_as_one(partner, train, dataset, home):
    """Half a batch each, through the launcher that users have: the same net after 20 steps."""
    run_id, launcher = f"two-ranks-{partner}", shutil.which("mlx.launch")
    launcher = launcher or str(Path(sys.executable).parent / "mlx.launch")
    settings = {**RANKS, "COMPLEMENT_ALPHA": 1}
    if partner == "contexts":  # rank 1 learns from rank 0 what was foreseen
        settings |= {"MIXER": "logistic", "COMPLEMENT_BY": "contexts"}
    one_rank = train(f"one-rank-{partner}", **settings)
    env = {**TINY, "DATA_PATH": dataset.path, **settings, "RUN_ID": run_id}
    command = [launcher, "-n", "2", "--backend", "ring", "--python", sys.executable, str(SCRIPT)]
    env = CLEAN | {name: str(value) for name, value in env.items()}
    done = subprocess.run(
        command, cwd=home, env=env, capture_output=True, text=True, stdin=subprocess.PIPE
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    folder = home / "logs" / run_id
    log = (folder / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in log]
    assert events[0]["ranks"] == 2 and events[-1]["event"] == "final"
    assert [e["step"] for e in events if e["event"] == "train"] == list(range(1, 21))
    losses = [[e["train_loss"] for e in run if e["event"] == "train"]
              for run in (events, one_rank.events)]  # fmt: skip
    np.testing.assert_allclose(*losses, rtol=1e-5)
    theirs = weights_of(SimpleNamespace(folder=folder))
    for name, ours in weights_of(one_rank).items():
        np.testing.assert_allclose(theirs[name], ours, rtol=1e-3, atol=1e-4, err_msg=name)


def test_ranks_agree_on_the_clock_and_go_on_from_rank_0(dataset, home):
    env = {**TINY, "DATA_PATH": dataset.path, **RANKS, "RUN_ID": "clock-ranks"}
    env |= {"ITERATIONS": 100_000, "MAX_WALLCLOCK_SECONDS": 2, "CHECKPOINT_EVERY": 5}
    for resume in (0, 1):
        ranks = start_ranks(home, 3, **env, RESUME=resume)
        ends = [end_of(process, home, "clock-ranks") for process in ranks]
        assert [end.status for end in ends] == [0, 0, 0], [end.err for end in ends]
        assert not ends[1].out and not ends[2].out
        env["MAX_WALLCLOCK_SECONDS"] = 3
    steps = [e["step"] for e in ends[0].events if e["event"] == "train"]
    first = next(e["train_steps"] for e in ends[0].events if e["event"] == "final")
    assert first in steps and ends[0].events[-1]["train_steps"] > first


@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_stop_when_a_rank_is_killed(killed, dataset, home):
    run_id = f"killed-{killed}"
    env = {**TINY, "DATA_PATH": dataset.path, **RANKS, "RUN_ID": run_id, "ITERATIONS": 100_000}
    ranks = start_ranks(home, 2, **env)
    wait_for(ranks[0], "step:5/")
    ranks[killed].kill()
    begin = time.monotonic()
    other = end_of(ranks[1 - killed], home, run_id)
    assert time.monotonic() - begin < 30
    ranks[killed].communicate()
    assert "another rank is gone" in error_of(other, 1)
    assert ("RESUME=1" in other.err) == (killed == 1)  # only rank 0 keeps the state
    if killed == 1:
        assert checkpoint_of(other)[1]["step"] >= 5


def test_ranks_with_other_settings_are_refused(dataset, home):
    env = {**TINY, "DATA_PATH": dataset.path, **RANKS, "RUN_ID": "unlike"}
    ranks = start_ranks(home, 2, [{}, {"MODEL_DIM": 48}], **env)
    for process in ranks:
        assert "--env" in error_of(end_of(process, home, "unlike"), 2)


def test_an_artifact_is_scored_by_rank_0_alone(plain, dataset, home):
    env = {"DEVICE": "cpu", "DATA_PATH": dataset.path, "AUDIT": 0, "RUN_ID": "scored-by-ranks"}
    ranks = start_ranks(home, 2, EVAL_ONLY=plain.folder / "artifact.bin", **env)
    ends = [end_of(process, home, "scored-by-ranks") for process in ranks]
    assert final(ends[0])["val_bpb"] == final(plain)["val_bpb"]
    assert (ends[1].status, ends[1].out) == (0, "")


def test_a_rank_without_a_window_is_refused(dataset, home):
    env = {**TINY, "DATA_PATH": dataset.path, **RANKS, "RUN_ID": "idle", "TRAIN_BATCH_TOKENS": 64}
    ranks = start_ranks(home, 2, **env)
    for process in ranks:
        assert "TRAIN_BATCH_TOKENS" in error_of(end_of(process, home, "idle"), 2)
