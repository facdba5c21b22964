import pytest

from tests.unit.report.sample import sample_report


@pytest.fixture(scope="session")
def report():
    return sample_report()
