"""Cheats planted in the script's source: the audit names the condition that each one breaks.

A cheat replaces a line of the script, as an edit of a user would; the edited text is imported as a
module of its own, and that module's own audit runs. A clean script passes: AUDIT_RUNS=20 repeats
that with 20 seeds.
"""

import dataclasses
import hashlib
import importlib.util
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm
from conftest import ROOT, TINY, t, write_shard

VOCAB, BOS = 50, 1
SOURCE = (ROOT / "train_gpt_mlx_kl.py").read_text(encoding="utf-8")
COMPILED = ("code_tokens", "mix", "learn", "fill")  # what Python calls; the rest is inside of these
SEEDS = range(int(os.environ.get("AUDIT_RUNS", "1")))
WORKERS = t.Workers(1)

LOGISTIC, OFF = {"MIXER": "logistic"}, {"MIXER": "off"}
BACKOFF = {"MIXER": "backoff", "NGRAM_ALPHA": "0.25"}
LEARNED = {"MIXER": "backoff", "NGRAM_ALPHA": "auto"}


def planted(folder, edits, kernels=()):
    """Import the script with each old text, found exactly once, replaced by its new one.

    Kernels that the edits leave alone are the script's own, compiled once.
    """
    source = SOURCE
    for old, new in edits:
        assert source.count(old) == 1, f"{source.count(old)} times in the script: {old}"
        source = source.replace(old, new)
    name = f"planted_{folder.name}"
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    for kernel in set(COMPILED) - set(kernels):
        setattr(module, kernel, getattr(t, kernel))
    return module


def facts(module):
    """Tokenizer facts with control pieces, and pieces that start words."""
    control = np.arange(VOCAB) < 4
    size = np.where(control, 0, 1 + np.arange(VOCAB) % 5).astype(np.uint16)
    leading = (np.arange(VOCAB) % 3 == 0) & ~control
    return module.Tokenizer(size, leading, control, BOS, True, "ab" * 32)


def some_text(seed=0, size=300):
    """Tokens of documents, few of them common, so that contexts come back."""
    rng = np.random.default_rng(seed)
    text = np.minimum(rng.geometric(0.25, size) + 3, VOCAB - 1).astype(np.int32)
    text[rng.random(size) < 0.04] = BOS
    text[0] = BOS
    return text


def noisy_model(module, cfg, seed=7):
    """(model, parameters), none of them at its starting value."""
    model, rng = module.GPT(cfg, VOCAB, BOS), np.random.default_rng(seed)
    params = {}
    for name, p in module.tree_flatten(model.parameters()):
        noise = rng.standard_normal(p.shape) * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5)
        params[name] = p + module.mx.array(noise.astype(np.float32))
    return model, params


def knobs(module, **env):
    return module.knobs_from_env({**TINY, "MIXER_MEMORY_MB": "2", **env})[0]


def audit_of(module, env):
    """The audit of an artifact in memory."""
    cfg = knobs(module, **env)
    model, params = noisy_model(module, cfg)
    packed = module.PackedText(
        np.random.default_rng(3).permutation(VOCAB), 0, hashlib.sha256(b"").hexdigest(), b""
    )
    packed = packed if cfg.mixer == "logistic" else None
    artifact = module.Artifact({}, facts(module), params, packed)
    return module.Audit(cfg, artifact, model, WORKERS)


def evaluation_of(module, folder, env, shards=(300,)):
    """An evaluation of an artifact on disk; text is packed in it if its mixer is logistic."""
    cfg, tokens = knobs(module, **env), facts(module)
    _, params = noisy_model(module, cfg)
    packed = honest_mixer(tokens)[1] if cfg.mixer == "logistic" else None
    groups = module.group_parameters(list(params))
    module.write_artifact(folder / "artifact.bin", params, groups, cfg, tokens, packed)
    val = folder / "val"
    val.mkdir()
    for i, size in enumerate(shards):
        write_shard(val / f"text_val_{i:06d}.bin", some_text(i, size))
    return module.Evaluation(cfg, folder / "artifact.bin", val, WORKERS)


def honest_mixer(tokens, room=400):
    """A mixer that has coded the training text, and the code: the training side's."""
    leaf = np.random.default_rng(3).permutation(VOCAB)
    mixer, coder = t.LogisticMixer(tokens, leaf, room + 500, 2), t.Coder()
    mixer.code(some_text(99, room).astype(np.int64), None, coder)
    return mixer, t.PackedText(leaf, room, mixer.read_sha256(), coder.finish())


