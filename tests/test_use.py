"""MODE=sample, compress and restore: what they write is exact; who predicts is who scores."""

import os
import random
import shutil
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, made_up_text, made_up_tokenizer, random_model, t, tiny_knobs, write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

spm = pytest.importorskip("sentencepiece")
SCRIPT = ROOT / "train_gpt_mlx_kl.py"
KNOWN = {field.name.upper() for field in t.dataclasses.fields(t.Knobs)} | {"ARTIFACT"}
CLEAN = {name: value for name, value in os.environ.items() if name not in KNOWN}


# --------------------------------------------------------------------------------------------------
# The key-value cache


def text_with_documents(size, seed=3):
    rng = np.random.default_rng(seed)
    text = rng.integers(2, 50, size)
    text[rng.random(size) < 0.15] = 1
    return text


def read_all(net, text):
    """The net's (n, V) rows after each token of a text."""
    rows = []
    for token in text:
        net.read(int(token))
        rows.append(net.logs)
    return np.stack(rows)


SHAPES = {
    "all": {"XSA_LAST_N": 2, "NUM_LAYERS": 4},
    "odd": {"NUM_LAYERS": 5, "XSA_LAST_N": 1, "ROPE_DIMS": 0, "NUM_KV_HEADS": 4},
    "hashes": {"ENGRAM_LITE_ENABLED": 0},
    "plain": {"ENGRAM_HASH_SIZE": 0, "SKIPGRAM_HASH_SIZE": 0, "USE_SMEARGATE": 0, "XSA_LAST_N": 0},
}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cache_gives_the_distributions_of_scoring(shape, gpu, monkeypatch):
    model, text = random_model(**SHAPES[shape]), text_with_documents(24)
    if gpu:
        monkeypatch.setattr(t, "on_cpu", lambda: False)
    with t.Workers(1) as workers:
        true = t.first_window(model, text, 24, workers)
    assert np.abs(read_all(t.NetReader(model, 24, 12), text) - true).max() < 1e-4


@pytest.mark.parametrize("stride", [1, 5, 8, 16])
def test_windows_of_a_cache_follow_each_other_as_in_scoring(stride):
    model, text = random_model(), text_with_documents(60)
    with t.Workers(1) as workers:
        parts = list(t.net_rows(model, text, (16, stride, 2), workers))
    true = np.concatenate([rows for _, rows in parts])
    net = t.NetReader(model, 16, stride)
    assert np.abs(read_all(net, text[:-1]) - true).max() < 1e-4
    assert all(keys.shape[2] <= 16 for keys, _ in net.caches)


def test_a_token_costs_one_position():
    model, widths = random_model(), []
    whole = model.trunk
    net = t.NetReader(model, 16, 8)
    object.__setattr__(
        model, "trunk", lambda x, *rest: (widths.append(x.shape[1]), whole(x, *rest))[1]
    )
    read_all(net, text_with_documents(26))
    assert widths == [1] * 16 + [9] + [1] * 7 + [9] + [1]


# --------------------------------------------------------------------------------------------------
# Who says what comes next


def mixer_and_net(size=200):
    """A mixer and a net that have read the same text; what else comes."""
    text = made_up_text(size).tokens.astype(np.int64)
    mixer = t.LogisticMixer(made_up_tokenizer(), t.token_tree(text, 50), 2 * size, 2)
    return mixer, t.NetReader(random_model(), 16, 8), text


def exact_probabilities(mixer, logs):
    """P of each token as scoring has it: (V,), by trying each."""
    saved, nats = mixer.save(), []
    for token in range(mixer.vocab):
        row = None if logs is None else logs[None]
        nats.append(mixer.code(np.array([token]), row)[0, 1])
        mixer.restore(saved)
    return np.exp(-np.array(nats))


