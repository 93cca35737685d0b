"""Files compressed with an artifact, and with other compressors: sizes and speeds.

    python tests/benchmarks/files.py ARTIFACT FILE [FILE ...] [--dictionary-text TEXT]
        [--with-net-up-to BYTES] [--kept RESULTS.json] [--only NAME ...]

Of this script MODE=compress is measured, by its own code: the size of the whole .tgk file. The
mixer is primed once. Each file is compressed in a process that is forked from the primed one and
copies its tables, and restored in another. Seconds are of the coding alone. Priming, which
MODE=compress and MODE=restore need once each time, is printed apart.

Other compressors that can be given text are given what the artifact has packed, decoded, or TEXT,
whose documents are cut at empty lines:

- zstd: a dictionary trained on that text, of 112,640 bytes (what `zstd --train` makes) or of 1 MB;
  or the text itself, as `zstd --patch-from` uses it.
- PPMd and zpaq: the text stands before the file in one stream, and the file costs the difference,
  as in compressors.py; for zpaq the last 10 MB of it. No format works so: it shows what priming is
  worth to them.

Sizes of xz, zstd, brotli, zpaq and paq8px are of complete files, with a checksum where the format
has one; PPMd's is of the bare code. Each seconds figure is of one compression: in this process for
xz, zstd and brotli, with what loading a dictionary takes; else of a process from start to end.

--kept names a file that results are read from and added to, so that a table can be made in parts;
--only measures some columns. The last line is JSON.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import lzma
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import compressors
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_mlx_kl as t

PPMD, ZPAQ = "PPMd order 12", "zpaq -m5"  # their names in compressors.py
ZPAQ_TAIL = 10_000_000  # bytes of the text that zpaq reads before a file, at 0.4 MB/s


class Measured(NamedTuple):
    """One file by one compressor."""

    size: int
    seconds: float


class System(NamedTuple):
    """A column: what tells the compressor's version, what measures a file."""

    version: Callable[[], str]  # raises an error of MISSING if it is not installed
    measure: Callable[[Path], Measured | None]
    given: str = ""  # SHA-256 of what else its results depend on


MISSING = importlib.metadata.PackageNotFoundError, FileNotFoundError


def package(name: str) -> str:
    """An installed package and its version."""
    return f"{name} {importlib.metadata.version(name)}"


def program(name: str) -> str:
    """A program and its version, as it says on its first line."""
    done = subprocess.run([name], capture_output=True, text=True)
    return re.search(rf"{name}\D* v[\d.]+", done.stdout + done.stderr)[0]


def timed(compress: Callable[[bytes], bytes], path: Path) -> Measured:
    """Compress a file in this process."""
    raw = path.read_bytes()
    begin = time.perf_counter()
    return Measured(len(compress(raw)), time.perf_counter() - begin)


def xz(raw: bytes) -> bytes:
    """As `xz -9e`."""
    return lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)


def brotli(raw: bytes) -> bytes:
    """As `brotli -q 11 -w 24`."""
    import brotli as module

    return module.compress(raw, quality=11, lgwin=24)


def zstd(raw: bytes, dictionary: Any = None) -> bytes:
    """As `zstd --ultra -22 --long=27`, with `-D dictionary`."""
    import zstandard

    best = zstandard.ZstdCompressionParameters.from_level(
        22, window_log=27, enable_ldm=True, write_checksum=True, write_content_size=True
    )
    return zstandard.ZstdCompressor(compression_params=best, dict_data=dictionary).compress(raw)


def paq8px(level: str, path: Path) -> Measured:
    """`paq8px -8`; T: its text models learn from its own English dictionary first."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        command = ["paq8px", level, str(path.resolve()), str(Path(folder, "made"))]
        subprocess.run(command, check=True, capture_output=True)
        (made,) = Path(folder).iterdir()
        return Measured(made.stat().st_size, time.perf_counter() - begin)


def stand_alone(system: str, path: Path) -> Measured:
    """PPMd or zpaq, as compressors.py runs them."""
    raw = path.read_bytes()
    return Measured(*compressors.compress(system, raw, len(raw))[:2])


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a process that is forked from this one."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(work()))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("a forked process failed, for the reason above") from None
    finally:
        child.join()


def own_copy(mixer: t.Mixer) -> None:
    """Copy a forked mixer's tables at once: page by page, as they are written, would be timed."""
    for each in mixer.all():
        copies = [t.huge_zeros(a.size, a.dtype).reshape(a.shape) for a in each.state]
        for copy, array in zip(copies, each.state, strict=True):
            np.copyto(copy, array)
        each.state = t.Past(*copies)


def serve_net(path: Path, stride: int, ends: Any) -> None:
    """An artifact's net: for each token that comes, ln P of what comes next."""
    use = t.Use.load(path, dict(os.environ))
    model, length = t.load_net(use.cfg, path, use.artifact), t.eval_shape(use.cfg)[0]
    t.NetReader(model, length, stride).read(0)  # the first call takes longer
    reader = t.NetReader(model, length, stride)
    ends.send(None)
    with contextlib.suppress(EOFError):  # the other end is closed
        while True:
            reader.read(ends.recv())
            ends.send(reader.logs)