def fails(condition, check, *args):
    """`check` raises an audit failure that names the condition, whatever module it is from."""
    with pytest.raises(Exception) as caught:
        check(*args)
    error = caught.value
    assert type(error).__name__ == "AuditFailed", repr(error)
    assert (error.args[0], error.status) == (condition, 3), str(error)


# --------------------------------------------------------------------------------------------------
# What an honest script does


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("alpha", ["0", "0.25", "1", "auto"])
@pytest.mark.parametrize("smoothing", ["kneser-ney", "witten-bell", "laplace"])
def test_backoff_passes(alpha, smoothing, seed):
    env = {"MIXER": "backoff", "NGRAM_ALPHA": alpha, "NGRAM_SMOOTHING": smoothing}
    audit_of(t, env).excerpts(some_text(seed), seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("env", [LOGISTIC, OFF, {**LOGISTIC, "EVAL_MODE": "standard"}])
def test_logistic_and_net_alone_pass(env, seed):
    assert "causal in 3, normalised in 3" in audit_of(t, env).excerpts(some_text(seed), seed)


@pytest.mark.parametrize("size", [2, 3, 15, 16, 17, 18, 30])
def test_a_short_text_passes(size):
    for env in (LOGISTIC, BACKOFF, OFF):
        audit_of(t, env).excerpts(some_text(5, size), 0)


@pytest.mark.parametrize("env", [LOGISTIC, BACKOFF, LEARNED, OFF])
@pytest.mark.parametrize("mode", ["sliding", "both"])
def test_a_whole_evaluation_passes(tmp_path, env, mode):
    ours = evaluation_of(t, tmp_path, {**env, "EVAL_MODE": mode}, (200, 57))
    result = ours.run(lambda: ours.message(None), None)
    assert result["audit"] == "pass" and len(result["evals"]) == 1 + (mode == "both")
    assert any("tokens decoded from" in line for line in result["lines"]) == (env is LOGISTIC)
    assert all(e["val_whole"] and e["val_tokens"] == 256 for e in result["evals"])


# --------------------------------------------------------------------------------------------------
# Cheats in the score

SLOT_KEYS = "        context_keys(slot_rows, history, now, words, bos, keys)\n"
SLOT_INPUTS = "            seen = slot_inputs(slots, maps, slot, at, level, levels, x, said)\n"
BIT = "target >> (levels - level - 1) & 1"
ALL_COSTS = "return np.column_stack([net_nats(tokens, logs), nats])"
NET_COSTS = "return np.repeat(net_nats(tokens, logs)[:, None], 3, axis=1)"
SCORE_CHUNK = "            yield first, scorer.score(text[first + 1 : first + 1 + len(logs)], logs)"
ASK = "        p, trust = ngram_probability(state, tokens[i], vocab, rule, places)\n"
LEARN = "        if learns:\n            learn(state, tokens[i], vocab, bos, rule[4], places)\n"
ROOM = ("new_mixer(tokens, leaf, capacity + 1,", "new_mixer(tokens, leaf, 9 * capacity,")
SUM = "p = mass / (context.total - discount * context.kinds + rest)"
COUNT = "count = nodes[pair].count if pair else 0"
LATER_ROWS = "yield first, logs[: end - first]"
WINDOW = "yield first + stride - seq_len, first, min(first + stride, targets)"

CHEATS = {
    # The key of a hashed context holds the token that is to be predicted.
    "target in the hash key, logistic": (
        LOGISTIC, [(SLOT_KEYS, f"{SLOT_KEYS}        keys[0] = mix_hash(keys[0], tokens[i])\n")],
        ["code_tokens"], "normalisation"),
    "target in the key, backoff": (
        BACKOFF, [(COUNT, "count = context.total if pair and nodes[pair].count else 0")],
        ["mix"], "normalisation"),
    # The counts' sum is another table's.
    "denominator of another table, backoff": (
        BACKOFF, [(SUM, "p = mass / (nodes[pair].count + 1 - discount * context.kinds + rest)")],
        ["mix"], "normalisation"),
    "denominator off by one, backoff": (
        BACKOFF, [(SUM, SUM.replace("context.total", "context.total + 1"))],
        ["mix"], "normalisation"),
    # The better expert of each token, chosen when the token is known.
    "lower of two losses, logistic": (
        LOGISTIC, [(ALL_COSTS, "out = np.column_stack([net_nats(tokens, logs), nats])\n        "
                    "out[:, 2] = out.min(axis=1)\n        return out")],
        [], "normalisation"),
    "lower of two losses, net": (
        OFF, [(NET_COSTS, NET_COSTS.replace("net_nats(tokens, logs)",
               "np.minimum(net_nats(tokens, logs), np.log(logs.shape[1]))"))],
        [], "normalisation"),
    "lower of two losses, backoff": (
        BACKOFF, [("mixed = (1.0 - alpha) * math.exp(net[i]) + alpha * p\n",
                   "mixed = max(math.exp(net[i]), p)\n")], ["mix"], "normalisation"),
    # The weight is a function of the token that is to be predicted.
    "gate sees the target, backoff": (
        LEARNED, [("odds, level = top[i] -", "odds, level = net[i] -")], ["mix"], "normalisation"),
    # The net's part in the mix depends on whether it is right.
    "gate sees the target, logistic": (
        LOGISTIC, [("                from_net = net_logit(mass, node)\n",
                    "                from_net = net_logit(mass, node)\n"
                    f"                from_net *= (from_net > 0) == ({BIT})\n")],
        ["code_tokens"], "normalisation"),
    # What was counted is asked.
    "update before scoring, logistic": (
        LOGISTIC,
        [(SLOT_INPUTS, f"            learn_slots(slots, slot, at, {BIT}, 0)\n{SLOT_INPUTS}")],
        ["code_tokens"], "normalisation"),
    "update before scoring, backoff": (
        BACKOFF, [(LEARN, ""), (ASK, LEARN[18:].replace("    learn", "learn", 1) + ASK)],
        ["mix"], "normalisation"),
    # The chunk is counted before it is scored.
    "one chunk early, logistic": (
        LOGISTIC, [(SCORE_CHUNK, "            scorer.score(text[first + 1 : first + 1 + "
                    f"len(logs)], logs)\n{SCORE_CHUNK}"), ROOM], [], "causality"),
    "one token early, logistic": (
        LOGISTIC, [(SCORE_CHUNK, "            scorer.begin(int(text[min(first + len(logs) + 1, "
                    f"len(text) - 1)]))\n{SCORE_CHUNK}"), ROOM], [], "causality"),
    # The tail again, in a full window.
    "tail scored twice": (
        OFF, [(WINDOW, "end = min(first + stride, targets)\n        yield end - seq_len, end - "
               "stride, end")], [], "coverage"),
    "tail left out": (
        OFF, [(WINDOW, f"if first + stride <= targets:\n            {WINDOW}")], [], "coverage"),
    # The net looks ahead.
    "attention sees one position ahead": (
        OFF, [("future = np.arange(b)[None, :] > np.arange(a, b)[:, None]",
               "future = np.arange(b)[None, :] > np.arange(a, b)[:, None] + 1")], [], "causality"),
    "attention without a mask": (
        OFF, [("    return cpu_attention(grouped, k, v)[0].reshape(q.shape)",
               "    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)")],
        [], "causality"),
    "smear looks ahead": (
        OFF, [("before = mx.pad(x, [(0, 0), (1, 0), (0, 0)])[:, :-1] * inside",
               "before = mx.pad(x, [(0, 0), (0, 1), (0, 0)])[:, 1:] * inside")], [], "causality"),
    "hashed contexts look ahead": (
        OFF, [("before = mx.pad(x, [(0, 0), (k, 0)])[:, :length]",
               "before = mx.pad(x, [(0, 0), (0, k)])[:, k:]")], [], "causality"),
    # Windows scored side by side hear each other: the next one begins a stride later.
    "a window hears the next one": (
        OFF, [("        return rms_norm(x)\n\n    def head_inputs",
               "        return rms_norm(x + 0.1 * mx.roll(x, -1, axis=0))\n\n    def head_inputs")],
        [], "causality"),
    # Rows that sum to more than 1, but not in the first window.
    "later windows claim more, net": (
        OFF, [(LATER_ROWS, f"{LATER_ROWS} + 0.5")], [], "normalisation"),
    "later windows claim more, logistic": (
        LOGISTIC, [(LATER_ROWS, f"{LATER_ROWS} + 0.5")], [], "normalisation"),
    "inputs shifted by one": (
        OFF, [("rows = np.stack([padded[s : s + seq_len] for s, _, _ in group])",
               "rows = np.stack([padded[s + 1 : s + 1 + seq_len] for s, _, _ in group])")],
        [], "causality"),
    "statistics of the whole window": (
        OFF, [("        return rms_norm(x)\n\n    def trunk",
               "        return rms_norm(x - x.mean(axis=1, keepdims=True))\n\n    def trunk")],
        [], "causality"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_is_caught(tmp_path, name):
    env, edits, kernels, condition = CHEATS[name]
    module = planted(tmp_path, edits, kernels)
    for seed in range(3):  # not by luck
        fails(condition, audit_of(module, env).excerpts, some_text(seed), seed)


@pytest.mark.parametrize("name", ["tail scored twice", "tail left out"])
def test_what_is_not_scored_once_is_no_score(tmp_path, name):
    module = planted(tmp_path, CHEATS[name][1])
    ours = evaluation_of(module, tmp_path, OFF)
    args = ours.artifact.params, "sliding", 3, module.ContextModel()
    fails("coverage", ours.validation.run, *args)


# --------------------------------------------------------------------------------------------------
# Unpaid text

PRIME = (
    "            unpack(scorer, packed, label)\n"  # its mixer has room for the text to be scored
)
MADE = "        scorer = new_context_model(self.cfg, self.artifact.tokens, leaf, capacity)\n"


def test_unpaid_text_is_caught(tmp_path):
    module = planted(tmp_path, [(PRIME, f"{PRIME}            scorer.begin(7)\n")])
    fails("paid text", evaluation_of(module, tmp_path, LOGISTIC).primed, "")


def test_text_that_is_paid_but_not_learned_is_caught(tmp_path):
    module = planted(tmp_path, [(PRIME, "            pass\n")])
    fails("paid text", evaluation_of(module, tmp_path, LOGISTIC).primed, "")


def test_unpaid_text_that_hides_fails_the_message(tmp_path):
    """It counts nothing in its history; but the side that trained encodes without it."""
    hidden = "            scorer.begin(7)\n            scorer.state.now[0] -= 1\n"
    module = planted(tmp_path, [(PRIME, PRIME + hidden)])
    ours = evaluation_of(module, tmp_path, LOGISTIC)
    mixer, _ = honest_mixer(ours.artifact.tokens)
    fails("message", ours.run, lambda: ours.message(mixer), None)


def test_unpaid_counts_of_backoff_are_caught(tmp_path):
    unpaid = "        for v in (5, 6, 7):\n            getattr(scorer, 'begin', print)(v)\n"
    module = planted(tmp_path, [(MADE, MADE + unpaid)])
    fails("paid text", evaluation_of(module, tmp_path, BACKOFF).primed, "")


# --------------------------------------------------------------------------------------------------
# The message


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """(message, decoded tokens, their nats, the text) of an honest evaluation."""
    ours = evaluation_of(t, tmp_path_factory.mktemp("message"), LOGISTIC)
    message, text = ours.message(None), ours.validation.text
    args = message, ours.primed(""), ours.model, int(text[0]), 16, WORKERS
    return message, *t.decode_message(*args), text


def test_message_is_the_text(decoded):
    message, tokens, _, text = decoded
    assert message.tokens == 16 and (tokens == text[1:17]).all()
    assert "16 tokens decoded" in t.check_message(*decoded)


def test_messages_that_do_not_hold_are_caught(decoded):
    message, tokens, nats, text = decoded
    other = tokens.copy()
    other[9] += 1
    fails("message", t.check_message, message, other, nats, text)
    fails("message", t.check_message, message, tokens, nats / 2, text)
    fails("message", t.check_message, message._replace(bits=message.bits / 2), *decoded[1:])
    longer = message._replace(code=message.code + bytes(9))
    fails("message", t.check_message, longer, *decoded[1:])


def test_a_claim_below_the_code_is_caught(tmp_path):
    honest = "cost[h] -= math.log((p[h] if bit else 65536 - p[h]) / 65536)"
    module = planted(tmp_path, [(honest, honest.replace("-= ", "-= 0.7 * "))], ["code_tokens"])
    ours = evaluation_of(module, tmp_path, LOGISTIC)
    message, text = ours.message(None), ours.validation.text
    args = message, ours.primed(""), ours.model, int(text[0]), 16, WORKERS
    fails("message", module.check_message, message, *module.decode_message(*args), text)
    fails("normalisation", audit_of(module, LOGISTIC).excerpts, text, 0)


# --------------------------------------------------------------------------------------------------
# Bytes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """(a trained tokenizer's path, text with spaces, byte pieces and documents)."""
    spm = pytest.importorskip("sentencepiece")
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


def byte_audit(module, tokenizer):
    path, text = tokenizer
    artifact = module.Artifact({}, module.load_tokenizer(path), {}, None)
    return module.Audit(None, artifact, None, None).byte_count(text, path)


def test_bytes_pass(tokenizer):
    assert f"first {len(tokenizer[1])} tokens" in byte_audit(t, tokenizer)


def test_bytes_pass_wherever_the_text_is_cut(tokenizer, monkeypatch):
    """Also within a character of several byte pieces, which does not decode."""
    for cut in range(1, 60):
        monkeypatch.setattr(t, "BYTES_CHECKED", cut)
        assert "bytes, as the first" in byte_audit(t, tokenizer)


def test_another_tokenizer_is_refused(tokenizer):
    path, text = tokenizer
    tokens = dataclasses.replace(t.load_tokenizer(path), sha256="0" * 64)
    with pytest.raises(t.UserError, match="TOKENIZER_PATH"):
        t.Audit(None, t.Artifact({}, tokens, {}, None), None, None).byte_count(text, path)


LENGTH = 'len(p.replace("\\u2581", " ").encode())'
BYTE_CHEATS = {
    "spaces twice": (LENGTH, f'{LENGTH} + p.count("\\u2581")'),
    "spaces at three bytes": (LENGTH, "len(p.encode())"),
    "byte pieces at three bytes": ("else 1 if model.is_byte(i) else", "else"),
    "byte pieces at six bytes": ("1 if model.is_byte(i)", "6 if model.is_byte(i)"),
    "control pieces have bytes": ("        0 if control[i] else 1 if", "        1 if"),
    "dummy prefix counted": (
        "            count -= self.leading[current] & self.control[previous]", "            pass"),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTE_CHEATS)
def test_wrong_bytes_are_caught(tmp_path, tokenizer, name):
    fails("bytes", byte_audit, planted(tmp_path, [BYTE_CHEATS[name]]), tokenizer)


# --------------------------------------------------------------------------------------------------
# The whole text


def test_a_part_called_whole_is_caught(tmp_path):
    module = planted(tmp_path, [("    return text, len(text) == total", "    return text, True")])
    ours = evaluation_of(module, tmp_path, {**OFF, "VAL_MAX_TOKENS": "120"})
    fails("whole text", ours.validation.check_whole)


def test_a_missing_shard_is_caught(tmp_path):
    old = "        shard = open_shard(path)[: left + 1]"
    module = planted(
        tmp_path, [(old, old.replace("[: left + 1]", "[:100]")), ("len(text) == total", "True")]
    )
    fails("whole text", evaluation_of(module, tmp_path, OFF).validation.check_whole)


def test_shards_that_are_not_looked_for_are_caught(tmp_path):
    old = '        paths = find_shards(self.folder, "val")'
    module = planted(tmp_path, [(old, f"{old}[:1]")])
    ours = evaluation_of(module, tmp_path, OFF, (200, 100))
    fails("whole text", ours.validation.check_whole)


@pytest.mark.parametrize("limit", [0, 120])
def test_honest_labels_pass(tmp_path, limit):
    ours = evaluation_of(t, tmp_path, {**OFF, "VAL_MAX_TOKENS": str(limit)}, (200, 100))
    ours.validation.check_whole()
    assert ours.validation.whole == (limit == 0)
    other = dataclasses.replace(ours.validation)
    other.whole = not other.whole
    fails("whole text", other.check_whole)


@pytest.mark.parametrize("bos", [1, -1])
def test_bytes_are_counted_with_and_without_bos(tmp_path, bos):
    words = [f"word{i % 7} and {i % 5} more" for i in range(300)]
    settings = {"model_prefix": str(tmp_path / "m"), "vocab_size": 40, "bos_id": bos}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_type="bpe", minloglevel=2, **settings
    )
    path = tmp_path / "m.model"
    model, tokens = spm.SentencePieceProcessor(model_file=str(path)), t.load_tokenizer(path)
    assert tokens.bos == bos
    ids = np.array([bos] * (bos >= 0) + model.encode(" ".join(words[:9])), np.int32)
    audit = t.Audit(knobs(t, **OFF), SimpleNamespace(tokens=tokens), None, None)
    assert audit.byte_count(ids, path).startswith(f"{len(' '.join(words[:9]))} bytes")
