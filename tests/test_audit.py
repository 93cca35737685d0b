"""Cheats planted in the script: the audit names the condition that each one breaks.

A cheat takes the place of a function or a method of the script, as an edit of a user would, and
gets the honest one to call. AUDIT_RUNS=20 repeats the checks of honest scripts with 20 seeds.
"""

import dataclasses
import hashlib
import json
import math
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece as spm
from conftest import made_up_text, made_up_tokenizer, random_model, t, tiny_knobs, write_shard

mx = t.mx
VOCAB = 50
SEEDS = range(int(os.environ.get("AUDIT_RUNS", "1")))
WORKERS = t.Workers(1)

LOGISTIC, OFF = {"MIXER": "logistic"}, {"MIXER": "off"}
BACKOFF = {"MIXER": "backoff", "NGRAM_ALPHA": "0.25"}
LEARNED = {"MIXER": "backoff", "NGRAM_ALPHA": "auto"}


def settings(**env):
    return tiny_knobs(MIXER_MEMORY_MB=2, **env)


def audit_of(env, text):
    """The audit of an artifact in memory, with no text packed."""
    cfg, model = settings(**env), random_model(**env)
    leaf = np.random.default_rng(3).permutation(VOCAB)
    packed = t.PackedText(leaf[None], 0, hashlib.sha256(b"").hexdigest(), b"")
    packed = packed if cfg.mixer == "logistic" else None
    artifact = t.Artifact({}, made_up_tokenizer(), {}, packed)
    return t.Audit(t.Scoring(cfg, Path("no file"), artifact, model, text, WORKERS))


def pack_text(room=400):
    """A mixer that has packed training text, and what it packed: the training side's."""
    tokenizer, leaf = made_up_tokenizer(), np.random.default_rng(3).permutation(VOCAB)
    mixer, coder = t.LogisticMixer(tokenizer, leaf, room + 800, 2), t.Coder()
    mixer.code(made_up_text(room, seed=99).tokens.astype(np.int64), None, coder)
    heard = made_up_text(300, seed=98).tokens.astype(np.int64)
    rehearsal = t.pack_rehearsal(tokenizer, leaf[None], heard)
    return mixer, t.PackedText(leaf[None], room, mixer.text_sha256(), coder.finish(), rehearsal)


def write_run(folder, env, shards=(300,), packed=None):
    """Write an artifact, and the shards of a validation text beside it."""
    cfg, model = settings(**env), random_model(**env)
    params = dict(t.tree_flatten(model.parameters()))
    packed = packed or (pack_text()[1] if cfg.mixer == "logistic" else None)
    groups = t.group_parameters(list(params))
    t.write_artifact(folder / "artifact.bin", params, groups, cfg, made_up_tokenizer(), packed)
    for i, size in enumerate(shards):
        write_shard(folder / f"text_val_{i:06d}.bin", made_up_text(size, i).tokens)


def load(folder, env, workers=WORKERS):
    """What a fresh process reads."""
    return t.Scoring.load(settings(**env), folder / "artifact.bin", folder, workers)


def scoring_of(folder, env, shards=(300,)):
    write_run(folder, env, shards)
    return load(folder, env)


def fails(condition, says, check, *args):
    """`check` raises an audit failure that names the condition and says what is wrong."""
    with pytest.raises(t.AuditFailed, match=says) as caught:
        check(*args)
    assert (caught.value.args[0], caught.value.status) == (condition, 3)


