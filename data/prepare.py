"""Make token shards for train_gpt_mlx_kl.py from one of three sources.

    python data/prepare.py stdlib                     text that this Python installation carries
    python data/prepare.py text notes/ more.jsonl     your own text
    python data/prepare.py fineweb --train-shards 10  the published FineWeb shards, downloaded

Shards are 256 little-endian int32 of header (20240520, 1, number of tokens, zeros), then the tokens
as uint16. Every document starts with the tokenizer's BOS and has no EOS. See data/README.md.
"""

# Map: shards -> tokenizer -> writing a dataset -> stdlib -> text -> fineweb -> main.

import argparse
import ast
import codecs
import contextlib
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
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SHARD_TOKENS = 100_000_000  # per shard, as published
MAX_VOCAB = 65_535
BATCH_CHARS = 4 << 20  # encoded at once: bounds memory and keeps all threads busy
SAMPLE_CHARS = 32 << 20  # of training text that a tokenizer is trained on: about 10 s
SPLIT_SALT = "split 49: "  # see stdlib_is_val
FEW_DOCUMENTS, PIECE_BYTES = 20, 1 << 20  # see Spool.rows
JSON_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", *JSON_SUFFIXES)


class PrepareError(Exception):
    """Something the user can put right: printed as one line, exit status 2."""


def need(package: str):
    """Import `package`; a missing one is an error that names the pip command."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise PrepareError(f"{package} is missing: run `pip install {package}`") from None


def say(line: str) -> None:
    print(line, flush=True)


def sha256_key(data: bytes) -> int:
    """The first 8 bytes of the SHA-256 as a big-endian number: uniform in [0, 2**64)."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


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
    One thread: the same text gives the same bytes.
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
            reason = f"too large for this little text: it reaches {most[1]}"
        elif least := re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error)):
            reason = f"too small for the characters of this text: at least {least[1]}"
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

    def write(self, source: str, model: bytes, train, val, left_out: dict[str, int]) -> None:
        """Encode `train` and `val` (sized iterables of texts), then put all in place at the end."""
        final_model = self.tokenizer_path
        if final_model.is_file() and not self.force and final_model.read_bytes() != model:
            raise PrepareError(f"{final_model} is another one: choose --name, or give --force")
        sp, digest = load_tokenizer(model, final_model), hashlib.sha256()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        final_model.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix=".partial.") as scratch:
            partial, partial_model = Path(scratch, "new"), Path(scratch, "model")
            partial.mkdir()
            partial_model.write_bytes(model)
            manifest = tokenizer_facts(source, final_model.name, model, sp)
            altered = 0
            for split, documents in (("train", train), ("val", val)):
                writer = ShardWriter(partial / f"{self.name}_{split}")
                manifest[split], count = self.encode(sp, documents, split, writer, digest)
                altered += count
            manifest |= {"altered_documents": altered, "left_out": left_out}
            manifest |= {"corpus_sha256": digest.hexdigest(), "python": platform.python_version()}
            write_manifest(partial, manifest)
            if self.folder.exists():
                os.replace(self.folder, Path(scratch, "old"))
            os.replace(partial_model, final_model)
            os.replace(partial, self.folder)
        self.report(manifest)

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

    def report(self, manifest: dict) -> None:
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
        say(f"DATA_PATH={self.folder} TOKENIZER_PATH={self.tokenizer_path}")


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
    partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / "manifest.json")


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
    dataset.write("stdlib", train_tokenizer(train, args.vocab_size), train, val, left_out)


# --------------------------------------------------------------------------------------------------
# text: the user's own files


