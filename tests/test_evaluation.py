"""Every target once, with enough context, by the net's own distribution; one BPB formula."""

import itertools
import math
import time

import numpy as np
import pytest
from conftest import log_probs, t, tiny_knobs
from hypothesis import given, settings
from hypothesis import strategies as st

mx = t.mx
VOCAB, BOS = 40, 1


def silent(done, total, bpb):
    """A progress that shows nothing."""


def net_costs(stream, text):
    """The stage of MIXER=off."""
    return t.costs(iter(stream), text, t.ContextModel())


def facts(seed=0):
    """Tokenizer facts in which every kind of piece occurs."""
    rng = np.random.default_rng(seed)
    control = np.arange(VOCAB) < 4
    size = np.where(control, 0, rng.integers(1, 7, VOCAB)).astype(np.uint16)
    return t.Tokenizer(size, (rng.random(VOCAB) < 0.4) & ~control, control, BOS, True, "")


# --------------------------------------------------------------------------------------------------
# Windows

shapes = st.integers(2, 90).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 700), shapes)
def test_windows_score_each_target_once_in_order(targets, shape):
    seq_len, stride = shape
    scored = []
    for start, first, end in t.windows(targets, seq_len, stride):
        assert 0 <= start <= first < end <= min(start + seq_len, targets)
        scored += range(first, end)
        for target in range(first, end):  # input `target` is its last context token
            assert target - start + 1 >= min(seq_len - stride, target + 1)
    assert scored == list(range(targets))


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(2, 50))
def test_stride_of_a_window_is_the_standard_evaluation(targets, seq_len):
    expected = [(a, a, min(a + seq_len, targets)) for a in range(0, targets, seq_len)]
    assert list(t.windows(targets, seq_len, seq_len)) == expected


# --------------------------------------------------------------------------------------------------
# The stream


class Counting(t.Workers):
    """Workers that note the rows of every batch."""

    def __init__(self, count=1):
        super().__init__(count)
        self.rows = []

    def map(self, build, jobs, eager=True):
        self.rows.append(sum(len(job[0]) for job in jobs))
        return super().map(build, jobs, eager)


@pytest.fixture(scope="module")
def net():
    """(model, weights) with every tensor noisy, so that each part of the net matters."""
    model = t.GPT(tiny_knobs(COMPUTE_DTYPE="float32"), VOCAB, BOS)
    params = dict(t.tree_flatten(model.parameters()))
    keys = mx.random.split(mx.random.key(2), len(params))
    params = {
        n: p + 0.3 * mx.random.normal(p.shape, key=k)
        for (n, p), k in zip(params.items(), keys, strict=True)
    }
    return model, params


@pytest.fixture(scope="module")
def text():
    """Random tokens with documents of a few tokens to a few windows."""
    rng = np.random.default_rng(4)
    text = rng.integers(4, VOCAB, 150).astype(np.int32)
    text[[0, 1, 9, 30, 31, 70, 148]] = BOS
    return text


def stream_of(net, text, shape, workers=None):
    return t.net_stream(*net, text, shape, workers or t.Workers(1))


