"""The model against a forward pass in NumPy float64, and what its outputs may depend on."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import log_probs, random_model, tiny_knobs
from test_kernels import plain_context, plain_hash

import train_gpt_mlx_kl as t

BOS, VOCAB = 1, 50
SETTINGS = {
    "engram": {"NUM_LAYERS": 5, "XSA_LAST_N": 2, "ROPE_DIMS": 2},
    "bigram": {"ENGRAM_LITE_ENABLED": 0, "MLP_LEAK": 0, "LOGIT_SOFTCAP": 8, "ROPE_DIMS": 0},
    "plain": {
        "NUM_LAYERS": 2,
        "ENGRAM_HASH_SIZE": 0,
        "SKIPGRAM_HASH_SIZE": 0,
        "USE_SMEARGATE": 0,
        "LN_SCALE_ENABLED": 0,
        "XSA_LAST_N": 0,
        "NUM_KV_HEADS": 4,
    },
}
features = pytest.mark.parametrize("feature", SETTINGS)


def tokens(rng, batch=3, length=21) -> np.ndarray:
    """Ids of documents of a few tokens each."""
    x = rng.integers(2, VOCAB, (batch, length))
    x[rng.random(x.shape) < 0.15] = BOS
    return x


# --------------------------------------------------------------------------------------------------
# The forward pass, one position of one head at a time


def norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rotate(x, dims, base):
    """RoPE on the first `dims` of a head: dimension 2i turns with dimension 2i + 1."""
    half = dims // 2
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    out, (a, b) = x.copy(), (x[:, 0:dims:2], x[:, 1:dims:2])
    out[:, 0:dims:2] = a * np.cos(angle) - b * np.sin(angle)
    out[:, 1:dims:2] = a * np.sin(angle) + b * np.cos(angle)
    return out


def attention(x, p, cfg, xsa):
    length, head = len(x), cfg.model_dim // cfg.num_heads
    dims, outs = cfg.rope_dims or head, []
    limits = -80 / head**0.5, 80 / head**0.5
    q, k, v = (
        (x @ p[f"c_{n}.weight"].T).reshape(length, -1, head).transpose(1, 0, 2) for n in "qkv"
    )
    for h in range(cfg.num_heads):
        kv = h // (cfg.num_heads // cfg.num_kv_heads)
        queries = rotate(norm(q[h]), dims, cfg.rope_base) * np.clip(p["q_gain"][h], *limits)
        scores = queries @ rotate(norm(k[kv]), dims, cfg.rope_base).T / math.sqrt(head)
        out = np.zeros((length, head))
        for i in range(length):
            e = np.exp(scores[i, : i + 1])
            out[i] = e @ v[kv][: i + 1] / e.sum()
            if xsa:
                own = v[kv][i] / np.sqrt((v[kv][i] ** 2).sum() + 1e-6)
                out[i] -= (out[i] @ own) * own
        outs.append(out)
    return np.concatenate(outs, axis=-1) @ p["proj.weight"].T


def hashed(row, keys, size, order, head):
    """Rows of a table: keys are distances from the predicted token, oldest first."""
    columns = [plain_context(row, BOS, distance - 1) for distance in keys]
    return [plain_hash(key, size, order, head) for key in zip(*columns, strict=True)]


def reference_logits(p, cfg, row):
    """Soft-capped logits after each token of `row`: (T, V) float64."""
    x = p["tok_emb"][row]
    if cfg.use_smeargate:
        before = np.vstack([np.zeros(cfg.model_dim), x[:-1]])
        before[np.array(row) == BOS] = 0
        x = x + sigmoid(p["smear_gate"]) * before
    x = x0 = norm(x)
    half, kept = cfg.num_layers // 2, []
    for i in range(cfg.num_layers):
        b = {
            n.removeprefix(f"blocks.{i}."): a for n, a in p.items() if n.startswith(f"blocks.{i}.")
        }
        attn = {n.removeprefix("attn."): a for n, a in b.items()}
        if i >= half and kept:
            x = x + p["skips"][i - half] * kept.pop()
        scale = 1 / math.sqrt(i + 1) if cfg.ln_scale_enabled else 1
        x = b["resid_mix"][0] * x + b["resid_mix"][1] * x0
        xsa = i >= cfg.num_layers - cfg.xsa_last_n
        x = x + b["attn_scale"] * attention(norm(x) * scale, attn, cfg, xsa)
        hidden = norm(x) * scale @ b["mlp.fc.weight"].T
        hidden = np.where(hidden > 0, hidden, cfg.mlp_leak * hidden) ** 2
        x = x + b["mlp_scale"] * (hidden @ b["mlp.proj.weight"].T)
        if i < half:
            kept.append(x)
    logits = norm(x) @ p["tok_emb"].T
    if cfg.engram_lite_enabled and cfg.engram_hash_size:
        tables = p["engram.tables"].reshape(2, cfg.engram_n_heads, cfg.engram_hash_size, -1)
        for order, keys in ((2, (2, 1)), (3, (3, 2, 1))):
            for head in range(cfg.engram_n_heads):
                rows = hashed(row, keys, cfg.engram_hash_size, order, head)
                e = tables[order - 2, head][rows] / cfg.engram_n_heads
                logits += sigmoid(p["engram.gates"][order - 2]) * e @ p["engram.proj"].T
    elif cfg.bigram_hash_size and not cfg.engram_lite_enabled:
        rows = hashed(row, (2, 1), cfg.bigram_hash_size, 5, 0)
        logits += 2 * sigmoid(p["bigram.gates"][0]) * p["bigram.table"][rows]
    if cfg.skipgram_hash_size:
        for i, keys in enumerate(((3, 1), (5, 1))):
            rows = hashed(row, keys, cfg.skipgram_hash_size, 6, i)
            logits += 2 * sigmoid(p["skipgram.gates"][i]) * p["skipgram.table"][rows]
    return cfg.logit_softcap * np.tanh(logits / cfg.logit_softcap)


@pytest.mark.parametrize("cpu", [True, False])
@features
def test_forward_pass_equals_numpy(monkeypatch, rng, feature, cpu):
    monkeypatch.setattr(t, "on_cpu", lambda: cpu)
    env = {**SETTINGS[feature], "COMPUTE_DTYPE": "float32"}
    cfg, model = tiny_knobs(**env), random_model(VOCAB, BOS, **env)
    x, y = tokens(rng), tokens(rng)
    model.blocks[0].attn.q_gain = mx.array([1.0, 60.0, -60.0, 2.0])  # two beyond the limit
    params = {n: np.array(a, np.float64) for n, a in t.tree_flatten(model.parameters())}
    got = np.array(log_probs(model, mx.array(x), x.shape[1]))
    nll = np.array(model.nll(mx.array(x), mx.array(y)))
    for i, row in enumerate(x.tolist()):
        logits = reference_logits(params, cfg, row)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert np.abs(got[i] - expected).max() < 1e-4
        assert np.abs(nll[i] + expected[np.arange(len(row)), y[i]]).max() < 1e-4


# --------------------------------------------------------------------------------------------------
# What an output may depend on


@features
@pytest.mark.parametrize("at", [0, 7, 19])
def test_outputs_do_not_depend_on_later_tokens(rng, feature, at):
    model = random_model(VOCAB, BOS, **SETTINGS[feature])
    x, y = tokens(rng), tokens(rng)
    later_x, later_y = x.copy(), y.copy()
    later_x[:, at + 1 :], later_y[:, at + 1 :] = BOS, 2
    for a, b in [
        (model.nll(mx.array(x), mx.array(y)), model.nll(mx.array(later_x), mx.array(later_y))),
        (log_probs(model, mx.array(x), 21), log_probs(model, mx.array(later_x), 21)),
    ]:
        a, b = np.array(a), np.array(b)
        assert (a[:, : at + 1] == b[:, : at + 1]).all()
        assert (a[:, at + 1 :] != b[:, at + 1 :]).any()


@features
def test_only_attention_looks_across_bos(rng, feature):
    model = random_model(VOCAB, BOS, **SETTINGS[feature])
    x = rng.integers(2, VOCAB, (2, 21))
    x[:, 9] = BOS
    other = x.copy()
    other[:, :9] = rng.integers(2, VOCAB, (2, 9))

    def after_bos(x):
        return np.array(log_probs(model, mx.array(x), 21))[:, 9:]

    assert (after_bos(x) != after_bos(other)).any()
    for block in model.blocks:
        block.attn.proj.weight = mx.zeros_like(block.attn.proj.weight)
    assert (after_bos(x) == after_bos(other)).all()


def test_context_before_the_window_reads_as_bos(rng):
    model = random_model(VOCAB, BOS, USE_SMEARGATE=0)
    for block in model.blocks:
        block.attn.proj.weight = mx.zeros_like(block.attn.proj.weight)
    x = rng.integers(2, VOCAB, (1, 12))
    x[0, 0] = BOS
    whole, cut = log_probs(model, mx.array(x), 11), log_probs(model, mx.array(x[:, 1:]), 11)
    assert np.abs(np.array(whole) - np.array(cut)).max() < 1e-5


# --------------------------------------------------------------------------------------------------
# Distributions


@pytest.mark.parametrize("cpu", [True, False])
@features
def test_log_probs_are_distributions_and_agree_with_nll(monkeypatch, rng, feature, cpu):
    monkeypatch.setattr(t, "on_cpu", lambda: cpu)
    model = random_model(VOCAB, BOS, COMPUTE_DTYPE="float32", **SETTINGS[feature])
    x, y = mx.array(tokens(rng)), mx.array(tokens(rng))
    logs = log_probs(model, x, 21)
    assert logs.dtype == mx.float32
    assert np.abs(np.exp(np.array(logs, np.float64)).sum(-1) - 1).max() < 1e-5
    picked = mx.take_along_axis(logs, y[..., None], axis=-1)[..., 0]
    assert mx.abs(picked + model.nll(x, y)).max().item() < 5e-5
    for last in (1, 5):
        assert mx.abs(log_probs(model, x, last) - logs[:, -last:]).max().item() < 1e-5


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("cap", [30, 40])
def test_confident_log_probs_are_distributions(cap, sign):
    # One logit at the cap, or all others above it: the approximate exp() and the logarithm must
    # fit each other there, or the probabilities of the score do not sum to 1.
    model = random_model(VOCAB, BOS, LOGIT_SOFTCAP=cap)
    column = np.zeros(model.skipgram.table.shape, np.float32)
    column[:, 0] = sign * 4 * cap
    model.skipgram.table, model.skipgram.gates = mx.array(column), mx.array([0.0, -9.0])
    logs = np.array(log_probs(model, mx.array([[BOS, 2, 3]]), 3), np.float64)
    assert (logs[..., 0] > -1e-3 if sign > 0 else logs[..., 0] < -cap).all()
    assert np.abs(np.exp(logs).sum(-1) - 1).max() < 1e-4


@pytest.mark.parametrize("chunk", [1, 7, 63, 1000])
@pytest.mark.parametrize("feature", ["engram", "plain"])
def test_logit_chunks_change_nothing(rng, feature, chunk):
    x, y = mx.array(tokens(rng)), mx.array(tokens(rng))

    def losses(chunk):
        model = random_model(VOCAB, BOS, LOGIT_CHUNK_TOKENS=chunk, **SETTINGS[feature])
        nll = model.nll(x, y)
        grads = nn.value_and_grad(model, lambda: mx.mean(model.nll(x, y)))()[1]
        return nll, dict(t.tree_flatten(grads))

    (whole, whole_grads), (pieces, grads) = losses(0), losses(chunk)
    assert mx.abs(whole - pieces).max().item() < 1e-5
    for name, g in grads.items():
        assert mx.abs(g - whole_grads[name]).max().item() < 1e-5, name


# --------------------------------------------------------------------------------------------------
# Starting values


@pytest.mark.parametrize("orthogonal", [0, 1])
def test_starting_values(orthogonal):
    cfg = tiny_knobs(
        USE_ORTHO_INIT=orthogonal, MODEL_DIM=64, MLP_MULT=3, TIED_EMBED_INIT_STD=0.1, QK_GAIN_INIT=2
    )
    params = dict(t.tree_flatten(t.GPT(cfg, 512, BOS).parameters()))
    for name, p in params.items():
        w = np.array(p, np.float64)
        if name.endswith("proj.weight") or name in ("engram.proj", "skipgram.table"):
            assert not w.any(), name
        elif name.endswith(".weight"):
            rows, columns = w.shape
            small = w @ w.T if rows <= columns else w.T @ w
            if orthogonal:
                assert np.abs(small - np.eye(min(rows, columns))).max() < 1e-5, name
            else:
                assert abs(w.std() * math.sqrt(3 * columns) - 1) < 0.05, name
    assert abs(np.array(params["tok_emb"]).std() - 0.1) < 0.002
    assert np.allclose(sigmoid(np.array(params["engram.gates"])), [0.1192, 0.0474], atol=1e-4)
    assert (np.array(params["blocks.0.attn.q_gain"]) == 2).all()


def test_the_seed_decides_the_starting_values():
    first, same, other = (
        dict(t.tree_flatten(t.GPT(tiny_knobs(SEED=seed), VOCAB, BOS).parameters()))
        for seed in (1, 1, 2)
    )
    assert all((first[n] == same[n]).all().item() for n in first)
    assert not (first["tok_emb"] == other["tok_emb"]).any().item()
