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
import sentencepiece
from conftest import ROOT, t, write_shard

spm = pytest.importorskip("sentencepiece")
SCRIPT = ROOT / "train_gpt_mlx_kl.py"
NUMBER = r"\d+\.\d+"

# A run of a second. On CPUs the same seed gives the same bits.
TINY = """DEVICE=cpu WORKERS=2 NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1 EVAL_STRIDE=16
TRAIN_SEQ_LEN=64 TRAIN_BATCH_TOKENS=512 ITERATIONS=6 WARMDOWN_ITERS=3 WARMUP_STEPS=1 EMA_DECAY=0.98
MAX_WALLCLOCK_SECONDS=0 ENGRAM_HASH_SIZE=64 ENGRAM_EMBED_DIM=8 TRAIN_LOG_EVERY=1 MIXER_MEMORY_MB=4
PACK_TEXT_BYTES=3000"""
TINY = dict(pair.split("=") for pair in TINY.split())
# For tests of something else: no context models, no checks, so no seconds for them.
NET = {"MIXER": "off", "AUDIT": 0}
KNOWN = {field.name.upper() for field in t.dataclasses.fields(t.Knobs)}
CLEAN = {name: value for name, value in os.environ.items() if name not in KNOWN}
# What two equal runs may differ in.
FLEETING = {"run_id", "train_time_ms", "step_avg_ms", "tok_s", "eval_time_ms", "train_seconds"}
FLEETING |= {
    "ended",
    "elapsed_s",
    "eval_seconds",
    "peak_memory_bytes",
    "gflops",
    "prime_seconds",
    "pack_seconds",
    "message_seconds",
}
# What a score is.
SCORED = ["val_bpb", "val_loss", "val_bpb_net", "val_bpb_context", "val_tokens", "val_bytes"]
SCORED += ["model_bytes", "audit", "mixer", "experts"]


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


def start(cwd, *command, **env):
    """A process in its own folder and with `env` only; without a command the script's."""
    return subprocess.Popen(
        command or [sys.executable, SCRIPT],
        cwd=cwd,
        env=CLEAN | {name: str(value) for name, value in env.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(process, cwd, run_id, read=""):
    """What a process printed and left: out, err, status, folder, events."""
    out, err = process.communicate(timeout=300)
    # Slow machines are shown a running score, which the log leaves out.
    out = re.sub(r"^eval [^:]+: \d+/.*\n", "", read + out, flags=re.M)
    folder = cwd / "logs" / run_id
    log = folder / "metrics.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    status = process.returncode
    return SimpleNamespace(out=out, err=err, status=status, folder=folder, events=events)


def run(cwd, run_id, *command, **env):
    return end_of(start(cwd, *command, **{"RUN_ID": run_id, **env}), cwd, run_id)


def read_until(process, text):
    """What a process prints up to the line that has the text."""
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return read
    raise AssertionError((read, process.communicate()))


def edited(folder, addition=""):
    """A copy of the script as a user's edit leaves it: `addition` follows its definitions."""
    folder.mkdir(exist_ok=True)
    definitions, main = SCRIPT.read_text().rsplit("\nif __name__", 1)
    path = folder / SCRIPT.name
    path.write_text(f"{definitions}\n{addition}\n\nif __name__{main}")
    return path


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The folder that the runs start in."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def train(dataset, home):
    """train(run_id, NAME=value, ...) runs the tiny training with changed knobs."""
    return lambda run_id, **env: run(home, run_id, **{**TINY, "DATA_PATH": dataset.path, **env})


@pytest.fixture
def main(dataset, tmp_path, monkeypatch):
    """main(run_id, NAME=value, ...): the tiny training in this process, without context models.

    The program that scores is called in place of being started, which saves a second. Returns the
    run's events.
    """

    def run_here(run_id, **env):
        env = {**TINY, **NET, "DATA_PATH": dataset.path, "OUT_DIR": tmp_path, **env}
        env = {name: str(value) for name, value in {**env, "RUN_ID": run_id}.items()}

        def score_here(report, path, folder, tokenizer_path):
            report.close()
            t.score_mode(path, env)

        monkeypatch.setattr(t, "score_anew", score_here)
        t.main(*t.knobs_from_env(env), env)
        log = tmp_path / run_id / "metrics.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()]

    return run_here


@pytest.fixture
def score(main):
    """score(run_id, artifact, NAME=value, ...): the final record of scoring in this process."""
    return lambda run_id, path, **env: main(run_id, EVAL_ONLY=path, **env)[-1]


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
        rf"final_int6_zstd_roundtrip val_loss:({NUMBER}) val_bpb:({NUMBER}) eval_time:\d+ms "
        rf"val_bpb_net:({NUMBER}) val_bpb_context:({NUMBER}){end}"
    )
    exact = r"\d+\.\d{8}"
    exact = rf"final_int6_zstd_roundtrip_exact val_loss:({exact}) val_bpb:({exact}){end}"
    (score,), (exact,) = lines(score), lines(exact)
    record = final(plain)
    names = ("val_loss", "val_bpb", "val_bpb_net", "val_bpb_context")
    assert score == tuple(f"{record[name]:.4f}" for name in names)
    assert exact == tuple(f"{record[name]:.8f}" for name in names[:2])
    assert "PART" not in plain.out


def test_a_run_says_what_is_not_its_presets(plain):
    (line,) = [x for x in plain.out.splitlines() if x.startswith("settings unlike the preset's: ")]
    own = dict(pair.split("=") for pair in line.partition(": ")[2].split())
    assert own["MODEL_DIM"] == "32" and own["MIXER_MEMORY_MB"] == "4"
    assert own["ITERATIONS"] == "6" and own["WORKERS"] == "2"
    assert not {"MUON_MOMENTUM", "SEED", "RUN_ID", "OUT_DIR", "DATA_PATH"} & set(own)


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
    of_size = [c.name for c in t.SLOT_CONTEXTS if c.size in ("small", "medium")]
    assert list(record["experts"]) == ["net", "match", "candidates, order 4", *of_size]
    assert 0.001 < record["experts"]["order 1"] < 1
    losses = [event["train_loss"] for event in plain.events if event["event"] == "train"]
    assert losses[-1] < losses[0]


def test_files(plain):
    names = {path.name for path in plain.folder.iterdir()}
    assert names == {"train.log", "metrics.jsonl", "model.safetensors", "artifact.bin",
                     "message.bin", "costs.npz", "checkpoint", SCRIPT.name}  # fmt: skip
    assert (plain.folder / SCRIPT.name).read_bytes() == SCRIPT.read_bytes()
    log, source = (plain.folder / "train.log").read_text(), SCRIPT.read_text()
    assert log.startswith(source) and log.endswith(plain.out)
    assert log[len(source) : -len(plain.out)].strip("=\n") == ""
    weights, meta = t.mx.load(str(plain.folder / "model.safetensors"), return_metadata=True)
    assert json.loads(meta["knobs"])["num_layers"] == 2
    artifact = t.read_artifact(plain.folder / "artifact.bin")
    stored, packed = artifact.params, artifact.packed
    assert packed.total() == (final(plain)["packed_tokens"], final(plain)["packed_bytes"])
    assert packed.rehearsal.token_count == 600  # a fifth of PACK_TEXT_BYTES, of 704 that are kept
    assert ", of which the net does not see the first 704\n" in plain.out
    assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in stored.items()}
    assert (weights["skips"] == stored["skips"]).all()  # float32 in both


