"""The logistic mixer: its coder, a slow second version of it, its tables, its tree, its packer."""

import collections
import dataclasses
import decimal
import functools
import hashlib
import itertools
import math
import re
import threading
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import t, tiny_knobs

BOS, F = 2, np.float32
STRETCH, SQUASH, EVIDENCE = (t.mixer_tables()[k] for k in ("stretch", "squash", "evidence"))


def facts(vocab):
    control = np.arange(vocab) < 4
    leading = (np.arange(vocab) & 2 > 0) & ~control
    letters = b"aBc .dE9' \xc3xyz,"  # a byte each: words of one to many pieces, and their ends
    text = bytes(letters[v * 7 % len(letters)] for v in range(vocab))
    sizes = np.ones(vocab, np.uint16)
    return t.Tokenizer(sizes, leading, control, min(BOS, vocab - 1), True, "", text)


def numbers(seed=1):
    """Pseudo-random whole numbers below 2^31 that no library's version changes."""
    while True:
        seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
        yield seed >> 33


def some_text(size, vocab=50, seed=1):
    """Documents of common and rare tokens, with passages of the text repeated. (size,) int64."""
    draw, text = numbers(seed), [BOS]
    while len(text) < size:
        kind = next(draw) % 16
        if kind == 0:
            text.append(BOS)
        elif kind < 3 and len(text) > 20:
            start = next(draw) % (len(text) - 15)
            text += text[start : start + 9 + next(draw) % 6]
        else:
            text.append(4 + next(draw) % (next(draw) % (vocab - 4) + 1))
    return np.array(text[:size], np.int64)


def shuffled(vocab, seed=3):
    """A tree's leaves in pseudo-random order and depth; as always, the left ones are taken."""
    order, draw, leaf = list(range(vocab)), numbers(seed), np.zeros(vocab, np.int64)
    for i in range(len(order) - 1, 0, -1):
        j = next(draw) % (i + 1)
        order[i], order[j] = order[j], order[i]

    def place(tokens, path, below):
        if len(tokens) == 1:
            leaf[tokens[0]] = path << below
            return
        room = 1 << below - 1
        least, most = max(len(tokens) - room, 1), min(len(tokens) - 1, room)
        cut = least + next(draw) % (most - least + 1)
        place(tokens[:cut], 2 * path, below - 1)
        place(tokens[cut:], 2 * path + 1, below - 1)

    place(order, 0, t.tree_levels(vocab))
    return leaf


