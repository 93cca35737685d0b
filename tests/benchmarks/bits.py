"""What a run's net is worth at 4 to 8 bits, alone and mixed, and how many bytes it takes.

    DATA_PATH=... TOKENIZER_PATH=... python tests/benchmarks/bits.py logs/RUN [--tokens 100000]

The run's averaged float weights are quantised at each WEIGHT_BITS, token embedding and engram.proj
as the run has them, and score the validation text's first tokens with the run's context models,
which start anew from the run's packed text each time, after a rehearsal with the artifact's net.
The last row is of the float weights themselves. The last line is JSON.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_gpt_mlx_kl as t


def stored(params: t.Arrays, cfg: t.Knobs) -> tuple[t.Arrays, int]:
    """(the parameters as an artifact gives them back, bytes that their tensors take in it)."""
    rows, blobs = t.pack_tensors(params, t.group_parameters(list(params)), cfg)
    raw = b"".join(blobs)
    return t.unpack_tensors(rows, raw), len(t.compress(raw)[0])


def main() -> None:
    """A row for each number of bits, and one for float32."""
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
    for name, array in stored(params, cfg)[0].items():
        assert np.array_equal(array, artifact.params[name]), f"{name}: another run's weights"
    table = []
    with t.make_workers(cfg) as workers:
        scoring = t.Scoring.load(cfg, path, folder, workers, artifact)
        mixer = scoring.prime()
        primed, known = mixer.save(), scoring.text.tokens.astype(np.int64)
        for bits in (4, 5, 6, 7, 8, None):
            net, size = params, None
            if bits:
                net, size = stored(params, dataclasses.replace(cfg, weight_bits=bits))
            scoring.model.load_weights(list(net.items()))
            t.mx.eval(scoring.model.parameters())
            mixer.restore(primed)
            mixer.begin(int(known[0]))
            show = t.show_progress(f"{bits or 'no'} bits")
            with contextlib.closing(t.ahead(scoring.rows(cfg.eval_mode, known))) as rows:
                costs = t.cost_tokens(rows, known, mixer)
                score = t.total_score(costs, scoring.text, artifact.tokenizer, show)
            table.append({"bits": bits, "tensor_bytes": size, **score})
            print(table[-1], flush=True)
    print(json.dumps({"benchmark": "bits", "run": args.run.name, "rows": table}))


if __name__ == "__main__":
    main()
