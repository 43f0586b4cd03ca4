"""What the pages of this package share: their look, and how they are served without anything leaving the computer."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable
from html import escape
from pathlib import Path


# gradio reads these when it is imported. What sessions upload and get lies in this folder, which goes away with the
# process.
_TEMPORARY = tempfile.TemporaryDirectory(prefix="anodiff-pages-")
FOLDER = Path(_TEMPORARY.name)
os.environ["GRADIO_TEMP_DIR"] = _TEMPORARY.name
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("The pages of anodiff need gradio: `pip install anodiff[app]`.") from error


# How often what a session has left is looked for, and how old it is then, both in seconds.
_CLEANING = (600, 6 * 3600)

_CSS = """
.anodiff-grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 14px; }
.anodiff-charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 14px; }
.anodiff-grid figure, .anodiff-charts figure { margin: 0; }
.anodiff-grid img { width: 100%; image-rendering: pixelated; border-radius: 4px; background: #000; display: block; }
.anodiff-grid figcaption, .anodiff-charts figcaption { font-size: 13px; margin-top: 4px; opacity: 0.85; }
.anodiff-charts svg { width: 100%; height: auto; }
.anodiff-note { font-size: 14px; margin: 10px 0; }
.anodiff-error { border-left: 4px solid #c2410c; padding: 8px 12px; background: rgba(194, 65, 12, 0.12); }
.anodiff-facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; }
.anodiff-facts dt { opacity: 0.75; }
.anodiff-facts dd { margin: 0; font-weight: 600; }
.anodiff-viewer { width: 100%; height: 900px; border: 0; border-radius: 6px; background: #111; }
"""


class Sessions:
    """Keeps account of the folders that visitors' files lie in, so that each goes away with its visitor."""

    def __init__(self):
        self._folders: dict[str, set[Path]] = defaultdict(set)

    def keep(self, uploaded: list[str] | str | None, request: gr.Request) -> None:
        """Notes the files that a visitor has uploaded, for `upload` of a `gr.File`."""
        listed = [uploaded] if isinstance(uploaded, str) else uploaded or []
        self._folders[request.session_hash].update(Path(path).parent for path in listed)

    def new_folder(self, request: gr.Request) -> Path:
        """Returns a folder for results of a visitor, which is not made yet, and whose name nobody can guess."""
        folder = FOLDER / secrets.token_hex(16)
        self._folders[request.session_hash].add(folder)
        return folder

    def forget(self, request: gr.Request) -> None:
        """Deletes what a visitor has brought and got, for `unload` of a page."""
        for folder in self._folders.pop(request.session_hash, ()):
            # Two visitors with the same file share its folder.
            if not any(folder in others for others in self._folders.values()):
                shutil.rmtree(folder, ignore_errors=True)


def make_page(title: str, parts: dict[str, Callable[[gr.Blocks], None]]) -> gr.Blocks:
    """
    Makes a page that sends no statistics and deletes files that sessions have left.

    Args:
        title (`str`): Of the page.
        parts (`dict`): Name of a part to what fills it; several parts are tabs.
    """
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=_CLEANING) as page:
        for name, fill in parts.items():
            with gr.Tab(name) if len(parts) > 1 else gr.Column():
                fill(page)
    return page


def launch(page: gr.Blocks, host: str | None = None, port: int | None = None) -> str:
    """
    Starts to serve a page, with fonts of the reader's own system, and returns its address. `page.close()` ends it.

    Args:
        page (`gr.Blocks`): Of [`make_page`].
        host (`str`, *optional*): Address to listen at; 127.0.0.1, or what a Space of the Hub sets.
        port (`int`, *optional*): Port; the first free one from 7860 on.

    Raises:
        OSError: The port is taken.
    """
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    options = {"footer_links": [], "ssr_mode": False, "share": False, "quiet": True, "prevent_thread_lock": True}
    try:
        _, address, _ = page.launch(server_name=host, server_port=port, theme=theme, css=_CSS, **options)
    except OSError as error:
        raise OSError(f"Port {port} cannot be had, choose another one by `--port`: {error}") from error
    return address


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Serves a page until the process is stopped; raises an `OSError` if the port is taken."""
    address = launch(page, host, port)
    print(f"{page.title}: {address} (Ctrl+C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def write_note(text: str, error: bool = False) -> str:
    """Writes a line of text as HTML, marked if it is an error."""
    return f'<div class="anodiff-note{" anodiff-error" if error else ""}">{escape(text)}</div>'


def write_facts(facts: dict[str, str]) -> str:
    """Writes names and values as a list in HTML."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f'<dl class="anodiff-facts">{rows}</dl>'


def write_frame(page: str, title: str) -> str:
    """Writes a whole page, as text, as a frame within another page."""
    return (
        f'<iframe class="anodiff-viewer" title="{escape(title)}" sandbox="allow-scripts allow-downloads"'
        f' srcdoc="{escape(page)}"></iframe>'
    )


def write_pictures(pictures: list[tuple[str, str]]) -> str:
    """Writes pictures in a row, each with its caption, as HTML: pairs of an address and a text."""
    figures = [
        f'<figure><img src="{source}" alt="{escape(text)}"><figcaption>{escape(text)}</figcaption></figure>'
        for source, text in pictures
    ]
    return f'<div class="anodiff-grid">{"".join(figures)}</div>'


def write_charts(charts: list[tuple[str, str]]) -> str:
    """Writes charts, each with its caption, as HTML: pairs of SVG and a text."""
    figures = [f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>" for svg, text in charts]
    return f'<div class="anodiff-charts">{"".join(figures)}</div>'
