"""What the project relies on in Transformer Engine, by name."""

import pytest

from tests.unit.test_megatron_contract import check, declarations

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("one", declarations(of_engine=True))
def test_what_is_relied_on_is_there(one):
    check(one)
