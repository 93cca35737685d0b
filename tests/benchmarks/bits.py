"""What a run's net is worth at 4 to 8 bits, alone and mixed, and how many bytes it takes.

    DATA_PATH=... TOKENIZER_PATH=... python tests/benchmarks/bits.py logs/RUN [--tokens 100000]

The run's averaged float weights are quantised at each width, token embedding and engram.proj as
the run has them, and score the validation text's first tokens with the run's context models, which
start anew from the run's packed text each time. The last line is JSON.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_mlx_kl as t


def main() -> None:
    """A row for each number of bits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000)
    args = parser.parse_args()
    path = args.run / "artifact.bin"
    artifact = t.read_artifact(path)
    env = {**os.environ, "VAL_MAX_TOKENS": str(args.tokens)}
    cfg, _ = t.knobs_from_env(env, kept=artifact.header["knobs"])
    t.use_device(cfg)
    folder, _, _ = t.locate_data(cfg)
    weights = t.mx.load(str(args.run / "model.safetensors"))
    params = {name: weights[name] for name in artifact.params}
    groups, rows = t.group_parameters(list(params)), []
    with t.make_workers(cfg) as workers:
        scoring = t.Scoring.load(cfg, path, folder, workers, artifact)
        mixer = scoring.prime()
        primed = mixer.save()
        for bits in (4, 5, 6, 7, 8, 0):
            stored = params
            if bits:
                of_bits = dataclasses.replace(cfg, weight_bits=bits)
                tensors, blobs = t.pack_tensors(params, groups, of_bits)
                stored = t.unpack_tensors(tensors, raw := b"".join(blobs))
            scoring.model.load_weights(list(stored.items()))
            t.mx.eval(scoring.model.parameters())
            mixer.restore(primed)
            mixer.begin(int(scoring.text.tokens[0]))
            known = scoring.text.tokens.astype("int64")
            costs = t.cost_tokens(scoring.rows(cfg.eval_mode, known), known, mixer)
            show = t.show_progress(f"{bits} bits")
            score = t.total_score(costs, scoring.text, artifact.tokenizer, show)
            size = len(t.compress(raw)[0]) if bits else 0
            rows.append({"bits": bits or "float32", "net_bytes": size, **score})
            print(rows[-1], flush=True)
    print(json.dumps({"benchmark": "bits", "run": args.run.name, "rows": rows}))


if __name__ == "__main__":
    main()
