"""A small screen."""

from tests.helpers.models import panel
