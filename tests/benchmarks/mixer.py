"""General compressors and this script's context models on one text, in one table.

    DATA_PATH=... TOKENIZER_PATH=... python tests/benchmarks/mixer.py [training tokens, 0: all]

Systems read the same training tokens, then are charged for the validation text: see compressors.py
for xz, PPMd and zpaq; a missing one is skipped by name. The backoff mixer learns online only.
The last line is JSON, an object per row.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from compressors import SYSTEMS, decode, rows

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_mlx_kl as t


def peak_mb() -> float:
    """This process's peak memory so far."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def row(system: str, nats: float, val_bytes: int, seconds: float, tokens: int) -> dict:
    """A row of the table."""
    bpb = t.bits_per_byte(nats, val_bytes)
    rate = tokens / max(seconds, 1e-9)
    return {"system": system, "bpb": bpb, "tok_s": rate, "memory_mb": peak_mb()}


def ours(tokens: t.Tokens, train: np.ndarray, val: np.ndarray) -> Iterator[dict]:
    """Backoff online; logistic online and primed."""
    val_bytes = int(tokens.bytes_of(val[:-1], val[1:]).sum())
    flat = np.full((4096, tokens.vocab), -math.log(tokens.vocab), np.float32)
    mixer = t.BackoffMixer(tokens.vocab, tokens.bos, 4, "kneser-ney", None, len(val))
    mixer.begin(int(val[0]))
    begin, nats = time.perf_counter(), 0.0
    for at in range(1, len(val), 4096):
        part = val[at : at + 4096]
        nats += mixer.score(part, flat[: len(part)])[:, 1].sum()
    yield row("backoff, order 4, online", nats, val_bytes, time.perf_counter() - begin, len(val))
    leaf = t.token_tree(train[:2_000_000], tokens.vocab)
    t.LogisticMixer(tokens, leaf, 1, 1).begin(0)  # compiles
    for text, name in ((train[:0], "online"), (train, "primed")):
        mixer = t.LogisticMixer(tokens, leaf, len(text) + len(val), t.Knobs().mixer_memory_mb)
        begin, coder = time.perf_counter(), t.Coder()
        for at in range(0, len(text), t.PACK_CHUNK):
            mixer.code(text[at : at + t.PACK_CHUNK].astype(np.int64), None, coder)
        primed = time.perf_counter() - begin
        begin = time.perf_counter()
        mixer.begin(int(val[0]))
        nats = float(mixer.code(val[1:].astype(np.int64))[:, 0].sum())
        seconds = time.perf_counter() - begin
        extra = {"priming_tok_s": len(text) / max(primed, 1e-9), "code_bytes": len(coder.finish())}
        yield row(f"logistic, {name}", nats, val_bytes, seconds, len(val)) | (
            extra if primed else {}
        )


def main() -> None:
    """Print the rows as they are measured, then all of them as JSON."""
    cfg, _ = t.knobs_from_env({**os.environ, "PRESET": "cpu"})
    folder, tokenizer, _ = t.locate_data(cfg)
    tokens, most = t.load_tokenizer(tokenizer), int(sys.argv[1]) if len(sys.argv) > 1 else 0
    train = np.concatenate([t.open_shard(p) for p in t.find_shards(folder, "train")])
    train = train[-most:].astype(np.int32)
    val, _ = t.load_validation(t.find_shards(folder, "val"), tokens, cfg.val_max_tokens)
    table = []
    for source in (ours(tokens, train, val),
                   rows(decode(train, tokenizer), decode(val, tokenizer), SYSTEMS)):  # fmt: skip
        for line in source:
            print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                           for k, v in line.items()), flush=True)  # fmt: skip
            table.append(line)
    print(json.dumps(table))


if __name__ == "__main__":
    main()
