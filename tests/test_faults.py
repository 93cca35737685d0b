"""Faults that are really injected: kills, signals, closed outputs, full disks, false data."""

import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm
from conftest import write_shard
from test_cli import (
    CLEAN,
    FLEETING,
    NET,
    RANKS,
    SCRIPT,
    TINY,
    checkpoint_of,
    dataset,
    edited,
    end_of,
    error_of,
    final,
    read_until,
    run,
    start,
    start_ranks,
)

import train_gpt_mlx_kl as t

__all__ = ["dataset"]  # a fixture
SHELL = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
LONG = {"ITERATIONS": 5000, "CHECKPOINT_SECONDS": 0}

# Lets a process of its own stop where a test wants it: it prints a line, and sleeps.
PAUSES = """
def paused_at(stage):
    honest = globals()[stage]
    def wait(*args, **named):
        print("paused", flush=True)
        time.sleep(float(os.environ.get("PAUSE_SECONDS", 600)))
        return honest(*args, **named)
    return wait

if stage := os.environ.get("PAUSE"):
    globals()[stage] = paused_at(stage)
SILENCE_SECONDS, JOIN_SECONDS = 3.0, float(os.environ.get("JOIN", JOIN_SECONDS))
"""


@pytest.fixture
def home(tmp_path):
    """A folder to run in."""
    return tmp_path


@pytest.fixture
def env(dataset):
    """Settings of the tiny run."""
    return {**TINY, "DATA_PATH": dataset.path}


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    """The script with PAUSES: one for all, so that kernels are compiled once."""
    return edited(tmp_path_factory.mktemp("script"), PAUSES)


def lasting(result):
    """What a run has reported, without what two equal runs may differ in."""
    events = [{k: v for k, v in e.items() if k not in FLEETING} for e in result.events]
    for event in events:
        event.pop("resume", None)
        if "lines" in event:
            event["lines"] = [x for x in event["lines"] if not x.startswith("checks took")]
    return events


