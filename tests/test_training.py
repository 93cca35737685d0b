"""Steps, averaging, schedules and checkpoints against plain restatements."""

import itertools
import math
from collections import Counter, defaultdict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import made_up_text, tiny_knobs, write_shard

import train_gpt_mlx_kl as t


def arrays(tree) -> dict[str, np.ndarray]:
    return {name: np.array(a) for name, a in tree.items()}


def same(a, b) -> bool:
    """Whether two dicts of arrays are equal bit for bit."""
    a, b = arrays(a), arrays(b)
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


def close(a, b, tolerance: float) -> None:
    """Two dicts of arrays: each within `tolerance` times the largest magnitude in it."""
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    for name, expected in b.items():
        error = np.abs(a[name] - expected).max()
        assert error <= tolerance * max(np.abs(expected).max(), 1e-6), (name, error)


def first_gradients(trainer) -> dict[str, np.ndarray]:
    """The gradients that the first step put into the moments, which were 0."""
    out = {}
    for key, a in arrays(trainer.opt).items():
        kind, _, name = key.partition("/")
        if kind != "v":
            out[name] = a / (1 - trainer.cfg.beta1) if kind == "m" else a
    return out


def plain_gradients(trainer, params, weights) -> tuple[float, dict[str, mx.array]]:
    """(mean loss, gradients of the mean weighted loss) of step 0, in one piece."""
    rows = trainer.data.step(0, trainer.windows)
    x, y, w = mx.array(rows[:, :-1]), mx.array(rows[:, 1:]), mx.array(weights.astype(np.float32))

    def nll(p):
        trainer.model.update(t.tree_unflatten(list(p.items())))
        return trainer.model.nll(x, y)

    return mx.mean(nll(params)).item(), mx.grad(lambda p: mx.mean(w * nll(p)))(params)


def brute_force_weights(shards, rows, alpha) -> np.ndarray:
    """Complementary weights by counting pairs one at a time."""
    follows = defaultdict(Counter)
    for shard in shards:
        tokens = [int(token) for token in shard]
        for previous, token in itertools.pairwise(tokens):
            follows[previous][token] += 1
    weights = np.zeros((len(rows), len(rows[0]) - 1))
    for i, row in enumerate(np.asarray(rows).tolist()):
        for j in range(len(row) - 1):
            seen = follows[row[j]]
            p = seen[row[j + 1]] / seen.total() if seen else 0.0
            weights[i, j] = min(max(1 - alpha * p, 0.1), 1)
    return weights / weights.mean()


# --------------------------------------------------------------------------------------------------
# One step


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"GRAD_ACCUM_STEPS": 2},
        {"GRAD_ACCUM_STEPS": 8, "MLX_EAGER_EVAL": 0},
        {"MLX_MAX_MICROBATCH_TOKENS": 1},
        {"WORKERS": 2},
        {"WORKERS": 3, "MLX_MAX_MICROBATCH_TOKENS": 20},
        {"LOGIT_CHUNK_TOKENS": 7},
    ],
)
def test_a_step_has_the_gradients_of_the_whole_batch_however_it_is_cut(make_trainer, env):
    # 5 windows, so that pieces are of unequal size
    trainer = make_trainer(TRAIN_BATCH_TOKENS=85, COMPLEMENT_ALPHA=0.9, **env)
    rows = trainer.data.step(0, 5)
    weights = brute_force_weights([s[:] for s in trainer.data.shards], rows, 0.9)
    loss, grads = plain_gradients(trainer, trainer.params, weights)
    event = trainer.take_step()
    assert abs(event["train_loss"] - loss) < 1e-5
    close(first_gradients(trainer), grads, 1e-4)
    norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in arrays(grads).values()))
    assert abs(event["grad_norm"] / norm - 1) < 1e-4


@pytest.mark.parametrize("eager", [0, 1])
def test_microbatches_wait_for_each_other_only_if_eager(make_trainer, monkeypatch, eager):
    calls, evaluate = [], t.mx.eval
    monkeypatch.setattr(t.mx, "eval", lambda *arrays: calls.append(evaluate(*arrays)))
    trainer = make_trainer(TRAIN_BATCH_TOKENS=64, GRAD_ACCUM_STEPS=4, MLX_EAGER_EVAL=eager)
    calls.clear()
    trainer.gradients(quantised=False)
    assert len(calls) == 1 + 4 * eager  # the sums, and each microbatch


