"""data/prepare.py: shards, splits, errors and downloads, checked with readers of their own."""

import gzip
import hashlib
import importlib.util
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt_mlx_kl as trainer

spm = pytest.importorskip("sentencepiece")

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "prepare.py"
BOS = 1


def load_script():
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


prepare = load_script()


# --------------------------------------------------------------------------------------------------
# Readers and texts


def read_shard(path: Path) -> np.ndarray:
    """Tokens of a shard, by the format's own words: 256 int32 of header, then uint16."""
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert header[:2].tolist() == [20240520, 1]
    assert not header[3:].any()
    tokens = np.frombuffer(raw[1024:], dtype="<u2")
    assert len(tokens) == header[2]
    return tokens


def read_split(folder: Path, split: str) -> np.ndarray:
    shards = sorted(folder.glob(f"*_{split}_*.bin"))
    return np.concatenate([read_shard(path) for path in shards]) if shards else np.zeros(0, "<u2")


def decode_split(out: Path, name: str, split: str) -> list[str]:
    """The documents of a split, decoded; every one must start with BOS."""
    folder = next((out / "datasets").glob(f"{name}_sp*"))
    manifest = json.loads((folder / "manifest.json").read_text())
    sp = spm.SentencePieceProcessor(model_file=str(out / "tokenizers" / manifest["tokenizer"]))
    tokens = read_split(folder, split)
    assert len(tokens) == manifest[split]["tokens"]
    assert not np.isin(tokens, [0, 2, 3]).any()  # padding, EOS, unknown
    starts = np.flatnonzero(tokens == BOS)
    assert len(starts) == manifest[split]["documents"]
    if len(tokens):
        assert starts[0] == 0
    parts = np.split(tokens, starts[1:]) if len(tokens) else []
    return [sp.decode(part[1:].tolist()) for part in parts]


def words(seed: int, count: int) -> str:
    """Text of `count` made-up words with lines, paragraphs, tabs and runs of spaces."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 7))) for _ in range(60)]
    marks = [" ", " ", " ", " ", "  ", "\n", "\n\n", "\t", "\n    ", ", "]
    return "".join(rng.choice(vocabulary) + rng.choice(marks) for _ in range(count)) + f"{seed}\n"


def run(*argv) -> int:
    return prepare.main([str(arg) for arg in argv])


def write_jsonl(path: Path, texts, key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def side(text: str) -> float:
    """Where the hash of a text lies in [0, 1)."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# --------------------------------------------------------------------------------------------------
# Shards


def test_shards_hold_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 1000)
    tokens = np.random.default_rng(0).integers(0, 65536, 2500)
    writer = prepare.ShardWriter(tmp_path / "x_train")
    for part in np.split(tokens, [1, 1000, 1000, 1700]):
        writer.write(part)
    writer.close()
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == [f"x_train_{i:06d}.bin" for i in range(3)]
    shards = [read_shard(path) for path in paths]
    assert [len(shard) for shard in shards] == [1000, 1000, 500]
    assert np.array_equal(np.concatenate(shards), tokens)
    assert (writer.tokens, writer.shards) == (2500, 3)
    assert prepare.check_shard(paths[0], 65536, 7) == (1000, (tokens[:1000] == 7).sum())


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda raw: raw[:-2], "its header asks for"),
        (lambda raw: raw + b"\0\0", "its header asks for"),
        (lambda raw: raw[:100], "header is wrong"),
        (lambda raw: b"{" + raw[1:], "header is wrong"),
        (lambda raw: raw[:-2] + b"\xff\xff", "token id 65535"),
    ],
)
def test_damaged_shards_are_found(tmp_path, damage, message):
    path = tmp_path / "x.bin"
    path.write_bytes(damage(prepare.shard_header(5) + np.arange(5, dtype="<u2").tobytes()))
    with pytest.raises(prepare.PrepareError, match=message):
        prepare.check_shard(path, 1024, BOS)


def test_trained_tokenizer_is_lossless_and_deterministic():
    texts = [words(seed, 400) for seed in range(20)]
    model = prepare.train_tokenizer(texts, 400)
    assert prepare.train_tokenizer(list(texts), 400) == model
    sp = spm.SentencePieceProcessor(model_proto=model)
    assert [sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()] == [0, 1, 2, 3]
    assert any("\n" in sp.id_to_piece(i) for i in range(400))
    odd = [
        "",
        " ",
        "   ",
        "\n",
        "\r\n\r",
        "\t\t x  y\n\n\n",
        "a\0b",
        "<s></s><0x0A><unk>",
        "\ufeffx",
    ]
    odd += ["ﬁ Å ² ½ …", "日本語\u3000テスト", "e\u0301 \u200b\u00a0", "🙂👩‍💻", " lead", "trail "]
    assert [sp.decode(sp.encode(text)) for text in odd] == odd


# --------------------------------------------------------------------------------------------------
# stdlib