# --------------------------------------------------------------------------------------------------
# Kills


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(home, env):
    """At random moments of packing, training, export and scoring, with checkpoints all the time."""
    env |= {"ITERATIONS": 40, "CHECKPOINT_SECONDS": 0.05, "VAL_LOSS_EVERY": 10}
    whole = run(home, "whole", **env)
    begin = time.monotonic()
    assert final(run(home, "timed", **env))
    span, rng, kills, folder = time.monotonic() - begin, random.Random(1), 0, home / "logs" / "cut"
    while kills < 5:
        process = start(home, RUN_ID="cut", RESUME=int(folder.is_dir()), **env)
        try:
            process.communicate(timeout=rng.uniform(span / 3, span))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert kills
    last = run(home, "cut", RESUME=1, **env)
    assert last.status == 0, last.err
    assert lasting(last) == lasting(whole)
    for name in ("artifact.bin", "message.bin"):
        assert (last.folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.parametrize(
    "stage", ["train", "score_net", "export", "write_artifact", "write_first_message"]
)
def test_a_kill_at_any_stage_loses_nothing(stage, home, env, script):
    env |= {} if stage == "write_first_message" else NET
    whole = run(home, "whole", sys.executable, script, **env)
    process = start(home, sys.executable, script, RUN_ID="cut", PAUSE=stage, **env)
    read_until(process, "paused")
    process.kill()
    process.communicate()
    rest = run(home, "cut", sys.executable, script, RESUME=1, **env)
    assert lasting(rest) == lasting(whole) and rest.status == 0
    name = "artifact.bin"
    assert (rest.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_packed_text_outlives_a_kill_under_a_clock(home, env, script):
    """What was packed by the last checkpoint is in the artifact of the run that goes on."""
    env |= {"MAX_WALLCLOCK_SECONDS": 3, "ITERATIONS": 10**6, "WARMDOWN_ITERS": 5, "AUDIT": 0}
    process = start(home, sys.executable, script, RUN_ID="cut", PAUSE="export", **env)
    read_until(process, "paused")
    process.kill()
    process.communicate()
    rest = run(home, "cut", sys.executable, script, RESUME=1, **env)
    whole = run(home, "whole", sys.executable, script, **env)
    assert final(rest)["packed_tokens"] == final(whole)["packed_tokens"] > 1000
    again = run(home, "cut", sys.executable, script, RESUME=1, **env)
    assert again.status == 0 and "is finished" in again.out
    assert final(again) == final(rest)


# --------------------------------------------------------------------------------------------------
# Signals and outputs that are gone


ENDS = [*(("take_step", number) for number in SHELL), ("token_tree", signal.SIGTERM),
        ("score_net", signal.SIGHUP), ("export", signal.SIGINT), ("report_score", signal.SIGTERM),
        ("report_score", signal.SIGHUP)]  # fmt: skip


@pytest.mark.parametrize("stage, number", ENDS)
def test_every_signal_ends_every_stage_in_order(stage, number, home, env, script):
    """A line says how to go on, the status is the shell's, and going on works."""
    env |= {} if stage == "token_tree" else NET
    if stage == "take_step":
        process = start(home, RUN_ID="cut", **{**env, **LONG})
        read = read_until(process, "step:9/")
    else:
        process = start(home, sys.executable, script, RUN_ID="cut", PAUSE=stage, **env)
        read = read_until(process, "paused")
    process.send_signal(number)
    cut = end_of(process, home, "cut", read)
    error = error_of(cut, SHELL[number])
    assert signal.Signals(number).name in error
    if stage == "take_step":
        saved = checkpoint_of(cut)[1]["step"]
        assert saved >= 9
        env |= {"ITERATIONS": saved + 2}
    if stage != "report_score":  # there all is on disk
        assert "RUN_ID=cut RESUME=1" in error
    rest = run(home, "cut", *([sys.executable, script] if stage != "take_step" else []),
               RESUME=1, **env)  # fmt: skip
    assert final(rest)["train_steps"] == (saved + 2 if stage == "take_step" else 6)


def test_a_second_signal_ends_at_once(home, env):
    pause = re.search(r" +print.*\n.*sleep.*\n", PAUSES).group()
    script = edited(home / "script", PAUSES.replace(pause, """
        for word in ("paused", "asked"):
            try:
                print(word, flush=True)
                time.sleep(600)
            except Interrupted:
                pass
"""))  # fmt: skip
    process = start(home, sys.executable, script, RUN_ID="cut", PAUSE="score_net", **env, **NET)
    read_until(process, "paused")
    process.send_signal(signal.SIGTERM)
    read_until(process, "asked")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    assert checkpoint_of(SimpleNamespace(folder=home / "logs" / "cut"))[1]["step"] == 6


def test_ignored_signals_stay_ignored(home, env):
    """As nohup starts a run."""
    command = ["sh", "-c", f'trap "" HUP; exec {sys.executable} {SCRIPT}']
    process = start(home, *command, RUN_ID="kept", **{**env, **NET, "ITERATIONS": 60})
    read = read_until(process, "step:9/")
    process.send_signal(signal.SIGHUP)
    assert final(end_of(process, home, "kept", read))["train_steps"] == 60


@pytest.mark.parametrize("error", ["t.RunFailed('all is lost')", "OSError(5, 'all is lost')"])
def test_an_error_ends_python_at_once_where_threads_still_compute(error):
    """They may crash while Python is taken apart, which is another exit status."""
    code = f"""
import atexit, threading, time, train_gpt_mlx_kl as t
atexit.register(print, "taken apart")
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
with t.errors_as_lines():
    raise {error}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=t.HERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: all is lost\n")


def test_an_output_that_was_never_open_is_no_fault(home, env):
    command = f"exec {shlex.quote(sys.executable)} {shlex.quote(str(SCRIPT))} >&-"
    settings = {name: str(value) for name, value in {**env, **NET, "RUN_ID": "mute"}.items()}
    done = subprocess.run(["sh", "-c", command], cwd=home, env=CLEAN | settings, text=True,
                          capture_output=True)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "val_bpb" in (home / "logs" / "mute" / "train.log").read_text()


def test_a_closed_pipe_ends_the_run_in_order(home, env):
    process = start(home, RUN_ID="cut", **{**env, **NET, **LONG})
    read_until(process, "step:9/")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 128 + signal.SIGPIPE and "Traceback" not in err
    assert "RUN_ID=cut RESUME=1" in err
    rest = run(home, "cut", RESUME=1, **{**env, **NET, "ITERATIONS": 12})
    assert rest.status == 0, rest.err


@pytest.mark.parametrize("stage", ["token_tree", "take_step", "score_net", "export"])
def test_an_interrupted_run_can_be_exported(stage, home, env, script):
    """Whatever it is at: what is trained and packed so far becomes an artifact and a score."""
    env |= {"EXPORT_ON_INTERRUPT": 1, "PAUSE_SECONDS": 2}
    env |= LONG if stage == "take_step" else {"PAUSE": stage}
    process = start(home, sys.executable, script, RUN_ID="cut", **env)
    read = read_until(process, "step:9/" if stage == "take_step" else "paused")
    process.send_signal(signal.SIGINT)
    cut = end_of(process, home, "cut", read)
    if stage == "export":  # it is being done already
        assert "RESUME=1" in error_of(cut, 130)
        return
    assert final(cut)["audit"] == "pass"
    low, high = {"token_tree": (0, 0), "take_step": (9, 4999), "score_net": (6, 6)}[stage]
    assert low <= final(cut)["train_steps"] <= high


def test_bad_steps_that_are_left_out_are_said_in_json(home, env, script):
    """NaN is no JSON."""
    bad = edited(home / "script", PAUSES + """
honest_gradients = Trainer.gradients
def gradients(self, quantised):
    loss, norm, grads = honest_gradients(self, quantised)
    return (math.nan, norm, grads) if self.step == 3 else (loss, norm, grads)
Trainer.gradients = gradients
""")  # fmt: skip
    env |= NET
    assert "step 4: loss nan" in error_of(run(home, "stopped", sys.executable, bad, **env), 1)
    result = run(home, "left", sys.executable, bad, SKIP_BAD_STEPS=1, **env)
    assert "step 4 is left out: bad step 1 of 1" in result.out
    log = (result.folder / "metrics.jsonl").read_text()

    def refuse(word):
        raise AssertionError(word)

    events = [json.loads(line, parse_constant=refuse) for line in log.splitlines()]
    losses = {e["step"]: e["train_loss"] for e in events if e["event"] == "train"}
    assert losses[4] is None and all(losses[step] for step in (1, 2, 3, 5))


# --------------------------------------------------------------------------------------------------
# Ranks: whatever becomes of one, the others end by themselves


def test_the_others_stop_when_a_rank_is_stopped(home, env, script):
    env |= {**RANKS, "RUN_ID": "stopped", "ITERATIONS": 100_000}
    ranks = start_ranks(home, 2, script=script, **env)
    read_until(ranks[0], "step:5/")
    ranks[1].send_signal(signal.SIGSTOP)
    other = end_of(ranks[0], home, "stopped")
    ranks[1].kill()
    ranks[1].communicate()
    assert "rank 1 has not been heard of" in error_of(other, 1)
    assert "RUN_ID=stopped RESUME=1" in other.err and checkpoint_of(other)[1]["step"] >= 5


def test_a_rank_that_works_on_alone_is_waited_for(home, env, script):
    """Rank 0 validates for longer than a silence; its heart beats meanwhile."""
    env |= {**RANKS, "RUN_ID": "waited", "VAL_LOSS_EVERY": 5, "ITERATIONS": 7}
    env |= {"PAUSE": "score_net", "PAUSE_SECONDS": 7}
    ranks = start_ranks(home, 2, script=script, **env)
    ends = [end_of(process, home, "waited") for process in ranks]
    assert [end.status for end in ends] == [0, 0], [end.err for end in ends]


@pytest.mark.parametrize("join", [2, 1000])
def test_a_rank_that_waits_for_one_that_never_joins_can_end(join, home, env, script):
    """By itself, or by a signal; the other one has a bad setting."""
    env |= {**RANKS, "RUN_ID": "alone", "JOIN": join}
    ranks = start_ranks(home, 2, [{}, {"MODEL_DIM": "x"}], script=script, **env)
    assert "MODEL_DIM=x" in error_of(end_of(ranks[1], home, "alone"), 2)
    if join == 2:
        assert "only 1 of 2 ranks have joined" in error_of(end_of(ranks[0], home, "alone"), 1)
        return
    time.sleep(4)  # until it waits
    ranks[0].send_signal(signal.SIGTERM)
    assert "SIGTERM" in error_of(end_of(ranks[0], home, "alone"), 143)


def test_ranks_with_other_text_of_the_same_length_are_refused(home, env, dataset):
    other = home / "datasets" / "tiny_sp300"
    shutil.copytree(dataset.path, other)
    shard = next(other.glob("*_train_*"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2 & -2] ^= 1  # one token, far from both ends
    shard.write_bytes(raw)
    env |= {**RANKS, "RUN_ID": "unlike", "TOKENIZER_PATH": dataset.tokenizer}
    for process in start_ranks(home, 2, [{}, {"DATA_PATH": other}], **env):
        assert "other settings, tokenizers or training text" in error_of(
            end_of(process, home, "unlike"), 2
        )


# --------------------------------------------------------------------------------------------------
# Disks, folders, locks


def limited(size):
    """What makes a process's files at most so long."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# More than the log needs to begin; less than what each of these has, or so long at step 200.
@pytest.mark.parametrize("room", [600, 60_000, 400_000])
def test_a_file_that_cannot_be_written_is_one_line(room, home, env):
    size = room if room < 1000 else SCRIPT.stat().st_size + room if room < 100_000 else room
    env = CLEAN | {k: str(v) for k, v in {**env, **NET, "RUN_ID": "full", "MODEL_DIM": 64}.items()}
    env |= {"ITERATIONS": "400", "CHECKPOINT_EVERY": "5", "ENGRAM_HASH_SIZE": "512"}
    done = subprocess.run([sys.executable, SCRIPT], cwd=home, env=env, capture_output=True,
                          text=True, preexec_fn=limited(size))  # fmt: skip
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"^error: .*(File too large|\[write\]|No space left)", done.stderr, re.M)
    left = [path.name for path in home.rglob("*") if path.name.startswith("part-")]
    assert not left
    log = home / "logs" / "full" / "metrics.jsonl"
    for line in log.read_text().splitlines() if log.is_file() else []:
        json.loads(line)


def test_a_folder_that_vanishes_is_one_line(home, env):
    process = start(home, RUN_ID="gone", **{**env, **NET, **LONG})
    read_until(process, "step:9/")
    (home / "logs").rename(home / "elsewhere")
    _, err = process.communicate()
    assert process.returncode == 1 and "Traceback" not in err and "No such file" in err


def test_two_runs_that_begin_at_once_do_not_share_a_folder(tmp_path):
    """Both find no folder; what the first one writes is not the second's to empty."""
    first, second = (t.Report(tmp_path / "logs" / "same", 1) for _ in range(2))
    with first, second:
        first.event({"event": "step"})
        first.begin({})
        with pytest.raises(t.UserError, match="same: another run has made it"):
            second.begin({})
        assert json.loads((first.folder / "metrics.jsonl").read_text()) == {"event": "step"}


def test_a_run_that_is_alive_cannot_be_resumed(home, env):
    process = start(home, RUN_ID="alive", **{**env, **NET, **LONG, "CHECKPOINT_EVERY": 5})
    read_until(process, "step:9/")
    other = run(home, "alive", RESUME=1, **{**env, **NET, "ITERATIONS": 12})
    assert "another process" in error_of(other, 2)
    process.kill()
    process.communicate()
    env |= {**NET, "ITERATIONS": 12}
    assert run(home, "alive", RESUME=1, **env).status == 0


def test_a_refused_resume_leaves_the_run_as_it_was(home, env):
    """Above all the script that trained it."""
    run(home, "kept", **{**env, **NET})
    before = {p: p.read_bytes() for p in (home / "logs").rglob("*") if p.is_file()}
    script = edited(home / "script", "# an edit")
    refused = {**env, **NET, "MODEL_DIM": 64, "ITERATIONS": 9, "RESUME": 1}
    assert "MODEL_DIM was 32" in error_of(run(home, "kept", sys.executable, script, **refused), 2)
    assert {p: p.read_bytes() for p in (home / "logs").rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_gives_way_to_the_one_before(home, env):
    process = start(home, RUN_ID="cut", **{**env, **NET, **LONG, "CHECKPOINT_EVERY": 3})
    read_until(process, "step:20/")
    process.kill()
    process.communicate()
    newest, before = t.checkpoint_files(home / "logs" / "cut")
    raw = bytearray(newest.read_bytes())
    raw[-5] ^= 1
    newest.write_bytes(raw)
    step = json.loads(t.mx.load(str(before), return_metadata=True)[1]["facts"])["counters"]["step"]
    rest = run(home, "cut", RESUME=1, **{**env, **NET, "ITERATIONS": 30})
    assert rest.status == 0 and f"goes on from step {step}" in rest.out
    steps = [event["step"] for event in rest.events if event["event"] == "train"]
    assert steps == list(range(1, 31))  # those after the checkpoint once, not twice


@pytest.mark.parametrize("what", ["shortened", "removed"])
def test_a_shard_that_changes_meanwhile_is_one_line(what, home, env, dataset):
    folder = shutil.copytree(dataset.path, home / "data_sp300")
    env |= {"DATA_PATH": folder, "TOKENIZER_PATH": dataset.tokenizer, **NET, **LONG}
    process = start(home, RUN_ID="cut", **env)
    read = read_until(process, "step:9/")
    for path in folder.glob("*_train_*"):
        if what == "removed":
            path.unlink()
        else:
            os.truncate(path, 1500)
    cut = end_of(process, home, "cut", read)
    assert "_train_" in error_of(cut, 1) and checkpoint_of(cut)[1]["step"] >= 9


# --------------------------------------------------------------------------------------------------
# Data that would make a score false


@pytest.fixture
def refused(home, dataset):
    """refused(status, change): the error of a run whose copied data `change` has altered."""

    def try_run(status, change, **more):
        folder = home / "datasets" / "tiny_sp300"
        if not folder.exists():
            shutil.copytree(dataset.path, folder)
        change(folder)
        env = {**TINY, **NET, "TOKENIZER_PATH": dataset.tokenizer, "DATA_PATH": folder, **more}
        result = run(home, "false", **env)
        assert not (home / "logs").exists()  # the name is still free
        return error_of(result, status)

    return try_run


def test_byte_counts_are_no_shards(refused):
    def add(folder):
        shutil.copy(folder / "tiny_val_000000.bin", folder / "tiny_val_bytes_000000.bin")

    assert "byte counts" in refused(2, add)


def test_shards_unlike_their_manifest_are_refused(refused):
    def cut(folder):
        total = sum(len(t.Shard(path)) for path in folder.glob("*_val_*"))
        (folder / "manifest.json").write_text(json.dumps({"val": {"tokens": total}}))
        (folder / "tiny_val_000001.bin").unlink()

    assert "manifest.json" in refused(2, cut)


def test_validation_text_in_the_training_text_is_found(refused, home, dataset):
    def copy(folder):
        tokens = t.Shard(folder / "tiny_val_000000.bin")[:]
        write_shard(folder / "tiny_train_000009.bin", np.concatenate([[1, 9, 9], tokens]))

    error = refused(3, copy)
    assert "overlap: 5 documents" in error and "ALLOW_OVERLAP=1" in error
    env = {**TINY, "MIXER": "off", "DATA_PATH": home / "datasets" / "tiny_sp300"}
    env |= {"ALLOW_OVERLAP": 1, "TOKENIZER_PATH": dataset.tokenizer}
    result = run(home, "allowed", **env)
    assert final(result)["audit"] == "pass, 5 documents were trained on"
    assert final(result)["val_overlap"][0] == 5


def test_each_copy_of_a_document_is_validation_text(tmp_path):
    """Of three documents in the validation text, a long one is there thrice and trained on."""
    rng = np.random.default_rng(0)
    long, other = ([1, *rng.integers(2, 99, n)] for n in (80, 90))
    write_shard(tmp_path / "x_train_000000.bin", np.concatenate([other, long, [1, 5, 6]]))
    data = t.TrainWindows([tmp_path / "x_train_000000.bin"], 16, 1, 99)
    almost = [*long[:-1], 1 + long[-1]]
    val = np.concatenate([long, almost, [1, 5, 6], long, long])
    assert t.shared_documents(data, val, 1) == (3, 3 * 81)
    assert t.shared_documents(data, val, -1) == (0, 0)


TEXTS = [f"a cat number {i} sat on the mat and saw {i % 7} birds" for i in range(400)]


def trained_tokenizer(path, **options):
    """Write a SentencePiece model of TEXTS."""
    defaults = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "minloglevel": 3}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(path.with_suffix("")),
        hard_vocab_limit=False, **{**defaults, **options},
    )  # fmt: skip
    return path