def test_nothing_is_overwritten(plain, train):
    before = contents(plain.folder)
    error = error_of(train("plain"), 2)
    assert "RUN_ID=plain" in error and "RESUME=1" in error
    finished = train("plain", RESUME=1, VAL_LOSS_EVERY=3)
    assert finished.status == 0 and "is finished: val_bpb" in finished.out
    assert contents(plain.folder) == before


def test_the_same_seed_gives_the_same_run(plain, train, main):
    def lasting(result):
        events = [{k: v for k, v in e.items() if k not in FLEETING} for e in result.events]
        for event in events:
            if event["event"] == "audit":
                event["lines"] = [x for x in event["lines"] if not x.startswith("checks took")]
        return events

    again = train("again", VAL_LOSS_EVERY=3)
    assert lasting(again) == lasting(plain)
    for name in ("artifact.bin", "message.bin"):
        assert (again.folder / name).read_bytes() == (plain.folder / name).read_bytes()
    # Validation on the way changes nothing; another seed does.
    assert main("silent", VAL_LOSS_EVERY=0)[-1]["val_bpb"] == final(plain)["val_bpb_net"]
    assert main("seed", SEED=2)[-1]["val_bpb"] != final(plain)["val_bpb_net"]


# --------------------------------------------------------------------------------------------------
# Scoring a file


def test_a_file_is_scored_alone(plain, dataset, tmp_path, score):
    """In another folder, with validation shards and nothing else: the same digits.

    The first time it writes the message that the second time decodes.
    """
    shards, cwd = tmp_path / "shards", tmp_path / "elsewhere"
    shards.mkdir()
    cwd.mkdir()
    for path in dataset.path.glob("*_val_*.bin"):
        shutil.copy(path, shards)
    artifact = shutil.copy(plain.folder / "artifact.bin", tmp_path / "moved.bin")
    message = tmp_path / "message.bin"
    env = {"DEVICE": "cpu", "WORKERS": 2, "DATA_PATH": shards, "EVAL_ONLY": artifact}
    alone = run(cwd, "alone", **env)
    record = final(alone)
    assert record["audit"] == "pass, bytes unchecked"
    for name in {*SCORED, "total_bytes"} - {"audit"}:
        assert record[name] == final(plain)[name], name
    assert record["train_tokens"] == 0
    assert f"64 tokens written to {message}" in alone.out and "bytes not checked" in alone.out
    assert message.read_bytes() == (plain.folder / "message.bin").read_bytes()
    again = run(cwd, "again", TOKENIZER_PATH=dataset.tokenizer, **env)
    assert {name: final(again)[name] for name in SCORED} == {n: final(plain)[n] for n in SCORED}
    assert "64 tokens decoded from" in again.out and "tokens have when" in again.out
    assert "written" not in again.out
    # Without the audit's message, whose tokens are scored while they are decoded, too.
    assert final(run(cwd, "unchecked", AUDIT=0, **env))["val_bpb"] == record["val_bpb"]
    # The window may be longer than the one of the preset that fits this machine.
    long = score("long", artifact, EVAL_SEQ_LEN=2048, EVAL_STRIDE=2048)
    assert long["val_bpb"] != record["val_bpb_net"]


def test_the_artifacts_own_window_counts(main, score, tmp_path):
    """EVAL_STRIDE fits the window in the file, whatever this machine's preset has."""
    made = main("window", EVAL_SEQ_LEN=2048, EVAL_STRIDE=512)[-1]
    again = score("again", tmp_path / "window" / "artifact.bin", EVAL_STRIDE=2048)
    assert again["val_bpb"] != made["val_bpb"]


def test_a_part_is_called_a_part(plain, main, capsys):
    events = main("part", VAL_MAX_TOKENS=900, VAL_LOSS_EVERY=2)
    assert 300 < events[-1]["val_tokens"] < 900
    scored = [event for event in events if "val_bpb" in event]
    assert len(scored) == 5 and not any(event["val_whole"] for event in scored)
    shown = [x for x in capsys.readouterr().out.splitlines() if re.search("bpb|validation:", x)]
    assert len(shown) >= 7 and all("PART" in line for line in shown), shown
    # A limit that holds the whole text makes no part.
    whole = main("whole", VAL_MAX_TOKENS=final(plain)["val_tokens"] + 1)
    assert whole[-1]["val_whole"] and "PART" not in capsys.readouterr().out


def test_both_modes(train, plain, main):
    result = train("both", EVAL_MODE="both", EVAL_ONLY=plain.folder / "artifact.bin")
    scores = {e["mode"]: e["val_bpb"] for e in result.events if e["event"] == "eval"}
    assert list(scores) == ["standard", "sliding"]
    assert final(result)["val_bpb"] == scores["sliding"] == final(plain)["val_bpb"]
    assert scores["standard"] != scores["sliding"]
    exact = re.findall(rf"_exact val_loss:{NUMBER} val_bpb:({NUMBER})(.*)", result.out)
    assert [digits for digits, _ in exact] == [f"{bpb:.8f}" for bpb in scores.values()]
    assert [mode in label for mode, (_, label) in zip(scores, exact, strict=True)] == [True, True]
    net = {e["mode"]: e["val_bpb_net"] for e in result.events if e["event"] == "eval"}
    assert main("standard", EVAL_MODE="standard")[-1]["val_bpb"] == net["standard"]
    equal = main("equal", EVAL_STRIDE=64)[-1]["val_bpb"]
    assert math.isclose(equal, net["standard"], rel_tol=1e-6)


def test_a_damaged_message_is_no_score(plain, train, tmp_path):
    """One flipped bit: the audit fails, and with it the process."""
    artifact = shutil.copy(plain.folder / "artifact.bin", tmp_path)
    message = bytearray((plain.folder / "message.bin").read_bytes())
    message[message.index(b"\n") + 5] ^= 16
    (tmp_path / "message.bin").write_bytes(message)
    result = train("flipped", EVAL_ONLY=artifact)
    assert "audit failed: message" in error_of(result, 3)
    record = result.events[-1]
    assert (record["event"], record["audit"]) == ("final", "fail")
    assert "message" in record["audit_failure"] and "val_bpb" not in record
    assert "final_int6_zstd_roundtrip" not in result.out


