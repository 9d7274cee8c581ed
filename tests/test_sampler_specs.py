"""The list of samplers on the command line: what it means, and one sentence for each mistake."""

import re

import pytest
import tiny

from experiment.build import build_experiment
from modes.compare_samplers.specs import DEFAULT, choose_samplers, parse_sampler


@pytest.fixture(scope="module")
def experiment():
    return build_experiment(tiny.make_config(sampling__num_steps=25).lock())


def test_a_sampler_changes_what_it_names_and_nothing_else(experiment):
    text = "pc:27:corrector=langevin:snr=0.1:noise_removal=false:n_steps_each=2, ode,ode:rtol=1e-3"
    chosen, skipped = choose_samplers(experiment, text)
    assert skipped == {}
    specs, experiments = zip(*chosen, strict=True)
    assert [spec.family for spec in specs] == [
        "pc corrector=langevin snr=0.1 noise_removal=false n_steps_each=2",
        "ode",
        "ode rtol=1e-3",
    ]
    assert specs[0].folder == "pc_27_corrector=langevin_snr=0.1_noise_removal=false_n_steps_each=2"
    assert [spec.is_adaptive for spec in specs] == [False, True, True]
    base = experiment.config.sampling.to_dict()
    expected = [
        {"num_steps": 27, "corrector": "langevin", "snr": 0.1, "noise_removal": False, "n_steps_each": 2},
        {"method": "ode"},
        {"method": "ode", "rtol": 1e-3},
    ]
    assert [each.config.sampling.to_dict() for each in experiments] == [base | changes for changes in expected]
    assert experiment.config.sampling.to_dict() == base
    assert all(each.config.is_locked and each.model is experiment.model for each in experiments)


def test_steps_may_be_named(experiment):
    assert parse_sampler("pc:num_steps=9", experiment.config.sampling).changes == {"method": "pc", "num_steps": 9}
    assert parse_sampler("pc:num_steps=9", experiment.config.sampling).family == "pc"


@pytest.mark.parametrize(
    ("samplers", "message"),
    [
        ("euler:10", "'euler:10': sampling.method='euler' is unknown; known: "),
        ("pc:30,pc:30", "'pc:30': the same sampler as 'pc:30'; leave one of them out"),
        ("pc,pc:25", "'pc:25': the same sampler as 'pc'; leave one of them out"),
        ("pc:many", "'pc:many': sampling.num_steps=many is not a value of type int"),
        ("pc:2.5", "'pc:2.5': sampling.num_steps=2.5 is not a value of type int"),
        ("pc:-4", "'pc:-4': sampling.num_steps=-4: expected 0 or more"),
        ("pc:4:snr=loud", "'pc:4:snr=loud': sampling.snr=loud is not a value of type float"),
        ("pc:4:noise_removal=1", "'pc:4:noise_removal=1': sampling.noise_removal=1 is not True or False"),
        ("pc:4:snrr=1", "'pc:4:snrr=1': config.sampling has no key 'snrr'; known: "),
        ("pc:4:snr=1:snr=2", "'pc:4:snr=1:snr=2': sampling.snr is given twice"),
        ("pc:4:num_steps=5", "'pc:4:num_steps=5': sampling.num_steps is given twice"),
        ("pc:4:5", "'pc:4:5': '5' is no KEY=VALUE; expected METHOD[:STEPS][:KEY=VALUE...]"),
        ("snr=1", "'snr=1': expected METHOD[:STEPS][:KEY=VALUE...]"),
        ("pc,", "'': expected METHOD[:STEPS][:KEY=VALUE...]"),
        ("ode:10", "'ode:10': ode chooses its steps itself; leave them out"),
        ("pc:predictor=none", "'pc:predictor=none': sampling.predictor and sampling.corrector are both 'none'"),
    ],
)
def test_a_mistake_names_its_sampler(experiment, samplers, message):
    with pytest.raises(ValueError, match=re.escape(f"--samplers: {message}")):
        choose_samplers(experiment, samplers)


@pytest.mark.exhaustive
def test_the_default_leaves_out_what_is_not_defined():
    """Ancestral sampling is not defined for every SDE: then neither is "pc", and the reason is told."""
    experiment = build_experiment(tiny.make_config().lock())
    chosen, skipped = choose_samplers(experiment)
    assert [spec.text for spec, _ in chosen] + list(skipped) == sorted(
        DEFAULT, key=lambda text: (text in skipped, DEFAULT.index(text))
    )
    assert {"pc", "ode"} <= {spec.text for spec, _ in chosen}
    broken = tiny.make_config(training__sde="subvpsde", sampling__method="ode")
    broken.sampling.predictor = "ancestral_sampling"
    chosen, skipped = choose_samplers(build_experiment(broken.lock()))
    assert skipped["pc"].startswith("sampling.predictor='ancestral_sampling' needs the Markov chain of SMLD or DDPM")
    assert "ode" in {spec.text for spec, _ in chosen}