@pytest.mark.parametrize("piece", ["all", "the single one"])
def test_a_tokenizer_without_a_space_is_refused(piece, tmp_path):
    path = trained_tokenizer(tmp_path / "t.model", normalization_rule_name="identity")
    raw = path.read_bytes()
    if piece == "all":
        other = raw.replace(b"\xe2\x96\x81", b"\xe2\x96\x82")
    else:
        other = raw.replace(b"\x0a\x03\xe2\x96\x81\x15", b"\x0a\x03\xe2\x96\x82\x15")
    assert other != raw
    path.write_bytes(other)
    with pytest.raises(t.UserError, match=r"U\+2581"):
        t.load_tokenizer(path)


def test_text_that_a_tokenizer_does_not_know_is_refused_before_training(refused, tmp_path):
    """Without byte fallback an unknown character decodes to something else."""
    path = trained_tokenizer(tmp_path / "t.model", vocab_size=80, byte_fallback=False)
    model = spm.SentencePieceProcessor(model_file=str(path))

    def encode(folder):
        for split, strange in (("train", ""), ("val", " é")):
            texts = [f"{text} {TEXTS[-i]}{strange}" for i, text in enumerate(TEXTS)]
            ids = [token for text in texts for token in (1, *model.encode(text))]
            write_shard(folder / f"tiny_{split}_000000.bin", ids)
            (folder / f"tiny_{split}_000001.bin").unlink()

    assert "byte_fallback" in refused(2, encode, TOKENIZER_PATH=path)


