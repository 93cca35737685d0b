"""What must hold for any input: drawn by hypothesis, held against NumPy and plain Python."""

import dataclasses
import functools
import itertools
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from conftest import t, tiny_knobs, write_shard
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from test_audit import LOGISTIC, load, write_message
from test_audit import message as message_of
from test_faults import MUTATIONS, altered

mx = t.mx
# The same examples everywhere; folders of a test may be shared by its examples.
checked = functools.partial(
    settings, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def one_line(error):
    """The text of a refusal, which is one line."""
    (line,) = str(error).splitlines()
    return line


# --------------------------------------------------------------------------------------------------
# Training windows


def numbered_shards(folder, sizes):
    """Shards whose tokens count on from one to the next; returns (paths, tokens of each)."""
    for old in folder.glob("*.bin"):
        old.unlink()
    ends = np.cumsum([0, *sizes])
    texts = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
    for i, text in enumerate(texts):
        write_shard(folder / f"x_train_{i:06d}.bin", text)
    return t.find_shards(folder, "train"), texts


@checked(max_examples=60)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=6),
    st.integers(2, 12),
    st.integers(0, 2**31 - 1),
    st.data(),
)
def test_training_windows(tmp_path, sizes, seq_len, seed, data):
    """Each window of an epoch once, equal to a slice of its shard; steps need no past."""
    counts = [max(size - 1, 0) // seq_len for size in sizes]
    paths, texts = numbered_shards(tmp_path, sizes)
    if not sum(counts):
        with pytest.raises(t.UserError, match="hold no window"):
            t.TrainWindows(paths, seq_len, seed, 1 << 16)
        return
    windows = t.TrainWindows(paths, seq_len, seed, 1 << 16)
    assert (windows.windows, windows.tokens) == (sum(counts), sum(sizes))
    epochs = [windows.step(epoch, sum(counts)).tolist() for epoch in range(3)]
    for rows in epochs:
        seen = {i: [] for i, count in enumerate(counts) if count}
        for row in rows:
            (shard,) = (i for i, text in enumerate(texts) if row[0] in text)
            at = row[0] - texts[shard][0]
            assert row == texts[shard][at : at + seq_len + 1]
            seen[shard].append(at)
        for shard, starts in seen.items():
            first = min(starts)
            assert sorted(starts) == [first + seq_len * i for i in range(counts[shard])]
    flat = [row for rows in epochs for row in rows]
    size = data.draw(st.integers(1, max(len(flat) // 2, 1)))
    steps = data.draw(st.permutations(range(len(flat) // size)))[:6]
    fresh = t.TrainWindows(paths, seq_len, seed, 1 << 16)
    for number in steps:
        assert fresh.step(number, size).tolist() == flat[number * size : number * size + size]


def test_seeds_and_epochs_have_orders_of_their_own(tmp_path):
    paths, _ = numbered_shards(tmp_path, [2000, 1001])
    orders = set()
    for seed in range(5):
        data = t.TrainWindows(paths, 10, seed, 1 << 16)
        for epoch in range(4):
            orders.add(tuple((data.step(epoch, data.windows)[:, 0] // 10).tolist()))
    assert len(orders) == 20


# --------------------------------------------------------------------------------------------------
# Evaluation windows


class Echo:
    """A net whose logits tell what it was given: 0, the input, the window's first, how many."""

    bos, state, tok_emb = 0, (), np.zeros((4, 1))

    def logits(self, x, last):
        x = np.array(x)
        place = np.broadcast_to(np.arange(x.shape[1]), x.shape)
        out = np.stack([0 * x, x, np.broadcast_to(x[:, :1], x.shape), place], axis=-1)
        return mx.array(out[:, -last:].astype(np.float32))


@pytest.fixture(scope="module")
def two_workers():
    with t.Workers(2) as workers:
        yield workers


@checked(max_examples=150)
@given(
    st.integers(2, 250),
    st.integers(2, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.integers(1, 20),
    st.booleans(),
    st.lists(st.integers(1, 59), max_size=4, unique=True),
)
def test_evaluation_windows(two_workers, length, shape, batch, shared, cuts):
    """Every target once, in order, by its true context, long enough wherever there is text."""
    (seq_len, stride), text = shape, np.arange(1, length + 1)
    cuts = sorted(cut for cut in cuts if cut <= min(seq_len, length - 1))
    workers = two_workers if shared else t.Workers(1)
    target = 0
    for first, rows in t.net_rows(Echo(), text, (seq_len, stride, batch), workers, cuts):
        assert first == target and rows.shape[1] == 4 and len(rows)
        np.testing.assert_allclose(np.exp(rows.astype(np.float64)).sum(axis=1), 1, atol=1e-4)
        for row in rows:
            given, begin, place = np.round(row[1:] - row[0]).astype(int).tolist()
            assert given == text[target]  # the last of the context, and nothing beyond it
            assert begin == given - place  # a window of the text as it stands
            assert min(seq_len - stride, target + 1) <= place + 1 <= seq_len
            target += 1
    assert target == length - 1


# --------------------------------------------------------------------------------------------------
# Byte counts

CORPUS = [
    "the cat sat on the mat",
    "a  dog's  tail",
    "naïve café 日本語 🙂",
    "x=1;\ty = 22\n",
    "of the",
]
letters = st.sampled_from("abcdet  \u2581\n\té日🙂\u0301\u200d\x00<>") | st.characters(
    exclude_categories=["Cs"]
)
# Decoding takes all spaces away from a text's start; a literal U+2581 there is read as one.
documents = st.text(letters, max_size=24).map(lambda x: re.sub(r"^\s*\u2581[\s\u2581]*", "", x))
options = st.fixed_dictionaries(
    {
        "model_type": st.sampled_from(["bpe", "unigram"]),
        "vocab_size": st.sampled_from([460, 500]),
        "add_dummy_prefix": st.booleans(),
        "remove_extra_whitespaces": st.booleans(),
        "split_by_whitespace": st.booleans(),
        "split_digits": st.booleans(),
        "normalization_rule_name": st.sampled_from(["identity", "nmt_nfkc", "nfkc_cf"]),
        "user_defined_symbols": st.sampled_from([[], ["<x>", "é"], ["\u2581\u2581", "at"]]),
        "control_symbols": st.sampled_from([[], ["<c>"]]),
        "bos_id": st.sampled_from([1, -1]),
    }
)


def trained(path, texts, **options):
    """(SentencePiece model, the script's facts of it), trained on texts."""
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 12), model_prefix=str(path.with_suffix("")),
        hard_vocab_limit=False, num_threads=1, minloglevel=3, **options,
    )  # fmt: skip
    return spm.SentencePieceProcessor(model_file=str(path)), t.load_tokenizer(path)


def counted(facts, ids):
    """Bytes of documents by the table, each behind a control token: the script's own way."""
    control = int(np.flatnonzero(facts.control)[0])
    flat = np.array([x for document in ids for x in (control, *document)])
    return int(facts.bytes_of(flat[:-1], flat[1:]).sum())


@checked(max_examples=40)
@given(options, st.lists(documents, min_size=1, max_size=6), st.lists(documents, max_size=6))
def test_bytes_of_any_tokenizer(tmp_path, options, texts, more):
    """With byte fallback every text has a count, and it is what the decoded text has."""
    more = [x for text in more for x in text.splitlines() if x.strip("\x00\u2581 ")]
    model, facts = trained(tmp_path / "t.model", CORPUS + more, byte_fallback=True, **options)
    ids = [model.encode(text) for text in texts]
    true = [len(model.decode(document).encode()) for document in ids]
    assert [counted(facts, [document]) for document in ids] == true
    assert counted(facts, ids) == sum(true)
    if options["normalization_rule_name"] == "identity" and not options["remove_extra_whitespaces"]:
        plain = [text.replace("\u2581", " ") for text in texts]
        assert [model.decode(document) for document in ids] == plain


@checked(max_examples=10)
@given(st.booleans(), st.lists(st.text("abcdet \u2581", max_size=30), min_size=1, max_size=6))
def test_bytes_without_byte_fallback(tmp_path, prefix, texts):
    """Of what the tokenizer knows."""
    path = tmp_path / "t.model"
    model, facts = trained(path, ["abcd et", "a b c d e t"], vocab_size=24, model_type="bpe",
                           add_dummy_prefix=prefix, normalization_rule_name="identity")  # fmt: skip
    texts = [re.sub(r"^\s*\u2581[\s\u2581]*", "", text) for text in texts]
    ids = [model.encode(text) for text in texts]
    assume(not any(model.unk_id() in document for document in ids))
    true = sum(len(model.decode(document).encode()) for document in ids)
    assert counted(facts, ids) == true
    flat = np.array([x for document in ids for x in (model.bos_id(), *document)], np.int32)
    assert t.decoded_bytes(path, facts, flat) == (true, true)


# --------------------------------------------------------------------------------------------------
# The quantiser

magnitudes = st.floats(0, 2.0**120, width=32) | st.floats(0, 2.0**-120, width=32)
values = st.builds(lambda x, sign: sign * x, magnitudes, st.sampled_from([-1.0, 1.0]))
row_values = st.one_of(values, st.just(0.0), st.floats(-1, 1, width=32))
matrices = st.tuples(st.integers(1, 4), st.integers(1, 9)).flatmap(
    lambda shape: st.one_of(
        arrays_of.arrays(np.float32, shape, elements=row_values),
        arrays_of.arrays(np.float32, shape, elements=row_values, fill=row_values),
        st.tuples(row_values, st.just(shape)).map(lambda x: np.full(x[1], x[0], np.float32)),
    )
)
LEAST = 2.0**-126  # below it float32 has no full precision


def quantised(w, bits, search):
    """(codes, scale), as NumPy arrays of float64."""
    parts = t.quantise_rows(mx.array(w), bits, search)
    return [np.array(part).astype(np.float64) for part in parts]


@checked(max_examples=250)
@given(matrices, st.integers(4, 8))
def test_quantised_rows(w, bits):
    """Codes in range; the error half a step, or the clip; a search that is never worse."""
    limit, exact = 2 ** (bits - 1) - 1, w.astype(np.float64)
    top, errors = np.abs(exact).max(axis=1, keepdims=True), []
    for search in (False, True):
        codes, scale = quantised(w, bits, search)
        assert codes.shape == w.shape and scale.shape == (len(w), 1)
        assert (codes == np.round(codes)).all() and np.abs(codes).max() <= limit
        assert (scale >= 0).all() and np.isfinite(codes * scale).all()
        assert (scale.astype(np.float32).view(np.uint32) & 0xFFFF == 0).all()  # a bfloat16
        least = 0.65 if search else 1
        assert (scale <= top / limit * (1 + 2**-8) + LEAST).all()
        assert (scale >= top / limit * least * (1 - 2**-8) - LEAST).all()
        bound = np.maximum(scale / 2, np.abs(exact) - limit * scale)
        gap = np.abs(codes * scale - exact)
        assert (gap <= bound * (1 + 1e-5) + limit * LEAST).all()
        assert (gap[exact == 0] == 0).all()
        errors.append((gap**2).sum(axis=1))
    # Squares below what float32 holds are nothing to choose by, nor are those above it.
    small = w.shape[1] * (limit * LEAST) ** 2 + w.shape[1] * 2.0**-120
    fair = (top[:, 0] < 1e18) | (errors[1] == errors[0])
    assert (errors[1] <= errors[0] * (1 + 1e-4) + small)[fair].all()
    assert np.isfinite(errors).all()


@checked(max_examples=60)
@given(
    st.dictionaries(st.text(max_size=8), matrices, min_size=1, max_size=4),
    arrays_of.arrays(np.float32, arrays_of.array_shapes(min_dims=0, max_dims=3, max_side=4),
                     elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.integers(4, 8), st.integers(4, 8), st.booleans(),
)  # fmt: skip
def test_tensors_come_back_as_they_were_quantised(tensors, plain, weight_bits, embed_bits, search):
    """And those that are stored as they are, to the bit."""
    cfg = t.Knobs(weight_bits=weight_bits, embed_bits=embed_bits, use_gptq_lite=search)
    groups = {g.bits: g for g in t.GROUPS}
    kinds = dict(zip(tensors, ["weight_bits", "embed_bits", "weight_bits", ""], strict=False))
    params = {**tensors, " plain": plain}
    groups = {name: groups[kinds.get(name, "")] for name in params}
    rows, blobs = t.pack_tensors({n: mx.array(w) for n, w in params.items()}, groups, cfg)
    back = t.unpack_tensors(json.loads(json.dumps(rows)), b"".join(blobs))
    assert list(back) == list(params)
    for name, w in params.items():
        got, bits = np.array(back[name]), getattr(cfg, kinds.get(name) or "seed")
        assert got.dtype == np.float32 and got.shape == w.shape
        if not kinds.get(name):
            assert got.tobytes() == w.tobytes()
            continue
        codes, scale = quantised(w, bits, search)
        assert (got == (codes * scale).astype(np.float32)).all()


# --------------------------------------------------------------------------------------------------
# The coder

bits = st.integers(0, 1)
extreme = st.one_of(st.integers(1, 65535), st.sampled_from([1, 2, 32768, 65534, 65535]))
mild = st.integers(256, 65280)
decisions = st.lists(st.tuples(extreme, bits), max_size=500)
decisions |= st.lists(st.tuples(mild, bits), max_size=500)
repeated = st.tuples(decisions, st.integers(1, 40)).map(lambda x: (x[0][:25] * x[1])[:800])


def pieces(total, sizes):
    """0 .. total cut into pieces of these sizes, over and over."""
    at, i = 0, 0
    while at < total:
        yield at, min(at + sizes[i % len(sizes)], total)
        at, i = at + sizes[i % len(sizes)], i + 1


@checked(max_examples=120)
@given(decisions | repeated, *[st.lists(st.integers(1, 90), min_size=1, max_size=4)] * 2)
def test_any_decisions_come_back_from_their_code(decided, written, read):
    """However the two sides cut them; and the code is as long as the probabilities say.

    It is never longer. It may be shorter where a decision is all but impossible: in a narrow
    interval what is left for it is one number, which is more than its share.
    """
    coder = t.Coder()
    for a, b in pieces(len(decided), written):
        ends = coder.room(b - a)
        assert [t.code_bit(ends, p, bit) for p, bit in decided[a:b]] == [x for _, x in decided[a:b]]
        coder.flush()
    code, out = coder.finish(), []
    decoder = t.Coder(code)
    for a, b in pieces(len(decided), read):
        ends = decoder.room(b - a)
        out += [t.code_bit(ends, p, 0) for p, _ in decided[a:b]]
        decoder.flush()
    assert out == [bit for _, bit in decided]
    bits = -math.fsum(math.log2((p if bit else 65536 - p) / 65536) for p, bit in decided)
    assert 8 * len(code) <= 1.01 * bits + 16  # as exactly as a message has to be
    if all(256 <= p <= 65280 for p, _ in decided):
        assert 8 * len(code) >= 0.99 * bits - 16


# --------------------------------------------------------------------------------------------------
# Context models


def any_tree(tokens, leaves, rng):
    """Leaves for tokens in any tree in which no node has a right side alone: (n,) int64."""
    if leaves == 1:
        return [0] * tokens
    half = leaves // 2
    left = int(rng.integers(max(tokens - half, min(tokens, 1)), min(tokens, half) + 1))
    right = any_tree(tokens - left, half, rng) if tokens > left else []
    return [*any_tree(left, half, rng), *(half + leaf for leaf in right)]


@st.composite
def scored_texts(draw):
    """(tokenizer, leaves of a tree, text (n,), the net's rows (n, V)): all of them small."""
    vocab, size = draw(st.integers(2, 40)), draw(st.integers(2, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    few = rng.integers(0, vocab, draw(st.integers(1, 6)))  # so that contexts come back
    common = rng.random(size) < draw(st.sampled_from([0, 0.7, 1]))
    text = np.where(common, rng.choice(few, size), rng.integers(0, vocab, size)).astype(np.int64)
    flags = rng.random((2, vocab)) < 0.3
    tokenizer = t.Tokenizer(np.ones(vocab, np.uint16), *flags, int(rng.integers(vocab)), True, "")
    leaves = 1 << t.tree_levels(vocab)
    leaf = rng.permutation(any_tree(vocab, leaves, rng)).astype(np.int64)
    logits = rng.normal(size=(size, vocab)) * draw(st.sampled_from([0, 1, 10, 80]))
    logits[np.arange(size), text] += draw(st.sampled_from([0, 0, 12]))  # a net may know much
    logits -= logits.max(axis=1, keepdims=True)
    logs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    return tokenizer, leaf, text, logs


MODELS = {
    "logistic": {"MIXER": "logistic"},
    "kneser-ney": {"MIXER": "backoff", "NGRAM_ALPHA": "auto", "NGRAM_MAX_ORDER": 3},
    "laplace": {"MIXER": "backoff", "NGRAM_ALPHA": "0.5", "NGRAM_SMOOTHING": "laplace"},
    "off": {"MIXER": "off"},
}
each_model = pytest.mark.parametrize("name", MODELS)


def new_model(name, tokenizer, leaf, text):
    """A context model that has begun with the text's first token."""
    cfg = tiny_knobs(**MODELS[name], MIXER_MEMORY_MB=1)
    model = t.new_context_model(cfg, tokenizer, leaf[None], len(text) + 1)
    model.begin(int(text[0]))
    return model


@each_model
@checked(max_examples=25)
@given(scored_texts(), st.data())
def test_scores_of_all_tokens_sum_to_1(name, drawn, data):
    """From one state, at any place of any text, over any tree."""
    tokenizer, _, text, logs = drawn
    model = new_model(name, *drawn[:3])
    at = data.draw(st.integers(1, len(text) - 1))
    model.cost(text[1:at], logs[1:at])
    state, tried = model.save(), []
    for token in range(tokenizer.vocab):
        tried.append(model.cost(np.array([token]), logs[at : at + 1])[0])
        model.restore(state)
    tried = np.array(tried)
    assert np.isfinite(tried).all() and (tried >= 0).all()
    for column in tried.T:
        assert abs(math.fsum(np.exp(-column)) - 1) < 2e-6  # the net's rows are float32


@each_model
@checked(max_examples=25)
@given(scored_texts(), st.data())
def test_costs_depend_on_the_past_alone(name, drawn, data):
    """To the bit: not on later tokens and rows, on how the text is cut, or on what was tried."""
    tokenizer, _, text, logs = drawn
    at = data.draw(st.integers(1, len(text) - 1))
    whole = new_model(name, *drawn[:3]).cost(text[1:], logs[1:])
    other, other_logs = text.copy(), logs.copy()
    other[at:] = (other[at:] + data.draw(st.integers(1, 39))) % tokenizer.vocab
    other_logs[at + 1 :] = other_logs[at + 1 :][::-1]
    changed = new_model(name, *drawn[:3]).cost(other[1:], other_logs[1:])
    assert (whole[: at - 1] == changed[: at - 1]).all()
    model = new_model(name, *drawn[:3])
    first = model.cost(text[1:at], logs[1:at])
    state = model.save()
    kept = [array.copy() for array in state]
    model.cost(other[at:], other_logs[at:])
    model.restore(state)
    for mine, its, copy in zip(model.state, state, kept, strict=True):
        assert mine.tobytes() == its.tobytes() == copy.tobytes()
    rest = [model.cost(text[i : i + 1], logs[i : i + 1]) for i in range(at, len(text))]
    assert np.concatenate([first, *rest]).tobytes() == whole.tobytes()


@checked(max_examples=40)
@given(scored_texts(), st.booleans(), *[st.lists(st.integers(1, 30), min_size=1, max_size=3)] * 2)
def test_any_text_comes_back_from_its_code(drawn, with_net, written, read):
    """With the net or without, however the two sides cut it, at its cost in bits."""
    tokenizer, leaf, text, logs = drawn
    one, two = (t.LogisticMixer(tokenizer, leaf, len(text), 1) for _ in range(2))
    coder, nats, out = t.Coder(), [], np.zeros(len(text), np.int64)
    for a, b in pieces(len(text), written):
        nats.append(one.code(text[a:b].copy(), logs[a:b] if with_net else None, coder))
    code, again = coder.finish(), []
    decoder = t.Coder(code)
    for a, b in pieces(len(text), read):
        again.append(two.code(out[a:b], logs[a:b] if with_net else None, decoder))
    assert (out == text).all()
    assert np.concatenate(nats).tobytes() == np.concatenate(again).tobytes()
    bits = math.fsum(np.concatenate(nats)[:, 1]) / math.log(2)
    assert abs(8 * len(code) - bits) <= 0.01 * bits + 16
    for mine, its in zip(one.state, two.state, strict=True):
        assert mine.tobytes() == its.tobytes()


# --------------------------------------------------------------------------------------------------
# Shards

places = st.none() | st.integers(-80, 80) | st.sampled_from([-(2**63), 2**63, 10**18])


@checked(max_examples=200)
@given(st.lists(st.integers(0, 65535), max_size=60), st.lists(st.tuples(places, places)))
def test_a_slice_of_a_shard_is_numpys(tmp_path, tokens, slices):
    shard, whole = t.Shard(write_shard(tmp_path / "x_val_0.bin", tokens)), np.array(tokens, "<u2")
    assert len(shard) == len(tokens)
    for a, b in slices:
        got, want = shard[a:b], whole[a:b]
        assert got.dtype == want.dtype and got.tolist() == want.tolist()


def test_no_altered_shard_is_read(tmp_path):
    """Each length but its own; each bit of the header's three numbers."""
    path = write_shard(tmp_path / "x_val_0.bin", range(7))
    whole = path.read_bytes()
    others = [whole[:size] for size in range(len(whole))]
    others += [whole + bytes(size) for size in range(1, 9)]
    for bit in range(96):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        others.append(bytes(flipped))
    for raw in others:
        path.write_bytes(raw)
        with pytest.raises(t.UserError) as caught:
            t.Shard(path)
        assert one_line(caught.value).startswith(f"{path}: ")


@checked(max_examples=40)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 59))
def test_a_shard_that_shrinks_is_a_line(tmp_path, start, size, left):
    """Where it has been opened, and what is read is gone; what is there is still read."""
    path = write_shard(tmp_path / "x_val_0.bin", range(30))
    shard, stop = t.Shard(path), min(start + size, 30)
    path.write_bytes(path.read_bytes()[: 1024 + left])
    if start < stop and stop > left // 2:
        with pytest.raises(t.RunFailed) as caught:
            shard[start:stop]
        assert one_line(caught.value).startswith(f"{path}: ")
    else:
        assert shard[start:stop].tolist() == list(range(start, stop))


# --------------------------------------------------------------------------------------------------
# Knobs


def values_of(field):
    """Any value within a knob's bounds."""
    meta, kind = field.metadata, type(field.default)
    if kind is bool or meta["choices"]:
        return st.booleans() if kind is bool else st.sampled_from(meta["choices"])
    if kind is str:
        texts = {"run_id": "a|b-1.x", "ngram_alpha": "auto|0|1|.25|0.5|1.000|0."}
        return st.sampled_from(texts.get(field.name, "x|a b/c|é|=|auto").split("|"))
    if kind is int:
        return st.integers(meta["lo"], int(meta["hi"]))
    return st.floats(meta["lo"], meta["hi"])


@st.composite
def any_knobs(draw):
    """Values of some knobs, which may go together, by field name."""
    fields = {field.name: field for field in dataclasses.fields(t.Knobs)}
    names = set(draw(st.lists(st.sampled_from(sorted(fields)), max_size=40)))
    values = {name: draw(values_of(fields[name])) for name in sorted(names)}
    kv, group, half = (draw(st.integers(1, most)) for most in (6, 4, 60))
    values |= {"num_kv_heads": kv, "num_heads": kv * group, "model_dim": 2 * kv * group * half}
    values |= {"model_dim": min(values["model_dim"], 8192)}
    values |= {"run_id": "x", "eval_only": "x", "file": "x"}  # which some modes need
    assume(values["model_dim"] % (2 * kv * group) == 0 and values["model_dim"] >= 8)
    head = values["model_dim"] // (kv * group)
    values["rope_dims"] = 2 * draw(st.integers(0, head // 2))
    values["qk_gain_init"] = draw(st.floats(0, min(10, 80 / math.sqrt(head))))
    values["train_seq_len"] = draw(st.integers(2, 1 << 16))
    values["train_batch_tokens"] = draw(st.integers(values["train_seq_len"], 1 << 26))
    values["iterations"] = draw(st.integers(1, 10**18))
    values["engram_hash_size"] = draw(st.integers(0, 2048))
    return values


@checked(max_examples=150)
@given(any_knobs())
def test_settings_are_what_an_environment_says(values):
    """Written as text and read again nothing changes; an artifact keeps its part of it."""
    text = {True: "1", False: "0"}
    env = {n.upper(): text[v] if type(v) is bool else str(v) for n, v in values.items()}
    cfg, _ = t.knobs_from_env(env)
    changed = {"preset", "mixer", "ngram_mixer_enabled"}  # which others decide, too
    for name, value in values.items():
        if name not in changed:
            got = getattr(cfg, name)
            assert got == value and type(got) is type(value)
            assert math.copysign(1, got) == math.copysign(1, value) if type(got) is float else True
    written = t.settings_of(cfg, *t.SCOPES)
    assert all(type(value) is str for value in written.values())
    assert t.knobs_from_env(written) == (cfg, t.knobs_from_env(written)[1])
    kept = json.loads(json.dumps(t.settings_of(cfg, *t.KEPT_SCOPES)))
    assert set(kept) < set(written) and "" not in kept.values()
    t.check_kept(kept, Path("x"))
    back = t.knobs_from_env({}, kept)[0]
    assert t.settings_of(back, *t.KEPT_SCOPES) == kept


# --------------------------------------------------------------------------------------------------
# Checkpoints

numbers = st.sampled_from(["<f4", "<i4", "<u4", "<i8", "u1", "?", "<f2", "<u2"]).flatmap(
    lambda kind: arrays_of.arrays(
        kind, arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        elements={"allow_nan": False, "allow_infinity": False} if "f" in kind else None,
    )
)  # fmt: skip
key = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
kinds = key.filter(lambda kind: ":" not in kind)  # a file has KIND:NAME
tensor_names = st.one_of(key, st.builds("{}:{}".format, key, key))
tensors = st.dictionaries(tensor_names, numbers, min_size=1, max_size=3)
trees = st.dictionaries(kinds, tensors, min_size=1, max_size=3)
counters = st.dictionaries(key, st.integers() | st.floats(allow_nan=False), max_size=4)
json_facts = st.dictionaries(
    key.filter(lambda name: name != "counters"),
    st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=4),
    max_size=3,
)


def emptied(folder):
    """A run's folder without checkpoints."""
    for path in t.checkpoint_files(folder):
        path.unlink()
    return folder


def as_bytes(tree):
    """Nested arrays as what they are made of."""
    return {
        kind: {name: (np.array(a).dtype.str, np.array(a).shape, np.array(a).tobytes())
               for name, a in part.items()}
        for kind, part in tree.items()
    }  # fmt: skip


@checked(max_examples=80)
@given(trees, counters, json_facts)
def test_any_state_comes_back_from_its_checkpoint(tmp_path, tree, counts, facts):
    """To the bit."""
    emptied(tmp_path)
    assert t.read_checkpoint(tmp_path) is None
    state = {kind: {n: mx.array(a) for n, a in part.items()} for kind, part in tree.items()}
    t.write_checkpoint(tmp_path, (state, counts), facts)
    (arrays, counters), rest = t.read_checkpoint(tmp_path)
    assert as_bytes(arrays) == as_bytes(tree)
    assert counters == counts and rest == facts
    assert {n: type(x) for n, x in counters.items()} == {n: type(x) for n, x in counts.items()}


def test_no_altered_checkpoint_is_read(tmp_path):
    """Each bit of a small one, and each length: another state is never read, nor two lines said.

    With one before it, that is the one to go on from.
    """

    def state(step):
        weights = mx.arange(7.0) + step
        return {"params": {"a": weights, "b": mx.full((2, 3), step)}}, {"step": step}

    for step in (1, 2):
        t.write_checkpoint(tmp_path, state(step), {"text": "x"})
    newest, before = t.checkpoint_files(tmp_path)
    whole, old = newest.read_bytes(), before.read_bytes()
    saved = {step: (as_bytes(state(step)[0]), {"step": step}) for step in (1, 2)}
    others = [whole[:size] for size in range(len(whole))]
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        others.append(bytes(flipped))
    harmless = 0
    for number, raw in enumerate(others):
        newest.write_bytes(raw)
        (arrays, counters), _ = t.read_checkpoint(tmp_path)
        assert (as_bytes(arrays), counters) == saved[counters["step"]]
        harmless += counters["step"] == 2
        if number % 5 == 0 and counters["step"] == 1:
            before.unlink()
            with pytest.raises(t.UserError) as caught:
                t.read_checkpoint(tmp_path)
            assert one_line(caught.value).startswith(f"RESUME=1: {newest} is damaged: ")
            before.write_bytes(old)
    assert harmless < len(others) / 50


# --------------------------------------------------------------------------------------------------
# The message. MUTATIONS=20000 tries as many.

ODD = [None, -1, 0, 0.5, 10**12, 1e308, math.nan, "", "x", "nan", [], {}, [1], True, [[]]]


def forged(header, rng):
    """A message's header with one thing in it of another kind, missing, or of a list twice."""
    header = json.loads(json.dumps(header))
    place, name = header, rng.choice(list(header))
    if isinstance(header[name], list) and rng.random() < 0.7:
        place, name = header[name], rng.randrange(len(header[name]))
    kind = rng.choice(["odd", "odd", "gone", "twice"])
    if kind == "gone":
        del place[name]
    elif kind == "twice" and isinstance(place, list):
        place.append(place[name])
    else:
        place[name] = rng.choice(ODD)
    return json.dumps(header).encode()


@pytest.fixture
def decoder(tmp_path):
    """(a run with a message, what decodes a code: its outcome, by rows of the net made once).

    The rows are those of the true text, which a decoder has made as long as it was right.
    """
    write_message(tmp_path)
    ours = load(tmp_path, LOGISTIC)
    text = ours.text.tokens.astype(np.int64)
    header, _ = message_of(tmp_path)
    count, mixer = header["tokens"], ours.prime()
    mixer.begin(int(text[0]))
    parts = t.net_rows(ours.model, text, (16, 8, 3), ours.workers, range(count, count + 1))
    logs, state = next(parts)[1], mixer.save()

    def decode(code, bits):
        known = text.copy()
        known[1 : count + 1] = known[0]
        mixer.restore(state)
        nats = mixer.cost(known[1 : count + 1], logs, t.Coder(code))
        line = t.check_message(len(code), bits, nats, known, text)
        assert (known == text).all()
        return line

    return ours, decode


def test_no_message_is_more_than_a_line(decoder, monkeypatch):
    """It is decoded and right, or not decoded, or refused: whatever a file of that name holds."""
    ours, decode = decoder
    same_facts = ours.message_facts()
    monkeypatch.setattr(t.Scoring, "message_facts", lambda _: same_facts)
    path = ours.path.with_name("message.bin")
    whole = path.read_bytes()
    header, code = message_of(path.parent)
    outcomes = dict.fromkeys(["decoded", "not decoded", "none", "UserError", "AuditFailed"], 0)
    for seed in range(MUTATIONS):
        rng = random.Random(seed)
        if seed % 3 == 0:
            blob = altered(whole, rng)
        elif seed % 3 == 1:
            blob = forged(header, rng) + b"\n" + code
        else:
            blob = whole[: -len(code)] + altered(code, rng)
        path.write_bytes(blob)
        try:
            read, facts, line = ours.read_message()
            if read is None:
                outcome = "not decoded" if facts else "none"
                assert one_line(line).startswith(f"{path} not decoded: ") if facts else line == ""
                assert {**header, **facts} != header or {**facts, **header} != facts
            else:
                assert {name: facts[name] for name in same_facts} == same_facts
                line, outcome = one_line(decode(read, facts["bits"])), "decoded"
                assert line.startswith(f"16 tokens decoded from {len(read)} bytes, ")
                assert abs(facts["bits"] - header["bits"]) < 40 and len(read) <= len(code) + 2
        except t.Stop as error:
            outcome = type(error).__name__
            assert one_line(error)
        outcomes[outcome] += 1
    assert all(outcomes.values()), outcomes


@checked(max_examples=60)
@given(st.binary(max_size=40))
def test_a_code_of_any_bytes_is_read_as_it_is(decoder, code):
    """Also one with the byte that ends the header."""
    ours, _ = decoder
    path = ours.path.with_name("message.bin")
    header = path.read_bytes().partition(b"\n")[0]
    for raw in (code, code + b"\n", b"\n" + code):
        path.write_bytes(header + b"\n" + raw)
        read, facts, line = ours.read_message()
        assert (read, facts, line) == (raw, json.loads(header), "")


def test_a_wrong_code_ends_a_real_scoring_in_a_line(decoder):
    """Through all of the scoring, rows and decoder together."""
    ours, _ = decoder
    path = ours.path.with_name("message.bin")
    whole, code = path.read_bytes(), message_of(path.parent)[1]
    wrong = (altered(code, random.Random(seed)) for seed in range(9))
    for other in [code[:-2], *(other for other in wrong if other[:-1] != code[:-1])]:
        path.write_bytes(whole[: -len(code)] + other)
        with pytest.raises(t.AuditFailed) as caught:
            load(path.parent, LOGISTIC).score("sliding")
        assert one_line(caught.value).startswith("audit failed: message: ")
