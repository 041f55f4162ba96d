"""What every test runs under: one thread, an own cache, and real data only where it is named."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# More threads than one make small networks slower, and test runs side by side much slower.
torch.set_num_threads(1)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Point MEDISTILL_CACHE at a folder of this session, so that no run sees another's results."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDISTILL_CACHE", str(folder))
        patch.setenv("MEDISTILL_LEDGER", str(folder / "ledger.json"))
        yield folder


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder of real data, or skip the test where there is none."""
    named = os.environ.get("MEDISTILL_DATA")
    if not named:
        pytest.skip("MEDISTILL_DATA is not set: this test reads real data")
    folder = Path(named)
    if not folder.is_dir():
        pytest.skip(f"MEDISTILL_DATA names {named}, which is no folder: this test reads real data")
    return folder


@pytest.fixture
def untouched_generator() -> Iterator[None]:
    """Fail the test when it moved the global generator of torch."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator was used"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Return a real browser, or skip the test where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"found none of {', '.join(BROWSERS)}: this test opens the page in a browser")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[[Path, int, str], Any]]:
    """Return what opens a page; fail where the page erred or asked for anything outside."""
    troubles: list[str] = []
    views: list[Any] = []

    def opened(page: Path, width: int, scheme: str) -> Any:
        view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        views.append(view)
        view.on("console", lambda m: troubles.append(m.text) if m.type == "error" else None)
        view.on("pageerror", lambda error: troubles.append(str(error)))
        view.on(
            "request",
            lambda r: None if r.url.startswith(("file:", "data:")) else troubles.append(r.url),
        )
        view.goto(page.as_uri())
        return view

    yield opened
    for view in views:
        view.close()
    assert troubles == []
