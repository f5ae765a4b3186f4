"""The flow that makes a shared embedding: the same artifact that a benchmark makes, found again, and clear refusals."""

from __future__ import annotations

import pytest

from core.errors import UserError
from flows.embed import embed


def test_an_embedding_that_each_fold_makes_is_refused() -> None:
    with pytest.raises(UserError, match="made from the training cells of a fold"):
        embed.fn("coexpression")


def test_an_unknown_embedding_and_a_file_for_something_else_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean reactome"):
        embed.fn("reactom")
    with pytest.raises(UserError, match="'demo' takes no part in this run"):
        embed.fn("reactome", {"demo": "/a.h5ad"})