def text_files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files among `paths` and the text-like ones in its folders, sorted, no dot names."""
    for path in paths:
        if not path.exists():
            raise PrepareError(f"{path}: no such file or folder")
        inside = sorted(path.rglob("*")) if path.is_dir() else []
        inside = [file for file in inside if file.suffix.lower() in TEXT_SUFFIXES]
        inside = [file for file in inside if "/." not in f"/{file.relative_to(path).as_posix()}"]
        if path.is_dir() and not inside:
            kinds = " ".join(TEXT_SUFFIXES)
            raise PrepareError(f"{path}: no text file in this folder ({kinds}); name other files")
        for file in inside or [path]:
            if file.suffix.lower() == ".json":
                raise PrepareError(
                    f"{file}: JSON, not text; write a .jsonl file, an object per line"
                )
            yield file


def text_blocks(source, path: Path) -> Iterator[bytes]:
    """The blocks of an open text file; an error names one that is not UTF-8 or has a NUL."""
    decoder, block = codecs.getincrementaldecoder("utf-8")(), b"first"
    while block:
        block = source.read(1 << 24)
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError:
            raise PrepareError(f"{path}: not UTF-8 text; convert it or leave it out") from None
        if b"\0" in block:
            raise PrepareError(f"{path}: a binary file (it has NUL bytes); leave it out")
        yield block


def json_texts(source, path: Path, text_key: str) -> Iterator[bytes]:
    """The UTF-8 text of every line of an open .jsonl file; errors name the file and the line."""
    for number, line in enumerate(source, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
                raise PrepareError(f'{path}:{number}: no text "{text_key}" in {keys}; --text-key?')
            yield record[text_key].encode()  # fails for lone surrogates, which UTF-8 has not
        except ValueError as error:
            raise PrepareError(f"{path}:{number}: bad line ({error}); mend or remove it") from None


class Spool:
    """Documents one after another in a temporary file: a shuffle of any size needs little memory.

    A row is (key, start, length), uint64: sha256_key of a document's UTF-8 text, and where it lies.
    """

    def __init__(self, file):
        self.file, self.skipped = file, 0

    def add(self, paths: Iterable[Path], text_key: str) -> list[tuple[int, int]]:
        """Append the documents of files and folders -> their (start, length)."""
        spans = []
        for path in text_files(paths):
            with open(path, "rb") as source:
                if path.suffix.lower() in JSON_SUFFIXES:
                    documents = ([raw] for raw in json_texts(source, path, text_key))
                else:
                    documents = [text_blocks(source, path)]
                for blocks in documents:
                    start = self.file.seek(0, io.SEEK_END)
                    self.file.writelines(blocks)
                    spans.append((start, self.file.tell() - start))
        return spans

    def rows(self, spans: list[tuple[int, int]], may_split: bool) -> np.ndarray:
        """Spans -> (N, 3) rows in the same order, without whitespace-only documents (counted).

        Documents over PIECE_BYTES are cut, because the tokenizer holds a document in memory. Where
        there are few, they are cut finer, so that a single book has parts to validate on.
        """
        limit, rows = PIECE_BYTES, array("Q")
        if may_split and len(spans) < FEW_DOCUMENTS:
            limit = min(limit, max(512, sum(length for _, length in spans) // 40))
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
        raise PrepareError("too little text for training and validation: add some, or give --val")
    val_keys = int(np.searchsorted(keys, np.uint64(fraction * 2**64)))
    first = int(np.searchsorted(rows[:, 0], keys[min(max(val_keys, 1), len(keys) - 1)]))
    return rows[first:], rows[:first]


def text_rows(args: argparse.Namespace, spool: Spool) -> tuple[np.ndarray, np.ndarray, dict]:
    """(train rows, val rows, documents left out by reason) of the command line's files."""
    rows = spool.rows(spool.add(args.paths, args.text_key), may_split=not args.val)
    rows, left_out = rows[np.argsort(rows[:, 0], kind="stable")], {}
    if args.val:
        val = spool.rows(spool.add(args.val, args.text_key), may_split=False)
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
        train, val, left_out = text_rows(args, spool := Spool(file))
        train, val = SpooledDocuments(spool, train), SpooledDocuments(spool, val)
        model = train_tokenizer(train, vocab) if model is None else model
        dataset.write("text", model, train, val, left_out)


# --------------------------------------------------------------------------------------------------
# fineweb: the published shards


