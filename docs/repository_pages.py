"""A hook of MkDocs: pages that lie outside docs/ are part of the site, at their path in the repository.

docs/ itself is the root of the site, so a link from there into the repository loses its `../`, and one into docs/
loses that folder. In the repository all links work as they are written.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("*.md", "LICENSE", "deployments/Dockerfile", "deployments/compose.yaml", "model_containers/*/README.md")
LINK = re.compile(r"(\]\()(?:\.\./(?=\w)|((?:\.\./)*)docs/)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    for path in sorted(path for pattern in SHOWN for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        # The models' pages are reached from docs/models.md, not from the navigation.
        inclusion = InclusionLevel.NOT_IN_NAV if "/" in name else InclusionLevel.INCLUDED
        files.append(File.generated(config, name, abs_src_path=str(path), inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page."""
    return LINK.sub(r"\1\2", markdown)
