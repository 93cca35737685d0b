"""Parameter groups, Muon and Adam against MLX's own optimizers."""

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from conftest import tiny_knobs

import train_gpt_mlx_kl as t

EVERY_FEATURE = [{"ENGRAM_LITE_ENABLED": 1}, {"ENGRAM_LITE_ENABLED": 0}]


def hyper(lr: float, momentum: float, step: int) -> dict[str, mx.array]:
    values = {"lr_factor": lr, "momentum": momentum, "step": step}
    return {name: mx.array(float(value)) for name, value in values.items()}


def normal(rng, *shape) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32))


def numpy_copies(params) -> dict[str, np.ndarray]:
    return {name: np.array(p) for name, p in params.items()}


# --------------------------------------------------------------------------------------------------
# Groups


@pytest.mark.parametrize("env", EVERY_FEATURE)
def test_a_parameter_has_the_group_of_its_shape_and_role(env):
    cfg = tiny_knobs(NUM_LAYERS=5, **env)
    model = t.GPT(cfg, 50, 1)
    params = dict(t.tree_flatten(model.parameters()))
    groups = t.group_parameters(list(params))
    assert groups.keys() == params.keys()
    by_muon = {name for name, group in groups.items() if group.optimizer == "muon"}
    modules = model.named_modules()
    assert by_muon == {f"{at}.weight" for at, module in modules if isinstance(module, t.Linear)}
    for name, p in params.items():
        group = groups[name]
        # Gains and gates are few numbers: kept in full, and not pulled to 0, which would shut them.
        few = p.size <= 2 * cfg.model_dim
        assert (group.bits == "") == few, name
        assert group.lr == "scalar_lr" or not few, name
        assert group.decay == "" or not few, name
        if p.shape[0] == 50:  # a row per piece of the vocabulary
            assert group.bits == "embed_bits", name
        if p.shape[0] % 37 == 0 or p.shape[0] % 41 == 0:  # a row per hash
            assert (group.lr, group.decay, group.bits) == (
                "hash_lr", "adam_weight_decay", "weight_bits"
            ), name  # fmt: skip


@pytest.mark.parametrize("name", ["blocks.0.attn.extra", "tok_emb2", "xtok_emb", "head.weight"])
def test_a_parameter_without_a_group_is_an_error(name):
    with pytest.raises(AssertionError, match=name.replace(".", r"\.")):
        t.group_parameters(["tok_emb", name])


def test_a_parameter_in_two_groups_is_an_error(monkeypatch):
    twice = t.dataclasses.replace(t.GROUPS[1], name="again", pattern="tok_.*")
    monkeypatch.setattr(t, "GROUPS", (*t.GROUPS, twice))
    with pytest.raises(AssertionError, match="again"):
        t.group_parameters(["tok_emb"])


# --------------------------------------------------------------------------------------------------
# Updates


@pytest.mark.parametrize("shape", [(12, 12), (32, 8), (8, 32)])
@pytest.mark.parametrize("steps", [5, 3])
def test_muon_is_mlx_muon(rng, shape, steps):
    lr, momentum = 0.04, 0.9
    theirs = mlx.optimizers.Muon(lr, momentum=momentum, weight_decay=0, ns_steps=steps)
    p = normal(rng, 3, *shape)
    buffer = mx.zeros_like(p)
    trees = [{"w": p[i]} for i in range(3)]
    optimizers = [theirs, *(mlx.optimizers.Muon(lr, momentum=momentum, weight_decay=0,
                                                ns_steps=steps) for _ in range(2))]  # fmt: skip
    for _ in range(4):
        g = normal(rng, 3, *shape) * mx.array([1.0, 1e-3, 1e3])[:, None, None]
        move, buffer = t.muon(g, buffer, mx.array(lr), mx.array(momentum), steps)
        p = p - move
        trees = [o.apply_gradients({"w": g[i]}, trees[i]) for i, o in enumerate(optimizers)]
        for i, tree in enumerate(trees):
            assert mx.abs(p[i] - tree["w"]).max().item() < 2e-5