@pytest.mark.parametrize("words", ["привет мир", "ACGT TTGA", "HELLO WORLD", "a b"])
@pytest.mark.parametrize("prefix", [False, True])
def test_a_dummy_prefix_is_known_in_every_script(words, prefix, tmp_path):
    """Held against the bytes of what is decoded."""
    texts = [" ".join(random.Random(i).choices(words.split(), k=9)) for i in range(90)]
    path = tmp_path / "t.model"
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path.with_suffix("")), vocab_size=300,
        hard_vocab_limit=False, model_type="bpe", byte_fallback=True, minloglevel=3,
        add_dummy_prefix=prefix, normalization_rule_name="identity",
    )  # fmt: skip
    facts, model = t.load_tokenizer(path), spm.SentencePieceProcessor(model_file=str(path))
    assert facts.dummy_prefix == prefix
    ids = np.array([i for text in texts for i in (1, *model.encode(text))], np.int32)
    counted, true = t.decoded_bytes(path, facts, ids)
    assert counted == true == sum(len(text.encode()) for text in texts)


def test_a_tokenizer_that_vanishes_meanwhile_is_one_line(home, env, dataset, script):
    path = shutil.copy(dataset.tokenizer, home / "t.model")
    env |= {"TOKENIZER_PATH": path, "PAUSE": "export", "PAUSE_SECONDS": 2}
    process = start(home, sys.executable, script, RUN_ID="cut", **env)
    read = read_until(process, "paused")
    os.unlink(path)
    cut = end_of(process, home, "cut", read)
    assert f"{path}: no such file" in error_of(cut, 2)
    assert t.read_artifact(cut.folder / "artifact.bin")
    shutil.copy(dataset.tokenizer, path)
    assert final(run(home, "cut", RESUME=1, **env))["audit"] == "pass"