def test_the_cut_of_a_step_does_not_change_where_it_leads(make_trainer):
    whole = make_trainer(GRAD_CLIP_NORM=1)
    cuts = [make_trainer(GRAD_CLIP_NORM=1, **env) for env in (
        {"GRAD_ACCUM_STEPS": 4}, {"WORKERS": 2}, {"MLX_MAX_MICROBATCH_TOKENS": 16})]  # fmt: skip
    for _ in range(3):
        whole.take_step()
        for trainer in cuts:
            trainer.take_step()
    for trainer in cuts:
        close(trainer.opt, whole.opt, 5e-3)


def test_a_core_that_something_else_uses_changes_no_bit(make_trainer):
    """Text is packed beside the training, for as long as it takes."""
    alone, shared = make_trainer(WORKERS=3), make_trainer(WORKERS=3)
    for reserved in (0, 1, 3, 0):
        shared.workers.reserved = reserved
        loss = alone.take_step()["train_loss"]
        assert shared.take_step()["train_loss"] == loss
    for kind in ("params", "opt", "average"):
        assert same(getattr(shared, kind), getattr(alone, kind)), kind


class OneOf(t.Ranks):
    """A rank among others, which keeps its own part of what it would share with them."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count

    def mean(self, tree):
        return tree


@pytest.mark.parametrize("count", [2, 3])
def test_the_mean_over_ranks_is_the_whole_step(make_trainer, count):
    """7 windows: unlike parts, by unlike numbers of workers."""
    whole = make_trainer(TRAIN_BATCH_TOKENS=112)
    loss, _, (grads,) = whole.gradients(quantised=False)
    losses, parts = [], []
    for rank in range(count):
        trainer = make_trainer(TRAIN_BATCH_TOKENS=112, WORKERS=1 + rank)
        args = trainer.model, trainer.cfg, trainer.data, trainer.workers, OneOf(rank, count)
        one_loss, _, by_worker = t.Trainer(*args).gradients(quantised=False)
        losses.append(one_loss)
        parts.append({n: g for owned in by_worker for n, g in owned.items()})
    assert np.mean(losses) == pytest.approx(loss, rel=1e-6)
    close({n: sum(part[n] for part in parts) / count for n in grads}, grads, 1e-5)


@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_clipping_scales_the_whole_gradient(make_trainer, limit):
    free, clipped = make_trainer(), make_trainer(GRAD_CLIP_NORM=limit)
    norm = free.take_step()["grad_norm"]
    assert clipped.take_step()["grad_norm"] == pytest.approx(norm)
    factor = min(limit / norm, 1)
    expected = {n: g * factor for n, g in first_gradients(free).items()}
    close(first_gradients(clipped), expected, 1e-5)


def test_warm_up_leaves_no_trace(make_trainer):
    cold, warm = make_trainer(WARMUP_STEPS=0), make_trainer(WARMUP_STEPS=3)
    for trainer in (cold, warm):
        trainer.warm_up()
        assert (trainer.step, trainer.elapsed_s) == (0, 0.0)
        for _ in range(3):
            trainer.take_step()
    assert same(cold.params, warm.params)
    assert same(cold.opt, warm.opt)


def test_training_lowers_the_loss(make_trainer):
    trainer = make_trainer(ITERATIONS=60)
    losses = [trainer.take_step()["train_loss"] for _ in range(60)]
    assert abs(losses[0] - math.log(50)) < 0.05
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    assert trainer.finished()


# --------------------------------------------------------------------------------------------------
# Averaging and schedules


def test_ema_is_an_ema_from_its_start_on(make_trainer):
    trainer = make_trainer(ITERATIONS=8, EMA_DECAY=0.7, EMA_START_FRAC=0.5)
    for step in range(8):
        trainer.take_step()
        params = arrays(trainer.params)
        if step <= 4:  # averaging starts with the fifth step's weights
            mean = params
        # an EMA younger than its memory is the plain mean: 1/2, 1/3, then 0.3
        new = max(0.3, 1 / (step - 3)) if step >= 4 else 1
        mean = {n: (1 - new) * mean[n] + new * p for n, p in params.items()}
        close(trainer.average, mean, 1e-5)


def test_swa_is_the_mean_from_its_start_on(make_trainer):
    trainer = make_trainer(ITERATIONS=8, USE_SWA=1, EMA_START_FRAC=0.5, EMA_DECAY=0.7)
    seen = []
    for step in range(8):
        trainer.take_step()
        seen = (
            [arrays(trainer.params)] if step < 4 else [*seen[step == 4 :], arrays(trainer.params)]
        )
        close(trainer.average, {n: np.mean([p[n] for p in seen], axis=0) for n in seen[0]}, 1e-5)
    assert len(seen) == 4


def test_averaging_starts_anew_in_a_run_that_is_made_longer(make_trainer):
    trainer = make_trainer(ITERATIONS=8, EMA_DECAY=0.7, EMA_START_FRAC=0.5)
    for _ in range(7):
        trainer.take_step()
    assert not same(trainer.average, trainer.params)
    trainer.cfg = t.dataclasses.replace(trainer.cfg, iterations=100)
    trainer.take_step()
    close(trainer.average, trainer.params, 1e-6)


def test_without_averaging_the_average_is_the_weights(make_trainer):
    trainer = make_trainer(EMA_DECAY=0, EMA_START_FRAC=0)
    trainer.take_step()
    trainer.take_step()
    assert same(trainer.average, trainer.params)


STEPS = {"ITERATIONS": 100, "WARMDOWN_ITERS": 40}
CLOCK = {"ITERATIONS": 0, "MAX_WALLCLOCK_SECONDS": 100, "WARMDOWN_ITERS": 25}


@pytest.mark.parametrize(
    ("step", "elapsed", "env", "factor", "done"),
    [
        (0, 0, STEPS, 1, 0),
        (60, 9, STEPS, 1, 0.6),
        (70, 9, STEPS, 0.75, 0.7),
        (100, 9, STEPS, 0, 1),
        (0, 0, {"ITERATIONS": 10, "WARMDOWN_ITERS": 40, "WARMDOWN_FRAC": 0}, 0.25, 0),
        (5, 9, {"ITERATIONS": 10, "WARMDOWN_ITERS": 40}, 1, 0.5),
        (8, 9, {"ITERATIONS": 10, "WARMDOWN_ITERS": 40}, 0.4, 0.8),
        (8, 9, {"ITERATIONS": 10, "WARMDOWN_ITERS": 40, "WARMDOWN_FRAC": 0.25}, 0.8, 0.8),
        # 10 steps in 30 s: 33.3 in all, of which at most half
        (10, 30, {**CLOCK, "WARMDOWN_ITERS": 90}, 1, 0.3),
        (10, 75, {**CLOCK, "WARMDOWN_ITERS": 90}, 0.5, 0.75),
        (70, 9, {"ITERATIONS": 100, "WARMDOWN_ITERS": 0}, 1, 0.7),
        # 50 steps in 80 s: 20 s are 12.5 steps
        (50, 80, CLOCK, 0.5, 0.8),
        (50, 20, CLOCK, 1, 0.2),
        (50, 120, CLOCK, 0, 1),
        (0, 0, CLOCK, 1, 0),
        # whichever ends first
        (50, 80, {**CLOCK, "ITERATIONS": 55}, 0.2, 10 / 11),
        (50, 80, {**CLOCK, "ITERATIONS": 900}, 0.5, 0.8),
    ],
)
def test_learning_rate_and_progress(step, elapsed, env, factor, done):
    cfg = tiny_knobs(**env)
    assert t.lr_factor(step, elapsed, cfg) == pytest.approx(factor)
    assert t.progress(step, elapsed, cfg) == pytest.approx(done)


def test_momentum_warms_up_linearly():
    cfg = tiny_knobs(MUON_MOMENTUM_WARMUP_START=0.5, MUON_MOMENTUM=0.9,
                     MUON_MOMENTUM_WARMUP_STEPS=4)  # fmt: skip
    found = [t.momentum_at(step, cfg) for step in range(6)]
    assert found == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.9])
    cfg = tiny_knobs(MUON_MOMENTUM=0.9, MUON_MOMENTUM_WARMUP_STEPS=0)
    assert t.momentum_at(0, cfg) == 0.9


# --------------------------------------------------------------------------------------------------
# Complementary weights


@pytest.mark.parametrize(("vocab", "alpha"), [(50, 0), (50, 0.5), (50, 1), (8192, 1)])
def test_complementary_weights_equal_counting(tmp_path, rng, vocab, alpha):
    paths = []
    for i in range(2):
        tokens = np.minimum(rng.geometric(0.2, 900), 9) * (vocab // 9 - 1)
        paths.append(write_shard(tmp_path / f"x_train_{i}.bin", tokens))
    data = t.TrainWindows(paths, 16, 0, vocab)
    rows = data.step(0, 12)
    rows[0, :4] = vocab - 1, 0, vocab - 1, 0  # pairs that no shard holds
    table = t.bigram_probability(data)
    weights = t.complementary_weights(table[rows[:, :-1], rows[:, 1:]], alpha)
    assert weights.shape == (12, 16)
    assert abs(weights.mean(dtype=np.float64) - 1) < 1e-6
    expected = brute_force_weights([t.Shard(path)[:] for path in paths], rows, alpha)
    assert np.abs(weights - expected).max() < 1e-5
    assert (weights.std() > 0.02) == (alpha > 0)


# --------------------------------------------------------------------------------------------------
# Failures and checkpoints


def save(trainer, folder) -> Path:
    """Write the trainer's checkpoint."""
    keeper = t.Keeper(trainer, t.Report(folder, 0), trainer.data.fingerprint(), dict)
    with keeper.report:
        keeper.save()
    return t.checkpoint_files(folder)[0]


