"""The page of ``weightlora report``, opened in a real browser where one is installed."""

import json
import random
import re
import shutil
import subprocess
import sys

import pytest
from user_texts import texts

from weightlora.cli import main
from weightlora.errors import DataError, PlanError
from weightlora.model.sites import Site
from weightlora.plan.plan import AdapterPlan, PlannedSite
from weightlora.report.page import make_page, read_run, write_page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the PATH")
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


def plan_of(layers=4, seed=0, steps=6, projections=PROJECTIONS, **more):
    lot = random.Random(seed)
    names = sorted(f"model.layers.{layer}.{name}" for layer in range(layers) for name in projections)
    scores = {name: lot.random() for name in names}
    kept = set(sorted(names, key=scores.__getitem__)[len(names) // 2 :])
    entries = tuple(
        PlannedSite(
            Site(name, 32, 64), 4, 8, r=4 * (name in kept), alpha=8, score=scores[name], score_error=scores[name] / 10
        )
        for name in names
    )
    history = tuple(tuple(scores[name] * step / steps for name in names) for step in range(1, steps + 1))
    return AdapterPlan(entries, rule="first_order", options={"keep": 0.5}, history=history, **more)


@pytest.fixture
def runs(tmp_path):
    """Two runs with losses; the second one keeps other sites."""
    for i, name in enumerate(("one", "two")):
        folder = tmp_path / name
        folder.mkdir()
        plan_of(seed=i).save(folder / "plan.json")
        losses = [[step, 2.0 / step + i] for step in range(1, 9)]
        (folder / "results.json").write_text(json.dumps({"losses": losses, "metrics": {"eval_loss": 0.5 + i}}))
        (folder / "config.yaml").write_text(f"task: rotten_tomatoes\nseed: {i}\n")
    return [tmp_path / "one", tmp_path / "two"]


def test_a_page_holds_what_was_stored(runs, tmp_path):
    write_page(runs, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    plan = AdapterPlan.load(runs[0] / "plan.json")
    for entry in plan.entries:
        assert f"{entry.site.name}: {f'rank {entry.r}' if entry.r else 'no adapter'}, score {entry.score:.4g}" in text
    for part in (f"{plan.lora_parameters:,}", f"{plan.expand().parameters:,}", "eval_loss", "rotten_tomatoes"):
        assert part in text
    other = AdapterPlan.load(runs[1] / "plan.json")
    differ = sum(plan.ranks[name] != r for name, r in other.ranks.items())
    assert 0 < differ < len(plan.entries)
    assert f"{differ} sites have another rank" in text


def test_losses_of_a_run_that_has_not_ended(tmp_path):
    plan_of().save(tmp_path / "plan.json")
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        log = [{"step": 1, "loss": float(step)}, {"step": 2, "eval_loss": 1.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert read_run(tmp_path).losses == ((1.0, 10.0),)


def test_plans_of_other_models_are_not_compared(tmp_path):
    plan_of().save(tmp_path / "a.json")
    plan_of(layers=2).save(tmp_path / "b.json")
    text = make_page([read_run(tmp_path / "a.json"), read_run(tmp_path / "b.json")])
    assert "cannot be compared" in text
    assert "have another rank" not in text


@pytest.mark.parametrize("text", [*texts(seed=0, count=20), "</script><i>", "</SCRIPT ><i>"])
def test_no_name_of_a_user_becomes_markup(text):
    """Compared with the page of a plain name: the same tags and the same scripts."""
    from html.parser import HTMLParser

    def tags(page):
        found = []
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attributes: found.append((tag, [name for name, _ in attributes]))
        parser.feed(page.replace(page[page.index("<script>") : page.index('<script type="application/json"')], ""))
        return sorted(found)

    made = [
        make_page([read_run_of(plan_of(projections=[*PROJECTIONS, name], base_model="plain"), label)])
        for name, label in (("plain", "plain"), (text.replace(".", "") or "plain", text))
    ]
    assert tags(made[0]) == tags(made[1])


def read_run_of(plan, name):
    from weightlora.report.page import StoredRun

    return StoredRun(name, plan, {"model": name}, ((1.0, 2.0),), {})


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("results.json", "{", DataError),
        ("results.json", '{"losses": [[1, "x"]]}', DataError),
        ("results.json", '{"metrics": 3}', DataError),
        ("config.yaml", "a: [", DataError),
        ("plan.json", "{}", PlanError),
    ],
)
def test_damaged_files_are_one_line(file, content, error, runs, tmp_path, capsys):
    (runs[0] / file).write_text(content)
    with pytest.raises(error):
        read_run(runs[0])
    assert main(["report", str(runs[0]), "--output", str(tmp_path / "r.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_no_torch_is_loaded(runs, tmp_path):
    code = (
        f"import sys; from weightlora.report.page import write_page; write_page({[str(r) for r in runs]}, "
        f"{str(tmp_path / 'r.html')!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# -- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def opened(browser):
    """Open a page, and see that it asks for nothing and logs no error."""
    contexts = []

    def open_page(path, **context):
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.requests, page.errors = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(path.as_uri())
        drawn = "document.querySelectorAll('.js-plotly-plot').length === document.querySelectorAll('.plot').length"
        page.wait_for_function(drawn)
        return page

    yield open_page
    for context in contexts:
        context.close()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(scheme, width, runs, tmp_path, opened):
    from axe_playwright_python.sync_playwright import Axe

    write_page(runs, tmp_path / "report.html")
    page = opened(tmp_path / "report.html", color_scheme=scheme, viewport={"width": width, "height": 900})
    assert page.locator(".js-plotly-plot").count() == 5  # the losses, and two of each run
    assert page.locator(".scatterlayer .trace").count() >= 2
    # Nothing but the tables and the map may be wider than the screen, and these scroll on their own.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000


@needs_browser
def test_cells_answer_to_mouse_and_keys(runs, tmp_path, opened):
    write_page(runs, tmp_path / "report.html")
    page = opened(tmp_path / "report.html")
    section = page.locator("#run-0")
    status, cells = section.locator(".status"), section.locator("td[data-text]")
    cells.nth(7).hover()
    assert status.inner_text() == cells.nth(7).get_attribute("data-text")
    cells.nth(0).click()
    for key, place in (("ArrowRight", 1), ("ArrowDown", 6), ("ArrowLeft", 5), ("ArrowUp", 0), ("ArrowUp", 0)):
        page.keyboard.press(key)
        assert status.inner_text() == cells.nth(place).get_attribute("data-text")
    assert section.locator("td[tabindex='0']").count() == 1  # one stop for Tab, not one for each cell
    page.get_by_role("link", name="two").click()
    assert page.url.endswith("#run-1")
    assert page.errors == []


@needs_browser
def test_a_broken_page_would_be_seen(runs, tmp_path, opened):
    from axe_playwright_python.sync_playwright import Axe

    write_page(runs, tmp_path / "report.html")
    file = tmp_path / "report.html"
    file.write_text(
        file.read_text()
        .replace("--dim: #4d5761", "--dim: #d0d0d0")
        .replace('lang="en"', "")
        .replace("draw();\nfor", "draw(); nothing();\nfor")
    )
    page = opened(file, color_scheme="light")
    rules = {rule["id"] for rule in Axe().run(page).response["violations"]}
    assert {"color-contrast", "html-has-lang"} <= rules
    assert page.errors


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The page of two plans of 560 sites and 200 steps."""
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    folder = tmp_path_factory.mktemp("large")
    for seed in (0, 1):
        plan_of(layers=80, steps=200, projections=names, seed=seed).save(folder / f"{seed}.json")
    write_page([folder / "0.json", folder / "1.json"], folder / "report.html")
    return folder / "report.html"


LINES = """cells => cells.map(cell => {
  const range = document.createRange();
  range.selectNodeContents(cell);
  return new Set([...range.getClientRects()].map(box => Math.round(box.top))).size;
})"""


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_of_560_sites_is_readable(large, width, opened):
    assert large.stat().st_size < 8e6
    page = opened(large, viewport={"width": width, "height": 900})
    section = page.locator("#run-0")
    assert section.locator("td[data-text]").count() == 560
    layers = section.locator("table.map tbody th")
    assert set(layers.evaluate_all(LINES)) == {1}  # "79" is not "7" above "9"
    box = section.locator(".tall")
    assert box.evaluate("box => box.scrollWidth <= box.clientWidth"), "a projection is out of sight"
    # The names of the projections and what is known of a cell are on the screen with the cell, also in the last layer.
    last = section.locator("td[data-text]").last
    box.evaluate("box => { box.scrollIntoView(); box.scrollTop = box.scrollHeight; }")
    last.hover()
    head, status = section.locator("table.map thead th").last, section.locator(".status")
    for part in (head, last, status):
        part_box = part.bounding_box()
        assert -1 <= part_box["y"] < part_box["y"] + part_box["height"] <= 901  # half a pixel is rounding
    assert status.inner_text() == last.get_attribute("data-text")
    assert page.evaluate("document.documentElement.scrollHeight") < 9000  # 268 different sites are a list to scroll
    assert page.errors == []


def test_sites_with_another_rank_stand_in_the_order_of_the_layers(large):
    text = large.read_text(encoding="utf-8")
    table = text[text.index("have another rank") : text.index('id="run-0"')]
    layers = [int(number) for number in re.findall(r"model\.layers\.(\d+)\.", table)]
    assert len(layers) > 100
    assert layers == sorted(layers)
