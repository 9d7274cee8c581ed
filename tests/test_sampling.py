"""Samplers on Gaussian data, whose score is known, and against the arrays of the 2021 code with their noise."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import GOLDEN, MU, QUICK, S0, SDES, OrnsteinUhlenbeck, load, make_discrete_score_fn, make_score_fn, sde_of
from cases import by_default

import sampling
from configs import base
from parallel import distributed, rng
from sde_lib import VESDE, VPSDE, expand, subVPSDE

SHAPE = (500, 4, 4, 1)  # 8,000 independent numbers: the standard error of their std is 0.8 %
KEYS = jax.random.split(jax.random.key(0), 6)  # one for each example of the reference's batches
PC_CASES = sorted(path.stem for path in GOLDEN.glob("pc_*.npz"))


def make_config(**settings):
    config = base.get_config()
    config.sampling.update(settings)
    return config


def sample(config, sde, shape, key=None, score_fn=None, x_init=None):
    """Draws samples, by default of the Gaussian data, in one compiled call."""
    draw = sampling.build_sampler(config, sde, shape)
    key = jax.random.key(0) if key is None else key
    draw_jit = jax.jit(lambda key, x: draw(key, score_fn or make_score_fn(sde), x), compiler_options=QUICK)
    return jax.device_get(draw_jit(key, x_init))  # numpy from here on: JAX would compile every operation


def inject_noise(monkeypatch, noise):
    """Makes the k-th draw of normal noise the k-th of the given arrays."""
    draws = iter(jnp.asarray(noise))

    def draw(key, shape):
        assert key.shape == shape[:1]  # a key for each example
        return next(draws)

    monkeypatch.setattr(rng, "normal", draw)


def inject_noise_into_loop(monkeypatch, noise, per_step, used):
    """The same inside the compiled loop: there a key is made the number of its draw, prior -1, steps from 0 on.

    The loop numbers `per_step` draws in each step, of which the slice `used` takes part.
    """
    steps = np.zeros((len(noise) - 1) // len(range(per_step)[used]), bool)
    table = np.zeros((len(steps), per_step, *noise.shape[1:]), np.float32)
    table[:, used] = noise[1:].reshape(len(steps), -1, *noise.shape[1:])
    table = jnp.concatenate([table.reshape(-1, *noise.shape[1:]), noise[:1]])
    monkeypatch.setattr(rng, "split", lambda key: (jnp.int32(-1), key))
    monkeypatch.setattr(rng, "fold_in", lambda key, i: i)
    monkeypatch.setattr(rng, "normal", lambda i, shape: table[i])


# ------------------------------------------------------------------------------------------- Gaussian data


def pairs():
    """Every SDE x predictor x corrector that is defined, with num_steps, n_steps_each and snr that converge."""
    sdes = {"vesde": VESDE(sigma_max=10.0), "vpsde": VPSDE(), "subvpsde": subVPSDE()}
    for name, sde in sdes.items():
        for predictor in sampling.PREDICTORS:
            for corrector in sampling.CORRECTORS:
                if predictor == corrector == "none" or (predictor, name) == ("ancestral_sampling", "subvpsde"):
                    continue
                # Alone, a corrector must follow the noise level down: more steps; ALD's shrink with the noise: longer.
                alone = {"langevin": (400, 3, 0.16), "ald": (500, 4, 0.6)}.get(corrector)
                steps = alone if predictor == "none" else (400, 1, 0.1)
                is_usual = corrector == "none" or (name == "vpsde" and predictor in ("none", "reverse_diffusion"))
                marks = [] if is_usual else [pytest.mark.exhaustive]
                yield pytest.param(sde, predictor, corrector, *steps, id=f"{name}-{predictor}-{corrector}", marks=marks)
    # Noise does not fade towards t = 0 here, so that the last step must be short: N = 2000.
    yield pytest.param(OrnsteinUhlenbeck(), "reverse_diffusion", "langevin", 2000, 1, 0.05, id="ou")
    marks = [pytest.mark.exhaustive]
    yield pytest.param(OrnsteinUhlenbeck(), "euler_maruyama", "ald", 2000, 1, 0.05, id="ou-ald", marks=marks)


@pytest.mark.parametrize(("sde", "predictor", "corrector", "num_steps", "n_steps_each", "snr"), list(pairs()))
def test_samples_have_the_moments_of_the_data(sde, predictor, corrector, num_steps, n_steps_each, snr):
    config = make_config(
        predictor=predictor, corrector=corrector, num_steps=num_steps, n_steps_each=n_steps_each, snr=snr
    )
    x, nfe = sample(config, sde, SHAPE)
    check_moments(x)
    corrections, predictions = n_steps_each * (corrector != "none"), predictor != "none"
    assert int(nfe) == num_steps * (corrections + predictions)
    assert nfe.dtype == np.int32
    assert nfe.shape == ()


def check_moments(x):
    assert abs(x.mean() - MU) < 4 * S0 / np.sqrt(x.size)
    assert x.std() == pytest.approx(S0, rel=0.03)
    # Independent within an image and between images: the mean of n rows has std S0 / sqrt(n), to 4 standard errors.
    for means in (x.mean(axis=0), x.mean(axis=(1, 2, 3))):
        expected = S0 / np.sqrt(x.size / means.size)
        assert means.std() == pytest.approx(expected, rel=4 / np.sqrt(2 * means.size))


@pytest.mark.parametrize("name", by_default(["vpsde"], SDES))
@pytest.mark.parametrize("method", ["pc", "ode"])
def test_probability_flow_has_the_moments_of_the_data(name, method):
    predictor = "euler_maruyama" if name == "vpsde" else "reverse_diffusion"
    settings = {"num_steps": 1000, "predictor": predictor, "probability_flow": True, "noise_removal": False}
    x, _ = sample(make_config(method=method, **settings), SDES[name], SHAPE)
    check_moments(x)


@pytest.mark.parametrize("name", by_default(["vesde"], ["vesde", "vpsde", "subvpsde"]))
def test_ode_follows_the_closed_form(name):
    """For Gaussian data the flow maps x(T) to m(eps) MU + sqrt(v(eps) / v(T)) (x(T) - m(T) MU).

    The flow is linear, so that the error estimate of a step is one number, which changes its sign at some length of the
    step: rounding decides whether a step ends there and is accepted with a hundred times the tolerance. Hence 1e-6.
    """
    sde = SDES[name]
    x_init = sde.prior_sampling(jax.random.key(1), (4, 3, 2, 1))
    settings = {"rtol": 1e-6, "atol": 1e-6, "noise_removal": False}
    x, _ = sample(make_config(method="ode", **settings), sde, x_init.shape, x_init=x_init)
    t = jnp.array([sde.sampling_eps, sde.T])
    m, v = sde.mean_coeff(t), (sde.mean_coeff(t) * S0) ** 2 + sde.std(t) ** 2
    np.testing.assert_allclose(x, m[0] * MU + jnp.sqrt(v[0] / v[1]) * (x_init - m[1] * MU), atol=2e-4)


@pytest.mark.parametrize(
    "settings",
    by_default(
        [{"method": "ode"}],
        [
            {"method": "ode"},
            {"method": "ode", "noise_removal": False},
            {"predictor": "reverse_diffusion", "corrector": "langevin", "n_steps_each": 2, "num_steps": 30},
            {"predictor": "none", "corrector": "ald", "num_steps": 30},
        ],
    ),
)
def test_counts_every_evaluation(settings):
    sde, calls = VPSDE(), []

    def score_fn(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return make_score_fn(sde)(x, t)

    _, nfe = sample(make_config(**settings), sde, (2, 2, 2, 1), score_fn=score_fn)
    jax.effects_barrier()
    assert int(nfe) == len(calls)


@pytest.mark.parametrize(
    ("method", "centered"), by_default([("dpmpp_2m", False)], [("ode", True), ("dpmpp_2m", False)])
)
def test_clipping_draws_as_if_the_data_ended_at_the_range(method, centered):
    """Of data that are one point, each image another one, beyond the range its end is drawn, within it the point."""
    sde, points = VPSDE(), jnp.array([3.0, -3.0, 0.3])
    score_fn = lambda x, t: -(x - expand(sde.mean_coeff(t) * points, x)) / expand(sde.std(t) ** 2, x)  # noqa: E731
    for clip, expected in ((True, [1.0, -1.0 if centered else 0.0, 0.3]), (False, points)):
        config = make_config(method=method, num_steps=20, clip=clip)
        config.data.centered = centered
        x, _ = sample(config, sde, (3, 2, 2, 1), score_fn=score_fn)
        np.testing.assert_allclose(x, np.broadcast_to(np.reshape(expected, (3, 1, 1, 1)), x.shape), atol=0.02)


def test_noise_removal_is_the_mean_of_the_last_step():
    """With it, the last step's noise G z is missing, so the variance of N(MU, S0^2) data is smaller by G^2."""
    settings = {"predictor": "reverse_diffusion", "num_steps": 40}
    sde, shape = VPSDE(), (4000, 2, 2, 1)
    noisy, clean = (sample(make_config(noise_removal=flag, **settings), sde, shape)[0] for flag in (False, True))
    added = noisy - clean  # the same keys
    G = sde.discretize(noisy, jnp.full(4000, 1e-3), 40)[1][0]
    assert added.std() == pytest.approx(float(G), rel=0.03)
    assert abs(np.mean(added * clean)) < 4 * G * S0 / np.sqrt(added.size)


