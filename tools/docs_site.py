"""What MkDocs runs while it builds the site (mkdocs.yml, `hooks`): documents outside docs/ become pages of it.

README, ARCHITECTURE and their like stay where a reader of the repository expects them, and exist once.  A link that is
right in the repository is rewritten to the page of the site that it means.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Document in the repository: its name in the site.
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "LICENSE": "LICENSE.txt",
    "profiles/README.md": "cards.md",
    "profiles/measured/h200.md": "measured-h200.md",
    "kernels/README.md": "kernels.md",
}
_SOURCES = {page: source for source, page in PAGES.items()}
_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Any, *, config: Any) -> Any:
    """Add the documents that stand outside docs/ to the site's files."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Rewrite the links of one page."""
    return rewrite_links(markdown, page.file.src_uri)


def rewrite_links(markdown: str, page: str) -> str:
    """Return a page's text with its links as the site needs them.

    page: its name in the site.  Links to other sites, and within the page, stay as they are.
    """
    source = _SOURCES.get(page, f"docs/{page}")

    def rewrite(match: re.Match[str]) -> str:
        opening, target, anchor, closing = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        found = name_in_site(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        relative = os.path.relpath(found, posixpath.dirname(page) or ".").replace(os.sep, "/")
        return f"{opening}{relative}{anchor or ''}{closing}"

    return _LINK.sub(rewrite, markdown)


def name_in_site(path: str) -> str:
    """Return what a file of the repository is called in the site; one that is not in it keeps its name."""
    return PAGES.get(path) or path.removeprefix("docs/")
