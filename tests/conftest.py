import pytest

from tests import processes
from tests.good_recipe import good, write  # noqa: F401  # fixtures


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-golden", action="store_true", help="write what is found as the new golden numbers"
    )


@pytest.fixture(scope="session", autouse=True)
def _processes_to_copy() -> None:
    processes.prepare()
