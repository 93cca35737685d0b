"""Tokenizers' byte tables, shards, discovery, training windows and the validation text."""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import t, tiny_knobs, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

spm = pytest.importorskip("sentencepiece")

TEST_DATA = os.environ.get("TEST_DATA_DIR")


# --------------------------------------------------------------------------------------------------
# Bytes


def documents(count: int) -> list[str]:
    """Made-up documents with what makes byte counts go wrong: runs of spaces, accents, emoji."""
    rng = random.Random(5)
    vocabulary = ["".join(rng.choices("abcdefghi", k=rng.randint(1, 6))) for _ in range(40)]
    vocabulary += ["É", "naïve", "日本", "🙂", "ﬁ", "of the", "in the"]
    marks = [" "] * 6 + ["  ", "   ", "\n", "\t", ", ", "\n\n"]
    return [
        "".join(rng.choice(vocabulary) + rng.choice(marks) for _ in range(rng.randint(3, 60)))
        for _ in range(count)
    ]


MODELS = {
    "official-like": {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"},
    "no-prefix": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "lossless": {"remove_extra_whitespaces": False, "model_type": "bpe"},
    "inner-space": {"split_by_whitespace": False, "max_sentencepiece_length": 24},
    "stripped": {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    "nfkc-unigram": {"normalization_rule_name": "nmt_nfkc", "split_by_whitespace": False},
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """name -> (SentencePiece model, what the script reads from its file)."""
    made = {}
    for name, options in MODELS.items():
        prefix = tmp_path_factory.mktemp("models") / name
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(documents(300)),
            model_prefix=str(prefix),
            vocab_size=380,
            hard_vocab_limit=False,
            minloglevel=2,
            num_threads=1,
            **{"byte_fallback": True, "normalization_rule_name": "identity", **options},
        )
        path = prefix.with_suffix(".model")
        made[name] = spm.SentencePieceProcessor(model_file=str(path)), t.load_tokenizer(path)
    return made


def assert_bytes_fit(sp, tokenizer, texts):
    """Per document: the table's bytes are the decoded text's UTF-8 length; BOS adds none."""
    ids = [[tokenizer.bos, *sp.encode(text)] for text in texts]
    flat = np.array([i for document in ids for i in document] + [tokenizer.bos])
    counts = tokenizer.bytes_of(flat[:-1], flat[1:])
    ends = np.cumsum([len(document) for document in ids])
    got = [int(part.sum()) for part in np.split(counts, ends[:-1])]
    assert got == [len(sp.decode(document[1:]).encode()) for document in ids]


@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_trained_tokenizers(trained, name):
    sp, tokenizer = trained[name]
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    assert tokenizer.vocab == len(pieces) and tokenizer.bos == sp.bos_id()
    assert tokenizer.dummy_prefix == MODELS[name].get("add_dummy_prefix", True)
    if name == "inner-space":
        assert any("\u2581" in piece.strip("\u2581") for piece in pieces)
    assert_bytes_fit(sp, tokenizer, documents(80))


texts = st.text(
    st.sampled_from("abcdef   \u2581\n é日") | st.characters(exclude_categories=["Cs"]), max_size=20
)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(MODELS)), st.lists(texts, min_size=1, max_size=4))
def test_bytes_of_any_text(trained, name, texts):
    # Decoding takes all spaces away from a text's start; a literal U+2581 there is read as one.
    assert_bytes_fit(*trained[name], [re.sub(r"^\s*\u2581[\s\u2581]*", "", x) for x in texts])


