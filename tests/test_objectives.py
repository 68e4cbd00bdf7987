"""Objectives: the scalars of each preset, and what is refused or warned about."""

import warnings

import pytest

import realuid_fast as rf
from realuid_fast.objectives import UID, GeneralRealUID, RealUID


def test_uid_has_no_real_half_and_needs_no_teacher_in_the_fake_turn():
    uid = UID()
    assert tuple(uid.generated) == (1, 1, 0, 1)
    assert tuple(uid.real) == (0, 0, 0, 0)
    assert not uid.needs_real
    assert not uid.needs_teacher
    assert (uid.alpha, uid.beta, uid.Q, uid.kappa) == (1, 1, 1, 1)


def test_realuid_rows_are_perfect_squares():
    """With gamma = alpha the fake loss is A ||f - (B/A) tgt||^2, so C = B^2 / A and the teacher is not needed."""
    objective = RealUID(0.92, 0.94)
    for row in (objective.generated, objective.real):
        assert row.D == 0
        assert pytest.approx(row.B**2 / row.A, rel=1e-12) == row.C
    assert tuple(objective.generated)[:2] == (0.92, 0.94)
    assert tuple(objective.real)[:2] == pytest.approx((0.08, 0.06))
    assert objective.needs_real
    assert not objective.needs_teacher


@pytest.mark.parametrize(("gamma", "kappa"), [(0.9, 1.0), (0.8, 1.0), (0.9, 0.95)])
def test_general_realuid_rows(gamma, kappa):
    alpha, beta = 0.9, 0.95
    objective = GeneralRealUID(alpha, beta, gamma, kappa)
    expected = {
        "generated": (gamma * kappa**2, kappa * beta, kappa * (gamma * kappa - alpha), beta**2 / alpha),
        "real": (
            (1 - gamma) * kappa**2,
            kappa * (1 - beta),
            kappa * ((1 - gamma) * kappa - (1 - alpha)),
            (1 - beta) ** 2 / (1 - alpha),
        ),
    }
    for half, values in expected.items():
        assert tuple(getattr(objective, half)) == pytest.approx(values, abs=1e-12)
    assert gamma == objective.Q
    assert objective.needs_teacher == (gamma != alpha or kappa != 1)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: RealUID(1.0, 0.9), "alpha = 1 requires beta = 1.*unbounded"),
        (lambda: RealUID(1.2, 0.9), r"alpha must lie in \(0, 1\]"),
        (lambda: RealUID(0.0, 0.9), r"alpha must lie in \(0, 1\]"),
        (lambda: RealUID(0.9, 0.0), "beta must be positive"),
        (lambda: RealUID(float("nan"), 0.9), "alpha must be a finite number"),
        (lambda: RealUID("0.9", 0.9), "alpha must be a finite number"),
        (lambda: GeneralRealUID(0.9, 0.95, 1.0), "gamma = 1 requires alpha = beta = 1"),
        (lambda: GeneralRealUID(0.9, 0.95, 0.0), r"gamma must lie in \(0, 1\]"),
        (lambda: GeneralRealUID(0.9, 0.95, 0.9, kappa=0.5), "kappa must be 1 or beta"),
    ],
)
def test_unbounded_or_meaningless_choices_are_refused(build, sentence):
    with pytest.raises(rf.errors.UserError, match=sentence):
        build()


def test_ratio_one_warns_that_real_data_is_idle():
    with pytest.warns(UserWarning, match="carries no signal"):
        RealUID(0.9, 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UID()
        RealUID(0.92, 0.94)
