"""Make docs/images/*.png: pictures of the demo in Chromium. Argument: the folder of a demo; without one, make it."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlencode

from tests.web.browser import running

IMAGES = Path(__file__).parent / "images"
QUERY = (
    "event('Order Completed').sum(property('total_gbp')) >= 5000\nAND event('Order Completed').count() >= 12"
)
PAGES = {
    "overview": "/",
    "definition": "/definitions/at_risk",
    "run": "/runs/90",
    "user": "/user?id=12347",
    "query": "/query?" + urlencode({"text": QUERY, "source": "shop", "name": "Loyal VIPs"}),
}
DARK = {"overview"}
SIZE = {"width": 1180, "height": 780}
MAX_BYTES = 150_000


def main(folder: Path) -> None:
    IMAGES.mkdir(exist_ok=True)
    executable = shutil.which("chromium")
    with running.served(folder / "audience_sync.toml") as address, running.chromium(executable) as browser:
        for name, path in PAGES.items():
            for scheme in ("light", "dark") if name in DARK else ("light",):
                tab = browser.new_page(viewport=SIZE, color_scheme=scheme, base_url=address)
                tab.goto(path, wait_until="networkidle")
                image = IMAGES / (f"{name}.png" if scheme == "light" else f"{name}-{scheme}.png")
                tab.screenshot(path=image)
                tab.close()
                if image.stat().st_size > MAX_BYTES:
                    sys.exit(f"{image} has {image.stat().st_size:,} bytes: make the page smaller.")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            demo = Path(folder, "demo")
            subprocess.run([sys.executable, "-m", "audience_sync", "demo", str(demo)], check=True)  # noqa: S603
            main(demo)
