"""The training step against the same model in PyTorch, eager and compiled, and MLX's own BLAS.

    pip install torch
    python tests/benchmarks/throughput.py [--seconds 5] [--pairs 5] [--device cpu|gpu]

The shape: 4 layers x 256, 4 heads, 2 KV heads, MLP 2x, vocabulary 1,024, features off, 8 sequences
of 512 random tokens a step; float32 on CPUs, bfloat16 on GPUs. Each side lives in a process of its
own and trains when told to, in turns, from the same weights on the same tokens; that both do the
same work is shown by their losses over the first steps, optimizer included. The last line is JSON.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
LAYERS, DIM, HEADS, KV_HEADS, MLP, VOCAB, LENGTH, BATCH = 4, 256, 4, 2, 2, 1024, 512, 8
STEP_TOKENS, CHECKED_STEPS = LENGTH * BATCH, 5
SHAPE = f"""PRESET=cpu NUM_LAYERS={LAYERS} MODEL_DIM={DIM} NUM_HEADS={HEADS} MLP_LEAK=0
    NUM_KV_HEADS={KV_HEADS} MLP_MULT={MLP} TRAIN_SEQ_LEN={LENGTH} TRAIN_BATCH_TOKENS={STEP_TOKENS}
    ENGRAM_LITE_ENABLED=0 BIGRAM_HASH_SIZE=0 USE_SMEARGATE=0 XSA_LAST_N=0 LN_SCALE_ENABLED=0
    COMPLEMENT_ALPHA=0 EMA_DECAY=0 ROPE_DIMS=0 MUON_MOMENTUM_WARMUP_STEPS=0
    MUON_MOMENTUM_WARMUP_START=0.95 MAX_WALLCLOCK_SECONDS=0"""
MATRICES = LAYERS * (2 * DIM * DIM + 2 * DIM * DIM * KV_HEADS // HEADS + 2 * MLP * DIM * DIM)
# Multiply-adds of the matrices and of causal attention's two products, forward and twice backward.
TOKEN_FLOPS = 6 * (MATRICES + VOCAB * DIM) + 6 * LAYERS * DIM * LENGTH


def random_shard(folder: str) -> Path:
    """A training shard of random tokens."""
    tokens = np.random.default_rng(0).integers(3, VOCAB, 1_000_000).astype("<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path = Path(folder) / "random_train_000000.bin"
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return path


class Ours:
    """The script's own trainer."""

    def __init__(self, shard: Path, device: str, **extra: str) -> None:
        os.environ.update(extra)
        sys.path.insert(0, str(ROOT))
        import train_gpt_mlx_kl as t

        pairs = dict(pair.split("=") for pair in SHAPE.split())
        cfg, _ = t.knobs_from_env({**pairs, "DEVICE": device, **extra})
        t.use_device(cfg)
        data = t.TrainWindows([shard], LENGTH, cfg.seed, VOCAB)
        self.t, self.workers = t, t.make_workers(cfg)
        self.trainer = t.Trainer(t.GPT(cfg, VOCAB, 1), cfg, data, self.workers, t.Ranks())
        self.start = {n: np.array(p) for n, p in self.trainer.params.items()}
        self.name = f"MLX {t.mx.__version__}, {self.workers.count} worker(s), BLAS {t.BLAS_NAME}"

    def close(self) -> None:
        """End the workers' threads."""
        self.workers.__exit__()

    def batches(self, count: int) -> list:
        """The tokens of the first steps."""
        return [self.trainer.data.step(i, BATCH) for i in range(count)]

    def step(self) -> float:
        """One step; returns its loss."""
        return float(self.trainer.take_step()["train_loss"])

    def peak_gflops(self) -> float:
        """GFLOP/s of large matrix products, one a worker."""
        return max(self.t.gigaflops(self.workers) for _ in range(5))

    def parts(self) -> dict[str, float]:
        """Seconds that a step spends in each part, from the best of eight."""
        trainer, mx, best = self.trainer, self.t.mx, {}
        tokens = trainer.data.step(0, BATCH)
        weights = np.ones((BATCH, LENGTH), np.float32)
        batches = [tuple(mx.array(a[s]) for a in (tokens[:, :-1], tokens[:, 1:], weights))
                   for s in trainer.microbatches[: self.workers.count]]  # fmt: skip
        hyper = dict.fromkeys(("lr_factor", "momentum", "step", "clip", "average_rate"), 0.5)
        trainer.model.update(self.t.tree_unflatten(list(trainer.params.items())))
        stages = {
            "blocks, forward": lambda: self.workers.map(
                lambda x: trainer.model.head_inputs(x, LENGTH), [b[:1] for b in batches]
            ),
            "head and loss, forward": lambda: self.workers.map(
                trainer.model.nll, [b[:2] for b in batches]
            ),
            "backward": lambda: self.workers.map(
                trainer.add_microbatch[False], [(trainer.params, (), b) for b in batches]
            ),
            "data, sums of gradients": lambda: trainer.gradients(False)[2],
            "optimizers": lambda: trainer.updates(trainer.gradients(False)[2], hyper),
        }  # each does what the one before does, and more
        for _ in range(8):
            for name, stage in stages.items():
                begin = time.perf_counter()
                mx.eval(stage())
                best[name] = min(time.perf_counter() - begin, best.get(name, math.inf))
        whole, before = best["optimizers"], 0.0
        for name, seconds in best.items():
            best[name], before = seconds - before, seconds
        return {**best, "whole": whole}


