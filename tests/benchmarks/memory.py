"""Peak memory of a training step by preset and microbatch, measured on this machine and estimated.

    python tests/benchmarks/memory.py [PRESET ...]

Each row is a process of its own, on the CPU with one worker, which takes two steps of one
microbatch; from its peak the memory that it had before making the net is taken off. The last line
is JSON.
"""

import json
import multiprocessing
import sys
import tempfile

import numpy as np
from throughput import ROOT, VOCAB, random_shard

ROWS = {
    "cpu": (1024, 2048, 4096),
    "mac": (1024, 2048, 4096),
    "baseline": (1024, 2048, 4096),
    "h100": (1024, 2048),
}


def measure(channel, preset: str, microbatch: int) -> None:
    """Send a row's figures, in bytes."""
    sys.path.insert(0, str(ROOT))
    import train_gpt_mlx_kl as t

    env = {"PRESET": preset, "DEVICE": "cpu", "WORKERS": "1", "COMPLEMENT_ALPHA": "0"}
    env |= {"TRAIN_BATCH_TOKENS": str(microbatch), "MLX_MAX_MICROBATCH_TOKENS": str(microbatch)}
    cfg, _ = t.knobs_from_env({**env, "GRAD_ACCUM_STEPS": "1"})
    t.use_device(cfg)
    with tempfile.TemporaryDirectory() as folder:
        path = random_shard(folder)
        data = t.TrainWindows([path], cfg.train_seq_len, cfg.seed, VOCAB)
        before = t.peak_memory()
        trainer = t.Trainer(t.GPT(cfg, VOCAB, 1), cfg, data, t.make_workers(cfg), t.Ranks())
        for _ in range(2):
            trainer.take_step()
    measured = t.peak_memory() - before

    def estimate(tokens: int) -> int:
        return t.estimate_memory(trainer.params, cfg, [tokens // cfg.train_seq_len], 0)["net"]

    channel.send({
        "preset": preset, "microbatch": microbatch, "measured": measured,
        "estimated": estimate(microbatch), "at_8192": estimate(8192),
        "parameters": sum(p.size for p in trainer.params.values()),
    })  # fmt: skip


def main() -> None:
    """A row for each preset and microbatch; then each preset's line through its rows, at 8,192."""
    context, rows = multiprocessing.get_context("spawn"), []
    for preset in sys.argv[1:] or ROWS:
        for microbatch in ROWS[preset]:
            here, there = context.Pipe()
            process = context.Process(target=measure, args=(there, preset, microbatch))
            process.start()
            there.close()  # so that a process that fails ends this one too
            rows.append(here.recv())
            process.join()
            print("{preset:<9} {parameters:>11,} parameters, microbatch {microbatch:>5}: measured "
                  "{mb:7.0f} MB, estimated {eb:7.0f} MB".format(
                      **rows[-1], mb=rows[-1]["measured"] / 1e6, eb=rows[-1]["estimated"] / 1e6),
                  flush=True)  # fmt: skip
        mine = [r for r in rows if r["preset"] == preset]
        slope, base = np.polyfit([r["microbatch"] for r in mine], [r["measured"] for r in mine], 1)
        line, estimate = (base + 8192 * slope) / 1e6, mine[0]["at_8192"] / 1e6
        print(f"{preset:<9} at 8,192 tokens, float32: {line:,.0f} MB by the line through these, "
              f"{estimate:,.0f} MB by estimate", flush=True)  # fmt: skip
    print(json.dumps({"benchmark": "memory", "rows": rows}))


if __name__ == "__main__":
    main()