@pytest.mark.parametrize("with_net", [False, True])
def test_a_mixer_at_rest_is_nearly_the_mixer_that_scores(with_net):
    mixer, net, text = mixer_and_net(4000)
    mixer.code(text[:-100])
    predictor = t.Predictor(mixer, net if with_net else None)
    predictor.code(text[-100:])
    before = mixer.save()
    p = np.exp(predictor.log_probabilities())
    assert abs(p.sum() - 1) < 1e-9 and p.min() > 0
    assert all((a == b).all() for a, b in zip(before, mixer.state, strict=True))
    true = exact_probabilities(mixer, net.logs if with_net else None)
    assert abs(true.sum() - 1) < 1e-6
    assert np.abs(p - true).sum() / 2 < 0.01  # total variation
    assert np.corrcoef(np.log(p), np.log(true))[0, 1] > 0.999


@pytest.mark.parametrize("first_ones", [False, True])
def test_a_copy_of_rows_is_what_scoring_would_find(first_ones):
    """Also of a sparse context's key, new above, whose row here has outlived the one above."""
    rng, n, blank = np.random.default_rng(3), 60, 7
    table = rng.integers(0, 1 << 32, (4 * n + n, 8), np.uint32)  # the last n: of what is not kept
    hashes = rng.integers(0, 1 << 63, n).astype(np.uint64) << np.uint64(1)
    first, there = 4 * np.arange(n), rng.integers(0, 2, n).astype(bool)
    table[first + rng.integers(0, 4, n), 0] = np.where(there, hashes >> np.uint64(48) | 1, 0)
    rows, fresh = np.zeros((n, 8), np.int64), rng.integers(0, 2, n)
    rows[:, 7] = rng.integers(0, 2, n)  # sparse

    scoring, at, new = table.copy(), first.copy(), fresh.copy()
    t.find_rows(scoring, rows, hashes, at, new, first_ones, 15 << 16, blank, 1)
    copies, at_copy, new_copy = np.zeros((n, 8), np.uint32), first.copy(), fresh.copy()
    before = table.copy()
    t.copy_rows(table, rows, hashes, at_copy, new_copy, first_ones, blank, copies)
    assert (copies[:, 1:] == scoring[at, 1:]).all() and (new == new_copy).all()
    assert (table == before).all() and (at_copy == np.arange(n)).all()
    assert 5 < (copies[:, 1:] == blank).all(axis=1).sum() < n - 5


def test_reading_the_tree_leaves_the_mixers_code_as_it_is():
    mixer, _, text = mixer_and_net()
    other, _, _ = mixer_and_net()
    predictor = t.Predictor(mixer, None)
    for token in text:
        predictor.log_probabilities()
        predictor.code(np.array([token]))
        other.code(np.array([token]))
    assert all((a == b).all() for a, b in zip(mixer.state, other.state, strict=True))


def test_samples_are_as_frequent_as_likely():
    mixer, net, text = mixer_and_net()
    predictor, rng, count = t.Predictor(mixer, net), np.random.default_rng(5), 20_000
    predictor.code(text)
    logs, true = predictor.log_probabilities(), exact_probabilities(mixer, net.logs)
    drawn = [t.draw(logs, 1.0, 1.0, rng) for _ in range(count)]
    share = np.bincount(drawn, minlength=50) / count
    assert (np.abs(share - true) < 4.5 * np.sqrt(true / count) + 0.003).all()


def test_temperature_and_top_p():
    p, rng = np.array([0.1, 0.4, 0.2, 0.3]), np.random.default_rng(1)

    def shares(temperature, top_p, logs=None):
        logs = np.log(p) if logs is None else logs
        drawn = [t.draw(logs, temperature, top_p, rng) for _ in range(8000)]
        return np.bincount(drawn, minlength=4) / 8000

    assert shares(0, 1)[1] == shares(1, 0)[1] == 1  # the likeliest alone
    assert np.abs(shares(1, 1) - p).max() < 0.025
    assert np.abs(shares(0.5, 1) - p**2 / (p**2).sum()).max() < 0.025
    assert np.abs(shares(1, 0.69) - np.array([0, 4, 0, 3]) / 7).max() < 0.025
    assert np.abs(shares(1, 0.71) - np.array([0, 4, 2, 3]) / 9).max() < 0.025
    assert np.abs(shares(100, 1) - 0.25).max() < 0.025
    impossible = np.where(p > 0.15, np.log(p), -np.inf)
    assert shares(1, 1, impossible)[0] == 0


