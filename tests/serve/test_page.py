"""The page in a real browser: typed into, read from; skipped where there is no Chromium."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowvram.data.tokenizer import Tokenizer
from tests.serve.place import Place, Scripted, served

webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webdriver import WebDriver  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
# Written by whoever wants to look at the page: LOWVRAM_SCREENSHOTS=/tmp pytest tests/serve/test_page.py
SCREENSHOTS = os.environ.get("LOWVRAM_SCREENSHOTS")
ANSWER = (
    "Kış geldiğinde köyün yolları kapanır, haberler radyodan dinlenirdi. Annem mutfakta çay demlerken babam "
    "gazetenin bulmacasını çözüyordu.\n\nYağmur dinince çocuklar sokağa koştular; su birikintilerinde gemiler "
    "yüzdürdüler."
)
TAKE = "document.title='taken'"
HOSTILE = f'<img src=x onerror="{TAKE}"><script>{TAKE}</script><b>kalın</b> &amp; \x1b[31m'

pytestmark = pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="needs chromium and chromedriver")


@pytest.fixture
def open_page(tmp_path: Path) -> Iterator[object]:
    """Open a page in a browser of its own; returns the driver."""
    opened: list[WebDriver] = []

    def open_it(url: str, lang: str = "tr-TR", size: str = "1100,760", dark: bool = False) -> WebDriver:
        options = webdriver.ChromeOptions()
        options.binary_location = str(BROWSER)
        for flag in (
            "headless",
            "no-sandbox",
            "disable-gpu",
            "disable-quic",
            "disable-dev-shm-usage",
            "no-first-run",
            "no-proxy-server",
            "disable-background-networking",
            "disable-component-update",
            "disable-sync",
            f"user-data-dir={tmp_path / f'profile-{len(opened)}'}",
            f"lang={lang}",
            f"window-size={size}",
            *(["force-dark-mode", "blink-settings=preferredColorScheme=0"] if dark else []),
        ):
            options.add_argument(f"--{flag}")
        options.add_experimental_option("prefs", {"intl.accept_languages": lang})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        opened.append(driver)
        driver.get(url)
        return driver

    yield open_it
    for driver in opened:
        driver.quit()


def find(driver: WebDriver, selector: str) -> object:
    return driver.find_element(By.CSS_SELECTOR, selector)


def texts(driver: WebDriver, selector: str) -> list[str]:
    """Return what stands in the elements, as the page holds it."""
    return [one.get_property("textContent") for one in driver.find_elements(By.CSS_SELECTOR, selector)]


def wait(driver: WebDriver, is_so: object) -> None:
    WebDriverWait(driver, 30, 0.05).until(lambda _: is_so())


def shoot(driver: WebDriver, name: str) -> None:
    if SCREENSHOTS:
        driver.save_screenshot(str(Path(SCREENSHOTS) / f"serve-{name}.png"))


def complaints(driver: WebDriver) -> list[str]:
    """Return what the browser's console says of errors, refused loads above all."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def scripted(tokenizer: Tokenizer, text: str = ANSWER, speaks: bool = True, **door: object) -> object:
    decoder = Scripted(tokenizer, text, 900, 2)
    return served(tokenizer, decoder=decoder, max_context=900, speaks=speaks, **door)  # type: ignore[arg-type]


def decoder_of(place: Place) -> Scripted:
    assert isinstance(place.scheduler.decoder, Scripted)
    return place.scheduler.decoder


@pytest.mark.default_cases("tr-TR-Merhaba!-Gönder")
@pytest.mark.parametrize("lang, hello, send", [("tr-TR", "Merhaba!", "Gönder"), ("en-US", "Hello!", "Send")])
def test_a_question_is_typed_and_its_answer_read(
    small_tokenizer: Tokenizer, open_page, lang: str, hello: str, send: str
) -> None:
    with scripted(small_tokenizer) as place:
        page = open_page(place.url, lang, dark=lang == "en-US")
        wait(page, lambda: find(page, "#talk").is_displayed())
        assert find(page, "#empty .big").text == hello
        assert find(page, "#send").text == send
        assert find(page, "html").get_attribute("lang") == lang[:2]
        shoot(page, f"empty-{lang[:2]}")
        find(page, "#input").send_keys("Köyde kışın ne yapılırdı?", Keys.ENTER)
        wait(page, lambda: texts(page, ".turn.assistant:not(.busy) .text") == [ANSWER])
        assert texts(page, ".turn.user .text") == ["Köyde kışın ne yapılırdı?"]
        find(page, "#input").send_keys("Bir", Keys.SHIFT, Keys.ENTER, Keys.NULL, "daha?")
        assert find(page, "#input").get_property("value") == "Bir\ndaha?"
        find(page, "#send").click()
        wait(page, lambda: texts(page, ".turn.assistant:not(.busy) .text") == [ANSWER] * 2)
        shoot(page, f"talk-{lang[:2]}")
        assert len(page.find_elements(By.CSS_SELECTOR, "[data-t=retry]:not([hidden])")) == 1
        assert complaints(page) == []


