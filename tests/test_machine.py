"""Machines: GPU code paths on the CPU, containers, caches that are damaged, and the doctor."""

import os
import re
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from test_cli import CLEAN, NET, SCRIPT, TINY, dataset, edited, error_of, final, run
from test_kernels import close, normal

import train_gpt_mlx_kl as t

__all__ = ["dataset"]  # a fixture


@pytest.fixture
def home(tmp_path):
    """A folder to run in."""
    return tmp_path


@pytest.fixture
def env(dataset):
    """Settings of the tiny run."""
    return {**TINY, "DATA_PATH": dataset.path}


# --------------------------------------------------------------------------------------------------
# What GPUs compute


def test_the_whole_chain_on_a_gpus_code_path(home, env):
    """Compiled steps in bfloat16, MLX's own kernels, batches scored ahead: near float32's score."""
    script = edited(home / "script", "def on_cpu():\n    return False\n")
    env |= {"ITERATIONS": 12, "XSA_LAST_N": 1, "WORKERS": 1}
    narrow = run(home, "narrow", sys.executable, script, **env)
    wide = run(home, "wide", **env)
    assert final(narrow)["audit"] == final(wide)["audit"] == "pass"
    config = next(e for e in narrow.events if e["event"] == "config")
    assert config["dtype_used"] == "bfloat16" and config["machine"].endswith("gpu")
    assert "decoded from" in narrow.out
    for name in ("val_bpb", "val_bpb_net", "val_bpb_context"):
        assert final(narrow)[name] == pytest.approx(final(wide)[name], abs=0.03), name
    assert final(narrow)["val_bpb_net"] != final(wide)["val_bpb_net"]


@pytest.mark.skipif(not mx.is_available(mx.gpu), reason="this machine has no GPU that MLX knows")
def test_a_real_gpu(home, env):
    result = run(home, "gpu", **{**env, "DEVICE": "gpu"})
    assert final(result)["audit"] == "pass"


@pytest.mark.parametrize("length", [20, 64, 200])
def test_attention_in_blocks_is_attention(length, rng, monkeypatch):
    """As trained on Metal: outputs and gradients of the four blocks are those of the whole."""
    q, k, v = (normal(rng, 2, heads, length, 8) for heads in (4, 2, 2))
    weight = normal(rng, 2, 4, length, 8)
    monkeypatch.setattr(t, "on_cpu", lambda: False)
    found = []
    for metal in (False, True):
        monkeypatch.setattr(t, "on_metal", lambda metal=metal: metal)
        calls = []
        whole = mx.fast.scaled_dot_product_attention
        monkeypatch.setattr(
            t.mx.fast,
            "scaled_dot_product_attention",
            lambda q, *a, whole=whole, calls=calls, **k: (
                calls.append(q.shape[2]) or whole(q, *a, **k)
            ),
        )
        loss = lambda q, k, v: mx.sum(weight * t.causal_attention(q, k, v, 0.3, True))  # noqa: E731
        found.append((t.causal_attention(q, k, v, 0.3, True), *mx.grad(loss, (0, 1, 2))(q, k, v)))
        assert (len(calls) > 2) == (metal and length > 32), calls
        monkeypatch.undo()
        monkeypatch.setattr(t, "on_cpu", lambda: False)
    for whole, blocks in zip(*found, strict=True):
        close(blocks, whole, 1e-5)


@pytest.mark.parametrize("gain", [(16,), (4, 1, 1), (16,)])
def test_gains_of_narrow_numbers_have_wide_gradients(gain, rng):
    """Against float32; a sum of 8,192 numbers in bfloat16 would stop at 256 of its steps."""
    x = mx.abs(normal(rng, 2, 4, 1024, 16)).astype(mx.bfloat16)
    g = normal(rng, *gain)
    loss = lambda x, g: mx.sum(t.scaled(x, g).astype(mx.float32))  # noqa: E731
    narrow = mx.grad(loss, (0, 1))(x, g)
    wide = mx.grad(loss, (0, 1))(x.astype(mx.float32), g)
    assert narrow[0].dtype == mx.bfloat16 and narrow[1].dtype == mx.float32
    close(narrow[0].astype(mx.float32), wide[0], 0.01)
    close(narrow[1], wide[1], 1e-3)


def test_rows_are_summed_in_float32(rng):
    x = mx.full((3, 4096), 1.0).astype(mx.bfloat16)
    assert t.row_sum(x).tolist() == [[4096.0]] * 3 and t.row_sum(x).dtype == mx.float32


# --------------------------------------------------------------------------------------------------
# Containers, memory


