"""What benchmarks compute beside the time that they measure."""

import itertools
import sys

import pytest

from faqd_lib.reporting import grids
from faqd_lib.runs import planning
from faqd_lib.runs.suite import Suite
from faqd_lib.utils.files import project_root


@pytest.fixture(scope="module")
def cost():
    folder = str(project_root() / "benchmarks")
    sys.path.insert(0, folder)
    import cost

    yield cost
    sys.path.remove(folder)


@pytest.fixture
def suite(tmp_path):
    return Suite.open("quick", "digits", results=tmp_path)


def test_the_series_trains_nothing_twice_and_teachers_first(cost, suite):
    waves = list(cost.needed(make(suite) for make in cost.SERIES))
    runs = list(itertools.chain(*waves))
    assert len(runs) == len(set(runs))
    trained = set()
    for wave in waves:
        for config in wave:
            assert {other for other in (config.teacher, config.initial) if other} <= trained
        trained.update(wave)
    wanted = {c for wave in planning.waves(grids.everything(suite)) for c in wave if c.optimization.epochs}
    assert set(runs) == wanted


def test_projected_time_is_that_of_the_schedule(cost, suite):
    students = [suite.student("FAQD", weight_bits=bits) for bits in (1, 2, 4)]
    own = {cost.kind_of(config): 0.2 for config in (*students, suite.teacher())}
    common = {(None, 50): 0.01, ("resnet20", 50): 0.1}
    waves = list(cost.needed([students]))
    assert [len(wave) for wave in waves] == [1, 3]
    teacher = 10 * 20 * (0.01 + 0.2)  # epochs, batches of 50 of 1,000 images
    together, alone = 3 * 20 * (0.1 + 3 * 0.2), 3 * 20 * (0.1 + 0.2)
    for workers, students_seconds in ((1, together), (2, 3 * 20 * (0.1 + 2 * 0.2)), (3, alone), (9, alone)):
        seconds = cost.projected(waves, workers, 8, 1000, own, common)
        assert seconds == pytest.approx(teacher + students_seconds)
    assert cost.projected(waves, 1, 1, 1000, own, common) == pytest.approx(teacher + 3 * alone)
