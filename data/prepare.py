# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "numpy>=1.26", "sentencepiece>=0.2", "tqdm>=4.66",
#   "huggingface_hub>=1.0", "zstandard>=0.22",
# ]
# ///
"""Make token shards for train_gpt_mlx_kl.py from one of three sources.

    python data/prepare.py stdlib                     text that this Python installation carries
    python data/prepare.py text notes/ more.jsonl     your own text
    python data/prepare.py fineweb --train-shards 10  the published FineWeb shards, downloaded

`uv run data/prepare.py ...` needs nothing installed. Shards are 256 little-endian int32 of header
(20240520, 1, number of tokens, zeros), then the tokens as uint16. Every document starts with the
tokenizer's BOS and has no EOS. See data/README.md.
"""

# Map: shards -> tokenizer -> dataset -> stdlib -> reading files -> text -> fineweb -> main.

import argparse
import ast
import codecs
import contextlib
import fcntl
import gzip
import hashlib
import importlib
import io
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SHARD_TOKENS = 100_000_000  # per shard, as published
MAX_VOCAB = 65_535
BATCH_CHARS = 4 << 20  # encoded at once: bounds memory and keeps all threads busy
SAMPLE_CHARS = 32 << 20  # of training text that a tokenizer is trained on: about 10 s
SPLIT_SALT = "split 49: "  # see stdlib_is_val
WINDOW, LEAST_WINDOW = 1024, 64  # the trainer's TRAIN_SEQ_LEN: its default, and what makes sense
ENOUGH = "about 1 kB of text will do"
TRAINER = "python train_gpt_mlx_kl.py"
FEW_DOCUMENTS, PIECE_BYTES, LEAST_PIECE_BYTES = 20, 1 << 20, 128  # see Spool.rows
BLOCK_BYTES = 1 << 24  # of a file, read at once
ELEMENT_CHARS = 1 << 28  # at most, of an element of a JSON array
BAD_SHOWN = 20  # of the bad documents; the others are counted
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PROSE_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex")
TEXT_SUFFIXES = (*PROSE_SUFFIXES, *JSON_SUFFIXES, ".parquet")
PACKED_SUFFIXES = (".gz", ".zst")
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)
RETRIES, RETRY_S, TIMEOUT_S = 5, 1.0, 30.0  # of a download that makes no progress


class PrepareError(Exception):
    """Something the user can put right: printed as one line, exit status 2."""


def need(module: str, what_for: str = ""):
    """Import `module`; a missing one is an error that names the pip command."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        cure = f"`pip install {package}`, or `uv run --with {package} data/prepare.py ...`"
        raise PrepareError(f"{what_for}{package} is missing: {cure}") from None


def say(line: str) -> None:
    print(line, flush=True)


def sha256_key(data: bytes) -> int:
    """The first 8 bytes of the SHA-256 as a big-endian number: uniform in [0, 2**64)."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def sync(file) -> None:
    """Everything written to an open file is on the disk: a rename may follow."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def staging(folder: Path, keep: bool = False) -> Iterator[Path]:
    """The folder for what is not finished; removed at the end, but kept after an error if `keep`.

    What a killed run left in it is there again if `keep`, else removed. Another run that is at
    work in it is an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepareError(f"{folder}: another run is at work there: let it finish") from None
        except OSError:  # a file system without locks
            pass
        for old in [] if keep else [path for path in folder.iterdir() if path.name != "lock"]:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        try:
            yield folder
            keep = False
        finally:
            if not keep or [path.name for path in folder.iterdir()] == ["lock"]:
                shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# Shards


def shard_header(tokens: int) -> bytes:
    return np.array([MAGIC, VERSION, tokens] + [0] * 253, dtype="<i4").tobytes()


class ShardWriter:
    """Writes tokens to `<prefix>_%06d.bin`; a document may run on into the next shard."""

    def __init__(self, prefix: Path):
        self.prefix, self.shards, self.tokens, self.room, self.file = prefix, 0, 0, 0, None

    def write(self, ids: np.ndarray) -> None:
        while ids.size:
            if self.room == 0:
                self.close()
                self.file = open(f"{self.prefix}_{self.shards:06d}.bin", "wb")  # noqa: SIM115
                self.file.write(shard_header(0))
                self.shards, self.room = self.shards + 1, SHARD_TOKENS
            part, ids = ids[: self.room], ids[self.room :]
            self.file.write(part.astype("<u2").tobytes())
            self.tokens, self.room = self.tokens + part.size, self.room - part.size

    def close(self) -> None:
        if self.file is not None:
            self.file.seek(0)
            self.file.write(shard_header(SHARD_TOKENS - self.room))
            sync(self.file)
            self.file.close()


def check_shard(path: Path, vocab: int, bos: int) -> tuple[int, int]:
    """(tokens, BOS among them) of a shard; an error if its header, size or token ids are wrong."""
    size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=256)
    if header.size != 256 or header[0] != MAGIC or header[1] != VERSION:
        raise PrepareError(f"{path} is not a token shard: its header is wrong")
    if size != (expected := HEADER_BYTES + 2 * int(header[2])) or header[2] < 1:
        raise PrepareError(f"{path} has {size} bytes, but its header asks for {expected}")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)
    if (largest := int(tokens.max())) >= vocab:
        raise PrepareError(f"{path} has token id {largest}, but the vocabulary is {vocab}")
    return tokens.size, int(np.count_nonzero(tokens == bos))


# --------------------------------------------------------------------------------------------------
# Tokenizer


def load_tokenizer(model: bytes, origin: Path):
    """SentencePieceProcessor of a model file's bytes; an error if it does not suit the shards."""
    try:
        sp = need("sentencepiece").SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        sp = None
    if sp is None or sp.vocab_size() == 0:
        raise PrepareError(f"{origin} is not a SentencePiece model")
    if sp.vocab_size() > MAX_VOCAB:
        raise PrepareError(f"{origin} has {sp.vocab_size()} pieces, more than {MAX_VOCAB}")
    if sp.bos_id() < 0:
        raise PrepareError(f"{origin} has no BOS piece, which has to start every document")
    return sp


def training_sentences(documents: Iterable[str]) -> Iterator[str]:
    """The first SAMPLE_CHARS of text in pieces of at most 2,000 characters.

    The trainer strips newlines from the end of what it is fed, so pieces are cut *before* a
    newline: it learns pieces that contain one. Words of over 65,535 characters would stop it.
    """
    left = SAMPLE_CHARS
    for text in documents:
        start = 0
        while start < len(text) and left > 0:
            stop = start + 2000
            if stop < len(text) and (newline := text.rfind("\n", start + 1, stop)) > 0:
                stop = newline
            yield text[start:stop]
            start, left = stop, left - (stop - start)
        if left <= 0:
            return