# --------------------------------------------------------------------------------------------------
# Hostile files. MUTATIONS=20000 tries as many.

MUTATIONS = int(os.environ.get("MUTATIONS", "500"))
ODD = [None, -1, 0, 0.5, 10**12, 10**400, "", "x", "nan", [], {}, [1], True, [[]], [10**9, 10**9]]


def altered(raw, rng):
    """Bytes with a few bits flipped, or cut, or with a piece of them moved."""
    raw = bytearray(raw)
    kind = rng.choice(["flip", "cut", "splice", "zeros"])
    at = rng.randrange(len(raw))
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 3, 20])):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del raw[at:]
    elif kind == "splice":
        piece = raw[at : at + rng.randrange(1, 100)]
        to = rng.randrange(len(raw))
        raw[to : to + rng.choice([0, len(piece)])] = piece
    else:
        raw[at : at + rng.randrange(1, 9)] = bytes(8)
    return bytes(raw)


def forged(header, rng):
    """A JSON object with one thing in it, at any depth, of another kind, missing or twice."""
    header = json.loads(json.dumps(header))
    place = header
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = rng.choice(list(keys))
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        kind = rng.choice(["odd", "gone", "twice"])
        if kind == "gone":
            del place[key]
        elif kind == "twice" and isinstance(place, list):
            place.append(place[key])
        else:
            place[key] = rng.choice(ODD)
        return header