@pytest.mark.skipif(not TEST_DATA, reason="TEST_DATA_DIR is not set")
@pytest.mark.parametrize("vocab", [1024, 8192])
def test_bytes_of_official_tokenizers(vocab):
    folder = Path(TEST_DATA)
    path = folder / "tokenizers" / f"fineweb_{vocab}_bpe.model"
    tokenizer = t.load_tokenizer(path)
    assert (tokenizer.vocab, tokenizer.bos) == (vocab, 1)
    assert tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    lines = (folder / "val_fineweb_dev.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert_bytes_fit(spm.SentencePieceProcessor(model_file=str(path)), tokenizer, texts)


def test_not_a_tokenizer(tmp_path):
    path = tmp_path / "broken.model"
    path.write_bytes(b"no model")
    with pytest.raises(t.UserError, match=r"broken\.model"):
        t.load_tokenizer(path)


# --------------------------------------------------------------------------------------------------
# Shards


SPOILED = {
    "magic": lambda raw: b"\0" + raw[1:],
    "version": lambda raw: raw[:4] + b"\2" + raw[5:],
    "cut": lambda raw: raw[:-1],
    "longer": lambda raw: raw + b"\0\0",
    "no header": lambda raw: raw[:900],
    "empty": lambda raw: b"",
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_broken_shards_are_named(tmp_path, spoil):
    path = write_shard(tmp_path / "x_train_000000.bin", range(50))
    assert t.Shard(path)[:].tolist() == list(range(50))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(t.UserError, match=r"x_train_000000\.bin"):
        t.Shard(path)


def tokenizer_of(vocab: int, bos: int = 1):
    """Tokenizer facts for made-up ids: every token one byte, BOS none."""
    control = np.arange(vocab) == bos
    size = np.where(control, 0, 1).astype(np.uint16)
    return t.Tokenizer(size, np.zeros(vocab, bool), control, bos, False, "")


def test_ids_outside_the_vocabulary_are_named(tmp_path):
    for split in ("train", "val"):
        write_shard(tmp_path / f"x_{split}_000000.bin", [1, 2, 3] * 5)
        write_shard(tmp_path / f"x_{split}_000001.bin", [1, 2, 9, 2] * 5)
    name = r"x_{}_000001\.bin.*token 9.*vocabulary has 9"
    data = t.TrainWindows(t.find_shards(tmp_path, "train"), 4, seed=0, vocab=9)
    with pytest.raises(t.UserError, match=name.format("train")):
        data.step(0, data.windows)
    with pytest.raises(t.UserError, match=name.format("train")):
        t.bigram_probability(data)
    with pytest.raises(t.UserError, match=name.format("val")):
        t.load_validation(tmp_path, tokenizer_of(9), 0)
    assert t.load_validation(tmp_path, tokenizer_of(10), 0).whole


def test_missing_shards_are_named(tmp_path):
    (tmp_path / "mine_sp924").mkdir()
    with pytest.raises(t.UserError, match=r"no such folder: is it .*mine_sp924\?"):
        t.locate_data(tiny_knobs(DATA_PATH=tmp_path / "mine_sp1024"))
    with pytest.raises(t.UserError, match=r"no such folder$"):
        t.locate_data(tiny_knobs(DATA_PATH=tmp_path / "absent"))
    with pytest.raises(t.UserError, match="_val_"):
        t.find_shards(tmp_path, "val")
    both = write_shard(tmp_path / "x_train_y_val_0.bin", range(9))
    for split in ("train", "val"):  # it would be trained on and scored
        with pytest.raises(t.UserError, match=both.name):
            t.find_shards(tmp_path, split)
    both.unlink()
    write_shard(tmp_path / "x_train_0.bin", range(9))
    with pytest.raises(t.UserError, match="TRAIN_SEQ_LEN=9"):
        t.TrainWindows(t.find_shards(tmp_path, "train"), 9, seed=0, vocab=9)


def test_an_epoch_reads_every_window_once(tmp_path):
    """Tokens are numbered, so that a window says where it lies."""
    write_shard(tmp_path / "x_train_0.bin", range(53))
    write_shard(tmp_path / "x_train_1.bin", range(99, 103))  # too short for a window
    write_shard(tmp_path / "x_train_2.bin", range(200, 231))
    paths = t.find_shards(tmp_path, "train")
    data = t.TrainWindows(paths, 5, seed=3, vocab=300)
    assert (data.windows, data.tokens) == (10 + 6, 53 + 4 + 31)
    epochs = []
    for epoch in range(3):
        rows = data.step(epoch, data.windows)
        assert rows.shape == (16, 6) and (np.diff(rows, axis=1) == 1).all()  # of one shard each
        starts = rows[:, 0].tolist()
        assert len({s // 5 for s in starts}) == 16 and len({s % 5 for s in starts}) <= 2
        epochs.append(starts)
    assert epochs[0] != epochs[1] != epochs[2]
    # A step is a function of the seed and its number: what was read before does not matter.
    again = t.TrainWindows(paths, 5, seed=3, vocab=300)
    assert again.step(2, 16)[:, 0].tolist() == epochs[2]
    assert again.step(1, 16)[:, 0].tolist() == epochs[1]
    flat = [start for epoch in epochs for start in epoch]
    for number in (8, 3, 0):  # steps across the ends of epochs
        assert again.step(number, 5)[:, 0].tolist() == flat[number * 5 : number * 5 + 5]
    other = t.TrainWindows(paths, 5, seed=4, vocab=300)
    assert other.step(0, 16)[:, 0].tolist() != epochs[0]


@pytest.mark.parametrize("wanted, held", [(0, 0), (4, 0), (5, 5), (22, 20), (10**9, 20)])
def test_what_is_held_out_is_in_no_window(tmp_path, wanted, held):
    """At most a twentieth of the first shard's windows; all that comes after it is read."""
    write_shard(tmp_path / "x_train_0.bin", range(404))
    write_shard(tmp_path / "x_train_1.bin", range(500, 520))
    data = t.TrainWindows(t.find_shards(tmp_path, "train"), 5, seed=3, vocab=600, held=wanted)
    assert (data.held, data.windows, data.tokens) == (held, (404 - 1 - held) // 5 + 3, 424)
    epochs = [data.step(epoch, data.windows) for epoch in range(6)]
    assert all((np.diff(rows, axis=1) == 1).all() for rows in epochs)
    seen = {int(token) for rows in epochs for token in rows.ravel()}
    assert seen == {*range(held, 404), *range(500, 520)}


def test_a_tail_that_fills_no_window_is_read_in_another_epoch(tmp_path):
    """Epochs begin at different tokens of a shard: in time every token is trained on."""
    write_shard(tmp_path / "x_train_0.bin", range(54))
    data = t.TrainWindows(t.find_shards(tmp_path, "train"), 7, seed=0, vocab=54)
    targets = [set(data.step(epoch, data.windows)[:, 1:].ravel()) for epoch in range(8)]
    assert all(len(seen) == 7 * data.windows for seen in targets)
    assert set.union(*targets) == set(range(1, 54))


def test_bigram_probability_counts_within_shards(tmp_path, rng):
    shards = [rng.integers(0, 6, 200), rng.integers(0, 5, 90)]
    for i, tokens in enumerate(shards):
        write_shard(tmp_path / f"x_train_{i}.bin", tokens)
    expected = np.zeros((7, 7))
    for tokens in shards:
        for a, b in itertools.pairwise(tokens):
            expected[a, b] += 1
    expected /= np.maximum(expected.sum(axis=1, keepdims=True), 1)
    data = t.TrainWindows(t.find_shards(tmp_path, "train"), 8, seed=0, vocab=7)
    np.testing.assert_allclose(t.bigram_probability(data), expected, rtol=1e-6)


# --------------------------------------------------------------------------------------------------
# The validation text


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.lists(st.integers(1, 60), max_size=3),
    st.integers(0, 120),
)
def test_a_limit_cuts_at_the_end_of_a_document(tmp_path_factory, lengths, cuts, limit):
    """Documents of BOS + `lengths` tokens, cut anywhere into shards."""
    text = [x for length in lengths for x in (1, *range(2, 2 + length))]
    folder = tmp_path_factory.mktemp("val")
    for i, part in enumerate(np.split(np.array(text), sorted({c for c in cuts if c < len(text)}))):
        write_shard(folder / f"x_val_{i:06d}.bin", part)
    if limit == 1:
        with pytest.raises(t.UserError, match="fewer than 2 tokens"):
            t.load_validation(folder, tokenizer_of(20), limit)
        return
    validation = t.load_validation(folder, tokenizer_of(20), limit)
    ends = np.cumsum([1 + length for length in lengths])
    fitting = [int(end) for end in ends if end <= limit]
    expected = len(text) if not limit else fitting[-1] if fitting else limit
    assert validation.tokens.tolist() == text[:expected]
    assert validation.whole == (expected == len(text)) == (validation.part == "")
    assert validation.shards == len(t.find_shards(folder, "val"))
    shutil.rmtree(folder)


def test_shards_that_another_tokenizer_made_are_refused(tmp_path):
    write_shard(tmp_path / "x_val_0.bin", [1, 2, 3])
    manifest = tmp_path / "manifest.json"
    for content in ("{}", '{"tokenizer_sha256": "ab"}'):
        manifest.write_text(content)
        made_by = t.dataclasses.replace(tokenizer_of(9), sha256="ab")
        assert t.load_validation(tmp_path, made_by, 0).tokens.tolist() == [1, 2, 3]
    with pytest.raises(t.UserError, match=r"manifest\.json.*another tokenizer"):
        t.load_validation(tmp_path, tokenizer_of(9), 0)
    manifest.write_text("[1]")
    with pytest.raises(t.UserError, match="not a manifest"):
        t.load_validation(tmp_path, tokenizer_of(9), 0)


# --------------------------------------------------------------------------------------------------
# Discovery


def make_dataset(home, name, tokenizer="", manifest=None):
    """An empty dataset in the public layout under home/data."""
    folder = home / "data" / "datasets" / name
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        write_shard(folder / f"x_{split}_000000.bin", range(9))
    (home / "data" / "tokenizers").mkdir(exist_ok=True)
    if tokenizer:
        (home / "data" / "tokenizers" / tokenizer).write_bytes(b"")
    if manifest is not None:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_fineweb_comes_before_stdlib(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "HERE", tmp_path)
    made = []

    def make():
        made.append(make_dataset(tmp_path, "stdlib_sp1024", "s.model", {"tokenizer": "s.model"}))

    monkeypatch.setattr(t, "make_stdlib", make)
    tokenizers = tmp_path / "data" / "tokenizers"
    for _ in range(2):  # made when missing, then used
        folder, tokenizer, line = t.locate_data(tiny_knobs())
        assert made == [folder] and tokenizer == tokenizers / "s.model" and "stdlib" in line
    fineweb = make_dataset(tmp_path, "fineweb10B_sp1024", "fineweb_1024_bpe.model")
    folder, tokenizer, line = t.locate_data(tiny_knobs())
    assert folder == fineweb and "FineWeb" in line
    assert tokenizer == tokenizers / "fineweb_1024_bpe.model"
    # What the user names wins, and a file alone is scored without any tokenizer.
    given = tmp_path / "mine.model"
    with pytest.raises(t.UserError, match=r"mine\.model"):
        t.locate_data(tiny_knobs(TOKENIZER_PATH=given))
    given.write_bytes(b"")
    assert t.locate_data(tiny_knobs(TOKENIZER_PATH=given))[:2] == (fineweb, given)
    assert t.locate_data(tiny_knobs(DATA_PATH=made[0], TOKENIZER_PATH=given))[0] == made[0]
    write_shard(tmp_path / "x_val_000000.bin", range(9))
    assert t.locate_data(tiny_knobs(EVAL_ONLY="x", DATA_PATH=tmp_path))[:2] == (tmp_path, None)


def test_tokenizer_beside(tmp_path, monkeypatch):
    make = make_dataset
    home = tmp_path / "data" / "tokenizers"
    fineweb = make(tmp_path, "fineweb10B_sp512", "fineweb_512_bpe.model")
    assert t.tokenizer_beside(fineweb) == home / "fineweb_512_bpe.model"
    own = make(tmp_path, "my_text_sp300", "my_text_300_bpe.model")
    assert t.tokenizer_beside(own) == home / "my_text_300_bpe.model"
    monkeypatch.chdir(own)
    assert t.tokenizer_beside(Path(".")) == home / "my_text_300_bpe.model"
    named = make(tmp_path, "named_sp300", "other.model", {"tokenizer": "other.model"})
    assert t.tokenizer_beside(named) == home / "other.model"
    for name in ("lonely_sp77", "no-size"):
        with pytest.raises(t.UserError, match=name):
            t.tokenizer_beside(make(tmp_path, name))


def test_a_folder_of_text_is_told_how_to_become_shards(tmp_path):
    (tmp_path / "notes.txt").write_text("a text")
    cfg = tiny_knobs(DATA_PATH=tmp_path)
    says = re.escape(f"DATA_PATH={tmp_path}: holds no *_val_*.bin: make such shards")
    with pytest.raises(t.UserError, match=says + ".*data/prepare.py text"):
        t.locate_data(cfg)