@pytest.mark.parametrize("shape", [(40, 10), (10, 40)])
def test_muon_makes_singular_values_about_one(rng, shape):
    singular = np.linalg.svd(np.array(t.orthogonalise(normal(rng, 2, *shape), 5)))[1]
    assert singular.min() > 0.6
    assert singular.max() < 1.3


@pytest.mark.parametrize("shape", [(33,), (7, 5)])
def test_adam_is_mlx_adam(rng, shape):
    cfg = tiny_knobs(BETA1=0.8, BETA2=0.97, ADAM_EPS=1e-6)
    theirs = mlx.optimizers.Adam(0.03, betas=[0.8, 0.97], eps=1e-6, bias_correction=True)
    p, m, v = normal(rng, *shape), mx.zeros(shape), mx.zeros(shape)
    tree = {"w": p}
    for step in range(1, 7):
        # from vanishing gradients, where epsilon decides, to large ones; some exactly 0
        g = normal(rng, *shape) * mx.array(10.0 ** rng.integers(-8, 3, shape))
        g = mx.where(mx.array(rng.random(shape) < 0.2), 0.0, g)
        p, m, v = t.adam(p, g, m, v, mx.array(0.03), mx.array(float(step)), cfg, 0.0)
        tree = theirs.apply_gradients({"w": g}, tree)
        assert mx.abs(p - tree["w"]).max().item() < 1e-5


def test_any_allowed_epsilon_leaves_untouched_parameters_finite():
    eps = next(f.metadata["lo"] for f in t.dataclasses.fields(t.Knobs) if f.name == "adam_eps")
    cfg = t.dataclasses.replace(tiny_knobs(), adam_eps=eps)
    zero, one = mx.zeros((4,)), mx.array(1.0)
    assert t.adam(zero, zero, zero, zero, one, one, cfg, 0.0)[0].tolist() == [0.0] * 4


def test_a_group_names_its_own_rate_and_decay(rng):
    cfg = tiny_knobs(MATRIX_LR=0.05, SCALAR_LR=0.5, MUON_WEIGHT_DECAY=0.3, ADAM_WEIGHT_DECAY=0.1)
    params = {n: p for n, p in t.tree_flatten(t.GPT(cfg, 50, 1).parameters()) if ".mlp." in n}
    params = {n: normal(rng, *p.shape) for n, p in params.items() if n.endswith("weight")}
    grads = {n: normal(rng, *p.shape) for n, p in params.items()}
    groups = t.group_parameters(list(params))
    opt = t.new_optimizer_state(params, groups)
    for lr, decay, same in (
        ("scalar_lr", "", {"MATRIX_LR": 0.5, "MUON_WEIGHT_DECAY": 0}),
        ("matrix_lr", "adam_weight_decay", {"MUON_WEIGHT_DECAY": 0.1}),
    ):
        other = {n: t.dataclasses.replace(g, lr=lr, decay=decay) for n, g in groups.items()}
        got, _ = t.apply_gradients(params, grads, opt, hyper(0.5, 0.9, 1), other, cfg)
        as_if = t.dataclasses.replace(cfg, **{n.lower(): v for n, v in same.items()})
        want, _ = t.apply_gradients(params, grads, opt, hyper(0.5, 0.9, 1), groups, as_if)
        assert all((got[n] == want[n]).all() for n in params)