@pytest.mark.nightly
def test_the_language_and_the_theme_are_switched_and_remembered(small_tokenizer: Tokenizer, open_page) -> None:
    with scripted(small_tokenizer) as place:
        page = open_page(place.url, "tr-TR")
        wait(page, lambda: find(page, "#talk").is_displayed())
        find(page, "[data-lang=en]").click()
        before = find(page, "html").get_attribute("data-theme")
        find(page, "#theme").click()
        page.refresh()
        wait(page, lambda: find(page, "#send").text == "Send")
        assert find(page, "html").get_attribute("data-theme") != before
        assert find(page, "#input").get_attribute("aria-label") == "Write something…"


@pytest.mark.nightly
def test_an_answer_is_stopped_and_what_was_said_stays(small_tokenizer: Tokenizer, open_page) -> None:
    with scripted(small_tokenizer, ANSWER * 3) as place:
        page = open_page(place.url)
        wait(page, lambda: find(page, "#talk").is_displayed())
        decoder = decoder_of(place)
        wait_s = decoder.may_write.wait
        decoder.may_write.wait = lambda _: wait_s(30) and threading_sleep()  # type: ignore[method-assign]
        find(page, "#input").send_keys("Anlat", Keys.ENTER)
        wait(page, lambda: len(texts(page, ".turn.assistant .text")[0]) > 20)
        assert not find(page, "#send").is_displayed()
        shoot(page, "busy-tr")
        find(page, "#stop").click()
        wait(page, lambda: find(page, "#send").is_displayed())
        wait(page, place.is_idle)
        said = texts(page, ".turn.assistant:not(.busy) .text")[0]
        assert ANSWER.startswith(said[:30])
        assert len(said) < len(ANSWER) * 3
        assert re.fullmatch(r"≈ \d+ belirteç · [\d.]+ belirteç/sn", texts(page, ".below .count")[0])


def threading_sleep() -> None:
    """Write as fast as a person reads."""
    import time

    time.sleep(0.02)


def test_an_answer_that_is_markup_is_shown_and_not_obeyed(small_tokenizer: Tokenizer, open_page) -> None:
    with scripted(small_tokenizer, HOSTILE) as place:
        page = open_page(place.url)
        wait(page, lambda: find(page, "#talk").is_displayed())
        find(page, "#input").send_keys("<b>a</b>", Keys.ENTER)
        wait(page, lambda: texts(page, ".turn.assistant:not(.busy) .text") == [HOSTILE])
        assert texts(page, ".turn.user .text") == ["<b>a</b>"]
        assert page.find_elements(By.CSS_SELECTOR, "#turns img, #turns script, #turns b") == []
        assert page.title == "small"


@pytest.mark.nightly
def test_a_base_model_goes_on_with_a_sheet(small_tokenizer: Tokenizer, open_page) -> None:
    with scripted(small_tokenizer, speaks=False) as place:
        page = open_page(place.url)
        wait(page, lambda: find(page, "#sheet").is_displayed())
        assert find(page, "#send").text == "Devam et"
        assert not find(page, "#input").is_displayed()
        find(page, "#sheet").send_keys("Bir varmış. ")
        find(page, "#send").click()
        wait(page, lambda: find(page, "#sheet").get_property("value") == f"Bir varmış. {ANSWER}")
        wait(page, lambda: find(page, "#undo").is_displayed())
        shoot(page, "base-tr")
        assert texts(page, "#marks mark") == [ANSWER], "what the model wrote is told from what was typed"
        assert re.fullmatch(r"\d+ belirteç · [\d.]+ belirteç/sn", texts(page, "#count")[0])
        find(page, "#sheet").send_keys(Keys.CONTROL, Keys.HOME)
        find(page, "#sheet").send_keys(Keys.NULL, "Evvel zaman içinde: ")
        assert texts(page, "#marks mark") == [ANSWER], "the marks move with the text"
        find(page, "#sheet").send_keys(*[Keys.ARROW_RIGHT] * 15, "!!")
        assert texts(page, "#marks mark") == [ANSWER[:3], ANSWER[3:]], "and leave out what is typed within"
        assert texts(page, "#marks")[0].strip() == find(page, "#sheet").get_property("value")
        find(page, "#send").click()
        wait(page, lambda: find(page, "#undo").is_displayed())
        assert texts(page, "#marks mark") == [ANSWER[:3], ANSWER[3:], ANSWER]
        find(page, "#undo").click()
        assert texts(page, "#marks mark") == [ANSWER[:3], ANSWER[3:]]
        find(page, "#new").click()
        assert texts(page, "#marks mark") == []
        find(page, "#sheet").send_keys("Bir varmış. ")
        find(page, "#sheet").send_keys(Keys.CONTROL, Keys.ENTER)
        wait(page, lambda: find(page, "#sheet").get_property("value").endswith(ANSWER))
        assert complaints(page) == []


