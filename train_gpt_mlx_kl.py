#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "mlx>=0.32; sys_platform == 'darwin' and platform_machine == 'arm64'",
#   "mlx[cpu]>=0.32; sys_platform == 'linux'",
#   "scipy-openblas32>=0.3.29; sys_platform == 'linux'",
#   "numpy>=1.26", "sentencepiece>=0.2", "brotli>=1.1", "zstandard>=0.22", "tqdm>=4.66",
# ]
# ///
"""Train a small GPT with MLX, squeeze script + model into 16,000,000 bytes, and score the file.

    python train_gpt_mlx_kl.py                        the whole chain on text that Python carries
    DATA_PATH=... TOKENIZER_PATH=... python train_gpt_mlx_kl.py         the public FineWeb layout
    EVAL_ONLY=logs/RUN/artifact.bin DATA_PATH=... python train_gpt_mlx_kl.py     score a file alone

Everything is set by environment variables; `--help` lists them. The file reads top to bottom in
the order in which data flows:

    KNOBS             every setting, its default, its bounds and its help, in one table
    BLAS              on Linux CPUs: a fast matrix product, loaded before MLX
    DATA              tokenizer facts, shards, shuffled training windows, bigram counts
    CONTEXT FEATURES  the tokens before a position, cut at the document's start, and their hashes
    CPU KERNELS       attention and cross-entropy for a machine whose exp() is slow
    MODEL             GPT with EngramLite / BigramHash / SkipGram added to its logits
    OPTIMIZERS        a table of parameter groups; Muon and Adam
    TRAINING          one progress, one step function, averaging, checkpoints
    ARTIFACT          quantiser, file format, size rules
    EVALUATION        each position scored exactly once; nats per token, bits per byte
    REPORT            train.log, metrics.jsonl, the lines that parsers look for
    MAIN              the chain
"""

from __future__ import annotations

import ctypes
import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import lzma
import math
import operator
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

# ==================================================================================================
# KNOBS: every setting is an environment variable with the upper-case name of its field
# ==================================================================================================

ARTIFACT_LIMIT_BYTES = 16_000_000


class UserError(Exception):
    """A mistake in the user's input: printed as lines, without a traceback; exit status 2."""

    status = 2


class RunFailed(UserError):
    """A run that cannot go on, explained in a line."""

    status = 1


def knob(default: Any, help: str, lo=0, hi=1e18, choices=(), alias="") -> Any:
    """One row of the table; `alias` is an older public name."""
    meta = {"help": help, "lo": lo, "hi": hi, "choices": choices, "alias": alias}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True)
class Knobs:
    """The settings of a run. Defaults are the public stack's; PRESET changes some (see PRESETS)."""

    preset: str = knob(
        "auto",
        "settings for what the environment leaves unset; auto: cpu on a CPU, else mac",
        choices=("auto", "cpu", "mac", "h100", "baseline"),
    )
    run_id: str = knob("", "name of the run's folder; empty: the date, the time and the seed")
    out_dir: str = knob("logs", "folder that holds the runs' folders")
    seed: int = knob(1337, "seed of weights and data order", hi=2**31 - 1)
    eval_only: str = knob("", "path of an artifact: score it, train nothing")
    resume: bool = knob(False, "go on from OUT_DIR/RUN_ID/checkpoint")
    checkpoint_every: int = knob(0, "steps between checkpoints; 0: when a run is cut short")
    device: str = knob("auto", "where MLX computes", choices=("auto", "cpu", "gpu"))
    compute_dtype: str = knob(
        "auto",
        "dtype of the forward pass; auto: float32 on CPUs, bfloat16 on GPUs (weights: float32)",
        choices=("auto", "float32", "bfloat16"),
    )
    blas: str = knob("auto", "Linux CPUs: path of an OpenBLAS, `auto`, or `none` for MLX's own")
    workers: int = knob(0, "CPU streams that share a step; 0: one a core", hi=256)

    data_path: str = knob("", "folder of *_train_*.bin and *_val_*.bin; empty: FineWeb or stdlib")
    tokenizer_path: str = knob("", "SentencePiece .model file; empty: the one that fits DATA_PATH")
    vocab_size: int = knob(0, "must equal the tokenizer's; 0: take the tokenizer's", hi=65536)

    iterations: int = knob(20_000, "steps at most; 0: no limit")
    max_wallclock_seconds: float = knob(600.0, "seconds of training at most; 0: no limit")
    train_batch_tokens: int = knob(524_288, "tokens a step", lo=1)
    grad_accum_steps: int = knob(8, "rounds of a microbatch a worker a step, at least", lo=1)
    train_seq_len: int = knob(1024, "tokens a training window", lo=2, alias="TRAIN_MAX_SEQ_LEN")
    mlx_max_microbatch_tokens: int = knob(
        8192, "tokens a microbatch at most (memory a worker)", lo=1
    )
    mlx_eager_eval: bool = knob(True, "evaluate after every microbatch: less memory")
    warmup_steps: int = knob(20, "steps run and thrown away before the clock starts")
    warmdown_iters: int = knob(3500, "last steps, over which the learning rate falls to 0")
    train_log_every: int = knob(200, "steps between train lines; 0: none")
    complement_alpha: float = knob(0.5, "loss weight 1 - a * P_bigram(target); 0: off", hi=1)

    num_layers: int = knob(11, "transformer blocks", lo=1, hi=96)
    model_dim: int = knob(512, "width D", lo=8, hi=8192)
    num_heads: int = knob(8, "query heads H", lo=1)
    num_kv_heads: int = knob(4, "key/value heads Hkv", lo=1)
    mlp_mult: int = knob(3, "hidden width of the MLP / D", lo=1, hi=16)
    mlp_leak: float = knob(0.5, "slope below 0 before squaring; 0: relu squared", hi=1)
    tied_embed_init_std: float = knob(0.005, "std of the token embedding at start")
    logit_softcap: float = knob(30.0, "logits are cap * tanh(logits / cap)", lo=1, hi=40)
    logit_chunk_tokens: int = knob(0, "tokens a piece of the vocabulary head; 0: all")
    rope_base: float = knob(10_000.0, "RoPE base", lo=1)
    rope_dims: int = knob(16, "head dimensions that rotate; 0: all")
    qk_gain_init: float = knob(1.5, "factor on the normalised queries at start", hi=10)
    xsa_last_n: int = knob(4, "last blocks whose attention drops its own value's direction")
    ln_scale_enabled: bool = knob(True, "block i's norms times 1/sqrt(i + 1)", alias="USE_LN_SCALE")
    use_ortho_init: bool = knob(True, "orthogonal block matrices at start")
    use_smeargate: bool = knob(True, "embeddings blend with the one before", alias="SMEAR_ENABLED")

    engram_lite_enabled: bool = knob(True, "EngramLite; 0: BigramHash instead")
    engram_hash_size: int = knob(8192, "rows a table; 0: off", hi=65536)
    engram_embed_dim: int = knob(256, "columns a table", lo=1, hi=4096)
    engram_n_heads: int = knob(2, "tables an order", lo=1, hi=16)
    bigram_hash_size: int = knob(4096, "rows of BigramHash's table; 0: off", hi=65536)
    skipgram_hash_size: int = knob(0, "rows of SkipGram's table; 0: off", hi=65536)

    tied_embed_lr: float = knob(0.05, "Adam: token embedding", hi=1e30)
    matrix_lr: float = knob(0.04, "Muon: block matrices", hi=1e30)
    scalar_lr: float = knob(0.04, "Adam: gains, gates, scales", hi=1e30)
    hash_lr: float = knob(0.05, "Adam: hash tables", hi=1e30)
    hash_proj_lr: float = knob(
        0.01, "Adam: EngramLite's projection to the vocabulary", lo=0, hi=100
    )
    beta1: float = knob(0.9, "Adam: decay of the first moment", hi=0.9999)
    beta2: float = knob(0.95, "Adam: decay of the second moment", hi=0.99999)
    adam_eps: float = knob(1e-8, "Adam: epsilon", lo=1e-20, hi=1)
    muon_momentum: float = knob(0.95, "Muon: momentum", hi=0.9999)
    muon_backend_steps: int = knob(5, "Muon: Newton-Schulz steps", lo=1, hi=20)
    muon_momentum_warmup_start: float = knob(0.85, "Muon: momentum at step 0", hi=0.9999)
    muon_momentum_warmup_steps: int = knob(500, "Muon: steps until the full momentum")
    muon_weight_decay: float = knob(0.0, "Muon: decoupled decay, times the learning rate")
    adam_weight_decay: float = knob(0.0, "Adam: the same for embeddings and tables")
    grad_clip_norm: float = knob(0.0, "largest norm of a step's gradient; 0: any")

    ema_decay: float = knob(0.997, "EMA of the weights, a step; 0: none", hi=0.99999)
    ema_start_frac: float = knob(0.5, "progress at which averaging starts", hi=1)
    use_swa: bool = knob(False, "the plain mean from EMA_START_FRAC on, in EMA's place")

    weight_bits: int = knob(6, "bits of block matrices and hash tables", lo=4, hi=8)
    embed_bits: int = knob(8, "bits of the token embedding", lo=4, hi=8)
    use_gptq_lite: bool = knob(True, "search each row's clip for the least squared error")
    late_qat_threshold: float = knob(0.0, "train quantised below this LR factor", hi=1)

    val_loss_every: int = knob(0, "steps between validations while training; 0: none")
    val_batch_size: int = knob(16_384, "tokens a batch of those validations", lo=1)
    val_max_tokens: int = knob(0, "score up to the last document's end in these; 0: all")
    eval_mode: str = knob("sliding", "the final score", choices=("standard", "sliding", "both"))
    eval_seq_len: int = knob(0, "tokens a window; 0: TRAIN_SEQ_LEN")
    eval_stride: int = knob(64, "tokens a sliding window advances, at most", lo=1)
    eval_batch_seqs: int = knob(16, "windows a batch", lo=1)


GROUP_TITLES = {
    "preset": "Run", "data_path": "Data", "iterations": "Training", "num_layers": "Model",
    "engram_lite_enabled": "Hashed contexts", "tied_embed_lr": "Optimizers",
    "ema_decay": "Averaging", "weight_bits": "Artifact", "val_loss_every": "Evaluation",
}  # fmt: skip

PRESETS = {
    "cpu": """ITERATIONS=1000000 MAX_WALLCLOCK_SECONDS=110 TRAIN_BATCH_TOKENS=2048
        GRAD_ACCUM_STEPS=1 TRAIN_SEQ_LEN=256 WARMUP_STEPS=1 WARMDOWN_ITERS=400 TRAIN_LOG_EVERY=50
        NUM_LAYERS=4 MODEL_DIM=192 NUM_HEADS=3 NUM_KV_HEADS=1 MLP_MULT=2 XSA_LAST_N=0
        ENGRAM_EMBED_DIM=64 MATRIX_LR=0.02 HASH_LR=0.15 MUON_MOMENTUM_WARMUP_STEPS=200
        EMA_DECAY=0.98 WEIGHT_BITS=8 EVAL_STRIDE=128""",
    "mac": """TRAIN_BATCH_TOKENS=32768 GRAD_ACCUM_STEPS=1 NUM_LAYERS=9 MLP_MULT=2
        ENGRAM_HASH_SIZE=4096 ENGRAM_EMBED_DIM=128 WARMUP_STEPS=2 WARMDOWN_ITERS=300
        MUON_MOMENTUM_WARMUP_STEPS=200 EMA_DECAY=0.98 TRAIN_LOG_EVERY=20
        EVAL_STRIDE=512
        VAL_MAX_TOKENS=4194304""",
    "h100": "NUM_LAYERS=10 MLP_MULT=2 ENGRAM_EMBED_DIM=64",
    "baseline": """NUM_LAYERS=9 MLP_MULT=2 MLP_LEAK=0 ROPE_DIMS=0 XSA_LAST_N=0 LN_SCALE_ENABLED=0
        USE_ORTHO_INIT=0 USE_SMEARGATE=0 ENGRAM_LITE_ENABLED=0 BIGRAM_HASH_SIZE=0
        COMPLEMENT_ALPHA=0 WARMDOWN_ITERS=1200 EMA_DECAY=0 WEIGHT_BITS=7 EVAL_MODE=standard""",
}

REMOVED = (
    ("TTT_", "test-time training is not part of this script"),
    ("SWA_", "SWA is the plain mean from EMA_START_FRAC on: use USE_SWA=1 and EMA_START_FRAC"),
    ("TIE_EMBEDDINGS", "embeddings are always tied"),
    ("CONTROL_TENSOR_NAME_PATTERNS", "the GROUPS table in the script says what is quantised"),
    ("INT8_KEEP_FLOAT", "WEIGHT_BITS and EMBED_BITS set the precision"),
)


def parse_value(kind: type, meta: dict[str, Any], text: str) -> Any:
    """Text of an environment variable -> value; ValueError says what would be right."""
    if kind is bool:
        if text not in ("0", "1"):
            raise ValueError("must be 0 or 1")
        return text == "1"
    if kind is str:
        if meta["choices"] and text not in meta["choices"]:
            raise ValueError("must be one of " + ", ".join(meta["choices"]))
        return text
    try:
        value = kind(text)
    except ValueError:
        raise ValueError("must be a whole number" if kind is int else "must be a number") from None
    if not meta["lo"] <= value <= meta["hi"]:  # also false for nan
        raise ValueError(f"must be from {meta['lo']} to {meta['hi']}")
    return value


