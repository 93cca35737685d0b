"""What packed text buys: bytes of artifact against bits per byte, chosen text against random text.

    DATA_PATH=... TOKENIZER_PATH=... python tests/benchmarks/packing.py [BYTES ...]

For each number of bytes the packer fills, with the documents that it ranks first and with a random
choice; the mixer that packed them, which has room for a million tokens more, then scores the
validation text (the first VAL_MAX_TOKENS), without a net. No clock. The last line is JSON, an
object per row.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_mlx_kl as t

BUDGETS = [150_000, 560_000, 1_000_000, 2_090_000]
RANKED = t.rank_documents


def random_documents(text: np.ndarray, _vocab: int, bos: int, budget: int) -> Iterator:
    """Documents in random order, until they have `budget` tokens."""
    starts = np.flatnonzero(text == bos)
    ends = np.append(starts[1:], len(text))
    for i in np.random.default_rng(0).permutation(len(starts)):
        if budget > 0:
            yield int(starts[i]), int(ends[i])
            budget -= int(ends[i] - starts[i])


def row(
    cfg: t.Knobs, data: t.TrainWindows, tokens: t.Tokenizer, val: np.ndarray, budget: int
) -> dict:
    """Pack, then score the validation text with the mixer that packed."""
    packer = t.Packer(data, tokens, cfg, budget, t.Workers(1))
    packer.start(0.0)
    packed, mixer = packer.finish(), packer.mixer
    mixer.begin(int(val[0]))
    nats = mixer.code(val[1:].astype(np.int64)).sum(axis=0)
    bpb = t.bits_per_byte(nats[0], int(tokens.bytes_of(val[:-1], val[1:]).sum()))
    return {
        "bytes": len(packed.code),
        "tokens": packed.token_count,
        "bpb": bpb,
        "s": packer.seconds,
    }


def main() -> None:
    """A row for each number of bytes and way of choosing."""
    fixed = {"PRESET": "cpu", "MAX_WALLCLOCK_SECONDS": "0"}
    cfg, _ = t.knobs_from_env({"VAL_MAX_TOKENS": "1000000", **os.environ, **fixed})
    folder, tokenizer, _ = t.locate_data(cfg)
    tokens = t.load_tokenizer(tokenizer)
    paths = t.find_shards(folder, "train")
    data = t.TrainWindows(paths, cfg.train_seq_len, cfg.seed, tokens.vocab)
    val, _ = t.load_validation(t.find_shards(folder, "val"), tokens, cfg.val_max_tokens)
    table = []
    for budget in [int(a) for a in sys.argv[1:]] or BUDGETS:
        for name, choose in (("ranked", RANKED), ("random", random_documents)):
            t.rank_documents = choose
            table.append({"choice": name, **row(cfg, data, tokens, val, budget)})
            print(table[-1], flush=True)
    print(json.dumps(table))


if __name__ == "__main__":
    main()