def test_a_sample_ends_with_its_document_or_its_tokens():
    net = SimpleNamespace(logs=None, read=lambda token: told.append(token))
    predictor, told = t.Predictor(None, net), []
    wanted = iter([7, 8, 1, 9])

    def next_logs():
        return np.where(np.arange(50) == next(wanted), 0, -np.inf)

    predictor.log_probabilities = next_logs
    cfg, rng = tiny_knobs(), np.random.default_rng(0)
    assert list(predictor.sample([1, 5], 9, cfg, rng)) == [7, 8] and told == [1, 5, 7, 8]
    wanted = iter([7, 8, 9])
    assert list(predictor.sample([1], 2, cfg, rng)) == [7, 8]


def test_a_stream_has_no_half_characters():
    texts = [b" a", *(bytes([byte]) for byte in "é😀".encode()), b"\xff", b"b", b"\xf0"]
    parts = list(t.streamed(iter(range(len(texts))), texts, b" "))
    assert "".join(parts) == "aé😀\ufffdb\ufffd"
    assert parts[:7] == ["a", "", "é", "", "", "", "😀"]
    assert "".join(t.streamed(iter([0]), texts, b"")) == " a"
    assert "".join(t.streamed(iter([8, 0]), texts, b" ")) == "b a"  # no space to leave out


# --------------------------------------------------------------------------------------------------
# Sampling while training


def test_samples_leave_training_as_it_is(make_trainer):
    lines, report = [], SimpleNamespace(event=lambda event, line: lines.append((event, line)))
    facts = t.dataclasses.replace(
        made_up_tokenizer(), piece_bytes=np.full(50, 3), text=bytes(b"a b" * 50)
    )
    env = {"WORKERS": 2, "ITERATIONS": 6, "EMA_START_FRAC": 0.2, "LATE_QAT_THRESHOLD": 0.5,
           "WARMDOWN_ITERS": 4}  # fmt: skip
    states = []
    for sampled in (False, True):
        trainer = make_trainer(**env)
        while not trainer.finished():
            trainer.take_step()
            if sampled:
                t.report_sample(facts, report, trainer)
        arrays, counters = trainer.state()
        del counters["elapsed_s"]
        arrays = {f"{k}/{n}": np.array(a) for k, part in arrays.items() for n, a in part.items()}
        states.append((arrays, counters))
    (plain, counts), (ours, our_counts) = states
    assert counts == our_counts and all((plain[n] == ours[n]).all() for n in plain)
    texts = [event["text"] for event, _ in lines]
    assert len(texts) == 6 and len(set(texts)) > 1 and max(len(x.split()) for x in texts) > 5
    assert lines[0][1].format(**lines[0][0], n=6) == f"step:1/6 sample:{texts[0]!r}"


def test_samples_come_every_so_many_steps(make_trainer, tmp_path):
    trainer, steps = make_trainer(ITERATIONS=7, SAMPLE_EVERY=3), []
    report = SimpleNamespace(folder=tmp_path, event=lambda *_: None, line=lambda *_: None)
    keeper = SimpleNamespace(due=lambda: False)
    t.train(trainer, report, None, lambda trainer: steps.append(trainer.step), keeper)
    assert steps == [3, 6] and trainer.step == 7


# --------------------------------------------------------------------------------------------------
# Files

ODD = {
    "empty": b"",
    "byte": b"x",
    "space": b" ",
    "newline": b"\n",
    "crlf": b"one\r\ntwo\r\n\r\nthree",
    "tabs": b"\ta\tb\t\n\t",
    "latin-1": "Stra\xdfe und Caf\xe9s, t\xeate \xe0 t\xeate".encode("latin-1"),
    "utf-8": "Straße 😀 naïve — “quotes” ﬁ ½ Å Ａ 日本語。".encode(),
    "nul": b"\0a\0\0 b\0",
    "spaces": b"  leading and  double   and trailing  ",
    "lines": b"\n\n a\n\n\n b \n  c\n",
    "u+2581": "\u2581 a \u2581\u2581b\u2581".encode(),
    "pieces": b"<s> </s> <unk> <0x0A> <0xFF>",
    "cut utf-8": "😀é".encode()[:3] + b" " + "é".encode()[1:],
    "all bytes": bytes(range(256)),
    "replacement": "\ufffd \ufeff \u200b \u0301".encode(),
}


