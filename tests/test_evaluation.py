"""Every target once, with enough context, by the net's own distribution; one BPB formula."""

import dataclasses
import itertools
import math
import threading
import time

import numpy as np
import pytest
from conftest import log_probs, made_up_tokenizer, random_model, t, tiny_knobs, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

mx = t.mx
VOCAB, BOS = 50, 1
TOKENIZER = made_up_tokenizer()


def silent(done, total, note):
    """A progress that shows nothing."""


def score(rows, text, context_model=None, show=silent):
    """The score of a text from the net's rows."""
    context_model = context_model or t.ContextModel()
    costs = t.cost_tokens(iter(rows), text, context_model)
    return t.total_score(costs, t.ValidationText(text, True, 1), TOKENIZER, show)


# --------------------------------------------------------------------------------------------------
# Windows

shapes = st.integers(2, 90).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 700), shapes)
def test_windows_score_each_target_once_in_order(targets, shape):
    seq_len, stride = shape
    scored = []
    for start, first, end in t.scoring_windows(targets, seq_len, stride):
        assert 0 <= start <= first < end <= min(start + seq_len, targets)
        scored += range(first, end)
        for target in range(first, end):  # input `target` is its last context token
            assert target - start + 1 >= min(seq_len - stride, target + 1)
    assert scored == list(range(targets))


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(2, 50))
def test_stride_of_a_window_is_the_standard_evaluation(targets, seq_len):
    expected = [(a, a, min(a + seq_len, targets)) for a in range(0, targets, seq_len)]
    assert list(t.scoring_windows(targets, seq_len, seq_len)) == expected


# --------------------------------------------------------------------------------------------------
# The net's rows


class Counting(t.Workers):
    """Workers that note the rows of every batch."""

    def __init__(self, count=1):
        super().__init__(count)
        self.rows = []

    def map(self, build, jobs, *args):
        self.rows.append(sum(len(job[0]) for job in jobs))
        return super().map(build, jobs, *args)


@pytest.fixture(scope="module")
def net():
    """A model with every tensor noisy, so that each part of the net matters."""
    return random_model(COMPUTE_DTYPE="float32")


@pytest.fixture(scope="module")
def text():
    """Random tokens with documents of a few tokens to a few windows."""
    rng = np.random.default_rng(4)
    text = rng.integers(4, VOCAB, 150).astype(np.int32)
    text[[0, 1, 9, 30, 31, 70, 148]] = BOS
    return text


def rows_of(net, text, shape, workers=None, cuts=()):
    return t.net_rows(net, text, shape, workers or t.Workers(1), cuts)


