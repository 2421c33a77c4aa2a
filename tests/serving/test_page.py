"""The page in a real browser: conversations with the small model, by pointer and by keyboard alone."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

pytest.importorskip("selenium")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from dbrx_fn.serving.access import Access
from tests.support.browser import Browser, asked_urls, chromium, complaints, emulate
from tests.support.running_server import Running, running_server

MARKUP = "<img src=x onerror=\"document.body.textContent='run'\"><script>document.body.textContent='run'</script>"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(opened: Browser, running: Running) -> Iterator[Browser]:
    """The page as a newcomer sees it. Whatever a test does, nothing is complained of, and nobody else is asked."""
    emulate(opened)
    # A page that leaves saves its conversation, so the store is emptied from elsewhere.
    opened.get(running.url + "/health")
    opened.execute_script("localStorage.clear(); sessionStorage.clear()")
    complaints(opened)
    opened.get(running.url + "/")
    until(lambda: shown(opened, "#model") == "small")
    yield opened
    assert complaints(opened) == []
    asked = asked_urls(opened)
    assert asked
    assert [url for url in asked if not url.startswith((running.url, "data:"))] == []


def until(holds: Callable[[], object], seconds: float = 20) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.02)


def one(page: Browser, selector: str) -> WebElement:
    return page.find_element(By.CSS_SELECTOR, selector)


def texts(page: Browser, selector: str) -> list[str]:
    """The texts of all such elements at one moment: the page may replace them at the next."""
    found: list[str] = page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((found) => found.innerText)", selector
    )
    return found


def shown(page: Browser, selector: str) -> str:
    return texts(page, selector)[0]


def said(page: Browser) -> list[str]:
    """The texts of the conversation, in order."""
    return texts(page, ".said")


def is_answering(page: Browser) -> bool:
    return one(page, "#stop").is_displayed()


def press(page: Browser, name: str) -> None:
    """Clicks the last button of a name."""
    [*_, found] = [button for button in page.find_elements(By.TAG_NAME, "button") if button.text == name]
    found.click()


def keys(page: Browser, *pressed: str) -> None:
    """Presses keys wherever the focus is."""
    ActionChains(page).send_keys(*pressed).perform()


def ask(page: Browser, text: str) -> str:
    """Asks something, and waits for the answer."""
    before = len(said(page))
    keys(page, text, Keys.ENTER)
    until(lambda: len(said(page)) == before + 2 and not is_answering(page))
    return said(page)[-1]


def set_up(page: Browser, **settings: object) -> None:
    page.execute_script("localStorage.setItem('dbrx_fn.settings', arguments[0])", json.dumps(settings))


def test_a_conversation_goes_on_after_a_reload(page: Browser) -> None:
    set_up(page, temperature=0)
    first = ask(page, "Who goes there?")
    assert first
    assert "tokens/s" in shown(page, ".figures")
    page.refresh()
    assert said(page) == ["Who goes there?", first]
    second = ask(page, "And who are you?")
    assert said(page) == ["Who goes there?", first, "And who are you?", second]
    assert shown(page, "nav .current .title") == "Who goes there?"


def test_an_answer_streams_until_it_is_stopped(page: Browser) -> None:
    # With this seed the answer begins with a long line without asterisks, which would vanish once they are a pair.
    set_up(page, max_tokens=1500, temperature=1, seed=0)
    keys(page, "Tell me all", Keys.ENTER)
    until(lambda: len(said(page)) == 2 and said(page)[1])
    early = said(page)[1]
    until(lambda: len(said(page)[1]) > len(early))
    assert is_answering(page)
    keys(page, Keys.ESCAPE)
    until(lambda: not is_answering(page))
    stopped = said(page)[1]
    assert stopped.startswith(early)
    assert "stopped" in shown(page, ".figures")
    page.refresh()
    assert said(page)[1] == stopped


def test_an_answer_is_made_again_and_a_message_edited(page: Browser) -> None:
    set_up(page, temperature=0)
    first = ask(page, "Who goes there?")
    ask(page, "What news?")
    page.find_elements(By.CSS_SELECTOR, ".message.assistant button")[0].click()
    until(lambda: len(said(page)) == 2 and not is_answering(page))
    assert said(page) == ["Who goes there?", first]
    one(page, ".message.user button").click()
    ActionChains(page).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).send_keys("Peace!").perform()
    keys(page, Keys.ENTER)
    until(lambda: len(said(page)) == 2 and said(page)[0] == "Peace!" and not is_answering(page))
    assert said(page)[1] != first


def test_an_answer_gives_way_to_one_that_is_asked_for_meanwhile(page: Browser) -> None:
    set_up(page, max_tokens=3, temperature=1)
    ask(page, "Hail")
    set_up(page, max_tokens=1500, temperature=1)
    keys(page, "Tell me all", Keys.ENTER)
    until(lambda: len(said(page)) == 4 and said(page)[3])
    page.find_elements(By.CSS_SELECTOR, ".message.assistant button")[0].click()
    until(lambda: len(said(page)) == 2 and said(page)[1])
    assert is_answering(page)
    keys(page, Keys.ESCAPE)
    until(lambda: not is_answering(page))
    assert shown(page, ".figures") == "stopped"


def test_the_same_seed_gives_the_same_answer(page: Browser) -> None:
    press(page, "Settings")
    for name, value in (("temperature", "1"), ("seed", "7"), ("max_tokens", "12"), ("system", "Be brief.")):
        one(page, f"#settings [name={name}]").send_keys(value)
    press(page, "Save")
    one(page, "#prompt").click()
    first = ask(page, "Who goes there?")
    assert shown(page, ".figures").startswith("12 tokens")
    press(page, "Regenerate")
    until(lambda: not is_answering(page))
    assert said(page)[1] == first


def test_the_experts_of_an_answer_can_be_walked_through(page: Browser, running: Running) -> None:
    set_up(page, temperature=0, max_tokens=9)
    ask(page, "Who goes there?")
    press(page, "Experts")
    layers, top_k = 5, 4
    assert len(page.find_elements(By.CSS_SELECTOR, ".tokens [role=option]")) == 9
    shown_experts = []
    one(page, ".tokens").click()
    keys(page, Keys.HOME)
    for number in range(9):
        assert shown(page, ".experts h3[aria-live]").startswith(f"Token {number + 1} of 9")
        assert len(page.find_elements(By.CSS_SELECTOR, ".layers .expert")) == layers * top_k
        columns = page.find_elements(By.CSS_SELECTOR, ".layers li")
        names = [column.get_attribute("aria-label") or "" for column in columns]
        shown_experts.append([[int(one) for one in name.split("experts ")[1].split(", ")] for name in names])
        keys(page, Keys.ARROW_RIGHT)
    body = {"messages": [{"role": "user", "content": "Who goes there?"}], "temperature": 0, "max_tokens": 9}
    told = httpx.post(f"{running.url}/v1/chat/completions", json={**body, "experts": True}).json()
    assert shown_experts == told["choices"][0]["experts"]
    page.find_elements(By.CSS_SELECTOR, ".tokens [role=option]")[3].click()
    assert shown(page, ".experts h3[aria-live]").startswith("Token 4 of 9")
    assert one(page, ".tokens [aria-selected=true]").get_attribute("id") == "token-3"
    assert len(page.find_elements(By.CSS_SELECTOR, "svg.load rect:not(.ground)")) == layers * 16
    load = [[sum(expert in token[layer] for token in shown_experts) for expert in range(16)] for layer in range(layers)]
    titles: list[str] = page.execute_script(
        "return [...document.querySelectorAll('svg title')].map((t) => t.textContent)"
    )
    for title in titles:
        layer, expert, share = (int(number) for number in re.findall(r"\d+", title))
        assert abs(share - 100 * load[layer][expert] / 9) <= 0.5, title
    press(page, "Experts")
    assert page.find_elements(By.CSS_SELECTOR, ".experts") == []


def test_conversations_are_listed_renamed_and_deleted(page: Browser) -> None:
    set_up(page, max_tokens=3)
    for text in ("One", "Two"):
        ask(page, text)
        press(page, "New conversation")
    titles = texts(page, "nav .title")
    assert titles == ["Two", "One"]
    press(page, "One")
    assert said(page)[0] == "One"
    press(page, "Rename")
    keys(page, MARKUP, Keys.ENTER)
    assert shown(page, "nav .current .title") == f"One{MARKUP}"[:80]
    press(page, "Delete")
    page.switch_to.alert.accept()
    until(lambda: said(page) == [])
    page.refresh()
    assert texts(page, "nav .title") == ["Two"]


def test_markup_in_messages_answers_and_titles_stays_text(page: Browser) -> None:
    set_up(page, max_tokens=3)
    answer = f"{MARKUP}\n\n**{MARKUP}**\n\n```html\n{MARKUP}\n```\n`{MARKUP}`"
    messages = [{"role": "user", "content": MARKUP}, {"role": "assistant", "content": answer}]
    kept = {"id": "x", "title": MARKUP, "changed": 1, "messages": messages}
    page.execute_script("localStorage.setItem('dbrx_fn.conversation.x', arguments[0])", json.dumps(kept))
    page.refresh()
    assert said(page)[0] == MARKUP
    assert said(page)[1].count(MARKUP) == 4
    assert shown(page, "nav .title") == MARKUP
    assert [shown(page, f".said {tag}") for tag in ("strong", "pre")] == [MARKUP] * 2
    press(page, "New conversation")
    ask(page, MARKUP)
    assert said(page)[0] == MARKUP
    assert page.find_elements(By.CSS_SELECTOR, "img, main script, nav script") == []


def test_a_damaged_store_is_passed_over(page: Browser) -> None:
    set_up(page, max_tokens=3)
    for number, text in enumerate(["{", "null", '{"id": 1}', '{"id": "x", "title": "", "messages": [{"role": "x"}]}']):
        page.execute_script(f"localStorage.setItem('dbrx_fn.conversation.{number}', arguments[0])", text)
    page.refresh()
    assert ask(page, "Hail")


def test_old_conversations_give_way_to_new_ones(page: Browser) -> None:
    set_up(page, max_tokens=3)
    page.execute_script("""
        for (let number = 0; number < 100; number++) {
          const messages = [{ role: "user", content: `number ${number}` }];
          const kept = { id: `${number}`, title: `number ${number}`, changed: number, messages };
          localStorage.setItem(`dbrx_fn.conversation.${number}`, JSON.stringify(kept));
        }
    """)
    page.refresh()
    press(page, "New conversation")
    ask(page, "The newest")
    titles = texts(page, "nav .title")
    assert len(titles) == 100
    assert (titles[0], titles[-1]) == ("The newest", "number 1")


def test_all_can_be_done_by_keyboard_alone(page: Browser) -> None:
    set_up(page, temperature=0, max_tokens=5)
    keys(page, "First line")
    ActionChains(page).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    ask(page, "second line")
    assert said(page)[0] == "First line\nsecond line"
    reached = []
    for _ in range(30):
        keys(page, Keys.TAB)
        focused = page.switch_to.active_element
        reached.append(focused.accessible_name)
        if focused.tag_name in ("button", "textarea"):
            assert focused.value_of_css_property("outline-style") == "solid"
        if focused.text == "Edit":
            break
    keys(page, Keys.ENTER, " edited", Keys.ENTER)
    until(lambda: said(page)[0] == "First line\nsecond line edited" and not is_answering(page))
    assert page.switch_to.active_element == one(page, "#prompt")
    assert {"New conversation", "Settings", "Rename", "Delete"} <= set(reached)


def test_a_screen_reader_finds_names_and_landmarks(page: Browser) -> None:
    set_up(page, max_tokens=5)
    ask(page, "Hail")
    press(page, "Settings")
    page.execute_cdp_cmd("Accessibility.enable", {})
    for closes in (False, True):
        if closes:
            keys(page, Keys.ESCAPE)
        nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        found = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]]
        controls = [name for role, name in found if role in ("button", "textbox", "spinbutton", "checkbox", "listbox")]
        assert len(controls) >= 6
        assert all(controls)
    assert {"banner", "navigation", "main", "form", "log"} <= {role for role, _ in found}
    log = one(page, "#log")
    assert (log.get_attribute("aria-live"), log.get_attribute("aria-busy")) == ("polite", "false")


@pytest.mark.parametrize("width", [320, 375, 720])
def test_a_phone_shows_all_without_scrolling_sideways(page: Browser, width: int) -> None:
    emulate(page, width=width)
    set_up(page, max_tokens=5)
    ask(page, "x" * 300)
    page.execute_script("document.querySelector('#prompt').blur()")
    assert page.execute_script("return document.documentElement.scrollWidth") == width
    rights = "return [...document.querySelectorAll('body *')].map((found) => found.getBoundingClientRect().right)"
    assert max(page.execute_script(rights)) <= width
    press(page, "Conversations")
    assert one(page, "nav .title").is_displayed()
    keys(page, Keys.ESCAPE)
    assert not one(page, "nav").is_displayed()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(page: Browser, scheme: str) -> None:
    emulate(page, scheme=scheme)
    style = "return arguments[0].map((name) => getComputedStyle(document.documentElement).getPropertyValue(name))"
    names = ["--back", "--raised", "--text", "--quiet", "--wrong", "--accent", "--on-accent"]
    color = dict(zip(names, page.execute_script(style, names), strict=True))
    assert (luminance(color["--back"]) > 0.5) == (scheme == "light")
    for text in ("--text", "--quiet", "--wrong", "--accent"):
        for back in ("--back", "--raised"):
            assert contrast(color[text], color[back]) >= 4.5, (text, back)
    assert contrast(color["--on-accent"], color["--accent"]) >= 4.5


def test_the_page_asks_for_a_key_where_one_is_needed(opened: Browser) -> None:
    with running_server(Access((hashlib.sha256(b"sesame").digest(),))) as locked:
        opened.get(locked.url + "/")
        until(lambda: one(opened, "#settings").is_displayed())
        assert shown(opened, "#trouble").startswith("The API key is missing or wrong")
        one(opened, "[name=key]").send_keys("sesame", Keys.ENTER)
        until(lambda: shown(opened, "#model") == "small")
        assert ask(opened, "Who goes there?")
        assert "sesame" not in json.dumps(opened.execute_script("return {...localStorage}"))
    complaints(opened)
    keys(opened, "Are you there?", Keys.ENTER)
    until(lambda: texts(opened, ".message:last-child .wrong"))
    assert shown(opened, ".wrong[role=alert]:not(#trouble)").startswith("The server can't be reached")
    assert all("ERR_CONNECTION" in complaint for complaint in complaints(opened))
    asked_urls(opened)


def test_adapters_are_chosen_in_the_settings(opened: Browser) -> None:
    with running_server(adapters=["hamlet", "lear"]) as several:
        opened.get(several.url + "/")
        opened.execute_script("localStorage.clear()")
        opened.refresh()
        until(lambda: shown(opened, "#model") == "small")
        set_up(opened, seed=3, max_tokens=8)
        plain = ask(opened, "Who goes there?")
        press(opened, "Settings")
        assert texts(opened, "[name=model] option") == ["small", "hamlet", "lear"]
        one(opened, "[name=model]").send_keys("lear")
        press(opened, "Save")
        until(lambda: shown(opened, "#model") == "lear")
        press(opened, "New conversation")
        assert ask(opened, "Who goes there?") != plain
        opened.refresh()
        until(lambda: shown(opened, "#model") == "lear")
        assert complaints(opened) == []
    asked_urls(opened)


def test_an_error_is_told_in_a_sentence(page: Browser) -> None:
    set_up(page, max_tokens=3, top_p=7)
    keys(page, "Hail", Keys.ENTER)
    until(lambda: not is_answering(page) and len(said(page)) == 2)
    assert shown(page, ".message .wrong") == "top_p is 7 where a number from 0 to 1 is expected."
    set_up(page, max_tokens=3)
    press(page, "Try again")
    until(lambda: not is_answering(page) and said(page)[1])
    assert page.find_elements(By.CSS_SELECTOR, ".message .wrong") == []
    assert all("400" in complaint for complaint in complaints(page))


def luminance(color: str) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-relative-luminance, of a color as `#rrggbb`."""
    parts = [int(color.strip()[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)