def guess_device(choice: str) -> str:
    """'cpu' or 'gpu', without loading MLX: Metal on Apple Silicon, CUDA where its wheel is."""
    if choice != "auto":
        return choice
    if sys.platform == "darwin":
        return "gpu" if platform.machine() == "arm64" else "cpu"
    names = (d.metadata["Name"] or "" for d in importlib.metadata.distributions())
    return "gpu" if any(name.lower().startswith("mlx-cuda") for name in names) else "cpu"


def preset_values(preset: str) -> dict[str, Any]:
    """Field values that a preset sets; its text is written as a user would set them."""
    kinds, rows = get_type_hints(Knobs), {f.name: f.metadata for f in dataclasses.fields(Knobs)}
    pairs = (pair.partition("=") for pair in PRESETS[preset].split())
    return {n.lower(): parse_value(kinds[n.lower()], rows[n.lower()], v) for n, _, v in pairs}


def knobs_from_env(
    env: dict[str, str], base: dict[str, Any] | None = None
) -> tuple[Knobs, list[str]]:
    """Environment -> (knobs, warnings). Raises UserError with every problem, a line each.

    `base` takes the preset's place: the settings of an artifact.
    """
    kinds, given, problems, warnings = get_type_hints(Knobs), {}, [], []
    names = {}
    for field in dataclasses.fields(Knobs):
        meta, name = field.metadata, field.name.upper()
        names |= {name: field} | ({meta["alias"]: field} if meta["alias"] else {})
        for source in (meta["alias"], name):
            if source and env.get(source, "") != "":
                try:
                    given[field.name] = parse_value(kinds[field.name], meta, env[source])
                except ValueError as error:
                    problems.append(f"{source}={env[source]}: {error}")
    for name in sorted(set(env) - set(names)):
        for prefix, why in REMOVED:
            if name.startswith(prefix):
                problems.append(f"{name}: not a setting here: {why}; unset it")
        if name.startswith("NGRAM_"):
            warnings.append(f"{name} has no effect: this version scores the net alone")
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.88)
        if near:
            warnings.append(f"{name} is not a setting; did you mean {near[0]}?")
    preset = given.pop("preset", "auto")
    if preset == "auto":
        preset = "cpu" if guess_device(given.get("device", "auto")) == "cpu" else "mac"
    cfg = Knobs(**{"preset": preset, **(base or preset_values(preset)), **given})
    problems += check_together(cfg)
    if problems:
        raise UserError("\n".join(problems))
    return cfg, warnings


def check_together(cfg: Knobs) -> list[str]:
    """Problems that only several knobs together have."""
    head = cfg.model_dim // cfg.num_heads
    rules = {
        f"MODEL_DIM={cfg.model_dim} must be an even multiple of NUM_HEADS={cfg.num_heads}":
            cfg.model_dim % (2 * cfg.num_heads) == 0,
        f"NUM_HEADS={cfg.num_heads} must be a multiple of NUM_KV_HEADS={cfg.num_kv_heads}":
            cfg.num_heads % cfg.num_kv_heads == 0,
        f"ROPE_DIMS={cfg.rope_dims} must be even, at most MODEL_DIM / NUM_HEADS = {head}":
            cfg.rope_dims % 2 == 0 and cfg.rope_dims <= head,
        f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} holds no window of TRAIN_SEQ_LEN="
        f"{cfg.train_seq_len}: raise the first or lower the second":
            cfg.train_batch_tokens >= cfg.train_seq_len,
        "ITERATIONS=0 and MAX_WALLCLOCK_SECONDS=0 together never stop: set one":
            cfg.iterations > 0 or cfg.max_wallclock_seconds > 0,
        f"RUN_ID={cfg.run_id}: use letters, digits and . _ + = - only":
            not cfg.run_id or re.fullmatch(r"\w[\w.+=-]*", cfg.run_id) is not None,
        "RESUME=1 needs RUN_ID: which run should go on?": bool(cfg.run_id) or not cfg.resume,
    }  # fmt: skip
    return [problem for problem, holds in rules.items() if not holds]


def eval_length(cfg: Knobs) -> int:
    """Tokens a window at evaluation."""
    return cfg.eval_seq_len or cfg.train_seq_len


def knob_rows() -> Iterator[tuple[str, str, str, str]]:
    """(title of a group or '', NAME, default; presets that differ, help) for help and README."""

    def show(value: Any) -> str:
        return str(int(value) if isinstance(value, bool) else value) or "empty"

    presets = {name: preset_values(name) for name in PRESETS}
    for field in dataclasses.fields(Knobs):
        name, meta = field.name, field.metadata
        differ = [f"{p} {show(values[name])}" for p, values in presets.items() if name in values]
        help = meta["help"] + (f" ({', '.join(meta['choices'])})" if meta["choices"] else "")
        help += f" [alias {meta['alias']}]" if meta["alias"] else ""
        default = "; ".join([show(field.default), *differ])
        yield GROUP_TITLES.get(name, ""), name.upper(), default, help


def help_text() -> str:
    """The text of `--help`."""
    lines = [__doc__.split("\n\n")[0], "", "usage: [NAME=value ...] python train_gpt_mlx_kl.py"]
    for group, name, default, help in knob_rows():
        lines += ["", group] if group else []
        lines.append(f"  {name:<28} {help} [{default}]")
    return "\n".join(lines)


def knob_markdown() -> str:
    """The README's table of knobs."""
    lines, head = (
        [],
        ["", "| knob | default; presets that differ | meaning |", "| --- | --- | --- |"],
    )
    for group, name, default, help in knob_rows():
        lines += ["", f"**{group}**", *head] if group else []
        lines.append(f"| `{name}` | {default} | {help} |")
    return "\n".join(lines).strip() + "\n"


def exit_with(error: UserError) -> NoReturn:
    """Print a user's mistake, a line each, and end with its status."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    raise SystemExit(error.status)


def knobs_or_exit(argv: list[str], env: dict[str, str]) -> tuple[Knobs, list[str]]:
    """Handle `--help` and bad settings before anything heavy is loaded."""
    if set(argv) & {"-h", "--help"}:
        print(help_text())
        raise SystemExit(0)
    try:
        if argv:
            raise UserError(f"{argv[0]}: settings are environment variables; see --help")
        return knobs_from_env(env)
    except UserError as error:
        exit_with(error)


if __name__ == "__main__":
    CFG, CFG_WARNINGS = knobs_or_exit(sys.argv[1:], dict(os.environ))

# ==================================================================================================
# BLAS: MLX's Linux CPU wheel carries a reference BLAS, 20 to 70 times slower than OpenBLAS
# ==================================================================================================

OPENBLAS_COMMAND = "pip install scipy-openblas32"


def keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks: returning each to the system costs a page fault a 4 KB.

    Measured on two x86-64 cores: element-wise chains run 3 times faster, two streams of them 6.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        mallopt(-8, 1)  # M_ARENA_MAX: threads share one heap, which never shrinks


def blas_candidates(choice: str) -> Iterator[tuple[str, str]]:
    """(library, symbol prefix) to try: the knob's path, else the pip package, else the system's."""
    if choice not in ("auto", ""):
        yield choice, ""
        yield choice, "scipy_"
        return
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / "lib"
        for path in sorted(folder.glob("libscipy_openblas*.so*")):
            yield str(path), "scipy_"
    for name in ("libopenblas.so.0", "libopenblas.so"):
        yield name, ""


def open_blas(choice: str) -> dict[str, Any]:
    """Open the first usable OpenBLAS; {} if there is none. Runs before MLX is imported."""
    for path, prefix in blas_candidates(choice) if sys.platform == "linux" else ():
        try:
            library = ctypes.CDLL(path)
            functions = {n: getattr(library, prefix + n) for n in ("cblas_sgemm", "cblas_dgemm")}
            set_threads = getattr(library, prefix + "openblas_set_num_threads")
        except (OSError, AttributeError):
            continue
        addresses = {n: ctypes.cast(f, ctypes.c_void_p).value for n, f in functions.items()}
        return {"path": path, "addresses": addresses, "set_threads": set_threads}
    return {}


def patch_imports(module: Path, addresses: dict[str, int]) -> int:
    """Point a loaded ELF64 library's imported functions elsewhere; returns how many were found.

    An imported function is called through a slot that the dynamic linker fills; the library's
    relocation records (`Elf64_Rela`) say which slot belongs to which name. Writing the slots needs
    no compiler and works whatever prefix the other library puts before its names.
    """
    raw = module.read_bytes()
    table, size, count = *struct.unpack_from("<Q", raw, 40), *struct.unpack_from("<HH", raw, 58)
    # A section header's words: 1 type, 4 offset, 5 size, 6 the section it refers to.
    sections = [struct.unpack_from("<IIQQQQIIQQ", raw, table + i * size) for i in range(count)]
    with open("/proc/self/maps") as maps:
        base = next((int(line.split("-")[0], 16) for line in maps if str(module) in line), 0)
    page, libc, done = os.sysconf("SC_PAGESIZE"), ctypes.CDLL(None), 0
    for section in (s for s in sections if s[1] == 4):  # SHT_RELA
        symbols, strings = sections[section[6]], sections[sections[section[6]][6]]
        records = np.frombuffer(raw, "<u8", section[5] // 8, section[4]).reshape(-1, 3)
        for slot, info, _ in records[records[:, 1] >> 32 > 0].tolist():
            (name_at,) = struct.unpack_from("<I", raw, symbols[4] + 24 * (info >> 32))
            start = strings[4] + name_at
            address = addresses.get(raw[start : raw.index(b"\0", start)].decode())
            if not (address and base):
                continue
            if libc.mprotect(ctypes.c_void_p((base + slot) & -page), page, 3) == 0:  # read, write
                ctypes.c_uint64.from_address(base + slot).value = address
                done += 1
    return done


def use_blas(blas: dict[str, Any]) -> str:
    """Make MLX call the opened BLAS; returns its name, or what its lack costs."""
    if sys.platform != "linux":
        return "Accelerate" if sys.platform == "darwin" else "MLX's own"
    module = Path(mx.__file__).resolve().parent / "lib" / "libmlx.so"
    if (
        blas
        and module.is_file()
        and patch_imports(module, blas["addresses"]) >= len(blas["addresses"])
    ):
        return blas["path"]
    return f"MLX's own (matrix products are about 20 to 70 times slower: {OPENBLAS_COMMAND})"


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if sys.platform == "linux":
    keep_freed_memory()
BLAS = open_blas(os.environ.get("BLAS") or "auto")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

BLAS_NAME = use_blas(BLAS)

# ==================================================================================================
# DATA: tokenizer facts, shards, shuffled training windows, bigram counts
# ==================================================================================================

HERE = Path(__file__).resolve().parent
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256


@dataclass(frozen=True)
class Tokens:
    """What scoring needs to know of a tokenizer: it is all that an artifact keeps of it.

    piece_bytes (V,) uint16: UTF-8 bytes of each piece, every U+2581 counted as one space byte
    leading (V,) bool: the piece starts with U+2581
    control (V,) bool: control, unknown or unused: no bytes, and no space after it is decoded
    """

    piece_bytes: Any
    leading: Any
    control: Any
    bos: int
    dummy_prefix: bool
    sha256: str

    @property
    def vocab(self) -> int:
        return len(self.piece_bytes)

    def bytes_of(self, previous: Any, current: Any) -> Any:
        """UTF-8 bytes that each token adds to the decoded text. (n,), (n,) ids -> (n,) int64.

        A dummy prefix is a leading space that encoding puts before a document and decoding
        takes away: it is no byte of the text where the piece follows a control token.
        """
        count = self.piece_bytes[current].astype(np.int64)
        if self.dummy_prefix:
            count -= self.leading[current] & self.control[previous]
        return count


def load_tokenizer(path: Path) -> Tokens:
    """Read a SentencePiece .model file. Raises UserError if it is none."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"TOKENIZER_PATH={path}: no SentencePiece model ({error})") from None
    n = model.vocab_size()
    pieces = [model.id_to_piece(i) for i in range(n)]
    control = np.array(
        [model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in range(n)]
    )
    size = [
        0 if control[i] else 1 if model.is_byte(i) else len(p.replace("\u2581", " ").encode())
        for i, p in enumerate(pieces)
    ]
    leading = np.array([p.startswith("\u2581") for p in pieces]) & ~control
    dummy = "".join(model.encode("a", out_type=str)) == "\u2581a"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Tokens(np.array(size, np.uint16), leading, control, model.bos_id(), dummy, digest)


def open_shard(path: Path) -> Any:
    """Memory-map a shard's tokens, (n,) uint16. Raises UserError naming the file."""
    header_bytes = SHARD_HEADER_INTS * 4
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if header.size < SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path}: not a token shard (wrong header): make it with data/prepare.py")
    need, have = header_bytes + 2 * int(header[2]), path.stat().st_size
    if need != have:
        raise UserError(
            f"{path}: {have} bytes, but its header says {need}: cut short? Make it anew"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=header_bytes, shape=(int(header[2]),))