letters = random.Random(0)
VOCABULARY = ["".join(letters.choices("etaoinshrdlu", k=letters.randint(1, 7))) for _ in range(60)]


def words(count, seed=0):
    return " ".join(random.Random(seed).choices(VOCABULARY, k=count))


def make_tokenizer(folder, **options):
    path = folder / "tokenizers" / "made_up.model"
    path.parent.mkdir(parents=True)
    texts = [words(80, seed).replace(" s", "\ns") + " né" for seed in range(60)]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path.with_suffix("")), model_type="bpe",
        vocab_size=420, minloglevel=2, **options,
    )  # fmt: skip
    return path


LOSSLESS = {"normalization_rule_name": "identity", "add_dummy_prefix": False,
            "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}  # fmt: skip
PUBLIC = {"add_dummy_prefix": False}
KINDS = {"lossless": LOSSLESS, "public": PUBLIC, "usual": {}}


def make_artifact(folder, tokenizer_path, **env):
    """An artifact of a net of random weights and 2,000 tokens of packed text."""
    cfg, facts = tiny_knobs(**env), t.load_tokenizer(tokenizer_path)
    usual = spm.SentencePieceProcessor(model_file=str(tokenizer_path))
    text = np.array([i for s in range(20) for i in (1, *usual.encode(words(60, s)))][:2000])
    packed = None
    if cfg.mixer == "logistic":
        leaves, coder = t.token_trees(text, facts.vocab, cfg.mixer_size), t.Coder()
        mixer = t.new_context_model(cfg, facts, leaves, len(text))
        mixer.code(text[500:], None, coder)
        rehearsal = t.pack_rehearsal(facts, leaves[:1], text[:500])
        digest = mixer.text_sha256()
        packed = t.PackedText(leaves, len(text) - 500, digest, coder.finish(), rehearsal)
    model = random_model(facts.vocab, **env)
    params = dict(t.tree_flatten(model.parameters()))
    path = folder / "artifact.bin"
    t.write_artifact(path, params, t.group_parameters(list(params)), cfg, facts, packed)
    return path


@pytest.fixture(scope="session", params=KINDS)
def made(request, tmp_path_factory):
    return make_all(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def usual(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("the_usual"), "usual")


@pytest.fixture(scope="session")
def three_trees(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("three_trees"), "usual", "large")


def make_all(folder, kind, size="medium"):
    """A tokenizer and an artifact, and how to use them."""
    tokenizer = make_tokenizer(folder, byte_fallback=True, **KINDS[kind])
    artifact = make_artifact(folder, tokenizer, MIXER_MEMORY_MB=3, MIXER_SIZE=size)

    def use(file, output="", **env):
        env = {"DEVICE": "cpu", "TOKENIZER_PATH": tokenizer, "FILE": file, "OUTPUT": output, **env}
        return t.Use.load(artifact, {name: str(value) for name, value in env.items()})

    def there_and_back(raw, **env):
        file, code, back = (folder / name for name in ("file", "file.tgk", "back"))
        for path in (code, back):
            path.unlink(missing_ok=True)
        file.write_bytes(raw)
        use(file, **env).compress()
        use(code, back).restore()
        assert back.read_bytes() == raw
        return code.read_bytes()

    names = {"folder": folder, "tokenizer": tokenizer, "artifact": artifact, "kind": kind}
    names["pieces"] = t.Pieces(tokenizer, t.load_tokenizer(tokenizer))
    return SimpleNamespace(use=use, there_and_back=there_and_back, **names)


@pytest.mark.parametrize("name", ODD)
def test_odd_files_come_back(made, name):
    made.there_and_back(ODD[name])


snippets = st.sampled_from([*ODD.values(), b"\n", b" ", b"the ", "é".encode(), b"\r\n"])
files = st.binary(max_size=60) | st.lists(snippets | st.binary(max_size=3), max_size=8).map(
    b"".join
)


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(raw=files)
def test_any_bytes_come_back(made, raw):
    made.there_and_back(raw)


@settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
@given(raw=files, size=st.integers(1, 9), cut=st.integers(1, 5), lines=st.booleans())
def test_tokens_stand_for_a_file_however_it_is_cut(made, tmp_path_factory, raw, size, cut, lines):
    path = made.folder / "cut"
    path.write_bytes(raw)
    pieces = made.pieces
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "CHUNK_BYTES", size)
        assert b"".join(t.file_chunks(path)) == raw
        tokens = np.concatenate(list(pieces.tokens_of(t.file_chunks(path), lines)))
    parts = [tokens[i : i + cut] for i in range(0, len(tokens), cut)]
    assert b"".join(pieces.text_of(parts, lines)) == raw


def test_text_is_written_with_the_tokenizers_own_tokens(made):
    """Bytes are for what it cannot spell, and the rest of a text is as it was trained on."""
    pieces = made.pieces
    text, own = words(200), spm.SentencePieceProcessor(model_file=str(made.tokenizer))
    assert pieces.encode(pieces.start + text.encode()) == own.encode(text)
    for odd, count in {"\udcff": 1, "\u2581": 3}.items():
        raw = f"{text} {odd} {text}".encode("utf-8", "surrogateescape")
        ids = pieces.encode(raw)
        assert np.isin(ids, list(pieces.byte_ids.values())).sum() == count
        for part in (slice(0, 100), slice(-100, None)):
            assert ids[part] == pieces.encode(text.encode())[part]
    assert pieces.keeps_lines == (made.kind == "lossless")


def test_lines_begin_as_words_do_where_that_is_shorter(made, capsys):
    text = words(300).replace(" ", "\n").encode()
    code = made.there_and_back(text)
    assert bool(code[2] & t.LINES) == (made.kind != "lossless")
    assert not made.there_and_back(words(30).encode())[2] & t.LINES


def test_a_known_text_is_small(usual, capsys):
    text = words(60, 3).encode()
    code = usual.there_and_back(text)
    assert 3 * len(code) < len(zlib.compress(text))
    out = capsys.readouterr().out.splitlines()
    assert f"{len(text)} bytes (" in out[0] and f" -> {len(code)} (" in out[0]
    assert "0 of them single bytes" in out[0] and "; xz " in out[0] and ", brotli " in out[0]
    assert f"file.tgk: {len(code)} bytes -> {len(text)}, as they were" in out[1]
    usual.there_and_back("日本".encode())
    assert "6 of them single bytes" in capsys.readouterr().out


def test_a_code_is_as_long_as_its_parts_say(usual, monkeypatch):
    text = words(500, 99).encode()
    code = usual.there_and_back(text)
    monkeypatch.setattr(t, "CHUNK_BYTES", 100)
    monkeypatch.setattr(t, "PACK_CHUNK", 7)
    assert usual.there_and_back(text) == code


def test_a_code_with_the_net_is_for_its_own_machine_and_windows(usual, monkeypatch):
    text = words(40, 99).encode()
    plain, with_net = (usual.there_and_back(text, WITH_NET=x) for x in (0, 1))
    assert with_net[2] & t.NET_TOO and not plain[2] & t.NET_TOO
    head = t.TGK.size + 1  # one byte holds the number of tokens
    assert plain[head:] != with_net[head + 2 :]  # behind the machine's mark: the net has a say
    (usual.folder / "elsewhere.tgk").write_bytes(with_net)
    for other in ({"EVAL_STRIDE": 3, "EVAL_SEQ_LEN": 8}, {"EVAL_BATCH_SEQS": 4}, {"WORKERS": 3}):
        with pytest.raises(t.UserError, match="other EVAL_ settings or WORKERS"):
            usual.use(usual.folder / "elsewhere.tgk", **other).restore()
    monkeypatch.setattr(t, "processor_name", lambda: "another")
    with pytest.raises(t.UserError, match="another machine"):
        usual.use(usual.folder / "elsewhere.tgk").restore()
    (usual.folder / "plain.tgk").write_bytes(plain)
    usual.use(usual.folder / "plain.tgk").restore()


@pytest.mark.parametrize("with_net", [0, 1])
def test_files_come_back_by_three_trees(three_trees, with_net):
    """With the net by all; without it the first codes alone, which is faster."""
    text = words(300, 99).encode()
    code = three_trees.there_and_back(text, WITH_NET=with_net)
    assert len(code) < len(text) / 2 and three_trees.there_and_back(b"", WITH_NET=with_net)
    mixer = three_trees.use("").coding_predictor(9, with_net * t.NET_TOO).mixer
    assert isinstance(mixer, t.MixerGroup if with_net else t.LogisticMixer)
    (three_trees.folder / "cut.tgk").write_bytes(code[:-2])
    with pytest.raises(t.UserError, match="damaged"):
        three_trees.use(three_trees.folder / "cut.tgk").restore()
    if with_net:  # a number of tokens that is none of this code's
        wrong = bytearray(code)
        wrong[t.TGK.size] ^= 1
        (three_trees.folder / "wrong.tgk").write_bytes(wrong)
        with pytest.raises(t.UserError, match="another machine"):
            three_trees.use(three_trees.folder / "wrong.tgk").restore()


def test_a_sample_by_three_trees_is_drawn_from_their_mean(three_trees):
    predictor = three_trees.use("").predictor(30, True, False, 1)
    predictor.code(np.arange(1, 9))
    parts = [predictor.at_rest(mixer) for mixer in predictor.mixer.all()]
    p = np.exp(predictor.log_probabilities())
    np.testing.assert_allclose(p, np.exp(parts).mean(axis=0), rtol=1e-9)
    assert p.sum() == pytest.approx(1) and len(np.unique(parts, axis=0)) == 3


def test_the_first_tree_needs_no_memory_for_the_others(three_trees, monkeypatch):
    """Of 3 MiB it has one."""
    code = three_trees.there_and_back(b"the same")
    monkeypatch.setattr(t, "memory_limit", lambda: (2 << 20) - 1)
    assert three_trees.there_and_back(b"the same") == code
    with pytest.raises(t.UserError, match=r"MIXER_MEMORY_MB=3: .* of 3 MiB, and there are 1:"):
        three_trees.there_and_back(b"the same", WITH_NET=1)


# --------------------------------------------------------------------------------------------------
# Damage and mistakes


def test_damage_is_a_line_and_leaves_nothing(usual):
    code, rng = usual.there_and_back(words(40, 99).encode()), random.Random(0)
    true, path = (usual.folder / "file").read_bytes(), usual.folder / "damaged.tgk"
    damaged = [code[:n] for n in range(0, len(code), 3)] + [b"x" + code]
    flips = [*range(8 * 13), *rng.choices(range(8 * len(code)), k=20)]
    for bit in flips:
        flipped = bytearray(code)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    lines, harmless = set(), 0
    for raw in damaged:
        path.write_bytes(raw)
        out = usual.folder / "damaged"
        try:
            usual.use(path).restore()
            assert out.read_bytes() == true  # a bit that says nothing, as some of the last byte
            out.unlink()
            harmless += 1
        except t.UserError as error:
            assert len(str(error).splitlines()) == 1 and str(path) in str(error)
            lines.add(str(error).partition(": ")[2][:12])
        assert not out.exists() and not (usual.folder / "part-damaged").exists()
    assert len(lines) >= 4 and harmless < 9
    path.write_bytes(code + b"x")
    fails(usual.use(path), "restore", "damaged.*: copy it again")


def test_more_tokens_than_a_shard_can_have_are_a_line(usual):
    path = usual.folder / "many.tgk"
    use = usual.use(path)
    head = t.TGK.pack(t.TGK_MAGIC, t.SHARD | 4 << 4, bytes.fromhex(t.file_sha256(use.path)[:8]), 0)
    path.write_bytes(head + (1 << 31).to_bytes(4, "little") + bytes(5000))
    fails(use, "restore", "many.tgk: damaged, or cut short")


def fails(use, work, text):
    with pytest.raises(t.UserError, match=text) as caught:
        getattr(use, work)()
    assert len(str(caught.value).splitlines()) == 1


def test_mistakes_are_a_line(usual, tmp_path):
    file = tmp_path / "x.txt"
    file.write_bytes(b"hello")
    fails(usual.use(tmp_path / "none"), "compress", "FILE=.*none: no file")
    fails(usual.use(tmp_path), "compress", "no file")
    fails(usual.use(file), "restore", "does not end in .tgk: choose OUTPUT")
    fails(usual.use(file, tmp_path / "y"), "restore", "not a file that MODE=compress has made")
    fails(usual.use(file, file), "compress", "x.txt exists")
    usual.use(file).compress()
    fails(usual.use(file), "compress", "x.txt.tgk exists")
    fails(usual.use(tmp_path / "x.txt.tgk"), "restore", "x.txt exists")
    assert file.read_bytes() == b"hello"
    env = {"TOKENIZER_PATH": "", "DATA_PATH": tmp_path}
    fails(usual.use(file, tmp_path / "z", **env), "compress", "unset: .*.bin wants the tokenizer")
    env = {"TOKENIZER_PATH": SCRIPT}
    fails(usual.use(file, tmp_path / "z", **env), "sample", "_kl.py: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.txt", "x.txt.tgk"]


def test_a_tokenizer_is_found_beside_its_text(usual, tmp_path):
    folder, file = usual.folder / "datasets" / "text_sp320", tmp_path / "x"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"tokenizer": "made_up.model"}')
    file.write_bytes(b"hello")
    usual.use(file, TOKENIZER_PATH="", DATA_PATH=folder).compress()
    assert (tmp_path / "x.tgk").is_file()


