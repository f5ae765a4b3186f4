"""compose.yaml as the tests read it."""

from tests.helpers.compose import compose, passwords