def test_the_end_of_scoring_is_the_runs_own(train, dataset, home, tmp_path):
    """A byte table that counts one byte too many fails the audit of a run that trained."""
    script = edited(tmp_path, """
honest = Tokenizer.bytes_of
if CFG.eval_only:
    Tokenizer.bytes_of = lambda self, *tokens: honest(self, *tokens) + 1
""")  # fmt: skip
    env = {**TINY, **NET, "AUDIT": 1, "DATA_PATH": dataset.path}
    result = run(home, "cheat", sys.executable, script, **env)
    assert "audit failed: bytes" in error_of(result, 3)
    assert result.out.splitlines()[-1].startswith("audit failed: bytes")
    kinds = [event["event"] for event in result.events]
    assert kinds.count("config") == 1 and kinds[-3:] == ["export", "audit", "final"]
    assert result.events[-1]["audit"] == "fail" and "val_bpb" not in result.events[-1]
    log = (result.folder / "train.log").read_text()
    assert log.endswith(result.out)


# --------------------------------------------------------------------------------------------------
# Context models


def test_three_trees_are_better_than_one(plain, train):
    """Through the whole chain: packed, primed, the message decoded by another process."""
    large = train("three-trees", MIXER_SIZE="large")
    record, one = final(large), final(plain)
    assert record["audit"] == "pass" and record["val_bpb_net"] == one["val_bpb_net"]
    assert re.search(r"^audit: \d+ tokens decoded from \d+ bytes", large.out, re.M)
    assert record["val_bpb_context"] < one["val_bpb_context"]
    leaves = t.read_artifact(large.folder / "artifact.bin").packed.leaves
    assert len(np.unique(leaves, axis=0)) == len(leaves) == 3
    assert set(record["experts"]) == set(one["experts"])


def test_the_other_trees_read_the_text_after_training_on_a_cpu(train):
    """And then decode the message with the first one."""
    large = train("late", MIXER_SIZE="large", MAX_WALLCLOCK_SECONDS=600)
    lines = [line for line in large.out.splitlines() if re.search("trees|decoded from", line)]
    assert [line.split()[0] for line in lines] == ["the", "audit:"]
    assert large.events[-1]["message_seconds"] > 0 and final(large)["audit"] == "pass"


def test_packed_text_lowers_the_score_of_the_contexts(plain, train):
    """The packed text is read: the contexts know more, and the net is what it was."""
    bare = train("unpacked", PACK_TEXT_BYTES=0, AUDIT=0)
    record, packed = final(bare), final(plain)
    assert record["packed_tokens"] == 0 and record["packed_bytes"] < 10
    assert record["val_bpb_net"] == packed["val_bpb_net"]
    assert packed["val_bpb_context"] < record["val_bpb_context"] - 0.1
    assert packed["val_bpb"] < record["val_bpb"] < record["val_bpb_net"]
    one, two = (t.read_artifact(r.folder / "artifact.bin") for r in (plain, bare))
    assert all((one.params[name] == two.params[name]).all() for name in one.params)


@pytest.mark.parametrize("env", [{"MIXER": "off"}, {"MIXER": "logistic", "NGRAM_MIXER_ENABLED": 0}])
def test_the_mixer_can_be_switched_off_in_two_ways(env, plain, main, capsys, tmp_path):
    record, shown = main("off", AUDIT=1, **env)[-1], capsys.readouterr().out
    assert (record["mixer"], record["audit"]) == ("off", "pass")
    assert (record["packed_bytes"], record["packed_tokens"]) == (0, 0)
    assert record["val_bpb"] == record["val_bpb_net"] == final(plain)["val_bpb_net"]
    assert record["val_bpb_context"] == record["val_bpb"] and record["experts"] == {}
    assert f"val_bpb {record['val_bpb']:.4f} (net alone; audit: pass)" in shown
    assert "contexts alone" not in shown and "without context models" in shown
    for name in ("MIXER_MEMORY_MB", "PACK_TEXT_BYTES"):
        assert f"warning: {name} has no effect with MIXER=off" in shown
    assert ("warning: MIXER=logistic has no effect" in shown) == ("NGRAM_MIXER_ENABLED" in env)
    assert not (tmp_path / "off" / "message.bin").exists()
    off, on = (t.read_artifact(f / "artifact.bin") for f in (tmp_path / "off", plain.folder))
    assert off.packed is None and off.header["tensors"] == on.header["tensors"]


def test_a_file_can_be_scored_with_another_mixer(plain, score, main, tmp_path):
    """Without its text, where the mixer does not need it; never with text that it lacks."""
    artifact = plain.folder / "artifact.bin"
    record = score("backoff", artifact, MIXER="backoff", NGRAM_ALPHA="auto", AUDIT=1)
    assert (record["mixer"], record["audit"]) == ("backoff", "pass")
    assert record["val_bpb"] < record["val_bpb_net"] == final(plain)["val_bpb_net"]
    assert record["val_bpb_context"] not in (record["val_bpb"], final(plain)["val_bpb_context"])
    order = score("order", artifact, MIXER="backoff", NGRAM_MAX_ORDER=1)
    assert order["val_bpb_context"] != record["val_bpb_context"]
    assert main("made-without")[-1]["mixer"] == "off"
    with pytest.raises(t.UserError, match="MIXER=logistic"):
        score("without-text", tmp_path / "made-without" / "artifact.bin", MIXER="logistic")


def test_tables_of_another_size_cannot_read_the_text(plain, score):
    artifact = plain.folder / "artifact.bin"
    with pytest.raises(t.UserError, match=r"MIXER_MEMORY_MB=5.*has 4"):
        score("other-memory", artifact, MIXER="logistic", MIXER_MEMORY_MB=5)
    # Other mixers have no such tables.
    off = score("off-memory", artifact, MIXER="off", MIXER_MEMORY_MB=5)
    assert off["val_bpb"] == final(plain)["val_bpb_net"]


def test_more_text_than_there_is_room_for_is_refused_before_training(main, tmp_path):
    with pytest.raises(t.UserError, match="PACK_TEXT_BYTES=16000000") as error:
        main("crowded", MIXER="logistic", PACK_TEXT_BYTES=16_000_000)
    room = int(re.search(r"leave about (\d+)", str(error.value))[1])
    assert 15_000_000 < room < 16_000_000 - SCRIPT.stat().st_size
    assert not (tmp_path / "crowded").exists()  # the name is still free