# --------------------------------------------------------------------------------------------------
# What an honest script does


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("alpha", ["0", "0.25", "1", "auto"])
@pytest.mark.parametrize("smoothing", ["kneser-ney", "laplace"])
def test_backoff_passes(alpha, smoothing, seed):
    env = {"MIXER": "backoff", "NGRAM_ALPHA": alpha, "NGRAM_SMOOTHING": smoothing}
    audit_of(env, made_up_text(seed=seed)).excerpts(seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("env", [LOGISTIC, OFF, {**LOGISTIC, "EVAL_MODE": "standard"}])
def test_logistic_and_net_alone_pass(env, seed):
    said = audit_of(env, made_up_text(seed=seed)).excerpts(seed)
    assert "causal in 3, normalised in 3" in said


@pytest.mark.parametrize("size", [2, 3, 15, 16, 17, 18, 30])
def test_a_short_text_passes(size):
    for env in (LOGISTIC, BACKOFF, OFF):
        audit_of(env, made_up_text(size, seed=5)).excerpts(0)


@pytest.mark.parametrize("env", [LOGISTIC, LEARNED, OFF])
def test_a_run_passes(tmp_path, env):
    ours = scoring_of(tmp_path, {**env, "EVAL_MODE": "both"}, (200, 57))
    said = t.Audit(ours).run(tmp_path, None)
    assert any("bytes not checked" in line for line in said)
    results, lines = zip(*(ours.score(mode) for mode in ("standard", "sliding")), strict=True)
    assert all(r["val_whole"] and r["val_tokens"] == 256 for r in results)
    assert lines[0].startswith("16 tokens written" if env is LOGISTIC else "")
    assert bool(lines[0]) == (env is LOGISTIC)
    assert lines[1] == ""  # a process does not decode what it wrote


# --------------------------------------------------------------------------------------------------
# Cheats in the score


class Cheat(NamedTuple):
    env: dict[str, str]
    condition: str
    says: str  # of the failure
    edits: list[tuple[str, Callable]]  # (a name in the script, what takes its place)


CHEATS: dict[str, Cheat] = {}


def cheat(name, env, condition, says, seam):
    """Register a function(the honest one, *its arguments) as the cheat in a seam's place."""

    def register(function):
        CHEATS[name] = Cheat(env, condition, says, [(seam, function)])
        return function

    return register


def plant(monkeypatch, seam, function):
    """Put function(the honest one, *arguments) in the place of a function or method."""
    honest = operator.attrgetter(seam)(t)
    monkeypatch.setattr(f"{t.__name__}.{seam}", lambda *args, **kw: function(honest, *args, **kw))


def token_by_token(score, model, tokens, logs, *coder):
    """What score(model, ...) gives if each token comes alone."""
    parts = [score(model, tokens[i : i + 1], logs[i : i + 1], *coder) for i in range(len(tokens))]
    return np.concatenate([np.zeros((0, 3)), *parts])


COSTS = ["LogisticMixer.cost", "BackoffMixer.cost", "ContextModel.cost"]


# The key of a hashed context holds the token that is to be predicted.
@cheat("target in the hash key, logistic", LOGISTIC, "normalisation", "context", COSTS[0])
def _(score, mixer, tokens, logs, *coder):
    def keyed(mixer, token, row, *coder):
        at, history = mixer.learned - 1, mixer.state.history
        newest = history[at]
        history[at] = (newest + token[0]) % VOCAB
        out = score(mixer, token, row, *coder)
        history[at] = newest
        return out

    return token_by_token(keyed, mixer, tokens, logs, *coder)


def ngrams(formula):
    """A BackoffMixer.cost whose p_ngram is formula(the honest p_ngram, tokens learned)."""

    def cheating(score, mixer, tokens, logs, *coder):
        learned = mixer.learned + 1 + np.arange(len(tokens))
        out = score(mixer, tokens, logs, *coder)
        net, p = np.exp(-out[:, 0]), formula(np.exp(-out[:, 1]), learned)
        return np.column_stack([out[:, 0], -np.log(p), -np.log(0.75 * net + 0.25 * p)])

    return cheating


# A probability p of a token that n tokens are counted for stands for a count of n p: the cheats
# make of it what they would of the counts.
for name, formula in {
    # Every pair that was seen has a cell of its own, whose count is divided by itself.
    "target in the key, backoff": lambda p, n: np.where(p > 1 / VOCAB, 0.99, p),
    # The counts' sum is another table's.
    "denominator of another table, backoff": lambda p, n: n * p / (n * p + 1),
    "denominator off by one, backoff": lambda p, n: p * n / (n + 1),
    # What was counted is asked.
    "update before scoring, backoff": lambda p, n: (n * p + 1) / (n + 1),
}.items():
    cheat(name, BACKOFF, "normalisation", "context", COSTS[1])(ngrams(formula))


# The better expert of each token, chosen when the token is known.
def lower_loss(score, *args):
    out = score(*args)
    out[:, 2] = out.min(axis=1)
    return out


cheat("lower of two losses, logistic", LOGISTIC, "normalisation", "mixed", COSTS[0])(lower_loss)
cheat("lower of two losses, backoff", BACKOFF, "normalisation", "mixed", COSTS[1])(lower_loss)


@cheat("lower of two losses, net", OFF, "normalisation", "net", COSTS[2])
def _(score, model, tokens, logs, *coder):
    return np.minimum(score(model, tokens, logs, *coder), math.log(VOCAB))


# The weight is a function of the token that is to be predicted.
@cheat("gate sees the target, backoff", LEARNED, "normalisation", "mixed", COSTS[1])
def _(score, *args):
    out = score(*args)
    net, contexts, _ = np.exp(-out).T
    weight = contexts / (contexts + net)
    out[:, 2] = -np.log((1 - weight) * net + weight * contexts)
    return out


# The net's part in the mix depends on whether it is right.
@cheat("gate sees the target, logistic", LOGISTIC, "normalisation", "mixed", COSTS[0])
def _(score, mixer, tokens, logs, *coder):
    at = np.arange(len(tokens))
    right = logs[at, tokens] > np.median(logs, axis=1)
    loud = logs.copy()
    loud[at, tokens] += 4
    heard = np.where(right[:, None], t.log_softmax(loud), logs)
    out = score(mixer, tokens, heard, *coder)
    out[:, 0] = t.net_nats(tokens, logs)
    return out


# What was learned is asked: the token is learned, and only the place in the text is taken back.
@cheat("update before scoring, logistic", LOGISTIC, "normalisation", "two scores", COSTS[0])
def _(score, mixer, tokens, logs, *coder):
    places = {"history", "words", "now", "marks"} & set(mixer.state._fields)

    def learned(mixer, token, row, *coder):
        before = {place: getattr(mixer.state, place).copy() for place in places}
        score(mixer, token, row)
        for place in places:
            getattr(mixer.state, place)[:] = before[place]
        return score(mixer, token, row, *coder)

    return token_by_token(learned, mixer, tokens, logs, *coder)


# Text is learned before it is scored, so it is learned twice, which takes room.
def roomy(new, cfg, tokenizer, leaf, capacity, *memory):
    return new(cfg, tokenizer, leaf, 9 * capacity, *memory)


@cheat("one chunk early, logistic", LOGISTIC, "causality", "score of target", "cost_tokens")
def _(cost, rows, known, model, *coder):
    for first, logs in rows:
        model.cost(known[first + 1 : first + 1 + len(logs)], logs)
        yield from cost(iter([(first, logs)]), known, model, *coder)


@cheat("one token early, logistic", LOGISTIC, "causality", "score of target", "cost_tokens")
def _(cost, rows, known, model, *coder):
    for first, logs in rows:
        model.begin(int(known[min(first + len(logs) + 1, len(known) - 1)]))
        yield from cost(iter([(first, logs)]), known, model, *coder)


for name in ("one chunk early, logistic", "one token early, logistic"):
    CHEATS[name].edits.append(("new_context_model", roomy))


# A score is another one when several tokens come at once.
@cheat("several tokens cost less, logistic", LOGISTIC, "normalisation", "two scores", COSTS[0])
def _(score, mixer, tokens, *args):
    return score(mixer, tokens, *args) * (0.9 if len(tokens) > 1 else 1)


@cheat("long parts cost less, logistic", LOGISTIC, "causality", "how the text is cut", COSTS[0])
def _(score, mixer, tokens, *args):
    return score(mixer, tokens, *args) * (0.9 if len(tokens) > 8 else 1)


# The tail again, in a full window; or not at all.
@cheat("tail scored twice", OFF, "coverage", "was due", "scoring_windows")
def _(windows, targets, seq_len, stride):
    for start, first, last in windows(targets, seq_len, stride):
        short = first + stride - last if first else 0
        yield start - short, first - short, last


@cheat("tail left out", OFF, "coverage", "scored .* of", "scoring_windows")
def _(windows, targets, seq_len, stride):
    for window in windows(targets, seq_len, stride):
        if not window[1] or window[1] + stride <= targets:
            yield window


# The net looks ahead.
@cheat("attention sees one position ahead", OFF, "causality", "depends on", "future_mask")
def _(mask, a, b, group):
    future = np.arange(b)[None, :] > np.arange(a, b)[:, None] + 1
    return mx.array(np.tile(future * np.float32(t.MASKED), (group, 1)))


@cheat("attention without a mask", OFF, "causality", "depends on", "causal_attention")
def _(attend, q, k, v, scale, training):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)