class FarNet:
    """A `NetReader` in a new process: MLX's threads are not in one that is forked."""

    def __init__(self, path: Path, stride: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.ends, theirs = context.Pipe()
        self.process = context.Process(target=serve_net, args=(path, stride, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.logs = self.ends.recv()

    def read(self, token: int) -> None:
        """See `NetReader.read`."""
        self.ends.send(token)
        self.logs = self.ends.recv()


class PrimedUse(t.Use):
    """MODE=compress and MODE=restore by a mixer that has read the artifact's text already."""

    mixer: t.Mixer
    seconds = 0.0  # of the last coding

    def predictor(
        self, tokens: int, contexts: bool, net: bool, stride: int, first: bool = False
    ) -> t.Predictor:
        """See `Use.predictor`."""
        mixer = self.mixer.all()[0] if first else self.mixer
        return t.Predictor(mixer, FarNet(self.path, stride) if net else None)

    def encode(self, parts: list[np.ndarray], flags: int) -> tuple[bytes, float]:
        """See `Use.encode`."""
        code, speed = super().encode(parts, flags)
        self.seconds = sum(map(len, parts)) / speed
        return code, speed

    def run(self, mode: str, **knobs: Any) -> float:
        """A mode in a process of its own, without its output. Returns the seconds of coding."""

        def work() -> float:
            own_copy(self.mixer)
            self.cfg = dataclasses.replace(self.cfg, **knobs)
            with contextlib.redirect_stdout(io.StringIO()):
                getattr(self, mode)()
            return self.seconds

        return in_child(work)

    def measure(self, path: Path, with_net: bool) -> Measured:
        """Compress a file, restore it, compare."""
        with tempfile.TemporaryDirectory() as folder:
            small, again = Path(folder, "small"), Path(folder, "again")
            seconds = self.run("compress", file=str(path), output=str(small), with_net=with_net)
            self.run("restore", file=str(small), output=str(again))
            if again.read_bytes() != path.read_bytes():
                raise RuntimeError(f"{path}: another file after MODE=restore")
            return Measured(small.stat().st_size, seconds)


class Bench:
    """An artifact, the files, and the text that others are given; each made when it is needed."""

    def __init__(self, options: argparse.Namespace) -> None:
        path, text = Path(options.artifact), options.dictionary_text
        self.path = path / "artifact.bin" if path.is_dir() else path
        self.artifact = t.file_sha256(self.path)
        self.text_sha256 = t.file_sha256(Path(text)) if text else self.artifact
        self.options, self.longest = options, max(p.stat().st_size for p in options.files)
        self.primers: dict[str, int] = {}  # bytes of the text by each compressor
        self.dictionaries: dict[int, Any] = {}  # zstd's, by their size

    @functools.cached_property
    def use(self) -> PrimedUse:
        """The artifact, its mixer primed."""
        use = PrimedUse.load(self.path, dict(os.environ))
        if not use.artifact.packed:
            raise t.UserError(f"{self.path}: made without MIXER=logistic, it codes no files")
        begin = time.perf_counter()
        use.mixer = t.prime_contexts(use.cfg, use.artifact, self.longest + 2, None)
        seconds = time.perf_counter() - begin
        print(f"primed: {use.artifact.packed.total()[0]:,} tokens in {seconds:.1f} s", flush=True)
        return use

    @functools.cached_property
    def documents(self) -> list[bytes]:
        """The documents that others are given."""
        if self.options.dictionary_text:
            return Path(self.options.dictionary_text).read_bytes().split(b"\n\n")
        tokens = self.use.mixer.all()[0].state.history[: self.use.mixer.learned]
        parts, pieces = np.split(tokens, np.flatnonzero(tokens == self.use.bos)), self.use.pieces()
        return [pieces.decode(part[1:].tolist()).lstrip(b" ") for part in parts if len(part) > 1]

    def with_dictionary(self, size: int, path: Path) -> Measured:
        """zstd with a dictionary of so many bytes, trained; or with all the text for one."""
        import zstandard

        if size not in self.dictionaries:
            begin = time.perf_counter()
            made = (
                zstandard.train_dictionary(size, self.documents, level=22)
                if size
                else zstandard.ZstdCompressionDict(
                    b"\n".join(self.documents), dict_type=zstandard.DICT_TYPE_RAWCONTENT
                )
            )
            seconds = time.perf_counter() - begin
            print(f"dictionary: {len(made.as_bytes()):,} bytes in {seconds:.1f} s", flush=True)
            self.dictionaries[size] = made
        return timed(functools.partial(zstd, dictionary=self.dictionaries[size]), path)

    def primed(self, system: str, path: Path) -> Measured:
        """PPMd or zpaq: the text and the file, less the text; the seconds are of both."""
        text = b"\n".join(self.documents)
        text = text[-ZPAQ_TAIL:] if system == ZPAQ else text
        stream = len(text) + self.longest
        compressors.check(system, stream)
        if system not in self.primers:
            self.primers[system] = compressors.compress(system, text, stream)[0]
        size, seconds, _ = compressors.compress(system, text + path.read_bytes(), stream)
        return Measured(size - self.primers[system], seconds)

    def ours(self, with_net: bool, path: Path) -> Measured | None:
        """MODE=compress; the net reads only what is not too long."""
        if with_net and path.stat().st_size > self.options.with_net_up_to:
            return None
        return self.use.measure(path, with_net)

    def systems(self) -> dict[str, System]:
        """The columns."""
        on = functools.partial
        version = {name: on(package, name) for name in ("zstandard", "brotli", "pyppmd")}
        version |= {name: on(program, name) for name in ("zpaq", "paq8px")}
        text = self.text_sha256
        script = hashlib.sha256(t.source()).hexdigest()[:12]
        mine = lambda: f"script {script}"  # noqa: E731
        return {
            "xz": System(lambda: f"Python {sys.version.split()[0]}", on(timed, xz)),
            "zstd": System(version["zstandard"], on(timed, zstd)),
            "brotli": System(version["brotli"], on(timed, brotli)),
            "PPMd": System(version["pyppmd"], on(stand_alone, PPMD)),
            "zpaq": System(version["zpaq"], on(stand_alone, ZPAQ)),
            "paq8px -8": System(version["paq8px"], on(paq8px, "-8")),
            "paq8px -8T": System(version["paq8px"], on(paq8px, "-8T")),
            "zstd, 112 kB": System(version["zstandard"], on(self.with_dictionary, 112_640), text),
            "zstd, 1 MB": System(version["zstandard"], on(self.with_dictionary, 1 << 20), text),
            "zstd, all text": System(version["zstandard"], on(self.with_dictionary, 0), text),
            "PPMd, primed": System(version["pyppmd"], on(self.primed, PPMD), text),
            "zpaq, primed": System(version["zpaq"], on(self.primed, ZPAQ), text),
            "contexts": System(mine, on(self.ours, False), self.artifact),
            "contexts + net": System(mine, on(self.ours, True), self.artifact),
        }


class Kept:
    """Results, in a file if it has a name: a compressor of one version does one file once."""

    def __init__(self, name: str | None) -> None:
        self.path = Path(name) if name else None
        found = self.path is not None and self.path.exists()
        self.results: dict[str, Any] = json.loads(self.path.read_text()) if found else {}

    def result(self, name: str, system: System, path: Path, measure: bool) -> Measured | str:
        """What is known of a file, or what is measured of it now; or why there is nothing."""
        try:
            version = system.version()
        except MISSING:
            return "not installed"
        key = " | ".join([t.file_sha256(path), name, version, system.given[:12]])
        if key not in self.results:
            measured = system.measure(path) if measure else None
            if measured is None:
                return ""
            self.results[key] = measured
            if self.path:
                with t.whole_file(self.path) as temporary:
                    temporary.write_text(json.dumps(self.results, indent=1))
        return Measured(*self.results[key])


def shown(result: Measured | str, size: int) -> str:
    """A result: bytes, bits per byte, seconds."""
    if isinstance(result, str):
        return result
    return f"{result.size:,} bytes, {8 * result.size / size:.3f} bpb, {result.seconds:.2f} s"


def table(rows: dict[str, dict]) -> str:
    """Sizes in bytes, as Markdown."""
    heads = list(next(iter(rows.values()))["results"])
    lines = [["file", "bytes", *heads], ["---"] * (len(heads) + 2)]
    for name, row in rows.items():
        cells = [v if isinstance(v, str) else f"{v.size:,}" for v in row["results"].values()]
        lines.append([name, f"{row['bytes']:,}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """A line per result, then the table of sizes, then all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact", help="an artifact, or a run's folder")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--dictionary-text", help="a text for the others")
    parser.add_argument("--with-net-up-to", type=int, default=30_000, help="bytes of a file")
    parser.add_argument("--kept", help="a file of results")
    parser.add_argument("--only", nargs="+", help="columns to measure")
    options = parser.parse_intermixed_args()
    bench, kept, rows = Bench(options), Kept(options.kept), {}
    for path in options.files:
        raw = path.read_bytes()
        digest = hashlib.sha256(raw).hexdigest()
        rows[path.name] = {"bytes": max(len(raw), 1), "sha256": digest, "results": {}}
    for name, system in bench.systems().items():
        for path in options.files:
            row, measure = rows[path.name], not options.only or name in options.only
            result = kept.result(name, system, path, measure)
            row["results"][name] = result
            if result:
                print(f"{path.name}: {name}: {shown(result, row['bytes'])}", flush=True)
    print(table(rows))
    print(json.dumps({"benchmark": "files", "artifact": bench.artifact, "rows": rows}))


if __name__ == "__main__":
    with t.errors_as_lines():
        main()
