"""What MkDocs does not do by itself: pages that stand outside of docs/, and links to files that are no pages.

The pages are read on GitHub, too, so links in them are relative to the file that they stand in. On the site a link to
another page stays one, and a link to any other file of the repository becomes one to `repo_url`.
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
"""Pages, relative to the repository."""

MARKDOWN_LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
HTML_LINK = re.compile(r'(?<=<a href=")(?P<path>[^"#]+)(?P<anchor>#[^"]*)?(?=")')


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside."""
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of a page in Markdown: to the source file of another page, which MkDocs turns into its address."""

    def address(target: File) -> str:
        return os.path.relpath(target.src_uri, Path(page.file.src_uri).parent)

    return MARKDOWN_LINK.sub(lambda link: _resolved(link, page, config, files, address), markdown)


def on_page_context(context: Any, page: Page, config: MkDocsConfig, nav: Any) -> None:
    """A page that is a tab by itself has no neighbours to list beside it."""
    if page.parent is None:
        page.meta["hide"] = ["navigation"]


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of a notebook, which comes as HTML: to the address of another page."""
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
    return link[0]  # leads nowhere, which MkDocs says
