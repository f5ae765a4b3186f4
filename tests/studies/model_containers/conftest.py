"""The models' modules and small screens."""

from tests.helpers.models import _processor_as_found, load, panel, planted, planted_pairs, two_lines
