"""data/prepare.py: shards, splits, errors and downloads, checked with readers of their own."""

import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

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


def nfkc_tokenizer(path: Path, bos: int = BOS) -> Path:
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
        eos_id=2,
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
        "bad line": ('{"text": "a"}\n{"text": \n', [f"{bad}:2", "mend"]),
        "not an object": ('["text"]\n', [f"{bad}:1", "list"]),
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
    (tiny := tmp_path / "tiny.txt").write_text("a few words\n")
    missing = tmp_path / "missing"
    return {
        "empty folder": ([folder], [str(folder), "no text file", ".jsonl"]),
        "binary file": ([tmp_path], [str(binary), "binary"]),
        "not utf-8": ([latin], [str(latin), "UTF-8"]),
        "no such path": ([missing], [str(missing), "no such file"]),
        "no tokenizer": ([good, "--tokenizer", missing], ["--tokenizer", str(missing)]),
        "bad tokenizer": ([good, "--tokenizer", tiny], [str(tiny), "SentencePiece"]),
        "no BOS": ([good, "--tokenizer", nfkc_tokenizer(tmp_path / "n.model", -1)], ["no BOS"]),
        "uint16": ([good, "--vocab-size", 65536], ["--vocab-size 65536", "65535"]),
        "too large": ([good, "--vocab-size", 60000], ["--vocab-size 60000", "it reaches "]),
        "too small": ([good, "--vocab-size", 262], ["--vocab-size 262", "at least "]),
        "too little": ([tiny], ["too little text", "--val"]),
        "nothing": ([], ["name text files"]),
        "name": ([good, "--name", "a_val"], ["--name a_val"]),
        "fraction": ([good, "--val-fraction", 1.5], ["--val-fraction 1.5"]),
        "all in val": ([good, "--val", good], ["no text left", "--val"]),
    }[case]


