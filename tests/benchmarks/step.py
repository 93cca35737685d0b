"""Tokens a second of the training step at the reference shape, with one worker and with all.

    python tests/benchmarks/step.py [seconds each]

The shape: 4 layers x 256, 4 heads, 2 KV heads, MLP 2x, vocabulary 1,024, features off, 8 sequences
of 512 random tokens a step, float32. Runs of the two alternate; the last line is JSON.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_mlx_kl as t

SHAPE = """PRESET=cpu NUM_LAYERS=4 MODEL_DIM=256 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=2
    TRAIN_SEQ_LEN=512 TRAIN_BATCH_TOKENS=4096 ENGRAM_LITE_ENABLED=0 BIGRAM_HASH_SIZE=0
    USE_SMEARGATE=0 XSA_LAST_N=0 LN_SCALE_ENABLED=0 COMPLEMENT_ALPHA=0 EMA_DECAY=0 ROPE_DIMS=0
    MLP_LEAK=0 MAX_WALLCLOCK_SECONDS=0"""


def random_shard(folder: Path) -> Path:
    """A training shard of random tokens."""
    tokens = np.random.default_rng(0).integers(3, 1024, 1_000_000).astype("<u2")
    header = np.zeros(256, "<i4")
    header[:3] = t.SHARD_MAGIC, t.SHARD_VERSION, len(tokens)
    path = folder / "random_train_000000.bin"
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return path


def trainer(workers: int, shard: Path) -> t.Trainer:
    """A trainer that has taken two steps."""
    cfg, _ = t.knobs_from_env(dict(p.split("=") for p in [*SHAPE.split(), f"WORKERS={workers}"]))
    data = t.TrainWindows([shard], cfg.train_seq_len, cfg.seed, 1024)
    made = t.Trainer(t.GPT(cfg, 1024, 1), cfg, data, None, t.make_workers(cfg))
    for _ in range(2):
        made.advance()
    return made


def rate(made: t.Trainer, seconds: float) -> float:
    """Tokens a second over about `seconds`."""
    if t.BLAS:
        t.BLAS["set_threads"](max(t.cpu_cores() // made.workers.count, 1))
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        made.advance()
        steps += 1
    return steps * 4096 / (time.perf_counter() - begin)


def main() -> None:
    """Five alternating pairs; minimum, median and maximum of each and of their ratio."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    with tempfile.TemporaryDirectory() as folder:
        shard = random_shard(Path(folder))
        one, every = trainer(1, shard), trainer(t.cpu_cores(), shard)
        pairs = [(rate(one, seconds), rate(every, seconds)) for _ in range(5)]
        every.workers.__exit__()
    figures = {}
    for name, values in (
        ("tok_s_1_worker", [a for a, _ in pairs]),
        (f"tok_s_{every.workers.count}_workers", [b for _, b in pairs]),
        ("ratio", [b / a for a, b in pairs]),
    ):
        figures[name] = [float(f(values)) for f in (np.min, np.median, np.max)]
        print(f"{name:<18} min {figures[name][0]:.2f}  median {figures[name][1]:.2f}  "
              f"max {figures[name][2]:.2f}")  # fmt: skip
    print(json.dumps({"benchmark": "step", "blas": t.BLAS_NAME, **figures}))


if __name__ == "__main__":
    main()
