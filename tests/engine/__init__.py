import pytest

pytest.register_assert_rewrite("tests.engine.crowd")  # what fails there shows its values, as in a test
