"""CPU kernels and hashes against NumPy in float64, plain Python and MLX's own functions."""

import math
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt_mlx_kl as t


def close(actual, expected, tolerance: float) -> None:
    """Equal within `tolerance` times the largest expected magnitude."""
    actual, expected = np.array(actual, np.float64), np.array(expected, np.float64)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max(initial=0)
    assert error <= tolerance * max(np.abs(expected).max(initial=0), 1e-30), error


def normal(rng, *shape) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32))


# --------------------------------------------------------------------------------------------------
# Elementary functions


@pytest.mark.parametrize(("low", "high", "bound"), [(-50, 50, 5e-5), (-80, 80, 1e-3)])
def test_fast_exp_is_within_its_documented_error(low, high, bound):
    x = np.linspace(low, high, 40_001)[1:-1].astype(np.float32)
    true = np.exp(x.astype(np.float64))
    assert np.abs(np.array(t.fast_exp(mx.array(x))) / true - 1).max() < bound


def test_fast_exp_of_masked_scores_is_exactly_zero():
    x = mx.array([-300.0, -1e3, -1e4, t.MASKED, t.MASKED - 100, t.MASKED + 100])
    assert t.fast_exp(x).tolist() == [0.0] * 6


@pytest.mark.parametrize(("limit", "bound"), [(1.5, 1e-6), (30, 2e-4)])
def test_fast_tanh_is_within_its_documented_error(limit, bound):
    x = np.linspace(-limit, limit, 40_001)[1:-1].astype(np.float32)
    assert np.abs(np.array(t.fast_tanh(mx.array(x))) - np.tanh(x.astype(np.float64))).max() < bound


# --------------------------------------------------------------------------------------------------
# Attention and cross-entropy

SHAPES = [(1, 1, 1, 1, 4), (2, 2, 3, 2, 4), (1, 2, 1, 32, 8), (2, 1, 2, 33, 6), (1, 2, 2, 131, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_attention_equals_softmax_attention(rng, shape):
    batch, heads, _, length, width = shape
    q, k = normal(rng, *shape), normal(rng, batch, heads, length, width)
    v = normal(rng, batch, heads, length, width)
    exact = [np.array(a, np.float64) for a in (q, k, v)]
    scores = np.einsum("bhgtd,bhsd->bhgts", exact[0], exact[1])
    scores[..., np.triu(np.ones((length, length), bool), 1)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhgts,bhsd->bhgtd", p / p.sum(-1, keepdims=True), exact[2])
    close(t.cpu_attention(q, k, v)[0], expected, 2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_attention_has_the_gradients_of_mlx_attention(rng, shape):
    batch, heads, group, length, width = shape
    q, d_out = normal(rng, *shape), normal(rng, *shape)
    k, v = (normal(rng, batch, heads, length, width) for _ in range(2))

    def mlx_attention(q, k, v):
        flat = q.reshape(batch, heads * group, length, width)
        out = mx.fast.scaled_dot_product_attention(flat, k, v, scale=1.0, mask="causal")
        return mx.sum(out.reshape(shape) * d_out)

    ours = mx.grad(lambda *a: mx.sum(t.cpu_attention(*a)[0] * d_out), argnums=(0, 1, 2))(q, k, v)
    for got, expected in zip(ours, mx.grad(mlx_attention, argnums=(0, 1, 2))(q, k, v), strict=True):
        # of a single position, q and k have gradients of exactly 0
        close(got, expected, 5e-5 if length > 1 or expected is v else math.inf)
        assert length > 1 or np.abs(np.array(got) - np.array(expected)).max() < 1e-5


@pytest.mark.parametrize("wide_bias", [True, False])
@pytest.mark.parametrize("cap", [5.0, 30.0])
def test_cpu_cross_entropy_and_its_gradients(rng, wide_bias, cap):
    n, width, vocab = 9, 6, 23
    f, weight = 2 * normal(rng, n, width), normal(rng, vocab, width)
    bias = 2 * normal(rng, n, vocab) if wide_bias else mx.zeros((1, 1))
    y, d_nll = mx.array(rng.integers(0, vocab, n)), normal(rng, n)

    def plain(f, weight, bias):
        logits = cap * mx.tanh((f @ weight.T + bias) / cap)
        return mx.sum(nn.losses.cross_entropy(logits, y) * d_nll)

    def ours(f, weight, bias):
        return mx.sum(t.cpu_cross_entropy(cap)(f, weight, bias, y)[0] * d_nll)

    exact = np.array(f, np.float64) @ np.array(weight, np.float64).T + np.array(bias, np.float64)
    exact = cap * np.tanh(exact / cap)
    nll = np.log(np.exp(exact).sum(-1)) - exact[np.arange(n), np.array(y)]
    # fast_tanh is off by up to 1e-4, which the cap multiplies
    error = np.abs(np.array(t.cpu_cross_entropy(cap)(f, weight, bias, y)[0]) - nll).max()
    assert error < (1e-3 if cap == 5 else 1e-4), error
    which = (0, 1, 2) if wide_bias else (0, 1)
    pairs = zip(mx.grad(ours, which)(f, weight, bias), mx.grad(plain, which)(f, weight, bias),
                strict=True)  # fmt: skip
    for got, expected in pairs:
        close(got, expected, 1e-3 if cap == 5 else 1e-4)


@pytest.mark.parametrize("cap", [1.0, 30.0, 40.0])
@pytest.mark.parametrize("times", [1.0, 4.0, 20.0])
def test_the_cpu_head_caps_logits_of_any_size(cap, times):
    f, weight = mx.array([[times * cap]]), mx.array([[1.0], [-1.0], [0.0]])
    logits = cap * np.tanh(times * np.array([1, -1, 0]))
    expected = np.log(np.exp(logits).sum()) - logits
    head = t.cpu_cross_entropy(cap)
    got = [head(f, weight, mx.zeros((1, 1)), mx.array([y]))[0].item() for y in range(3)]
    assert np.abs(got - expected).max() < 1e-3 * cap, (got, expected)


@pytest.mark.parametrize("engram", [0, 1])
def test_both_paths_of_the_model_give_the_same_loss_and_gradients(monkeypatch, rng, engram):
    model = random_model(ENGRAM_LITE_ENABLED=engram, COMPUTE_DTYPE="float32", XSA_LAST_N=2)
    x, y = (mx.array(rng.integers(0, 50, (3, 37))) for _ in range(2))

    def loss_and_gradients():
        loss, grads = nn.value_and_grad(model, lambda: mx.mean(model.nll(x, y)))()
        return loss, dict(t.tree_flatten(grads))

    ours, our_grads = loss_and_gradients()
    monkeypatch.setattr(t, "on_cpu", lambda: False)
    theirs, their_grads = loss_and_gradients()
    assert abs(ours.item() - theirs.item()) < 2e-5
    assert our_grads.keys() == their_grads.keys()
    for name, expected in their_grads.items():
        close(our_grads[name], expected, 2e-3)


# --------------------------------------------------------------------------------------------------
# Contexts and hashes


def plain_context(row: list[int], bos: int, distance: int) -> list[int]:
    """Input at `distance` before each position; BOS beyond the document's or window's start."""
    out = []
    for at in range(len(row)):
        crossed = distance > at or bos in row[at - distance + 1 : at + 1]
        out.append(bos if crossed else row[at - distance])
    return out


def plain_hash(tokens: tuple[int, ...], size: int, order: int, head: int) -> int:
    multiplier = 0x9E3779B1 * (32 * order + 2 * head + 1) % 2**32
    h = multiplier
    for token in tokens:
        h = (h ^ token) * multiplier % 2**32
        h ^= h >> 15
    return (h >> 16) * size >> 16


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(0, 2), st.integers(1, 7))
def test_document_context_stops_at_bos_and_at_the_window(row, bos, depth):
    rows = [row, row[::-1]]
    context = t.document_context(mx.array(rows), bos, depth)
    assert len(context) == depth
    for distance, got in enumerate(context):
        assert got.tolist() == [plain_context(r, bos, distance) for r in rows]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 65535)] * 3), min_size=1, max_size=8),
    st.sampled_from([1, 2, 3, 37, 1000, 4096, 40961, 65535, 65536]),
    st.integers(1, 6),
    st.integers(0, 15),
)
def test_hash_context_is_the_uint32_formula(keys, size, order, head):
    columns = [mx.array([column]) for column in zip(*keys, strict=True)]
    got = t.hash_context(columns, size, order, head)
    assert got.tolist() == [[plain_hash(key, size, order, head) for key in keys]]
    assert got.max().item() < size