def resume(trainer, path) -> None:
    """Let the trainer go on from a checkpoint."""
    saved = t.read_checkpoint(path.parent.parent)
    list(t.resume(trainer, None, saved, trainer.data.fingerprint()))


def check_last_state(trainer, step: int, folder) -> None:
    """The checkpoint holds the trainer's state, all of it finite."""
    assert trainer.step == step
    saved = mx.load(str(save(trainer, folder)))
    kept = {n.removeprefix("params:"): a for n, a in saved.items() if n.startswith("params:")}
    assert same(kept, trainer.params)
    assert all(np.isfinite(a).all() for a in arrays(saved).values())


def test_a_checkpoint_of_other_text_is_refused(make_trainer, tmp_path):
    trainer = make_trainer()
    path = save(trainer, tmp_path)
    resume(make_trainer(), path)
    other = trainer.data.shards[1][:]
    trainer.data.shards[1] = other[::-1]  # as many tokens, but others
    with pytest.raises(t.UserError, match="training text"):
        resume(trainer, path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run_at_the_state_before(
    make_trainer, monkeypatch, tmp_path, bad
):
    trainer = make_trainer()
    trainer.take_step()
    before, opt = arrays(trainer.params), arrays(trainer.opt)
    whole = t.complementary_weights
    monkeypatch.setattr(t, "complementary_weights", lambda *a: whole(*a) * np.float32(bad))
    with pytest.raises(t.Diverged, match=r"step 2: loss [\d.]+, gradients that are not finite: \w"):
        trainer.take_step()
    check_last_state(trainer, 1, tmp_path)
    assert same(trainer.params, before)
    assert same(trainer.opt, opt)


# beyond what the knobs allow: the weights grow until a loss or a gradient overflows
@pytest.mark.parametrize("rate", [{"scalar_lr": 1e25}, {"tied_embed_lr": 1e38}])
def test_a_learning_rate_that_is_too_high_stops_the_run_with_finite_weights(
    make_trainer, tmp_path, rate
):
    trainer = make_trainer(ITERATIONS=50)
    trainer.cfg = t.dataclasses.replace(trainer.cfg, **rate)
    with pytest.raises(t.RunFailed, match="MATRIX_LR"):
        while not trainer.finished():
            trainer.take_step()
    check_last_state(trainer, trainer.step, tmp_path)


def test_a_net_that_forgets_what_it_has_learned_stops_the_run(make_trainer):
    """Its loss is finite, but higher than that of a net that knows nothing."""
    trainer = make_trainer()
    losses = [trainer.take_step()["train_loss"] for _ in range(3)]
    assert trainer.state()[1]["best_loss"] == min(losses) < math.log(50)
    good = trainer.params
    trainer.params = {n: p * -30 if n == "tok_emb" else p for n, p in good.items()}
    trainer.take_step()  # it had learned too little for its loss to be a surprise
    trainer.params = {n: p * -30 if n == "tok_emb" else p for n, p in good.items()}
    trainer.best_loss = math.log(50) - 1.1
    with pytest.raises(t.Diverged, match=r"step 5: loss \d.*knows nothing; it was 2.8120 once"):
        trainer.take_step()
    assert trainer.step == 4


@pytest.mark.parametrize("env", [{"WORKERS": 1}, {"WORKERS": 2, "USE_SWA": 1}])
def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, tmp_path, env):
    # 20 windows a step: the first epoch ends before the cut
    settings = {"ITERATIONS": 8, "WARMDOWN_ITERS": 5, "EMA_START_FRAC": 0.25}
    env = {"TRAIN_BATCH_TOKENS": 320, **settings, **env}
    whole = make_trainer(**env)
    events = [whole.take_step() for _ in range(8)]
    assert whole.data.windows < 4 * 20
    first = make_trainer(**env)
    for _ in range(4):
        first.take_step()
    second = make_trainer(**env)
    resume(second, save(first, tmp_path))
    second.warm_up()
    assert (second.step, second.averaged) == (4, first.averaged)
    assert second.elapsed_s == first.elapsed_s
    losses = [second.take_step()["train_loss"] for _ in range(4)]
    assert losses == [event["train_loss"] for event in events[4:]]
    for kind in ("params", "opt", "average"):
        assert same(getattr(second, kind), getattr(whole, kind)), kind