def train_tokenizer(documents: Iterable[str], vocab: int) -> bytes:
    """Model file of a lossless BPE tokenizer: any text without U+2581 decodes to itself.

    Control pieces have the published tokenizer's ids. With neither normalisation nor dummy prefix,
    decoding has nothing to guess. Pieces of spaces alone: 1.4 times fewer tokens on source code.
    One thread: the same text gives the same bytes. Where the text does not support so many pieces,
    there are as many as it supports.
    """
    say(f"training a tokenizer of {vocab} pieces")
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    lossless = {"normalization_rule_name": "identity", "add_dummy_prefix": False}
    lossless |= {"byte_fallback": True, "remove_extra_whitespaces": False}
    pieces = {"split_digits": True, "allow_whitespace_only_pieces": True}
    limits = {"character_coverage": 0.999, "max_sentence_length": 1 << 20, "num_threads": 1}
    try:
        need("sentencepiece").SentencePieceTrainer.train(
            sentence_iterator=training_sentences(documents),
            model_writer=(model := io.BytesIO()),
            model_type="bpe",
            vocab_size=vocab,
            minloglevel=3,
            **(ids | lossless | pieces | limits),
        )
    except RuntimeError as error:
        if most := re.search(r"too high .* value <= (\d+)", str(error)):
            say(f"asked for {vocab} pieces; this text supports {most[1]}")
            return train_tokenizer(documents, int(most[1]))
        if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
            reason = f"too small for the characters of this text: choose at least {least[1]}"
        else:
            reason = f"SentencePiece cannot train it ({error})"
        raise PrepareError(f"--vocab-size {vocab}: {reason}") from None
    return model.getvalue()


# --------------------------------------------------------------------------------------------------
# Writing a dataset


@dataclass
class Dataset:
    """What becomes datasets/<name>_sp<vocab>/ and tokenizers/<name>_<vocab>_bpe.model in `out`.

    lossless: documents that the tokenizer alters are left out, instead of only counted.
    """

    out: Path
    name: str
    vocab: int
    force: bool
    lossless: bool

    @property
    def folder(self) -> Path:
        return self.out / "datasets" / f"{self.name}_sp{self.vocab}"

    @property
    def tokenizer_path(self) -> Path:
        return self.out / "tokenizers" / f"{self.name}_{self.vocab}_bpe.model"

    def is_ready(self) -> bool:
        """Whether there is nothing to do. A folder that this script did not make is an error."""
        if self.force or not self.folder.exists():
            return False
        if not (self.folder / "manifest.json").is_file():
            raise PrepareError(f"{self.folder} has no manifest.json: --force replaces the folder")
        say(f"{self.folder} is there already; --force makes it again")
        return True

    def write_trained(self, source: str, train, val, left_out: dict[str, int]) -> None:
        """`write` with a tokenizer trained on `train`, whose size then names the dataset."""
        model = train_tokenizer(train, self.vocab)
        size = load_tokenizer(model, self.tokenizer_path).vocab_size()
        dataset = replace(self, vocab=size)
        if size == self.vocab or not dataset.is_ready():
            dataset.write(source, model, train, val, left_out)

    def write(self, source: str, model: bytes, train, val, left_out: dict[str, int]) -> None:
        """Encode `train` and `val` (sized iterables of texts), then put all in place at the end."""
        final_model = self.tokenizer_path
        if final_model.is_file() and not self.force and final_model.read_bytes() != model:
            raise PrepareError(f"{final_model} is another one: choose --name, or give --force")
        sp, digest = load_tokenizer(model, final_model), hashlib.sha256()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        final_model.parent.mkdir(exist_ok=True)
        with staging(self.folder.parent / f".{self.folder.name}.partial") as scratch:
            partial, partial_model = scratch / "new", scratch / "model"
            partial.mkdir()
            write_whole(partial_model, model)
            manifest = tokenizer_facts(source, final_model.name, model, sp)
            altered = 0
            for split, documents in (("train", train), ("val", val)):
                writer = ShardWriter(partial / f"{self.name}_{split}")
                manifest[split], count = self.encode(sp, documents, split, writer, digest)
                altered += count
            manifest |= {"altered_documents": altered, "left_out": left_out}
            manifest |= {"corpus_sha256": digest.hexdigest(), "python": platform.python_version()}
            write_manifest(partial, manifest)
            window = window_for(manifest["train"]["tokens"]) if len(train) else WINDOW
            if self.folder.exists():
                os.replace(self.folder, scratch / "old")
            os.replace(partial_model, final_model)
            os.replace(partial, self.folder)
        self.report(manifest, window)

    def encode(self, sp, documents, split: str, writer: ShardWriter, digest) -> tuple[dict, int]:
        """Write one split -> (its counts, documents that do not decode to themselves).

        `bytes` is the UTF-8 length of the decoded text, which is what a score is measured on.
        """
        stats, altered = Counter(documents=0, bytes=0, source_bytes=0), 0
        threads, quiet = os.cpu_count() or 1, not sys.stderr.isatty()
        say(f"encoding {split}: {len(documents):,} documents")
        with need("tqdm").tqdm(total=len(documents), unit="doc", disable=quiet) as bar:
            for batch in batches(documents):
                encoded = sp.encode(batch, num_threads=threads)
                decoded = sp.decode(encoded, num_threads=threads)
                for text, ids, back in zip(batch, encoded, decoded, strict=True):
                    altered += text != back
                    if text != back and self.lossless:
                        continue
                    raw = text.encode()
                    digest.update(f"{split} {len(raw)}\n".encode() + raw)
                    stats.update(documents=1, bytes=len(back.encode()), source_bytes=len(raw))
                    writer.write(np.array([sp.bos_id(), *ids]))
                bar.update(len(batch))
        writer.close()
        return dict(stats) | {"tokens": writer.tokens, "shards": writer.shards}, altered

    def report(self, manifest: dict, window: int) -> None:
        train, val, altered = manifest["train"], manifest["val"], manifest["altered_documents"]
        for split in ("train", "val"):
            facts = "{documents:,} documents, {tokens:,} tokens, {bytes:,} bytes"
            say(f"{split}: {facts.format(**manifest[split])}")
        share = val["bytes"] / max(1, train["bytes"] + val["bytes"])
        say(f"validation is {share:.2%} of the bytes")
        for reason, count in manifest["left_out"].items():
            if count:
                say(f"left out: {count:,} documents ({reason})")
        total = train["documents"] + val["documents"] + altered * self.lossless
        fate = "and left out " if self.lossless else ""
        say(f"altered by the tokenizer {fate}(normalisation): {altered:,} of {total:,} documents")
        say(f"corpus sha256 {manifest['corpus_sha256']} (Python {manifest['python']})")
        settings = f"DATA_PATH={self.folder} TOKENIZER_PATH={self.tokenizer_path}"
        if window < WINDOW:
            say(f"train: too few tokens for a window of {WINDOW:,}: set TRAIN_SEQ_LEN as below")
            settings += f" TRAIN_SEQ_LEN={window}"
        say(f"{settings} {TRAINER}" if train["documents"] else settings)


