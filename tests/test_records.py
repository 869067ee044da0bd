"""Every column of every schema says what it holds."""

from types import ModuleType

import pyarrow as pa
import pytest

from sharegpt4v import inspection, records


@pytest.mark.parametrize("module", [records, inspection], ids=["records", "inspection"])
def test_no_column_is_without_a_description_and_no_description_without_its_column(module: ModuleType) -> None:
    schemas = [value for value in vars(module).values() if isinstance(value, pa.Schema)]
    named = {name for schema in schemas for name in schema.names}
    assert len(named) > 5
    assert named - module.COLUMNS.keys() == set()
    own = module.COLUMNS.keys() - (set() if module is records else records.COLUMNS.keys())
    assert own - named == set()