def slow_log_probs(net, text, seq_len, stride):
    """Each target by a forward pass of its own over just its context: (n - 1, V)."""
    model, params = net
    model.update(t.tree_unflatten(list(params.items())))
    rows = []
    for target in range(len(text) - 1):
        behind = target - seq_len
        start = 0 if behind < 0 else (behind // stride + 1) * stride
        logits = log_probs(model, mx.array(text[None, start : target + 1]), 1)
        rows.append(np.array(logits)[0, 0])
    return np.stack(rows)


@pytest.mark.parametrize(
    "length, seq_len, stride, batch, workers",
    [
        (150, 16, 8, 3, 1),
        (150, 16, 16, 4, 2),
        (150, 16, 5, 100, 3),
        (83, 32, 1, 7, 1),
        (34, 33, 2, 2, 2),
        (33, 32, 8, 2, 1),
        (10, 16, 8, 3, 1),
        (10, 16, 16, 3, 2),
        (2, 16, 8, 3, 1),
        (2, 16, 16, 3, 1),
    ],
)
def test_stream_is_the_slow_forward_pass(net, text, length, seq_len, stride, batch, workers):
    text = text[:length]
    with t.Workers(workers) as several:
        parts = list(stream_of(net, text, (seq_len, stride, batch), several))
    assert [first for first, _ in parts] == np.cumsum([0] + [len(p) for _, p in parts])[
        :-1
    ].tolist()
    got = np.concatenate([logs for _, logs in parts])
    expected = slow_log_probs(net, text, seq_len, stride)
    np.testing.assert_allclose(np.exp(got.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_a_token_moves_nothing_before_it(net, text):
    """Bit for bit: a token's distribution depends neither on it nor on any later one."""
    changed = text.copy()
    changed[60:] = (changed[60:] + 7) % VOCAB
    one, two = (
        np.concatenate([logs for _, logs in stream_of(net, x, (16, 8, 3))]) for x in (text, changed)
    )
    assert (one[:60] == two[:60]).all()  # row i is the distribution of token i + 1
    assert (one[60] != two[60]).any()


@pytest.mark.parametrize("length", [150, 10])
def test_a_decoder_gets_the_rows_of_the_encoder(net, text, length):
    """Bit for bit: the first window with its tokens known one after the other."""
    text = text[:length]
    for batch, workers in ((1, 1), (3, 1), (100, 3)):
        with t.Workers(workers) as several:
            first, logs = next(stream_of(net, text, (16, 8, batch), several))
        assert first == 0 and len(logs) == min(16, length - 1)
        inputs = np.full(16, text[0], np.int32)
        for i in range(len(logs)):
            inputs[i] = text[i]
            assert (t.first_window(net[0], inputs, t.Workers(1))[i] == logs[i]).all()


@pytest.mark.parametrize("length", [400, 4000])
def test_stream_is_lazy(net, length):
    """An item costs at most one batch, and no part outgrows a window, however long the text."""
    text = np.random.default_rng(0).integers(4, VOCAB, length).astype(np.int32)
    workers = Counting()
    stream = stream_of(net, text, (16, 8, 3), workers)
    done, last = 0, 0
    for _ in range(12):
        first, logs = next(stream)
        assert first == done and len(logs) <= 16
        assert len(workers.rows) <= last + 1 and max(workers.rows) <= 3
        done, last = done + len(logs), len(workers.rows)
    assert last <= 1 + math.ceil(11 / 3)
    assert workers.rows[0] == 1 and set(workers.rows[1:]) == {3}  # the first window is alone


# --------------------------------------------------------------------------------------------------
# The score


def made_up_stream(text, seed=1):
    """([(first, logs)], all of them in one array): distributions in pieces of varying length."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((len(text) - 1, VOCAB)).astype(np.float32)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    cuts = [0, 1, 20, 21, 60, len(logs)]
    return [(a, logs[a:b]) for a, b in itertools.pairwise(cuts)], logs


def numpy_score(text, tokens, logs):
    """(nats per token, bits per byte, bytes), token by token in Python."""
    nats, size = 0.0, 0
    for i in range(1, len(text)):
        before, token = text[i - 1], text[i]
        nats -= float(logs[i - 1, token])
        stripped = tokens.dummy_prefix and tokens.leading[token] and tokens.control[before]
        size += int(tokens.piece_bytes[token]) - int(stripped)
    return nats / (len(text) - 1), nats / size / math.log(2), size


def test_score_equals_the_formula(text):
    tokens = facts()
    parts, logs = made_up_stream(text)
    seen = []
    got = t.score(net_costs(parts, text), text, tokens, lambda *args: seen.append(args))
    loss, bpb, size = numpy_score(text, tokens, logs)
    assert math.isclose(got["val_loss"], loss, rel_tol=1e-12)
    assert math.isclose(got["val_bpb"], bpb, rel_tol=1e-12)
    assert got["val_bpb_net"] == got["val_bpb_context"] == got["val_bpb"]
    assert (got["val_tokens"], got["val_bytes"]) == (149, size)
    assert [done for done, _, _ in seen] == [1, 20, 21, 60, 149]
    assert seen[-1] == (149, 149, f"bpb {got['val_bpb']:.4f}, ")
    # Bits per byte of the uniform distribution need no net to be known.
    uniform = [(0, np.full((149, VOCAB), -math.log(VOCAB)))]
    got = t.score(net_costs(uniform, text), text, tokens, silent)
    assert math.isclose(got["val_bpb"], 149 * math.log2(VOCAB) / size)


class Learner:
    """A scorer whose costs name what it has seen: columns net, tokens so far, their sum."""

    def __init__(self):
        self.seen = []

    def score(self, tokens, logs):
        net, out = t.ContextModel().score(tokens, logs)[:, 0], []
        for token, cost in zip(tokens.tolist(), net, strict=True):
            out.append([cost, len(self.seen), sum(self.seen)])
            self.seen.append(token)
        return np.array(out)


def test_each_column_is_a_score_of_its_own(text):
    parts, logs = made_up_stream(text)
    scorer, tokens = Learner(), facts()
    got = t.score(t.costs(iter(parts), text, scorer), text, tokens, silent)
    assert scorer.seen == text[1:].tolist()  # each token once, in order
    _, bpb, size = numpy_score(text, tokens, logs)
    before = np.concatenate([[0], np.cumsum(text[1:-1])]).sum()
    assert math.isclose(got["val_bpb_net"], bpb, rel_tol=1e-12)
    assert math.isclose(got["val_bpb_context"], 149 * 74 / size / math.log(2), rel_tol=1e-12)
    assert math.isclose(got["val_bpb"], before / size / math.log(2), rel_tol=1e-12)
    assert math.isclose(got["val_loss"], before / 149, rel_tol=1e-12)


@pytest.mark.parametrize("done", [0, 1, 5, 20, 21, 60, 149])
def test_what_is_scored_already_is_not_scored_again(text, done):
    parts, logs = made_up_stream(text)
    scorer = Learner()
    rest = list(t.costs(iter(parts), text, scorer, done))
    assert scorer.seen == text[done + 1 :].tolist()
    first = [(0, t.ContextModel().score(text[1 : done + 1], logs[:done]))] * (done > 0)
    rest = [(a, np.repeat(part[:, :1], 3, axis=1)) for a, part in rest]
    got = t.score(iter([*first, *rest]), text, facts(), silent)
    assert math.isclose(got["val_loss"], numpy_score(text, facts(), logs)[0], rel_tol=1e-12)


def test_sliding_by_a_whole_window_is_standard(net, text):
    scores = [
        t.score(net_costs(stream_of(net, text, (16, 16, batch)), text), text, facts(), silent)
        for batch in (2, 5)
    ]
    expected = numpy_score(text, facts(), slow_log_probs(net, text, 16, 16))
    for got in scores:
        assert math.isclose(got["val_loss"], expected[0], rel_tol=1e-5)
        assert math.isclose(got["val_bpb"], expected[1], rel_tol=1e-5)


@settings(deadline=None)
@given(st.permutations(range(5)), st.lists(st.integers(0, 4), max_size=2))
def test_streams_out_of_order_are_refused(order, removed):
    text = np.arange(4, 104, dtype=np.int32) % (VOCAB - 4) + 4
    parts, _ = made_up_stream(text)
    order = [i for i in order if i not in removed]
    if order == list(range(5)):
        assert t.score(net_costs(parts, text), text, facts(), silent)["val_tokens"] == 99
        return
    with pytest.raises(t.AuditFailed, match="coverage"):
        t.score(net_costs([parts[i] for i in order], text), text, facts(), silent)


def test_streams_that_repeat_or_overlap_are_refused(text):
    parts, logs = made_up_stream(text)
    for wrong in (
        [parts[0], *parts],
        [*parts, parts[-1]],
        [*parts[:2], (19, logs[19:21]), *parts[3:]],
        [(0, logs[:-1])],
        [parts[0], *[(148, logs[148:])] * 148],  # as many as there are
        [],
    ):
        with pytest.raises(t.AuditFailed, match="coverage"):
            t.score(net_costs(wrong, text), text, facts(), silent)
    with pytest.raises(t.AuditFailed, match="coverage"):  # what is missing has no bytes
        t.score(net_costs(parts, text), np.append(text, np.int32(BOS)), facts(), silent)


def test_ahead_makes_the_next_part_while_one_is_used():
    made = []

    def parts():
        for i in range(3):
            made.append(i)
            yield i, i
        raise ValueError("broken")

    stream = t.ahead(parts())
    assert next(stream) == (0, 0)
    for _ in range(100):
        if made == [0, 1]:
            break
        time.sleep(0.05)
    assert made == [0, 1]
    assert [next(stream), next(stream)] == [(1, 1), (2, 2)]
    with pytest.raises(ValueError, match="broken"):
        next(stream)


@pytest.mark.parametrize("vocab", [1024, 50_000])
def test_distributions_sum_to_1(rng, vocab):
    """As exactly as the audit asks, also where many logits are near the cap."""
    rows = (30 * np.tanh(rng.standard_normal((300, vocab)) * 3)).astype(np.float32)
    logs = t.log_softmax(rows).astype(np.float64)
    assert np.abs(np.exp(logs).sum(axis=-1) - 1).max() < 1e-6
    exact = rows - np.log(np.exp(rows.astype(np.float64)).sum(axis=-1, keepdims=True))
    assert np.abs(logs - exact).max() < 8e-6  # two roundings of numbers near 70