@pytest.fixture(scope="module")
def small_artifact(tmp_path_factory):
    """(path, the model decompressed, the packed code) of a real artifact."""
    cfg = t.knobs_from_env({**{k: str(v) for k, v in TINY.items()}, "PRESET": "cpu"})[0]
    flags = np.zeros(60, bool)
    facts = t.Tokenizer(np.ones(60, np.uint16), flags, flags.copy(), 1, False, "0" * 64)
    params = dict(t.tree_flatten(t.GPT(cfg, 60, 1).parameters()))
    path = tmp_path_factory.mktemp("artifact") / "artifact.bin"
    rehearsal = t.PackedText(np.arange(60)[None], 7, "0" * 64, b"its code")
    packed = t.PackedText(np.arange(60)[None], 9, "0" * 64, b"some code", rehearsal)
    t.write_artifact(path, params, t.group_parameters(list(params)), cfg, facts, packed)
    blob = path.read_bytes()
    size = t.PREFIX.unpack_from(blob)[3]
    model = t.decompress(path, blob[t.PREFIX.size :][:size])
    return path, model, blob[t.PREFIX.size + size :]


def sealed(path, model, code):
    """Write an artifact whose checksum is right, whatever is in it."""
    import brotli

    body = brotli.compress(model, quality=1) + code
    size = len(body) - len(code)
    digest = t.checksum(t.FORMAT_VERSION, size, body)
    path.write_bytes(t.PREFIX.pack(t.MAGIC, t.FORMAT_VERSION, digest, size) + body)
    return path


