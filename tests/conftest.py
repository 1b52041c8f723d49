"""What all tests share."""

from collections.abc import Iterator

import file_output
import pytest

SLOW = ("test_pipeline_end_to_end.py", "test_cluster_slurm.py", "test_inference_runs.py", "test_semantics_answers.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files come first: a long file that begins last keeps one worker busy while the others wait."""
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


AS_WRITTEN = file_output.FLOAT_FORMAT


@pytest.fixture(scope="session", autouse=True)
def tables_in_full() -> Iterator[None]:
    """CSV tables are written with all digits, so that tests see the numbers before they are rounded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_output, "FLOAT_FORMAT", None)
        yield


@pytest.fixture
def tables_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """CSV tables are written as users get them."""
    monkeypatch.setattr(file_output, "FLOAT_FORMAT", AS_WRITTEN)