def test_a_tokenizer_is_found_where_the_artifact_was_made(usual, tmp_path):
    """Also by another clone's script, or by the copy in the run's folder."""
    for folder, path in (("data/tokenizers", usual.tokenizer), ("logs/run", usual.artifact)):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(path, tmp_path / folder)
    (tmp_path / "x").write_bytes(b"hello")
    env = {"FILE": str(tmp_path / "x"), "DEVICE": "cpu"}
    t.Use.load(tmp_path / "logs" / "run" / usual.artifact.name, env).compress()
    assert (tmp_path / "x.tgk").is_file()


def test_another_artifact_is_named(usual, tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"hello")
    usual.use(file).compress()
    other = make_artifact(tmp_path, usual.tokenizer, MIXER_MEMORY_MB=1, SEED=3)
    env = {"FILE": str(file) + ".tgk", "OUTPUT": str(tmp_path / "y"), "DEVICE": "cpu"}
    digest = t.file_sha256(usual.artifact)[:8]
    fails(t.Use.load(other, env), "restore", f"another artifact than .*artifact.bin, .* {digest}")


def test_an_artifact_without_contexts_samples_by_its_net_alone(usual, tmp_path, capsys):
    file = tmp_path / "x"
    file.write_bytes(b"hello")
    path = make_artifact(tmp_path, usual.tokenizer, MIXER="off")
    env = {"FILE": str(file), "DEVICE": "cpu", "TOKENIZER_PATH": str(usual.tokenizer)}
    fails(t.Use.load(path, env), "compress", "made without MIXER=logistic, it codes no files")
    fails(t.Use.load(path, {**env, "SAMPLE_WITH": "contexts"}), "sample", "contexts: .* has none")
    t.Use.load(tmp_path, {**env, "SAMPLE_TOKENS": "5", "PROMPT": "one two"}).sample()
    assert capsys.readouterr().out.startswith("one two")