@cheat("smear looks ahead", OFF, "causality", "depends on", "GPT.embed")
def _(embed, model, context):
    x = embed(model, context)
    return t.rms_norm(x + 0.1 * mx.pad(x, [(0, 0), (0, 1), (0, 0)])[:, 1:])


@cheat("hashed contexts look ahead", OFF, "causality", "depends on", "document_context")
def _(contexts, x, bos, depth):
    ahead = [mx.pad(x, [(0, 0), (0, k)])[:, k:] for k in range(1, depth)]
    return [x, *ahead]


@cheat("statistics of the whole window", OFF, "causality", "depends on", "GPT.embed")
def _(embed, model, context):
    x = embed(model, context)
    return t.rms_norm(x - x.mean(axis=1, keepdims=True))


@cheat("inputs shifted by one", OFF, "causality", "depends on", "scoring_windows")
def _(windows, *shape):
    for start, first, last in windows(*shape):
        yield start + (first > 0), first, last


# Windows scored side by side hear each other: the next one begins a stride later.
@cheat("a window hears the next one", OFF, "causality", "depends on", "GPT.trunk")
def _(trunk, model, x, training, caches):
    x = trunk(model, x, training, caches)
    return t.rms_norm(x + 0.1 * mx.roll(x, -1, axis=0))