@pytest.mark.nightly
@pytest.mark.parametrize("lang", ["tr-TR", "en-US"])
def test_marks_lie_behind_their_words_also_when_scrolled(small_tokenizer: Tokenizer, open_page, lang: str) -> None:
    with scripted(small_tokenizer, f"{ANSWER}\n\n" * 4, speaks=False) as place:
        page = open_page(place.url, lang, size="700,560", dark=lang == "en-US")
        wait(page, lambda: find(page, "#sheet").is_displayed())
        shoot(page, f"base-empty-{lang[:2]}")
        find(page, "#sheet").send_keys("Bir varmış. ", Keys.CONTROL, Keys.ENTER)
        wait(page, lambda: find(page, "#undo").is_displayed())
        wait(page, lambda: page.execute_script("return sheet.classList.contains('is-scrolled')"))
        shoot(page, f"base-scrolled-{lang[:2]}")
        for measure in ("clientWidth", "clientHeight", "scrollTop"):
            assert page.execute_script(f"return sheet.{measure} - marks.{measure}") == 0, measure
        # A text field counts its last line break otherwise; less than a line is no line.
        assert abs(page.execute_script("return sheet.scrollHeight - marks.scrollHeight")) < 31
        find(page, "#open-settings").click()
        shoot(page, f"base-settings-{lang[:2]}")
        is_clipped = "return seed.scrollWidth > seed.clientWidth"
        page.execute_script("seed.value = ''; seed.type = 'text'; seed.value = seed.placeholder")
        assert not page.execute_script(is_clipped)
        assert complaints(page) == []


@pytest.mark.nightly
def test_a_space_that_an_answer_begins_with_is_not_shown(small_tokenizer: Tokenizer, open_page) -> None:
    with scripted(small_tokenizer, " \n Evet. \n") as place:
        page = open_page(place.url)
        wait(page, lambda: find(page, "#talk").is_displayed())
        find(page, "#input").send_keys("Anlat", Keys.ENTER)
        wait(page, lambda: texts(page, ".turn.assistant:not(.busy) .text") == ["Evet. \n"])
        assert "belirteç/sn" in texts(page, ".below .count")[0]
        assert page.execute_script("return document.body.innerText.includes('≈')") is False


@pytest.mark.nightly
def test_the_key_is_asked_for_and_a_wrong_one_again(small_tokenizer: Tokenizer, open_page) -> None:
    with scripted(small_tokenizer, api_key="gizli") as place:
        page = open_page(place.url, size="420,760")
        for key in ("yanlış".encode("ascii", "ignore").decode(), "gizli"):
            wait(page, lambda: find(page, "#key").is_displayed())
            shoot(page, "key-tr")
            find(page, "#key").send_keys(key, Keys.ENTER)
        wait(page, lambda: find(page, "#talk").is_displayed())
        find(page, "#input").send_keys("Anlat", Keys.ENTER)
        wait(page, lambda: texts(page, ".turn.assistant:not(.busy) .text") == [ANSWER])
        shoot(page, "narrow-tr")
        find(page, "#open-settings").click()
        assert find(page, "#temperature").get_property("value") == "0.8"
        shoot(page, "settings-tr")
        root = "document.documentElement"
        assert page.execute_script(f"return {root}.scrollWidth - {root}.clientWidth") <= 0


@pytest.mark.nightly
def test_an_error_is_told_and_the_question_is_not_lost(small_tokenizer: Tokenizer, open_page) -> None:
    with scripted(small_tokenizer) as place:
        page = open_page(place.url)
        wait(page, lambda: find(page, "#talk").is_displayed())
        decoder_of(place).prefill = None  # type: ignore[method-assign,assignment]
        place.scheduler.stop()
        find(page, "#input").send_keys("Anlat", Keys.ENTER)
        wait(page, lambda: "Sunucu duruyor" in find(page, "#notice").text)
        assert find(page, "#input").get_property("value") == "Anlat"
        assert texts(page, ".turn") == []
        shoot(page, "error-tr")