def test_a_sample_without_a_prompt_needs_no_byte_pieces(usual, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        t.Pieces, "byte_ids", property(lambda _: {}, lambda *_: None), raising=False
    )
    env = {"DEVICE": "cpu", "TOKENIZER_PATH": str(usual.tokenizer), "SEED": "2"}
    fails(t.Use.load(usual.artifact, {**env, "PROMPT": "one"}), "sample", "without byte_fallback")
    t.Use.load(usual.artifact, env).sample()
    assert capsys.readouterr().out.strip()


def test_a_tokenizer_that_cannot_spell_is_refused(tmp_path):
    tokenizer, file = make_tokenizer(tmp_path, hard_vocab_limit=False), tmp_path / "x"
    path = make_artifact(tmp_path, tokenizer)
    file.write_bytes(b"hello")
    env = {"FILE": str(file), "DEVICE": "cpu", "TOKENIZER_PATH": str(tokenizer)}
    fails(t.Use.load(path, env), "compress", "without byte_fallback")


# --------------------------------------------------------------------------------------------------
# The score, proved


def shard_of(made, folder, size=1500):
    """A validation shard of several documents."""
    folder.mkdir()
    usual = spm.SentencePieceProcessor(model_file=str(made.tokenizer))
    ids = [i for s in range(30, 60) for i in (1, *usual.encode(words(50, s) + " né"))]
    return write_shard(folder / "text_val_000000.bin", ids[:size])