# --------------------------------------------------------------------------------------------------
# Runs that are cut short


def checkpoint_of(result):
    """(the arrays, the counters) of a run's newest checkpoint; every number has to be finite."""
    files = sorted(path.name for path in (result.folder / "checkpoint").iterdir())
    path = result.folder / "checkpoint" / files[-1]
    assert len(files) <= 2 and all(name.startswith("state-") for name in files)
    arrays, meta = t.mx.load(str(path), return_metadata=True)
    floats = [a for a in arrays.values() if a.dtype == t.mx.float32]
    assert floats and all(t.mx.isfinite(a).all().item() for a in floats)
    return arrays, json.loads(meta["facts"])["counters"]


def test_a_loss_that_is_not_finite_stops_the_run(train):
    """It names the tensors and keeps no spoilt state; the advice that it gives can be followed."""
    result = train("nan", SCALAR_LR=1e25, CHECKPOINT_SECONDS=0, **NET)
    error = error_of(result, 1)
    assert re.search("loss nan|inf", error) and "tok_emb" in error and "SCALAR_LR" in error
    assert not (result.folder / "checkpoint").exists()
    assert not (result.folder / "artifact.bin").exists()
    again = train("nan", SCALAR_LR=0.04, RESUME=1, **NET)
    assert final(again)["train_steps"] == 6


def test_a_checkpoint_before_a_divergence_goes_on_with_lower_rates(train):
    first = train("lower", ITERATIONS=3, **NET)
    spoilt = train("lower", ITERATIONS=6, RESUME=1, SCALAR_LR=1e25, **NET)
    assert "SCALAR_LR" in error_of(spoilt, 1) and checkpoint_of(spoilt)[1]["step"] == 3
    rest = train("lower", ITERATIONS=6, RESUME=1, SCALAR_LR=0.01, **NET)
    assert "SCALAR_LR was 1e+25, and is 0.01" in rest.out
    assert [e["train_steps"] for e in rest.events if e["event"] == "final"] == [3, 6]
    assert final(first)["val_bpb"] != final(rest)["val_bpb"]


def interrupt(home, run_id, number, **env):
    """Send the signal to a training process at its ninth step; what it left."""
    process = start(home, RUN_ID=run_id, **env)
    read = read_until(process, "step:9/")
    process.send_signal(number)
    cut = end_of(process, home, run_id, read)
    error = error_of(cut, 128 + number)
    assert "RESUME=1" in error and f"RUN_ID={run_id}" in error
    assert 9 <= checkpoint_of(cut)[1]["step"] < int(env["ITERATIONS"])
    return cut


def test_an_interrupted_run_goes_on(train, dataset, home):
    knobs = {"ITERATIONS": 60, "WARMDOWN_ITERS": 40, "EMA_START_FRAC": 0.01, "AUDIT": 0}
    whole = train("uncut", **knobs)
    cut = interrupt(home, "cut", signal.SIGINT, **{**TINY, "DATA_PATH": dataset.path, **knobs})
    # Settings that would make another run of it are refused, and nothing is lost by that.
    before = contents(cut.folder / "checkpoint")
    assert "MODEL_DIM" in error_of(train("cut", RESUME=1, **{**knobs, "MODEL_DIM": 64}), 2)
    assert contents(cut.folder / "checkpoint") == before
    rest = train("cut", RESUME=1, **knobs)
    assert final(rest)["val_bpb"] == final(whole)["val_bpb"]
    steps = [event["step"] for event in rest.events if event["event"] == "train"]
    assert steps == list(range(1, 61))
    artifacts = [(r.folder / "artifact.bin").read_bytes() for r in (rest, whole)]
    assert artifacts[0] == artifacts[1]


def test_a_request_to_end_keeps_the_state(dataset, home):
    env = {**TINY, **NET, "DATA_PATH": dataset.path, "ITERATIONS": 5000}
    interrupt(home, "ended", signal.SIGTERM, **env)