# ------------------------------------------------------------------------------------ arrays of the 2021 code


@pytest.mark.parametrize("name", ["predictors_vesde", "predictors_vpsde"])
def test_predictors_match_the_reference(name, monkeypatch):
    stored, meta = load(name)
    sde, x, t = sde_of(meta), jnp.asarray(stored["x"]), jnp.asarray(stored["t"])
    score_fn = make_score_fn(sde, meta["score_c"])
    for key in stored.files:
        if not key.endswith("_x"):
            continue
        case = key.removesuffix("_x")
        predictor, flow = case[:-4], case.endswith("pf1")
        inject_noise(monkeypatch, stored["noise"][None])
        step = jax.jit(lambda x, t: sampling.PREDICTORS[predictor](KEYS, x, t, sde.reverse(score_fn, flow)))  # noqa: B023
        ours = step(x, t)
        for value, suffix in zip(ours, ("x", "x_mean"), strict=True):
            expected = stored[f"{case}_{suffix}"]
            np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-5 * np.abs(stored["x"]).max(), err_msg=case)


@pytest.mark.parametrize("corrector", ["langevin", "ald", "none"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_correctors_match_the_reference(corrector, num_steps, monkeypatch):
    stored, meta = load("correctors_vesde")
    sde, x, t = sde_of(meta), jnp.asarray(stored["x"]), jnp.asarray(stored["t"])
    inject_noise(monkeypatch, stored["noise"])
    update = sampling._build_corrector(make_config(corrector=corrector, snr=meta["snr"]).sampling)

    def steps(x, t):
        for _ in range(num_steps):
            x, x_mean = update(KEYS, x, t, sde.reverse(make_score_fn(sde, meta["score_c"])))
        return x, x_mean

    x, x_mean = jax.jit(steps)(x, t)
    case = f"{corrector}_n{num_steps}"
    np.testing.assert_allclose(x, stored[f"{case}_x"], rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(x_mean, stored[f"{case}_x_mean"], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("corrector", ["langevin", "ald", "none"])
def test_correctors_of_sub_vp_follow_the_drift_where_the_2021_code_raised(corrector, monkeypatch):
    """The reference has "none" only. Ours takes alpha = (m(t) / m(t - 1/N))^2; written out here in float64."""
    stored, meta = load("correctors_subvpsde")
    assert set(meta["raises_in_original"]) == {f"{name}_n{n}" for name in ("langevin", "ald") for n in (1, 3)}
    sde, x, t = sde_of(meta), jnp.asarray(stored["x"]), jnp.asarray(stored["t"])
    inject_noise(monkeypatch, stored["noise"])
    update = sampling._build_corrector(make_config(corrector=corrector, snr=meta["snr"]).sampling)
    score_fn = make_score_fn(sde, meta["score_c"])
    np.testing.assert_allclose(score_fn(x, t)[2:], stored["score"][2:], rtol=1e-5)  # from t = 0.1 on, see test_sde_lib
    got, got_mean = jax.jit(lambda x, t: update(KEYS, x, t, sde.reverse(score_fn)))(x, t)
    if corrector == "none":
        np.testing.assert_array_equal(got, stored["none_n1_x"])
        np.testing.assert_array_equal(got_mean, stored["none_n3_x_mean"])
        return
    score, z, t = (np.asarray(a, np.float64) for a in (score_fn(x, t), stored["noise"][0], t))
    log_m = lambda t: -0.25 * t**2 * 19.9 - 0.05 * t  # noqa: E731
    alpha = np.exp(2 * (log_m(t) - log_m(np.maximum(t - 1 / sde.N, 0))))
    norm = lambda a: np.sqrt((a**2).sum((1, 2, 3)))  # noqa: E731
    std = -np.expm1(2 * log_m(t))
    ratio = norm(z).mean() / norm(score).mean() if corrector == "langevin" else std
    step = (2 * alpha * (meta["snr"] * ratio) ** 2)[:, None, None, None]
    mean = stored["x"] + step * score
    np.testing.assert_allclose(got_mean, mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, mean + np.sqrt(2 * step) * z, rtol=1e-5, atol=1e-5)


def test_langevin_averages_norms_over_devices_as_the_reference(monkeypatch):
    """Two halves of a batch, as on two devices: by vmap over an axis with the name that `distributed` uses."""
    stored, meta = load("correctors_vesde")
    sde, halves = sde_of(meta), lambda name: jnp.asarray(stored[name]).reshape(2, 3, *stored[name].shape[1:])
    noise = jnp.asarray(stored["noise"][0]).reshape(2, 3, *stored["x"].shape[1:])
    monkeypatch.setattr(rng, "normal", lambda key, shape: noise[jax.lax.axis_index(distributed.AXIS)])
    settings = make_config(corrector="langevin", snr=meta["snr"]).sampling

    def update(x, t):
        key = jax.random.key(0)
        return sampling._build_corrector(settings)(key, x, t, sde.reverse(make_score_fn(sde, meta["score_c"])))

    x, x_mean = jax.jit(jax.vmap(update, axis_name=distributed.AXIS))(halves("x"), halves("t"))
    np.testing.assert_allclose(x, stored["langevin_2devices_x"], rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(x_mean, stored["langevin_2devices_x_mean"], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", PC_CASES)
def test_whole_samplers_match_the_reference(name, monkeypatch):
    stored, meta = load(name)
    sde = sde_of(meta)
    config = make_config(
        predictor=meta["predictor"],
        corrector=meta["corrector"],
        n_steps_each=meta["n_steps"],
        snr=meta["snr"],
        probability_flow=meta["probability_flow"],
        noise_removal=meta["denoise"],
    )
    config.model.num_scales = sde.N
    make = make_score_fn if meta["continuous"] else make_discrete_score_fn
    corrections = 0 if meta["corrector"] == "none" else meta["n_steps"]
    used = slice(0, corrections + (meta["predictor"] != "none"))
    inject_noise_into_loop(monkeypatch, stored["noise"], corrections + 1, used)
    x, nfe = sample(config, sde, stored["samples"].shape, score_fn=make(sde, meta["score_c"]))
    x = (x + 1) / 2 if meta["inverse_scaler"] == "(x+1)/2" else x
    np.testing.assert_allclose(x, stored["samples"], rtol=2e-4, atol=2e-5)
    idle = (meta["predictor"] == "none") + meta["n_steps"] * (meta["corrector"] == "none")
    assert int(nfe) == meta["nfe_returned"] - sde.N * idle  # the 2021 code counted steps that were not taken


@pytest.mark.parametrize(
    "name",
    by_default(["ode_subvpsde_denoise0"], sorted(path.stem for path in GOLDEN.glob("ode_*.npz"))),
)
def test_ode_matches_the_reference(name):
    stored, meta = load(name)
    sde = sde_of(meta)
    # At a tenth of the reference's tolerance, so that what remains is the reference's own error, 2e-5.
    rtol, atol = meta["rtol"] / 10, meta["atol"] / 10
    config = make_config(method="ode", noise_removal=meta["denoise"], rtol=rtol, atol=atol)
    z = jnp.asarray(stored["z"])
    x, nfe = sample(config, sde, z.shape, score_fn=make_score_fn(sde, meta["score_c"]), x_init=z)
    x = (x + 1) / 2 if meta["inverse_scaler"] == "(x+1)/2" else x
    np.testing.assert_allclose(x, stored["samples"], atol=5e-5)
    assert int(nfe) < 3 * meta["nfe"]  # a tenth of the tolerance takes 10^(1/5) = 1.6 times the steps


# --------------------------------------------------------------------------- keys, batches, devices, refusals


@pytest.mark.parametrize("method", ["pc", "ode"])
def test_a_sample_depends_on_its_own_key_alone(method):
    config = make_config(
        method=method, predictor="reverse_diffusion", corrector="langevin", langevin_norm="sample", num_steps=25
    )
    config.sampling.update(rtol=1e-3, atol=1e-3)  # tighter, and rounding may decide whether a step is accepted
    keys, sde = rng.example_keys(jax.random.key(7), 8), VPSDE()
    together, _ = sample(config, sde, (8, 2, 2, 1), keys)
    from_one_key, _ = sample(config, sde, (8, 2, 2, 1), jax.random.key(7))
    np.testing.assert_array_equal(together, from_one_key)
    draw = sampling.build_sampler(config, sde, (1, 2, 2, 1))
    alone = jax.jit(lambda key: draw(key, make_score_fn(sde))[0], compiler_options=QUICK)
    for i in range(8):
        np.testing.assert_allclose(alone(keys[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-6)


@pytest.mark.exhaustive
def test_predictor_first_leaves_out_the_correction_of_the_prior_alone():
    """Algorithm 1: predict, then correct where that arrived; written out with the steps of this module."""
    sde, config = VESDE(), make_config(predictor="reverse_diffusion", corrector="langevin", num_steps=4)
    config.sampling.update(pc_order="predictor_first", n_steps_each=2)
    keys, reverse = rng.example_keys(jax.random.key(1), 4), sde.reverse(make_score_fn(sde), num_steps=4)
    x, nfe = sample(config, sde, (4, 2, 2, 1), keys)
    assert nfe == 4 + 3 * 2
    correct = sampling._build_corrector(config.sampling)

    def written_out(keys):
        key_prior, key = rng.split(keys)
        x, times = sde.prior_sampling(key_prior, (4, 2, 2, 1)), jnp.asarray(sde.sampling_times(4))
        for i in range(4):
            x, x_mean = sampling.reverse_diffusion(rng.fold_in(key, 3 * i + 2), x, jnp.full(4, times[i]), reverse)
            for j in range(2 if i < 3 else 0):
                x, _ = correct(rng.fold_in(key, 3 * (i + 1) + j), x, jnp.full(4, times[i + 1]), reverse)
        return x_mean

    written_out = jax.jit(written_out, compiler_options=QUICK)
    np.testing.assert_allclose(x, written_out(keys), rtol=2e-4, atol=2e-5)


@pytest.mark.exhaustive
def test_batch_norm_of_langevin_couples_the_batch():
    config = make_config(predictor="none", corrector="langevin", num_steps=30)
    keys = rng.example_keys(jax.random.key(7), 2)
    draw = lambda keys: sample(config, VPSDE(), (len(keys), 2, 2, 1), keys)[0]  # noqa: E731
    assert np.abs(draw(keys)[0] - draw(keys[:1])[0]).max() > 1e-3


ON_FOUR_DEVICES = """
import sys
sys.path[:0] = sys.argv[1:3]
import jax, numpy as np
import likelihood, sampling
from parallel import distributed
from analytic import make_score_fn
from configs import base
from sde_lib import VPSDE

assert jax.local_device_count() == 4
sde = VPSDE()
x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(8, 2, 1, 1)

def run(key, x, num):
    results = []
    # One of each kind of solver, and those that draw noise: the others differ in coefficients alone.
    methods = ("pc", "ode", "adaptive_sde", "ddim", "unipc", "heun", "stochastic_heun")
    for method, step_control in [*((method, "sample") for method in methods), ("ode", "batch")]:
        config = base.get_config()
        config.sampling.update(method=method, predictor="reverse_diffusion", corrector="langevin", num_steps=30)
        config.sampling.update(eta=1.0, s_churn=5.0, adaptive_levels=8.0, step_control=step_control)
        # Tighter, and rounding would decide in places whether a step is accepted: float32 has 7 digits.
        config.sampling.update(rtol=1e-3, atol=1e-3)
        config.likelihood.update(rtol=1e-3, atol=1e-3)
        results.append(sampling.build_sampler(config, sde, (num, 2, 1, 1))(key, make_score_fn(sde))[0])
    result = likelihood.build_likelihood(config, sde)(key, make_score_fn(sde, 0.0), x)
    return *results, result.bpd, result.latent

key = jax.random.key(5)
one = jax.jit(lambda x: run(key, x, 8))(x)
four = distributed.pmap(lambda x: run(key, x, 2))(x.reshape(4, 2, 2, 1, 1))
for a, b in zip(one, four, strict=True):
    np.testing.assert_allclose(np.asarray(b).reshape(a.shape), a, rtol=1e-5, atol=1e-5)
print("equal")
"""


@pytest.mark.exhaustive  # test_devices.py has the whole job on eight
def test_four_devices_give_the_samples_and_likelihoods_of_one():
    here = Path(__file__).parent
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] += " --xla_backend_optimization_level=1"
    command = [sys.executable, "-c", ON_FOUR_DEVICES, str(here.parent), str(here)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize(
    ("sde", "settings", "message"),
    [
        (VPSDE(), {"method": "pcc"}, "sampling.method='pcc' is unknown; known: adaptive_sde, ddim, deis, dpmpp_2m"),
        (VPSDE(), {"predictor": "eulr"}, "sampling.predictor='eulr' is unknown; known: ancestral_sampling, euler_mar"),
        (VPSDE(), {"corrector": "mala"}, "sampling.corrector='mala' is unknown; known: ald, langevin, none"),
        (VPSDE(), {"langevin_norm": "all"}, "sampling.langevin_norm='all' is unknown; known: batch, sample"),
        (VPSDE(), {"corrector": "ald", "snr": 0.0}, "sampling.snr=0.0: expected a positive number"),
        (VPSDE(), {"corrector": "ald", "n_steps_each": 0}, "sampling.n_steps_each=0: expected 1 or more"),
        (VPSDE(), {"num_steps": -1}, "sampling.num_steps=-1: expected 0 or more"),
        (VPSDE(), {"method": "ode", "rtol": 0.0}, "sampling.rtol=0.0: expected a positive number"),
        (VPSDE(), {"method": "ode", "atol": -1.0}, "sampling.atol=-1.0: expected a positive number"),
        (VPSDE(), {"predictor": "none"}, "sampling.predictor and sampling.corrector are both 'none'"),
        (
            subVPSDE(),
            {"predictor": "ancestral_sampling"},
            "SMLD or DDPM .*; subVPSDE has none: use 'reverse",
        ),
        (OrnsteinUhlenbeck(), {"predictor": "ancestral_sampling"}, "OrnsteinUhlenbeck has none"),
        (VPSDE(), {"predictor": "ancestral_sampling", "probability_flow": True}, "has no probability flow"),
        (VPSDE(), {"predictor": "reverse_diffusion", "num_steps": 19}, "in N=19 steps .* use at least 20 steps"),
        (VPSDE(), {"corrector": "ald", "num_steps": 10}, "in N=10 steps .* use at least 20 steps"),
        (VPSDE(), {"predictor": "ancestral_sampling", "num_steps": 20}, "divides by sqrt.* 0 in the first of N=20"),
    ],
)
def test_refuses_when_built(sde, settings, message):
    with pytest.raises(ValueError, match=message):
        sampling.build_sampler(make_config(**settings), sde, (2, 2, 2, 1))


def test_refuses_wrong_shapes():
    with pytest.raises(ValueError, match=r"shape=\(4,\): expected a batch axis and at least one more"):
        sampling.build_sampler(make_config(), VPSDE(), (4,))
    draw = sampling.build_sampler(make_config(num_steps=2), VPSDE(), (2, 3))
    score_fn = make_score_fn(VPSDE())
    with pytest.raises(ValueError, match=r"x_init has shape \(2, 4\); this sampler was built for \(2, 3\)"):
        draw(jax.random.key(0), score_fn, jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="got 3 keys for 2 examples"):
        draw(jax.random.split(jax.random.key(0), 3), score_fn)


def test_few_steps_are_allowed_without_ddpms_discretization():
    x, nfe = sample(make_config(num_steps=5), VPSDE(), (2, 2, 2, 1))
    assert int(nfe) == 5
    assert np.isfinite(x).all()