@pytest.mark.parametrize("env", EVERY_FEATURE)
def test_decay_is_decoupled_and_proportional_to_the_learning_rate(rng, env):
    cfg = tiny_knobs(
        MUON_WEIGHT_DECAY=0.3, ADAM_WEIGHT_DECAY=0.2, MATRIX_LR=0.05, HASH_LR=0.05, **env
    )
    shapes = {n: p.shape for n, p in t.tree_flatten(t.GPT(cfg, 50, 1).parameters())}
    params = {n: normal(rng, *shape) for n, shape in shapes.items()}
    groups = t.group_parameters(list(params))
    grads = {n: mx.zeros_like(p) for n, p in params.items()}
    opt = t.new_optimizer_state(params, groups)
    new, state = t.apply_gradients(params, grads, opt, hyper(0.5, 0.9, 1), groups, cfg)
    assert state.keys() == opt.keys()
    for name, p in params.items():
        rates = {"matrices": 0.05 * 0.3, "embedding": 0.05 * 0.2, "tables": 0.05 * 0.2}
        factor = 1 - 0.5 * rates.get(groups[name].name, 0)
        assert np.allclose(np.array(new[name]), np.array(p) * factor, rtol=1e-6, atol=0), name


@pytest.mark.parametrize("field", ["MATRIX_LR", "TIED_EMBED_LR", "HASH_LR", "HASH_PROJ_LR",
                                   "SCALAR_LR"])  # fmt: skip
@pytest.mark.parametrize("env", EVERY_FEATURE)
def test_a_learning_rate_moves_its_own_group_only(make_trainer, env, field):
    rates = dict.fromkeys(("MATRIX_LR", "TIED_EMBED_LR", "HASH_LR", "HASH_PROJ_LR", "SCALAR_LR"), 0)
    trainer = make_trainer(**{**env, **rates, field: 0.1})
    before = numpy_copies(trainer.params)
    trainer.take_step()
    trainer.take_step()
    after = numpy_copies(trainer.params)
    moved = {trainer.groups[n].lr for n in after if (after[n] != before[n]).any()}
    exists = field.lower() in {group.lr for group in trainer.groups.values()}
    assert moved == ({field.lower()} if exists else set())


@pytest.mark.parametrize("env", EVERY_FEATURE)
def test_every_parameter_moves_within_three_steps(make_trainer, env):
    trainer = make_trainer(**env)
    before = numpy_copies(trainer.params)
    for _ in range(3):
        trainer.take_step()
    after = numpy_copies(trainer.params)
    for name, p in after.items():
        changed = p != before[name]
        if name.endswith((".table", ".tables")):  # a row that no context hit stays
            assert changed.any(axis=1).mean() > 0.5, name
        else:
            assert changed.mean() > 0.99, (name, changed.mean())


def test_a_run_makes_the_updates_of_mlx_optimizers(make_trainer):
    # The gradient of each step is read back from the moments; rates and momentum change by step.
    trainer = make_trainer(
        ITERATIONS=8,
        WARMDOWN_ITERS=6,
        WARMDOWN_FRAC=1,
        MUON_MOMENTUM_WARMUP_STEPS=3,
        MATRIX_LR=0.04,
    )
    name, matrix = "tok_emb", "blocks.1.mlp.fc.weight"
    adam = mlx.optimizers.Adam(0, betas=[0.9, 0.95], eps=1e-8, bias_correction=True)
    embedding = {"w": trainer.params[name]}
    for step in range(8):
        old, before = trainer.opt, {"w": trainer.params[matrix]}
        event = trainer.take_step()
        assert event["lr_factor"] == pytest.approx(min((8 - step) / 6, 1))
        adam.learning_rate = 0.05 * event["lr_factor"]
        gradient = (trainer.opt[f"m/{name}"] - 0.9 * old[f"m/{name}"]) / 0.1
        embedding = adam.apply_gradients({"w": gradient}, embedding)
        assert mx.abs(embedding["w"] - trainer.params[name]).max().item() < 1e-4

        momentum = 0.85 + 0.1 * min(step / 3, 1)
        was, buffer = old[f"buffer/{matrix}"], trainer.opt[f"buffer/{matrix}"]
        muon = mlx.optimizers.Muon(0.04 * event["lr_factor"], momentum, weight_decay=0)
        muon.init(before)
        muon.state["w"]["v"] = (1 - momentum) * was  # MLX's buffer is a mean, not a sum
        after = muon.apply_gradients({"w": buffer - momentum * was}, before)
        assert mx.abs(after["w"] - trainer.params[matrix]).max().item() < 4e-5