def window_for(tokens: int) -> int:
    """TRAIN_SEQ_LEN: its default, or the largest power of two of which the tokens hold a window."""
    window = min(WINDOW, 1 << max(tokens - 1, 1).bit_length() - 1)
    if window < LEAST_WINDOW:
        few = f"{tokens} training tokens, but the trainer needs {LEAST_WINDOW + 1}"
        raise PrepareError(f"too little text: {few}; {ENOUGH}")
    return window


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents of about BATCH_CHARS together."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenizer_facts(source: str, name: str, model: bytes, sp) -> dict:
    facts = {"source": source, "vocab_size": sp.vocab_size(), "bos_id": sp.bos_id()}
    return facts | {"tokenizer": name, "tokenizer_sha256": hashlib.sha256(model).hexdigest()}


def write_manifest(folder: Path, manifest: dict) -> None:
    partial = folder / "manifest.json.partial"
    write_whole(partial, (json.dumps(manifest, indent=2) + "\n").encode())
    os.replace(partial, folder / "manifest.json")


def write_whole(path: Path, raw: bytes) -> None:
    with open(path, "wb") as file:
        file.write(raw)
        sync(file)


# --------------------------------------------------------------------------------------------------
# stdlib: module sources and pydoc topics


def stdlib_is_val(package: str) -> bool:
    """About 5 % of the packages, the same ones on every machine.

    A package's modules stay together because they repeat each other's text. Packages are few and
    uneven (`idlelib` alone is 7 %), so a plain hash can miss 5 % of the bytes by far. With this
    salt Python 3.11 validates on 4.9 % of its module bytes and 7.0 % of its topic bytes, without
    any package over 150 kB or module that is nearly a copy of another (tokenize, ntpath, ...).
    """
    return sha256_key((SPLIT_SALT + package).encode()) < 2**64 // 20


def stdlib_modules(root: Path) -> Iterator[tuple[str, Path]]:
    """(path relative to `root`, path) of the library's own modules.

    Not other people's packages, tests, tables of code points, nor what a build generates for its
    machine (`_sysconfigdata*`, `config-*`). pydoc_data is read as topics instead.
    """
    skip = {"site-packages", "dist-packages", "encodings", "pydoc_data"}
    skip |= {"test", "tests", "idle_test"}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and "config-" not in name]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            if not path.name.startswith("_sysconfigdata"):
                yield path.relative_to(root).as_posix(), path


def stdlib_topics(root: Path) -> dict[str, str]:
    """{topic: text} of pydoc_data/topics.py, which is read, not run; {} where it is missing."""
    path = root / "pydoc_data" / "topics.py"
    nodes = ast.walk(ast.parse(path.read_bytes())) if path.is_file() else []
    return next((ast.literal_eval(node) for node in nodes if isinstance(node, ast.Dict)), {})


def stdlib_documents(root: Path) -> tuple[list[str], list[str], dict[str, int]]:
    """(train, val, documents left out by reason), in the order of a hash of the documents' names.

    That order mixes code and prose. Copies are left out: none may be on both sides.
    """
    found = [(name, name.split("/")[0], path.read_bytes()) for name, path in stdlib_modules(root)]
    for key, text in stdlib_topics(root).items():
        found.append((f"pydoc_data.topics.{key}", f"pydoc_data.topics.{key}", text.encode()))
    train, val, left_out, seen = [], [], Counter(), set()
    for _, package, raw in sorted(found, key=lambda item: sha256_key(item[0].encode())):
        if reason := "copy of another" if raw in seen else stdlib_unfit(raw):
            left_out[reason] += 1
        else:
            seen.add(raw)
            (val if stdlib_is_val(package.removesuffix(".py")) else train).append(raw.decode())
    return train, val, dict(left_out)


def stdlib_unfit(raw: bytes) -> str:
    """Why the bytes of a file are no document; "" when they are one."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    # U+2581 is SentencePiece's sign for a space, so decoding cannot give a real one back.
    return "empty" if not text.strip() else "contains U+2581" if "\u2581" in text else ""


def prepare_stdlib(args: argparse.Namespace) -> None:
    dataset = Dataset(args.out, args.name, args.vocab_size, args.force, lossless=True)
    if dataset.is_ready():
        return
    train, val, left_out = stdlib_documents(args.lib)
    if not train or not val:
        sides = f"{len(train)} documents to train and {len(val)} to validate on"
        raise PrepareError(f"--lib {args.lib} has {sides}: name a complete library folder")
    dataset.write_trained("stdlib", train, val, left_out)


# --------------------------------------------------------------------------------------------------
# Reading the user's files: every bad document is found before any of them stops the run


class BadDocument(Exception):
    """A document that cannot be used; `stops` if what comes after it cannot be read either.

    where: its file, or file:line (Parquet: file:row). kind: what it is counted as.
    """

    def __init__(self, where: object, kind: str, why: str, stops: bool = False):
        super().__init__(f"{where}: {why}")
        self.kind, self.stops = kind, stops


class BadDocuments:
    """Counts bad documents, and keeps the first BAD_SHOWN of them. skip: leave them out."""

    def __init__(self, skip: bool):
        self.skip, self.stops, self.shown, self.kinds = skip, False, [], Counter()

    def add(self, bad: BadDocument) -> None:
        self.kinds[bad.kind] += 1
        self.stops |= bad.stops
        if len(self.shown) < BAD_SHOWN:
            self.shown.append(str(bad))

    def lines(self, count: int) -> list[str]:
        return self.shown + [f"and {count - BAD_SHOWN:,} more"] * (count > BAD_SHOWN)

    def settle(self) -> dict[str, int]:
        """Report what was added -> {kind: number left out}. An error unless all may be skipped."""
        count = self.kinds.total()
        if count and (self.stops or not self.skip):
            cure = "" if self.stops else "--skip-bad leaves out what is bad"
            if count > 1:
                self.shown.insert(0, f"{count:,} bad documents; {cure or 'mend them'}:")
            elif cure:
                self.shown[0] += f"; mend it, or {cure}"
            raise PrepareError("\n  ".join(self.lines(count)))
        for line in self.lines(count):
            say(f"left out: {line}")
        return dict(self.kinds)


def file_kind(path: Path) -> tuple[str, str]:
    """(suffix, suffix of the compression or "") of a file's name: a.jsonl.gz -> (.jsonl, .gz)."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in PACKED_SUFFIXES else ""
    return suffixes[-1] if suffixes else "", packed


def text_files(paths: Iterable[Path], bad: BadDocuments) -> Iterator[Path]:
    """The files among `paths` and the text-like ones in its folders, sorted, no dot names."""
    for path in paths:
        if not path.is_dir():
            if path.exists():
                yield path
            else:
                bad.add(BadDocument(path, "missing", "no such file or folder", stops=True))
            continue
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        inside = [file for file in inside if "/." not in f"/{file.relative_to(path).as_posix()}"]
        others = Counter(file_kind(file)[0] for file in inside)
        others = {kind: count for kind, count in others.items() if kind not in TEXT_SUFFIXES}
        if len(inside) == sum(others.values()):
            why = f"no text file in this folder ({' '.join(TEXT_SUFFIXES)}); name other files"
            bad.add(BadDocument(path, "missing", why, stops=True))
        elif others:
            counts = ", ".join(f"{kind or 'no suffix'} {n}" for kind, n in sorted(others.items()))
            say(f"{path}: files of other kinds are not read unless named ({counts})")
        yield from (file for file in inside if file_kind(file)[0] in TEXT_SUFFIXES)


