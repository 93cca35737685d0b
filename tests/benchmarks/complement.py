"""What complementary training buys: loss weights from counts of pairs against none.

    DATA_PATH=... TOKENIZER_PATH=... python tests/benchmarks/complement.py [STEPS [SEEDS]]

The mixer reads the whole training text once, as packing does. Then a net is trained for the same
steps with and without weights, for each seed, and scores the validation text (the first
VAL_MAX_TOKENS) with that primed mixer. The last line is JSON.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_mlx_kl as t

ALPHAS = {"none": "0", "pairs": "0.5"}


def settings(steps: int, seed: int, alpha: str = "0") -> t.Knobs:
    """The cpu preset with a number of steps in place of a clock."""
    fixed = {"PRESET": "cpu", "ITERATIONS": str(steps), "MAX_WALLCLOCK_SECONDS": "0",
             "WARMDOWN_ITERS": str(steps // 2), "SEED": str(seed), "PACK_TEXT_BYTES": "16000000",
             "COMPLEMENT_ALPHA": alpha}  # fmt: skip
    return t.knobs_from_env({"VAL_MAX_TOKENS": "200000", **os.environ, **fixed})[0]


def trained(
    cfg: t.Knobs, data: t.TrainWindows, tokenizer: t.Tokenizer, workers: t.Workers
) -> t.Trainer:
    """A net after all its steps."""
    model = t.GPT(cfg, tokenizer.vocab, tokenizer.bos)
    trainer = t.Trainer(model, cfg, data, workers, t.Ranks())
    while not trainer.finished():
        trainer.take_step()
    return trainer


def score(
    trainer: t.Trainer, text: t.ValidationText, tokenizer: t.Tokenizer, mixer: t.LogisticMixer
) -> dict:
    """The averaged weights' score with a primed mixer, at stride = window."""
    cfg, model = trainer.cfg, trainer.model
    t.mx.eval(trainer.average)  # here, as another thread takes the net's rows
    model.update(t.tree_unflatten(list(trainer.average.items())))
    mixer.begin(int(text.tokens[0]))
    shape = (*t.eval_shape(cfg, "standard"), cfg.eval_batch_seqs)
    rows = t.ahead(t.net_rows(model, text.tokens, shape, trainer.workers))
    costs = t.cost_tokens(rows, text.tokens, mixer)
    result = t.total_score(costs, text, tokenizer, t.show_progress("eval"))
    return {name: result[name] for name in ("val_bpb", "val_bpb_net", "val_bpb_context")}


def main() -> None:
    """A row for each net."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    cfg = settings(steps, 0)
    folder, tokenizer_path, _ = t.locate_data(cfg)
    tokenizer, paths = t.load_tokenizer(tokenizer_path), t.find_shards(folder, "train")
    text = t.load_validation(folder, tokenizer, cfg.val_max_tokens)
    rows = []
    with t.make_workers(cfg) as workers:
        data = t.TrainWindows(paths, cfg.train_seq_len, 0, tokenizer.vocab)
        packer = t.Packer(data, tokenizer, cfg, cfg.pack_text_bytes, workers)
        packer.start(0.0)
        packed = packer.finish()
        capacity = packed.token_count + len(text.tokens)
        mixer = t.LogisticMixer(
            tokenizer, packed.leaves[0], capacity, cfg.mixer_memory_mb, cfg.mixer_size
        )
        t.unpack(mixer, packed, "priming")
        primed = mixer.save()
        for seed in range(seeds):
            for name, alpha in ALPHAS.items():
                data = t.TrainWindows(paths, cfg.train_seq_len, seed, tokenizer.vocab)
                trainer = trained(settings(steps, seed, alpha), data, tokenizer, workers)
                mixer.restore(primed)
                figures = score(trainer, text, tokenizer, mixer)
                rows.append({"weights": name, "seed": seed, "steps": steps, **figures})
                print(rows[-1], flush=True)
    print(f"{packed.token_count / data.tokens:.3f} of the training text was packed")
    print(json.dumps({"benchmark": "complement", "rows": rows}))


if __name__ == "__main__":
    main()