@pytest.mark.parametrize("with_net, mode", [(0, "sliding"), (1, "sliding"), (1, "standard")])
def test_a_shard_takes_the_bits_that_its_score_claims(usual, tmp_path, with_net, mode, capsys):
    path = shard_of(usual, tmp_path / "shards", 300 if with_net else 1500)
    code, back = tmp_path / "shard.tgk", tmp_path / "back.bin"
    env = {"WITH_NET": with_net, "EVAL_MODE": mode, "AUDIT": 0, "TOKENIZER_PATH": "absent"}
    use = usual.use(path, code, **env)
    use.compress()
    usual.use(code, back, **env).restore()
    assert back.read_bytes() == path.read_bytes()
    with t.Workers(1) as workers:
        scoring = t.Scoring.load(use.cfg, usual.artifact, path.parent, workers)
        score, _ = scoring.score(mode)
    claimed = score["val_bpb" if with_net else "val_bpb_context"] * score["val_bytes"] / 8
    assert abs(code.stat().st_size - claimed) < 20
    assert f"{score['val_bytes']:,} bytes (of a shard's text)" in capsys.readouterr().out
    if with_net:
        stride = {"sliding": 8, "standard": 16}[mode]  # of windows of 16 tokens
        assert use.coding_predictor(1, t.NET_TOO).net.stride == stride