def rows(n, vocab, seed=0):
    """A net's log-probabilities, some rows sure and some not."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, vocab)) * rng.uniform(0, 6, size=(n, 1))
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


def mixer(vocab=50, capacity=1000, memory=1, size="medium"):
    return t.LogisticMixer(facts(vocab), shuffled(vocab), capacity, memory, size)


def assert_same_state(a, b):
    for name, x, y in zip(t.Past._fields, a.state, b.state, strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), name


# --------------------------------------------------------------------------------------------------
# The coder


@pytest.mark.parametrize("kind", ["uniform", "extreme", "sure and right", "sure and wrong"])
def test_coder_round_trip_and_length(kind):
    rng = np.random.default_rng(2)
    n = 4000
    p = rng.integers(1, 65536, n)
    if kind != "uniform":
        p = rng.choice([1, 2, 65534, 65535], n)
    bits = (rng.integers(0, 65536, n) < p).astype(int)
    if kind.startswith("sure"):
        bits = (p > 9).astype(int) ^ (kind == "sure and wrong")
    coder = t.Coder()
    ends = coder.room(n)
    for probability, bit in zip(p.tolist(), bits.tolist(), strict=True):
        assert t.code_bit(ends, probability, bit) == bit
    coder.flush()
    code = coder.finish()
    decoder = t.Coder(code)
    ends = decoder.room(n)
    read = [t.code_bit(ends, x, 0) for x in p.tolist()]
    assert read == bits.tolist()
    odds = 1
    for probability, bit in zip(p.tolist(), bits.tolist(), strict=True):
        odds *= probability if bit else 65536 - probability
    exact = Fraction(odds, 65536**n)  # of all the bits together
    least = exact.denominator.bit_length() - exact.numerator.bit_length() - 1
    assert least <= 8 * len(code) <= least + 2 + 32


def test_an_empty_code_is_short():
    assert len(t.Coder().finish()) <= 4


@pytest.mark.parametrize("vocab, size", [(2, 300), (3, 300), (50, 600), (1000, 300), (65536, 40)])
@pytest.mark.parametrize("with_net", [False, True])
def test_decode_is_the_inverse_of_encode(vocab, size, with_net):
    text = some_text(size, max(vocab, 9)) % vocab
    logs = rows(size, vocab) if with_net else None
    one, two, three = (mixer(vocab, size) for _ in range(3))
    coder, read = t.Coder(), np.zeros(size, np.int64)
    nats = one.code(text, logs, coder)
    code = coder.finish()
    assert (three.code(text, logs) == nats).all()  # scoring is encoding
    coder = t.Coder(code)
    for a in range(0, size, 77):  # as a decoder may, in other chunks
        part = None if logs is None else logs[a : a + 77]
        assert (two.code(read[a : a + 77], part, coder) == nats[a : a + 77]).all()
    assert (read == text).all()
    assert_same_state(one, two)
    assert_same_state(one, three)
    assert abs(8 * len(code) - nats[:, 1].sum() / math.log(2)) <= 33
    if not with_net:
        assert (nats[:, 0] == nats[:, 1]).all()


def test_what_the_kernel_would_read_beyond_its_arrays_is_refused():
    for logs in (rows(2, 50), rows(3, 49), rows(1, 50)):
        with pytest.raises(ValueError, match="log-probabilities for 3 tokens"):
            mixer().code(np.array([4, 5, 6]), logs)
    beyond = dataclasses.replace(facts(50), bos=50)
    with pytest.raises(ValueError, match="BOS 50"):
        t.LogisticMixer(beyond, shuffled(50), 9, 1)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_chunks_do_not_matter(size):
    text, logs = some_text(400), rows(400, 50)
    whole, parts = mixer(), mixer()
    want = whole.code(text, logs)
    got = [parts.code(text[a : a + size], logs[a : a + size]) for a in range(0, 400, size)]
    assert (np.concatenate(got) == want).all()
    assert_same_state(whole, parts)


@pytest.mark.parametrize("vocab, size", [(2, 99), (50, 120), (64, 120), (1000, 60)])
def test_probabilities_sum_to_one(vocab, size):
    text, logs = some_text(size + 9, max(vocab, 9)) % vocab, rows(size + 9, vocab)
    m = mixer(vocab)
    m.code(text[:size], logs[:size])
    for at in (size, size + 8):
        state = m.save()
        nats = np.zeros((vocab, 2))
        for v in range(vocab):
            nats[v] = m.code(np.array([v]), logs[at : at + 1])[0]
            m.restore(state)
        assert abs(np.exp(-nats).sum(axis=0) - 1).max() < 1e-9
        assert np.ptp(nats[:, 0]) > 0
        m.code(text[size : size + 8], logs[size : size + 8])


@pytest.mark.parametrize("vocab, size", [(50, "large"), (9, "small"), (300, "medium")])
@pytest.mark.parametrize("joined", [False, True])
def test_any_last_token_can_be_undone(vocab, size, joined):
    """Then only what that token has touched is copied."""
    text, m = some_text(120, vocab), mixer(vocab, size=size)
    logs = rows(120, vocab) if joined else None
    m.code(text[:110], logs[:110] if joined else None)
    state, same = m.save(), mixer(vocab, size=size)
    same.restore(state)
    for v in range(vocab):
        m.code(np.array([v]), logs[110:111] if joined else None)
        assert any((a != b).any() for a, b in zip(m.state, same.state, strict=True))
        m.restore(state)
        assert_same_state(m, same)


def test_what_came_between_is_undone_too():
    """Another token, which was undone, or a look at all that may come."""
    text, m, same = some_text(60), mixer(), mixer()
    for each in (m, same):
        each.code(text[:50])
    state = m.save()
    m.code(text[50:51])
    later = m.save()
    m.code(text[51:52])
    m.restore(later)
    m.restore(state)
    assert_same_state(m, same)
    m.code(text[50:51])
    t.Predictor(m, None).log_probabilities()
    m.restore(state)
    assert_same_state(m, same)


@pytest.mark.parametrize("joined", [False, True])
def test_a_copy_brings_all_of_the_state_back(joined):
    """Also from before the net joined, which changes every weight."""
    text, logs, m, same = some_text(300), rows(300, 50), mixer(), mixer()
    for each in (m, same):
        each.code(text[:100], logs[:100] if joined else None)
    state = m.save()
    for _ in range(2):
        m.code(text[100:200], logs[100:200])
        m.restore(state)
        assert_same_state(m, same)


def test_the_golden_code():
    """The same bits on every machine: an artifact made on one is read on another."""
    text, m, coder = some_text(3000), mixer(capacity=3000), t.Coder()
    m.code(text, None, coder)
    assert hashlib.sha256(text.tobytes()).hexdigest() == GOLDEN["text"]
    # Without the last 4 bytes, which could as well be others that name the interval.
    assert hashlib.sha256(bytes(coder.out)).hexdigest() == GOLDEN["code"]
    assert hashlib.sha256(m.state.weights.tobytes()).hexdigest() == GOLDEN["weights"]


GOLDEN = {
    "text": "0728adbbd3e94a61a951496f95856feee6929b769b0c920dec9a38d8069c9122",
    "code": "2b57e0d63938f465f7e73fe6a3ef17aa2dc9dacad37e848f0099df7b5e0841a2",
    "weights": "00b5f98e127722a22ec3a0e153f472df628617685c38798e7d1c4a3fc9728bc7",
}


# --------------------------------------------------------------------------------------------------
# Tables


def test_tables_are_fixed():
    for table, digest in zip(t.logit_tables(), TABLES, strict=True):
        little = table.astype(table.dtype.newbyteorder("<"))
        assert hashlib.sha256(little.tobytes()).hexdigest() == digest


TABLES = (
    "33dc3af254eda16a974daa4d75943c7258552ecffcf772bfc1bfd0c27eeb23e3",
    "f537fbb7e851761f58afedbbe6a441ae1f712052bac09b840ba5be9e35b6aea0",
)


def test_tables_are_the_formulas():
    p = (np.arange(4096) + 0.5) / 4096
    want = np.log(p / (1 - p))
    assert (np.abs(STRETCH - want) <= np.spacing(np.abs(want).astype(np.float32))).all()
    x = np.arange(-3072, 3073) / 256
    assert np.abs(t.logit_tables()[1] - 2**32 / (1 + np.exp(-x))).max() <= 1.01
    assert np.abs(SQUASH - np.clip(65536 / (1 + np.exp(-x)), 1, 65535)).max() <= 1
    assert (np.diff(STRETCH) > 0).all() and (np.diff(SQUASH) >= 0).all()
    assert SQUASH.min() >= 1 and SQUASH.max() <= 65535
    rate = t.mixer_tables()["rate"]
    assert rate[0] == 65536 * 2 // 3 and rate[1023] == 65536 * 2 // 2049


# --------------------------------------------------------------------------------------------------
# A second version


def logit(cell):
    return STRETCH[cell >> 20]


def chance(x):
    return int(SQUASH[int((x + F(12)) * F(256) + F(0.5))])


def moved(cell, bit, limit):
    n, p = int(cell) & 1023, int(cell) >> 10
    p += ((bit * 4194303 - p) * (65536 * 2 // (2 * n + 3))) >> 16
    return p << 10 | min(n + 1, limit)


def exact_logistic(i):
    """1 / (1 + exp(-i / 256)) in 2^-32, rounded down in the upper half, mirrored in the lower."""
    with decimal.localcontext() as context:
        context.prec = 30
        upper = int(2**32 / (1 + (decimal.Decimal(-abs(i)) / 256).exp()))
    return upper if i >= 0 else 2**32 - upper


def moved_slot(cell, bit, dice, chance, error):
    """A slot's cell, (logit, count, last bits, correction), by search: the logit whose probability
    is nearest to the moved one."""
    at, count, last, correction = cell
    if not bit:  # by symmetry, as a 1 from the mirrored logit
        at = 4096 - at
    p = CURVE[at]
    p += (2**32 - p) * 2 // (2 * t.COUNTS[count].item() + 3)
    at = min(range(1, 4096), key=lambda i: (abs(CURVE[i] - p), -i))
    gap = int(t.COUNTS[count + 1] - t.COUNTS[count]) if count < 15 else 0
    step = F(64 * (2 / (t.COUNTS[count] + 1.5) + 0.1))
    moved = F(correction + 256) + error * step
    correction = min(max(math.floor(moved + F(chance) * F(1 / 65536)), 1), 511) - 256
    count += gap > 0 and dice < 65536 // gap
    return at if bit else 4096 - at, count, (*last, bit)[-6:], correction


CURVE = [exact_logistic(i - 2048) for i in range(4096)]


def product(rows, x):
    """The rows' sum times x, in four partial sums, added as a tree."""
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    sums = np.zeros(4, F)
    for part in (total * x).reshape(-1, 4):
        sums = sums + part
    return min(max((sums[0] + sums[1]) + (sums[2] + sums[3]), F(-11.9)), F(11.9))