# Rows that sum to more than 1, but not in the first window.
def claim_more(rows, model, text, shape, *args):
    for first, logs in rows(model, text, shape, *args):
        yield first, logs + 0.5 if first >= shape[0] else logs


cheat("later windows claim more, net", OFF, "normalisation", "net", "net_rows")(claim_more)
cheat("later windows claim more, logistic", LOGISTIC, "normalisation", "net", "net_rows")(
    claim_more
)


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_is_caught(monkeypatch, name):
    env, condition, says, edits = CHEATS[name]
    for edit in edits:
        plant(monkeypatch, *edit)
    for seed in range(3):  # not by luck
        fails(condition, says, audit_of(env, made_up_text(seed=seed)).excerpts, seed)


PAYS = [name for name, planted in CHEATS.items() if planted.condition == "normalisation"]


@pytest.mark.parametrize("name", PAYS)
def test_cheat_pays(monkeypatch, name):
    """The score that it pretends is the lower one: no cheat is caught for being none."""
    env, _, says, edits = CHEATS[name]
    audit, text = audit_of(env, None), made_up_text().tokens.astype(np.int64)
    honest = audit.trace(text)[0]
    for edit in edits:
        plant(monkeypatch, *edit)
    pretended = audit.trace(text)[0]
    column = 0 if says == "net" else 2
    saved = (honest - pretended)[:, column]
    if name == "denominator off by one, backoff":  # it is as false, but costs
        assert (saved < 0).all()
    else:
        assert saved.sum() > 1


@pytest.mark.parametrize("env", [LOGISTIC, LEARNED, OFF])
def test_seams_alone_are_no_cheat(monkeypatch, env):
    """What cheats are made of, without the cheat: tokens one by one, more room, wrapped calls."""
    for seam in COSTS:
        plant(monkeypatch, seam, token_by_token)
    for seam in {s for planted in CHEATS.values() for s, _ in planted.edits} - {*COSTS}:
        plant(monkeypatch, seam, roomy if seam == "new_context_model" else lambda f, *a: f(*a))
    audit_of(env, made_up_text()).excerpts(0)


@pytest.mark.parametrize("name", ["tail scored twice", "tail left out"])
def test_what_is_not_scored_once_is_no_score(tmp_path, monkeypatch, name):
    ours = scoring_of(tmp_path, OFF)
    for edit in CHEATS[name].edits:
        plant(monkeypatch, *edit)
    fails("coverage", CHEATS[name].says, ours.score, "sliding")


# --------------------------------------------------------------------------------------------------
# Unpaid text


def unpaid(unpack, mixer, *args):
    unpack(mixer, *args)
    mixer.begin(7)


def test_unpaid_text_is_caught(tmp_path, monkeypatch):
    ours = scoring_of(tmp_path, LOGISTIC)
    assert ours.prime().learned == 700
    plant(monkeypatch, "unpack", unpaid)
    fails("paid text", "learned 401 tokens, paid 400", ours.prime)


def test_an_unpaid_rehearsal_is_caught(tmp_path, monkeypatch):
    """The mixer has learned another token, which nobody paid for."""
    ours = scoring_of(tmp_path, LOGISTIC)
    plant(monkeypatch, "cost_tokens", lambda f, rows, text, mixer: (mixer.begin(7), f(
        rows, text, mixer))[1])  # fmt: skip
    fails("paid text", "learned 701 tokens, paid 700", ours.prime)


def test_text_that_is_paid_but_not_learned_is_caught(tmp_path, monkeypatch):
    ours = scoring_of(tmp_path, LOGISTIC)
    plant(monkeypatch, "unpack", lambda *_: None)
    fails("paid text", "learned 0 tokens, paid 400", ours.prime)


