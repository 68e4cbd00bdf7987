"""The folder that ranks work in."""

import pytest

from realuid_fast import data, teachers

from ...helpers import save_teacher
from .ranks import KINDS


@pytest.fixture
def place(tmp_path, request):
    """A folder named after one of :data:`KINDS`, the first unless a test asks for another, with a teacher in it."""
    place = tmp_path / getattr(request, "param", "points")
    place.mkdir()
    network, points = KINDS[place.name]
    save_teacher(place / "teacher.safetensors", network, points)
    # Here too, so that forked ranks find imported what these import: seconds for each rank otherwise.
    data.load(points)
    teachers.load(place / "teacher.safetensors")
    return place