def fake_library(root: Path, order) -> dict[str, str]:
    """A library folder with 120 packages and 20 topics -> {document name: text} of what counts.

    `order` arranges the writing, because folders list their files in no certain order.
    """
    good = {f"mod{i:03d}.py": words(i, 60) for i in range(100)}
    good |= {f"pkg{i:03d}/{part}.py": words(i, 70) + part for i in range(20) for part in "ab"}
    topics = {f"topic {i}": words(1000 + i, 50) + "é\t" for i in range(20)}
    bad = {
        f"{folder}/m.py": words(2000, 20) + folder
        for folder in ("test", "encodings", "pkg000/tests")
    }
    bad |= {
        "site-packages/x.py": "other = 1\n",
        "_sysconfigdata_x.py": "y = 1\n",
        "readme.txt": "no",
    }
    bad |= {
        "idlelib/idle_test/t.py": "z = 1\n",
        "mark.py": "'\u2581'\n",
        "none.py": "",
        "blank.py": " \n",
    }
    topic_file = f"# generated\ntopics = {topics!r}\n"
    files = [
        *(good | bad | {"copy.py": good["mod000.py"]}).items(),
        ("pydoc_data/topics.py", topic_file),
    ]
    for name, text in order(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (root / "latin.py").write_bytes(b"# \xe9\n")
    return good | {f"pydoc_data.topics.{key}": text for key, text in topics.items()}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """(out folder, library folder, {name: text} of the documents that should be in)."""
    folder = tmp_path_factory.mktemp("library")
    documents = fake_library(folder / "lib", order=list)
    assert run("stdlib", "--lib", folder / "lib", "--out", folder / "out", "--vocab-size", 400) == 0
    return folder / "out", folder / "lib", documents


def test_stdlib_decodes_byte_for_byte(library):
    out, _, documents = library
    train, val = (decode_split(out, "stdlib", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(documents.values())
    manifest = json.loads((out / "datasets/stdlib_sp400/manifest.json").read_text())
    for split, texts in (("train", train), ("val", val)):
        size = sum(len(text.encode()) for text in texts)
        assert manifest[split]["bytes"] == manifest[split]["source_bytes"] == size
    reasons = {"copy of another": 1, "empty": 2, "contains U+2581": 1, "not UTF-8": 1}
    assert (manifest["left_out"], manifest["altered_documents"]) == (reasons, 0)
    model = (out / "tokenizers" / manifest["tokenizer"]).read_bytes()
    assert manifest["tokenizer_sha256"] == hashlib.sha256(model).hexdigest()


def test_stdlib_splits_by_package(library):
    out, _, documents = library
    train, val = (set(decode_split(out, "stdlib", split)) for split in ("train", "val"))
    assert train and val and not train & val
    for i in range(20):
        a, b = documents[f"pkg{i:03d}/a.py"], documents[f"pkg{i:03d}/b.py"]
        assert (a in val) == (b in val)
    packages = {name: name.split("/")[0].removesuffix(".py") for name in documents}
    expected = {name for name in documents if side(f"split 49: {packages[name]}") < 0.05}
    assert {name for name, text in documents.items() if text in val} == expected


def test_stdlib_is_the_same_everywhere(library, tmp_path):
    out = library[0]
    fake_library(tmp_path / "elsewhere", order=lambda files: reversed(files))
    argv = (
        "stdlib",
        "--lib",
        tmp_path / "elsewhere",
        "--out",
        tmp_path / "out",
        "--vocab-size",
        400,
    )
    assert run(*argv) == 0
    assert tree(tmp_path / "out") == tree(out)
    assert len(tree(out)) == 4  # two shards, a manifest, a tokenizer: nothing temporary is left


def test_stdlib_has_a_fair_share_of_validation():
    """On the library of the Python that runs the tests, without encoding it."""
    root = Path(prepare.build_parser().parse_args(["stdlib"]).lib)
    train, val, _ = prepare.stdlib_documents(root)
    sizes = [sum(len(text.encode()) for text in texts) for texts in (train, val)]
    if sum(sizes) < 5_000_000:
        pytest.skip("this Python has no complete library")
    assert 0.03 < sizes[1] / sum(sizes) < 0.08
    assert not set(train) & set(val)


def test_a_finished_dataset_is_kept_unless_forced(library, tmp_path, capsys):
    shutil.copytree(library[0], tmp_path / "out")
    argv = ["stdlib", "--lib", library[1], "--out", tmp_path / "out", "--vocab-size", 400]
    shard = tmp_path / "out/datasets/stdlib_sp400/stdlib_val_000000.bin"
    shard.write_bytes(b"mine")
    assert run(*argv) == 0
    assert "there already" in capsys.readouterr().out
    assert shard.read_bytes() == b"mine"
    assert run(*argv, "--force") == 0
    assert tree(tmp_path / "out") == tree(library[0])
    (shard.parent / "manifest.json").unlink()
    assert run(*argv) == 2
    assert "no manifest.json" in capsys.readouterr().err


def test_an_interrupted_run_leaves_nothing(library, tmp_path, monkeypatch):
    def stop(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare.ShardWriter, "close", stop)
    argv = ["stdlib", "--lib", library[1], "--out", tmp_path, "--vocab-size", 400]
    assert run(*argv) == 130
    assert tree(tmp_path) == {}
    assert list((tmp_path / "datasets").iterdir()) == []


# --------------------------------------------------------------------------------------------------
# text


def test_text_folder(tmp_path):
    notes, out = tmp_path / "notes", tmp_path / "out"
    texts = [words(i, 150).replace("\n\n", "\r\n") for i in range(40)]
    for i, text in enumerate(texts):
        path = notes / f"sub{i % 3}" / f"{i}{['.txt', '.MD'][i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    jsonl = write_jsonl(notes / "more.jsonl", more := [words(100 + i, 90) for i in range(40)])
    jsonl.write_bytes(b"\xef\xbb\xbf" + jsonl.read_bytes())  # some editors put this mark
    (notes / "image.png").write_bytes(b"\0\1")
    (notes / ".hidden").mkdir()
    (notes / ".hidden" / "x.txt").write_text("not me")
    (notes / "white.txt").write_text(" \n\t\u3000")
    (notes / "empty.txt").write_text("")
    assert run("text", notes, "--out", out, "--name", "notes", "--vocab-size", 380) == 0
    train, val = (decode_split(out, "notes", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts + more)
    assert set(val) == {text for text in texts + more if side(text) < 0.05}
    assert 0 < len(val) < len(train)
    manifest = json.loads((out / "datasets/notes_sp380/manifest.json").read_text())
    assert manifest["left_out"] == {"only whitespace": 2}
    assert manifest["altered_documents"] == 0


def test_a_document_keeps_its_side_when_others_come(tmp_path):
    texts = [words(i, 60) for i in range(150)]
    for count in (100, 150):
        path = write_jsonl(tmp_path / f"{count}.jsonl", texts[:count], key="body")
        argv = ("text", path, "--text-key", "body", "--name", f"n{count}", "--vocab-size", 360)
        assert run(*argv, "--val-fraction", "0.2", "--out", tmp_path) == 0
    few, many = (set(decode_split(tmp_path, f"n{count}", "val")) for count in (100, 150))
    assert few == many & set(texts[:100])
    assert many == {text for text in texts if side(text) < 0.2}
    assert few


@pytest.mark.parametrize("ending", ["\n\n", "\n", " ", ""])
def test_a_single_file_is_split_without_loss(tmp_path, ending):
    rng = random.Random(1)
    text = "".join("".join(rng.choices("abcdé日🙂", k=30)) + ending for _ in range(300))
    (tmp_path / "book.txt").write_bytes(text.encode())
    assert run("text", tmp_path / "book.txt", "--out", tmp_path, "--vocab-size", 300) == 0
    train, val = (decode_split(tmp_path, "text", split) for split in ("train", "val"))
    assert train and val
    assert not set(train) & set(val)
    assert sorted("".join(train + val)) == sorted(text)
    assert all(piece in text for piece in train + val)
    if ending == "\n\n":
        assert all(piece.endswith("\n\n") for piece in train + val)


def test_long_documents_are_cut_at_paragraphs(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE_BYTES", 4000)
    texts = [words(i, 3000) for i in range(3)] + [words(100 + i, 60) for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    assert run("text", path, "--out", tmp_path, "--vocab-size", 360) == 0
    pieces = decode_split(tmp_path, "text", "train") + decode_split(tmp_path, "text", "val")
    assert max(len(piece.encode()) for piece in pieces) <= 4000
    assert all(
        piece.endswith(("\n\n", texts[i][-9:]))
        for i in range(3)
        for piece in pieces
        if len(piece) > 2000 and piece in texts[i]
    )
    assert sorted("".join(pieces)) == sorted("".join(texts))


def test_equal_documents_are_never_on_both_sides(tmp_path):
    texts = [words(i % 3, 80) for i in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    assert run("text", path, "--out", tmp_path, "--vocab-size", 360, "--val-fraction", 0.001) == 0
    train, val = (decode_split(tmp_path, "text", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (40, 20)
    assert not set(train) & set(val)


def test_explicit_validation_keeps_order_and_leaves_training(tmp_path, capsys):
    texts = [words(i, 80) for i in range(60)]
    data = write_jsonl(tmp_path / "data.jsonl", texts)
    val = write_jsonl(tmp_path / "val.jsonl", [texts[7], words(99, 50), texts[3]])
    argv = ("text", data, "--val", val, "--out", tmp_path, "--vocab-size", 360)
    assert run(*argv) == 0
    assert decode_split(tmp_path, "text", "val") == [texts[7], words(99, 50), texts[3]]
    train = decode_split(tmp_path, "text", "train")
    assert sorted(train) == sorted(text for i, text in enumerate(texts) if i not in (3, 7))
    assert "left out: 2 documents (training text that is also in --val)" in capsys.readouterr().out


def test_text_is_checked_across_the_ends_of_blocks(tmp_path):
    raw = b"x" + "é".encode() * (3 << 22)  # an é lies across the end of each block of 16 MiB
    (tmp_path / "x.txt").write_bytes(raw)
    with open(tmp_path / "x.txt", "rb") as source:
        assert b"".join(prepare.text_blocks(source, Path("x.txt"))) == raw


def nfkc_tokenizer(path: Path, bos: int = BOS, eos: int = 2) -> Path:
    """A tokenizer that turns newlines into spaces and normalises, like the published ones."""
    corpus = path.with_suffix(".txt")
    corpus.write_text("\n".join(words(i, 200).replace("\n", " ") for i in range(30)))
    spm.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=350,
        byte_fallback=True,
        add_dummy_prefix=False,
        pad_id=0,
        bos_id=bos,
        eos_id=eos,
        unk_id=3,
        minloglevel=3,
    )
    corpus.unlink()
    return path


def test_existing_tokenizer_and_validation_alone(tmp_path, capsys):
    model = nfkc_tokenizer(tmp_path / "t.model")
    texts = ["one line", "two\nlines", "\ufb01ne  spaces", "plain words here"]
    val = write_jsonl(tmp_path / "val.jsonl", texts)
    argv = ["text", "--val", val, "--tokenizer", model, "--out", tmp_path / "out", "--name", "v"]
    assert run(*argv) == 0
    out = capsys.readouterr().out
    assert "altered by the tokenizer (normalisation): 2 of 4 documents" in out
    expected = ["one line", "two lines", "fine spaces", "plain words here"]
    assert decode_split(tmp_path / "out", "v", "val") == expected
    assert (tmp_path / "out/tokenizers/v_350_bpe.model").read_bytes() == model.read_bytes()
    folder = tmp_path / "out/datasets/v_sp350"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["val"]["bytes"] == sum(len(text.encode()) for text in expected)
    assert manifest["val"]["source_bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["train"]["tokens"] == 0
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "v_val_000000.bin"]


def test_another_tokenizer_of_the_same_name_is_not_overwritten(tmp_path, capsys):
    taken = tmp_path / "tokenizers" / "text_360_bpe.model"
    taken.parent.mkdir()
    taken.write_bytes(b"precious")
    data = write_jsonl(tmp_path / "a.jsonl", [words(i, 80) for i in range(30)])
    assert run("text", data, "--out", tmp_path, "--vocab-size", 360) == 2
    assert "text_360_bpe.model is another one" in capsys.readouterr().err
    assert taken.read_bytes() == b"precious"


def error_case(tmp_path: Path, case: str) -> tuple[list, list[str]]:
    """(arguments of `text`, what the error line has to say) of a named mistake."""
    good = write_jsonl(tmp_path / "good.jsonl", [words(i, 60) for i in range(30)])
    (folder := tmp_path / "folder").mkdir()
    bad = folder / "bad.jsonl"
    lines = {
        "bad line": (
            '{"text": "a"}\n{"text": \n',
            [f"{bad}:2", "at character 11", "mend", "--skip-bad"],
        ),
        "not an object": ('{"text": "a"}\n["text"]\n', [f"{bad}:2", "list"]),
        "not text": ('{"text": 5}\n', [f"{bad}:1", "int"]),
        "missing key": (
            '{"text": "a"}\n\n{"body": "x", "id": 1}\n',
            [f"{bad}:3", "body, id", "--text-key"],
        ),
        "surrogate": ('{"text": "\\ud800"}\n', [f"{bad}:1", "surrogate"]),
    }
    if case in lines:
        bad.write_text(lines[case][0])
        return [folder], lines[case][1]
    (folder / "x.dat").write_bytes(b"x")
    (binary := tmp_path / "binary.txt").write_bytes(b"some text\0")
    (latin := tmp_path / "latin").write_bytes(b"caf\xe9")
    (utf16 := tmp_path / "utf16.txt").write_bytes("hello".encode("utf-16"))
    (tiny := tmp_path / "tiny.txt").write_text("a few words\n")
    (short := tmp_path / "short.txt").write_text(words(0, 35))
    missing = tmp_path / "missing"
    return {
        "empty folder": ([folder], [str(folder), "no text file", ".jsonl"]),
        "binary file": ([binary], [str(binary), "offset 9", "binary"]),
        "not utf-8": ([latin], [str(latin), "0xe9 at offset 3", "iconv -f LATIN1"]),
        "utf-16": ([utf16], [str(utf16), "0xff at offset 0", "iconv -f UTF-16"]),
        "no such path": ([missing], [str(missing), "no such file"]),
        "no tokenizer": ([good, "--tokenizer", missing], ["--tokenizer", str(missing)]),
        "bad tokenizer": ([good, "--tokenizer", tiny], [str(tiny), "SentencePiece"]),
        "no BOS": ([good, "--tokenizer", nfkc_tokenizer(tmp_path / "n.model", -1)], ["no BOS"]),
        "uint16": ([good, "--vocab-size", 65536], ["--vocab-size 65536", "65535"]),
        "too small": ([good, "--vocab-size", 262], ["--vocab-size 262", "at least "]),
        "too little": ([tiny], ["too little text", "about 1 kB", "--val"]),
        "too few tokens": ([short], ["too little text", "trainer needs 65", "about 1 kB"]),
        "nothing": ([], ["name text files"]),
        "name": ([good, "--name", "a_val"], ["--name a_val"]),
        "fraction": ([good, "--val-fraction", 1.5], ["--val-fraction 1.5"]),
        "all in val": ([good, "--val", good], ["no text left", "--val"]),
    }[case]


@pytest.mark.parametrize(
    "case",
    [
        *("bad line", "not an object", "missing key", "surrogate", "empty folder", "binary file"),
        *("not utf-8", "utf-16", "not text", "no such path", "no tokenizer", "bad tokenizer"),
        *("uint16", "too few tokens"),
        *("too small", "no BOS", "too little", "nothing", "name", "fraction", "all in val"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, capsys, case):
    argv, phrases = error_case(tmp_path, case)
    assert run("text", *argv, "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.startswith("prepare.py: error: ") and err.count("\n") == 1
    for phrase in phrases:
        assert phrase in err
    assert not tree(tmp_path / "out")


def test_the_vocabulary_shrinks_to_what_the_text_supports(tmp_path, capsys):
    data = write_jsonl(tmp_path / "a.jsonl", [words(i % 4, 40) for i in range(30)])
    argv = ["text", data, "--out", tmp_path, "--vocab-size"]
    assert run(*argv, 5000) == 0
    printed = capsys.readouterr().out
    most = int(re.search(r"asked for 5000 pieces; this text supports (\d+)\n", printed)[1])
    assert (tmp_path / f"datasets/text_sp{most}/manifest.json").is_file()
    first = tree(tmp_path)
    assert f"tokenizers/text_{most}_bpe.model" in first
    assert run(*argv, 5000) == 0
    assert f"text_sp{most} is there already" in capsys.readouterr().out
    assert run(*argv, most, "--force") == 0  # the same as asking for that many
    assert tree(tmp_path) == first
    assert "this text supports" not in capsys.readouterr().out


@pytest.mark.parametrize("size, fits", [(700, False), (1000, False), (20_000, True)])
def test_the_trainer_can_use_little_text(tmp_path, capsys, size, fits):
    (tmp_path / "notes.md").write_bytes(words(5, size)[:size].encode())
    assert run("text", tmp_path / "notes.md", "--out", tmp_path) == 0
    last, program, script = capsys.readouterr().out.splitlines()[-1].rpartition(" python ")
    assert (program, script) == (" python ", "train_gpt_mlx_kl.py")
    chosen = dict(pair.split("=") for pair in last.split(" "))
    assert ("TRAIN_SEQ_LEN" in chosen) == (not fits)
    folder, seq_len = Path(chosen["DATA_PATH"]), int(chosen.get("TRAIN_SEQ_LEN", 1024))
    tokenizer = trainer.load_tokenizer(Path(chosen["TOKENIZER_PATH"]))
    shards = trainer.find_shards(folder, "train")
    assert trainer.TrainWindows(shards, seq_len, 0, tokenizer.vocab).windows > 0
    assert len(trainer.load_validation(folder, tokenizer, 0).tokens) >= 2
    assert trainer.tokenizer_beside(folder).samefile(chosen["TOKENIZER_PATH"])
    if not fits:
        with pytest.raises(trainer.UserError):
            trainer.TrainWindows(shards, 2 * seq_len, 0, tokenizer.vocab)


def test_what_a_killed_run_left_is_removed(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [words(i, 80) for i in range(30)])
    left = tmp_path / "out/datasets/.text_sp360.partial/new"
    left.mkdir(parents=True)
    (left / "text_train_000007.bin").write_bytes(b"half")
    assert run("text", data, "--out", tmp_path / "out", "--vocab-size", 360) == 0
    assert [path.name for path in (tmp_path / "out/datasets").iterdir()] == ["text_sp360"]
    assert not list((tmp_path / "out").rglob("*000007*"))


# --------------------------------------------------------------------------------------------------
# text: kinds of files


TEXTS = [words(i, 60).replace("\n\n", "\r\n") + "é日\0" for i in range(30)]


def as_lines(texts) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def as_parquet(texts, **columns) -> bytes:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": texts, **columns}), buffer := io.BytesIO())
    return buffer.getvalue()


def zstd(raw: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(raw)


FORMS = {
    "lines.json": lambda: as_lines(TEXTS),
    "array.json": lambda: json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "strings.json": lambda: b"\xef\xbb\xbf\n" + json.dumps(TEXTS, ensure_ascii=False).encode(),
    "array.jsonl": lambda: json.dumps(TEXTS).encode(),
    "windows.jsonl": lambda: b"\xef\xbb\xbf" + as_lines(TEXTS).replace(b"\n", b"\r\n\r\n"),
    "a.jsonl.gz": lambda: gzip.compress(as_lines(TEXTS[:9])) + gzip.compress(as_lines(TEXTS[9:])),
    # Two frames, and between them one to be skipped, as pzstd writes.
    "a.ndjson.zst": lambda: (
        zstd(as_lines(TEXTS[:9])) + b"\x50\x2a\x4d\x18\2\0\0\0ab" + zstd(as_lines(TEXTS[9:]))
    ),
    "a.json.zst": lambda: zstd(json.dumps(TEXTS).encode()),
    "a.parquet": lambda: as_parquet(TEXTS, n=list(range(30))),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_is_read_as_what_it_is(tmp_path, name):
    (path := tmp_path / "in" / name).parent.mkdir()
    path.write_bytes(FORMS[name]())
    for place, paths in (("file", [path]), ("folder", [path.parent])):  # is it found in one, too?
        out = tmp_path / place
        assert run("text", *paths, "--out", out, "--vocab-size", 380) == 0
        train, val = (decode_split(out, "text", split) for split in ("train", "val"))
        assert sorted(train + val) == sorted(TEXTS)


def test_a_compressed_text_is_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 60)
    text = words(1, 400) + "\r\n"
    for name, raw in (("a.txt.gz", gzip.compress), ("b.md.zst", zstd)):
        (tmp_path / name).write_bytes(raw(b"\xef\xbb\xbf" + text.encode()))
        bad = prepare.BadDocuments(skip=False)
        spool = prepare.Spool(io.BytesIO(), "text", bad)
        ((start, length),) = spool.add([tmp_path / name])
        assert spool.read(start, length).decode() == text  # without the mark
        (tmp_path / "bad.txt").write_bytes(b"x" * 100 + b"\xff")
        assert spool.add([tmp_path / "bad.txt"]) == []
        assert spool.file.seek(0, io.SEEK_END) == length  # nothing of it takes room


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


class Drops(io.BytesIO):
    """Gives a few bytes at a time, whatever it is asked for."""

    def read(self, size=-1):
        return super().read(min(size, 3))


@settings(max_examples=60, deadline=None)
@example([0.25, 123.5e-10, -1234, 1e30], None, True)  # a piece may end within a number
@given(st.lists(json_values, max_size=5), st.sampled_from([None, 0, 2]), st.booleans())
def test_json_arrays_are_read_in_pieces(values, indent, ascii_only):
    raw = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode(errors="replace")
    found = list(prepare.array_records(Drops(raw), Path("x.json")))
    assert [value for _, value in found] == json.loads(raw)
    if indent is not None and all(not isinstance(value, (dict, list)) for value in values):
        assert [line for line, _ in found] == list(range(2, 2 + len(values)))


def test_files_are_not_read_whole(tmp_path):
    rng = random.Random(0)
    text = "".join(rng.choices("abcdefghij é", k=3 << 20))
    texts = [text[start : start + 1000] for start in range(0, len(text), 1000)]
    forms = {"a.json": json.dumps(texts).encode(), "a.jsonl": as_lines(texts)}
    forms |= {
        "a.jsonl.gz": gzip.compress(forms["a.jsonl"], 1),
        "a.jsonl.zst": zstd(forms["a.jsonl"]),
    }
    for name, raw in forms.items():
        (tmp_path / name).write_bytes(raw)
        with open(tmp_path / name, "rb") as file, prepare.opened(tmp_path / name) as source:
            documents = prepare.json_documents(source, tmp_path / name, "text")
            assert b"".join(next(documents)).decode() == texts[0]
            lowest = source
            while hasattr(lowest, "raw") or hasattr(lowest, "file") or hasattr(lowest, "fileobj"):
                inner = getattr(lowest, "fileobj", None) or getattr(lowest, "file", None)
                if inner is None and isinstance(lowest.raw, io.FileIO):
                    break
                lowest = inner or lowest.raw
            assert lowest.tell() < len(raw) // 2, name
            assert sum(1 for _ in documents) == len(texts) - 1
            assert file.read(1) == raw[:1]


BAD_LINES = {
    2: (b'{"text": \n', "not JSON (Expecting value at character 11)", "not JSON"),
    3: (b'{"text": "caf\xe9"}\n', "not UTF-8 (byte 0xe9 at offset 13)", "not UTF-8"),
    5: (b'{"text": "\\ud800"}\n', "lone surrogate (\\ud800)", "lone surrogate"),
    6: (b'{"body": "x", "\\udc00": 1}\n', 'no text "text" in body, \\udc00', "no text"),
    7: (b"3\n", "the record is int, not text", "no text"),
    8: (b'{"text": null}\n', '"text" is NoneType, not text', "no text"),
    9: (b"[" * 50_000 + b"\n", "not JSON (maximum recursion", "not JSON"),
}


def test_all_bad_documents_are_reported_at_once(tmp_path, capsys):
    good = [words(i, 60) for i in range(30)]
    lines = list(as_lines(good).splitlines(keepends=True))
    for number, (raw, _, _) in BAD_LINES.items():
        lines.insert(number - 1, raw)
    (folder := tmp_path / "in").mkdir()
    (folder / "a.jsonl").write_bytes(b"".join(lines))
    (folder / "b.txt").write_bytes(b"x" * 1000 + b"\xff")
    (folder / "c.txt").write_bytes(b"x\0")
    (folder / "d.json").write_bytes(b'["ok",\n "caf\xe9",\n\n {"body": 1}]')
    argv = ["text", folder, "--out", tmp_path / "out", "--vocab-size", 380]
    assert run(*argv) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "prepare.py: error: 11 bad documents; --skip-bad leaves out what is bad:"
    expected = [f"{folder}/a.jsonl:{n}: {what}" for n, (_, what, _) in BAD_LINES.items()]
    expected += [f"{folder}/b.txt: not UTF-8 (byte 0xff at offset 1,000)"]
    expected += [f"{folder}/c.txt: NUL byte at offset 1", f"{folder}/d.json:2: lone surrogate or"]
    expected += [f'{folder}/d.json:4: no text "text" in body']
    for line, start in zip(err[1:], expected, strict=True):
        assert line.startswith(f"  {start}")
    assert not tree(tmp_path / "out")

    assert run(*argv, "--skip-bad") == 0
    printed = capsys.readouterr().out
    assert all(f"left out: {start}" in printed for start in expected)
    assert "left out: 4 documents (no text)" in printed
    texts = [
        text for part in ("train", "val") for text in decode_split(tmp_path / "out", "text", part)
    ]
    assert sorted(texts) == sorted([*good, "ok"])
    manifest = json.loads((tmp_path / "out/datasets/text_sp380/manifest.json").read_text())
    kinds = Counter(kind for _, _, kind in BAD_LINES.values())
    kinds += {"not UTF-8": 1, "NUL byte": 1, "lone surrogate or not UTF-8": 1, "no text": 1}
    assert manifest["left_out"] == dict(kinds) | {"only whitespace": 0}


def test_bad_documents_are_listed_up_to_twenty(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"no\n" * 1000)
    assert run("text", tmp_path / "a.jsonl", "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 22 and "1,000 bad documents" in err[0] and ":20: " in err[20]
    assert err[21] == "  and 980 more"
    argv = ["text", tmp_path / "no", tmp_path / "nor", "--out", tmp_path / "out", "--skip-bad"]
    assert run(*argv) == 2  # a path that is not there is never skipped
    err = capsys.readouterr().err
    assert f"{tmp_path / 'no'}: no such" in err and f"{tmp_path / 'nor'}: no such" in err


BROKEN = {
    "pretty.json": (lambda: b'{\n "articles": []\n}', "neither JSON lines nor one array"),
    "element.json": (lambda: b'["a",\n {"text": }]', "element.json:2: broken JSON array (Expect"),
    "open.json": (lambda: b'["a"\n', "a comma or a closing bracket is missing"),
    "two.json": (lambda: b'["a"]\n["b"]', "two.json:2: broken JSON array (text after the end"),
    "cut.jsonl.gz": (lambda: gzip.compress(as_lines(TEXTS))[:-50], "damaged or cut short"),
    "not.txt.gz": (lambda: b"plain text", "damaged or cut short"),
    "cut.jsonl.zst": (lambda: zstd(as_lines(TEXTS))[:-5], "damaged or cut short"),
    "frame.txt.zst": (lambda: zstd(b"x" * 100) + zstd(b"y" * 99)[:-1], "damaged or cut short"),
    "not.txt.zst": (lambda: b"plain text", "damaged or cut short"),
    "cut.parquet": (lambda: as_parquet(TEXTS)[:-9], "no readable Parquet file"),
    "key.parquet": (lambda: as_parquet(["a"]), 'no column "body" among text (--text-key?)'),
    "int.parquet": (lambda: as_parquet(["a"], body=[1]), "no readable Parquet file with text"),
    "a.parquet.gz": (lambda: gzip.compress(as_parquet(["a"])), "decompress it first"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_never_skipped(tmp_path, capsys, name):
    """What follows the damage would be lost without a word."""
    (path := tmp_path / name).write_bytes(BROKEN[name][0]())
    argv = ["text", path, "--out", tmp_path / "out", "--skip-bad"]
    assert run(*argv, *(["--text-key", "body"] if "parquet" in name else [])) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"prepare.py: error: {path}") and err.count("\n") == 1
    assert BROKEN[name][1] in err
    assert not tree(tmp_path / "out")


def test_bad_rows_of_parquet_files(tmp_path, capsys):
    (tmp_path / "a.parquet").write_bytes(as_parquet([b"good", b"caf\xe9", None, b"fine"]))
    assert run("text", tmp_path / "a.parquet", "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "a.parquet:2: not UTF-8 (byte 0xe9 at offset 3)" in err
    assert "a.parquet:3: no text in this row" in err


@pytest.mark.parametrize("name, package", [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_library_is_named(tmp_path, capsys, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    assert run("text", tmp_path / name, "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert f"{name}: {package} is missing: `pip install {package}`" in err
    assert err.count("\n") == 1


def test_a_huge_line_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE_BYTES", 4000)
    line = words(3, 9000).replace("\n", " ")
    (tmp_path / "line.jsonl").write_bytes(as_lines([line] + [words(i, 20) for i in range(30)]))
    assert run("text", tmp_path / "line.jsonl", "--out", tmp_path, "--vocab-size", 360) == 0
    texts = [text for part in ("train", "val") for text in decode_split(tmp_path, "text", part)]
    assert max(len(text) for text in texts) == 4000
    assert sum(len(text) for text in texts if text in line) == len(line)


def test_other_files_in_a_folder_are_mentioned(tmp_path, capsys):
    (folder := tmp_path / "in").mkdir()
    (folder / "a.jsonl").write_bytes(as_lines(TEXTS))
    for name in ("a.png", "b.png", "Makefile", "x.tar.gz"):
        (folder / name).write_bytes(b"")
    assert run("text", folder, "--out", tmp_path / "out", "--vocab-size", 380) == 0
    assert "not read unless named (no suffix 1, .png 2, .tar 1)" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# fineweb: a hub on the loopback interface


class FakeHub(ThreadingHTTPServer):
    """Serves `files` {path in the repository: bytes} as the hub does; `log`: (method, path, Range).

    Shards are redirected to another host, `localhost`, as the hub does with large files.

    busy: {path: requests to refuse}
    cut: {path: [bytes after which the connection is closed, one for each request]}
    paused: paths whose sending stops after 30,000 bytes, until `release` is set
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.files, self.log, self.cut, self.tokens = {}, [], {}, set()
        self.busy, self.sizes = {}, {}
        self.damage, self.gated, self.knows_ranges = {}, False, True
        self.paused, self.stalled, self.release = set(), threading.Event(), threading.Event()

    def downloaded(self) -> list[str]:
        return [path.rsplit("/", 1)[-1] for method, path, _ in self.log if method == "GET"]

    def ranges(self, path: str) -> list[str | None]:
        return [span for _, name, span in self.log if name == path]


class FakeHubHandler(BaseHTTPRequestHandler):
    prefix, tree = "/datasets/some/repo/resolve/main/", "/api/datasets/some/repo/tree/main"

    def log_message(self, *args):
        pass

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        url, hub = urlsplit(self.path), self.server
        hub.tokens.add((self.headers["Host"].split(":")[0], self.headers.get("Authorization")))
        if url.path == self.tree:
            self.answer(200, json.dumps([self.listed(path) for path in hub.files]).encode())
            return
        path = url.path.removeprefix(self.prefix).removeprefix("/cdn/")
        if not url.path.startswith((self.prefix, "/cdn/")):
            self.answer(404, X_Error_Code="RepoNotFound")
        elif hub.gated:
            self.answer(403, X_Error_Code="GatedRepo")
        elif hub.files[path] is None:
            hub.log.append((self.command, path, self.headers.get("Range")))
            self.answer(404, X_Error_Code="EntryNotFound")
        elif hub.busy.get(path, 0):
            hub.busy[path] -= 1
            self.answer(503)
        elif path.endswith(".bin") and not url.path.startswith("/cdn/"):
            self.answer(302, Location=f"http://localhost:{hub.server_port}/cdn/{path}?sig=1")
        else:
            self.send_file(path)

    def listed(self, path: str) -> dict:
        raw = self.server.files[path] or b""
        item = {"type": "file", "path": path, "size": self.server.sizes.get(path, len(raw))}
        item["oid"] = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
        if path.endswith(".bin"):
            digest = hashlib.sha256(raw).hexdigest()
            item["lfs"] = {"oid": digest, "size": len(raw), "pointerSize": 130}
        return item

    def send_file(self, path: str) -> None:
        hub, span = self.server, self.headers.get("Range")
        hub.log.append((self.command, path, span))
        raw = hub.damage.pop(path, hub.files[path])
        start = int(span.removeprefix("bytes=").split("-")[0]) if span and hub.knows_ranges else 0
        extra = {"Content_Range": f"bytes {start}-{len(raw) - 1}/{len(raw)}"} if start else {}
        cuts = hub.cut.get(path, [])
        stop = cuts.pop(0) if cuts else 30_000 if path in hub.paused else len(raw)
        self.answer(206 if start else 200, raw[start:stop], len(raw) - start, **extra)
        if path in hub.paused:
            self.wfile.flush()
            hub.stalled.set()
            hub.release.wait(30)


def shard_bytes(seed: int, vocab: int = 350) -> bytes:
    tokens = np.random.default_rng(seed).integers(4, vocab, 20_000).astype("<u2")
    tokens[::1000] = BOS
    return prepare.shard_header(len(tokens)) + tokens.tobytes()


def add_dataset(files: dict, name: str, vocab: int, root: str = "datasets/") -> None:
    for split, count in (("val", 1), ("train", 3)):
        for i in range(count):
            path = f"{root}datasets/fineweb10B_{name}/fineweb_{split}_{i:06d}.bin"
            files[path] = shard_bytes(i + 10 * count, vocab)


SP350 = "datasets/datasets/fineweb10B_sp350"
TRAIN_0, MODEL = f"{SP350}/fineweb_train_000000.bin", "datasets/tokenizers/fineweb_350_bpe.model"


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip("huggingface_hub")
    server = FakeHub()
    add_dataset(server.files, "sp350", 350)
    server.files[MODEL] = nfkc_tokenizer(tmp_path / "hub.model").read_bytes()
    server.files["README.md"] = server.files["datasets/tokenizers/notes.txt"] = b"hello"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def fetch_process(hub: FakeHub, out: Path, *argv, **environment) -> subprocess.Popen:
    """`fineweb` in a process of its own, because the hub's address is read at import."""
    hub.log.clear()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(out.parent / "hf_home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_secret",
        "NO_PROXY": "127.0.0.1,localhost",
        **environment,
    }
    command = [sys.executable, SCRIPT, "fineweb", "--repo", "some/repo", "--variant", "sp350"]
    command = [str(part) for part in [*command, "--out", out, *argv]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def fetch(hub: FakeHub, out: Path, *argv, status: int = 0, **environment) -> str:
    """What `fineweb` prints; its one line of error if it has to end with another status."""
    process = fetch_process(hub, out, *argv, **environment)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert errors.count("\n") == (status > 0)
    return errors if status else printed


def placed(out: Path) -> list[str]:
    return sorted(tree(out)) if out.exists() else []


COMPLETE = [
    *(f"datasets/fineweb10B_sp350/fineweb_{name}_000000.bin" for name in ("train", "val")),
    "datasets/fineweb10B_sp350/manifest.json",
    "tokenizers/fineweb_350_bpe.model",
]


def test_fineweb_downloads_verifies_and_goes_on(hub, tmp_path):
    out = tmp_path / "out"
    folder = out / "datasets" / "fineweb10B_sp350"
    printed = fetch(hub, out, "--train-shards", 2)
    assert "train: 2 shards, 40 documents, 40,000 tokens" in printed
    names = ["fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "manifest.json"]
    for name in names:
        assert (folder / name).read_bytes() == hub.files[f"{SP350}/{name}"]
    assert (out / "tokenizers" / "fineweb_350_bpe.model").read_bytes() == hub.files[MODEL]
    assert [path.name for path in (out / "datasets").iterdir()] == [folder.name]
    assert {host for host, token in hub.tokens if token} == {"127.0.0.1"}
    assert ("127.0.0.1", "Bearer hf_secret") in hub.tokens  # but no other host may see it

    printed = fetch(hub, out, "--train-shards", 1)
    assert "there already" in printed and not hub.log
    (folder / names[1]).write_bytes((folder / names[1]).read_bytes()[:-100])
    fetch(hub, out, "--train-shards", 2)
    assert hub.downloaded() == ["fineweb_350_bpe.model", names[1]]
    fetch(hub, out, "--train-shards", 3)
    assert hub.downloaded() == ["fineweb_350_bpe.model", "fineweb_train_000002.bin"]
    assert len(read_split(folder, "train")) == 60_000
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["train"] == {"documents": 60, "tokens": 60_000, "shards": 3}


def test_fineweb_goes_on_after_cuts(hub, tmp_path):
    hub.cut[TRAIN_0], hub.busy[TRAIN_0] = [10_000, 30_000], 1
    fetch(hub, tmp_path / "out")
    assert hub.ranges(TRAIN_0) == [None, "bytes=10000-", "bytes=30000-"]
    assert placed(tmp_path / "out") == COMPLETE

    hub.cut[TRAIN_0], hub.knows_ranges = [10_000], False
    fetch(hub, tmp_path / "other")
    assert hub.ranges(TRAIN_0) == [None, "bytes=10000-"]
    assert tree(tmp_path / "other") == tree(tmp_path / "out")


def test_fineweb_goes_on_after_kill_9(hub, tmp_path):
    out = tmp_path / "out"
    hub.paused.add(TRAIN_0)
    with fetch_process(hub, out) as process:
        assert hub.stalled.wait(30)
        while sum(path.stat().st_size for path in out.rglob("fineweb_train*")) < 30_000:
            assert process.poll() is None
        assert "another run is at work" in fetch(hub, out, status=2)
        process.kill()
    hub.release.set()
    hub.paused.clear()
    assert not any(name.endswith("000000.bin") and "train" in name for name in placed(out))
    fetch(hub, out)
    assert hub.ranges(TRAIN_0) == ["bytes=30000-"]
    assert placed(out) == COMPLETE
    assert (out / COMPLETE[0]).read_bytes() == hub.files[TRAIN_0]


def test_fineweb_gives_up_where_nothing_comes(hub, tmp_path):
    hub.cut[TRAIN_0] = [5000, *[0] * 20]
    err = fetch(hub, tmp_path / "out", status=2)
    assert "some/repo" in err and "then run this again" in err
    assert len(hub.ranges(TRAIN_0)) == 1 + prepare.RETRIES
    hub.cut.clear()
    fetch(hub, tmp_path / "out")
    assert hub.ranges(TRAIN_0) == ["bytes=5000-"]


def test_fineweb_refuses_damage(hub, tmp_path):
    out, whole = tmp_path / "out", hub.files[TRAIN_0]
    hub.damage[TRAIN_0] = whole[:-1] + bytes([whole[-1] ^ 1])
    err = fetch(hub, out, status=2)
    assert "fineweb_train_000000.bin arrived damaged" in err and "run again" in err
    assert not list(out.rglob("fineweb_train*"))
    hub.files[TRAIN_0] = whole[:-1000]  # published so
    err = fetch(hub, out, status=2)
    assert "its header asks for 41024" in err and "some/repo publishes it so" in err
    assert not list(out.rglob("fineweb_train*"))
    assert not list(out.rglob("manifest.json"))
    hub.files[TRAIN_0] = whole
    fetch(hub, out)
    assert placed(out) == COMPLETE


def test_fineweb_mistakes(hub, tmp_path):
    err = fetch(hub, tmp_path / "a", "--train-shards", 4, status=2)
    assert "--train-shards 4: some/repo has 3" in err
    err = fetch(hub, tmp_path / "a", "--variant", "sp8192", status=2)
    assert "--variant sp8192: some/repo has sp350" in err
    err = fetch(hub, tmp_path / "a", "--repo", "some/other", status=2)
    assert "--repo some/other: no such dataset" in err
    hub.sizes[TRAIN_0] = 10**16
    err = fetch(hub, tmp_path / "a", status=2)
    assert "needs 10,000,000.0 GB" in err and "--train-shards" in err
    assert not [name for name in hub.downloaded() if name.endswith(".bin")]
    hub.sizes.clear()
    digest = hashlib.sha256(hub.files[TRAIN_0]).hexdigest()
    folder = tmp_path / "b/datasets/.fineweb10B_sp350.partial"
    (folder / f"fineweb_train_000000.bin.{digest[:16]}").mkdir(parents=True)
    err = fetch(hub, tmp_path / "b", status=2)
    assert str(folder) in err and "no answer" not in err  # trouble with the disk, not the network
    hub.sizes[TRAIN_0] = 41_024
    hub.files[TRAIN_0] = None
    err = fetch(hub, tmp_path / "c", status=2)
    assert f"{TRAIN_0} is missing in some/repo" in err
    hub.gated = True
    err = fetch(hub, tmp_path / "d", status=2)
    assert "some/repo is gated" in err and "hf auth login" in err
    assert not placed(tmp_path / "a") and not placed(tmp_path / "d")


def test_fineweb_without_the_hub(hub, tmp_path):
    out = tmp_path / "out"
    err = fetch(hub, out, status=2, HF_HUB_OFFLINE="1")
    folder, tokenizers = out / "datasets/fineweb10B_sp350", out / "tokenizers"
    for phrase in ("some/repo", SP350, f"into {folder}", f"into {tokenizers}", "run this again"):
        assert phrase in err
    folder.mkdir(parents=True)
    tokenizers.mkdir()
    for path, raw in hub.files.items():  # as the user is told
        if path.startswith((SP350, MODEL)):
            (out / path.removeprefix("datasets/")).write_bytes(raw)
    (folder / "fineweb_val_bytes_000000.bin").write_bytes(b"sidecar")
    (tokenizers / "fineweb_350_bpe.vocab").write_bytes(b"pieces")
    fetch(hub, out, "--train-shards", 2, HF_HUB_OFFLINE="1")
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["train"]["shards"] == 2
    assert manifest["tokenizer"] == "fineweb_350_bpe.model"
    (folder / "manifest.json").unlink()
    (folder / "fineweb_val_000000.bin").write_bytes(b"x" * 5000)
    assert "header is wrong" in fetch(hub, out, status=2, HF_HUB_OFFLINE="1")


LONG = "sp350_lossless_caps_v1_reserved"


def test_fineweb_variants(hub, tmp_path):
    out, caps = tmp_path / "out", nfkc_tokenizer(tmp_path / "caps.model", eos=4).read_bytes()
    add_dataset(hub.files, LONG, 350)
    hub.files[f"datasets/datasets/fineweb10B_{LONG}/fineweb_val_bytes_000000.bin"] = b"sidecar"
    hub.files["datasets/tokenizers/fineweb_350_bpe_lossless_caps_v1_reserved.model"] = caps
    fetch(hub, out, "--variant", LONG)
    folder = out / "datasets" / f"fineweb10B_{LONG}"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["tokenizer"] == "fineweb_350_bpe_lossless_caps_v1_reserved.model"
    assert (out / "tokenizers" / manifest["tokenizer"]).read_bytes() == caps
    assert len(list(folder.iterdir())) == 3  # no byte counts, which the trainer refuses

    stated = {"name": "t", "path": "tokenizers/fineweb_350_bpe_lossless_caps_v1_reserved.model"}
    entry = {"name": "fineweb10B_sp350", "tokenizer_name": "t"}
    facts = {"datasets": [entry], "tokenizers": [stated]}
    hub.files["datasets/manifest.json"] = json.dumps(facts).encode()
    fetch(hub, tmp_path / "stated")
    assert "tokenizers/" + Path(stated["path"]).name in placed(tmp_path / "stated")
    fetch(hub, tmp_path / "named", "--tokenizer", Path(MODEL).name)
    assert placed(tmp_path / "named") == COMPLETE
    (tmp_path / "named" / COMPLETE[-1]).write_bytes(caps)  # of other shards, perhaps
    err = fetch(hub, tmp_path / "named", "--tokenizer", Path(MODEL).name, status=2)
    assert f"{COMPLETE[-1]} is not some/repo's: remove it" in err
    add_dataset(hub.files, "sp351", 350)
    argv = ["--variant", "sp351", "--tokenizer", Path(MODEL).name]
    assert "has 350 pieces" in fetch(hub, tmp_path / "size", *argv, status=2)
    del hub.files["datasets/datasets/fineweb10B_sp351/fineweb_val_000000.bin"]
    err = fetch(hub, tmp_path / "size", *argv, status=2)
    assert "no validation shards of fineweb10B_sp351" in err
    hub.files["datasets/manifest.json"] = b"{"
    del hub.files[MODEL]
    err = fetch(hub, tmp_path / "none", status=2)
    assert "fineweb_350_bpe_lossless_caps_v1_reserved.model: --tokenizer FILE" in err
    err = fetch(hub, out, "--repo", "some/other", "--variant", LONG, status=2)
    assert "some/repo" in err and "choose another --out" in err


def test_fineweb_bytes_get_a_model_for_the_trainer(hub, tmp_path):
    config = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": 4}
    config["byte_count"] = 256
    facts = {"tokenizer_type": "pure_byte", "config": config, "vocab_size": 260}
    path = "matched/tokenizers/fineweb_pure_byte_260.json"
    add_dataset(hub.files, "byte260", 260, root="matched/")
    hub.files[path] = json.dumps(facts).encode()
    fetch(hub, tmp_path / "out", "--variant", "byte260")
    model = tmp_path / "out" / "tokenizers" / "fineweb_pure_byte_260.model"
    sp = spm.SentencePieceProcessor(model_file=str(model))
    assert (sp.vocab_size(), sp.bos_id(), sp.eos_id(), sp.pad_id()) == (260, 1, 2, 0)
    text = " a  b\n\0日本\u2581🙂<s>"
    assert sp.encode(text) == [4 + byte for byte in text.encode()]
    assert sp.decode(sp.encode(text)) == text
    hub.files[path] = json.dumps(facts | {"config": config | {"byte_offset": 5}}).encode()
    err = fetch(hub, tmp_path / "other", "--variant", "byte260", status=2)
    assert path in err and "the trainer cannot use it" in err


# --------------------------------------------------------------------------------------------------
# Real text


@pytest.fixture
def real_data() -> Path:
    if not os.environ.get("TEST_DATA_DIR"):
        pytest.skip("TEST_DATA_DIR (real text and the published tokenizers) is not set")
    return Path(os.environ["TEST_DATA_DIR"])


def test_real_validation_text_with_the_published_tokenizer(real_data, tmp_path):
    source = real_data / "val_fineweb_dev.jsonl"
    model = real_data / "tokenizers" / "fineweb_1024_bpe.model"
    assert (
        run("text", "--val", source, "--tokenizer", model, "--out", tmp_path, "--name", "dev") == 0
    )
    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    sp = spm.SentencePieceProcessor(model_file=str(model))
    expected = [token for text in texts for token in [BOS, *sp.encode(text)]]
    assert read_split(tmp_path / "datasets" / "dev_sp1024", "val").tolist() == expected
    decoded = decode_split(tmp_path, "dev", "val")
    manifest = json.loads((tmp_path / "datasets/dev_sp1024/manifest.json").read_text())
    assert manifest["val"]["bytes"] == sum(len(text.encode()) for text in decoded)
    assert manifest["altered_documents"] == sum(a != b for a, b in zip(texts, decoded, strict=True))


def test_real_text_with_a_tokenizer_of_its_own(real_data, tmp_path):
    lines = (real_data / "train_web.jsonl").read_text().splitlines()[:800]
    (tmp_path / "web.jsonl").write_text("\n".join(lines))
    assert run("text", tmp_path / "web.jsonl", "--out", tmp_path) == 0
    texts = decode_split(tmp_path, "text", "train") + decode_split(tmp_path, "text", "val")
    assert sorted(texts) == sorted(json.loads(line)["text"] for line in lines)


# --------------------------------------------------------------------------------------------------
# Running it


def test_the_header_for_uv_names_what_is_imported():
    source = SCRIPT.read_text()
    header = re.search(r"\A# /// script\n((?:# .*\n)+)# ///\n", source)[1]
    tomllib = pytest.importorskip("tomllib")
    facts = tomllib.loads(re.sub("(?m)^# ?", "", header))
    named = {re.match(r"\w+", requirement)[0] for requirement in facts["dependencies"]}
    tops = re.findall(r"(?m)^(?:import|from) (\w+)", source)
    needed = set(re.findall(r'need\("(\w+)', source)) | set(tops) - sys.stdlib_module_names
    assert needed == named | {"pyarrow"}  # large, and for few