class ZstdReader(io.RawIOBase):
    """The decompressed bytes of an open .zst file; EOFError where it is damaged or cut short."""

    def __init__(self, file, zstandard):
        self.file, self.zstandard, self.frame, self.rest = file, zstandard, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.rest and self.fill():
            pass
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count

    def fill(self) -> bool:
        """Decompress a little more; False at the end. Small reads bound what they expand to."""
        ended = self.frame is not None and self.frame.eof
        raw = self.frame.unused_data if ended else b""
        if not (raw := raw or self.file.read(1 << 14)):
            if self.frame is None or not ended:
                raise EOFError("it ends within a frame")
            return False
        if self.frame is None or ended:
            decompressor = self.zstandard.ZstdDecompressor(max_window_size=1 << 31)
            self.frame = decompressor.decompressobj()
        try:
            self.rest = memoryview(self.frame.decompress(raw))
        except self.zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        return True


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """A file's bytes as a stream, decompressed if its name ends in .gz or .zst.

    Reading it raises one of DAMAGE where it is damaged or cut short.
    """
    packed = file_kind(path)[1]
    with open(path, "rb") as file:
        if packed == ".gz":
            yield gzip.GzipFile(fileobj=file)
        elif packed == ".zst":
            yield io.BufferedReader(ZstdReader(file, need("zstandard", f"{path}: ")), 1 << 17)
        else:
            yield file


def file_documents(path: Path, text_key: str) -> Iterator[Iterable[bytes] | BadDocument]:
    """The documents of a file as blocks of UTF-8, and in their places the bad ones.

    Raises BadDocument, also from within a document, where the rest of the file is of no use.
    """
    suffix, packed = file_kind(path)
    if suffix == ".parquet":
        if packed:
            raise BadDocument(path, "packed", "decompress it first: a Parquet file", stops=True)
        yield from parquet_documents(path, text_key)
        return
    with opened(path) as source:
        if suffix in JSON_SUFFIXES:
            yield from json_documents(source, path, text_key)
        else:
            yield text_blocks(source, path)


def text_blocks(source, path: Path) -> Iterator[bytes]:
    """The blocks of an open text file, without a byte order mark.

    Raises BadDocument where it is not UTF-8 or has a NUL byte.
    """
    decoder, block, offset, first = codecs.getincrementaldecoder("utf-8")(), b"-", 0, b""
    while block:
        block = source.read(BLOCK_BYTES)
        first = first or block[:2]
        try:
            pending = len(decoder.getstate()[0])
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            where = offset - pending + error.start
            raise BadDocument(path, "not UTF-8", not_utf8(error, where, first)) from None
        if (nul := block.find(b"\0")) >= 0:
            why = f"NUL byte at offset {offset + nul:,}: a binary file, or UTF-16"
            raise BadDocument(path, "NUL byte", why)
        yield block.removeprefix(codecs.BOM_UTF8) if offset == 0 else block
        offset += len(block)


def not_utf8(error: UnicodeDecodeError, offset: int, first: bytes = b"") -> str:
    """What to say of bytes that are not UTF-8. offset: of the error. first: the file's start."""
    utf16 = first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    cure = f"convert it: iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8"
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {offset:,}); {cure}"


def json_documents(source, path: Path, text_key: str) -> Iterator[list[bytes] | BadDocument]:
    """The texts of an open file of JSON lines, or of one JSON array (it begins with a bracket)."""
    records = array_records if starts_with_bracket(source) else line_records
    for line, record in records(source, path):
        try:
            if isinstance(record, BadDocument):
                raise record
            yield [record_text(record, text_key, f"{path}:{line}")]
        except BadDocument as bad:
            yield bad


def starts_with_bracket(source) -> bool:
    """Whether the first character of an open file is a bracket; the file stays where it is."""
    return source.peek(1 << 12).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def record_text(record: object, text_key: str, where: str) -> bytes:
    """The UTF-8 text of a record: a string, or an object that has one under `text_key`."""
    text = record
    if isinstance(record, dict):
        text = record.get(text_key)
        if text_key not in record:
            keys = ", ".join(record).encode(errors="backslashreplace").decode()[:200] or "no keys"
            raise BadDocument(where, "no text", f'no text "{text_key}" in {keys} (--text-key?)')
    if not isinstance(text, str):
        what = f'"{text_key}"' if isinstance(record, dict) else "the record"
        raise BadDocument(where, "no text", f"{what} is {type(text).__name__}, not text")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code, kind = ord(text[error.start]), "lone surrogate"
        if 0xDC80 <= code <= 0xDCFF:  # how array_records shows a byte that is not UTF-8
            kind = "lone surrogate or not UTF-8"
        raise BadDocument(where, kind, f"{kind} (\\u{code:04x}) in the text") from None


def line_records(source, path: Path) -> Iterator[tuple[int, object]]:
    """(line, value or BadDocument) of the lines of an open file that are not blank."""
    first = True
    for number, line in enumerate(source, 1):
        if line.isspace():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            why = not_utf8(error, error.start)
            yield number, BadDocument(f"{path}:{number}", "not UTF-8", f"{why} (in the line)")
        except (ValueError, RecursionError) as error:
            if first and file_kind(path)[0] == ".json":
                why = "neither JSON lines nor one array: make it one, of objects or of strings"
                raise BadDocument(path, "not JSON lines", why, stops=True) from None
            place = f" at character {error.pos + 1}" if hasattr(error, "pos") else ""
            why = f"not JSON ({json_reason(error)}{place})"
            yield number, BadDocument(f"{path}:{number}", "not JSON", why)
        first = False


def json_reason(error: Exception) -> str:
    """An error's words without places, which are those in a part of the file."""
    return str(getattr(error, "msg", error))


