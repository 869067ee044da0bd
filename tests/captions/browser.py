"""Pages after their script has run, as chromium prints them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def opened(page: Path, fragment: str, tmp_path: Path, user: str = "") -> str:
    """The document after its script, and then the script `user`, have run."""
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH")
    if user:
        used = tmp_path / "used.html"
        used.write_text(page.read_text().replace("</body>", f"<script>{user}</script></body>"))
        page = used
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update"
    flags += " --virtual-time-budget=2000"  # timers and events run out before the document is printed
    flags += f" --disable-background-networking --disable-sync --user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *flags.split(), "--dump-dom", f"file://{page}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def status(dom: str) -> str:
    found = re.search(r'role="status"[^>]*>([^<]*)<', dom)
    assert found
    return found[1]
