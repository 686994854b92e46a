"""Settings that hold for the whole suite."""

import functools
import gc
import os
import shutil

import pytest
from hypothesis import settings

from paceline import kernels

# Derandomised: a failure here is a failure everywhere. No deadline: these machines are shared.
settings.register_profile("paceline", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("paceline")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Nothing is read from the user's cache or left in it; the kernel is built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACELINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def _imports_are_no_garbage():
    """The Trainer collects garbage at each start; what is imported makes that take 0.4 s."""
    gc.freeze()
    yield
    gc.unfreeze()


@functools.cache
def _why_no_kernel():
    try:
        kernels.cpu.build()
    except kernels.BuildError as error:
        return str(error)


@pytest.fixture
def kernel():
    """For tests of the one-pass kernel: skipped where it cannot be built."""
    if _why_no_kernel():
        pytest.skip(_why_no_kernel())


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: takes over some 5 seconds; -m 'not slow' leaves it out"
    )


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no process waits for another at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        # .ci/run brings it, and says so: there it must not be skipped.
        (pytest.fail if os.environ.get("PACELINE_CI") else pytest.skip)("needs Chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def on_a_phone(browser):
    """Opens a file at 390 px in the dark; at the end nothing went wrong or left the disk."""
    with browser.new_context(offline=True, color_scheme="dark") as context:
        page = context.new_page()
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: r.url.startswith("file:") or wrong.append(r.url))
        page.set_viewport_size({"width": 390, "height": 844})

        def opened(path):
            page.goto(path.as_uri())
            return page

        yield opened
        assert wrong == []