def test_packed_text_that_is_not_what_it_says_is_caught(tmp_path):
    _, packed = pack_text()
    packed = dataclasses.replace(packed, code=packed.code[:20] + b"?" + packed.code[21:])
    write_run(tmp_path, LOGISTIC, packed=packed)
    fails("paid text", "does not decode", load(tmp_path, LOGISTIC).prime)


def test_unpaid_counts_of_backoff_are_caught(tmp_path, monkeypatch):
    def counted(new, *args):
        mixer = new(*args)
        for token in (5, 6, 7):
            mixer.begin(token)
        return mixer

    ours = scoring_of(tmp_path, BACKOFF)
    plant(monkeypatch, "new_context_model", counted)
    fails("paid text", "learned 3 tokens, paid 0", ours.prime)


def test_unpaid_text_that_hides_fails_the_message(tmp_path, monkeypatch):
    """It is not counted; but the side that trained has coded the message without it."""
    ours, hiding = write_message(tmp_path), []
    learned = t.LogisticMixer.learned.fget
    plant(monkeypatch, "unpack", lambda f, mixer, *args: (unpaid(f, mixer, *args),
                                                          hiding.append(mixer)))  # fmt: skip
    hidden = property(lambda mixer: learned(mixer) - any(mixer is one for one in hiding))
    monkeypatch.setattr(t.LogisticMixer, "learned", hidden)
    assert ours.prime().learned == 700
    fails("message", "is not the text's|bits for a claim", ours.score, "sliding")


# --------------------------------------------------------------------------------------------------
# The rehearsal


def knowing_net(text):
    """Rows of a net that gives what comes next 0.9."""
    rows = np.full((len(text) - 1, VOCAB), math.log(0.1 / (VOCAB - 1)), np.float32)
    rows[np.arange(len(rows)), text[1:]] = math.log(0.9)
    yield 0, rows


def test_a_rehearsal_teaches_what_the_net_is_worth():
    """And nothing else: contexts learn the same of its text, whoever reads it with them."""
    tokenizer, (_, packed) = made_up_tokenizer(), pack_text()
    text, costs, models = made_up_text(200, seed=5).tokens.astype(np.int64), {}, {}
    (_, rows) = next(knowing_net(text))
    bare = dataclasses.replace(packed, rehearsal=None)
    cases = ("heard", knowing_net, packed), ("read", None, packed), ("none", None, bare)
    for name, net, its in cases:
        artifact = t.Artifact({}, tokenizer, {}, its)
        models[name] = mixer = t.prime_contexts(settings(), artifact, len(text), net)
        assert not any(mixer.worth().values())
        mixer.begin(int(text[0]))
        costs[name] = mixer.cost(text[1:], rows).sum(axis=0)
    assert [model.learned for model in models.values()] == [900, 900, 600]
    net, contexts, mixed = (costs["heard"] / costs["read"]).tolist()
    assert net == contexts == 1 and mixed < 0.8
    assert costs["none"][1] != costs["read"][1]


# --------------------------------------------------------------------------------------------------
# The message


def write_message(folder, env=LOGISTIC):
    """Write a run as the side that trains does, whose mixer has packed the text: what is scored."""
    mixer, packed = pack_text()
    write_run(folder, env, packed=packed)
    ours = load(folder, env)
    net = t.standard_rows(ours.cfg, ours.model, ours.workers)
    t.rehearse(mixer, ours.artifact, net)
    mixer.begin(int(ours.text.tokens[0]))
    _, _, nats, coder = ours.code_message(mixer, "standard", None)
    assert str(folder / "message.bin") in ours.write_message(nats, coder)
    return ours


def message(folder):
    """(its header, its code)."""
    header, _, code = (folder / "message.bin").read_bytes().partition(b"\n")
    return json.loads(header), code


def same_score(results):
    """Whether they are one score, to the last bit."""
    columns = "val_loss", "val_bpb", "val_bpb_net", "val_bpb_context", "val_tokens", "val_bytes"
    return len({tuple(result[name] for name in columns) for result in results}) == 1