def slow_log_probs(net, text, seq_len, stride):
    """Each target by a forward pass of its own over just its context: (n - 1, V)."""
    rows = []
    for target in range(len(text) - 1):
        behind = target - seq_len
        start = 0 if behind < 0 else (behind // stride + 1) * stride
        logits = log_probs(net, mx.array(text[None, start : target + 1]), 1)
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
def test_rows_are_the_slow_forward_pass(net, text, length, seq_len, stride, batch, workers):
    text = text[:length]
    with t.Workers(workers) as several:
        parts = list(rows_of(net, text, (seq_len, stride, batch), several))
    ends = np.cumsum([len(part) for _, part in parts]).tolist()
    assert [first for first, _ in parts] == [0, *ends[:-1]]
    got = np.concatenate([logs for _, logs in parts])
    expected = slow_log_probs(net, text, seq_len, stride)
    np.testing.assert_allclose(np.exp(got.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_a_token_moves_nothing_before_it(net, text):
    """Bit for bit: a token's distribution depends neither on it nor on any later one."""
    changed = text.copy()
    changed[60:] = (changed[60:] + 7) % VOCAB
    one, two = (
        np.concatenate([logs for _, logs in rows_of(net, x, (16, 8, 3))]) for x in (text, changed)
    )
    assert (one[:60] == two[:60]).all()  # row i is the distribution of token i + 1
    assert (one[60] != two[60]).any()


@pytest.mark.parametrize("batch, workers", [(1, 1), (3, 1), (100, 3)])
@pytest.mark.parametrize("length, decoded", [(150, 16), (150, 5), (10, 9), (10, 1), (2, 1)])
def test_a_decoder_gets_the_rows_of_the_encoder(net, text, length, decoded, batch, workers):
    """Bit for bit: tokens of the first window known one after the other, then all the rest."""
    text, shape = text[:length], (16, 8, batch)
    with t.Workers(workers) as several:
        encoder = np.concatenate([logs for _, logs in rows_of(net, text, shape, several)])
    known = text.copy()
    known[1 : decoded + 1] = text[0]
    rows = rows_of(net, known, shape, t.Workers(1), range(1, decoded + 1))
    for i in range(decoded):
        first, logs = next(rows)
        assert first == i and (logs == encoder[i : i + 1]).all()
        known[i + 1] = text[i + 1]
    rest = [(first, len(logs), (logs == encoder[first : first + len(logs)]).all())
            for first, logs in rows]  # fmt: skip
    assert all(equal for _, _, equal in rest)
    assert sum(size for _, size, _ in rest) == length - 1 - decoded
    assert not rest or rest[0][0] == decoded


@pytest.mark.parametrize("cuts", [(1,), (9,), (16,), (1, 2, 15), range(1, 17)])
def test_cuts_part_the_first_window_alone(net, text, cuts):
    whole, parted = (list(rows_of(net, text, (16, 8, 3), cuts=c)) for c in ((), cuts))
    edges = sorted({0, *cuts, 16})
    assert [first for first, _ in parted] == [*edges[:-1], *(first for first, _ in whole[1:])]
    rows = [np.concatenate([logs for _, logs in parts]) for parts in (whole, parted)]
    assert (rows[0] == rows[1]).all()


@pytest.mark.parametrize("length", [400, 4000])
def test_rows_are_lazy(net, length):
    """An item costs at most one batch, and no part outgrows a window, however long the text."""
    text = np.random.default_rng(0).integers(4, VOCAB, length).astype(np.int32)
    workers = Counting()
    rows = rows_of(net, text, (16, 8, 3), workers)
    done, last = 0, 0
    for _ in range(12):
        first, logs = next(rows)
        assert first == done and len(logs) <= 16
        assert len(workers.rows) <= last + 1 and max(workers.rows) <= 3
        done, last = done + len(logs), len(workers.rows)
    assert last <= 1 + math.ceil(11 / 3)
    assert workers.rows[0] == 1 and set(workers.rows[1:]) == {3}  # the first window is alone


def test_a_cut_costs_the_window_when_it_is_taken(net, text):
    workers = Counting()
    rows = rows_of(net, text, (16, 8, 3), workers, range(1, 4))
    for i in range(3):
        next(rows)
        assert workers.rows == [1] * (i + 1)


# --------------------------------------------------------------------------------------------------
# The score


def made_up_rows(text, seed=1):
    """([(first, logs)], all of them in one array): distributions in pieces of varying length."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((len(text) - 1, VOCAB)).astype(np.float32)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    cuts = [0, 1, 20, 21, 60, len(logs)]
    return [(a, logs[a:b]) for a, b in itertools.pairwise(cuts)], logs


def numpy_score(text, logs):
    """(nats per token, bits per byte, bytes), token by token in Python."""
    nats, size = 0.0, 0
    for i in range(1, len(text)):
        before, token = text[i - 1], text[i]
        nats -= float(logs[i - 1, token])
        stripped = TOKENIZER.leading[token] and TOKENIZER.control[before]
        size += int(TOKENIZER.piece_bytes[token]) - int(stripped)
    return nats / (len(text) - 1), nats / size / math.log(2), size


def test_score_equals_the_formula(text):
    parts, logs = made_up_rows(text)
    seen = []
    got = score(parts, text, show=lambda *args: seen.append(args))
    loss, bpb, size = numpy_score(text, logs)
    assert math.isclose(got["val_loss"], loss, rel_tol=1e-12)
    assert math.isclose(got["val_bpb"], bpb, rel_tol=1e-12)
    assert got["val_bpb_net"] == got["val_bpb_context"] == got["val_bpb"]
    assert (got["val_tokens"], got["val_bytes"], got["val_whole"]) == (149, size, True)
    assert [done for done, _, _ in seen] == [1, 20, 21, 60, 149]
    assert seen[-1] == (149, 149, f"bpb {got['val_bpb']:.4f}, ")
    # Bits per byte of the uniform distribution need no net to be known.
    got = score([(0, np.full((149, VOCAB), -math.log(VOCAB)))], text)
    assert math.isclose(got["val_bpb"], 149 * math.log2(VOCAB) / size)


class Learner(t.ContextModel):
    """Its costs name what it has seen: columns net, tokens so far, their sum."""

    def __init__(self):
        self.seen = []

    def cost(self, tokens, logs, coder=None):
        net, out = super().cost(tokens, logs)[:, 0], []
        for token, cost in zip(tokens.tolist(), net, strict=True):
            out.append([cost, len(self.seen), sum(self.seen)])
            self.seen.append(token)
        return np.array(out)


def test_each_column_is_a_score_of_its_own(text):
    parts, logs = made_up_rows(text)
    learner = Learner()
    got = score(parts, text, learner)
    assert learner.seen == text[1:].tolist()  # each token once, in order
    _, bpb, size = numpy_score(text, logs)
    before = np.concatenate([[0], np.cumsum(text[1:-1])]).sum()
    assert math.isclose(got["val_bpb_net"], bpb, rel_tol=1e-12)
    assert math.isclose(got["val_bpb_context"], 149 * 74 / size / math.log(2), rel_tol=1e-12)
    assert math.isclose(got["val_bpb"], before / size / math.log(2), rel_tol=1e-12)
    assert math.isclose(got["val_loss"], before / 149, rel_tol=1e-12)


@pytest.mark.parametrize("cost", [math.nan, math.inf])
def test_what_is_not_finite_is_no_score(text, cost):
    parts, logs = made_up_rows(text)
    logs[70, text[71]] = -cost
    with pytest.raises(t.RunFailed, match="no score"):
        score(parts, text)


def test_a_text_without_bytes_has_no_score():
    text = np.full(5, BOS, np.int32)
    with pytest.raises(t.RunFailed, match="0 bytes"):
        score([(0, np.full((4, VOCAB), -math.log(VOCAB)))], text)


def test_sliding_by_a_whole_window_is_standard(net, text):
    loss, bpb, _ = numpy_score(text, slow_log_probs(net, text, 16, 16))
    for batch in (2, 5):
        got = score(rows_of(net, text, (16, 16, batch)), text)
        assert math.isclose(got["val_loss"], loss, rel_tol=1e-5)
        assert math.isclose(got["val_bpb"], bpb, rel_tol=1e-5)


def test_score_while_training_is_of_the_weights_given(net, text):
    """At stride = window, by a model that holds other weights; whatever the batch."""
    cfg = tiny_knobs(MIXER="off", EVAL_STRIDE=4)
    loss, bpb, size = numpy_score(text, slow_log_probs(net, text, 16, 16))
    params = dict(t.tree_flatten(net.parameters()))
    for batch in (1, 16, 48):
        model = t.GPT(cfg, VOCAB, BOS)
        part = t.ValidationText(text, False, 1)
        args = dataclasses.replace(cfg, val_batch_size=batch), t.Workers(1)
        got = t.score_net(model, params, part, TOKENIZER, *args)
        assert math.isclose(got["val_loss"], loss, rel_tol=1e-5)
        assert math.isclose(got["val_bpb"], bpb, rel_tol=1e-5)
        assert (got["mode"], got["val_bytes"], got["val_whole"]) == ("standard", size, False)


@settings(deadline=None)
@given(st.permutations(range(5)), st.lists(st.integers(0, 4), max_size=2))
def test_rows_out_of_order_are_refused(order, removed):
    text = np.arange(4, 104, dtype=np.int32) % (VOCAB - 4) + 4
    parts, _ = made_up_rows(text)
    order = [i for i in order if i not in removed]
    if order == list(range(5)):
        assert score(parts, text)["val_tokens"] == 99
        return
    with pytest.raises(t.AuditFailed, match="coverage"):
        score([parts[i] for i in order], text)


def test_rows_that_repeat_or_overlap_are_refused(text):
    parts, logs = made_up_rows(text)
    for wrong in (
        [parts[0], *parts],
        [*parts, parts[-1]],
        [*parts[:2], (19, logs[19:21]), *parts[3:]],
        [(0, logs[:-1])],
        [parts[0], *[(148, logs[148:])] * 148],  # as many as there are
        [],
    ):
        with pytest.raises(t.AuditFailed, match="coverage"):
            score(wrong, text)
    with pytest.raises(t.AuditFailed, match="coverage"):  # what is missing has no bytes
        score(parts, np.append(text, np.int32(BOS)))


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


def test_a_score_that_fails_leaves_no_thread(run, net, text, monkeypatch):
    """Nor one that the collector of garbage ends, wherever it happens to run."""
    ours, params = load(run), dict(t.tree_flatten(net.parameters()))
    monkeypatch.setattr(
        t, "scoring_windows", lambda *shape: iter([(0, 0, 16), (8, 17, 24), (16, 24, 32)])
    )
    threads, kept = set(threading.enumerate()), []
    for attempt in (
        lambda: ours.score("sliding"),
        lambda: t.score_net(ours.model, params, ours.text, TOKENIZER, ours.cfg, t.Workers(1)),
    ):
        with pytest.raises(t.AuditFailed, match="coverage") as caught:
            attempt()
        kept.append(caught)  # and with it all that it had in hand
        assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize("vocab", [1024, 50_000])
def test_distributions_sum_to_1(rng, vocab):
    """As exactly as the audit asks, also where many logits are near the cap."""
    rows = (30 * np.tanh(rng.standard_normal((300, vocab)) * 3)).astype(np.float32)
    logs = t.log_softmax(rows).astype(np.float64)
    assert np.abs(np.exp(logs).sum(axis=-1) - 1).max() < 1e-6
    exact = rows - np.log(np.exp(rows.astype(np.float64)).sum(axis=-1, keepdims=True))
    assert np.abs(logs - exact).max() < 8e-6  # two roundings of numbers near 70


# --------------------------------------------------------------------------------------------------
# An artifact from disk


@pytest.fixture
def run(tmp_path, net, text):
    """A folder with an artifact of the net, whose tensors are stored exactly, and a text."""
    cfg, params = tiny_knobs(MIXER="off"), dict(t.tree_flatten(net.parameters()))
    groups = t.group_parameters(list(params))
    exact = {name: dataclasses.replace(group, bits="") for name, group in groups.items()}
    t.write_artifact(tmp_path / "artifact.bin", params, exact, cfg, TOKENIZER)
    write_shard(tmp_path / "text_val_000000.bin", text)
    return tmp_path


def load(run, **env):
    cfg = tiny_knobs(**{"MIXER": "off", **env})
    return t.Scoring.load(cfg, run / "artifact.bin", run, t.Workers(1))


@pytest.mark.parametrize("mode, stride", [("standard", 16), ("sliding", 5), ("sliding", 99)])
def test_a_file_scores_what_its_net_scores(run, net, text, mode, stride):
    result, line = load(run, EVAL_STRIDE=stride).score(mode)
    loss, bpb, size = numpy_score(text, slow_log_probs(net, text, 16, min(stride, 16)))
    assert math.isclose(result["val_loss"], loss, rel_tol=1e-5)
    assert math.isclose(result["val_bpb"], bpb, rel_tol=1e-5)
    assert (result["mode"], result["mixer"], result["val_bytes"]) == (mode, "off", size)
    assert line == ""


def test_an_artifact_takes_no_settings_but_its_own(run):
    with pytest.raises(t.UserError, match=r"NUM_LAYERS=2: .*artifact.bin has 3: unset it"):
        load(run, NUM_LAYERS=2)
    with pytest.raises(t.UserError, match="was made with MIXER=off"):
        load(run, MIXER="logistic")
    assert load(run, MIXER_MEMORY_MB=9, MIXER="backoff").prime().learned == 0
    with pytest.raises(t.UserError, match="VOCAB_SIZE=7"):
        load(run, VOCAB_SIZE=7)


def test_tensors_that_do_not_fit_are_named(run, net):
    params = dict(t.tree_flatten(net.parameters()))
    params.pop("skips")
    groups = t.group_parameters(list(params))
    t.write_artifact(run / "artifact.bin", params, groups, tiny_knobs(MIXER="off"), TOKENIZER)
    with pytest.raises(t.UserError, match=r"artifact\.bin: its tensors do not fit"):
        load(run)
