"""The n-gram mixer against plain dictionaries written from the definitions."""

import argparse
import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import t

SMOOTHINGS = ("kneser-ney", "laplace")
DISCOUNT, ADDED = 0.65, 0.01  # of the first, of the second


@functools.cache
def words():
    """Text that every Python carries, its 1022 commonest words as ids; a BOS before each def."""
    pieces = re.findall(r"\w+|[^\w ]|  +", Path(argparse.__file__).read_text(encoding="utf-8"))
    ids = {"def": 1} | {w: i + 2 for i, (w, _) in enumerate(Counter(pieces).most_common(1022))}
    return np.array([1] + [1 if w == "def" else ids.get(w, 0) for w in pieces], np.int32)


def real_text(n):
    assert len(words()) >= n and len(np.unique(words())) > 900
    return words()[:n].copy()


def random_text(n, vocab, bos, seed=0):
    rng = np.random.default_rng(seed)
    text = rng.integers(0, vocab, n).astype(np.int32)
    text[n // 3 : n // 2] = text[: n // 2 - n // 3]  # something to repeat
    text[rng.random(n) < 0.05] = bos
    return text


def rows(n, vocab, seed=0):
    """A net's log-probabilities, some rows sure and some not."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, vocab)) * rng.uniform(0, 6, size=(n, 1))
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    return logits.astype(np.float32)


def mixer(text, vocab, bos=1, order=4, smoothing="kneser-ney", alpha=None):
    made = t.BackoffMixer(vocab, bos, order, smoothing, alpha, len(text))
    made.begin(int(text[0]))
    return made


class Dictionaries:
    """Counts by context, a tuple of tokens in text order; distributions from the definitions."""

    def __init__(self, vocab, bos, order, smoothing, alpha):
        self.vocab, self.bos, self.order = vocab, bos, order
        self.smoothing, self.alpha, self.history = smoothing, alpha, [bos]
        self.times = defaultdict(lambda: defaultdict(int))
        self.lefts = defaultdict(lambda: defaultdict(set))
        self.shares = defaultdict(lambda: [0.25] * 8)

    def begin(self, first):
        if first != self.bos:
            self.learn(first)

    def contexts(self):
        """Of order 0, 1, ..: up to `order` tokens, none before the last BOS."""
        start = len(self.history) - 1 - self.history[::-1].index(self.bos)
        document = tuple(self.history[start:])
        return [document[len(document) - k :] for k in range(min(self.order, len(document)) + 1)]

    def counts(self, context):
        whole = len(context) == self.order or context[:1] == (self.bos,)
        if self.smoothing == "kneser-ney" and not whole:
            return {v: len(s) for v, s in self.lefts[context].items()}
        return dict(self.times[context])

    def distribution(self):
        p, longest = np.full(self.vocab, 1 / self.vocab), (0, 1)
        for context in self.contexts():
            counts = self.counts(context)
            total, kinds, dense = sum(counts.values()), len(counts), np.zeros(self.vocab)
            if not total:
                break
            dense[list(counts)] = list(counts.values())
            longest = len(context), min(math.floor(total / kinds), 3)
            if self.smoothing == "kneser-ney":
                p = np.maximum(dense - DISCOUNT, 0) / total + DISCOUNT * kinds / total * p
            else:
                p = (dense + ADDED) / (total + ADDED * self.vocab)
        return p, longest

    def learn(self, token):
        whole = self.contexts()
        for context in whole:
            self.times[context][token] += 1
        for longer in whole[1:]:
            self.lefts[longer[1:]][token].add(longer[0])
        self.history.append(token)

    def step(self, token, row):
        """(nats of the token by net, n-grams, mixture; sum of the n-gram distribution)."""
        p, longest = self.distribution()
        net = np.exp(row.astype(float))
        odds = math.log(net.max() / max(1 - net.max(), 1e-9))
        shares = self.shares[min(max(math.floor(odds), -4), 5), longest]
        a = sum(shares) / len(shares) if self.alpha is None else self.alpha
        mixed = (1 - a) * net + a * p
        shares.append(a * p[token] / mixed[token])
        self.learn(token)
        return [-math.log(net[token]), -math.log(p[token]), -math.log(mixed[token])], p.sum()


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize(
    "kind, order, alpha",
    [("real", 1, 0.25), ("real", 2, None), ("real", 4, None), ("real", 4, 0.5)]
    + [("random", order, alpha) for order in (1, 3, 8) for alpha in (None, 0.0, 1.0)],
)
def test_agrees_with_plain_dictionaries(smoothing, kind, order, alpha):
    vocab, bos = (1024, 1) if kind == "real" else (7, 3)
    text = real_text(3001) if kind == "real" else random_text(800, vocab, bos)
    logs = rows(len(text) - 1, vocab)
    plain = Dictionaries(vocab, bos, order, smoothing, alpha)
    plain.begin(int(text[0]))
    want, sums = zip(*map(plain.step, text[1:].tolist(), logs), strict=True)
    got = mixer(text, vocab, bos, order, smoothing, alpha).cost(text[1:], logs)
    assert np.abs(np.array(sums) - 1).max() < 1e-9
    assert np.abs(got - np.array(want)).max() < 1e-9


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("kind", ["real", "random"])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_distributions_sum_to_one(smoothing, kind, alpha):
    vocab, bos = (1024, 1) if kind == "real" else (7, 3)
    text = real_text(1200) if kind == "real" else random_text(1200, vocab, bos)
    logs = rows(len(text) - 1, vocab)
    m, done = mixer(text, vocab, bos, 4, smoothing, alpha), 0
    for stop in sorted(np.random.default_rng(1).integers(0, 1199, 6).tolist()):
        m.cost(text[done + 1 : stop + 1], logs[done:stop])
        done, state, row = stop, m.save(), logs[stop : stop + 1]
        nats = []
        for v in range(vocab):
            nats.append(m.cost(np.array([v], np.int32), row)[0])
            m.restore(state)
        net, ngram, mixed = np.exp(-np.array(nats)).sum(axis=0)
        assert abs(ngram - 1) < 1e-9
        assert abs(mixed - 1) <= abs(net - 1) + 1e-9  # the net's row is float32
        assert abs(net - 1) < 1e-6
        again = m.cost(text[stop + 1 : stop + 2], row)  # what was asked before left no trace
        assert np.array_equal(again[0], nats[text[stop + 1]])
        assert m.learned == stop + (text[0] != bos) + 1
        m.restore(state)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_chunks_do_not_matter(smoothing):
    text, vocab = real_text(2500), 1024
    logs = rows(len(text) - 1, vocab)
    whole = mixer(text, vocab, smoothing=smoothing).cost(text[1:], logs)
    for size in (1, 7, 1000):
        m = mixer(text, vocab, smoothing=smoothing)
        parts = [
            m.cost(text[i + 1 : i + 1 + size], logs[i : i + size])
            for i in range(0, len(logs), size)
        ]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_the_future_does_not_reach_back(smoothing):
    vocab, bos = 7, 3
    text = random_text(400, vocab, bos)
    logs = rows(len(text) - 1, vocab)
    before = mixer(text, vocab, bos, smoothing=smoothing).cost(text[1:], logs)
    for at in (1, 2, 50, 200, 399):
        other, noise = text.copy(), logs.copy()
        other[at] = (other[at] + 1) % vocab
        noise[at:] = rows(len(text) - 1 - at, vocab, seed=9)  # target at + 1 and later
        after = mixer(other, vocab, bos, smoothing=smoothing).cost(other[1:], noise)
        assert np.array_equal(after[: at - 1], before[: at - 1])
        assert not np.array_equal(after[at - 1 :], before[at - 1 :])


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_a_document_does_not_see_the_one_before(smoothing):
    """Only how often things were seen: the same documents in another order are the same."""
    vocab, bos = 50, 1
    documents = [[1, 5, 6, 7, 8], [1, 9, 7, 8], [1, 5, 9]]  # an end that two have
    nats = []
    for first in itertools.permutations(documents):
        text = np.array([*itertools.chain(*first), 1, 5, 6, 7], np.int32)
        logs = rows(len(text) - 1, vocab)
        nats.append(mixer(text, vocab, bos, 4, smoothing, 0.5).cost(text[1:], logs)[-3:, 1])
    for other in nats[1:]:
        assert np.array_equal(other, nats[0])


def test_a_text_that_does_not_begin_with_bos():
    text = np.array([5, 6, 5, 6, 5, 6, 7], np.int32)
    text_after_bos = np.concatenate([[1], text]).astype(np.int32)
    logs = rows(len(text), 10)
    bare = mixer(text, 10, alpha=0.5).cost(text[1:], logs[1:])
    after = mixer(text_after_bos, 10, alpha=0.5).cost(text_after_bos[1:], logs)
    assert np.array_equal(bare, after[1:])


def test_a_large_vocabulary():
    vocab, rng = 65536, np.random.default_rng(0)
    text = rng.integers(0, vocab, 20_000).astype(np.int32)  # keys well above 32 bits
    text[-30:] = [1, 65535, 40000, 65535, 40000, 0] * 5
    row = np.full(vocab, -math.log(vocab), np.float32)
    logs = np.broadcast_to(row, (len(text) - 1, vocab))
    for smoothing in SMOOTHINGS:
        m = mixer(text, vocab, smoothing=smoothing, alpha=0.5)
        plain = Dictionaries(vocab, 1, 4, smoothing, 0.5)
        plain.begin(int(text[0]))
        for start in range(0, len(logs) - 30, 1000):
            stop = min(start + 1000, len(logs) - 30)
            m.cost(text[start + 1 : stop + 1], logs[start:stop])
        for token in text[1:-30].tolist():
            plain.learn(token)
        want = [plain.step(token, row)[0] for token in text[-30:].tolist()]
        assert np.abs(m.cost(text[-30:], logs[-30:]) - want).max() < 1e-9


def test_keys_that_share_a_slot_stay_apart():
    """In a table that is half full, as it may be, most keys meet another one."""
    nodes = np.zeros(512, t.NODE)
    nodes["key"][1:] = np.random.default_rng(0).permutation(1 << 20)[:511] * (1 << 40)
    table = np.zeros(1024, np.int32)
    t.enter_nodes(table, nodes, 512)
    assert sorted(table[table > 0].tolist()) == list(range(1, 512))
    for i in range(1, 512):
        assert table[t.find_slot(table, nodes, nodes["key"][i])] == i
    assert table[t.find_slot(table, nodes, 12345)] == 0


def test_the_learned_weight_finds_the_better_expert():
    text = np.tile(np.array([1, 5, 6, 7, 8, 9], np.int32), 300)
    flat = np.full((len(text) - 1, 64), -math.log(64), np.float32)
    nats = mixer(text, 64).cost(text[1:], flat)[-300:]
    assert nats[:, 2].mean() < nats[:, 1].mean() + 0.05 < 0.2 < nats[:, 0].mean()
    sure = np.full((len(text) - 1, 64), -20, np.float32)
    sure[np.arange(len(sure)), text[1:]] = -1e-6
    noise = random_text(len(text), 64, 1)
    right = np.full((len(noise) - 1, 64), -20, np.float32)
    right[np.arange(len(right)), noise[1:]] = -1e-6
    nats = mixer(noise, 64).cost(noise[1:], right)[-300:]
    assert nats[:, 2].mean() < 0.05


@pytest.mark.parametrize(
    "vocab, bos, order, alpha, capacity",
    [
        (1024, 1, 4, 0.5, 2**60),
        (2**40, 1, 4, 0.5, 2**22),
        (1024, 1, 8, None, 2**28),
        (1024, 1, 0, 0.5, 9),
        (1024, 1, 9, 0.5, 9),
        (1024, 1024, 4, 0.5, 9),
        (9, -1, 4, 0.5, 9),
        (1024, 1, 4, 1.5, 9),
        (1024, 1, 4, -0.1, 9),
        (1024, 1, 4, math.nan, 9),
    ],
)
def test_refuses_what_it_could_not_count(vocab, bos, order, alpha, capacity):
    with pytest.raises(ValueError):
        t.BackoffMixer(vocab, bos, order, "kneser-ney", alpha, capacity)


def test_refuses_tokens_and_rows_that_do_not_fit():
    m = t.BackoffMixer(10, 1, 4, "kneser-ney", None, 2)
    for token in (10, -1):
        with pytest.raises(ValueError, match="outside"):
            m.cost(np.array([token], np.int32), rows(1, 10))
    with pytest.raises(ValueError, match="log-prob"):
        m.cost(np.array([1], np.int32), rows(2, 10))
    with pytest.raises(ValueError, match="more than"):
        m.cost(np.array([1, 2, 3], np.int32), rows(3, 10))
    assert m.cost(np.zeros(0, np.int32), rows(0, 10)).shape == (0, 3)
