"""What general compressors make of the same text: alone, and primed with the training text.

Primed: the training text stands before the validation text in one stream, and the validation text
costs compressed(train + val) - compressed(train). That is true only if the compressor is the same
in both runs and forgets nothing, so all settings follow from the length of train + val:

- xz: a dictionary that holds the whole stream, at least the 64 MiB of xz -9e.
- PPMd, variant H (7-Zip's) of order 12: it starts anew when its memory is full. Its pages are
  touched only as they fill, so a peak below ARENA proves that this did not happen.
- zpaq: `-m5` sizes its tables by the input, in powers of two, whatever block size is asked for,
  and chooses its model by the look of the data. If such a step lies between train and train + val
  the two are not the same compressor, which has shown 1.59 BPB for a true 1.81. Here its model
  for text is spelled out, with one block size, in a streaming archive: one block, no index. On
  1.2 MB alone it is better than `-m57` so: 0.009 BPB for the index, 0.019 for larger tables.

Nothing is cut or padded. Each compression is a process of its own, from file to file, one thread.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_mlx_kl as t

SYSTEMS = ["xz -9e", "PPMd order 12", "zpaq -m5"]
ARENA = 1 << 31  # bytes of PPMd's memory; an eighth of it holds the text, the rest its contexts

# zpaq -m5 for text, as compressBlock in libzpaq.cpp spells it
MODEL = "0w2c0,1010,255i1c256ci1,1,1,1,1,1,2ac0,2,0,255i1c0,3,0,0,255i1c0,4,0,0,0,255i1mm16ts19t0"

XZ = """import lzma, sys
text, dictionary = open(sys.argv[1], "rb").read(), int(sys.argv[3])
chain = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
open(sys.argv[2], "wb").write(lzma.compress(text, check=lzma.CHECK_CRC32, filters=[chain]))"""

PPMD = """import pyppmd, sys
text, encoder = open(sys.argv[1], "rb").read(), pyppmd.Ppmd7Encoder(12, int(sys.argv[3]))
open(sys.argv[2], "wb").write(encoder.encode(text) + encoder.flush())"""

# Linux counts into a child's ru_maxrss what its parent held when it started it. This process may
# hold gigabytes; a small Python in between does not.
WRAPPER = """import json, os, sys, time
begin, quiet = time.perf_counter(), [(os.POSIX_SPAWN_DUP2, 2, 1)]
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet)
_, status, usage = os.wait4(pid, 0)
mb = usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
print(json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - begin, mb]))"""


def decode(tokens: np.ndarray, model: Path) -> bytes:
    """The text of tokens, document by document, as bytes: exactly those that a score divides by.

    Nothing stands between documents: a separator would cost bits and add no byte to the divisor.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    documents = np.split(tokens, np.flatnonzero(tokens == processor.bos_id()))
    text = "".join(processor.decode(d.tolist()) for d in documents if len(d)).encode()
    scored = int(t.load_tokenizer(model).bytes_of(tokens[:-1], tokens[1:]).sum())
    if len(text) != scored:
        raise ValueError(f"decoded text has {len(text):,} bytes, the score counts {scored:,}")
    return text


def check(system: str, stream_bytes: int) -> None:
    """Raise RuntimeError, saying what to do, if a system cannot do so long a stream here."""
    found, get, most = {
        "xz -9e": (importlib.util.find_spec("_lzma"), "a Python with lzma", 1 << 30),
        "PPMd order 12": (importlib.util.find_spec("pyppmd"), "pip install pyppmd", ARENA // 8),
        "zpaq -m5": (shutil.which("zpaq"), "apt-get install zpaq", (1 << 31) - 8192),
    }[system]
    if not found:
        raise RuntimeError(f"{system.split()[0]}: not found, skipped ({get})")
    if stream_bytes > most:
        raise RuntimeError(f"{system}: skipped, forgets after {most:,} bytes (train on less text)")


def command(system: str, source: Path, target: Path, stream_bytes: int) -> list[str]:
    """The command that compresses source into target, with tables sized by the longest stream."""
    if system == "xz -9e":
        dictionary = max(1 << 26, 1 << (stream_bytes - 1).bit_length())
        return [sys.executable, "-c", XZ, str(source), str(target), str(dictionary)]
    if system == "PPMd order 12":
        return [sys.executable, "-c", PPMD, str(source), str(target), str(ARENA)]
    block = max((stream_bytes + 8192 - 1).bit_length() - 20, 0)  # 2^block MiB less two pages
    options = [f"-ms{block}.{MODEL}", "-t1", "-noattributes"]
    return ["zpaq", "add", str(target), str(source), *options]


def compress(system: str, text: bytes, stream_bytes: int) -> tuple[int, float, float]:
    """(compressed bytes, seconds, peak MB) of one text in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "text"), Path(folder, "text.zpaq")
        source.write_bytes(text)
        run = [sys.executable, "-c", WRAPPER, *command(system, source, target, stream_bytes)]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        code, seconds, memory_mb = json.loads(done.stdout)
        if code:
            raise RuntimeError(f"{system}: exit code {code}: {done.stderr.strip()[-500:]}")
        if system == "PPMd order 12" and memory_mb >= ARENA / (1 << 20):
            raise RuntimeError("PPMd: its memory was full, so it started anew: no figure")
        return target.stat().st_size, seconds, memory_mb


def rows(train: bytes, val: bytes, systems: list[str]) -> Iterator[dict]:
    """One row per system and way, as soon as it is measured; `skipped` says why there is no figure.

    Seconds and memory are of the run that ends with val; that on train only serves to subtract.
    """
    stream = len(train) + len(val)
    for system in systems:
        for primed in (False, True) if train else (False,):
            row = {"system": system, "primed": primed}
            try:
                check(system, stream)
                before = compress(system, train, stream)[0] if primed else 0
                size, seconds, mb = compress(system, (train if primed else b"") + val, stream)
                bpb = 8 * (size - before) / len(val)
                row |= {"bpb": bpb, "seconds": seconds, "memory_mb": mb}
            except RuntimeError as error:
                row["skipped"] = str(error)
            yield row
