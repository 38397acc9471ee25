"""MkDocs hooks: generated pages, the list of results, and fences with how each is known to work."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docsite.fences import FENCE, kind_of
from docsite.reference import pages

_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)#\s:]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages with measurements to the navigation, newest first."""
    results = sorted(Path(config.docs_dir, "results").glob("*.md"), reverse=True)
    config.nav = [
        *(config.nav or []),
        {"Results": [f"results/{path.name}" for path in results]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference pages."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Say under each block of commands whether a test runs it; name what lies outside the site."""
    folder, docs = Path(config.docs_dir, page.file.src_uri).parent, Path(config.docs_dir)

    def linked(match: re.Match[str]) -> str:
        path = (folder / match["target"]).resolve()
        outside = path.exists() and (path.is_dir() or not path.is_relative_to(docs))
        if not outside:
            return match[0]
        where = path.relative_to(docs.parent).as_posix()
        return where if where in match["text"] else f"{match['text']} (`{where}` of the repository)"

    return _LINK.sub(linked, FENCE.sub(_shown, markdown))


def _shown(match: re.Match[str]) -> str:
    words = match["info"].split()
    if not words or words[0] != "sh":
        return match[0]
    return f"```sh\n{match['body']}```\n<small>{kind_of(words).note}</small>"
