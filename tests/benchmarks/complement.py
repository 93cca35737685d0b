"""Which partner complementary training should have: nobody, pairs of tokens, or the contexts.

    DATA_PATH=... TOKENIZER_PATH=... python tests/benchmarks/complement.py [STEPS [SEEDS]]

The mixer reads the whole training text once, as packing does. Then each net is trained for the same
steps with each kind of loss weights, for each seed, with what the contexts foresee known from the
first step, and scores the validation text (the first VAL_MAX_TOKENS) with that primed mixer. The
last line is JSON, an object per net.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_mlx_kl as t

WAYS = {"none": {"COMPLEMENT_ALPHA": "0"}, "bigram": {"COMPLEMENT_BY": "bigram"},
        "contexts": {"COMPLEMENT_BY": "contexts"}}  # fmt: skip


def settings(steps: int, seed: int, folder: str, **env: str) -> t.Knobs:
    """The cpu preset with a number of steps in place of a clock."""
    fixed = {"PRESET": "cpu", "ITERATIONS": str(steps), "MAX_WALLCLOCK_SECONDS": "0",
             "WARMDOWN_ITERS": str(steps // 2), "SEED": str(seed), "OUT_DIR": folder,
             "PACK_TEXT_BYTES": "16000000", "VAL_LOSS_EVERY": "0"}  # fmt: skip
    return t.knobs_from_env({"VAL_MAX_TOKENS": "200000", **os.environ, **fixed, **env})[0]


def trained(
    cfg: t.Knobs, data: t.TrainWindows, tokens: t.Tokenizer, workers: t.Workers
) -> t.Trainer:
    """A net after all its steps."""
    trainer = t.Trainer(
        t.GPT(cfg, tokens.vocab, tokens.bos), cfg, data, t.Report(cfg), workers, t.Ranks()
    )
    while not trainer.finished():
        trainer.advance()
    return trainer


def main() -> None:
    """A row for each net."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    folder, tokenizer, _ = t.locate_data(settings(steps, 0, "unused"))
    tokens, table = t.load_tokenizer(tokenizer), []
    with tempfile.TemporaryDirectory() as logs, t.make_workers(settings(1, 0, logs)) as workers:
        cfg = settings(steps, 0, logs)
        paths = t.find_shards(folder, "train")
        data = t.TrainWindows(paths, cfg.train_seq_len, cfg.seed, tokens.vocab)
        knows = settings(steps, 0, logs, **WAYS["contexts"])
        packer = t.Packer(data, tokens, knows, cfg.pack_text_bytes, workers)
        packer.start(0.0)
        packer.finish()
        primed = packer.mixer.save()
        for seed in range(seeds):
            for name, env in WAYS.items():
                cfg = settings(steps, seed, logs, **env)
                way = t.TrainWindows(paths, cfg.train_seq_len, seed, tokens.vocab)
                way.foreseen = data.foreseen
                trainer = trained(cfg, way, tokens, workers)
                packer.mixer.restore(primed)
                judge = t.Validation(cfg, trainer.model, tokens, folder, workers)
                packer.mixer.begin(int(judge.text[0]))
                got = judge.run(trainer.average, "standard", cfg.eval_batch_seqs, packer.mixer)
                keys = ("val_bpb", "val_bpb_net", "val_bpb_context", "val_tokens")
                row = {"weights": name, "seed": seed, "steps": trainer.step}
                table.append({**row, **{k: got[k] for k in keys}})
                print(table[-1], flush=True)
        known = np.count_nonzero(data.foreseen) / len(data.foreseen)
    print(f"{known:.3f} of the training text was packed")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
