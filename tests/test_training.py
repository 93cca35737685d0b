"""Steps, averaging, schedules, checkpoints and data order against plain restatements."""

import itertools
import math
from collections import Counter, defaultdict

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_knobs, write_shard

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
    weights = brute_force_weights(trainer.data.shards, rows, 0.9)
    loss, grads = plain_gradients(trainer, trainer.params, weights)
    event = trainer.advance()
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
    trainer.step_gradients(0, False)
    assert len(calls) == 1 + 4 * eager  # the sums, and each microbatch


def test_the_cut_of_a_step_does_not_change_where_it_leads(make_trainer):
    whole = make_trainer(GRAD_CLIP_NORM=1)
    cuts = [make_trainer(GRAD_CLIP_NORM=1, **env) for env in (
        {"GRAD_ACCUM_STEPS": 4}, {"WORKERS": 2}, {"MLX_MAX_MICROBATCH_TOKENS": 16})]  # fmt: skip
    for _ in range(3):
        whole.advance()
        for trainer in cuts:
            trainer.advance()
    for trainer in cuts:
        close(trainer.opt, whole.opt, 5e-3)


def test_a_core_that_something_else_uses_changes_no_bit(make_trainer):
    """Text is packed beside the training, for as long as it takes."""
    alone, shared = make_trainer(WORKERS=3), make_trainer(WORKERS=3)
    for reserved in (0, 1, 3, 0):
        shared.workers.reserved = reserved
        loss = alone.advance()["train_loss"]
        assert shared.advance()["train_loss"] == loss
    for kind in ("params", "opt", "average"):
        assert same(getattr(shared, kind), getattr(alone, kind)), kind


@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_clipping_scales_the_whole_gradient(make_trainer, limit):
    free, clipped = make_trainer(), make_trainer(GRAD_CLIP_NORM=limit)
    norm = free.advance()["grad_norm"]
    assert clipped.advance()["grad_norm"] == pytest.approx(norm)
    factor = min(limit / norm, 1)
    expected = {n: g * factor for n, g in first_gradients(free).items()}
    close(first_gradients(clipped), expected, 1e-5)


def test_warm_up_leaves_no_trace(make_trainer):
    cold, warm = make_trainer(WARMUP_STEPS=0), make_trainer(WARMUP_STEPS=3)
    for trainer in (cold, warm):
        trainer.warm_up()
        assert (trainer.step, trainer.elapsed_s) == (0, 0.0)
        for _ in range(3):
            trainer.advance()
    assert same(cold.params, warm.params)
    assert same(cold.opt, warm.opt)


def test_training_lowers_the_loss(make_trainer):
    trainer = make_trainer(ITERATIONS=60)
    losses = [trainer.advance()["train_loss"] for _ in range(60)]
    assert abs(losses[0] - math.log(50)) < 0.05
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    assert trainer.finished()


# --------------------------------------------------------------------------------------------------
# Averaging and schedules


def test_ema_is_an_ema_from_its_start_on(make_trainer):
    trainer = make_trainer(ITERATIONS=8, EMA_DECAY=0.7, EMA_START_FRAC=0.5)
    for step in range(8):
        trainer.advance()
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
        trainer.advance()
        seen = (
            [arrays(trainer.params)] if step < 4 else [*seen[step == 4 :], arrays(trainer.params)]
        )
        close(trainer.average, {n: np.mean([p[n] for p in seen], axis=0) for n in seen[0]}, 1e-5)
    assert len(seen) == 4


def test_without_averaging_the_average_is_the_weights(make_trainer):
    trainer = make_trainer(EMA_DECAY=0, EMA_START_FRAC=0)
    trainer.advance()
    trainer.advance()
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
        (0, 0, {"ITERATIONS": 10, "WARMDOWN_ITERS": 40}, 0.25, 0),
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
    expected = brute_force_weights([t.open_shard(path) for path in paths], rows, alpha)
    assert np.abs(weights - expected).max() < 1e-5
    assert (weights.std() > 0.02) == (alpha > 0)


