"""MkDocs hook: files of the repository that a page links to become part of the site, below `repository/`.

So the pages of docs/ have ordinary relative links, which work on GitHub, too.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)")


def place(path: Path) -> str:
    """Return where a file of the repository lies in the site's sources."""
    inside = path.is_relative_to(DOCS)
    return str(path.relative_to(DOCS)) if inside else f"repository/{path.relative_to(ROOT)}"


def targets(page: Path) -> dict[str, Path]:
    """Return the file of the repository that each link of a page means."""
    found = {link: (page.parent / link).resolve() for link in LINK.findall(page.read_text(encoding="utf-8"))}
    return {link: path for link, path in found.items() if path.is_relative_to(ROOT) and path.is_file()}


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to, and what those pages link to."""
    todo = [Path(file.abs_src_path) for file in files.documentation_pages()]
    while todo:
        for path in targets(todo.pop()).values():
            if files.get_file_from_path(place(path)) is None:
                files.append(File.generated(config, place(path), abs_src_path=str(path)))
                todo += [path] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Point links to where their files lie in the site; a link to a folder becomes plain text."""
    source = Path(page.file.abs_src_path)
    known = targets(source)
    folder = Path(page.file.src_uri).parent
    text = re.sub(r"\[([^\]]+)\]\(([^)#:\s]+)\)", lambda m: m[0] if m[2] in known else m[1], markdown)
    return LINK.sub(lambda m: os.path.relpath(place(known[m[1]]), folder) if m[1] in known else m[1], text)