def check_ids(tokens: Any, vocab: int, name: object) -> Any:
    """Tokens as int32, after checking that each is below the vocabulary's size."""
    top = int(tokens.max(initial=0))
    if top >= vocab:
        raise UserError(f"{name}: token {top}, but the vocabulary has {vocab}: another tokenizer's")
    return tokens.astype(np.int32)


def find_shards(folder: Path, split: str) -> list[Path]:
    """Sorted shards of a split. Raises UserError if there are none."""
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    if not paths:
        raise UserError(f"DATA_PATH={folder}: holds no *_{split}_*.bin: see data/prepare.py")
    return paths


def locate_data(cfg: Knobs) -> tuple[Path, Path | None, str]:
    """(folder of shards, tokenizer or None for EVAL_ONLY, a line that says what was chosen)."""
    root = HERE / "data" / "datasets"
    fineweb, stdlib = root / "fineweb10B_sp1024", root / "stdlib_sp1024"
    if cfg.data_path:
        folder, line = Path(cfg.data_path), "data"
    elif list(fineweb.glob("*_val_*.bin")) and (cfg.eval_only or list(fineweb.glob("*_train_*"))):
        folder, line = fineweb, "data: FineWeb"
    else:
        folder, line = stdlib, "data: text that Python carries (set DATA_PATH for another)"
        if not list(stdlib.glob("*_val_*.bin")):
            make_stdlib()
    if not folder.is_dir():
        raise UserError(f"DATA_PATH={folder}: no such folder")
    line += f", {folder}"
    if cfg.eval_only:
        return folder, None, line
    tokenizer = Path(cfg.tokenizer_path) if cfg.tokenizer_path else tokenizer_beside(folder)
    if not tokenizer.is_file():
        raise UserError(f"TOKENIZER_PATH={tokenizer}: no such file")
    return folder, tokenizer, f"{line}; tokenizer {tokenizer}"


def make_stdlib() -> None:
    """Run data/prepare.py on the text that every Python installation carries."""
    script = HERE / "data" / "prepare.py"
    if not script.is_file():
        raise UserError(f"DATA_PATH is unset and {script} is missing: set DATA_PATH")
    print("no FineWeb shards found: making a corpus from the text that Python carries", flush=True)
    if subprocess.run([sys.executable, str(script), "stdlib"]).returncode:
        raise UserError("data/prepare.py stdlib failed (see above): set DATA_PATH to other shards")


def read_manifest(path: Path) -> dict[str, Any]:
    """What data/prepare.py wrote beside its shards; {} where there is none."""
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError):
        raise UserError(f"{path}: not a manifest: make the shards again or remove it") from None


def tokenizer_beside(folder: Path) -> Path:
    """The tokenizer of a dataset in the public layout: ../../tokenizers/NAME_VOCAB_bpe.model."""
    folder = folder.resolve()
    home = folder.parent.parent / "tokenizers"
    names = [str(read_manifest(folder / "manifest.json").get("tokenizer", "absent"))]
    match = re.fullmatch(r"(?:fineweb10B|(.+))_sp(\d+)", folder.name)
    if match:
        names.append(f"{match[1] or 'fineweb'}_{match[2]}_bpe.model")
    found = [home / name for name in names if (home / name).is_file()]
    if not found:
        raise UserError(f"TOKENIZER_PATH is unset, and {home} holds no tokenizer for {folder}")
    return found[0]