@functools.cache
def blank(vocab):
    """A mixer that has seen nothing."""
    return mixer(vocab, 1, 64)


def apm_rows(vocab, apm, last, node):
    """The script's choice of the refining maps' rows."""
    m = blank(vocab)
    m.now["last"] = last
    t.choose_apm_rows(m.fixed, m.state._replace(apm=apm), m.now[0], 0, node)
    return m.now["apm_rows"][0, 0].tolist()


@functools.cache
def word_row(vocab, word, level):
    """The script's choice of the last set's row."""
    m = blank(vocab)
    m.state.marks["words"], m.state.marks["letters"] = 0, 0
    for letter in word:
        t.learn_letter(m.state.marks[0], letter)
    t.choose_rows(m.fixed, m.state, m.now[0], level, 1)
    return int(m.now["set_rows"][0, level, -1] - m.fixed.first_row[-1])


class Slow:
    """The mixer in plain Python: contexts are tuples in dictionaries, so that nothing collides.

    Only what is indexed directly starts as in the script.
    """

    def __init__(self, vocab, memory=64, size="medium"):
        self.tokens, self.leaf = facts(vocab), shuffled(vocab).tolist()
        self.levels = max(vocab - 1, 1).bit_length() + 2
        self.leaves, self.with_net = 1 << self.levels, False
        self.below_class = 0 if vocab < 256 else 8  # of 2,000: 5 of 13 decisions are 64,000 rows
        self.contexts = [c for c in t.SLOT_CONTEXTS if size == "large" or c.size in ("small", size)]
        first = t.new_past(vocab, len(self.contexts), 1, memory)
        self.maps, self.weights, self.visits = first.maps, first.weights, first.visits
        self.apm, self.width = first.apm, first.weights.shape[2]
        self.small = sum(c.size == "small" for c in t.SLOT_CONTEXTS)
        self.slots, self.candidates, self.repeats, self.known = {}, {}, {}, set()
        self.history, self.start, self.pieces = [], 0, [(), ()]
        self.words = [b"", b"", b"", b""]  # see Context.words
        self.match, self.length, self.worth = 0, 0, collections.Counter()
        inside = {(leaf | self.leaves) >> up for leaf in self.leaf for up in range(self.levels)}
        self.decisions = [n for n in range(1, self.leaves) if {2 * n, 2 * n + 1} <= inside]

    def join(self):
        """The net comes in: its judge starts as the contexts' judge, with room made for the net."""
        self.with_net = True
        for table in (self.weights, self.visits, self.apm):
            table[1] = table[0]
        self.weights[1] *= F(0.8)
        self.weights[1, :, 0], self.weights[1, :, 1] = F(0.25) / F(4) / t.SETS, 0
        self.trust = [F(0.5)] * self.levels

    def back(self, k):
        at = len(self.history) - k
        return self.history[at] if at >= max(self.start, 0) else BOS

    def key(self, context):
        parts = [context.name]
        for k in range(8):
            if context.tokens >> k & 1:
                parts.append(self.back(k + 1))
            if context.classes >> k & 1:
                parts.append((k, self.path_class(self.back(k + 1))))
        parts += self.pieces[: context.pieces]
        parts += [word for k, word in enumerate(self.words) if context.words >> k & 1]
        return (*parts, self.start) if context.document else tuple(parts)

    def path_class(self, token):
        """The first six decisions of its path."""
        return self.leaf[token] >> max(self.levels - 6, 0)

    def below(self, node, level):
        """Leaves under a node."""
        rest = self.levels - level
        return node - (1 << level) << rest, (node - (1 << level) + 1) << rest

    def mass(self, row, node, level):
        low, high = self.below(node, level)
        return sum(int(r) + 1 for r, leaf in zip(row, self.leaf, strict=True) if low <= leaf < high)

    def experts(self, node, level, old, found, expected):
        """(inputs that judge 0 hears, each expert's cell in the level's maps, or None)."""
        levels, x, cells = self.levels, np.zeros(self.width, F), []
        maps = self.maps[level]
        candidates, slots = 128, 128 + 200 * t.CANDIDATES
        cells.append(None)
        if expected is not None and (expected | self.leaves) >> (levels - level) == node:
            side = expected >> (levels - level - 1) & 1
            cells[0] = min(self.length, 63) * 2 + side
            x[2] = logit(maps[cells[0]])
        for c, entries in enumerate(found):
            sides, newest = [0, 0], None
            for leaf, count in entries:
                if (leaf | self.leaves) >> (levels - level) == node:
                    side = leaf >> (levels - level - 1) & 1
                    newest = side if newest is None else newest
                    sides[side] += count
            cells.append(None)
            if newest is not None:
                pair = EVIDENCE[sides[0]] * 10 + EVIDENCE[sides[1]]
                cells[-1] = candidates + (c * 100 + pair) * 2 + newest
                x[3 + c] = logit(maps[cells[-1]])
        for a, (at, count, last, correction) in enumerate(old):
            seen = int("".join(map(str, (1, *last))), 2)
            cells.append(slots + a * 2048 + seen * 16 + at // 256 if count else None)
            inputs = x[3 + t.CANDIDATES + 3 * a :]
            inputs[0], inputs[2] = F(at - 2048) / F(256), F(correction) / F(64)
            inputs[1] = logit(maps[cells[-1]]) if count else 0
        return x, cells

    def sets(self, node, level, old):
        """A row of weights of each set."""
        vocab, number = len(self.leaf), self.decisions.index(node)
        rows, first = [number, self.back(2), self.back(1) * 8 + min(level, 7)], 0
        distance = len(self.history) - self.start
        rows.append(min(max(distance.bit_length() - 1, 0) // 2, 7) * vocab + number)
        rows.append(level * (self.small + 1) + sum(count > 0 for _, count, *_ in old[: self.small]))
        rows.append(sum(count // 2 * 8**k for k, (_, count, *_) in enumerate(old[3:0:-1])))
        rows.append(min(len(self.words[0]), 15) * self.levels + level)
        rows.append((self.leaf[self.back(1)] >> self.below_class) * vocab + number)
        rows += [0, word_row(vocab, self.words[0], level)]  # any hash is good
        sizes = [vocab, vocab, 8 * vocab, 8 * vocab, self.levels * (self.small + 1), 512,
                 16 * self.levels, vocab << self.levels - self.below_class, 1, 1 << 17]  # fmt: skip
        for k, size in enumerate(sizes):
            assert 0 <= rows[k] < size
            rows[k], first = rows[k] + first, first + size
        return rows

    def refine(self, judge, node, mixed):
        """(probability in 65,536ths, the maps' rows and the column to learn from)."""
        place = min(max((mixed + F(8)) * F(2), F(0)), F(31.99))
        at, high = int(place), place - F(int(place))
        rows = apm_rows(len(self.leaf), self.apm, self.back(1), node)  # any hash is good
        assert rows[0] == self.decisions.index(node) and rows[1] >= len(self.leaf)
        total = F(0)
        for r in rows:
            a = F(self.apm[judge, r, at] >> 10) * (F(1) - high)
            total = total + (a + F(self.apm[judge, r, at + 1] >> 10) * high)
        p = F(chance(mixed)) * F(0.34) + total * F(0.33 / 64)
        return min(max(int(p), 1), 65535), rows, at + (high >= F(0.5))

    def code(self, token, row=None):
        """(nats by the contexts, nats with the net) of the next token, which is then learned."""
        levels, target, nats = self.levels, self.leaf[token], [0.0, 0.0]
        slot_keys, fresh = [self.key(c) for c in self.contexts], [False] * len(self.contexts)
        found = [self.candidates.get(self.key(c), []) for c in t.CANDIDATE_CONTEXTS]
        expected = self.leaf[self.history[self.match]] if self.length else None
        node = 1
        for level in range(levels):
            if level % 3 == 0:
                slots = [(*key, node) for key in slot_keys]
                rare = [c.sparse and level > 0 for c in self.contexts]
                gone = [new and c for new, c in zip(fresh, rare, strict=True)]
                fresh = [g or slot not in self.known for g, slot in zip(gone, slots, strict=True)]
                self.known |= {slot for g, slot in zip(gone, slots, strict=True) if not g}
            low, high = self.below(2 * node + 1, level + 1)
            bit = target >> (levels - level - 1) & 1
            if not any(low <= leaf < high for leaf in self.leaf):
                node = 2 * node
                continue
            top = node >> level % 3  # of the decisions that share a slot
            places = [(*key, top, node) for key in slot_keys]
            here = len(self.history)
            places = [(p, here) if g else p for p, g in zip(places, gone, strict=True)]
            old = [self.slots.get(place, (2048, 0, (), 0)) for place in places]
            x, cells = self.experts(node, level, old, found, expected)
            sets = self.sets(node, level, old)
            ps, mixes, told = [], [], None
            for judge in range(1 + self.with_net):
                if judge:
                    share = self.mass(row, 2 * node + 1, level + 1) << 12
                    share //= self.mass(row, node, level)
                    x[0], x[1] = F(4) * STRETCH[min(share, 4095)], F(3) * mixes[0]
                mixed = product(self.weights[judge][sets], x)
                mixes.append(mixed)
                if judge == self.with_net:
                    self.weigh(self.weights[judge][sets], x, bit)
                p, rows, column = self.refine(judge, node, mixed)
                ps.append(p)
                error = F(bit * 65536 - chance(mixed)) * F(1 / 65536)
                told = told if judge else error  # the corrections hear of judge 0
                error /= F(self.width)
                for s in sets:
                    rate = F(0.12) / (F(1) + self.visits[judge, s] * F(0.003))
                    self.visits[judge, s] += 1
                    self.weights[judge, s] += error * max(F(0.003), rate) * x
                for r in rows:
                    self.apm[judge, r, column] = moved(self.apm[judge, r, column], bit, 1000)
            coded = self.trusted(level, *ps, bit) if self.with_net else ps[0]
            for k, p in enumerate((ps[0], coded)):
                nats[k] -= math.log((p if bit else 65536 - p) / 65536)
            for cell in cells:
                if cell is not None:
                    self.maps[level, cell] = moved(self.maps[level, cell], bit, 1023)
            dice = (len(self.history) * 16 + level) * 0x9E3779B1 >> 12 & 0xFFFF
            for a, place in enumerate(places):
                spread = dice + a * 0x9E37 & 0xFFFF
                self.slots[place] = moved_slot(old[a], bit, dice, spread, told)
            node = 2 * node + bit
        self.learn(token)
        return nats

    def weigh(self, weights, x, bit):
        """Nats that the bit would cost the mix more without the inputs of an expert."""
        names = ["net", "mix", "match", *(c.name for c in t.CANDIDATE_CONTEXTS)]
        names += [c.name for c in self.contexts for _ in range(3)]

        def cost(logit):
            logit = min(max(logit, -11.9), 11.9)
            return -math.log(1 / (1 + math.exp(-logit if bit else logit)))

        whole = (weights.astype(float) * x).sum()

        for name in set(names):
            its = [j for j, other in enumerate(names) if other == name]
            said = (weights[:, its].astype(float) * x[its]).sum()
            self.worth[name] += cost(whole - said) - cost(whole)

    def trusted(self, level, p0, p1, bit):
        """What the judges make of a decision together, in 65,536ths; then Bayes' rule."""
        trust = self.trust[level]
        coded = int(trust * F(p1) + (F(1) - trust) * F(p0) + F(0.5))
        a, b = (F(p if bit else 65536 - p) for p in (p0, p1))
        b = b * trust
        self.trust[level] = min(max(b / (b + a * (F(1) - trust)), F(0.001)), F(1) - F(0.001))
        return min(max(coded, 1), 65535)

    def learn(self, token):
        for c in t.CANDIDATE_CONTEXTS:
            entries = self.candidates.setdefault(self.key(c), [])
            count = dict(entries).get(self.leaf[token], 0)
            rest = [(v, n) for v, n in entries if v != self.leaf[token]][:6]
            rest = [(v, n - (n + 1) // 4 if n > 2 else n) for v, n in rest]
            entries[:] = [(self.leaf[token], min(count + 1, 255)), *rest]
        here = len(self.history)
        self.history.append(token)
        if token == BOS:
            self.start, self.pieces, self.words = here, [(), ()], [b"", b"", b"", b""]
        elif self.tokens.leading[token]:
            self.pieces = [("start", token), self.pieces[0]]
        else:
            self.pieces = [(*self.pieces[0], token), self.pieces[1]]
        letter = self.tokens.text[token : token + 1].lower()  # of ASCII
        if letter.isalnum() or letter == b"'" or letter >= b"\x80":
            self.words[0] += letter
        elif self.words[0]:
            word, before, _, long = self.words
            self.words = [b"", word, before, word if len(word) > 3 else long]
        if self.length and self.history[self.match] == token:
            self.match, self.length = self.match + 1, self.length + 1
        else:
            self.length = 0
        recent, end = tuple(self.history[-7:]), len(self.history)
        if end < 7:
            return
        before = self.repeats.get(recent)
        if not self.length and before:
            length = 7  # these are the key
            while (
                length < min(32, before)
                and self.history[before - 1 - length] == self.history[end - 1 - length]
            ):
                length += 1
            self.match, self.length = before, length
        self.repeats[recent] = end


@pytest.mark.parametrize(
    "vocab, size, joins, experts",
    [
        (2000, 25, 9, "medium"),
        (50, 150, 0, "medium"),
        (50, 150, 70, "large"),
        (50, 90, 90, "small"),
        (9, 90, 0, "small"),
    ],
)
def test_the_slow_version_agrees(vocab, size, joins, experts):
    """The net takes part from token `joins` on, as after priming."""
    text, logs = some_text(size, vocab, seed=8), rows(size, vocab)
    fast, slow = mixer(vocab, size, 64, experts), Slow(vocab, 64, experts)
    parts = [fast.code(text[:joins]), None]
    parts[1] = fast.code(text[joins:], logs[joins:])
    net, want = (np.exp(np.minimum(logs, 0)) * F(1 << 30)).astype(np.uint32), []
    for i, v in enumerate(text.tolist()):
        if i == joins:
            slow.join()
            slow.worth.clear()
        want.append(slow.code(v, net[i] if i >= joins else None))
    assert np.abs(np.concatenate(parts) - np.array(want)).max() < 1e-9
    for name in ("weights", "visits", "maps"):
        mine, its = getattr(fast.state, name), getattr(slow, name)
        if joins == size and name != "maps":
            mine, its = mine[0], its[0]
        assert (mine == its).all(), name
    del slow.worth["mix"]
    if joins < size:
        assert fast.worth() == pytest.approx(slow.worth, abs=1e-4)
        assert max(map(abs, slow.worth.values())) > 1
    assert vocab > size or len(slow.repeats) < size - 6  # some passages came back


def test_experts_have_keys_of_their_own():
    """Also where the token before is one of the first ids."""
    m = mixer()
    m.state.marks["tokens"], m.state.history[:9] = 9, 7
    for contexts in (t.SLOT_CONTEXTS, t.CANDIDATE_CONTEXTS):
        table, keys = t.context_rows(contexts, ((0, 4), (0, 4))), {}
        made = np.zeros(len(contexts), np.uint64)
        for last in range(50):
            for word in (0, 1, 5, 1 << 40):
                m.state.history[8], m.state.marks["pieces"] = last, (word, 3)
                m.state.marks["words"] = word, 4, 5, 6
                t.context_keys(m.fixed, m.state, table, made)
                for a, key in enumerate(made.tolist()):
                    assert keys.setdefault(key, a) == a, f"{contexts[a]} after token {last}"


def test_words_have_hashes_of_their_own():
    words = set()
    for v in range(50):
        if v != BOS:
            m = mixer()
            m.code(np.array([BOS, v]))
            words.add(int(m.state.marks["pieces"][0, 0]))
    assert len(words) == 49 and 0 not in words


def test_words_are_those_of_the_text_in_lower_case():
    """Whatever pieces they were cut into, and in the order of Context.words."""
    texts = [
        b"",
        b" The",
        b" the",
        b"THE",
        b" ",
        b"re",
        b"fore",
        b".",
        b" don't",
        b" a",
        "\xe9".encode(),
    ]
    sizes, flags = np.array([len(text) for text in texts], np.uint16), np.zeros(11, bool)
    tokens = t.Tokenizer(sizes, flags, flags.copy(), 0, True, "", b"".join(texts))
    m = t.LogisticMixer(tokens, np.arange(11), 99, 1)

    def words(*ids):
        m.code(np.array([0, *ids]))
        return m.state.marks["words"][0].tolist(), int(m.state.marks["letters"][0])

    (the, *rest), size = words(1)
    assert size == 3 and rest == [0, 0, 0] and the
    assert words(2)[0][0] == words(4, 3)[0][0] == the
    (therefore, *_), size = words(1, 5, 6)
    assert size == 9 and therefore not in (0, the)
    assert words(1, 5, 6, 7)[0] == [0, therefore, 0, therefore]
    found, size = words(1, 5, 6, 7, 9, 4, 2)
    assert found[0] == the and found[2] == found[3] == therefore and size == 3
    assert words(8)[1] == 5 and words(10)[1] == 2  # an apostrophe, and what is not ASCII


def test_a_net_that_knows_nothing_costs_nothing():
    """No more than a nat per level of the tree: the judge that hears it is hardly trusted."""
    text = some_text(1800)
    m = mixer(capacity=1800)
    m.code(text[:600])
    wrong = np.full((50, 50), -9.0, np.float32)
    wrong[np.arange(50), np.arange(50)] = np.log1p(-49 * np.exp(-9.0))
    shifts = np.resize(np.arange(1, 8), 1200)  # from always the same one, something is learned
    logs = wrong[(text[600:] + shifts) % 50]  # sure of another token
    contexts, mixed = m.code(text[600:], logs).sum(axis=0)
    assert mixed < contexts + m.fixed.levels


def test_the_hashed_map_knows_the_token_before():
    apm, seen, rows = np.zeros((2, 64 + (1 << 16), 33), np.uint32), set(), set()
    nodes = np.flatnonzero(np.diff(blank(64).fixed.decision, prepend=-1) > 0)
    assert len(nodes) == 63
    for before in range(50):
        for node in nodes:
            by_node, hashed = apm_rows(64, apm, before, node)
            assert 0 <= by_node < 63 and 64 <= hashed < 64 + (1 << 16)
            seen.add(hashed)
            rows.add(by_node)
    assert len(seen) > 0.9 * 50 * 63 and len(rows) == 63


# --------------------------------------------------------------------------------------------------
# Three trees


def group(vocab=50, capacity=1000):
    first = shuffled(vocab)
    leaves = first, first[::-1].copy(), np.roll(first, vocab // 3)
    return t.MixerGroup([t.LogisticMixer(facts(vocab), x, capacity, 1) for x in leaves])


@pytest.mark.parametrize("shares", [[65536, 40000], [65536, 1, 65535], t.even_shares(5)])
def test_a_choice_costs_what_it_is_worth_and_comes_back(shares):
    """shares[i] is of i among 0 .. i, so P(i) is that times what i + 1 and all above leave."""
    left = np.cumprod([1, *(1 - np.array(shares[:0:-1]) / 65536)])[::-1]  # of 0 .. i, all n
    worth = -np.log2(left * np.array([1, *(np.array(shares[1:]) / 65536)]))
    assert np.exp2(-worth).sum() == pytest.approx(1)
    for which in range(len(shares)):
        state, buffer = np.array([t.Stack.FIRST, 0], np.uint64), np.zeros(9000, np.uint8)
        for _ in range(1000):
            t.put_choice(state, buffer, which, shares)
        held = 8 * int(state[1]) + math.log2(int(state[0])) - 16
        assert held == pytest.approx(1000 * worth[which], rel=1e-3, abs=2)
        assert {t.take_choice(state, buffer, shares) for _ in range(1000)} == {which}
        assert state.tolist() == [t.Stack.FIRST, 0]


def test_shares_are_of_each_among_those_up_to_it():
    p = np.array([0.2, 0.05, 0.15, 1e-9])
    want = p / np.cumsum(p) * 65536
    got = t.shares_so_far([np.array([[0.0, nats]]) for nats in -np.log(p)])
    np.testing.assert_allclose(got[1:], [*want[1:3], 1], atol=0.51)
    assert t.shares_so_far([np.array([[0.0, nats]]) for nats in (30, 0)])[1] == 65535


@pytest.mark.parametrize("kind", ["uniform", "extreme"])
def test_a_stack_gives_back_what_was_put_there_last(kind):
    """And holds it in as many bits as it is worth."""
    rng, n = np.random.default_rng(2), 3000
    p = rng.integers(1, 65536, n) if kind == "uniform" else rng.choice([1, 2, 65534, 65535], n)
    bits = (rng.integers(0, 65536, n) < p).astype(int)
    state, buffer = np.array([t.Stack.FIRST, 0], np.uint64), np.zeros(3 * n, np.uint8)
    for probability, bit in zip(p.tolist(), bits.tolist(), strict=True):
        t.push_bit(state, buffer, probability, bit)
    worth = -np.log2(np.where(bits, p, 65536 - p) / 65536).sum()
    held = 8 * int(state[1]) + math.log2(int(state[0])) - 16
    assert worth - 1 < held < worth * 1.001 + 17
    for probability, bit in zip(p.tolist()[::-1], bits.tolist()[::-1], strict=True):
        assert t.pop_bit(state, buffer, probability) == bit
    assert state.tolist() == [t.Stack.FIRST, 0]


@pytest.mark.parametrize("with_net", [False, True])
def test_a_group_costs_the_mean_of_its_mixers_probabilities(with_net):
    """Whether a thread helps or not, and however the text is cut."""
    text, logs, several = some_text(400), rows(400, 50) if with_net else None, group()
    alone = [m.code(text, logs) for m in group().mixers]
    want = -np.log(np.mean(np.exp([-nats for nats in alone]), axis=0))
    cuts = [0, 150, 160, 161, 400]
    parts = [
        several.code(text[a:b], None if logs is None else logs[a:b])
        for a, b in itertools.pairwise(cuts)
    ]
    np.testing.assert_allclose(np.concatenate(parts), want, rtol=1e-12)
    assert several.learned == 400 and len(several.state) == 3 * len(t.Past._fields)


@pytest.mark.parametrize("with_net", [False, True])
def test_a_groups_code_is_as_long_as_it_costs(with_net):
    """And is read back one token at a time, or more."""
    text, logs = some_text(500), rows(500, 50) if with_net else None
    writer, reader, scorer = group(), group(), group()
    stack, read = t.Stack(), np.zeros(500, np.int64)
    nats = writer.code(text, logs, stack)
    code = stack.finish()
    assert (nats == scorer.code(text, logs)).all()
    bits = nats[:, 1].sum() / math.log(2)
    assert bits - 8 < 8 * len(code) < 1.001 * bits + 32  # the choices alone are 792 bits
    stack = t.Stack(code)
    for a, b in itertools.pairwise([0, 1, 2, 90, 500]):
        assert stack.surplus() < 0
        part = None if logs is None else logs[a:b]
        assert (reader.code(read[a:b], part, stack) == nats[a:b]).all()
    assert (read == text).all() and stack.surplus() == 0
    assert_same_states(reader, scorer)


def assert_same_states(a, b):
    for one, two in zip(a.all(), b.all(), strict=True):
        assert_same_state(one, two)


def test_a_stack_that_is_cut_or_changed_is_not_used_up():
    text, stack = some_text(200), t.Stack()
    group().code(text, None, stack)
    code = stack.finish()
    for bad in (code[:-1], code[1:], code + b"\x01", bytes([code[0] ^ 4]) + code[1:]):
        stack = t.Stack(bad)
        group().code(np.zeros(200, np.int64), None, stack)
        assert stack.surplus() < 0


@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("decodes", [False, True])
def test_packed_text_is_the_first_mixers_code(decodes, along):
    """The others read along or later, and are not behind when they are asked."""
    text, packer, alone = some_text(900), group(), group()
    packer.along, coder, only = along, t.Coder(), t.Coder()
    for part in np.array_split(text, 3):
        packer.code(part, None, coder)
    alone.mixers[0].code(text, None, only)
    for other in alone.mixers[1:]:
        other.code(text)
    assert along or [m.learned for m in packer.mixers] == [900, 0, 0]
    code = coder.finish()
    assert code == only.finish()
    if decodes:
        packer, coder = group(), t.Coder(code)
        packer.along = along
        read = np.zeros(900, np.int64)
        for a in range(0, 900, 300):
            packer.code(read[a : a + 300], None, coder)
            assert (read[a : a + 300] == text[a : a + 300]).all()
            read[a : a + 300] = 1  # the caller may use it for something else
        assert packer.text_sha256() == alone.text_sha256()
    assert_same_states(packer, alone)


@pytest.mark.parametrize("code", [None, b"some code"])
def test_the_first_of_a_group_codes_while_the_others_read(code):
    """Which may be so many parts behind."""
    several, begin, coder = group(), threading.Event(), t.Coder(code)
    reads = [thread.submit(begin.wait, 5) for thread in t.other_threads()]
    for part in np.array_split(some_text(90), t.BEHIND):
        several.code(part, None, coder)
    begin.set()
    assert all(read.result() for read in reads)  # none has waited in vain
    several.code(some_text(9), None, coder)
    assert len(several.reading) == t.BEHIND
    assert [m.learned for m in several.all()] == [99, 99, 99]
    assert len({m.text_sha256() for m in several.mixers}) == 1


def test_the_others_catch_up_in_parts():
    several, text = group(capacity=40_000), some_text(2 * t.PACK_CHUNK + 5)
    several.along = False
    several.code(text, None, t.Coder())
    steps = several.catch_up()
    assert next(steps) == several.mixers[1].learned == t.PACK_CHUNK
    assert list(steps) == [2 * t.PACK_CHUNK, len(text)] and not list(several.catch_up())
    assert len({m.text_sha256() for m in several.mixers}) == 1


def test_a_group_goes_back_to_what_was_saved():
    several, text = group(), some_text(300)
    several.code(text[:200], rows(200, 50))
    saved = several.save()
    before = [m.text_sha256() for m in several.mixers]
    for size in (1, 70):
        nats = several.code(text[200 : 200 + size], rows(size, 50))
        several.restore(saved)
        assert [m.text_sha256() for m in several.mixers] == before
        assert (several.code(text[200 : 200 + size], rows(size, 50)) == nats).all()
        several.restore(saved)


def test_an_expert_of_a_group_is_worth_the_mean_of_what_it_is_worth_to_each():
    several, text = group(), some_text(300)
    several.code(text, rows(300, 50))
    each = [m.worth() for m in several.mixers]
    assert each[0] != each[1] != each[2]
    for name, worth in several.worth().items():
        assert worth == pytest.approx(np.mean([e[name] for e in each]), rel=1e-12)


# --------------------------------------------------------------------------------------------------
# The tree


@pytest.mark.parametrize("vocab", [2, 3, 50, 64, 65, 200])
def test_the_tree_has_a_leaf_for_each_token(vocab):
    leaf = t.token_tree(some_text(4000, max(vocab, 9)) % vocab, vocab)
    inside = np.bincount(leaf, minlength=1 << t.tree_levels(vocab))
    assert leaf.dtype == np.int64 and inside.max() == 1 and inside.sum() == vocab
    assert len(inside) == 1 << t.tree_levels(vocab)
    while len(inside) > 1:  # no right side has tokens where the left one has none
        inside = inside.reshape(-1, 2)
        assert (inside[:, 0] >= np.minimum(inside[:, 1], 1)).all()
        inside = inside.sum(axis=1)


def test_alike_tokens_are_adjacent():
    """Four kinds of 16 tokens; what follows depends on the kind alone."""
    rng, kind = np.random.default_rng(0), np.random.default_rng(1).permutation(64) % 4
    text = [0]
    for _ in range(30_000):
        following = (kind[text[-1]] + (rng.random() < 0.2)) % 4 ^ 1
        text.append(rng.choice(np.flatnonzero(kind == following)))
    leaf = t.token_tree(np.array(text), 64)
    for part in range(4):
        assert len(set(kind[leaf // 16 == part])) == 1


# --------------------------------------------------------------------------------------------------
# Packing


def new_packer(text, budget, vocab=50, held=0, **env):
    """A packer of text in two shards, the first longer than a call of the kernel takes."""
    cut, paths = len(text) * 9 // 10, ["first.bin", "second.bin"]
    data = SimpleNamespace(shards=[text[:cut], text[cut:]], paths=paths, held=held)
    cfg = tiny_knobs(MIXER_MEMORY_MB=1, **env)
    return t.Packer(data, facts(vocab), cfg, budget, t.Workers(1))


def unpredictable(size, vocab):
    """The worst text: nothing of it can be predicted. (size,) uint16."""
    return np.random.default_rng(0).integers(0, vocab, size).astype(np.uint16)


@pytest.mark.parametrize("budget", [0, 7, 1001, 5000])
@pytest.mark.parametrize("vocab, size", [(50, "medium"), (600, "medium"), (50, "large")])
def test_packed_text_fits_and_is_the_texts_beginning(vocab, size, budget):
    text = some_text(40_000).astype(np.uint16) if vocab == 50 else unpredictable(40_000, vocab)
    packer = new_packer(text, budget, vocab, MIXER_SIZE=size)
    packer.start(0.0)
    assert packer.ended.is_set()  # no clock: all is packed before the first step
    packed = packer.finish()
    assert packer.workers.reserved == 0
    # An empty code still has the byte that lies in its interval.
    assert max(budget - 30, 0) < len(packed.code) <= max(budget, 1)
    assert 0 < packed.token_count < len(text) or budget < 8
    beginning = text[: packed.token_count].astype("<i4").tobytes()
    assert packed.sha256 == hashlib.sha256(beginning).hexdigest()
    mixers = getattr(packer.mixer, "mixers", [packer.mixer])
    assert len(packed.leaves) == len(mixers) == (3 if size == "large" else 1)
    different = {leaf.tobytes() for leaf in packed.leaves}
    assert len(different) == len(mixers) or budget < 8
    room = len(mixers[0].state.history) - 1
    decoded = t.new_context_model(packer.cfg, facts(vocab), packed.leaves, room)
    t.unpack(decoded, packed, "")
    assert decoded.learned == packed.token_count
    for a, b in zip(decoded.state, packer.mixer.state, strict=True):
        assert a.tobytes() == b.tobytes()


def test_packing_that_was_interrupted_twice_keeps_its_code():
    """The second time before it began: what a checkpoint had is what is packed."""
    text = some_text(40_000).astype(np.uint16)
    first = new_packer(text, 3000, held=700)
    first.start(0.0)
    first.wait()
    again = new_packer(text, 3100, held=700)  # as if a little more room were left
    again.set_state(first.state()["packed"])
    again.deadline = 0.0  # as of one whose training was interrupted
    packed = again.finish()
    assert packed.token_count == first.count > 0
    t.unpack(t.new_context_model(again.cfg, facts(50), packed.leaves, 40_000), packed, "")


def test_all_of_a_text_is_packed_where_it_fits():
    text = some_text(40_000).astype(np.uint16)
    packer = new_packer(text, 10**6)
    packer.start(0.0)
    packed = packer.finish()
    assert packed.token_count == len(text) > 2 * t.PACK_CHUNK and len(packed.code) < 10**5
    assert packed.sha256 == hashlib.sha256(text.astype("<i4").tobytes()).hexdigest()
    # What scores next, a message, still has room.
    packer.mixer.code(some_text(t.MESSAGE_TOKENS + 1))


@pytest.mark.parametrize("budget, rehearsed", [(0, 0), (4, 0), (600, 120), (5000, 1000),
                                               (10**6, 1500)])  # fmt: skip
def test_the_rehearsal_comes_first_and_has_its_own_code(budget, rehearsed):
    """What is kept from the net for it, and more than a fifth of the budget, is packed as text."""
    text = some_text(40_000).astype(np.uint16)
    packer = new_packer(text, budget, held=1500)
    packer.start(0.0)
    packed = packer.finish()
    assert packed.total()[1] <= max(budget, 1)
    assert (packed.rehearsal.token_count if packed.rehearsal else 0) == rehearsed
    at = 0
    for part in packed.parts():
        own = text[at : at + part.token_count].astype("<i4").tobytes()
        assert part.sha256 == hashlib.sha256(own).hexdigest()
        if part is packed.rehearsal:
            assert t.rehearsal_text(part, facts(50)).astype("<i4").tobytes() == own
        else:
            t.unpack(t.LogisticMixer(facts(50), part.leaves[0], 40_000, 1), part, "")
        at += part.token_count
    if budget == 10**6:
        assert packed.token_count == len(text) - 1500
        packer.mixer.code(some_text(1500 + t.MESSAGE_TOKENS + 1))  # there is room for both


def test_text_that_is_not_what_was_packed_is_caught():
    """As on a machine whose arithmetic differs in the last bit."""
    text, m, coder = some_text(900), mixer(), t.Coder()
    m.code(text, None, coder)
    packed = t.PackedText(shuffled(50)[None], 900, m.text_sha256(), coder.finish())
    assert m.text_sha256() == hashlib.sha256(text.astype("<i4").tobytes()).hexdigest()
    t.unpack(mixer(), packed, "")
    other = mixer()
    other.state.weights[:] *= np.float32(1 + 2**-20)
    with pytest.raises(t.AuditFailed, match="paid text"):
        t.unpack(other, packed, "")


@pytest.mark.parametrize("which", [1, 2])
def test_what_the_other_trees_have_read_is_checked_too(which):
    """The first one alone reads the code."""
    text, writer, reader = some_text(900), group(), group()
    coder = t.Coder()
    writer.code(text, None, coder)
    packed = t.PackedText(np.zeros((3, 50)), 900, writer.text_sha256(), coder.finish())
    t.unpack(group(), packed, "")
    reader.mixers[which].code(text[:1])
    with pytest.raises(t.AuditFailed, match="paid text"):
        t.unpack(reader, packed, "")


def test_packing_stops_with_the_clock(monkeypatch):
    calls = []

    def time_left(self):
        calls.append(0)
        return 100.0 if len(calls) < 3 else 0.0

    monkeypatch.setattr(t.Packer, "time_left", time_left)
    packer = new_packer(some_text(100_000).astype(np.uint16), 10**6, MAX_WALLCLOCK_SECONDS=200)
    packer.start(0.0)
    assert packer.finish().token_count == 2 * t.PACK_CHUNK


def test_the_clock_starts_where_training_has_got_to():
    packer = new_packer(some_text(100_000).astype(np.uint16), 10**6, MAX_WALLCLOCK_SECONDS=200)
    packer.start(150.0)
    assert 0 < packer.time_left() <= 50
    assert packer.finish().token_count == 100_000
    late = new_packer(some_text(100_000).astype(np.uint16), 10**6, MAX_WALLCLOCK_SECONDS=200)
    late.start(200.0)
    assert late.finish().token_count == 0


def test_a_worker_rests_while_text_is_packed(monkeypatch):
    packer = new_packer(some_text(1000).astype(np.uint16), 10**6)
    seen, pack = [], packer.pack
    monkeypatch.setattr(packer, "pack", lambda: (seen.append(packer.workers.reserved), pack()))
    packer.start(0.0)
    assert seen == [1] and packer.workers.reserved == 0


@pytest.mark.parametrize("clock, cpu, along", [(60, True, 0), (60, False, 1), (0, True, 1)])
def test_the_other_trees_wait_for_a_cpu_that_trains(clock, cpu, along, monkeypatch):
    """And what a checkpoint has is learned again without them, too."""
    text, env = some_text(20_000).astype(np.uint16), {"MAX_WALLCLOCK_SECONDS": clock}
    monkeypatch.setattr(t, "on_cpu", lambda: cpu)
    packer = new_packer(text, 10**6, MIXER_SIZE="large", **env)
    packer.start(0.0)
    packer.wait()
    again = new_packer(text, 10**6, MIXER_SIZE="large", **env)
    again.set_state(packer.state()["packed"])
    again.start(0.0)
    again.wait()
    for mixer in (packer.mixer, again.mixer):
        mixer.wait()
        assert [m.learned for m in mixer.mixers] == [20_000, *2 * [along * 20_000]]


@pytest.mark.parametrize("clock", [0, 60])
def test_what_goes_wrong_in_the_thread_is_raised(clock):
    """Before training where no clock runs, else when the text is asked for."""
    text = some_text(1000).astype(np.uint16)
    text[-1] = 50  # beyond the vocabulary
    packer = new_packer(text, 5000, MAX_WALLCLOCK_SECONDS=clock)
    wrong = pytest.raises(t.UserError, match=r"second\.bin: token 50")
    if clock:
        packer.start(0.0)
        with wrong:
            packer.finish()
    else:
        with wrong:
            packer.start(0.0)
    assert packer.workers.reserved == 0


# --------------------------------------------------------------------------------------------------
# Memory ahead


def test_prefetch_is_an_instruction_that_reads_nothing():
    """And not a load, for which the next instructions would wait."""
    prefetch = t.prefetch

    @t.load_numba().njit("void(uint32[:, ::1], int64)", _nrt=False)
    def ahead(table, i):
        prefetch(table, i, 2)

    (code,) = ahead.inspect_asm().values()
    assert re.search(r"prefetcht0\s+8\(", code) or re.search(r"prfm\s+pldl1keep", code), code
    table = np.arange(12, dtype=np.uint32).reshape(3, 4)
    ahead(table, 1 << 40)  # far outside
    assert table.reshape(-1).tolist() == list(range(12))


def test_all_rows_that_a_decision_reads_are_asked_for(monkeypatch):
    """`prepare` as plain Python: the cache lines that it names are those of the rows."""
    text, m = some_text(600), mixer(capacity=600)
    m.code(text)
    level, lines = t.SLOT_LEVELS, set()
    nodes = range(1 << level, 2 << level)
    node = next(n for n in nodes if m.fixed.inside[2 * n] and m.fixed.inside[2 * n + 1])

    def address(array, *at):
        return array.ctypes.data + sum(i * step for i, step in zip(at, array.strides, strict=True))

    def chosen(choose):
        return lambda fixed, past, _, *where: choose(fixed, past, m.now[0], *where)

    for name in ("choose_rows", "choose_apm_rows"):
        monkeypatch.setattr(t, name, chosen(getattr(t, name)))
    monkeypatch.setattr(t, "touch_rows", t.touch_rows.function)
    monkeypatch.setattr(t, "prefetch", lambda *at: lines.add(address(*at) // 64))
    m.now["judges"] = 2
    t.prepare.function(m.fixed, m.state, m.now.view(np.recarray)[0], level, node)
    now = m.now[0]
    read = [m.state.slots[at : at + t.WAYS] for at in now["slot"][level]]
    for judge in range(2):
        read.append(m.state.apm[judge, now["apm_rows"][level, 1]])
        for row in now["set_rows"][level]:
            read += [m.state.weights[judge, row], m.state.visits[judge, row : row + 1]]
    expected = set()
    for rows in read:
        first = rows.ctypes.data
        expected |= set(range(first // 64, (first + rows.nbytes - 1) // 64 + 1))
    assert lines == expected