def test_other_settings_cannot_take_over_a_checkpoint(make_trainer, tmp_path):
    path = save(make_trainer(), tmp_path)
    resume(make_trainer(ITERATIONS=9, MAX_WALLCLOCK_SECONDS=7), path)
    with pytest.raises(t.UserError, match=r"EMA_DECAY was 0\.\d+, not 0\.5"):
        resume(make_trainer(EMA_DECAY=0.5), path)


def test_a_checkpoint_whose_text_is_packed_another_way_is_refused(
    make_trainer, tmp_path, monkeypatch
):
    path = save(make_trainer(), tmp_path)
    monkeypatch.setattr(t, "FORMAT_VERSION", t.FORMAT_VERSION + 1)
    with pytest.raises(t.UserError, match="packs text another way"):
        resume(make_trainer(), path)


def test_another_tokenizers_checkpoint_is_refused(make_trainer, tmp_path):
    trainer = make_trainer()
    path = save(trainer, tmp_path)
    other = t.GPT(trainer.cfg, 49, 1)
    args = other, trainer.cfg, trainer.data, trainer.workers, trainer.ranks
    with pytest.raises(t.UserError, match=r"params:\S+ \(49, "):
        resume(t.Trainer(*args), path)


DAMAGE = {
    "empty": lambda raw: b"",
    "no length": lambda raw: raw[:5],
    "cut header": lambda raw: raw[:500],
    "cut tensors": lambda raw: raw[:-1],
    "no JSON": lambda raw: raw[:8] + b"\0" * 40 + raw[48:],
    "no counters": lambda raw: raw.replace(b"counters", b"pointers"),
    "a counter short": lambda raw: raw.replace(b"elapsed_s", b"elapsed_t"),
    "a tensor short": lambda raw: raw.replace(b"opt:m/tok_emb", b"opt:m/tok_emc"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_one_line(make_trainer, tmp_path, damage):
    trainer = make_trainer()
    path = save(trainer, tmp_path)
    whole = path.read_bytes()
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    with pytest.raises(t.UserError) as raised:
        resume(trainer, path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    make_trainer, tmp_path, monkeypatch
):
    trainer = make_trainer()
    path = save(trainer, tmp_path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    trainer.take_step()

    def full_disk(file, *_):
        Path(file).write_bytes(b"half")
        raise RuntimeError("no space left")

    monkeypatch.setattr(t.mx, "save_safetensors", full_disk)
    with pytest.raises(t.RunFailed, match="no space"):
        save(trainer, tmp_path)
    again = make_trainer()
    resume(again, path)
    assert again.step == 0


# --------------------------------------------------------------------------------------------------
# Training on quantised weights


@pytest.mark.parametrize("env", [{}, {"ENGRAM_LITE_ENABLED": 0, "USE_GPTQ_LITE": 0}])
def test_quantised_training_uses_the_artifacts_weights_straight_through(make_trainer, env):
    # step 0 of 4 with a warm-down of 8 steps: the factor is 0.5
    settings = {"ITERATIONS": 4, "WARMDOWN_ITERS": 8, "WARMDOWN_FRAC": 0, "WEIGHT_BITS": 4,
                "EMBED_BITS": 4, **env}  # fmt: skip
    trainer = make_trainer(LATE_QAT_THRESHOLD=0.6, **settings)
    rng = np.random.default_rng(5)
    params = {n: p + mx.array(0.1 * rng.standard_normal(p.shape).astype(np.float32))
              for n, p in trainer.params.items()}  # fmt: skip
    trainer.params = params
    rows, blobs = t.pack_tensors(params, trainer.groups, trainer.cfg)
    stored = t.unpack_tensors(rows, b"".join(blobs))
    tokens = trainer.data.step(0, trainer.windows)
    weights = brute_force_weights([s[:] for s in trainer.data.shards], tokens, 0.5)
    quantised, grads = plain_gradients(trainer, stored, weights)
    plain, _ = plain_gradients(trainer, params, weights)
    assert abs(quantised - plain) > 1e-3
    assert abs(trainer.take_step()["train_loss"] - quantised) < 1e-5
    close(first_gradients(trainer), grads, 1e-4)

    above = make_trainer(LATE_QAT_THRESHOLD=0.5, **settings)
    above.params = params
    assert abs(above.take_step()["train_loss"] - plain) < 1e-5


# --------------------------------------------------------------------------------------------------
# Memory


def test_the_largest_microbatches_are_what_workers_hold(make_trainer):
    """15 windows, at most 2 per microbatch: 2 rounds of 4 workers hold less than all."""
    trainer = make_trainer(TRAIN_BATCH_TOKENS=240, WORKERS=4, MLX_MAX_MICROBATCH_TOKENS=32)
    rows = [row for part in trainer.microbatches for row in range(15)[part]]
    assert rows == list(range(15))
    assert trainer.largest_microbatches == [2] * 4
    assert trainer.tokens_per_step == 240
    few = make_trainer(TRAIN_BATCH_TOKENS=48, WORKERS=4)  # a worker without a window holds none
    assert few.largest_microbatches == [1] * 3


def test_the_doctor_estimates_for_the_workers_of_a_run(make_trainer, monkeypatch):
    """Its trial has a smaller step, which four workers share; a run's is for all 16 cores."""
    trainer, seen = make_trainer(), []
    changes = {"workers": 0, "train_seq_len": 16, "train_batch_tokens": 24 * 16}
    cfg = t.dataclasses.replace(trainer.cfg, **changes)
    monkeypatch.setattr(t, "cpu_cores", lambda: 16)
    monkeypatch.setattr(t, "estimate_memory", lambda *args: seen.append(args[2]) or {"net": 1})
    list(t.preset_needs(cfg, trainer, 1.0))
    assert seen == [[2] * 16]


def test_memory_by_estimate_grows_with_what_is_asked_for(make_trainer):
    trainer = make_trainer()
    cfg, params = trainer.cfg, trainer.params
    one = t.estimate_memory(params, cfg, [4], 1000)
    assert t.estimate_memory(params, cfg, [8], 1000)["net"] > one["net"]
    assert t.estimate_memory(params, cfg, [2, 2], 1000)["net"] > one["net"]
    more = t.dataclasses.replace(cfg, mixer_memory_mb=2 * cfg.mixer_memory_mb)
    assert t.estimate_memory(params, more, [4], 1000)["mixer"] > one["mixer"]
    backoff = t.dataclasses.replace(cfg, mixer="backoff")
    few, many = (t.estimate_memory(params, backoff, [4], n)["mixer"] for n in (1000, 2000))
    assert many > few


@pytest.mark.parametrize("clock, packed, said", [(9, 20, True), (0, 20, False), (9, -1, False)])
def test_a_clock_that_is_enough_for_more_text_is_said(make_trainer, clock, packed, said):
    env = {"MIXER": "logistic", "MAX_WALLCLOCK_SECONDS": clock, "PACK_TEXT_BYTES": packed}
    lines = list(t.describe_training(make_trainer(**env), made_up_text()))
    assert any("PACK_TEXT_BYTES=20: a clock of 9 s" in line for line in lines) == said
