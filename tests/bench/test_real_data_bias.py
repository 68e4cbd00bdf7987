"""The closed form of real data's effect with a wrong teacher."""

import numpy as np
import pytest

from bench import real_data_bias as bias


def test_without_real_data_the_student_has_the_teachers_error():
    assert bias.student_errors(1, 1) == pytest.approx((bias.MEAN_ERROR, bias.STD_ERROR), abs=1e-3)


def test_where_beta_is_far_above_alpha_real_data_repairs():
    mean, std = bias.student_errors(0.5, 1.0)
    assert 0 < mean < 0.9 * bias.MEAN_ERROR
    assert 0.9 * bias.STD_ERROR < std < 0
    # At equal weights it does the reverse.
    mean, std = bias.student_errors(0.5, 0.5)
    assert mean > 1.5 * bias.MEAN_ERROR
    assert std < 1.5 * bias.STD_ERROR


def test_the_plot_has_alpha_across_and_beta_upwards(tmp_path):
    mean, std = bias.ratios(np.array([0.5, 1.0]))
    assert mean[1, 0] == pytest.approx(bias.student_errors(0.5, 1.0)[0] / bias.MEAN_ERROR)
    assert std[1, 1] == pytest.approx(1, abs=1e-2)
    bias.draw(tmp_path / "plot.png", points=3)
    assert (tmp_path / "plot.png").stat().st_size > 1000