class TrainWindows:
    """Windows of seq_len + 1 tokens over all training shards, in an order shuffled by seed.

    Window i of epoch e is a pure function of (seed, e, i): a run can go on from a step number,
    and several processes can each read their part of a step.
    """

    def __init__(self, paths: list[Path], seq_len: int, seed: int, vocab: int) -> None:
        self.paths, self.seq_len, self.seed, self.vocab = paths, seq_len, seed, vocab
        self.shards = [open_shard(path) for path in paths]
        self.counts = np.array([max(len(s) - 1, 0) // seq_len for s in self.shards])
        self.windows = int(self.counts.sum())
        self.tokens = sum(len(s) for s in self.shards)
        if self.windows == 0:
            raise UserError(f"{paths[0].parent}: {self.tokens} training tokens hold no window of "
                            f"TRAIN_SEQ_LEN={seq_len}: add text or lower it")  # fmt: skip
        self.ends = np.cumsum(self.counts)
        self.epoch, self.order = -1, np.zeros(0, np.int64)

    def window(self, index: int) -> Any:
        """Window number `index` of the run: (seq_len + 1,) uint16."""
        epoch, at = divmod(index, self.windows)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order = epoch, rng.permutation(self.windows)
        flat = int(self.order[at])
        shard = int(np.searchsorted(self.ends, flat, side="right"))
        first = flat - int(self.ends[shard] - self.counts[shard])
        slack = (len(self.shards[shard]) - 1) % self.seq_len
        start = first * self.seq_len + (epoch * 7919) % (slack + 1)
        tokens = self.shards[shard][start : start + self.seq_len + 1]
        if int(tokens.max()) >= self.vocab:
            check_ids(tokens, self.vocab, self.paths[shard])
        return tokens

    def step(self, number: int, windows: int) -> Any:
        """The tokens of step `number`: (windows, seq_len + 1) int32."""
        first = number * windows
        return np.stack([self.window(first + i) for i in range(windows)]).astype(np.int32)


COUNTED_TOKENS = 100_000_000  # enough for bigrams, and two seconds of counting
COUNTED_VOCAB = 16_384  # the table of a larger vocabulary would not fit in memory


def bigram_probability(data: TrainWindows) -> Any:
    """P(x_t | x_{t-1}) as counted over the training shards: (V, V) float32, row = x_{t-1}."""
    v, left, chunk = data.vocab, COUNTED_TOKENS, 1 << 24
    if v > COUNTED_VOCAB:
        raise UserError(f"COMPLEMENT_ALPHA needs a table of VOCAB_SIZE={v} squared numbers; set it "
                        f"to 0 above {COUNTED_VOCAB}")  # fmt: skip
    table = np.zeros(v * v, np.float32)
    for path, shard in zip(data.paths, data.shards, strict=True):
        for start in range(0, min(len(shard), left), chunk):
            tokens = check_ids(shard[start : start + chunk + 1], v, path).astype(np.int64)
            table += np.bincount(tokens[:-1] * v + tokens[1:], minlength=v * v)
        left = max(left - len(shard), 0)
    table = table.reshape(v, v)
    table /= np.maximum(table.sum(axis=1, keepdims=True), 1)
    return table


def complementary_weights(tokens: Any, table: Any, alpha: float) -> Any:
    """Loss weights of a step, mean 1: clip(1 - alpha * P_bigram, 0.1, 1) / mean.

    tokens (n, T + 1) int32, table (V, V) -> (n, T) float32. Dividing by the mean over the whole
    step keeps the effective learning rate.
    """
    if alpha == 0:
        return np.ones((tokens.shape[0], tokens.shape[1] - 1), np.float32)
    weights = np.clip(1 - alpha * table[tokens[:, :-1], tokens[:, 1:]], 0.1, 1)
    return (weights / weights.mean()).astype(np.float32)


def load_validation(paths: list[Path], tokens: Tokens, limit: int) -> tuple[Any, bool]:
    """(validation tokens (n,) int32, whether they are the whole split).

    A limit cuts at the end of the last document that fits, so that no document is half scored.
    """
    total = sum(len(open_shard(path)) for path in paths)
    parts, left = [], limit or total
    for path in paths:
        shard = open_shard(path)[: left + 1]
        parts.append(check_ids(shard, tokens.vocab, path))
        left -= len(shard)
        if left < 0:
            break
    text = np.concatenate(parts)
    if limit and len(text) > limit:
        starts = np.flatnonzero(text[1 : limit + 1] == tokens.bos) + 1
        text = text[: int(starts[-1]) if len(starts) else limit]
    if len(text) < 2:
        raise UserError(f"{paths[0].parent}: the validation text has fewer than 2 tokens")
    return text, len(text) == total


# ==================================================================================================
# CONTEXT FEATURES: the tokens before a position, cut at the document's start, and their hashes
# ==================================================================================================


def document_context(x: mx.array, bos: int, depth: int) -> list[mx.array]:
    """The inputs at distance 0 .. depth-1 before each position: depth arrays (B, T) int32.

    What lies before the document's BOS, or before the window, reads as BOS.
    """
    fill, length = max(bos, 0), x.shape[1]
    document, context = mx.cumsum(x == bos, axis=1), [x]
    for k in range(1, depth):
        before = mx.pad(x, [(0, 0), (k, 0)])[:, :length]
        of = mx.pad(document, [(0, 0), (k, 0)], constant_values=-1)[:, :length]
        context.append(mx.where(of == document, before, fill))
    return context


def hash_context(tokens: list[mx.array], size: int, order: int, head: int) -> mx.array:
    """Row of a hash table for each context. len(tokens) arrays (B, T) -> (B, T) uint32 < size.

    uint32 multiply-xor-shift; each (order, head) has its own odd multiplier, so that heads collide
    independently. The reduction takes any size up to 65,536.
    """
    multiplier = mx.array((0x9E3779B1 * (32 * order + 2 * head + 1)) & 0xFFFFFFFF, mx.uint32)
    h = mx.zeros(tokens[0].shape, mx.uint32) + multiplier
    for token in tokens:
        h = (h ^ token.astype(mx.uint32)) * multiplier
        h = h ^ (h >> 15)
    return ((h >> 16) * mx.array(size, mx.uint32)) >> 16


# ==================================================================================================
# CPU KERNELS: MLX's CPU exp() and tanh() cost 10 to 15 ns an element in one thread; sums and
# products, compiled together over contiguous arrays, cost 0.2. GPUs take MLX's own kernels.
# ==================================================================================================

MASKED = -1e6  # a score whose exponential is exactly 0
MLX_COMPILES = shutil.which("g++") is not None or sys.platform == "darwin"
compiled = mx.compile if MLX_COMPILES else lambda function: function


def on_cpu() -> bool:
    """Whether MLX computes on a CPU."""
    return mx.default_device().type == mx.DeviceType.cpu


# Two stages each: MLX fuses at most 11 operations in a row, and a cut elsewhere costs a copy.
@compiled
def half_exp_root(x: mx.array) -> mx.array:
    """exp(x / 256) / 2, by its Taylor series."""
    y = x * (1 / 256)
    return 0.5 + y * (0.5 + y * (1 / 4 + y * (1 / 12 + y * (1 / 48 + y * (1 / 240)))))


@compiled
def power_256(half: mx.array) -> mx.array:
    """(2 * max(half, 0)) ** 256."""
    p = half + mx.abs(half)
    for _ in range(8):
        p = p * p
    return p


def fast_exp(x: mx.array) -> mx.array:
    """exp(x): relative error 5e-5 for |x| < 50, 1e-3 for |x| < 80; 0 far below."""
    return power_256(half_exp_root(x))


@compiled
def clamp_5(x: mx.array) -> mx.array:
    """x between -4.9 and 4.9, without a comparison."""
    return 0.5 * (mx.abs(x + 4.9) - mx.abs(x - 4.9))


@compiled
def lambert(x: mx.array) -> mx.array:
    """Lambert's continued fraction of tanh(x), for |x| < 5."""
    u = x * x
    top = x * (135135 + u * (17325 + u * (378 + u)))
    return top / (135135 + u * (62370 + u * (3150 + u * 28)))


def fast_tanh(x: mx.array) -> mx.array:
    """tanh(x): absolute error 1e-6 for |x| < 1.5, 2e-4 anywhere; bounded by 1."""
    return lambert(clamp_5(x))


def query_blocks(length: int) -> list[tuple[int, int]]:
    """Four blocks of queries: block [a, b) needs the keys before b only, 5/8 of the whole."""
    size = max(math.ceil(length / 4), 32)
    return [(a, min(a + size, length)) for a in range(0, length, size)]


def fold(x: mx.array, a: int, b: int) -> mx.array:
    """Queries a..b of each group of heads as rows: (B, Hkv, G, T, d) -> (B, Hkv, G*(b-a), d)."""
    return x[..., a:b, :].reshape(*x.shape[:2], -1, x.shape[-1])


@mx.custom_function
def cpu_attention(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
    """Causal attention. q (B, Hkv, G, T, d), scaled; k, v (B, Hkv, T, d).

    Returns [out (B, Hkv, G, T, d), then for each query block its exponentials and their sums].
    Scores need no maximum taken off: normalised queries and keys bound them (see SCORE_LIMIT).
    """
    group, length = q.shape[2], q.shape[3]
    outs, saved = [], []
    for a, b in query_blocks(length):
        future = mx.arange(b)[None, :] > mx.arange(a, b)[:, None]
        mask = mx.concatenate([future.astype(q.dtype) * MASKED] * group)
        e = fast_exp(mx.addmm(mask, fold(q, a, b), k[:, :, :b].swapaxes(-1, -2)))
        z = mx.sum(e, axis=-1, keepdims=True)
        outs.append(((e @ v[:, :, :b]) / z).reshape(*q.shape[:3], b - a, -1))
        saved += [e, z]
    return [mx.concatenate(outs, axis=3), *saved]


@cpu_attention.vjp
def cpu_attention_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
    """Gradients by q, k, v: with p = e / z, d_score = p * (d_p - sum(d_out * out))."""
    (q, k, v), d_out, out = primals, cotangents[0], outputs[0]
    length, d_q = q.shape[3], []
    d_k, d_v = mx.zeros(k.shape, k.dtype), mx.zeros(v.shape, v.dtype)
    for i, (a, b) in enumerate(query_blocks(length)):
        e, z = outputs[1 + 2 * i], outputs[2 + 2 * i]
        d_o = fold(d_out, a, b) / z
        delta = mx.sum(d_o * fold(out, a, b), axis=-1, keepdims=True)
        d_s = e * mx.addmm(-delta, d_o, v[:, :, :b].swapaxes(-1, -2))
        d_q.append((d_s @ k[:, :, :b]).reshape(*q.shape[:3], b - a, -1))
        tail = [(0, 0), (0, 0), (0, length - b), (0, 0)]
        d_k = d_k + mx.pad(d_s.swapaxes(-1, -2) @ fold(q, a, b), tail)
        d_v = d_v + mx.pad(e.swapaxes(-1, -2) @ d_o, tail)
    return mx.concatenate(d_q, axis=3), d_k, d_v


@compiled
def through_cap(gradient: mx.array, t: mx.array) -> mx.array:
    """Chain rule of the soft cap: gradient * (1 - t^2)."""
    return gradient - gradient * t * t


@functools.cache
def cpu_cross_entropy(cap: float) -> Callable[..., list[mx.array]]:
    """Cross-entropy head with a soft cap and its own gradient.

    The function takes f (n, K), weight (V, K), bias (n, V) or (1, 1), y (n,) int32 and returns
    [nll (n,) in nats, t (n, V), e (n, V), z (n, 1)]: softmax is e / z, with no maximum taken off,
    because the cap bounds the logits.
    """

    @mx.custom_function
    def head(f: mx.array, weight: mx.array, bias: mx.array, y: mx.array) -> list[mx.array]:
        t = fast_tanh(mx.addmm(bias, f, weight.T, alpha=1 / cap, beta=1 / cap))
        e = fast_exp(t * cap)
        z = mx.sum(e, axis=-1, keepdims=True)
        picked = mx.take_along_axis(t, y[:, None], axis=-1) * cap
        return [(mx.log(z) - picked)[:, 0], t, e, z]

    @head.vjp
    def head_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        (f, weight, bias, y), (_, t, e, z) = primals, outputs
        d_nll, at = cotangents[0][:, None], y[:, None]
        d = e * (d_nll / z)
        d = mx.put_along_axis(d, at, mx.take_along_axis(d, at, axis=-1) - d_nll, axis=-1)
        d = through_cap(d, t)
        d_bias = d if bias.shape == d.shape else mx.zeros_like(bias)
        return d @ weight, d.T @ f, d_bias, mx.zeros_like(y)

    return head


@functools.cache
def squared_leaky_relu(leak: float) -> Callable[[mx.array], mx.array]:
    """max(h, leak * h) ** 2 without comparisons, with its own gradient.

    Its derivative is g = (1 + leak^2) h + (1 - leak^2) |h|, and the function is h * g / 2.
    """
    a, b = 1 + leak**2, 1 - leak**2

    @compiled
    def slope(h: mx.array, d: mx.array) -> mx.array:
        return (h * a + mx.abs(h) * b) * d

    value = compiled(lambda h: h * 0.5 * (h * a + mx.abs(h) * b))
    function = mx.custom_function(lambda h: value(h))
    function.vjp(lambda h, d, _: slope(h, d))
    return function


# ==================================================================================================
# MODEL: the public baseline's GPT, with hashed contexts added to its logits
# ==================================================================================================

SCORE_LIMIT = 80.0  # |score| <= gain * sqrt(head_dim): keeps exponentials in float32's range


def rms_norm(x: mx.array) -> mx.array:
    """x / sqrt(mean(x^2)) over the last axis, without a weight."""
    return mx.fast.rms_norm(x, None, 1e-6)


def init_matrix(rows: int, columns: int, rng: Any, orthogonal: bool) -> mx.array:
    """(rows, columns) float32: orthogonal, or uniform with the same spread as nn.Linear's."""
    if orthogonal:
        q = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))[0]
        return mx.array((q if rows >= columns else q.T).astype(np.float32))
    bound = 1 / math.sqrt(columns)
    return mx.array(rng.uniform(-bound, bound, (rows, columns)).astype(np.float32))


class Linear(nn.Module):
    """x (..., columns) -> (..., rows); the float32 weight is cast to x's dtype."""

    def __init__(self, weight: mx.array) -> None:
        super().__init__()
        self.weight = weight

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.astype(x.dtype).T


class Attention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys and partial RoPE.

    With `xsa` the output drops its projection on the position's own value vector
    (exclusive self-attention, openai/parameter-golf PR 287).
    """

    def __init__(self, cfg: Knobs, rng: Any, xsa: bool) -> None:
        super().__init__()
        d, self.heads, self.kv_heads = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads
        self.head_dim, self.xsa = d // cfg.num_heads, xsa
        self.rope_dims, self.rope_base = cfg.rope_dims or self.head_dim, cfg.rope_base
        kv = self.head_dim * self.kv_heads
        self.c_q = Linear(init_matrix(d, d, rng, cfg.use_ortho_init))
        self.c_k = Linear(init_matrix(kv, d, rng, cfg.use_ortho_init))
        self.c_v = Linear(init_matrix(kv, d, rng, cfg.use_ortho_init))
        self.proj = Linear(mx.zeros((d, d)))
        self.q_gain = mx.full((self.heads,), cfg.qk_gain_init)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, D) -> (B, T, D)."""
        batch, length, _ = x.shape

        def split(y: mx.array, heads: int) -> mx.array:
            return y.reshape(batch, length, heads, self.head_dim).transpose(0, 2, 1, 3)

        def turn(y: mx.array) -> mx.array:
            options = {"traditional": False, "base": self.rope_base, "scale": 1.0, "offset": 0}
            return mx.fast.rope(rms_norm(y), self.rope_dims, **options)

        gain = mx.minimum(self.q_gain, SCORE_LIMIT / self.head_dim**0.5)
        gain = gain.astype(x.dtype)[:, None, None]
        q = turn(split(self.c_q(x), self.heads)) * gain
        k = turn(split(self.c_k(x), self.kv_heads))
        v = split(self.c_v(x), self.kv_heads)
        y = causal_attention(q, k, v, self.head_dim**-0.5)
        if self.xsa:
            own = mx.repeat(v, self.heads // self.kv_heads, axis=1)
            own = own * mx.rsqrt(mx.sum(own * own, axis=-1, keepdims=True) + 1e-6)
            y = y - mx.sum(y * own, axis=-1, keepdims=True) * own
        return self.proj(y.transpose(0, 2, 1, 3).reshape(batch, length, -1))


def causal_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """q (B, H, T, d); k, v (B, Hkv, T, d) -> (B, H, T, d): MLX's kernel, or the CPU's."""
    if not on_cpu():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
    grouped = (q * scale).reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    return cpu_attention(grouped, k, v)[0].reshape(q.shape)


class MLP(nn.Module):
    """Two matrices around a squared (leaky) ReLU (openai/parameter-golf PR 535 for the leak)."""

    def __init__(self, cfg: Knobs, rng: Any) -> None:
        super().__init__()
        hidden = cfg.model_dim * cfg.mlp_mult
        self.fc = Linear(init_matrix(hidden, cfg.model_dim, rng, cfg.use_ortho_init))
        self.proj = Linear(mx.zeros((cfg.model_dim, hidden)))
        self.leak = cfg.mlp_leak

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, D) -> (B, T, D)."""
        return self.proj(squared_leaky_relu(self.leak)(self.fc(x)))


class Block(nn.Module):
    """Mix in the embedding, then attention and MLP, each on an RMS norm of the stream.

    LN scale: block i's norms are multiplied by 1/sqrt(i + 1). Attention without its normalised
    queries and keys is linear in that factor and the MLP quadratic, so it is applied to their
    outputs, where it costs nothing.
    """

    def __init__(self, cfg: Knobs, rng: Any, index: int) -> None:
        super().__init__()
        self.attn = Attention(cfg, rng, xsa=index >= cfg.num_layers - cfg.xsa_last_n)
        self.mlp = MLP(cfg, rng)
        self.attn_scale = mx.ones((cfg.model_dim,))
        self.mlp_scale = mx.ones((cfg.model_dim,))
        self.resid_mix = mx.stack([mx.ones((cfg.model_dim,)), mx.zeros((cfg.model_dim,))])
        self.depth_scale = 1 / math.sqrt(index + 1) if cfg.ln_scale_enabled else 1.0

    def __call__(self, x: mx.array, x0: mx.array) -> mx.array:
        """x, x0 (B, T, D) -> (B, T, D); x0 is the embedding."""
        mix = self.resid_mix.astype(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + (self.attn_scale * self.depth_scale).astype(x.dtype) * self.attn(rms_norm(x))
        return x + (self.mlp_scale * self.depth_scale**2).astype(x.dtype) * self.mlp(rms_norm(x))


class EngramLite(nn.Module):
    """Gated multi-head hashed bigram and trigram embedding (after openai/parameter-golf PR 1089).

    Keys (t-2, t-1) and (t-3, t-2, t-1); the heads of an order are averaged, the orders summed with
    one learned gate each. The gates start nearly shut, so that rows enter once they mean something.
    The narrow embedding is projected to the vocabulary by `proj` inside the head's matrix product.
    """

    def __init__(self, cfg: Knobs, vocab: int, rng: Any) -> None:
        super().__init__()
        self.size, self.heads = cfg.engram_hash_size, cfg.engram_n_heads
        rows, columns = 2 * self.heads * self.size, cfg.engram_embed_dim
        self.tables = mx.array(rng.standard_normal((rows, columns)).astype(np.float32))
        self.proj = mx.zeros((vocab, columns))
        self.gates = mx.array([-2.0, -3.0])

    def __call__(self, context: list[mx.array]) -> mx.array:
        """[t-1, t-2, t-3], each (B, T) -> (B, T, E)."""
        rows = []
        for order in (2, 3):
            for head in range(self.heads):
                offset = ((order - 2) * self.heads + head) * self.size
                rows.append(hash_context(context[order - 1 :: -1], self.size, order, head) + offset)
        e = self.tables[mx.stack(rows, axis=-1)]
        gates = mx.repeat(mx.sigmoid(self.gates) / self.heads, self.heads)
        return gates @ e


class LogitHash(nn.Module):
    """Hash tables straight to the vocabulary: BigramHash (one key) and SkipGram (two, gated)."""

    def __init__(self, size: int, vocab: int, keys: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.size, self.distances = size, keys
        self.table = mx.zeros((size, vocab))
        self.gates = mx.zeros((len(keys),))

    def __call__(self, context: list[mx.array]) -> mx.array:
        """Context by distance from the predicted token less 1 -> (B, T, V)."""
        out = 0
        for i, key in enumerate(self.distances):
            row = hash_context([context[k - 1] for k in key], self.size, 4 + len(self.distances), i)
            out = out + 2 * mx.sigmoid(self.gates[i]) * self.table[row]
        return out


class GPT(nn.Module):
    """The public baseline's GPT: U-net skips, tied embedding, soft-capped logits, plus hashes."""

    def __init__(self, cfg: Knobs, vocab: int, bos: int) -> None:
        super().__init__()
        rng = np.random.default_rng(cfg.seed)
        d, self.bos = cfg.model_dim, bos
        self.cap, self.chunk = cfg.logit_softcap, cfg.logit_chunk_tokens
        self.dtype = getattr(mx, compute_dtype(cfg))
        std = cfg.tied_embed_init_std
        self.tok_emb = mx.array((rng.standard_normal((vocab, d)) * std).astype(np.float32))
        self.blocks = [Block(cfg, rng, i) for i in range(cfg.num_layers)]
        self.skips = mx.ones((cfg.num_layers // 2, d))
        if cfg.use_smeargate:
            self.smear_gate = mx.full((d,), -2.0)
        if cfg.engram_lite_enabled and cfg.engram_hash_size:
            self.engram = EngramLite(cfg, vocab, rng)
        if not cfg.engram_lite_enabled and cfg.bigram_hash_size:
            self.bigram = LogitHash(cfg.bigram_hash_size, vocab, ((2, 1),))
        if cfg.skipgram_hash_size:
            self.skipgram = LogitHash(cfg.skipgram_hash_size, vocab, ((3, 1), (5, 1)))

    def embed(self, context: list[mx.array]) -> mx.array:
        """Normalised embedding, each blended with the one before in its document: (B, T, D)."""
        x = self.tok_emb[context[0]].astype(self.dtype)
        if "smear_gate" in self:
            inside = (context[0] != self.bos)[..., None].astype(x.dtype)
            before = mx.pad(x, [(0, 0), (1, 0), (0, 0)])[:, :-1] * inside
            x = x + mx.sigmoid(self.smear_gate).astype(x.dtype) * before
        return rms_norm(x)

    def trunk(self, x: mx.array) -> mx.array:
        """Embedding (B, T, D) -> features for the head (B, T, D)."""
        x0, half, kept = x, len(self.blocks) // 2, []
        for i, block in enumerate(self.blocks):
            if i >= half and kept:
                x = x + self.skips[i - half].astype(x.dtype) * kept.pop()
            x = block(x, x0)
            if i < half:
                kept.append(x)
        return rms_norm(x)

    def head_inputs(self, x: mx.array, last: int) -> tuple[mx.array, mx.array, mx.array]:
        """Inputs (B, T) -> (f (B*last, K), weight (V, K), bias (B*last, V) or (1, 1)).

        The uncapped logits of the last positions are f @ weight.T + bias.
        """
        context = document_context(x, self.bos, 5)
        h = self.trunk(self.embed(context))[:, -last:]
        recent = [c[:, -last:] for c in context]
        f, weight, bias = [h], [self.tok_emb], mx.zeros((1, 1))
        if "engram" in self:
            f.append(self.engram(recent).astype(h.dtype))
            weight.append(self.engram.proj)
        for name in ("bigram", "skipgram"):
            if name in self:
                bias = bias + self[name](recent).reshape(-1, self.tok_emb.shape[0])
        f = mx.concatenate(f, axis=-1)
        w = mx.concatenate(weight, axis=-1).astype(h.dtype)
        return f.reshape(-1, f.shape[-1]), w, bias.astype(h.dtype)

    def nll(self, x: mx.array, y: mx.array) -> mx.array:
        """Inputs and targets (B, T) -> cross-entropy of each target, (B, T) float32 nats."""
        f, weight, bias = self.head_inputs(x, x.shape[1])
        flat, parts = y.reshape(-1), []
        size = self.chunk or f.shape[0]
        for a in range(0, f.shape[0], size):
            part = bias if bias.shape[0] == 1 else bias[a : a + size]
            parts.append(self.chunk_nll(f[a : a + size], weight, part, flat[a : a + size]))
        return mx.concatenate(parts).reshape(y.shape)

    def chunk_nll(self, f: mx.array, weight: mx.array, bias: mx.array, y: mx.array) -> mx.array:
        """Cross-entropy of a piece of the head: (n,) float32 nats."""
        if on_cpu():
            return cpu_cross_entropy(self.cap)(f, weight, bias, y)[0]
        logits = (f @ weight.T + bias).astype(mx.float32)
        return nn.losses.cross_entropy(self.cap * mx.tanh(logits / self.cap), y)

    def log_probs(self, x: mx.array, last: int) -> mx.array:
        """Inputs (B, T) -> log-distributions after the last positions: (B, last, V) float32.

        Scores are made of these: the head takes MLX's exact functions in float32 on every device.
        """
        f, weight, bias = self.head_inputs(x, last)
        f, weight, bias = (a.astype(mx.float32) for a in (f, weight, bias))
        logits = self.cap * mx.tanh((f @ weight.T + bias) / self.cap)
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return logs.reshape(x.shape[0], last, -1)


def compute_dtype(cfg: Knobs) -> str:
    """Name of the forward pass's dtype. On a CPU only float32 reaches the BLAS and the kernels."""
    if on_cpu() and cfg.compute_dtype == "bfloat16":
        raise UserError("COMPUTE_DTYPE=bfloat16: a CPU computes in float32; unset it")
    if cfg.compute_dtype != "auto":
        return cfg.compute_dtype
    return "float32" if on_cpu() else "bfloat16"


# ==================================================================================================
# OPTIMIZERS: one table says, for every parameter, who updates it, how fast, and how it is stored
# ==================================================================================================


@dataclass(frozen=True)
class Group:
    """A row of the table: parameters by full-match pattern; knobs by field name; '' is none."""

    name: str
    pattern: str
    optimizer: str
    lr: str
    decay: str
    bits: str


GROUPS = (
    Group("matrices", r"blocks\.\d+\.(attn\.(c_q|c_k|c_v|proj)|mlp\.(fc|proj))\.weight",
          "muon", "matrix_lr", "muon_weight_decay", "weight_bits"),
    Group("embedding", r"tok_emb", "adam", "tied_embed_lr", "adam_weight_decay", "embed_bits"),
    Group("tables", r"engram\.tables|(bigram|skipgram)\.table",
          "adam", "hash_lr", "adam_weight_decay", "weight_bits"),
    Group("hash_proj", r"engram\.proj", "adam", "hash_proj_lr", "", "embed_bits"),
    Group("scalars", r"blocks\.\d+\.(attn\.q_gain|attn_scale|mlp_scale|resid_mix)|skips|smear_gate"
          r"|\w+\.gates", "adam", "scalar_lr", "", ""),
)  # fmt: skip

Arrays = dict[str, mx.array]


def group_parameters(names: list[str]) -> dict[str, Group]:
    """The group of every parameter; an error unless each name is in exactly one."""
    found = {n: [g for g in GROUPS if re.fullmatch(g.pattern, n)] for n in names}
    wrong = {n: [g.name for g in groups] for n, groups in found.items() if len(groups) != 1}
    if wrong:
        raise AssertionError(f"parameters that are not in exactly one optimizer group: {wrong}")
    return {n: groups[0] for n, groups in found.items()}


def orthogonalise(g: mx.array, steps: int) -> mx.array:
    """Newton-Schulz: (n, rows, columns) -> the same with singular values near 1.

    Keller Jordan's quintic (https://kellerjordan.github.io/posts/muon/), in float32: bfloat16
    gives NaNs on some backends.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.astype(mx.float32)
    x = x.swapaxes(-1, -2) if tall else x
    x = x / (mx.sqrt(mx.sum(x * x, axis=(-2, -1), keepdims=True)) + 1e-7)
    for _ in range(steps):
        s = x @ x.swapaxes(-1, -2)
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.swapaxes(-1, -2) if tall else x


def muon(
    p: mx.array, g: mx.array, buffer: mx.array, hyper: Arrays, cfg: Knobs
) -> tuple[mx.array, mx.array]:
    """One Muon update of stacked matrices (n, rows, columns): (new p, new buffer).

    Nesterov momentum, then orthogonalisation, scaled by sqrt(max(1, rows / columns)); the decay is
    decoupled and multiplied by the learning rate.
    """
    buffer = hyper["momentum"] * buffer + g
    update = orthogonalise(g + hyper["momentum"] * buffer, cfg.muon_backend_steps)
    lr = hyper["lr"] * cfg.matrix_lr
    scale = math.sqrt(max(1.0, p.shape[-2] / p.shape[-1]))
    return p * (1 - lr * cfg.muon_weight_decay) - (lr * scale) * update, buffer


@compiled
def rsqrt_guess(x: mx.array) -> mx.array:
    """Bits of a first guess of 1 / sqrt(x), from the bits of x."""
    return 0x5F3759DF - (x >> 1)


@compiled
def rsqrt_newton(x: mx.array, y: mx.array) -> mx.array:
    """sqrt(x) from a guess y of 1 / sqrt(x): two Newton steps, 5e-6 relative."""
    y = y * (1.5 - 0.5 * x * y * y)
    return x * (y * (1.5 - 0.5 * x * y * y))


def root(x: mx.array) -> mx.array:
    """sqrt(x) for x >= 0; MLX's CPU sqrt costs 7 ns an element."""
    if not on_cpu():
        return mx.sqrt(x)
    guess = rsqrt_guess(x.view(mx.int32)).view(mx.float32)
    return rsqrt_newton(x, guess)


@compiled
def adam_moments(g: mx.array, m: mx.array, v: mx.array, b1: mx.array, b2: mx.array) -> list:
    """The two decayed moments of the gradient."""
    return [m * b1 + g * (1 - b1), v * b2 + g * g * (1 - b2)]


@compiled
def adam_move(
    p: mx.array, m: mx.array, s: mx.array, rate: mx.array, shrink: mx.array, eps: mx.array
) -> mx.array:
    """Parameters after the move: m and s = sqrt(v) are not bias-corrected, rate and eps are."""
    return p * shrink - rate * m / (s + eps)


def adam(
    p: mx.array,
    g: mx.array,
    m: mx.array,
    v: mx.array,
    lr: mx.array,
    step: mx.array,
    cfg: Knobs,
    decay: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """One Adam update with bias correction and decoupled decay: (new p, new m, new v)."""
    b1, b2 = mx.array(cfg.beta1), mx.array(cfg.beta2)
    m, v = adam_moments(g, m, v, b1, b2)
    c1, c2 = 1 - b1**step, mx.sqrt(1 - b2**step)
    return adam_move(p, m, root(v), lr * c2 / c1, 1 - lr * decay, cfg.adam_eps * c2), m, v


def new_optimizer_state(params: Arrays, groups: dict[str, Group]) -> Arrays:
    """Zeroed moments, under the names KIND/PARAMETER."""
    kinds = {"muon": ("buffer",), "adam": ("m", "v")}
    return {
        f"{kind}/{name}": mx.zeros_like(p)
        for name, p in params.items()
        for kind in kinds[groups[name].optimizer]
    }


def apply_gradients(
    names: list[str], params: Arrays, grads: Arrays, opt: Arrays, hyper: Arrays, cfg: Knobs
) -> tuple[Arrays, Arrays]:
    """One step of the named parameters: (their new values, their new optimizer state).

    hyper: scalar arrays `lr` (factor on every learning rate), `momentum` (Muon's) and `step`
    (counted from 1). Muon matrices of one shape are stacked.
    """
    new, state, stacks, groups = {}, {}, {}, group_parameters(names)
    for name in names:
        group, p, g = groups[name], params[name], grads[name]
        decay = getattr(cfg, group.decay) if group.decay else 0.0
        lr = hyper["lr"] * getattr(cfg, group.lr)
        if group.optimizer == "muon":
            stacks.setdefault(p.shape, []).append(name)
            continue
        moments = opt[f"m/{name}"], opt[f"v/{name}"]
        new[name], *moments = adam(p, g, *moments, lr, hyper["step"], cfg, decay)
        state |= {f"m/{name}": moments[0], f"v/{name}": moments[1]}
    for same in stacks.values():
        p, g, b = (
            mx.stack([source[key + n] for n in same])
            for source, key in ((params, ""), (grads, ""), (opt, "buffer/"))
        )
        p, b = muon(p, g, b, hyper, cfg)
        new |= {n: p[i] for i, n in enumerate(same)}
        state |= {f"buffer/{n}": b[i] for i, n in enumerate(same)}
    return new, state


# ==================================================================================================
# TRAINING
# ==================================================================================================


class Workers:
    """Threads that share a step's work: one a core on CPUs, each with its own MLX stream.

    MLX's CPU backend runs a stream in one thread. Graphs are built one at a time (building swaps
    the model's parameters) and evaluated side by side. A GPU has one worker and needs no thread.
    """

    def __init__(self, count: int) -> None:
        self.count, self.lock, self.local = count, threading.Lock(), threading.local()
        self.pools = [ThreadPoolExecutor(1) for _ in range(count)] if count > 1 else []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self.pools:
            pool.submit(mx.clear_streams)  # a stream ends in the thread that made it
            pool.shutdown()

    def job(self, build: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Build and evaluate one graph in a worker's thread."""
        if not hasattr(self.local, "stream"):
            self.local.stream = mx.new_stream(mx.cpu)
        with mx.stream(self.local.stream):
            with self.lock:
                result = build(*args)
            mx.eval(result)
        return result

    def map(self, build: Callable[..., Any], jobs: list[tuple[Any, ...]]) -> list[Any]:
        """build(*args) for every job, job i by worker i modulo their number; in order."""
        mx.eval(jobs)  # a thread cannot evaluate what another thread's stream has yet to do
        if not self.pools:
            return [build(*args) for args in jobs]
        pools = itertools.cycle(self.pools)
        pending = [next(pools).submit(self.job, build, args) for args in jobs]
        return [p.result() for p in pending]


def make_workers(cfg: Knobs) -> Workers:
    """WORKERS, or one a core on a CPU, where they share the BLAS's threads; one on a GPU."""
    if cfg.blas not in ("auto", "none") and not BLAS:
        raise UserError(f"BLAS={cfg.blas}: not an OpenBLAS that can be loaded; try BLAS=auto")
    windows = max(cfg.train_batch_tokens // cfg.train_seq_len, 1)  # more workers would idle
    count = cfg.workers or min(cpu_cores(), windows) if on_cpu() else 1
    if BLAS:
        BLAS["set_threads"](max(cpu_cores() // count, 1))
    return Workers(count)


def remaining_steps(step: int, elapsed_s: float, cfg: Knobs) -> float:
    """Steps left, by the count or by the clock at the mean step time so far."""
    left = float(cfg.iterations - step) if cfg.iterations else math.inf
    if cfg.max_wallclock_seconds and step:
        left = min(left, (cfg.max_wallclock_seconds - elapsed_s) * step / elapsed_s)
    return max(left, 0.0)


def progress(step: int, elapsed_s: float, cfg: Knobs) -> float:
    """How much of the run is done, 0 .. 1: of the steps or of the clock, whichever ends first."""
    by_step = step / cfg.iterations if cfg.iterations else 0.0
    clock = cfg.max_wallclock_seconds
    return min(max(by_step, elapsed_s / clock if clock else 0.0), 1.0)


def lr_factor(step: int, elapsed_s: float, cfg: Knobs) -> float:
    """Factor on every learning rate: 1, then linear to 0 over the last WARMDOWN_ITERS steps."""
    if not cfg.warmdown_iters:
        return 1.0
    return min(remaining_steps(step, elapsed_s, cfg) / cfg.warmdown_iters, 1.0)


def momentum_at(step: int, cfg: Knobs) -> float:
    """Muon's momentum, warmed up linearly."""
    t = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
    return cfg.muon_momentum_warmup_start * (1 - t) + cfg.muon_momentum * t


def averaging_weight(averaged: int, cfg: Knobs) -> float:
    """Weight of the newest parameters in the average when `averaged` steps are in it already."""
    mean = 1 / (averaged + 1)  # an EMA younger than its memory is the plain mean
    return mean if cfg.use_swa else max(1 - cfg.ema_decay, mean)


def split_windows(windows: int, cfg: Knobs, workers: int) -> list[list[slice]]:
    """Windows of a step -> rounds of a piece for each worker, each under the memory bound."""
    most = max(cfg.mlx_max_microbatch_tokens // cfg.train_seq_len, 1)
    rounds = max(math.ceil(windows / (most * workers)), cfg.grad_accum_steps)
    pieces = min(rounds * workers, windows)
    ends = [windows * i // pieces for i in range(pieces + 1)]
    slices = [slice(a, b) for a, b in itertools.pairwise(ends)]
    return [slices[i : i + workers] for i in range(0, pieces, workers)]


class Trainer:
    """The training state and the one function that moves it.

    All that changes is in three dicts of arrays: `params`, `opt` and `average`. A step computes new
    ones and takes them only if its loss and its gradient are finite, so that the last good state
    is always at hand.
    """

    def __init__(
        self, model: GPT, cfg: Knobs, data: TrainWindows, report: Report, workers: Workers
    ) -> None:
        self.model, self.cfg, self.data, self.report = model, cfg, data, report
        self.workers = workers
        self.params: Arrays = dict(tree_flatten(model.parameters()))
        self.groups = group_parameters(list(self.params))
        self.opt = new_optimizer_state(self.params, self.groups)
        self.average = self.params
        self.step, self.elapsed_s, self.averaged = 0, 0.0, 0
        self.windows = cfg.train_batch_tokens // cfg.train_seq_len
        self.rounds = split_windows(self.windows, cfg, workers.count)
        by_shape = sorted(self.params, key=lambda n: (self.params[n].size, n), reverse=True)
        self.shares = [by_shape[i :: workers.count] for i in range(workers.count)]
        self.bigrams = bigram_probability(data) if cfg.complement_alpha else None
        # A GPU compiles whole steps; on a CPU that gains nothing, so there only kernels are.
        whole = (lambda f: f) if on_cpu() else mx.compile
        self.gradients = {q: whole(functools.partial(self._gradients, q)) for q in (False, True)}
        self.sums, self.updates = whole(self._sums), whole(self._updates)

    def _gradients(
        self, qat: bool, params: Arrays, before: tuple[Any, ...], batch: tuple[mx.array, ...]
    ) -> tuple[mx.array, Arrays]:
        """(loss, gradients) of a piece of the step, added to those of the pieces before it.

        The gradients are those of the weighted loss; the loss is plain. batch: inputs, targets and
        weights, each (B, T).
        """
        x, y, w = batch
        share = 1 / (self.windows * self.cfg.train_seq_len)

        def loss(p: Arrays) -> tuple[mx.array, mx.array]:
            p = fake_quantise(p, self.groups, self.cfg) if qat else p
            self.model.update(tree_unflatten(list(p.items())))
            nll = self.model.nll(x, y)
            return mx.sum(nll * w) * share, mx.sum(nll) * share

        (_, plain), grads = mx.value_and_grad(loss)(params)
        if before:
            plain, grads = plain + before[0], {n: g + before[1][n] for n, g in grads.items()}
        return plain, grads

    def _sums(self, parts: list[Arrays]) -> tuple[Arrays, mx.array]:
        """Gradients of several workers -> (their sums, the squared norm of those)."""
        sums = {n: sum((p[n] for p in parts[1:]), parts[0][n]) for n in parts[0]}
        return sums, sum((mx.sum(g * g) for g in sums.values()), mx.array(0.0))

    def _updates(
        self, params: Arrays, grads: Arrays, opt: Arrays, average: Arrays, hyper: Arrays
    ) -> tuple[Arrays, Arrays, Arrays]:
        """Some parameters' (new values, optimizer state, average)."""
        if self.cfg.grad_clip_norm:
            grads = {n: g * hyper["clip"] for n, g in grads.items()}
        params, opt = apply_gradients(list(params), params, grads, opt, hyper, self.cfg)
        if not (self.cfg.ema_decay or self.cfg.use_swa):
            return params, opt, params
        return params, opt, {n: a + hyper["average"] * (params[n] - a) for n, a in average.items()}

    def step_gradients(self, step: int, qat: bool) -> tuple[float, list[tuple[Arrays, mx.array]]]:
        """Step number `step`'s (plain loss, [(gradients, their squared norm)] of each share)."""
        tokens = self.data.step(step, self.windows)
        weights = complementary_weights(tokens, self.bigrams, self.cfg.complement_alpha)
        arrays = tokens[:, :-1], tokens[:, 1:], weights
        parts: list[tuple[Any, ...]] = [()] * len(self.rounds[0])
        for pieces in self.rounds:
            batches = [tuple(mx.array(a[piece]) for a in arrays) for piece in pieces]
            jobs = [(self.params, *job) for job in zip(parts, batches, strict=False)]
            parts[: len(jobs)] = self.workers.map(self.gradients[qat], jobs)
            if self.cfg.mlx_eager_eval:
                mx.eval(parts)
        jobs = [([{n: g[n] for n in share} for _, g in parts],) for share in self.shares]
        return sum(p[0].item() for p in parts), self.workers.map(self.sums, jobs)

    def compute(self, step: int, factor: float, averaged: int) -> tuple[Any, ...]:
        """What step number `step` makes of the state: (params, opt, average, loss, norm)."""
        cfg, old = self.cfg, (self.params, self.opt, self.average)
        loss, summed = self.step_gradients(step, factor < cfg.late_qat_threshold)
        norm = math.sqrt(sum(square.item() for _, square in summed))
        hyper = {
            "lr": factor, "momentum": momentum_at(step, cfg), "step": step + 1.0,
            "clip": min(cfg.grad_clip_norm / (norm + 1e-12), 1.0),
            "average": averaging_weight(averaged, cfg),
        }  # fmt: skip
        hyper = {n: mx.array(v) for n, v in hyper.items()}
        jobs = []
        for grads, _ in summed:
            params, average = ({n: source[n] for n in grads} for source in (old[0], old[2]))
            opt = {k: a for k, a in self.opt.items() if k.partition("/")[2] in grads}
            jobs.append((params, grads, opt, average, hyper))
        shares = self.workers.map(self.updates, jobs)
        mx.eval(shares)
        new = [functools.reduce(operator.or_, kind) for kind in zip(*shares, strict=True)]
        return *({n: a[n] for n in b} for a, b in zip(new, old, strict=True)), loss, norm

    def warm_up(self) -> None:
        """Compile and allocate by running steps whose results are thrown away."""
        for _ in range(self.cfg.warmup_steps):
            self.compute(0, 1.0, 0)
        if self.cfg.late_qat_threshold and self.cfg.warmup_steps:
            self.compute(0, 0.0, 0)

    def advance(self) -> dict[str, Any]:
        """Take one step; returns its train event. Raises RunFailed if it is not finite."""
        begin = time.perf_counter()
        averaging = progress(self.step, self.elapsed_s, self.cfg) >= self.cfg.ema_start_frac
        averaged = self.averaged if averaging else 0
        factor = lr_factor(self.step, self.elapsed_s, self.cfg)
        params, opt, average, loss, norm = self.compute(self.step, factor, averaged)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            path = self.save()
            raise RunFailed(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}: stopped; the state at "
                f"step {self.step} is in {path}. Lower MATRIX_LR, TIED_EMBED_LR or HASH_LR, or set "
                "GRAD_CLIP_NORM=1"
            )
        self.params, self.opt, self.average = params, opt, average
        self.averaged = averaged + 1 if averaging else 0
        self.step += 1
        seconds = time.perf_counter() - begin
        self.elapsed_s += seconds
        return {
            "event": "train", "step": self.step, "train_loss": loss, "grad_norm": norm,
            "lr_factor": factor, "train_time_ms": 1000 * self.elapsed_s,
            "step_avg_ms": 1000 * self.elapsed_s / self.step,
            "tok_s": self.windows * self.cfg.train_seq_len / seconds,
        }  # fmt: skip

    def finished(self) -> bool:
        """Whether the steps or the clock are used up."""
        return progress(self.step, self.elapsed_s, self.cfg) >= 1

    def save(self) -> Path:
        """Write the state to checkpoint/ in the run's folder, whole or not at all."""
        path = self.report.checkpoint
        path.parent.mkdir(exist_ok=True)
        kinds = {"params": self.params, "opt": self.opt, "average": self.average}
        arrays = {f"{kind}:{n}": a for kind, tree in kinds.items() for n, a in tree.items()}
        meta = {n: getattr(self, n) for n in ("step", "elapsed_s", "averaged")}
        meta = {"state": json.dumps(meta), "knobs": json.dumps(dataclasses.asdict(self.cfg))}
        part = path.with_name("part.safetensors")
        mx.save_safetensors(str(part), arrays, meta)
        return part.replace(path)

    def load(self) -> None:
        """Take the state from checkpoint/. Raises UserError if the settings do not fit it."""
        arrays, meta = mx.load(str(self.report.checkpoint), return_metadata=True)
        saved = json.loads(meta["knobs"])
        free = ("iterations", "max_wall", "warmdown", "resume", "checkpoint", "train_log")
        free += ("eval_", "val_", "run_id", "out_dir")
        for name, value in dataclasses.asdict(self.cfg).items():
            if not name.startswith(free) and saved.get(name) != value:
                raise UserError(f"RESUME=1: {name.upper()} was {saved.get(name)}, not {value}")
        for kind in ("params", "opt", "average"):
            mine = {n.partition(":")[2]: a for n, a in arrays.items() if n.startswith(kind + ":")}
            setattr(self, kind, {n: mine[n] for n in getattr(self, kind)})
        for name, value in json.loads(meta["state"]).items():
            setattr(self, name, value)


def train(trainer: Trainer, validation: Validation) -> None:
    """Run steps until the steps or the clock are used up; validate and log on the way."""
    cfg, report = trainer.cfg, trainer.report

    def due(every: int) -> bool:
        return bool(every) and trainer.step % every == 0

    interrupted = threading.Event()

    def stop_after_step(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, handler)  # a second interrupt stops at once

    handler = signal.signal(signal.SIGINT, stop_after_step)
    try:
        while not trainer.finished():
            event = trainer.advance()
            left = remaining_steps(trainer.step, trainer.elapsed_s, cfg)
            if trainer.step == 5 and left < cfg.warmdown_iters:
                report.line(f"warning: WARMDOWN_ITERS={cfg.warmdown_iters}, but only about "
                            f"{left:.0f} steps are left: the learning rate falls now")  # fmt: skip
            if due(cfg.train_log_every) or (cfg.train_log_every and trainer.step <= 5):
                report.event(event, TRAIN_LINE)
            if interrupted.is_set():
                go_on = f"RESUME=1 RUN_ID={report.folder.name}"
                raise RunFailed(f"stopped; {trainer.save()} holds step {trainer.step}: {go_on}")
            if due(cfg.val_loss_every) and not trainer.finished():
                validation.during_training(trainer)
            if due(cfg.checkpoint_every):
                trainer.save()
    finally:
        signal.signal(signal.SIGINT, handler)


# ==================================================================================================
# ARTIFACT: magic, version, compressor, checksum; then compressed: JSON header, raw tensors
# ==================================================================================================

CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
MAGIC, FORMAT_VERSION = b"MLXGOLF1", 1
PREFIX = struct.Struct("<8sHB32s")  # magic, version, compressor, SHA-256 of those two and the rest
# Bytes a value after compression, for rows of Gaussian noise (measured, brotli 11).
NOISE_BYTES = {4: 0.445, 5: 0.56, 6: 0.68, 7: 0.80, 8: 0.925}


def quantise_rows(w: mx.array, bits: int, search: bool) -> tuple[mx.array, mx.array]:
    """Symmetric codes with one scale a row: (rows, columns) -> (codes, scale (rows, 1)), float32.

    The clip is the candidate fraction of the row's largest magnitude with the least squared error.
    Scales are rounded to bfloat16 (they are stored so) before the codes are computed: it has
    float32's range, so no row is too small.
    """
    limit = 2 ** (bits - 1) - 1
    top = mx.max(mx.abs(w), axis=1, keepdims=True) / limit

    def codes_at(ratio: mx.array) -> tuple[mx.array, mx.array]:
        scale = (top * ratio).astype(mx.bfloat16).astype(mx.float32)
        return mx.clip(mx.round(w / mx.where(scale > 0, scale, 1.0)), -limit, limit), scale

    best, least = mx.ones(top.shape), mx.full(top.shape, math.inf)
    for ratio in CLIP_RATIOS if search else ():
        codes, scale = codes_at(mx.array(ratio))
        error = mx.sum((codes * scale - w) ** 2, axis=1, keepdims=True)
        best, least = mx.where(error < least, ratio, best), mx.minimum(error, least)
    return codes_at(best)


def fake_quantise(params: Arrays, groups: dict[str, Group], cfg: Knobs) -> Arrays:
    """The parameters as the artifact will hold them; gradients pass straight through."""
    out = {}
    for name, p in params.items():
        bits = groups[name].bits
        if bits:
            frozen = mx.stop_gradient(p)
            codes, scale = quantise_rows(frozen, getattr(cfg, bits), cfg.use_gptq_lite)
            p = p + (codes * scale - frozen)
        out[name] = p
    return out


def compressors() -> list[tuple[str, Callable[[bytes], bytes], Callable[[bytes], bytes]]]:
    """(name, compress, decompress) by their number in the file."""
    import brotli
    import zstandard

    zstd, unzstd = zstandard.ZstdCompressor(level=22), zstandard.ZstdDecompressor()
    xz = functools.partial(lzma.compress, preset=9 | lzma.PRESET_EXTREME)
    return [
        ("brotli", functools.partial(brotli.compress, quality=11, lgwin=24), brotli.decompress),
        ("zstd", zstd.compress, unzstd.decompress),
        ("lzma", xz, lzma.decompress),
    ]


def pack_tensors(params: Arrays, groups: dict[str, Group], cfg: Knobs) -> tuple[list, list[bytes]]:
    """Parameters -> (a JSON row a tensor: name, shape, bits; their bytes in the same order)."""
    rows, blobs = [], []
    for name, p in params.items():
        bits = getattr(cfg, groups[name].bits) if groups[name].bits else 0
        rows.append([name, list(p.shape), bits])
        if bits:
            codes, scale = quantise_rows(p, bits, cfg.use_gptq_lite)
            codes = np.array(codes).astype(np.int8)
            scales = np.array(scale.astype(mx.bfloat16).view(mx.uint16))
            blobs.append(codes.tobytes() + scales.tobytes())
        else:
            blobs.append(np.array(p.astype(mx.float32)).astype("<f4").tobytes())
    return rows, blobs


def unpack_tensors(rows: list, raw: bytes) -> Arrays:
    """The inverse of `pack_tensors`, up to quantisation."""
    out, at = {}, 0
    for name, shape, bits in rows:
        size = math.prod(shape)
        if bits:
            codes = np.frombuffer(raw, np.int8, size, at).reshape(shape).astype(np.float32)
            scales = np.frombuffer(raw, "<u2", shape[0], at + size).astype(np.uint32) << 16
            out[name] = mx.array(codes * scales.view(np.float32)[:, None])
            at += size + 2 * shape[0]
        else:
            out[name] = mx.array(np.frombuffer(raw, "<f4", size, at).reshape(shape))
            at += 4 * size
    if at != len(raw):
        raise ValueError(f"{len(raw) - at} bytes too many")
    return out


def checksum(version: int, compressor: int, body: bytes) -> bytes:
    """SHA-256 of all that an artifact holds after its magic number."""
    return hashlib.sha256(struct.pack("<HB", version, compressor) + body).digest()


LOCAL_KNOBS = {"run_id", "out_dir", "eval_only", "data_path", "tokenizer_path", "resume", "blas",
               "workers", "device", "compute_dtype", "checkpoint_every"}  # fmt: skip


def write_artifact(
    path: Path, params: Arrays, groups: dict[str, Group], cfg: Knobs, tokens: Tokens
) -> dict[str, Any]:
    """Write the compressed model with all that scoring needs; returns the export event."""
    rows, blobs = pack_tensors(params, groups, cfg)
    knobs = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in LOCAL_KNOBS}
    facts = {k: getattr(tokens, k) for k in ("sha256", "bos", "vocab", "dummy_prefix")}
    header = json.dumps({"knobs": knobs, "tokenizer": facts, "tensors": rows}).encode()
    flags = (tokens.leading + 2 * tokens.control).astype(np.uint8).tobytes()
    table = tokens.piece_bytes.astype("<u2").tobytes() + flags
    raw = struct.pack("<I", len(header)) + header + table + b"".join(blobs)
    packed = [compress(raw) for _, compress, _ in compressors()]
    best = min(range(len(packed)), key=lambda i: len(packed[i]))
    digest = checksum(FORMAT_VERSION, best, packed[best])
    part = path.with_suffix(".part")
    part.write_bytes(PREFIX.pack(MAGIC, FORMAT_VERSION, best, digest) + packed[best])
    part.replace(path)
    sizes = {row[0]: len(blob) for row, blob in zip(rows, blobs, strict=True)}
    return export_event(path, compressors()[best][0], sizes)


def export_event(path: Path, compressor: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Sizes on disk, in bytes. Raises RunFailed over the limit, naming the largest tensors."""
    code, model = Path(__file__).stat().st_size, path.stat().st_size
    check_size(code + model, sizes, "the artifact")
    return {
        "event": "export", "code_bytes": code, "model_bytes": model, "total_bytes": code + model,
        "limit_bytes": ARTIFACT_LIMIT_BYTES, "compressor": compressor,
    }  # fmt: skip


def check_size(total: int, sizes: dict[str, float], what: str) -> None:
    """Raises RunFailed if `total` bytes are over the limit."""
    if total > ARTIFACT_LIMIT_BYTES:
        largest = sorted(sizes, key=lambda n: -sizes[n])[:4]
        raise RunFailed(
            f"{what} has {total:,} bytes, {total - ARTIFACT_LIMIT_BYTES:,} over the limit of "
            f"{ARTIFACT_LIMIT_BYTES:,}; largest tensors before compression: "
            + ", ".join(f"{n} {sizes[n]:,.0f}" for n in largest)
            + ". Lower NUM_LAYERS, MODEL_DIM, MLP_MULT, ENGRAM_HASH_SIZE or WEIGHT_BITS"
        )


def estimate_bytes(params: Arrays, groups: dict[str, Group], cfg: Knobs) -> int:
    """Bytes of script + artifact if every tensor were Gaussian noise; RunFailed over the limit."""

    def size(name: str, p: mx.array) -> float:
        bits = groups[name].bits
        return p.size * NOISE_BYTES[getattr(cfg, bits)] + 2 * p.shape[0] if bits else 4 * p.size

    sizes = {name: size(name, p) for name, p in params.items()}
    total = int(sum(sizes.values())) + Path(__file__).stat().st_size
    check_size(total, sizes, "by estimate, the artifact")
    return total


def read_artifact(path: Path) -> tuple[dict[str, Any], Tokens, Arrays]:
    """(header, tokenizer facts, weights) of an artifact. Raises UserError naming what is wrong."""
    if not path.is_file():
        raise UserError(f"EVAL_ONLY={path}: no such file")
    blob = path.read_bytes()
    if len(blob) < PREFIX.size or blob[: len(MAGIC)] != MAGIC:
        raise UserError(f"{path}: not an artifact of this script")
    _, version, number, digest = PREFIX.unpack_from(blob)
    body = blob[PREFIX.size :]
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}; this script reads {FORMAT_VERSION}")
    if checksum(version, number, body) != digest:
        raise UserError(f"{path}: cut short or altered (its checksum does not fit): copy it again")
    raw = compressors()[number][2](body)
    (length,) = struct.unpack_from("<I", raw)
    header = json.loads(raw[4 : 4 + length])
    if not set(header["knobs"]) <= {field.name for field in dataclasses.fields(Knobs)}:
        raise UserError(f"{path}: made by another version of the script: use that one")
    facts, at = header["tokenizer"], 4 + length
    sizes = np.frombuffer(raw, "<u2", facts["vocab"], at)
    flags = np.frombuffer(raw, np.uint8, facts["vocab"], at + 2 * facts["vocab"])
    dummy, sha = facts["dummy_prefix"], facts["sha256"]
    tokens = Tokens(sizes, (flags & 1) > 0, (flags & 2) > 0, facts["bos"], dummy, sha)
    return header, tokens, unpack_tensors(header["tensors"], raw[at + 3 * facts["vocab"] :])


# ==================================================================================================
# EVALUATION: each position scored exactly once
# ==================================================================================================


def windows(targets: int, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, last): input starts at `start`, targets first..last-1 are scored by it.

    Targets are numbered from 0; target i is token i + 1 and follows input i. Each is scored once,
    in order, with at least seq_len - stride tokens before it wherever the text has them.
    """
    yield 0, 0, min(seq_len, targets)
    for first in range(seq_len, targets, stride):
        yield first + stride - seq_len, first, min(first + stride, targets)


def net_stream(
    model: GPT, params: Arrays, text: Any, shape: tuple[int, int, int], workers: Workers
) -> Iterator[tuple[int, Any]]:
    """The net's log-distributions of the text's targets, in text order.

    text (n,) int32; shape: tokens a window, stride, windows a batch. Yields (first target, (m, V)
    float32 NumPy nats); the parts cover targets 0 .. n-2 once. A context model takes its place as a
    stage that consumes this stream and yields its own. Every batch has the same shape (the text's
    end is padded on the right, where a causal net does not look), and only scored positions reach
    the vocabulary head.
    """
    seq_len, stride, batch = shape
    mx.eval(params)
    model.update(tree_unflatten(list(params.items())))
    forward = model.log_probs if on_cpu() else mx.compile(model.log_probs, inputs=model.state)
    padded = np.concatenate([text, np.full(seq_len + stride, max(model.bos, 0), np.int32)])
    every = list(windows(len(text) - 1, seq_len, stride))
    groups = [every[:1]] if stride < seq_len else []
    rest = every[len(groups) :]
    batch = min(batch, max(len(rest), 1))
    groups += [rest[i : i + batch] for i in range(0, len(rest), batch)]
    for index, group in enumerate(groups):
        last = seq_len if index == 0 and stride < seq_len else stride
        rows = np.stack([padded[s : s + seq_len] for s, _, _ in group])
        rows = np.pad(rows, [(0, batch - len(rows)), (0, 0)]) if len(group) > 1 else rows
        shares = np.array_split(rows, min(workers.count, len(rows)))
        parts = workers.map(forward, [(mx.array(share), last) for share in shares])
        out = np.concatenate([np.array(p) for p in parts])
        for (_, first, end), logs in zip(group, out, strict=False):
            yield first, logs[: end - first]


def bits_per_byte(nats: float, byte_count: int) -> float:
    """Code length in nats over the decoded text's UTF-8 length -> bits per byte."""
    return nats / math.log(2) / byte_count


Progress = Callable[[int, int, float], None]  # tokens done, tokens in all, BPB so far


def score(
    stream: Iterator[tuple[int, Any]], text: Any, tokens: Tokens, show: Progress
) -> dict[str, Any]:
    """Consume a stream of log-distributions; returns loss (nats/token), BPB and the counts.

    Raises AssertionError unless the stream covers every target exactly once, in order.
    """
    nats, byte_count, done = 0.0, 0, 0
    for first, logs in stream:
        if first != done:
            raise AssertionError(f"target {done} was to be scored, the stream gave {first}")
        target = text[first + 1 : first + 1 + len(logs)]
        nats -= float(logs[np.arange(len(logs)), target].astype(np.float64).sum())
        byte_count += int(tokens.bytes_of(text[first : first + len(logs)], target).sum())
        done += len(logs)
        show(done, len(text) - 1, bits_per_byte(nats, max(byte_count, 1)))
    if done != len(text) - 1:
        raise AssertionError(f"scored {done} of {len(text) - 1} targets")
    if not (byte_count and math.isfinite(nats)):
        raise RunFailed(f"no score: {nats} nats over {byte_count} bytes of validation text")
    bpb = bits_per_byte(nats, byte_count)
    return {"val_loss": nats / done, "val_bpb": bpb, "val_tokens": done, "val_bytes": byte_count}


# ==================================================================================================
# REPORT: an event is a dict; metrics.jsonl and the text lines are both made from it
# ==================================================================================================


class Report:
    """The run's folder: train.log (the script's source, then the lines) and metrics.jsonl."""

    def __init__(self, cfg: Knobs) -> None:
        name = cfg.run_id or time.strftime("%Y%m%d-%H%M%S") + f"-{cfg.seed}-{os.getpid()}"
        self.folder, self.iterations = Path(cfg.out_dir) / name, cfg.iterations
        if self.folder.exists() and not cfg.resume:
            raise UserError(f"RUN_ID={name}: {self.folder} exists and is never overwritten: "
                            "choose another RUN_ID, or go on with RESUME=1")  # fmt: skip
        self.checkpoint = self.folder / "checkpoint" / "state.safetensors"
        if cfg.resume and not self.checkpoint.is_file():
            raise UserError(f"RESUME=1: there is no {self.checkpoint}: unset RESUME")
        try:
            self.folder.mkdir(parents=True, exist_ok=cfg.resume)
        except OSError as error:
            raise UserError(f"OUT_DIR={cfg.out_dir}: {error.strerror}") from None
        if not cfg.resume:
            source = Path(__file__).read_text()
            (self.folder / "train.log").write_text(f"{source}\n{'=' * 100}\n")

    def line(self, text: str) -> None:
        """A line on the screen and in train.log."""
        print(text, flush=True)
        with open(self.folder / "train.log", "a") as log:
            log.write(text + "\n")

    def event(self, event: dict[str, Any], *lines: str) -> None:
        """A JSON object in metrics.jsonl, and its lines with the event's values filled in."""
        with open(self.folder / "metrics.jsonl", "a") as log:
            log.write(json.dumps(event) + "\n")
        for text in lines:
            self.line(text.format(**event, n=self.iterations, part=part_of_text(event)))

    def progress(self, label: str, every_s: float = 10.0) -> Progress:
        """Shows a running BPB: a bar on terminals, a line every few seconds elsewhere."""
        from tqdm import tqdm

        begin = last = time.perf_counter()
        bar = tqdm(desc=label, unit="tok", unit_scale=True, leave=False, disable=None)

        def show(done: int, total: int, bpb: float) -> None:
            nonlocal last
            bar.total = total
            bar.set_postfix_str(f"bpb {bpb:.4f}", refresh=False)
            bar.update(done - bar.n)
            now = time.perf_counter()
            if bar.disable and (now - last > every_s or (last == begin and now - begin > 1)):
                last, left = now, (now - begin) * (total - done) / done
                print(
                    f"{label}: {done}/{total} tokens, bpb {bpb:.4f}, {left:.0f} s left", flush=True
                )
            if done == total:
                bar.close()

        return show


TRAIN_LINE = (
    "step:{step}/{n} train_loss:{train_loss:.4f} train_time:{train_time_ms:.0f}ms "
    "step_avg:{step_avg_ms:.2f}ms tok_s:{tok_s:.0f}"
)
VAL_LINE = "step:{step}/{n} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}{part}"
EXPORT_LINE = (
    "serialized_int6_zstd:{model_bytes} bytes ({compressor}; code:{code_bytes} "
    "total:{total_bytes} limit:{limit_bytes})"
)
ROUNDTRIP_LINES = (
    "final_int6_zstd_roundtrip val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} "
    "eval_time:{eval_time_ms:.0f}ms{part} [{mode}]",
    "final_int6_zstd_roundtrip_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}{part} [{mode}]",
)
CONFIG_LINES = (
    "machine: {machine}, MLX {mlx_version}, {dtype_used}, {workers_used} worker(s), "
    "{gflops:.0f} GFLOP/s; BLAS: {blas_used}",
    "preset {preset}: {num_layers} layers x {model_dim}, {num_heads} heads, {num_kv_heads} KV "
    "heads, MLP {mlp_mult}x, seq {train_seq_len}, {train_batch_tokens} tokens a step",
)
FINAL_LINE = (
    "val_bpb {val_bpb:.4f} on {val_tokens:,} tokens, {val_bytes:,} bytes{part}; {total_bytes:,} "
    "bytes of script and artifact; trained on {train_tokens:,} tokens in {train_seconds:.0f} s; "
    "evaluated in {eval_seconds:.0f} s"
)


def part_of_text(event: dict[str, Any]) -> str:
    """A label for scores of less than the whole validation split."""
    whole = event.get("val_whole", True)
    return "" if whole else f" (PART of the text: {event['val_tokens']} tokens)"


# ==================================================================================================
# MAIN
# ==================================================================================================


@dataclass
class Validation:
    """The validation text and how to score a set of weights on it."""

    cfg: Knobs
    model: GPT
    tokens: Tokens
    paths: list[Path]
    report: Report
    workers: Workers

    def __post_init__(self) -> None:
        limit, manifest = self.cfg.val_max_tokens, self.paths[0].parent / "manifest.json"
        made_by = read_manifest(manifest).get("tokenizer_sha256", self.tokens.sha256)
        if made_by != self.tokens.sha256:
            raise UserError(f"{manifest}: these shards were made by another tokenizer: choose the "
                            "DATA_PATH and TOKENIZER_PATH that belong together")  # fmt: skip
        self.text, self.whole = load_validation(self.paths, self.tokens, limit)

    def run(self, params: Arrays, mode: str, batch: int) -> dict[str, Any]:
        """Score in 'standard' (stride = window) or 'sliding' mode, `batch` windows at once."""
        begin, length = time.perf_counter(), eval_length(self.cfg)
        stride = length if mode == "standard" else min(self.cfg.eval_stride, length)
        stream = net_stream(self.model, params, self.text, (length, stride, batch), self.workers)
        label = f"eval {mode}" if self.whole else f"eval {mode} (PART of the text)"
        result = score(stream, self.text, self.tokens, self.report.progress(label))
        seconds = time.perf_counter() - begin
        return {"mode": mode, **result, "val_whole": self.whole, "eval_time_ms": 1000 * seconds}

    def during_training(self, trainer: Trainer) -> None:
        """Score and log the averaged weights, at stride = window."""
        batch = max(self.cfg.val_batch_size // eval_length(self.cfg), 1)
        result = self.run(trainer.average, "standard", batch)
        self.report.event({"event": "val", "step": trainer.step, **result}, VAL_LINE)


def gigaflops(workers: Workers) -> float:
    """GFLOP/s of a 768-cube float32 matrix product in each worker at once."""
    a = mx.random.normal((768, 768))
    for _ in range(2):  # the first touches memory
        mx.eval(a)
        begin = time.perf_counter()
        mx.eval(workers.map(mx.matmul, [(a, a)] * workers.count))
    return workers.count * 2 * 768**3 / (time.perf_counter() - begin) / 1e9


def describe_machine(cfg: Knobs, workers: Workers) -> dict[str, Any]:
    """Facts of the machine for the config event."""
    machine = f"{platform.system()} {platform.machine()} {'cpu' if on_cpu() else 'gpu'}"
    return {
        "machine": machine, "mlx_version": mx.__version__, "dtype_used": compute_dtype(cfg),
        "blas_used": BLAS_NAME if on_cpu() else "not used", "workers_used": workers.count,
        "gflops": gigaflops(workers),
    }  # fmt: skip


def describe_training(trainer: Trainer, validation: Validation) -> Iterator[str]:
    """Lines: parameters by group, the data, the artifact's size by estimate."""
    cfg, data = trainer.cfg, trainer.data
    yield f"parameters: {sum(p.size for p in trainer.params.values()):,}"
    for group in GROUPS:
        sizes = [p.size for n, p in trainer.params.items() if trainer.groups[n] is group]
        bits = f"{getattr(cfg, group.bits)} bits" if group.bits else "float32"
        if sizes:
            yield (f"  {group.name}: {len(sizes)} tensors, {sum(sizes):,} parameters, "
                   f"{group.optimizer}, lr {getattr(cfg, group.lr)}, stored in {bits}")  # fmt: skip
    size = estimate_bytes(trainer.params, trainer.groups, cfg)
    yield f"train: {data.tokens:,} tokens in {len(data.shards)} shard(s)"
    part = "" if validation.whole else " (PART of the text)"
    yield f"validation: {len(validation.text):,} tokens in {len(validation.paths)} shard(s){part}"
    yield f"script and artifact: about {size:,} of {ARTIFACT_LIMIT_BYTES:,} bytes, by estimate"


def peak_memory() -> int:
    """Bytes at most: MLX's on a GPU, the process's on a CPU."""
    if not on_cpu():
        return mx.get_peak_memory()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def train_and_export(
    cfg: Knobs, folder: Path, tokenizer: Path, report: Report, workers: Workers
) -> dict[str, Any]:
    """Train, keep the raw weights, write the artifact; returns its sizes and what was trained."""
    tokens = load_tokenizer(tokenizer)
    if cfg.vocab_size not in (0, tokens.vocab):
        raise UserError(f"VOCAB_SIZE={cfg.vocab_size}, but {tokenizer} has {tokens.vocab} pieces: "
                        "unset VOCAB_SIZE or choose the other tokenizer")  # fmt: skip
    data = TrainWindows(find_shards(folder, "train"), cfg.train_seq_len, cfg.seed, tokens.vocab)
    model = GPT(cfg, tokens.vocab, tokens.bos)
    paths = find_shards(folder, "val")
    validation = Validation(cfg, model, tokens, paths, report, workers)
    trainer = Trainer(model, cfg, data, report, workers)
    for line in describe_training(trainer, validation):
        report.line(line)
    if cfg.resume:
        trainer.load()
    trainer.warm_up()
    train(trainer, validation)
    validation.during_training(trainer)
    meta = {"knobs": json.dumps(dataclasses.asdict(cfg)), "tokenizer_sha256": tokens.sha256}
    mx.save_safetensors(str(report.folder / "model.safetensors"), trainer.average, meta)
    path = report.folder / "artifact.bin"
    export = write_artifact(path, trainer.average, trainer.groups, cfg, tokens)
    report.event({**export, "tokenizer_bytes": tokenizer.stat().st_size}, EXPORT_LINE)
    trained = trainer.step * trainer.windows * cfg.train_seq_len
    return {**export, "train_steps": trainer.step, "train_tokens": trained,
            "train_seconds": trainer.elapsed_s}  # fmt: skip


def score_artifact(
    path: Path, cfg: Knobs, folder: Path, report: Report, workers: Workers
) -> dict[str, Any]:
    """Reload an artifact from disk, score it in every mode asked for; returns the last score."""
    header, tokens, params = read_artifact(path)
    made_with = Knobs(**header["knobs"])
    fields = [field.name for field in dataclasses.fields(Knobs)]
    for name in fields[fields.index("num_layers") : fields.index("tied_embed_lr")]:
        if getattr(made_with, name) != getattr(cfg, name):
            raise UserError(f"{name.upper()}={getattr(cfg, name)}: {path} has "
                            f"{getattr(made_with, name)}: unset it")  # fmt: skip
    model = GPT(dataclasses.replace(cfg, use_ortho_init=False), tokens.vocab, tokens.bos)
    if {n: a.shape for n, a in tree_flatten(model.parameters())} != {
        n: a.shape for n, a in params.items()
    }:
        raise UserError(f"{path}: its tensors do not fit its settings: made by another version?")
    validation = Validation(cfg, model, tokens, find_shards(folder, "val"), report, workers)
    for mode in ("standard", "sliding") if cfg.eval_mode == "both" else (cfg.eval_mode,):
        result = validation.run(params, mode, cfg.eval_batch_seqs)
        report.event({"event": "eval", **result}, *ROUNDTRIP_LINES)
    return result


def main(cfg: Knobs, warnings: list[str]) -> None:
    """Train, export, reload, score; or with EVAL_ONLY the last two."""
    if cfg.device != "auto":
        device = mx.cpu if cfg.device == "cpu" else mx.gpu
        if not mx.is_available(device):
            raise UserError("DEVICE=gpu: this MLX has none; on Linux: pip install 'mlx[cuda13]'")
        mx.set_default_device(device)
    artifact = Path(cfg.eval_only)
    if cfg.eval_only:
        cfg, warnings = knobs_from_env(dict(os.environ), base=read_artifact(artifact)[0]["knobs"])
    folder, tokenizer, where = locate_data(cfg)
    report = Report(cfg)
    with make_workers(cfg) as workers:
        machine = describe_machine(cfg, workers)
        if on_cpu() and not MLX_COMPILES:
            warnings = [*warnings, "no g++: MLX's CPU kernels run uncompiled, which is slower"]
        for line in [*(f"warning: {w}" for w in warnings), where]:
            report.line(line)
        report.event({"event": "config", **dataclasses.asdict(cfg), **machine}, *CONFIG_LINES)
        if cfg.eval_only:
            made = {**export_event(artifact, "", {}), "train_steps": 0, "train_tokens": 0,
                    "train_seconds": 0.0}  # fmt: skip
        else:
            made = train_and_export(cfg, folder, tokenizer, report, workers)
            artifact = report.folder / "artifact.bin"
        result = score_artifact(artifact, cfg, folder, report, workers)
    final = {
        **made, **result, "event": "final", "val_bpb_net": result["val_bpb"],
        "eval_seconds": result["eval_time_ms"] / 1000, "peak_memory_bytes": peak_memory(),
        "tok_s": made["train_tokens"] / max(made["train_seconds"], 1e-9),
        "device": machine["machine"], "mlx_version": mx.__version__, "audit": "off",
    }  # fmt: skip
    report.event(final, FINAL_LINE)
    report.line(f"everything is in {report.folder}")


if __name__ == "__main__":
    try:
        main(CFG, CFG_WARNINGS)
    except UserError as error:
        exit_with(error)
    except KeyboardInterrupt:
        exit_with(RunFailed("interrupted"))