class Hub:
    """Downloads a published dataset; an interrupted download goes on from `staging`."""

    def __init__(self, repo: str, out: Path, vocab: int):
        self.repo, self.vocab = repo, vocab
        self.folder = out / "datasets" / f"fineweb10B_sp{vocab}"
        self.tokenizer_path = out / "tokenizers" / f"fineweb_{vocab}_bpe.model"
        self.staging = out / "datasets" / f".{self.folder.name}.partial"

    def fetch(self, remote: str) -> Path:
        """Local path of a file of the repository; its folder `datasets` holds all we want."""
        download, remote = need("huggingface_hub").hf_hub_download, f"datasets/{remote}"
        try:
            return Path(download(self.repo, remote, repo_type="dataset", local_dir=self.staging))
        except Exception as error:  # network trouble has many types without a common base
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise PrepareError(f"cannot download {remote} of {self.repo}: {reason}") from error

    def describe(self) -> tuple[int, int, str]:
        """(train shards, val shards, remote path of the tokenizer), from the hub's manifest."""
        try:
            remote = json.loads(self.fetch("manifest.json").read_text(encoding="utf-8"))
            datasets = {entry["name"]: entry for entry in remote["datasets"]}
            if self.folder.name not in datasets:
                has = ", ".join(sorted(datasets))
                raise PrepareError(f"--vocab-size {self.vocab}: {self.repo} has only {has}")
            entry = datasets[self.folder.name]
            models = {item["name"]: item.get("model_path") for item in remote["tokenizers"]}
            shards = int(entry["stats"]["files_train"]), int(entry["stats"]["files_val"])
            return *shards, models[entry["tokenizer_name"]]
        except (ValueError, KeyError, TypeError) as error:
            reason = f"manifest.json of {self.repo} is not understood: {error!r}"
            raise PrepareError(reason) from error

    def is_complete(self, train_shards: int) -> bool:
        """Whether all is there and verified, so that the hub need not be asked."""
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            digest = hashlib.sha256(self.tokenizer_path.read_bytes()).hexdigest()
            for split, shards in (("val", manifest["val"]["shards"]), ("train", train_shards)):
                for number in range(shards):
                    path = self.folder / f"fineweb_{split}_{number:06d}.bin"
                    check_shard(path, self.vocab, manifest["bos_id"])
            return digest == manifest["tokenizer_sha256"]
        except (OSError, ValueError, KeyError, TypeError, PrepareError):
            return False

    def tokenizer(self, remote: str):
        """The tokenizer, put in its place; downloaded unless it is there already."""
        source = self.tokenizer_path if self.tokenizer_path.is_file() else self.fetch(remote)
        sp = load_tokenizer(source.read_bytes(), source)
        if (size := sp.vocab_size()) != self.vocab:
            raise PrepareError(f"{source} has {size} pieces, not {self.vocab}: remove it")
        self.tokenizer_path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, self.tokenizer_path)
        return sp

    def shard(self, name: str, bos: int) -> tuple[int, int]:
        """(tokens, documents) of a verified shard in place; downloaded unless already there."""
        path = self.folder / name
        if path.is_file():
            with contextlib.suppress(PrepareError):
                return check_shard(path, self.vocab, bos)
            path.unlink()
        say(f"downloading {name}")
        staged = self.fetch(f"datasets/{self.folder.name}/{name}")
        try:
            counts = check_shard(staged, self.vocab, bos)
        except PrepareError as error:
            staged.unlink()
            raise PrepareError(f"{error}; it is removed: run again to fetch it again") from None
        self.folder.mkdir(parents=True, exist_ok=True)
        os.replace(staged, path)
        return counts


