"""Models of these tests, each made once."""

import pytest

from tests.cases.tiny_models import tiny


@pytest.fixture(scope="package")
def models():
    made = {}

    def get(name):
        if name not in made:
            made[name] = tiny(name)
        return made[name]

    return get
