"""What packed text buys: bytes of artifact against bits per byte.

    DATA_PATH=... TOKENIZER_PATH=... python tests/benchmarks/packing.py [BYTES ...]

For each number of bytes the packer fills them with the beginning of the training text; the mixer
that packed it then scores the validation text (the first VAL_MAX_TOKENS), without a net. No clock.
The last line is JSON.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_mlx_kl as t

BUDGETS = [150_000, 560_000, 1_000_000, 2_090_000]


def pack_and_score(
    cfg: t.Knobs, data: t.TrainWindows, tokenizer: t.Tokenizer, text: np.ndarray, budget: int
) -> dict:
    """Pack so many bytes, then score the validation text (n,) with the mixer that has packed."""
    packer = t.Packer(data, tokenizer, cfg, budget, t.Workers(1))
    packer.start(0.0)
    packed = packer.finish()
    capacity = packed.token_count + len(text)
    mixer = t.LogisticMixer(
        tokenizer, packed.leaves[0], capacity, cfg.mixer_memory_mb, cfg.mixer_size
    )
    t.unpack(mixer, packed, "priming")
    mixer.begin(int(text[0]))
    contexts, _ = mixer.code(text[1:].astype(np.int64)).sum(axis=0)
    byte_count = int(tokenizer.bytes_of(text[:-1], text[1:]).sum())
    return {
        "packed_bytes": len(packed.code),
        "packed_tokens": packed.token_count,
        "val_bpb": t.bits_per_byte(float(contexts), byte_count),
        "pack_seconds": packer.seconds,
    }


def main() -> None:
    """A row for each number of bytes."""
    usual = {"VAL_MAX_TOKENS": "1000000", "MIXER_MEMORY_MB": "4000"}
    fixed = {"PRESET": "cpu", "MAX_WALLCLOCK_SECONDS": "0"}
    cfg, _ = t.knobs_from_env({**usual, **os.environ, **fixed})
    folder, tokenizer_path, _ = t.locate_data(cfg)
    tokenizer = t.load_tokenizer(tokenizer_path)
    paths = t.find_shards(folder, "train")
    data = t.TrainWindows(paths, cfg.train_seq_len, cfg.seed, tokenizer.vocab)
    text = t.load_validation(folder, tokenizer, cfg.val_max_tokens).tokens
    rows = []
    for budget in [int(argument) for argument in sys.argv[1:]] or BUDGETS:
        rows.append(pack_and_score(cfg, data, tokenizer, text, budget))
        print(rows[-1], flush=True)
    print(json.dumps({"benchmark": "packing", "val_tokens": len(text) - 1, "rows": rows}))


if __name__ == "__main__":
    main()