class Torch:
    """The same model in PyTorch with the kernels that it has for the job, eager or compiled."""

    def __init__(self, start: dict, batches: list, device: str, compiled: bool) -> None:
        import torch

        if device == "gpu":  # TF32, as MLX has it
            torch.set_float32_matmul_precision("high")
        self.torch, self.F = torch, torch.nn.functional
        # Pairs for the rotation: neighbours there, halves of a head here, where that is faster.
        pairs = np.arange(DIM).reshape(HEADS, -1, 2).swapaxes(1, 2).reshape(-1)
        start = {n: a[pairs[: len(a)]] if "c_q" in n or "c_k" in n else a for n, a in start.items()}
        accelerator = "cuda" if torch.cuda.is_available() else "mps"
        self.device = torch.device("cpu" if device == "cpu" else accelerator)
        self.p = {n: torch.tensor(a, device=self.device, requires_grad=True)
                  for n, a in start.items()}  # fmt: skip
        self.batches = [torch.tensor(b, dtype=torch.long, device=self.device) for b in batches]
        self.steps, shapes = 0, {}
        for name, p in self.p.items():
            if name.endswith("weight"):
                shapes.setdefault(p.shape, []).append(p)
        self.stacks = [(same, torch.zeros(len(same), *shape, device=self.device))
                       for shape, same in shapes.items()]  # fmt: skip
        scalars = [p for n, p in self.p.items() if not n.endswith("weight") and n != "tok_emb"]
        groups = [{"params": [self.p["tok_emb"]], "lr": 0.05}, {"params": scalars, "lr": 0.04}]
        self.adam = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
        angle = torch.arange(LENGTH)[:, None] * 10_000 ** (
            -torch.arange(0, 1, 2 / (DIM // HEADS))
        )  # fmt: skip
        self.cos, self.sin = angle.cos().to(self.device), angle.sin().to(self.device)
        self.forward = torch.compile(self.loss) if compiled else self.loss
        self.newton_schulz = torch.compile(self.orthogonal) if compiled else self.orthogonal
        how = "torch.compile" if compiled else "eager"
        threads = f"{torch.get_num_threads()} threads"
        self.name = f"PyTorch {torch.__version__}, {how}, {threads}, {self.device}"

    def rope(self, x):
        """(B, H, T, d) -> the same, rotated by position."""
        a, b = x.chunk(2, dim=-1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return self.torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def norm(self, x):
        """RMS norm over the last axis."""
        return self.F.rms_norm(x, (x.shape[-1],), eps=1e-6)

    def attention(self, x, i: int):
        """(B, T, D) -> (B, T, D)."""
        p, at = self.p, f"blocks.{i}.attn."

        def split(name: str, heads: int):
            y = self.F.linear(x, p[at + name + ".weight"])
            return y.view(BATCH, LENGTH, heads, -1).transpose(1, 2)

        q = self.rope(self.norm(split("c_q", HEADS))) * p[at + "q_gain"][:, None, None]
        k, v = self.rope(self.norm(split("c_k", KV_HEADS))), split("c_v", KV_HEADS)
        y = self.F.scaled_dot_product_attention(
            q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=True
        )
        y = y.transpose(1, 2).reshape(BATCH, LENGTH, DIM)
        return self.F.linear(y, p[at + "proj.weight"])

    def loss(self, tokens):
        """(B, T + 1) -> mean cross-entropy."""
        p, kept, half = self.p, [], LAYERS // 2
        x = x0 = self.norm(self.F.embedding(tokens[:, :-1], p["tok_emb"]))
        for i in range(LAYERS):
            at = f"blocks.{i}."
            if i >= half:
                x = x + p["skips"][i - half] * kept.pop()
            mix = p[at + "resid_mix"]
            x = mix[0] * x + mix[1] * x0
            x = x + p[at + "attn_scale"] * self.attention(self.norm(x), i)
            h = self.F.linear(self.norm(x), p[at + "mlp.fc.weight"]).relu().square()
            x = x + p[at + "mlp_scale"] * self.F.linear(h, p[at + "mlp.proj.weight"])
            if i < half:
                kept.append(x)
        logits = 30 * self.torch.tanh(self.F.linear(self.norm(x), p["tok_emb"]) / 30)
        return self.F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def muon(self) -> None:
        """Nesterov momentum and five Newton-Schulz steps, on stacked matrices."""
        for same, buffer in self.stacks:
            g = self.torch.stack([p.grad for p in same])
            buffer.mul_(0.95).add_(g)
            rows, columns = buffer.shape[1:]
            x = self.newton_schulz(g.add_(buffer, alpha=0.95))
            lr = 0.02 * max(1, rows / columns) ** 0.5
            self.torch._foreach_add_(same, list(x), alpha=-lr)

    def orthogonal(self, g):
        """(n, rows, columns) -> the same with singular values near 1."""
        tall = g.shape[1] > g.shape[2]
        x = g.mT if tall else g
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            s = x @ x.mT
            x = 3.4445 * x + self.torch.baddbmm(s, s, s, beta=-4.775, alpha=2.0315) @ x
        return x.mT if tall else x

    def step(self) -> float:
        """One step; returns its loss."""
        half = self.torch.autocast(
            self.device.type, self.torch.bfloat16, enabled=self.device.type != "cpu"
        )
        with half:
            loss = self.forward(self.batches[self.steps % len(self.batches)])
        loss.backward()
        with self.torch.no_grad():
            self.muon()
        self.adam.step()
        for p in self.p.values():
            p.grad = None
        self.steps += 1
        return float(loss.detach())


def serve(channel, kind: str, args: tuple, extra: dict) -> None:
    """A side's process: make it, take the checked steps, then train for as long as it is told."""
    side = {"ours": Ours, "torch": Torch}[kind](*args, **extra)
    channel.send(side.name)
    for method, *rest in iter(channel.recv, None):
        if method != "rate":
            value = getattr(side, method)
            channel.send(value(*rest) if callable(value) else value)
            continue
        begin, steps = time.perf_counter(), 0
        while steps == 0 or time.perf_counter() - begin < rest[0]:
            side.step()
            steps += 1
        channel.send(steps * STEP_TOKENS / (time.perf_counter() - begin))
    if kind == "ours":
        side.close()


class Side:
    """A side from outside: `side(method, ...)` runs it over there."""

    def __init__(self, kind: str, *args, **extra) -> None:
        context = multiprocessing.get_context("spawn")
        self.channel, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, kind, args, extra), daemon=True)
        self.process.start()
        there.close()
        self.name = self.channel.recv()
        print(self.name, flush=True)

    def __call__(self, *call):
        self.channel.send(call)
        return self.channel.recv()


def show(name: str, values: list[float]) -> list[float]:
    """Print minimum, median and maximum, and return them."""
    low, middle, high = (float(f(values)) for f in (np.min, np.median, np.max))
    print(f"{name:<34} min {low:10.3f}  median {middle:10.3f}  max {high:10.3f}", flush=True)
    return [low, middle, high]


def main() -> None:
    """Check that the sides agree, then time them in turns."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shard = random_shard(folder)
        sys.path.insert(0, str(ROOT))
        ours = Side("ours", shard, args.device)
        one = Side("ours", shard, args.device, WORKERS="1") if args.device == "cpu" else None
        bare = Side("ours", shard, args.device, BLAS="none") if args.device == "cpu" else None
        start = ours("start"), ours("batches", CHECKED_STEPS), args.device
        torch, compiled = (
            Side("torch", *start, compiled=False),
            Side("torch", *start, compiled=True),
        )
    sides = {"ours": ours, "PyTorch": torch, "PyTorch compiled": compiled}
    losses = {name: [side("step") for _ in range(CHECKED_STEPS)] for name, side in sides.items()}
    for name, values in losses.items():
        print(f"losses of the first steps, {name:<16}", *(f"{x:.5f}" for x in values))
        if not np.allclose(values, losses["ours"], rtol=2e-3 if args.device == "cpu" else 2e-2):
            raise SystemExit("they do not do the same work")
    turns = [(ours, args.seconds), (torch, args.seconds), (compiled, args.seconds)]
    turns += [(one, args.seconds), (bare, 0.0)] if one else []
    rates = []
    for pair in range(args.pairs + 1):  # the first warms up; the order alternates
        order = turns[:: 1 if pair % 2 else -1]
        rates.append([side("rate", seconds) for side, seconds in order][:: 1 if pair % 2 else -1])
    rates = np.array(rates[1:])
    mine, peak = rates[:, 0], ours("peak_gflops")
    gflops = mine * TOKEN_FLOPS / 1e9
    result = {
        "tok_s": show("tokens/s, ours", mine),
        "torch_tok_s": show("tokens/s, PyTorch", rates[:, 1]),
        "torch_compile_tok_s": show("tokens/s, torch.compile", rates[:, 2]),
        "ratio_vs_torch": show("ours / PyTorch", mine / rates[:, 1]),
        "ratio_vs_torch_compile": show("ours / torch.compile", mine / rates[:, 2]),
        "gflops": show("GFLOP/s, ours", gflops),
        "sgemm_share": show(f"share of {peak:.0f} GFLOP/s (sgemm)", gflops / peak),
    }
    if one:
        result["ratio_vs_one_worker"] = show("ours / WORKERS=1", mine / rates[:, 3])
        result["ratio_vs_mlx_blas"] = show("ours / BLAS=none", mine / rates[:, 4])
    parts = ours("parts")
    for name, seconds in parts.items():
        print(f"{name:<34} {1000 * seconds:8.1f} ms  {seconds / parts['whole']:6.1%}")
    print(f"{'its products at that sgemm rate':<34} "
          f"{1000 * STEP_TOKENS * TOKEN_FLOPS / peak / 1e9:8.1f} ms")  # fmt: skip
    for side in filter(None, (ours, one, bare, torch, compiled)):
        side.channel.send(None)
        side.process.join()
    print(json.dumps({"benchmark": "throughput", "device": args.device, "peak_gflops": peak,
                      "parts_s": parts, **result}))  # fmt: skip


if __name__ == "__main__":
    main()