def test_what_the_contexts_foresee_belongs_to_its_token(tmp_path):
    """Every token is its own place in the text."""
    paths = [write_shard(tmp_path / f"x_train_{i}.bin", range(900 * i, 900 * (i + 1)))
             for i in range(2)]  # fmt: skip
    data = t.TrainWindows(paths, 16, 0, 1800)
    data.foreseen = np.arange(1200, dtype=np.float16)  # exact below 2048; the rest is not packed
    for number in range(2 * data.windows // 10):
        targets = data.step(number, 10)[:, 1:]
        want = np.where(targets < 1200, targets, 0)
        assert (data.step_foreseen(number, 10) == want).all()


@pytest.mark.parametrize("by", ["bigram", "contexts"])
def test_loss_weights_follow_the_chosen_partner(make_trainer, by):
    trainer = make_trainer(COMPLEMENT_ALPHA=1, COMPLEMENT_BY=by)
    trainer.data.foreseen = np.full(trainer.data.tokens, 0.5, np.float16)
    trainer.data.foreseen[::2] = 0  # not packed
    tokens = trainer.data.step(3, trainer.windows)
    p = trainer.bigrams[tokens[:, :-1], tokens[:, 1:]]
    if by == "contexts":
        known = trainer.data.step_foreseen(3, trainer.windows)
        assert 0.4 < (known > 0).mean() < 0.6
        p = np.where(known > 0, 0.5, p)
    weights = np.clip(1 - p, 0.1, 1)
    np.testing.assert_allclose(trainer.loss_weights(tokens, 3), weights / weights.mean(), rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Failures and checkpoints


def check_last_state(trainer, step: int) -> None:
    """The checkpoint holds the trainer's state, all of it finite."""
    assert trainer.step == step
    trainer.save()
    saved = mx.load(str(trainer.report.folder / "checkpoint" / "state.safetensors"))
    kept = {n.removeprefix("params:"): a for n, a in saved.items() if n.startswith("params:")}
    assert same(kept, trainer.params)
    assert all(np.isfinite(a).all() for a in arrays(saved).values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run_at_the_state_before(
    make_trainer, monkeypatch, bad
):
    trainer = make_trainer()
    trainer.advance()
    before, opt = arrays(trainer.params), arrays(trainer.opt)
    whole = t.complementary_weights
    monkeypatch.setattr(t, "complementary_weights", lambda *a: whole(*a) * np.float32(bad))
    with pytest.raises(t.RunFailed, match=r"step 2: loss [\d.]+, gradient norm (nan|inf)"):
        trainer.advance()
    check_last_state(trainer, 1)
    assert same(trainer.params, before)
    assert same(trainer.opt, opt)


# beyond what the knobs allow: the weights grow until a loss or a gradient overflows
@pytest.mark.parametrize("rate", [{"scalar_lr": 1e25}, {"tied_embed_lr": 1e38}])
def test_a_learning_rate_that_is_too_high_stops_the_run_with_finite_weights(make_trainer, rate):
    trainer = make_trainer(ITERATIONS=50)
    trainer.cfg = t.dataclasses.replace(trainer.cfg, **rate)
    with pytest.raises(t.RunFailed, match="MATRIX_LR"):
        while not trainer.finished():
            trainer.advance()
    check_last_state(trainer, trainer.step)


@pytest.mark.parametrize("env", [{"WORKERS": 1}, {"WORKERS": 2, "USE_SWA": 1}])
def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, env):
    # 20 windows a step: the first epoch ends before the cut
    settings = {"ITERATIONS": 8, "WARMDOWN_ITERS": 5, "EMA_START_FRAC": 0.25}
    env = {"TRAIN_BATCH_TOKENS": 320, **settings, **env}
    whole = make_trainer(**env)
    events = [whole.advance() for _ in range(8)]
    assert whole.data.windows < 4 * 20
    first = make_trainer(RUN_ID="cut", **env)
    for _ in range(4):
        first.advance()
    first.save()
    second = make_trainer(RUN_ID="cut", RESUME=1, **env)
    second.load()
    second.warm_up()
    assert (second.step, second.averaged) == (4, first.averaged)
    assert second.elapsed_s == first.elapsed_s
    losses = [second.advance()["train_loss"] for _ in range(4)]
    assert losses == [event["train_loss"] for event in events[4:]]
    for kind in ("params", "opt", "average"):
        assert same(getattr(second, kind), getattr(whole, kind)), kind


def test_other_settings_cannot_take_over_a_checkpoint(make_trainer):
    make_trainer(RUN_ID="run").save()
    make_trainer(RUN_ID="run", RESUME=1, ITERATIONS=9, MAX_WALLCLOCK_SECONDS=7).load()
    with pytest.raises(t.UserError, match=r"MATRIX_LR was 0\.02, not 0\.05"):
        make_trainer(RUN_ID="run", RESUME=1, MATRIX_LR=0.05).load()


# --------------------------------------------------------------------------------------------------
# Training on quantised weights


@pytest.mark.parametrize("env", [{}, {"ENGRAM_LITE_ENABLED": 0, "USE_GPTQ_LITE": 0}])
def test_quantised_training_uses_the_artifacts_weights_straight_through(make_trainer, env):
    # step 0 of 4 with a warm-down of 8 steps: the factor is 0.5
    settings = {"ITERATIONS": 4, "WARMDOWN_ITERS": 8, "WEIGHT_BITS": 4, "EMBED_BITS": 4, **env}
    trainer = make_trainer(LATE_QAT_THRESHOLD=0.6, **settings)
    rng = np.random.default_rng(5)
    params = {n: p + mx.array(0.1 * rng.standard_normal(p.shape).astype(np.float32))
              for n, p in trainer.params.items()}  # fmt: skip
    trainer.params = params
    rows, blobs = t.pack_tensors(params, trainer.groups, trainer.cfg)
    stored = t.unpack_tensors(rows, b"".join(blobs))
    tokens = trainer.data.step(0, trainer.windows)
    weights = brute_force_weights(trainer.data.shards, tokens, 0.5)
    quantised, grads = plain_gradients(trainer, stored, weights)
    plain, _ = plain_gradients(trainer, params, weights)
    assert abs(quantised - plain) > 1e-3
    assert abs(trainer.advance()["train_loss"] - quantised) < 1e-5
    close(first_gradients(trainer), grads, 1e-4)

    above = make_trainer(LATE_QAT_THRESHOLD=0.5, **settings)
    above.params = params
    assert abs(above.advance()["train_loss"] - plain) < 1e-5


# --------------------------------------------------------------------------------------------------
# Windows


def numbered_windows(folder, seed=0, seq_len=10) -> t.TrainWindows:
    """Shards whose tokens are all different: a window's first token says where it lies."""
    tokens = np.arange(20_000)
    parts = np.split(tokens, [1234, 1240, 7001])
    paths = [write_shard(folder / f"x_train_{i}.bin", part) for i, part in enumerate(parts)]
    return t.TrainWindows(paths, seq_len, seed, 20_000)


def test_an_epoch_holds_each_window_once(tmp_path):
    data = numbered_windows(tmp_path)
    count = sum((n - 1) // 10 for n in (1234, 6, 7001 - 1240, 20_000 - 7001))
    assert data.windows == count
    orders = []
    for epoch in range(3):
        rows = data.step(epoch, count)
        orders.append(rows[:, 0].argsort().tolist())
        assert rows.shape == (count, 11)
        assert rows.dtype == np.int32
        assert (np.diff(rows) == 1).all()  # no window crosses shards
        targets = rows[:, 1:].ravel()
        assert len(set(targets.tolist())) == 10 * count
        assert (np.diff(rows[:, 0]) < 0).mean() > 0.4  # shuffled
    assert orders[0] != orders[1] != orders[2]


def test_windows_are_a_function_of_seed_and_number(tmp_path):
    data, again, other = (numbered_windows(tmp_path, seed) for seed in (0, 0, 1))
    first = [data.step(number, 300) for number in range(14)]
    assert data.windows < 7 * 300
    for number in (13, 2, 7):
        assert (again.step(number, 300) == first[number]).all()
    assert (other.step(2, 300) != first[2]).any(axis=1).mean() > 0.9


def test_a_token_beyond_the_vocabulary_names_its_shard(tmp_path):
    good = write_shard(tmp_path / "x_train_0.bin", np.arange(40))
    bad = write_shard(tmp_path / "x_train_1.bin", [*range(39), 64])
    data = t.TrainWindows([good, bad], 13, 0, 64)
    with pytest.raises(t.UserError, match=r"x_train_1\.bin.*64"):
        data.step(0, data.windows)
    with pytest.raises(t.UserError, match=r"x_train_1\.bin.*64"):
        t.bigram_probability(data)


def test_other_ranks_learn_what_rank_0_has_foreseen(make_trainer):
    trainer = make_trainer(COMPLEMENT_BY="contexts", COMPLEMENT_ALPHA=1)
    tokens = trainer.data.step(0, trainer.windows)
    foreseen = mx.full((trainer.windows, tokens.shape[1] - 1), 0.25)
    foreseen[:, ::2] = 0.75

    class Two:
        count = 2

        def sum(self, trees):
            return trees[0] + foreseen

    trainer.ranks = Two()
    got = trainer.loss_weights(tokens, 0)
    assert np.allclose(got, t.complementary_weights(np.array(foreseen), 1))


def test_memory_by_estimate_grows_with_what_is_asked_for(make_trainer):
    trainer = make_trainer()
    cfg, params = trainer.cfg, trainer.params
    one = t.estimate_memory(params, cfg, [4], 1000)
    assert t.estimate_memory(params, cfg, [8], 1000)["net"] > one["net"]
    assert t.estimate_memory(params, cfg, [2, 2], 1000)["net"] > one["net"]
    assert one["mixer"] == cfg.mixer_memory_mb << 20
    backoff = t.dataclasses.replace(cfg, mixer="backoff")
    assert t.estimate_memory(params, backoff, [4], 2000)["mixer"] == 2000 * 5 * 40