def test_message_of_the_side_that_trained_is_decoded(tmp_path):
    write_message(tmp_path)
    header, code = message(tmp_path)
    before, at = (tmp_path / "message.bin").read_bytes(), made_up_text().tokens[:17]
    assert header["tokens"] == 16 and header["window"] == 16
    assert header["text"] == hashlib.sha256(at.astype("<i4")).hexdigest()
    assert abs(8 * len(code) - header["bits"]) <= 16
    result, line = load(tmp_path, LOGISTIC).score("sliding")
    assert line.startswith(f"16 tokens decoded from {len(code)} bytes")
    assert result["val_whole"] and (tmp_path / "message.bin").read_bytes() == before


def test_the_decoder_knows_the_first_token_alone(tmp_path):
    """What it decodes is not the text that it is given."""
    ours = write_message(tmp_path)
    header, code = message(tmp_path)
    other = ours.text.tokens.copy()
    other[1:] = (other[1:] + 5) % VOCAB
    ours.text = dataclasses.replace(ours.text, tokens=other)
    mixer = ours.prime()
    mixer.begin(int(other[0]))
    known, _, nats, _ = ours.code_message(mixer, "sliding", code)
    assert (known[:17] == made_up_text().tokens[:17]).all() and (known[17:] == other[17:]).all()
    assert math.isclose(nats[:, 2].sum() / math.log(2), header["bits"], rel_tol=1e-12)
    fails(
        "message", "decoded token 0", t.check_message, len(code), header["bits"], nats, known, other
    )


def test_message_is_written_where_there_is_none(tmp_path):
    """And the score is the same without, with the coder on, and by a decoder."""
    write_run(tmp_path, LOGISTIC)
    scores, lines = zip(
        *(load(tmp_path, {**LOGISTIC, "AUDIT": audit}).score("sliding") for audit in (0, 1, 1, 0)),
        strict=True,
    )
    assert lines[1].startswith("16 tokens written to ") and "run again" in lines[1]
    assert lines[2].startswith("16 tokens decoded from ")
    assert lines[0] == lines[3] == ""
    assert same_score(scores)
    folder = tmp_path / "trained"
    folder.mkdir()
    write_message(folder)
    assert message(folder) == message(tmp_path)  # both sides write the same one


@pytest.mark.parametrize("env", [BACKOFF, OFF])
def test_nothing_else_has_a_message(tmp_path, env):
    ours = scoring_of(tmp_path, env)
    assert ours.score("sliding")[1] == "" and not (tmp_path / "message.bin").exists()


def test_a_message_that_cannot_be_written_costs_no_score(tmp_path):
    ours = scoring_of(tmp_path, LOGISTIC)
    (tmp_path / "part-message.bin").mkdir()
    result, line = ours.score("sliding")
    assert line.startswith("no message written: ") and "message.bin" in line
    (tmp_path / "part-message.bin").rmdir()
    assert same_score([result, load(tmp_path, LOGISTIC).score("sliding")[0]])


@pytest.mark.parametrize("what", ["artifact", "text", "window", "batch", "machine", "workers"])
def test_another_message_is_not_decoded(tmp_path, monkeypatch, what):
    ours, env, workers = write_message(tmp_path), LOGISTIC, t.Workers(1 + (what == "workers"))
    if what == "artifact":
        params = {**ours.artifact.params, "skips": ours.artifact.params["skips"] * 2}
        args = t.group_parameters(list(params)), ours.cfg, ours.artifact.tokenizer, pack_text()[1]
        t.write_artifact(tmp_path / "artifact.bin", params, *args)
    elif what == "text":
        write_shard(tmp_path / "text_val_000000.bin", made_up_text(300, seed=5).tokens)
    elif what == "window":
        env = {**LOGISTIC, "EVAL_SEQ_LEN": 20}
    elif what == "batch":
        env = {**LOGISTIC, "EVAL_BATCH_SEQS": 4}
    elif what == "machine":
        monkeypatch.setattr(t, "processor_name", lambda: "another")
    before = (tmp_path / "message.bin").read_bytes()
    with workers:
        result, line = load(tmp_path, env, workers).score("sliding")
    of = {"window": "text, tokens, window, rehearsal", "workers": "machine",
          "batch": "rehearsal"}.get(what, what)  # fmt: skip
    if what == "artifact":  # it is worth nothing any more
        assert line.startswith("16 tokens written")
    else:
        assert line == f"{tmp_path / 'message.bin'} not decoded: it is of another {of}"
        assert (tmp_path / "message.bin").read_bytes() == before
    assert result["val_tokens"] == 299


