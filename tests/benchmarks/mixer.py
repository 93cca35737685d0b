"""General compressors and this script's context models on one text, in one table.

    DATA_PATH=... TOKENIZER_PATH=... python tests/benchmarks/mixer.py [ARTIFACT]

Systems read the same training tokens, then are charged for the validation text: see compressors.py
for xz, PPMd and zpaq; a missing one is skipped by name. The backoff mixer learns online only.
With an artifact there are rows with its net. The last line is JSON.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from compressors import SYSTEMS, decode, rows

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_mlx_kl as t


def peak_mb() -> float:
    """This process's peak memory so far."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def row(system: str, nats: float, val_bytes: int, seconds: float, tokens: int, **more) -> dict:
    """A row of the table."""
    figures = {"bpb": t.bits_per_byte(nats, val_bytes), "tok_s": tokens / max(seconds, 1e-9)}
    return {"system": system, **figures, "memory_mb": peak_mb(), **more}


def scored(scorer: t.ContextModel, val: np.ndarray, stream: Iterator) -> tuple[np.ndarray, float]:
    """(nats by the net, the contexts, all; seconds) of a scorer over a stream of the net's rows."""
    begin, nats = time.perf_counter(), np.zeros(3)
    scorer.begin(int(val[0]))
    for _, part in t.cost_tokens(stream, val, scorer):
        nats += part.sum(axis=0)
    return nats, time.perf_counter() - begin


def flat(targets: int, vocab: int) -> Iterator[tuple[int, np.ndarray]]:
    """A net that knows nothing."""
    rows = np.full((4096, vocab), -math.log(vocab), np.float32)
    for first in range(0, targets, 4096):
        yield first, rows[: targets - first]


def backoff(tokens: t.Tokenizer, val: np.ndarray) -> t.BackoffMixer:
    """The backoff mixer as the presets have it."""
    return t.BackoffMixer(tokens.vocab, tokens.bos, 4, "kneser-ney", None, len(val))


def ours(tokens: t.Tokenizer, train: np.ndarray, val: np.ndarray, net: Callable | None) -> Iterator:
    """Backoff online, logistic online and primed; `net` makes a stream of a net's rows."""
    count, n = int(tokens.bytes_of(val[:-1], val[1:]).sum()), len(val) - 1
    nats, seconds = scored(backoff(tokens, val), val, flat(n, tokens.vocab))
    yield row("backoff, order 4, online", nats[1], count, seconds, n)
    leaf = t.token_tree(train[:2_000_000], tokens.vocab)
    t.LogisticMixer(tokens, leaf, 1, 1).begin(0)  # compiles
    memory = 4000  # MiB
    mixer = t.LogisticMixer(tokens, leaf, len(val), memory)
    begin = time.perf_counter()
    mixer.begin(int(val[0]))
    nats = mixer.code(val[1:].astype(np.int64)).sum(axis=0)
    yield row("logistic, online", nats[0], count, time.perf_counter() - begin, n)
    mixer = t.LogisticMixer(tokens, leaf, len(train) + len(val), memory)
    begin, coder = time.perf_counter(), t.Coder()
    for at in range(0, len(train), t.PACK_CHUNK):
        mixer.code(train[at : at + t.PACK_CHUNK].astype(np.int64), None, coder)
    primed = {"priming_tok_s": len(train) / (time.perf_counter() - begin)}
    primed |= {"code_bytes": len(coder.finish()), "memory_mb": peak_mb()}
    state = mixer.save() if net else None
    begin = time.perf_counter()
    mixer.begin(int(val[0]))
    nats = mixer.code(val[1:].astype(np.int64)).sum(axis=0)
    yield row("logistic, primed", nats[0], count, time.perf_counter() - begin, n) | primed
    if net:
        mixer.restore(state)
        nats, seconds = scored(mixer, val, net())
        alone, own_seconds = scored(t.ContextModel(), val, net())
        yield row("the net, alone", alone[0], count, own_seconds, n)
        yield row("logistic, primed, with the net", nats[2], count, seconds, n)
        nats, seconds = scored(t.LogisticMixer(tokens, leaf, len(val), memory), val, net())
        yield row("logistic, online, with the net", nats[2], count, seconds, n)
        nats, seconds = scored(backoff(tokens, val), val, net())
        yield row("backoff, online, with the net", nats[2], count, seconds, n)


def main() -> None:
    """Print the rows as they are measured, then all of them as JSON."""
    cfg, _ = t.knobs_from_env({**os.environ, "PRESET": "cpu"})
    folder, tokenizer, _ = t.locate_data(cfg)
    tokens = t.load_tokenizer(tokenizer)
    train = np.concatenate([t.Shard(p)[:] for p in t.find_shards(folder, "train")])
    train = train.astype(np.int32)
    val = t.load_validation(folder, tokens, cfg.val_max_tokens).tokens
    with t.make_workers(cfg) as workers:
        net, table = None, []
        if len(sys.argv) > 1:
            path = Path(sys.argv[1])
            cfg, _ = t.knobs_from_env({}, kept=t.read_artifact(path).header["knobs"])
            scoring = t.Scoring.load(cfg, path, folder, workers)
            net = lambda: t.ahead(scoring.rows("sliding", val))  # noqa: E731
        for source in (ours(tokens, train, val, net),
                       rows(*(decode(x, tokenizer) for x in (train, val)), SYSTEMS)):  # fmt: skip
            for line in source:
                print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                               for k, v in line.items()), flush=True)  # fmt: skip
                table.append(line)
    print(json.dumps({"rows": table}))


if __name__ == "__main__":
    main()