@pytest.mark.parametrize(
    "case",
    [
        *("bad line", "not an object", "missing key", "surrogate", "empty folder", "binary file"),
        *("not utf-8", "no such path", "no tokenizer", "bad tokenizer", "uint16", "too large"),
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


def test_the_size_it_says_it_reaches_is_reached(tmp_path, capsys):
    data = write_jsonl(tmp_path / "a.jsonl", [words(i % 4, 40) for i in range(30)])
    assert run("text", data, "--out", tmp_path, "--vocab-size", 5000) == 2
    most = int(capsys.readouterr().err.split("it reaches ")[1])
    assert run("text", data, "--out", tmp_path, "--vocab-size", most) == 0
    assert run("text", data, "--out", tmp_path, "--vocab-size", most + 1) == 2


# --------------------------------------------------------------------------------------------------
# fineweb: a hub on the loopback interface


class FakeHub(ThreadingHTTPServer):
    """Serves `files` {path in the repository: bytes}; `log` has every (method, path, Range).

    cut: path -> bytes after which the connection is closed, once.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.files, self.log, self.cut = {}, [], {}

    def downloaded(self) -> list[str]:
        return [path.rsplit("/", 1)[-1] for method, path, _ in self.log if method == "GET"]


class FakeHubHandler(BaseHTTPRequestHandler):
    prefix = "/datasets/some/repo/resolve/main/"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(send_body=False)

    def do_GET(self):
        self.answer(send_body=True)

    def answer(self, send_body: bool) -> None:
        path, span = self.path.removeprefix(self.prefix), self.headers.get("Range")
        self.server.log.append((self.command, path, span))
        raw = self.server.files.get(path)
        if raw is None or not self.path.startswith(self.prefix):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{hashlib.sha256(raw).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(raw) - start))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(raw) - 1}/{len(raw)}")
        self.end_headers()
        if send_body:
            self.wfile.write(raw[start : self.server.cut.pop(path, len(raw))])


def shard_bytes(seed: int, vocab: int = 350) -> bytes:
    tokens = np.random.default_rng(seed).integers(4, vocab, 20_000).astype("<u2")
    tokens[::1000] = BOS
    return prepare.shard_header(len(tokens)) + tokens.tobytes()


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip("huggingface_hub")
    server = FakeHub()
    root, name = "datasets/datasets/fineweb10B_sp350", "sp350"
    for split, count in (("val", 1), ("train", 3)):
        for i in range(count):
            raw = shard_bytes(i + 10 * count)
            server.files[f"{root}/fineweb_{split}_{i:06d}.bin"] = raw
    model = nfkc_tokenizer(tmp_path / "hub.model").read_bytes()
    server.files["datasets/tokenizers/fineweb_350_bpe.model"] = model
    stats = {"files_train": 3, "files_val": 1}
    dataset = {"name": "fineweb10B_sp350", "tokenizer_name": name, "stats": stats}
    tokenizer = {"name": name, "model_path": "tokenizers/fineweb_350_bpe.model"}
    manifest = {"datasets": [dataset], "tokenizers": [tokenizer]}
    server.files["datasets/manifest.json"] = json.dumps(manifest).encode()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(hub: FakeHub, out: Path, *argv, status: int = 0) -> str:
    """Run `fineweb` in a process of its own, because the hub's address is read at import."""
    hub.log.clear()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(out.parent / "hf_home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, SCRIPT, "fineweb", "--repo", "some/repo", "--vocab-size", 350]
    command += ["--out", out, *argv]
    result = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr if status else result.stdout


def test_fineweb_downloads_verifies_and_resumes(hub, tmp_path):
    out = tmp_path / "out"
    folder = out / "datasets" / "fineweb10B_sp350"
    printed = fetch(hub, out, "--train-shards", 2)
    assert "train: 2 shards, 40 documents, 40,000 tokens" in printed
    names = ["fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "manifest.json"]
    for name in names:
        assert (folder / name).read_bytes() == hub.files[f"datasets/datasets/{folder.name}/{name}"]
    model = out / "tokenizers" / "fineweb_350_bpe.model"
    assert model.read_bytes() == hub.files["datasets/tokenizers/fineweb_350_bpe.model"]
    assert [path.name for path in (out / "datasets").iterdir()] == [folder.name]

    printed = fetch(hub, out, "--train-shards", 1)
    assert "there already" in printed and not hub.log
    (folder / names[1]).write_bytes((folder / names[1]).read_bytes()[:-100])
    fetch(hub, out, "--train-shards", 3)
    assert sorted(hub.downloaded()) == [names[1], "fineweb_train_000002.bin", "manifest.json"]
    assert len(read_split(folder, "train")) == 60_000
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["train"] == {"documents": 60, "tokens": 60_000, "shards": 3}


def test_fineweb_survives_a_broken_connection(hub, tmp_path):
    out, path = tmp_path / "out", "datasets/datasets/fineweb10B_sp350/fineweb_train_000000.bin"
    hub.cut[path] = 30_000
    fetch(hub, out)
    assert (out / path.removeprefix("datasets/")).read_bytes() == hub.files[path]
    assert hub.downloaded().count("fineweb_train_000000.bin") == 2


def test_fineweb_refuses_a_truncated_shard(hub, tmp_path):
    out, path = tmp_path / "out", "datasets/datasets/fineweb10B_sp350/fineweb_train_000000.bin"
    whole = hub.files[path]
    hub.files[path] = whole[:-1000]
    err = fetch(hub, out, status=2)
    assert err.count("\n") == 1
    assert not list(out.rglob("fineweb_train_000000.bin"))
    assert "its header asks for 41024" in err
    assert "removed" in err
    folder = out / "datasets" / "fineweb10B_sp350"
    assert [path.name for path in folder.iterdir()] == ["fineweb_val_000000.bin"]
    hub.files[path] = whole
    fetch(hub, out)
    assert (folder / "fineweb_train_000000.bin").read_bytes() == whole


def test_fineweb_mistakes(hub, tmp_path):
    err = fetch(hub, tmp_path / "a", "--train-shards", 4, status=2)
    assert "--train-shards 4: some/repo has 3" in err
    err = fetch(hub, tmp_path / "b", "--vocab-size", 8192, status=2)
    assert "--vocab-size 8192: some/repo has only fineweb10B_sp350" in err
    del hub.files["datasets/datasets/fineweb10B_sp350/fineweb_val_000000.bin"]
    err = fetch(hub, tmp_path / "c", status=2)
    assert "fineweb_val_000000.bin" in err and err.count("\n") == 1


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


def test_json_is_not_trained_on_as_prose(tmp_path):
    path = tmp_path / "articles.json"
    path.write_text('[{"text": "one"}, {"text": "two"}]')
    with pytest.raises(prepare.PrepareError, match=r"articles\.json: .*\.jsonl"):
        list(prepare.text_files([path]))