def test_a_containers_limits_are_seen(tmp_path, monkeypatch):
    """Both generations of control groups; one and a half cores are two."""
    cores, memory = t.cpu_cores(), t.memory_limit()
    real = t.Path
    own = tmp_path / "cgroup"

    def elsewhere(path, *more):
        path = str(path)
        if path == "/proc/self/cgroup":
            return own
        return real(path.replace("/sys/fs/cgroup", str(tmp_path / "sys")), *more)

    monkeypatch.setattr(t, "Path", elsewhere)
    monkeypatch.setattr(t.os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert t.cpu_cores() == 8
    for name, text in {"new/cpu.max": "150000 100000", "new/memory.max": "1000000"}.items():
        (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / name).write_text(text + "\n")
    own.write_text("0::/new\n")
    assert (t.cpu_cores(), t.memory_limit()) == (2, 1_000_000)
    own.write_text("3:cpu:/old\n2:memory:/old\n0::/\n")
    for name, text in {"cpu/old/cpu.cfs_quota_us": "100000", "cpu/old/cpu.cfs_period_us": "100000",
                       "memory/old/memory.limit_in_bytes": "2000000"}.items():  # fmt: skip
        (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / name).write_text(text + "\n")
    assert (t.cpu_cores(), t.memory_limit()) == (1, 2_000_000)
    (tmp_path / "sys/cpu/old/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "sys/memory/old/memory.limit_in_bytes").write_text("9223372036854771712\n")
    monkeypatch.setattr(t.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    assert (t.cpu_cores(), t.memory_limit()) == (cores, t.memory_limit())
    monkeypatch.undo()
    assert memory == t.memory_limit()


def test_settings_fit_a_small_machine(monkeypatch):
    """8 GB, of which a GPU recommends two thirds; what the user sets stays."""
    # A net whose microbatch has to be halved.
    shape = {"NUM_LAYERS": "9", "MODEL_DIM": "512", "NUM_HEADS": "8", "NUM_KV_HEADS": "4"}
    cfg = t.knobs_from_env({"PRESET": "mac", **shape})[0]
    monkeypatch.setattr(t, "memory_limit", lambda: 5_300_000_000)
    monkeypatch.setattr(t, "on_cpu", lambda: False)
    fitted, lines = t.fit_memory(cfg, 1024, {}, 10**8)
    assert fitted.mixer_memory_mb == 5_300_000_000 // 3 >> 20 and "MIXER_MEMORY_MB=1684" in lines[0]
    assert t.activation_bytes(fitted, 1024, fitted.mlx_max_microbatch_tokens) <= 5_300_000_000 // 3
    assert fitted.mlx_max_microbatch_tokens == 4096 and "MICROBATCH_TOKENS=4096" in lines[1]
    own = {"MIXER_MEMORY_MB": "1950", "MLX_MAX_MICROBATCH_TOKENS": "8192"}
    set_by_hand = t.dataclasses.replace(cfg, mixer_memory_mb=1950)
    assert t.fit_memory(set_by_hand, 1024, own, 10**8) == (set_by_hand, [])
    monkeypatch.setattr(t, "memory_limit", lambda: 64 << 30)
    assert t.fit_memory(cfg, 1024, {}, 10**8) == (cfg, [])


def test_tables_are_as_large_as_the_text_needs(monkeypatch):
    """A quarter of a GiB for each million tokens that may be packed, and three quarters more, per
    tree."""
    monkeypatch.setattr(t, "memory_limit", lambda: 64 << 30)
    for tokens, env, want in (
        (10**6, {}, 3000), (10**7, {"PACK_TEXT_BYTES": "1000000"}, 3750), (10**8, {}, 8000),
        (10**8, {"PACK_TEXT_BYTES": "0"}, 2250), (10**6, {"MIXER_MEMORY_MB": "99"}, 99),
        (10**7, {"MIXER_SIZE": "medium"}, 3250),
        (10**6, {"MIXER": "off"}, 3000),  # runs with and without a mixer differ in MIXER alone
    ):  # fmt: skip
        cfg = t.knobs_from_env({"PRESET": "mac", **env})[0]
        assert t.fit_memory(cfg, 1024, env, tokens)[0].mixer_memory_mb == want


# --------------------------------------------------------------------------------------------------
# Caches


def imported(home, lines, **env):
    """The output of a process that has imported a copy of the script and then runs `lines`."""
    script = home / "copy" / SCRIPT.name
    if not script.is_file():
        script.parent.mkdir()
        script.write_bytes(SCRIPT.read_bytes())
    code = f"import numpy as np; import {SCRIPT.stem} as t; {lines}"
    done = subprocess.run([sys.executable, "-c", code], cwd=script.parent, text=True,
                          capture_output=True, env=CLEAN | env)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


KERNEL = "print('hash', t.mix_hash(np.uint64(1), 2))"


def test_a_damaged_kernel_cache_is_made_anew(home):
    true = f"hash {int(t.mix_hash(np.uint64(1), 2))}"
    cache = home / "cache"
    env = {"NUMBA_CACHE_DIR": str(cache)}
    assert true in imported(home, KERNEL, **env)
    files = [path for path in cache.rglob("*") if path.suffix in (".nbi", ".nbc")]
    assert len(files) == 2
    for path, keep in ((path, keep) for path in files for keep in (0, 40)):
        os.truncate(path, keep)
        out = imported(home, KERNEL, **env)
        assert true in out and "cache is damaged" in out, (path, keep)
        assert imported(home, KERNEL, **env).strip() == true  # and is whole again


@pytest.mark.parametrize("fault", ["no place", "full"])
def test_no_place_for_kernels_is_a_line(fault, home):
    if fault == "no place":
        before = "from numba.core.caching import CacheImpl; CacheImpl._locator_classes = []; "
    else:
        before = ("from numba.core.caching import IndexDataCacheFile as F; "
                  "F.save = lambda *a: (_ for _ in ()).throw(OSError(28, 'full')); ")  # fmt: skip
    out = imported(home, before + KERNEL + "; " + KERNEL)
    assert out.count("hash ") == 2 and out.count("set NUMBA_CACHE_DIR") == 1


def temporary(fault, home):
    """A TMPDIR, and a PATH, with a fault."""
    folder, path = home / "tmp", os.environ["PATH"]
    folder.mkdir()
    if fault == "no folder":
        return home / "absent", path
    if "g++" in fault:
        (home / "bin").mkdir()
        broken = "exit 1" if fault == "no g++" else 'test "$1" = --version'
        (home / "bin" / "g++").write_text(f"#!/bin/sh\n{broken}\n")
        (home / "bin" / "g++").chmod(0o755)
        return folder, f"{home / 'bin'}:{path}"
    (folder / "mlx").write_text("a file")  # where MLX wants a folder: it is somebody else's
    return folder, path


@pytest.mark.skipif(sys.platform != "linux", reason="MLX compiles by g++ on Linux only")
@pytest.mark.parametrize("fault", ["no folder", "no g++", "a broken g++", "another's cache"])
def test_a_compiler_that_fails_is_a_line(fault, home, env):
    folder, path = temporary(fault, home)
    result = run(home, "slow", **{**env, **NET, "TMPDIR": folder, "PATH": path})
    assert (
        final(result)
        and "run uncompiled" in result.out
        and ("set TMPDIR" in result.out) == (fault != "no g++")
    )


@pytest.mark.skipif(sys.platform != "linux", reason="MLX compiles by g++ on Linux only")
def test_a_half_written_library_is_compiled_anew(home, env):
    folder = home / "tmp"
    folder.mkdir()
    env |= {**NET, "TMPDIR": folder, "ITERATIONS": 2}
    assert final(run(home, "first", **env))
    libraries = sorted(folder.rglob("*.so"))
    os.truncate(libraries[0], 200)
    os.truncate(libraries[-1], libraries[-1].stat().st_size - 1)
    for path in libraries:
        os.utime(path, (0, 0))  # nobody is writing it any more
    again = run(home, "again", **env)
    assert final(again) and again.out.count("was cut short") == 2
    assert "was cut short" not in run(home, "third", **env).out


# --------------------------------------------------------------------------------------------------
# The doctor


def test_the_doctor_says_what_is_there_and_what_is_amiss(home):
    sick = edited(home / "script", """
honest_sha = forward_sha256
forward_sha256 = lambda cfg: honest_sha(cfg) + ("" if __name__ == "__main__" else "x")
""")  # fmt: skip
    env = CLEAN | {"MODE": "doctor", "PRESET": "cpu", "MODEL_DIM": "48", "NUM_LAYERS": "2"}
    for script, word in ((SCRIPT, "nothing is amiss"), (sick, "amiss: the net's scores differ")):
        done = subprocess.run(
            [sys.executable, script], cwd=home, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert word in done.stdout, done.stdout
        for pattern in (r"Python \d", r"mlx \d", r"\d GFLOP/s", r"[\d,]+ tokens/s in training",
                        r"GB of memory", r"of 16,000,000 bytes", r"[\d.]+ minutes"):  # fmt: skip
            assert re.search(pattern, done.stdout), pattern
    assert not (home / "logs").exists()


def test_the_doctor_looks_at_a_copy_by_any_name(home):
    copy = home / "train-2.py"
    copy.write_bytes(SCRIPT.read_bytes())
    lines = """import importlib
t = importlib.import_module("train-2")
cfg = t.knobs_from_env(dict(t.os.environ))[0]
t.use_device(cfg)
print(t.in_another_process(cfg) == t.forward_sha256(cfg))"""
    done = subprocess.run([sys.executable, "-c", lines], cwd=home, env=CLEAN | TINY, text=True,
                          capture_output=True)  # fmt: skip
    assert done.stdout == "True\n", done.stderr


def test_modes_need_what_they_work_on(home, env):
    assert "MODE=score needs ARTIFACT" in error_of(run(home, "x", MODE="score", **env), 2)


def test_an_artifact_goes_by_two_names_and_by_its_folder(home, env):
    whole = run(home, "whole", **{**env, "MIXER": "off"})
    for i, settings in enumerate([{"MODE": "score", "ARTIFACT": whole.folder / "artifact.bin"},
                                  {"EVAL_ONLY": whole.folder}]):  # fmt: skip
        again = run(home, f"again-{i}", DATA_PATH=env["DATA_PATH"], DEVICE="cpu", **settings)
        assert final(again)["val_bpb"] == final(whole)["val_bpb"]