def with_header(folder, artifact, change):
    """Write an artifact that is sound but for `change`, which gets its header to alter."""
    _, model, code = artifact
    length = int.from_bytes(model[:4], "little")
    header = json.loads(model[4 : 4 + length])
    change(header)
    text = json.dumps(header).encode()
    other = len(text).to_bytes(4, "little") + text + model[4 + length :]
    return sealed(folder / "artifact.bin", other, code)


def read_or_refuse(read):
    """Whether it is read; anything but one line of refusal is an error."""
    try:
        read()
    except t.UserError as error:
        assert str(error)
        return False
    return True


def test_no_artifact_is_more_than_a_line(small_artifact, tmp_path):
    whole, model, code = small_artifact
    length = int.from_bytes(model[:4], "little")
    header = json.loads(model[4 : 4 + length])
    read = 0
    for seed in range(MUTATIONS):
        rng = random.Random(seed)
        path = tmp_path / "artifact.bin"
        if seed % 4 == 0:  # nothing that is altered passes the checksum
            blob = altered(whole.read_bytes(), rng)
            path.write_bytes(blob)
            same = blob == whole.read_bytes()
            assert read_or_refuse(lambda path=path: t.read_artifact(path)) == same
            continue
        if seed % 4 == 1:
            text = json.dumps(forged(header, rng)).encode()
            other = len(text).to_bytes(4, "little") + text + model[4 + length :]
        elif seed % 4 == 2:
            other = altered(model[: 4 + length], rng) + model[4 + length :]
        else:
            other = altered(model, rng)
        sealed(path, other, code)
        read += read_or_refuse(lambda path=path: check_read(t.read_artifact(path)))
    assert read  # some alterations change nothing that could be told