def test_a_finished_run_can_be_made_longer(main, tmp_path):
    with pytest.raises(t.UserError, match=r"there is no \S+never-begun"):
        main("never-begun", RESUME=1)
    main("kept")
    extended = main("kept", RESUME=1, ITERATIONS=8)
    assert [e["step"] for e in extended if e["event"] == "train"] == list(range(1, 9))
    assert [e["train_steps"] for e in extended if e["event"] == "final"] == [6, 8]
    before = contents(tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept" / "checkpoint")
    with pytest.raises(t.UserError, match="no checkpoint left"):
        main("kept", RESUME=1, ITERATIONS=9)
    rest = contents(tmp_path / "kept")
    assert rest == {path: before[path] for path in rest}
    with pytest.raises(t.UserError, match="RUN_ID"):
        main("", RESUME=1)


def test_a_run_without_a_name_can_be_resumed(train):
    first = train("", CHECKPOINT_EVERY=4, **NET)
    name = re.search(r"everything is in +logs/(\S+)", first.out)[1]
    resumed = train(name, RESUME=1, ITERATIONS=8, **NET)
    assert final(resumed)["train_steps"] == 8


# --------------------------------------------------------------------------------------------------
# Training and scoring meet in files: what ends or changes one of them leaves the other alone


PAUSES = """
def paused_at(stage):
    def wait(self, *args):
        print("paused", flush=True)
        time.sleep(600)
    return wait if os.environ.get("PAUSE") == stage else getattr(Scoring, stage)

for stage in ("prime", "rows"):
    setattr(Scoring, stage, paused_at(stage))
"""


def run_printed(cwd, run, **env):
    """Run the printed command as a shell does, with the environment that the run had."""
    path = f"{Path(sys.executable).parent}:{CLEAN['PATH']}"
    printed = r"^a fresh process scores what is on disk; again: (.*)$"
    command = re.search(printed, run.out, re.M)[1]
    return end_of(start(cwd, "bash", "-c", command, PATH=path, **env), cwd, run.folder.name)


def keep_kernels(folder):
    """Let a copy of the script that is the same to the byte find the compiled kernels."""
    shutil.copy2(SCRIPT, folder)
    cache = folder / "__pycache__"
    cache.mkdir()
    for path in (SCRIPT.parent / "__pycache__").glob(f"{SCRIPT.stem}.*.nb*"):
        shutil.copy2(path, cache)


@pytest.mark.parametrize("stage", ["", "prime", "rows"])
def test_a_kill_during_evaluation_loses_nothing(stage, plain, dataset, tmp_path):
    """The printed command finishes the run; whatever is scored later has a folder of its own."""
    cwd, name = tmp_path / "here and now", f"killed {stage}".strip().replace(" ", "-")
    cwd.mkdir()
    script = edited(tmp_path / "mine", PAUSES) if stage else SCRIPT
    mixer = NET if stage else {}  # an edited copy compiles the mixer's kernels anew
    tokenizer = shutil.copy(dataset.tokenizer, cwd / "its tokenizer.model")
    env = {**TINY, **mixer, "DATA_PATH": dataset.path, "TOKENIZER_PATH": tokenizer, "RUN_ID": name}
    env["VAL_LOSS_EVERY"] = 3  # all as in the plain run, down to the artifact's header
    process = start(cwd, sys.executable, script, **env, PAUSE=stage)
    read = read_until(process, "paused" if stage else "a fresh process scores")
    process.kill()
    killed = end_of(process, cwd, name, read)
    assert killed.status == -signal.SIGKILL and killed.events[-1]["event"] == "export"
    if not stage:
        keep_kernels(killed.folder)
    finished = run_printed(cwd, killed, **env)
    added = [event["event"] for event in finished.events[len(killed.events) :]]
    assert added == ["audit", "eval", "final"]
    record, usual = final(finished), final(plain)
    if stage:
        assert record["val_bpb"] == usual["val_bpb_net"]
    else:
        assert {name: record[name] for name in SCORED} == {name: usual[name] for name in SCORED}
        assert "64 tokens decoded from" in finished.out
    assert record["train_steps"] == 6 and record["code_bytes"] == script.stat().st_size
    assert [path.name for path in (cwd / "logs").iterdir()] == [name]
    # What is finished stays as it is.
    before = contents(finished.folder)
    del env["RUN_ID"]
    again = run_printed(cwd, killed, **{**env, "AUDIT": 0})
    assert again.status == 0, again.err
    assert contents(finished.folder) == before
    (folder,) = (path for path in (cwd / "logs").iterdir() if path.name != name)
    record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["val_bpb"] == final(finished)["val_bpb"]


@pytest.mark.parametrize("edit", ["other", "broken", "removed"])
def test_the_script_may_be_edited_while_it_trains(edit, plain, dataset, home, tmp_path):
    """What scores is the source that trained."""
    script, name = edited(tmp_path), f"edited-{edit}"
    source = script.read_bytes()
    process = start(
        home, sys.executable, script, RUN_ID=name, **{**TINY, **NET, "DATA_PATH": dataset.path}
    )
    read = read_until(process, "step:1/")
    if edit == "removed":
        script.unlink()
    else:
        script.write_text("raise SystemExit(9)" if edit == "other" else "def nothing(:")
    result = end_of(process, home, name, read)
    assert final(result)["val_bpb"] == final(plain)["val_bpb_net"]
    assert final(result)["code_bytes"] == len(source)
    assert (result.folder / SCRIPT.name).read_bytes() == source


@pytest.mark.parametrize("other", ["", "script", "artifact", "text", "window"])
def test_a_score_is_a_runs_only_if_all_of_it_is(other, train, dataset, tmp_path):
    """What an unscored run trained, scored by its script on its text; else it goes elsewhere."""
    trained = train(f"due-{other}", **NET)
    folder = shutil.copytree(trained.folder, tmp_path / "unscored")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-4])["event"] == "export"
    (folder / "metrics.jsonl").write_text("\n".join(lines[:-3]) + "\n")
    script, env = SCRIPT, {"DEVICE": "cpu", "WORKERS": 2, "TOKENIZER_PATH": dataset.tokenizer}
    env |= {"DATA_PATH": dataset.path, "EVAL_ONLY": folder / "artifact.bin"}
    if other == "script":
        script = edited(tmp_path / "other")
    elif other == "artifact":
        shutil.copy(train("due-seed", SEED=2, **NET).folder / "artifact.bin", folder)
    elif other == "text":
        env["DATA_PATH"] = shutil.copytree(dataset.path, tmp_path / "data_sp300")
        (env["DATA_PATH"] / "tiny_val_000001.bin").unlink()
    elif other == "window":
        env["EVAL_STRIDE"] = 8
    before = contents(folder)
    result = run(tmp_path, "", sys.executable, script, **env)
    assert result.status == 0, result.err
    assert ("warning: this script is not the one that trained" in result.out) == (other == "script")
    if not other:
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["event"] == "final" and last["val_bpb"] == final(trained)["val_bpb"]
        assert last["train_tokens"] and not (tmp_path / "logs").exists()
        return
    assert contents(folder) == before
    (own,) = (tmp_path / "logs").iterdir()
    record = json.loads((own / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["code_bytes"] == script.stat().st_size and record["train_tokens"] == 0
    assert record["model_bytes"] == (folder / "artifact.bin").stat().st_size


# --------------------------------------------------------------------------------------------------
# Packages


@pytest.fixture(scope="session")
def sparse(tmp_path_factory):
    """The script in a Python that has mlx, numpy and sentencepiece, and no other package."""
    folder = tmp_path_factory.mktemp("sparse")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    mlx = Path(t.mx.__file__).resolve().parent
    numpy, sentencepiece = (Path(m.__file__).resolve().parent for m in (np, spm))
    for path in (mlx, numpy, sentencepiece):
        (packages / path.name).symlink_to(path)
        for libraries in path.parent.glob(f"{path.name}*.libs"):  # what their wheels link to
            (packages / libraries.name).symlink_to(libraries)
    return folder / "bin" / "python", SCRIPT


def test_three_packages_suffice_for_a_net(sparse, plain, dataset, home, score):
    env = {**TINY, **NET, "AUDIT": 1, "DATA_PATH": dataset.path, "PYTHONPATH": ""}
    made = run(home, "sparse", *sparse, **env)
    record = final(made)
    assert record["audit"] == "pass" and "(lzma: pip install brotli;" in made.out
    assert abs(record["val_bpb"] - final(plain)["val_bpb_net"]) < 1e-3  # another matrix product
    artifact = made.folder / "artifact.bin"
    again = run(home, "sparse-again", *sparse, **env, EVAL_ONLY=artifact)
    assert final(again)["val_bpb"] == record["val_bpb"]
    assert math.isclose(score("elsewhere", artifact)["val_bpb"], record["val_bpb"], rel_tol=1e-5)
    # What brotli has compressed is not read without it.
    by_brotli = {**env, "EVAL_ONLY": plain.folder / "artifact.bin"}
    assert "pip install brotli" in error_of(run(home, "no-brotli", *sparse, **by_brotli), 2)


@pytest.mark.parametrize("mixer", ["logistic", "backoff"])
def test_context_models_without_numba_are_refused_before_training(sparse, mixer, dataset, home):
    run_id, env = f"no-numba-{mixer}", {**TINY, "MIXER": mixer, "DATA_PATH": dataset.path}
    env["PYTHONPATH"] = ""
    result = run(home, run_id, *sparse, **env)
    error = error_of(result, 2)
    assert "numba" in error and "MIXER=off" in error
    assert "step:" not in result.out and not result.folder.exists()


IMPORTS = """
import json, os, signal, sys
import mlx.core as mx, numpy as np

def defaults():
    handlers = [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    random = [str(np.random.get_state()), np.array(mx.random.state[0]).tolist()]
    machine = [str(mx.default_device()), str(mx.default_stream(mx.default_device()))]
    return [dict(os.environ), os.getcwd(), sys.path[:], handlers, np.geterr(), random, machine]

before = defaults()
import train_gpt_mlx_kl as t
tables = [n for n, v in vars(t).items() if isinstance(v, np.ndarray | mx.array) and v.size > 64]
print(json.dumps({"same": before == defaults(), "tables": tables, "modules": list(sys.modules)}))
"""


@pytest.mark.parametrize("packages", ["all", "three"])
def test_importing_the_script_changes_nothing(packages, sparse, tmp_path):
    python = sys.executable if packages == "all" else sparse[0]
    env = {**CLEAN, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, "-c", IMPORTS], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"] and found["tables"] == []
    assert not {"numba", "brotli", "sentencepiece"} & set(found["modules"])
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "env, words",
    [
        ({"VOCAB_SIZE": 301}, ["VOCAB_SIZE=301", "300"]),
        ({"TOKENIZER_PATH": "absent.model"}, ["TOKENIZER_PATH", "absent.model"]),
        ({"DATA_PATH": "absent"}, ["DATA_PATH", "absent"]),
        ({"EVAL_ONLY": "absent.bin"}, ["ARTIFACT=absent.bin: no such file"]),
        ({"VAL_MAX_TOKENS": 1}, ["fewer than 2 tokens"]),
        ({"OUT_DIR": str(SCRIPT)}, ["OUT_DIR"]),
    ],
)
def test_mistakes_are_told(main, env, words):
    with pytest.raises(t.UserError) as error:
        main("mistake-" + "-".join(env), **env)
    assert all(word in str(error.value) for word in words)


def test_mistakes_take_a_line(train):
    assert "VOCAB_SIZE=301" in error_of(train("mistake", VOCAB_SIZE=301), 2)


def test_shards_of_another_tokenizer_are_refused(main, score, plain, dataset, tmp_path):
    folder = tmp_path / "datasets" / "other_sp300"
    shutil.copytree(dataset.path, folder)
    (folder / "manifest.json").write_text(json.dumps({"tokenizer_sha256": "0" * 64}))
    knobs = {"DATA_PATH": folder, "TOKENIZER_PATH": dataset.tokenizer}
    with pytest.raises(t.UserError, match="another tokenizer"):
        main("other-tokenizer", **knobs)
    with pytest.raises(t.UserError, match="another tokenizer"):
        score("other", plain.folder / "artifact.bin", **knobs)


@pytest.mark.parametrize("setting", ["NUM_LAYERS=3", "VOCAB_SIZE=9"])
def test_a_file_is_not_scored_with_another_shape(score, plain, setting):
    name, _, value = setting.partition("=")
    with pytest.raises(t.UserError, match=setting):
        score("reshaped", plain.folder / "artifact.bin", **{name: value})


@pytest.mark.skipif(t.mx.is_available(t.mx.gpu), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named(main):
    with pytest.raises(t.UserError, match="DEVICE=gpu"):
        main("gpu", DEVICE="gpu")


def test_a_model_that_is_too_large_is_refused_before_training(main, tmp_path):
    tables = {"BIGRAM_HASH_SIZE": 30_000, "SKIPGRAM_HASH_SIZE": 30_000}
    with pytest.raises(t.RunFailed) as error:
        main("large", ENGRAM_LITE_ENABLED=0, **tables)
    error = str(error.value)
    excess = re.search(r"([\d,]+) bytes, ([\d,]+) over the limit of 16,000,000", error)
    total, over = (int(number.replace(",", "")) for number in excess.groups())
    assert total - over == 16_000_000
    assert "bigram.table" in error and "skipgram.table" in error
    assert not (tmp_path / "large").exists()


# --------------------------------------------------------------------------------------------------
# Variants: each runs to its end, does something, and is scored as what was trained


DETAIL = (-0.06, 0.06)
# Settings and by how much they change the training loss of the sixth step, in nats per token: by
# nothing what concerns the average and the artifact, by little a detail of the net or of a step.
VARIANTS = {
    "baseline": ("PRESET=baseline", DETAIL),
    "h100": ("PRESET=h100", DETAIL),
    "bigram-hash": ("ENGRAM_LITE_ENABLED=0 BIGRAM_HASH_SIZE=64", (-0.6, -0.2)),
    "skipgram": ("SKIPGRAM_HASH_SIZE=64", (-0.3, -0.05)),
    "no-hashes": ("ENGRAM_HASH_SIZE=0", (0, 0.05)),
    "qat": ("LATE_QAT_THRESHOLD=1 WEIGHT_BITS=4 EMBED_BITS=4", (0, 0.03)),
    "swa": ("USE_SWA=1 EMA_START_FRAC=0.2", (0, 0)),
    "no-average": ("EMA_DECAY=0", (0, 0)),
    "bits": ("WEIGHT_BITS=4 EMBED_BITS=4", (0, 0)),
    "clip": ("GRAD_CLIP_NORM=0.01 ADAM_EPS=0.001", (0.5, 2)),
    "plain-loss": ("COMPLEMENT_ALPHA=0", (-0.06, 0)),
    "more-complement": ("COMPLEMENT_ALPHA=1", (0, 0.06)),
    "one-layer": ("NUM_LAYERS=1", DETAIL),
    "odd-layers": ("NUM_LAYERS=3 XSA_LAST_N=2", DETAIL),
    "xsa": ("XSA_LAST_N=2", DETAIL),
    "no-smear": ("SMEAR_ENABLED=0", DETAIL),
    "no-ln-scale": ("LN_SCALE_ENABLED=0", (-0.01, 0.01)),
    "not-orthogonal": ("USE_ORTHO_INIT=0", (-0.02, 0.02)),
    "relu": ("MLP_LEAK=0", (-0.01, 0.01)),
    "mlp": ("MLP_MULT=3", (-0.01, 0.01)),
    "rope": ("ROPE_DIMS=8", (-0.01, 0.01)),
    "momentum": ("MUON_MOMENTUM_WARMUP_STEPS=0", (-0.01, 0.01)),
    "decay": ("MUON_WEIGHT_DECAY=0.1 ADAM_WEIGHT_DECAY=0.1", (0, 0.01)),
}
# These change how a run is computed, not what: all stays within rounding.
EQUAL = {
    "chunks": "LOGIT_CHUNK_TOKENS=100",
    "microbatches": "MLX_MAX_MICROBATCH_TOKENS=64 GRAD_ACCUM_STEPS=3 MLX_EAGER_EVAL=0",
    "workers": "WORKERS=1",
    "more-workers-than-work": "WORKERS=64",
    "eval-batch": "EVAL_BATCH_SEQS=1",
    "checkpoints": "CHECKPOINT_EVERY=2",
    "no-warmup": "WARMUP_STEPS=0",
}


def losses_of(events):
    """The training loss of each step, and the last score of the weights before they are stored."""
    losses = [event["train_loss"] for event in events if event["event"] == "train"]
    return losses, [event["val_bpb"] for event in events if event["event"] == "val"][-1]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, plain, main):
    text, (least, most) = VARIANTS[name]
    env = dict(pair.split("=") for pair in text.split())
    events = main(name, **{**env, "EVAL_MODE": "standard"})
    (losses, bpb), (usual, usual_bpb) = losses_of(events), losses_of(plain.events)
    assert abs(losses[0] - math.log(300)) < 0.01  # at first all tokens are equally likely
    change = losses[-1] - usual[-1]
    if least == most == 0:
        assert losses == usual
    else:
        assert least <= change <= most and abs(change) > 1e-5
    if name != "bits":
        assert abs(bpb - usual_bpb) > 1e-6
    if name in ("swa", "no-average"):  # the loss still falls: older weights are worse ones
        assert (bpb > usual_bpb) == (name == "swa")
    # The artifact, read again, is what was trained but for the rounding of its numbers.
    rounding = events[-1]["val_bpb"] - bpb
    assert abs(rounding) < (0.01 if "WEIGHT_BITS" in env else 0.001)
    assert name != "bits" or rounding > 0.0005


@pytest.mark.parametrize("name", EQUAL)
def test_how_a_run_is_computed_does_not_matter(name, plain, main):
    events = main(name, **dict(pair.split("=") for pair in EQUAL[name].split()))
    (losses, bpb), (usual, usual_bpb) = losses_of(events), losses_of(plain.events)
    np.testing.assert_allclose([*losses, bpb], [*usual, usual_bpb], rtol=3e-6)
    assert math.isclose(events[-1]["val_bpb"], final(plain)["val_bpb_net"], rel_tol=1e-6)


# --------------------------------------------------------------------------------------------------
# Several processes
def start_ranks(cwd, count, own=None, script=SCRIPT, **env):
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
    env |= {"MLX_HOSTFILE": file}
    return [start(cwd, sys.executable, script, MLX_RANK=i, **{**env, **own[i]})
            for i in range(count)]  # fmt: skip


RANKS = {"WORKERS": 1, "ITERATIONS": 20, "WARMDOWN_ITERS": 10, **NET}


def weights_of(result):
    return t.mx.load(str(result.folder / "model.safetensors"))


def test_two_ranks_train_as_one(train, dataset, home):
    """Half a batch each, through the launcher that users have: the same net after 20 steps."""
    run_id, launcher = "two-ranks", shutil.which("mlx.launch")
    launcher = launcher or str(Path(sys.executable).parent / "mlx.launch")
    settings = {**RANKS, "COMPLEMENT_ALPHA": 1}
    one_rank = train("one-rank", **settings)
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
    env |= {"ITERATIONS": 100_000, "MAX_WALLCLOCK_SECONDS": 1, "CHECKPOINT_EVERY": 5}
    for resume in (0, 1):
        ranks = start_ranks(home, 3, **env, RESUME=resume)
        ends = [end_of(process, home, "clock-ranks") for process in ranks]
        assert [end.status for end in ends] == [0, 0, 0], [end.err for end in ends]
        assert not ends[1].out and not ends[2].out
        env["MAX_WALLCLOCK_SECONDS"] = 2
    steps = [e["step"] for e in ends[0].events if e["event"] == "train"]
    first = next(e["train_steps"] for e in ends[0].events if e["event"] == "final")
    assert first in steps and ends[0].events[-1]["train_steps"] > first


def test_all_ranks_stop_where_rank_0_cannot_go_on(train, dataset, home):
    settings = {**RANKS, "CHECKPOINT_EVERY": 5, "ITERATIONS": 6}
    for saved in t.checkpoint_files(train("damaged-ranks", **settings).folder):
        saved.write_bytes(saved.read_bytes()[:-9])
    settings |= {"ITERATIONS": 9, "RUN_ID": "damaged-ranks", "RESUME": 1}
    env = {**TINY, "DATA_PATH": dataset.path, **settings}
    ends = [end_of(process, home, "damaged-ranks") for process in start_ranks(home, 2, **env)]
    assert ends[0].status == 2 and ends[0].err.count("is damaged: ") == 2
    assert "rank 0 has stopped" in error_of(ends[1], 1)


@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_stop_when_a_rank_is_killed(killed, dataset, home):
    run_id = f"killed-{killed}"
    env = {**TINY, "DATA_PATH": dataset.path, **RANKS, "RUN_ID": run_id, "ITERATIONS": 100_000}
    ranks = start_ranks(home, 2, **env)
    read_until(ranks[0], "step:5/")
    ranks[killed].kill()
    begin = time.monotonic()
    other = end_of(ranks[1 - killed], home, run_id)
    assert time.monotonic() - begin < 30
    ranks[killed].communicate()
    assert "another rank is gone" in error_of(other, 1)
    assert ("RESUME=1" in other.err) == (killed == 1)  # only rank 0 keeps the state
    if killed == 1:
        assert checkpoint_of(other)[1]["step"] >= 5


@pytest.mark.parametrize("own", [{"MODEL_DIM": 48}, {"CHECKPOINT_EVERY": 3}])
def test_ranks_with_other_settings_are_refused(own, dataset, home):
    env = {**TINY, "DATA_PATH": dataset.path, **RANKS, "RUN_ID": "unlike"}
    ranks = start_ranks(home, 2, [{}, own], **env)
    for process in ranks:
        assert "--env" in error_of(end_of(process, home, "unlike"), 2)


def on_a_terminal(cwd, **env):
    """What a run shows in 80 columns and 30 rows."""
    code = """import fcntl, os, pty, struct, sys, termios
pid, fd = pty.fork()
if pid == 0:
    os.execve(sys.executable, [sys.executable, sys.argv[1]], os.environ)
fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
try:
    while piece := os.read(fd, 4096):
        os.write(1, piece)
except OSError:
    pass
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"""
    env = CLEAN | {name: str(value) for name, value in env.items()}
    done = subprocess.run([sys.executable, "-c", code, SCRIPT], cwd=cwd, env=env,
                          capture_output=True, stdin=subprocess.DEVNULL)  # fmt: skip
    assert done.returncode == 0, done.stdout.decode()
    return done.stdout.decode()


def test_a_terminal_has_a_live_line_and_no_long_ones(dataset, home):
    env = {**TINY, "DATA_PATH": dataset.path, "RUN_ID": "watched", "ITERATIONS": 200}
    out = on_a_terminal(home, **env)
    live = [part for part in out.replace("\n", "\r").split("\r") if "%|" in part]
    assert any(re.search(r"training +\d+%.*loss \d\.\d+, [\d,]+ tok", part) for part in live)
    rest = [part for part in re.sub(r"\x1b\[\w*", "", out).split("\r") if "%|" not in part]
    lines = [line for part in rest for line in part.split("\n")]
    (command,) = (line for line in lines if "EVAL_ONLY=" in line)
    assert "DATA_PATH=" in command and " python " in command  # to be copied whole
    lines.remove(command)
    assert max(len(line) for line in lines if " " in line.strip()) <= 80  # a path is not cut
    log = (home / "logs" / "watched" / "train.log").read_text()[SCRIPT.stat().st_size :]
    assert "final_int6_zstd_roundtrip_exact val_loss:" in log and "%|" not in log
    assert max(map(len, log.splitlines())) > 100  # parsers find them in one piece


def test_a_first_estimate_waits_for_a_pace(monkeypatch):
    """What comes before the first part, e.g. compiling, is not taken for its pace."""
    now, said = [0.0], []
    monkeypatch.setattr(t.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(t, "say", said.append)
    show = t.show_progress("eval")
    for second, done in ((20, 10), (21, 30), (22, 50), (40, 1000)):
        now[0] = second
        show(done, 1000, "")
    assert said == ["eval: 30/1000 tokens, 48 s left", "eval: 1000/1000 tokens, 0 s left"]


def test_what_each_token_cost_is_kept(plain, dataset):
    """It adds up to the score, and stands beside the text itself."""
    costs, last = np.load(plain.folder / "costs.npz"), final(plain)
    for column, name in enumerate(("val_bpb_net", "val_bpb_context", "val_bpb")):
        bits = costs["nats"][:, column].astype(np.float64).sum() / math.log(2)
        assert bits / costs["bytes"].sum() == pytest.approx(last[name], rel=1e-6)
    shards = sorted(Path(dataset.path).glob("*_val_*"))
    tokens = np.concatenate([t.Shard(path)[:] for path in shards])
    np.testing.assert_array_equal(costs["tokens"], tokens[1:])
    assert costs["starts"].tolist() == [i for i, v in enumerate(tokens[1:].tolist()) if v == 1]
    model = sentencepiece.SentencePieceProcessor(model_file=str(dataset.tokenizer))
    document = tokens[: int(costs["starts"][0]) + 1]
    text = "".join(costs["pieces"][document].tolist())
    assert text.lstrip() == model.decode(document.tolist()).lstrip()


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


# --------------------------------------------------------------------------------------------------
# REPORT_TO

LIBRARY = """
import json, os, sys
def note(*what):
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(json.dumps(what) + chr(10))
class Run:
    def define_metric(self, *args, **more): note("define", args, more)
    def log(self, values, **more): note("log", values, more)
    def finish(self, **more): note("finish", more)
def init(**about):
    note("init", about)
    %s
    return Run()
"""


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_numbers_go_to_a_library(train, tmp_path, library):
    """Those of the training and of the scoring program, which is another one, to one run."""
    (tmp_path / f"{library}.py").write_text(LIBRARY % "")
    more = {"REPORT_TO": library, "NOTES": tmp_path / "notes", "PYTHONPATH": tmp_path}
    done = train(f"to-{library}", **more)
    assert done.status == 0 and done.err == "", done.err
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    kinds = [note[0] for note in notes]
    assert kinds.count("init") == kinds.count("finish") == 1 and kinds[0] == "init"
    about = notes[0][1]
    assert about["project"] == "train_gpt_mlx_kl" and about["name"].startswith(f"to-{library}-")
    assert about["config"]["event"] == "config" and about["config"]["seed"] == 1337
    sent = [note[1] for note in notes if note[0] == "log"]
    wanted = [e for e in done.events if e["event"] in ("train", "val", "export", "eval", "final")]
    assert len(sent) == len(wanted) > 4
    assert sent[-1]["final/val_bpb"] == done.events[-1]["val_bpb"]
    losses = [e["train_loss"] for e in done.events if e["event"] == "train"]
    assert [x["train/train_loss"] for x in sent if "train/train_loss" in x] == losses
    if library == "wandb":
        assert notes[1][0] == "define" and notes[-1] == ["finish", {"exit_code": 0}]


def test_a_library_that_fails_is_a_warning(train, tmp_path):
    (tmp_path / "wandb.py").write_text(LIBRARY % "raise OSError('no network\\nhere')")
    more = {"REPORT_TO": "wandb", "NOTES": tmp_path / "notes", "PYTHONPATH": tmp_path}
    done = train("to-nobody", **more)
    assert done.status == 0 and done.events[-1]["event"] == "final"
    assert done.err == "warning: REPORT_TO=wandb: OSError: no network here; sent no more\n"


@pytest.mark.parametrize("where", ["init", "finish"])
def test_a_library_that_does_not_finish_is_ended(where, dataset, home, tmp_path):
    """Who reads the run's output waits for its end."""
    script = edited(home / f"hangs-{where}", "SENDER = SENDER.replace('sleep(30)', 'sleep(1)')")
    sleep, finish = "import time; time.sleep(99)", "def finish(self, **more): "
    assert LIBRARY.count(finish) == 1
    library = LIBRARY % sleep if where == "init" else LIBRARY.replace(finish, finish + f"{sleep}; ")
    (tmp_path / "trackio.py").write_text(library.replace("%s", ""))
    more = {"REPORT_TO": "trackio", "NOTES": tmp_path / "notes", "PYTHONPATH": tmp_path}
    env = {**TINY, **NET, "DATA_PATH": dataset.path, **more}
    done = run(home, f"hanging-{where}", sys.executable, script, **env)
    warning = "warning: REPORT_TO=trackio: not done 30 seconds after the run; sent no more\n"
    assert (done.status, done.err) == (0, warning)


def test_a_library_that_is_missing_is_said_at_once(train, tmp_path, monkeypatch):
    done = train("to-none", REPORT_TO="trackio")
    assert (done.status, done.out) == (2, "") and not done.folder.exists()
    assert done.err == "error: REPORT_TO=trackio: pip install trackio\n"
    (tmp_path / "trackio").mkdir()  # as the library's own folder, which is no module
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(t.UserError, match="pip install trackio"):
        t.check_report_to("trackio")