@pytest.mark.parametrize("damage", ["a bit", "cut", "longer", "claims more", "claims less", "nan"])
def test_a_damaged_message_is_no_score(tmp_path, damage):
    ours = write_message(tmp_path)
    header, code = message(tmp_path)
    if damage in ("claims more", "claims less", "nan"):
        header["bits"] *= {"claims more": 2, "claims less": 0.5, "nan": math.nan}[damage]
    else:
        flipped = code[:2] + bytes([code[2] ^ 16]) + code[3:]
        code = {"a bit": flipped, "cut": code[:4], "longer": code + bytes(9)}[damage]
    content = json.dumps(header).encode() + b"\n" + code
    (tmp_path / "message.bin").write_bytes(content)
    says = "is not the text's" if damage in ("a bit", "cut") else "bits for a claim of"
    fails("message", says, ours.score, "sliding")


@pytest.mark.parametrize("header", [b"", b"\xff{", b"[1, 2]", b"{", b"7", b"no bits", b"odd bits"])
def test_a_damaged_header_is_named(tmp_path, header):
    ours = write_message(tmp_path)
    facts, code = message(tmp_path)
    if header.endswith(b"bits"):
        facts |= {"bits": "many"}
        facts = facts if header == b"odd bits" else {n: facts[n] for n in facts if n != "bits"}
        header = json.dumps(facts).encode()
    (tmp_path / "message.bin").write_bytes(header + b"\n" + code)
    with pytest.raises(t.UserError, match=r"message\.bin: not a message of this script"):
        ours.score("sliding")


def test_claims_below_the_code_are_caught(tmp_path, monkeypatch):
    """Scores that no code reaches: of the message, and of all the rest."""
    ours = write_message(tmp_path)
    plant(monkeypatch, COSTS[0], lambda score, *args: 0.7 * score(*args))
    fails("message", "bits for a claim of", ours.score, "sliding")
    fails("normalisation", "net probabilities", t.Audit(ours).excerpts, 0)


# --------------------------------------------------------------------------------------------------
# Bytes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """(a trained tokenizer's path, text with spaces, byte pieces and documents)."""
    rng = np.random.default_rng(5)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(1, 6))) for _ in range(30)]
    lines = [" ".join(rng.choice(words, 12)) for _ in range(200)]
    prefix = tmp_path_factory.mktemp("tokenizer") / "tiny"
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(prefix), vocab_size=330, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    model = spm.SentencePieceProcessor(model_file=f"{prefix}.model")
    text = [i for line in lines[:20] for i in (model.bos_id(), *model.encode(f"{line} é🙂 {line}"))]
    return prefix.with_suffix(".model"), np.array(text, np.int32)


def count_bytes(tokenizer):
    """What the audit says of the bytes of a text, with the tokenizer read anew."""
    path, tokens = tokenizer
    artifact, text = (
        t.Artifact({}, t.load_tokenizer(path), {}, None),
        t.ValidationText(tokens, True, 1),
    )
    scoring = t.Scoring(settings(), path, artifact, None, text, None)
    return t.Audit(scoring).byte_count(path)


def test_bytes_pass(tokenizer):
    assert f"bytes, as the {len(tokenizer[1])} tokens" in count_bytes(tokenizer)


def test_bytes_pass_wherever_the_text_is_cut(tokenizer):
    """Also within a character of several byte pieces, which does not decode."""
    path, text = tokenizer
    facts = t.load_tokenizer(path)
    for cut in range(1, 60):
        counted, true = t.decoded_bytes(path, facts, text[:cut])
        assert counted == true


def test_another_tokenizer_is_refused(tokenizer, monkeypatch):
    def another(read, path):
        return dataclasses.replace(read(path), sha256="0" * 64)

    plant(monkeypatch, "load_tokenizer", another)
    path = tokenizer[0]
    artifact = t.Artifact({}, t.load_tokenizer(path), {}, None)
    scoring = t.Scoring(settings(), path, artifact, None, None, None)
    with pytest.raises(t.UserError, match="TOKENIZER_PATH"):
        t.Audit(scoring).same_tokenizer(path)


# The size that a table would give to the piece `p`, honestly of `size` bytes.
BYTE_CHEATS = {
    "spaces twice": lambda p, size: size + p.count("\u2581"),
    "spaces at three bytes": lambda p, size: size + 2 * p.count("\u2581"),
    "byte pieces at three bytes": lambda p, size: 3 if p.startswith("<0x") else size,
    "byte pieces at six bytes": lambda p, size: 6 if p.startswith("<0x") else size,
    "control pieces have bytes": lambda p, size: size or len(p),
}