def test_what_only_looks_like_a_shard_comes_back(usual, tmp_path):
    raw = bytearray(shard_of(usual, tmp_path / "shards", 40).read_bytes())
    assert usual.there_and_back(bytes(raw))[2] & t.SHARD
    raw[100] = 1
    assert not usual.there_and_back(bytes(raw))[2] & t.SHARD
    raw[100], raw[1025] = 0, 255  # a token outside the vocabulary
    assert not usual.there_and_back(bytes(raw))[2] & t.SHARD
    assert not usual.there_and_back(bytes(raw[:1024]))[2] & t.SHARD


# --------------------------------------------------------------------------------------------------
# The command line


def command(made, **env):
    env = {"DEVICE": "cpu", "ARTIFACT": made.artifact, "TOKENIZER_PATH": made.tokenizer, **env}
    env = CLEAN | {name: str(value) for name, value in env.items()}
    return subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True)


def test_the_command_line(usual, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_bytes(raw := words(100, 5).encode() + b"\xff\r\n")
    done = command(usual, MODE="compress", FILE=file)
    assert (done.returncode, done.stderr) == (0, "") and " bits per byte; xz " in done.stdout
    file.unlink()
    done = command(usual, MODE="restore", FILE=f"{file}.tgk")
    assert (done.returncode, done.stderr) == (0, "") and file.read_bytes() == raw
    done = command(usual, MODE="restore", FILE=f"{file}.tgk")
    assert done.returncode == 2 and done.stderr == f"error: {file} exists: choose another OUTPUT\n"
    same = {"MODE": "sample", "PROMPT": "né", "SAMPLE_TOKENS": 30, "SEED": 3}
    one, two = command(usual, **same), command(usual, **same)
    assert one.stdout == two.stdout and one.stdout.startswith("né") and one.returncode == 0
    assert len(one.stdout) > 10
    done = command(usual, MODE="compress")
    assert done.returncode == 2 and done.stderr == "error: MODE=compress needs FILE: which one?\n"
    done = command(usual, MODE="sample", ARTIFACT="")
    assert done.returncode == 2 and "MODE=sample needs ARTIFACT" in done.stderr
