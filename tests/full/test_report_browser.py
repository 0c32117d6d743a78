"""The report page in a real browser: light, dark and narrow. Skipped where there is no Chromium."""

import json
import os
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared import report
from tests.unit.test_report import PNG, make_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
DARK = "--blink-settings=preferredColorScheme=0"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    run_dir = make_run(tmp_path / "run")
    (run_dir / "pages").mkdir()
    (run_dir / "pages" / "sheet.png").write_bytes(PNG)
    (run_dir / "train.log").write_text("a very long line of a log " * 40 + "\n")
    return report.write(run_dir)


def browse(page: Path, *flags: str) -> bytes:
    scratch = page.parent / "browser"
    command = [str(CHROMIUM), "--headless", "--disable-gpu", "--hide-scrollbars"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    command += [f"--user-data-dir={scratch}", *flags, f"file://{page}"]
    return subprocess.run(command, capture_output=True, check=True, timeout=100).stdout


def picture(page: Path, width: int, *flags: str) -> np.ndarray:
    shot = page.parent / "shot.png"
    browse(page, f"--window-size={width},2000", f"--screenshot={shot}", *flags)
    return np.asarray(Image.open(shot).convert("RGB"))


def test_light_and_dark_follow_the_system(page):
    light, dark = picture(page, 1000), picture(page, 1000, DARK)
    assert light[0, 0].tolist() == [255, 255, 255]
    assert dark[0, 0].tolist() == [0x16, 0x18, 0x1C]
    for shot in (light, dark):  # the curve's blue is there in both
        assert (np.abs(shot.astype(int) - [0x28, 0x78, 0xC8]).sum(2) < 30).sum() > 200


def test_a_narrow_screen_needs_no_sideways_scrolling(page):
    # measured in a frame of that width, which has a script; the page itself has none
    frame = page.with_name("frame.html")
    frame.write_text(
        f'<iframe src="{page.name}" style="width:360px;height:600px;border:0"></iframe><p id=out>'
        "</p><script>onload=()=>{const d=document.querySelector('iframe').contentDocument"
        ".documentElement;document.querySelector('#out').textContent="
        "JSON.stringify([d.scrollWidth,d.clientWidth])}</script>"
    )
    text = browse(frame, "--allow-file-access-from-files", "--dump-dom").decode()
    scroll, client = json.loads(text.partition('id="out">')[2].partition("</p>")[0])
    assert scroll <= client == 360


def test_a_foreign_page_is_shown_and_runs_nothing_and_fetches_nothing(page):
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        hostile = (
            f"<body style='background:#00c800;height:9999px'><img src='{address}/picture'>"
            f"<link rel=stylesheet href='{address}/style'><iframe src='{address}/frame'></iframe>"
            f"<script>document.body.style.background='red';fetch('{address}/script')</script>"
        )
        (page.parent / "pages" / "foreign.html").write_text(hostile)
        report.write(page.parent)
        shot = picture(page, 1000)
        server.shutdown()
    assert (shot == [0, 0xC8, 0]).all(2).sum() > 50_000  # as its own style has it, not its script
    assert asked == []