class JsonCursor:
    """Values of a JSON text that is read piece by piece. Bytes that are not UTF-8 do not stop it.

    line: the line of the next character.
    """

    def __init__(self, source):
        decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.source, self.decode, self.parse = source, decoder.decode, json.JSONDecoder().raw_decode
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def more(self) -> bool:
        """Read as much again as is held; False at the end of the file."""
        if not self.ended:
            self.text, self.at = self.text[self.at :], 0
            block = self.source.read(max(1 << 20, len(self.text)))
            self.ended = not block
            self.text += self.decode(block, final=self.ended)
        return not self.ended

    def move(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def peek(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            while self.at < len(self.text):
                if not (character := self.text[self.at]).isspace():
                    return character
                self.move(self.at + 1)
            if not self.more():
                return ""

    def value(self) -> object:
        """The next value; ValueError or RecursionError where there is none."""
        self.peek()
        while True:
            last_try = self.ended or len(self.text) - self.at > ELEMENT_CHARS
            try:
                value, end = self.parse(self.text, self.at)
                # A number may go on where the text that is held ends.
                if last_try or self.text[end : end + 1] in {*",] \t\r\n"}:
                    self.move(end)
                    return value
            except ValueError:
                if last_try:
                    raise
            self.more()


def array_records(source, path: Path) -> Iterator[tuple[int, object]]:
    """(line, element) of the one JSON array in an open file. Raises BadDocument where it breaks."""
    cursor = JsonCursor(source)
    try:
        while cursor.peek() != "]":  # the opening bracket, then commas
            cursor.move(cursor.at + 1)
            if cursor.peek() == "]":
                break
            line = cursor.line
            yield line, cursor.value()
            if cursor.peek() not in (",", "]"):
                raise ValueError("a comma or a closing bracket is missing")
        cursor.move(cursor.at + 1)
        if cursor.peek():
            raise ValueError("text after the end of the array")
    except (ValueError, RecursionError) as error:
        why = f"broken JSON array ({json_reason(error)}): mend it, what follows cannot be read"
        raise BadDocument(f"{path}:{cursor.line}", "not JSON", why, stops=True) from None


def parquet_documents(path: Path, text_key: str) -> Iterator[list[bytes] | BadDocument]:
    """The texts in a Parquet file's column `text_key`, a few rows at a time."""
    parquet, arrow = need("pyarrow.parquet", f"{path}: "), need("pyarrow")
    row = 0
    try:
        file = parquet.ParquetFile(path, buffer_size=1 << 20)
        if text_key not in (names := file.schema_arrow.names):
            why = f'no column "{text_key}" among {", ".join(names)[:200]} (--text-key?)'
            raise BadDocument(path, "no text", why, stops=True)
        for batch in file.iter_batches(batch_size=256, columns=[text_key]):
            # As bytes: strings that are not UTF-8 can then be told one by one.
            for value in batch.column(0).cast(arrow.large_binary()):
                row, raw = row + 1, value.as_py()
                try:
                    if raw is None:
                        raise BadDocument(f"{path}:{row}", "no text", "no text in this row")
                    raw.decode()
                    yield [raw]
                except UnicodeDecodeError as error:
                    why = not_utf8(error, error.start)
                    yield BadDocument(f"{path}:{row}", "not UTF-8", why)
                except BadDocument as bad:
                    yield bad
    except (arrow.ArrowException, OSError) as error:
        why = f"no readable Parquet file with text in its column ({' '.join(str(error).split())})"
        raise BadDocument(path, "damaged", why[:400], stops=True) from None


# --------------------------------------------------------------------------------------------------
# text: the user's own files


class Spool:
    """Documents one after another in a temporary file: a shuffle of any size needs little memory.

    A row is (key, start, length), uint64: sha256_key of a document's UTF-8 text, and where it lies.
    """

    def __init__(self, file, text_key: str, bad: BadDocuments):
        self.file, self.text_key, self.bad, self.skipped = file, text_key, bad, 0

    def add(self, paths: Iterable[Path]) -> list[tuple[int, int]]:
        """Append the documents of files and folders -> their (start, length)."""
        spans = []
        for path in text_files(paths, self.bad):
            try:
                for document in file_documents(path, self.text_key):
                    if isinstance(document, BadDocument):
                        self.bad.add(document)
                    else:
                        spans.append(self.append(document))
            except BadDocument as bad:
                self.bad.add(bad)
            except DAMAGE as error:
                why = f"damaged or cut short ({error}): fetch or make it again"
                self.bad.add(BadDocument(path, "damaged", why, stops=True))
        return spans

    def append(self, blocks: Iterable[bytes]) -> tuple[int, int]:
        """Append a document -> its (start, length); nothing is left of one that turns out bad."""
        start = self.file.seek(0, io.SEEK_END)
        try:
            self.file.writelines(blocks)
        except Exception:
            self.file.truncate(start)
            raise
        return start, self.file.tell() - start

    def rows(self, spans: list[tuple[int, int]], may_split: bool) -> np.ndarray:
        """Spans -> (N, 3) rows in the same order, without whitespace-only documents (counted).

        Documents over PIECE_BYTES are cut, because the tokenizer holds a document in memory. Where
        there are few, they are cut finer, so that a single book has parts to validate on.
        """
        limit, rows = PIECE_BYTES, array("Q")
        if may_split and len(spans) < FEW_DOCUMENTS:
            total = sum(length for _, length in spans)
            limit = min(limit, max(LEAST_PIECE_BYTES, total // 40))
        for start, length in spans:
            stop = start + length
            self.skipped += length == 0
            while start < stop:
                raw = self.read(start, min(limit, stop - start))
                raw = raw if start + len(raw) == stop else cut_block(raw)
                if raw.decode().strip():
                    rows.extend((sha256_key(raw), start, len(raw)))
                else:
                    self.skipped += 1
                start += len(raw)
        return np.array(rows, dtype=np.uint64).reshape(-1, 3)

    def read(self, start: int, length: int) -> bytes:
        self.file.seek(start)
        return self.file.read(length)


@dataclass
class SpooledDocuments:
    """The texts of rows of a spool, in the rows' order."""

    spool: Spool
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return (self.spool.read(int(start), int(n)).decode() for _, start, n in self.rows)


def cut_block(raw: bytes) -> bytes:
    """`raw` up to its last paragraph, line or whole character, the first that keeps half of it."""
    ends = (raw.rfind(b"\n\n") + 2, raw.rfind(b"\n") + 1)
    end = next((end for end in ends if end > len(raw) // 2), 0)
    return raw[:end] if end else raw.decode(errors="ignore").encode()


def split_rows(rows: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(train, val) of rows in the order of their keys, which is a shuffle; neither is empty.

    The smallest keys validate: a document's side depends on its text alone, except where that left
    one side empty. Equal documents are on the same side.
    """
    keys = np.unique(rows[:, 0])
    if len(keys) < 2:
        raise PrepareError(f"too little text for training and validation: {ENOUGH}, or give --val")
    val_keys = int(np.searchsorted(keys, np.uint64(fraction * 2**64)))
    first = int(np.searchsorted(rows[:, 0], keys[min(max(val_keys, 1), len(keys) - 1)]))
    return rows[first:], rows[:first]


def text_rows(args: argparse.Namespace, spool: Spool) -> tuple[np.ndarray, np.ndarray, dict]:
    """(train rows, val rows, documents left out by reason) of the command line's files."""
    spans, val_spans = spool.add(args.paths), spool.add(args.val)
    left_out = spool.bad.settle()
    rows = spool.rows(spans, may_split=not args.val)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    if args.val:
        val = spool.rows(val_spans, may_split=False)
        train = rows[~np.isin(rows[:, 0], val[:, 0])]  # no validation text in training
        left_out["training text that is also in --val"] = len(rows) - len(train)
        if not len(val) or (args.paths and not len(train)):
            raise PrepareError("no text left to train or validate on: see --val and PATH")
    else:
        train, val = split_rows(rows, args.val_fraction)
    return train, val, left_out | {"only whitespace": spool.skipped}


def prepare_text(args: argparse.Namespace) -> None:
    if not args.paths and not (args.val and args.tokenizer):
        raise PrepareError("name text files or folders (only --val will do with --tokenizer)")
    model, vocab = None, args.vocab_size
    if args.tokenizer:
        if not args.tokenizer.is_file():
            raise PrepareError(f"--tokenizer {args.tokenizer}: no such file")
        model = args.tokenizer.read_bytes()
        vocab = load_tokenizer(model, args.tokenizer).vocab_size()
    dataset = Dataset(args.out, args.name, vocab, args.force, lossless=False)
    if dataset.is_ready():
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=args.out) as file:
        spool = Spool(file, args.text_key, BadDocuments(args.skip_bad))
        train, val, left_out = text_rows(args, spool)
        train, val = SpooledDocuments(spool, train), SpooledDocuments(spool, val)
        if model is None:
            dataset.write_trained("text", train, val, left_out)
        else:
            dataset.write("text", model, train, val, left_out)


# --------------------------------------------------------------------------------------------------
# fineweb: the published shards


class Unreachable(Exception):
    """The hub does not answer, or `HF_HUB_OFFLINE` forbids to ask."""


class Hub:
    """A dataset repository. `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` apply."""

    def __init__(self, repo: str):
        self.repo, self.hub = repo, need("huggingface_hub")
        self.errors, self.utils = (need(f"huggingface_hub.{part}") for part in ("errors", "utils"))
        if int(self.hub.__version__.split(".")[0]) < 1:
            have = self.hub.__version__
            raise PrepareError(f"huggingface_hub {have} is too old: pip install -U huggingface_hub")

    def files(self) -> dict[str, object]:
        """{path: RepoFile} of all files: each with `path`, `size`, `blob_id` and `lfs`."""
        say(f"asking the hub what {self.repo} has")
        self.utils.logging.set_verbosity_error()  # it tries again for half a minute
        with self.explained():
            listed = self.hub.list_repo_tree(self.repo, recursive=True, repo_type="dataset")
            return {item.path: item for item in listed if hasattr(item, "size")}

    @contextlib.contextmanager
    def explained(self, path: str = "the list of files") -> Iterator[None]:
        """What the hub refuses becomes an error of one line; no answer becomes Unreachable."""
        try:
            yield
        except Exception as error:  # network trouble has many types without a common base
            status = getattr(getattr(error, "response", None), "status_code", 0)
            busy = status == 429 or status >= 500
            refusals = self.errors.HfHubHTTPError | self.errors.HFValidationError
            if isinstance(error, refusals) and not busy:
                raise PrepareError(self.refusal(error, path)) from None
            network = busy or isinstance(error, ConnectionError | TimeoutError)
            if isinstance(error, OSError) and not network:
                raise  # of this machine's disk
            words = f"it answers {status}" if busy else " ".join(str(error).split())[:150]
            raise Unreachable(words or type(error).__name__) from error

    def refusal(self, error: Exception, path: str) -> str:
        """What to say, and to do, when the hub answers that it does not give a file."""
        if isinstance(error, self.errors.GatedRepoError):
            return f"{self.repo} is gated: ask for access on its page, then `hf auth login`"
        if isinstance(error, self.errors.EntryNotFoundError):
            return f"{path} is missing in {self.repo}"
        if isinstance(error, self.errors.RepositoryNotFoundError | self.errors.HFValidationError):
            return f"--repo {self.repo}: no such dataset, or a private one (`hf auth login`)"
        return f"the hub answers {error.response.status_code} for {path} of {self.repo}"

    def download(self, file, folder: Path) -> Path:
        """A RepoFile's content in `folder`, whole and verified by its hash.

        Goes on from what an interrupted download left there, whether of this run or of another.
        """
        digest = file.lfs.sha256 if file.lfs else file.blob_id
        path = folder / f"{PurePosixPath(file.path).name}.{digest[:16]}"
        name, left, have = PurePosixPath(file.path).name, RETRIES, size_of(path)
        shown = {"unit": "B", "unit_scale": True, "disable": not sys.stderr.isatty()}
        with need("tqdm").tqdm(desc=name, total=file.size, initial=have, **shown) as bar:
            while have < file.size:
                try:
                    self.append(file.path, path, have, bar)
                    trouble = Unreachable("the connection is closed before the end")
                except Unreachable as error:
                    trouble = error
                before, have = have, size_of(path)
                left = RETRIES if have > before else left - 1
                if left == 0:
                    raise trouble
                if have < file.size:
                    time.sleep(RETRY_S)
        if content_digest(path, git=not file.lfs) != digest:
            path.unlink()
            raise PrepareError(
                f"{name} arrived damaged and is removed: run again to fetch it again"
            )
        return path

    def append(self, remote: str, path: Path, have: int, bar) -> None:
        """Append to `path`, which has `have` bytes, what comes after them; or write all of it."""
        url = self.hub.hf_hub_url(self.repo, remote, repo_type="dataset")
        headers = self.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={have}-"} if have else {}
        request = self.hub.get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S)
        with self.explained(remote), request as response:
            if response.status_code >= 400:
                response.read()
            self.utils.hf_raise_for_status(response)
            goes_on = response.status_code == 206  # else the server does not know ranges
            bar.update(0 if goes_on else -bar.n)
            with open(path, "ab" if goes_on else "wb") as file:
                for block in response.iter_bytes():
                    file.write(block)
                    bar.update(len(block))
                sync(file)


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def content_digest(path: Path, git: bool) -> str:
    """The hash by which the hub knows a file: git's own SHA-1, or the SHA-256 of a large file."""
    hasher = hashlib.sha1(usedforsecurity=False) if git else hashlib.sha256()
    hasher.update(b"blob %d\0" % path.stat().st_size if git else b"")
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def name_words(name: str) -> list[str]:
    """What tells a dataset's name and its tokenizer's from others: sp8192_x, fineweb_8192_bpe_x."""
    words = re.findall("[a-z]+|[0-9]+", name.lower().removeprefix("fineweb10b"))
    return sorted(set(words) - {"fineweb", "sp", "bpe", "pure"})


@dataclass
class Variant:
    """What a repository has of one dataset: {file name: RepoFile} of each split, a tokenizer."""

    shards: dict[str, dict[str, object]]
    tokenizer: object


def find_variant(hub: Hub, name: str, tokenizer: str, folder: Path) -> Variant:
    """The dataset `name` (also without fineweb10B_) in a repository; `folder`: for downloads.

    Its tokenizer: the one named by `tokenizer`, by the repository's manifest, or alike.
    """
    pattern = r"((?:.+/)?)datasets/([^/]+)/(fineweb_(train|val)_\d{6}\.bin)"
    files, found = hub.files(), {}
    for path in sorted(files):
        if match := re.fullmatch(pattern, path):
            root, dataset, file, split = match.groups()
            roots = found.setdefault(dataset.removeprefix("fineweb10B_"), {})
            shards = roots.setdefault((root != "datasets/", root), {"train": {}, "val": {}})
            shards[split][file] = files[path]
    if name not in found:
        has = ", ".join(sorted(found)) or "no datasets/NAME/fineweb_train_*.bin"
        raise PrepareError(f"--variant {name}: {hub.repo} has {has}")
    (_, root), shards = min(found[name].items())
    listed = [path for path in files if path.startswith(f"{root}tokenizers/")]
    listed = sorted(p for p in listed if p.endswith((".json", ".model")))
    if tokenizer:
        fits = [path for path in listed if tokenizer in (path, PurePosixPath(path).name)]
    else:
        stated = root + stated_tokenizer(hub, files.get(f"{root}manifest.json"), name, folder)
        words = name_words(name)
        alike = [path for path in listed if name_words(PurePosixPath(path).stem) == words]
        fits = [stated] if stated in listed else sorted(alike, key=lambda p: p.endswith(".json"))
    if not fits:
        has = ", ".join(PurePosixPath(path).name for path in listed) or "no tokenizers"
        raise PrepareError(f"which tokenizer is {name}'s? {hub.repo} has {has}: --tokenizer FILE")
    return Variant(shards, files[fits[0]])


def stated_tokenizer(hub: Hub, file, name: str, folder: Path) -> str:
    """The path of a dataset's tokenizer by the repository's manifest.json; "" if it has no say."""
    raw = hub.download(file, folder).read_bytes() if file else b"{}"
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        manifest = json.loads(raw)
        names = {entry["name"]: entry["tokenizer_name"] for entry in manifest["datasets"]}
        tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
        entry = tokenizers[names.get(f"fineweb10B_{name}") or names[name]]
        return entry.get("model_path") or entry.get("path") or ""
    return ""


def tokenizer_model(raw: bytes, remote: str) -> bytes:
    """A published tokenizer file as a SentencePiece model: a pure byte one is written as such.

    Byte b is token 4 + b, after <pad> <s> </s> <unk>; spaces are bytes like others.
    """
    if not remote.endswith(".json"):
        return raw
    expected = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    expected |= {"byte_offset": 4, "byte_count": 256}
    try:
        facts = json.loads(raw)
        if facts["tokenizer_type"] == "pure_byte" and expected.items() <= facts["config"].items():
            return byte_model()
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise PrepareError(f"{remote}: neither SentencePiece nor pure bytes: the trainer cannot use it")


def byte_model() -> bytes:
    """A SentencePiece model without merges: a protocol buffer, its numbers from the schema."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    def field(number: int, value: int | bytes) -> bytes:
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        return varint(number << 3 | 2) + varint(len(value)) + value

    control, unknown, byte, bpe = 3, 2, 6, 2
    pieces = [("<pad>", control), ("<s>", control), ("</s>", control), ("<unk>", unknown)]
    pieces += [(f"<0x{value:02X}>", byte) for value in range(256)]
    model = b"".join(field(1, field(1, piece.encode()) + field(3, kind)) for piece, kind in pieces)
    # model_type, vocab_size, byte_fallback; then the ids of unknown, BOS, EOS and padding.
    trainer = {3: bpe, 4: len(pieces), 35: True, 40: 3, 41: 1, 42: 2, 43: 0}
    model += field(2, b"".join(field(*item) for item in trainer.items()))
    # No dummy prefix, no whitespace removed, none replaced by U+2581.
    return model + field(3, field(1, b"identity") + field(3, 0) + field(4, 0) + field(5, 0))


class Fineweb:
    """A published dataset in its local place, with the tokenizer that goes with it."""

    def __init__(self, args: argparse.Namespace):
        self.variant, self.repo = args.variant.removeprefix("fineweb10B_"), args.repo
        self.train_shards, self.tokenizer_name = args.train_shards, args.tokenizer
        self.folder = args.out / "datasets" / f"fineweb10B_{self.variant}"
        self.tokenizers = args.out / "tokenizers"

    def is_complete(self) -> bool:
        """Whether all is there and verified, so that the hub need not be asked.

        A folder whose shards came from another repository is an error.
        """
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            if (source := manifest["source"]) != f"fineweb: {self.repo}":
                raise PrepareError(f"{self.folder} has {source!r}: choose another --out")
            model = (self.tokenizers / manifest["tokenizer"]).read_bytes()
            shards = self.local_shards("val") + self.local_shards("train")[: self.train_shards]
            if len(shards) < manifest["val"]["shards"] + self.train_shards:
                return False
            with contextlib.suppress(PrepareError):
                for path in shards:
                    check_shard(path, manifest["vocab_size"], manifest["bos_id"])
                return hashlib.sha256(model).hexdigest() == manifest["tokenizer_sha256"]
            return False
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def local_shards(self, split: str) -> list[Path]:
        return sorted(self.folder.glob(f"fineweb_{split}_[0-9]*.bin"))

    def place_tokenizer(self, remote: str, raw: bytes):
        """Put a published tokenizer in its place -> SentencePieceProcessor."""
        model, path = tokenizer_model(raw, remote), self.tokenizer_path(remote)
        sp, size = load_tokenizer(model, Path(remote)), re.match(r"[a-z]+(\d+)", self.variant)
        if size and int(size[1]) != sp.vocab_size():
            has = f"has {sp.vocab_size()} pieces"
            raise PrepareError(f"--variant {self.variant}: {remote} of {self.repo} {has}")
        if path.is_file() and path.read_bytes() != model:
            raise PrepareError(f"{path} is not {self.repo}'s: remove it, or choose another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(partial := path.with_name(f".{path.name}.partial"), model)
        os.replace(partial, path)
        return sp

    def tokenizer_path(self, remote: str) -> Path:
        return self.tokenizers / f"{PurePosixPath(remote).stem}.model"

    def from_hub(self, hub: Hub, scratch: Path):
        """Download what is not there yet.

        -> (tokenizer's path, SentencePieceProcessor, {split: (tokens, documents) of each shard}).
        """
        variant = find_variant(hub, self.variant, self.tokenizer_name, scratch)
        train, val = variant.shards["train"], variant.shards["val"]
        if self.train_shards > len(train):
            has = f"{self.repo} has {len(train)}"
            raise PrepareError(f"--train-shards {self.train_shards}: {has}")
        if not val:
            raise PrepareError(f"{self.repo} has no validation shards of {self.folder.name}")
        wanted = {"val": val, "train": dict(list(train.items())[: self.train_shards])}
        self.check_space(scratch, [*val.values(), *wanted["train"].values()])
        raw = hub.download(variant.tokenizer, scratch).read_bytes()
        sp = self.place_tokenizer(variant.tokenizer.path, raw)
        self.folder.mkdir(parents=True, exist_ok=True)
        counts = {
            split: [self.shard(hub, file, scratch, sp) for file in files.values()]
            for split, files in wanted.items()
        }
        return self.tokenizer_path(variant.tokenizer.path), sp, counts

    def check_space(self, scratch: Path, files: list) -> None:
        """An error unless what has still to be downloaded fits on the disk."""
        sizes = {path.name: path.stat().st_size for path in self.folder.glob("*.bin")}
        missing = sum(file.size for file in files if PurePosixPath(file.path).name not in sizes)
        missing -= sum(path.stat().st_size for path in scratch.iterdir())
        if missing > (free := shutil.disk_usage(scratch).free):
            need = f"needs {missing / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free"
            raise PrepareError(f"{self.folder} {need}: fewer --train-shards, or another --out")

    def shard(self, hub: Hub, file, scratch: Path, sp) -> tuple[int, int]:
        """(tokens, documents) of a verified shard in place; downloaded unless already there."""
        path, facts = self.folder / PurePosixPath(file.path).name, (sp.vocab_size(), sp.bos_id())
        if path.is_file():
            with contextlib.suppress(PrepareError):
                return check_shard(path, *facts)
            path.unlink()
        say(f"downloading {path.name}")
        staged = hub.download(file, scratch)
        try:
            counts = check_shard(staged, *facts)
        except PrepareError as error:
            staged.unlink()
            raise PrepareError(f"{error}: {self.repo} publishes it so; it is removed") from None
        os.replace(staged, path)
        return counts

    def from_disk(self, trouble: Unreachable):
        """As from_hub, of files that the user has put in place."""
        shards = {"val": self.local_shards("val")}
        shards["train"] = self.local_shards("train")[: self.train_shards]
        words, kinds = name_words(self.variant), (".model", ".json")
        models = [path for kind in kinds for path in sorted(self.tokenizers.glob(f"*{kind}"))]
        models = [path for path in models if name_words(path.stem) == words]
        if not models or not shards["val"] or len(shards["train"]) < self.train_shards:
            what = f"fineweb_val_*.bin and the first {self.train_shards} fineweb_train_*.bin"
            where = f"of datasets/datasets/{self.folder.name} into {self.folder}"
            model = f"its tokenizer from datasets/tokenizers into {self.tokenizers}"
            todo = f"elsewhere, fetch {what} {where}, and {model}; then run this again"
            raise PrepareError(f"no answer for the dataset {self.repo} ({trouble}); {todo}")
        say(f"no answer from the hub ({trouble}): using the files that are there")
        path = models[0]
        sp = self.place_tokenizer(path.name, path.read_bytes())
        facts = sp.vocab_size(), sp.bos_id()
        counts = {s: [check_shard(path, *facts) for path in paths] for s, paths in shards.items()}
        return self.tokenizer_path(path.name), sp, counts


def prepare_fineweb(args: argparse.Namespace) -> None:
    data = Fineweb(args)
    if data.is_complete():
        say(f"{data.folder} is there already, all verified")
        return
    with staging(data.folder.parent / f".{data.folder.name}.partial", keep=True) as scratch:
        try:
            path, sp, counts = data.from_hub(Hub(args.repo), scratch)
        except Unreachable as trouble:
            path, sp, counts = data.from_disk(trouble)
    manifest = tokenizer_facts(f"fineweb: {args.repo}", path.name, path.read_bytes(), sp)
    for split, shards in counts.items():
        tokens, documents = (sum(column) for column in zip((0, 0), *shards, strict=True))
        manifest[split] = {"documents": documents, "tokens": tokens, "shards": len(shards)}
        facts = f"{len(shards)} shards, {documents:,} documents, {tokens:,} tokens"
        say(f"{split}: {facts}, all verified")
    write_manifest(data.folder, manifest)
    say(f"DATA_PATH={data.folder} TOKENIZER_PATH={path} {TRAINER}")


# --------------------------------------------------------------------------------------------------
# Main


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = (
        "text file (one document), JSON lines, a JSON array or Parquet file (many), any of them "
        "but the last as .gz or .zst, or a folder of them"
    )
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help=kinds)
    given = "use this SentencePiece model instead of training one"
    parser.add_argument("--tokenizer", type=Path, metavar="MODEL", help=given)
    key = "key, or column, of the text in JSON and Parquet files (default: text)"
    parser.add_argument("--text-key", default="text", metavar="KEY", help=key)
    share = "share of the documents to validate on (default: 0.05)"
    parser.add_argument("--val-fraction", type=float, default=0.05, metavar="X", help=share)
    val = "validation files or folders, kept in order; then every PATH is for training"
    parser.add_argument("--val", nargs="+", type=Path, default=[], metavar="PATH", help=val)
    skip = "leave out documents that are broken, and count them, instead of stopping"
    parser.add_argument("--skip-bad", action="store_true", help=skip)


def add_fineweb_arguments(parser: argparse.ArgumentParser) -> None:
    variant = "dataset: sp1024, sp8192, byte260, ... (default: sp1024; a wrong one lists them)"
    parser.add_argument("--variant", default="sp1024", metavar="NAME", help=variant)
    shards = "how many to have, of 100 M tokens and 200 MB each (default: 1)"
    parser.add_argument("--train-shards", type=int, default=1, metavar="N", help=shards)
    repo, source = "willdepueoai/parameter-golf", "dataset on the hub (default: %(default)s)"
    parser.add_argument("--repo", default=repo, help=source)
    tokenizer = "file in the repository, where neither its manifest nor its name tells"
    parser.add_argument("--tokenizer", default="", metavar="FILE", help=tokenizer)


def build_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("prepare.py", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="SOURCE")
    stdlib = commands.add_parser("stdlib", help="text that this Python installation carries")
    text = commands.add_parser("text", help="your own text: .txt, .md, .jsonl, ... files")
    fineweb = commands.add_parser("fineweb", help="the published FineWeb shards, downloaded")
    sources = (stdlib, prepare_stdlib), (text, prepare_text), (fineweb, prepare_fineweb)
    for command, run in sources:
        command.set_defaults(run=run, name="fineweb", val_fraction=0.05, train_shards=0)
        command.set_defaults(vocab_size=1024, variant="sp1024")
        out = "where datasets/ and tokenizers/ go (default: the folder of this script)"
        here = Path(__file__).resolve().parent
        command.add_argument("--out", type=Path, default=here, metavar="DIR", help=out)
    for command, name in ((stdlib, "stdlib"), (text, "text")):
        size = "pieces of the tokenizer, fewer where the text is too little (default: 1024)"
        command.add_argument("--vocab-size", type=int, default=1024, metavar="N", help=size)
        command.add_argument("--name", default=name, help=f"of the dataset (default: {name})")
        command.add_argument("--force", action="store_true", help="replace what is there already")
    add_text_arguments(text)
    add_fineweb_arguments(fineweb)
    lib, modules = Path(sysconfig.get_path("stdlib")), "library folder (default: this Python's)"
    stdlib.add_argument("--lib", type=Path, default=lib, metavar="DIR", help=modules)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """What argparse does not check itself."""
    if not 1 <= args.vocab_size <= MAX_VOCAB:
        raise PrepareError(f"--vocab-size {args.vocab_size}: uint16 shards take 1 to {MAX_VOCAB}")
    if not re.fullmatch(r"\w[\w.-]*", args.name) or re.search("_(train|val)_", f"{args.name}_"):
        raise PrepareError(f"--name {args.name}: letters, digits, . _ - only, no _train, no _val")
    if not re.fullmatch(r"\w[\w.-]*", args.variant):
        raise PrepareError(f"--variant {args.variant}: a name such as sp1024, not a path")
    if not 0 < args.val_fraction < 1:
        raise PrepareError(f"--val-fraction {args.val_fraction}: must lie between 0 and 1")
    if args.train_shards < 0:
        raise PrepareError(f"--train-shards {args.train_shards}: must not be negative")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    with contextlib.suppress(AttributeError):  # names and keys may hold what a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check_arguments(args)
        args.run(args)
    except (PrepareError, OSError) as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare.py: interrupted; nothing half-made is left in place", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