def prepare_fineweb(args: argparse.Namespace) -> None:
    hub = Hub(args.repo, args.out, args.vocab_size)
    if hub.is_complete(args.train_shards):
        say(f"{hub.folder} is there already, all verified")
        return
    train_shards, val_shards, remote_model = hub.describe()
    if args.train_shards > train_shards:
        raise PrepareError(f"--train-shards {args.train_shards}: {args.repo} has {train_shards}")
    sp = hub.tokenizer(remote_model)
    model = hub.tokenizer_path.read_bytes()
    manifest = tokenizer_facts(f"fineweb: {hub.repo}", hub.tokenizer_path.name, model, sp)
    for split, shards in (("val", val_shards), ("train", args.train_shards)):
        names = [f"fineweb_{split}_{number:06d}.bin" for number in range(shards)]
        counts = [hub.shard(name, sp.bos_id()) for name in names]
        tokens, documents = (sum(column) for column in zip((0, 0), *counts, strict=True))
        manifest[split] = {"documents": documents, "tokens": tokens, "shards": shards}
        say(f"{split}: {shards} shards, {documents:,} documents, {tokens:,} tokens, all verified")
    write_manifest(hub.folder, manifest)
    shutil.rmtree(hub.staging, ignore_errors=True)
    say(f"DATA_PATH={hub.folder} TOKENIZER_PATH={hub.tokenizer_path}")


# --------------------------------------------------------------------------------------------------
# Main


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "text file (one document), .jsonl file (one JSON object per line) or folder of them"
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help=kinds)
    given = "use this SentencePiece model instead of training one"
    parser.add_argument("--tokenizer", type=Path, metavar="MODEL", help=given)
    key = "key of the text in .jsonl files (default: text)"
    parser.add_argument("--text-key", default="text", metavar="KEY", help=key)
    share = "share of the documents to validate on (default: 0.05)"
    parser.add_argument("--val-fraction", type=float, default=0.05, metavar="X", help=share)
    val = "validation files or folders, kept in order; then every PATH is for training"
    parser.add_argument("--val", nargs="+", type=Path, default=[], metavar="PATH", help=val)


def build_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("prepare.py", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="SOURCE")
    stdlib = commands.add_parser("stdlib", help="text that this Python installation carries")
    text = commands.add_parser("text", help="your own text: .txt, .md, ... and .jsonl files")
    fineweb = commands.add_parser("fineweb", help="the published FineWeb shards, downloaded")
    sources = (stdlib, prepare_stdlib), (text, prepare_text), (fineweb, prepare_fineweb)
    for command, run in sources:
        command.set_defaults(run=run, name="fineweb", val_fraction=0.05, train_shards=0)
        out = "where datasets/ and tokenizers/ go (default: the folder of this script)"
        here = Path(__file__).resolve().parent
        command.add_argument("--out", type=Path, default=here, metavar="DIR", help=out)
        size = "pieces of the tokenizer (default: 1024)"
        command.add_argument("--vocab-size", type=int, default=1024, metavar="N", help=size)
    for command, name in ((stdlib, "stdlib"), (text, "text")):
        command.add_argument("--name", default=name, help=f"of the dataset (default: {name})")
        command.add_argument("--force", action="store_true", help="replace what is there already")
    add_text_arguments(text)
    lib, modules = Path(sysconfig.get_path("stdlib")), "library folder (default: this Python's)"
    stdlib.add_argument("--lib", type=Path, default=lib, metavar="DIR", help=modules)
    shards = "how many to have, of 100 M tokens and 200 MB each (default: 1)"
    fineweb.add_argument("--train-shards", type=int, default=1, metavar="N", help=shards)
    repo, source = "willdepueoai/parameter-golf", "dataset on the hub (default: %(default)s)"
    fineweb.add_argument("--repo", default=repo, help=source)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """What argparse does not check itself."""
    if not 1 <= args.vocab_size <= MAX_VOCAB:
        raise PrepareError(f"--vocab-size {args.vocab_size}: uint16 shards take 1 to {MAX_VOCAB}")
    if not re.fullmatch(r"\w[\w.-]*", args.name) or re.search("_(train|val)_", f"{args.name}_"):
        raise PrepareError(f"--name {args.name}: letters, digits, . _ - only, no _train, no _val")
    if not 0 < args.val_fraction < 1:
        raise PrepareError(f"--val-fraction {args.val_fraction}: must lie between 0 and 1")
    if args.train_shards < 0:
        raise PrepareError(f"--train-shards {args.train_shards}: must not be negative")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
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