@pytest.mark.parametrize("name", BYTE_CHEATS)
def test_wrong_bytes_are_caught(monkeypatch, tokenizer, name):
    def false_table(read, path):
        honest = read(path)
        model = spm.SentencePieceProcessor(model_file=str(path))
        pieces = model.id_to_piece(list(range(honest.vocab)))
        sizes = map(BYTE_CHEATS[name], pieces, honest.piece_bytes.tolist())
        return dataclasses.replace(honest, piece_bytes=np.array(list(sizes), np.uint16))

    plant(monkeypatch, "load_tokenizer", false_table)
    fails("bytes", "the table gives", count_bytes, tokenizer)


def test_a_dummy_prefix_that_is_counted_is_caught(monkeypatch, tokenizer):
    def counted(_, facts, previous, current):
        return facts.piece_bytes[current].astype(np.int64)

    plant(monkeypatch, "Tokenizer.bytes_of", counted)
    fails("bytes", "the table gives", count_bytes, tokenizer)


@pytest.mark.parametrize("bos", [1, -1])
def test_bytes_are_counted_with_and_without_bos(tmp_path, bos):
    words = [f"word{i % 7} and {i % 5} more" for i in range(300)]
    shape = {"model_prefix": str(tmp_path / "m"), "vocab_size": 40, "bos_id": bos}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_type="bpe", minloglevel=2, **shape
    )
    path = tmp_path / "m.model"
    model = spm.SentencePieceProcessor(model_file=str(path))
    assert t.load_tokenizer(path).bos == bos
    tokens = np.array([bos] * (bos >= 0) + model.encode(" ".join(words[:9])), np.int32)
    assert count_bytes((path, tokens)).startswith(f"{len(' '.join(words[:9]))} bytes")


# --------------------------------------------------------------------------------------------------
# The whole text


def test_a_part_called_whole_is_caught(tmp_path, monkeypatch):
    def whole(read, *args):
        return dataclasses.replace(read(*args), whole=True)

    plant(monkeypatch, "load_validation", whole)
    ours = scoring_of(tmp_path, {**OFF, "VAL_MAX_TOKENS": "120"})
    fails("whole text", "of 300 tokens are called whole", t.Audit(ours).whole, tmp_path)


def test_a_shard_that_is_not_read_to_its_end_is_caught(tmp_path, monkeypatch):
    def cut(read, *args):
        text = read(*args)
        return dataclasses.replace(text, tokens=text.tokens[:100])

    plant(monkeypatch, "load_validation", cut)
    ours = scoring_of(tmp_path, OFF)
    fails("whole text", "100 of 300 tokens are called whole", t.Audit(ours).whole, tmp_path)


def test_shards_that_are_not_looked_for_are_caught(tmp_path, monkeypatch):
    def first_shard(read, *args):
        with monkeypatch.context() as patch:
            plant(patch, "find_shards", lambda find, *where: find(*where)[:1])
            return read(*args)

    plant(monkeypatch, "load_validation", first_shard)
    ours = scoring_of(tmp_path, OFF, (200, 100))
    fails("whole text", "200 of 300 tokens are called whole", t.Audit(ours).whole, tmp_path)


@pytest.mark.parametrize("limit", [0, 120])
def test_honest_labels_pass(tmp_path, limit):
    ours = scoring_of(tmp_path, {**OFF, "VAL_MAX_TOKENS": str(limit)}, (200, 100))
    t.Audit(ours).whole(tmp_path)
    assert ours.text.whole == (limit == 0)
    ours.text = dataclasses.replace(ours.text, whole=not ours.text.whole)
    fails("whole text", "called whole", t.Audit(ours).whole, tmp_path)


# --------------------------------------------------------------------------------------------------
# What is no cheat, and no score either, is called what it is


def test_numbers_that_are_not_finite_are_named(monkeypatch):
    audit = audit_of(OFF, made_up_text(80))
    plant(monkeypatch, "log_softmax", lambda honest, logits: honest(logits) * np.float32(np.nan))
    fails("finite", "not a finite number", audit.excerpts, 1)


def test_a_net_that_does_not_repeat_is_named(monkeypatch):
    """As on a device whose sums depend on chance."""
    audit, rng = audit_of(OFF, made_up_text(80)), np.random.default_rng(0)

    def noisy(honest, logits):
        return honest(logits) + np.float32(1e-3) * rng.random(logits.shape, np.float32)

    plant(monkeypatch, "log_softmax", noisy)
    fails("repeatable", "two scores", audit.excerpts, 1)