@pytest.mark.parametrize("count, size", [(0, 8), (-1, 8), (t.REHEARSAL_MOST + 1, 8), ("7", 8),
                                         (7, 7), (7, 9), (7, 99), (7, -9), (7, None)])  # fmt: skip
def test_a_rehearsal_that_no_run_writes_is_refused(small_artifact, tmp_path, count, size):
    for changed in ((7, 8), (count, size)):

        def change(header, changed=changed):
            header["packed"][0][0], header["packed"][0][2] = changed

        path = with_header(tmp_path, small_artifact, change)
        assert read_or_refuse(lambda path=path: t.read_artifact(path)) == (changed == (7, 8))


WRONG_TENSORS = {
    "codes of a vector": ([["a", [3], 8]], 9),
    "twice": ([["a", [1, 2], 0], ["a", [1, 2], 0]], 16),
    "a shape below 0": ([["a", [-1, -2], 0]], 8),
    "a shape of fractions": ([["a", [1.0, 2], 0]], 8),
    "more than there is": ([["a", [10**6, 10**6], 8]], 8),
    "less than there is": ([["a", [1, 2], 0]], 9),
}


@pytest.mark.parametrize("rows, size", WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_tensors_unlike_their_bytes_are_refused(rows, size):
    with pytest.raises((ValueError, TypeError)):
        t.unpack_tensors(rows, bytes(size))


def check_read(artifact):
    """What was read is finite, and its settings are what the environment could set."""
    assert all(np.isfinite(np.array(p)).all() for p in artifact.params.values())
    t.knobs_from_env({}, kept=artifact.header["knobs"])


def test_a_bomb_is_a_line(small_artifact, tmp_path):
    """A small file that would become gigabytes."""
    path = sealed(tmp_path / "artifact.bin", bytes(t.MODEL_MOST + 1), b"")
    assert path.stat().st_size < 100_000
    with pytest.raises(t.UserError, match="becomes more than"):
        t.read_artifact(path)


def test_an_artifact_sets_nothing_but_the_model_and_its_score(small_artifact, tmp_path):
    for name, value in {"OUT_DIR": "/tmp", "RUN_ID": "../x", "RESUME": "1", "WORKERS": "9",
                        "DEVICE": "gpu", "TOKENIZER_PATH": "x", "LOGIT_SOFTCAP": "0",
                        "EVAL_MODE": "foo", "VAL_MAX_TOKENS": "-5000"}.items():  # fmt: skip

        def change(header, name=name, value=value):
            header["knobs"][name] = value

        with pytest.raises(t.UserError, match=name):
            t.read_artifact(with_header(tmp_path, small_artifact, change))


def test_an_artifact_that_lacks_a_setting_is_a_line(small_artifact, tmp_path):
    """What its file does not say must not be filled in, nor be missed later."""
    path = with_header(tmp_path, small_artifact, lambda header: header["knobs"].pop("NUM_LAYERS"))
    with pytest.raises(t.UserError, match="NUM_LAYERS is missing"):
        t.read_artifact(path)


def test_a_tokenizer_has_a_digest_that_can_be_said(small_artifact, tmp_path):
    path = with_header(tmp_path, small_artifact, lambda head: head["tokenizer"].update(sha256=5))
    with pytest.raises(t.UserError, match="SHA-256 5"):
        t.read_artifact(path)


def test_no_checkpoint_is_more_than_a_line(tmp_path):
    arrays = {"params": {"a": t.mx.arange(300.0), "b": t.mx.ones((4, 5))}}
    path = t.write_checkpoint(tmp_path, (arrays, {"step": 3}), {"sizes": {}})
    whole = path.read_bytes()
    for seed in range(MUTATIONS):
        path.write_bytes(blob := altered(whole, random.Random(seed)))
        read = read_or_refuse(lambda: t.read_checkpoint(tmp_path))
        assert read <= (blob[8:] == whole[8:]), seed