def rows_of(size: int, order: int, head: int) -> np.ndarray:
    """Rows of all pairs of 90 ids that a tokenizer would give to frequent pieces."""
    a, b = (m.reshape(1, -1) for m in np.meshgrid(np.arange(260, 350), np.arange(260, 350)))
    return np.array(t.hash_context([mx.array(a), mx.array(b)], size, order, head))[0].astype(int)


def collisions(*rows: np.ndarray) -> int:
    """Pairs of keys that share a row in every one of the heads."""
    return sum(n * (n - 1) // 2 for n in Counter(zip(*rows, strict=True)).values())


def test_hashes_spread_and_heads_collide_independently():
    size = 97
    first, second = rows_of(size, 2, 0), rows_of(size, 2, 1)
    pairs = len(first) * (len(first) - 1) / 2
    for found, chance in [
        (collisions(first), 1 / size),
        (collisions(second), 1 / size),
        (collisions(first, second), 1 / size**2),
    ]:
        assert abs(found / (pairs * chance) - 1) < 0.05, found
    assert set(first) == set(range(size))


def test_every_table_has_a_hash_of_its_own():
    # ENGRAM_N_HEADS goes to 16; 5 and 6 are BigramHash and SkipGram
    tables = [(order, head) for order in (2, 3) for head in range(16)] + [(5, 0), (6, 0), (6, 1)]
    ids = mx.arange(64)[None]
    owners = {}
    for table in tables:
        owners.setdefault(tuple(t.hash_context([ids], 65536, *table)[0].tolist()), []).append(table)
    shared = [tables for tables in owners.values() if len(tables) > 1]
    assert not shared


@pytest.mark.skipif(t.COMPILER_FAULT != "", reason="needs a compiler")
def test_kernels_are_fused_under_a_gradient(rng, tmp_path):
    """MLX fuses nothing while it traces a gradient, but the graph must hold fused kernels."""
    q, k, v = (mx.array(rng.standard_normal(s).astype(np.float32))
               for s in ((1, 1, 2, 64, 8), (1, 1, 64, 8), (1, 1, 64, 8)))  # fmt: skip
    fused = []

    def loss(q, k, v):
        outs = t.cpu_attention(q, k, v)
        file = tmp_path / "graph.dot"
        mx.export_to_dot(str(file), outs[1])
        fused.append(file.read_text().count("Compiled"))
        return outs[0].sum()

    mx.eval(mx.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v))
    assert fused[0] >= 1
