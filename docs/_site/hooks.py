"""MkDocs hooks: add pages from outside docs/, and resolve links to files that are not pages.

The pages are also read on GitHub, so their links are relative to the file. On the site, a link to another page stays a
link to that page, and a link to any other file of the repository becomes a link to `repo_url`.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ["CHANGELOG.md", "CONTRIBUTING.md", "notebooks/*.ipynb"]
"""Pages outside docs/, relative to the repository root."""

MARKDOWN_LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
HTML_LINK = re.compile(r'(?<=<a href=")(?P<path>[^"#]+)(?P<anchor>#[^"]*)?(?=")')


@event_priority(100)  # before mkdocs-jupyter collects the notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolve links in Markdown to the source file of the target page, which MkDocs converts to its URL."""

    def address(target: File) -> str:
        return os.path.relpath(target.src_uri, Path(page.file.src_uri).parent)

    return MARKDOWN_LINK.sub(lambda link: _resolved(link, page, config, files, address), markdown)


def on_page_context(context: Any, page: Page, config: MkDocsConfig, nav: Any) -> None:
    """Hide the navigation sidebar on pages that are a tab of their own, since it would list only the page itself."""
    if page.parent is None:
        page.meta["hide"] = ["navigation"]


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolve links in notebooks, which are HTML, to the URL of the target page."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return HTML_LINK.sub(
        lambda link: _resolved(link, page, config, files, lambda to: to.url_relative_to(page.file)), html
    )


def _resolved(link: re.Match[str], page: Page, config: MkDocsConfig, files: Files, address: Any) -> str:
    path, anchor = link["path"], link["anchor"] or ""
    if re.match(r"[a-z]+:|/", path):
        return link[0]
    target = (Path(str(page.file.abs_src_path)).parent / path).resolve()
    pages = {Path(str(file.abs_src_path)): file for file in files if file.abs_src_path}
    if target in pages:
        return address(pages[target]) + anchor
    if target.exists() and target.is_relative_to(ROOT):
        return f"{config.repo_url}/blob/HEAD/{target.relative_to(ROOT).as_posix()}{anchor}"
    return link[0]  # a broken link, which MkDocs reports
