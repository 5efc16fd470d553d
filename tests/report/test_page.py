"""The page of ``weightlora report``, opened in a real browser where one is installed."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from fuzz import texts

from weightlora.cli import main
from weightlora.errors import DataError, PlanError
from weightlora.model.sites import Site
from weightlora.plan.plan import AdapterPlan, PlannedSite
from weightlora.report.page import SavedRun, make_page, read_run, write_page

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
    return AdapterPlan(entries, rule="first_order", options={"adapters": 0.5}, history=history, **more)


@pytest.fixture
def runs(tmp_path):
    """Two runs with losses; the second one keeps other sites."""
    for i, name in enumerate(("one", "two")):
        folder = tmp_path / name
        folder.mkdir()
        plan_of(seed=i).save(folder / "plan.json")
        losses = [[step, 2.0 / step + i] for step in range(1, 9)]
        results = {"losses": losses, "metrics": {"eval_loss": 0.123456 + i, f"only_{name}": 1234.56}}
        results |= {"selection_seconds": 9.5678, "training_seconds": 61.0 + i, "steps": 8}
        (folder / "results.json").write_text(json.dumps(results))
        os.utime(folder / "results.json", (i * 86_400, i * 86_400))
        (folder / "config.yaml").write_text(
            f"task: rotten_tomatoes\nmodel_name_or_path: embedded/minilm\nmethod: {name}d\nseed: {i}\n"
        )
    return [tmp_path / "one", tmp_path / "two"]


def test_a_page_holds_what_was_stored(runs, tmp_path):
    write_page(runs, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text().replace("<wbr>", "")
    plan = AdapterPlan.load(runs[0] / "plan.json")
    for entry in plan.entries:
        assert f"{entry.site.name}: {f'rank {entry.r}' if entry.r else 'no adapter'}, score {entry.score:.4g}" in text
    for part in (f"{plan.lora_parameters:,}", f"{plan.expand().parameters:,}", "eval_loss", "rotten_tomatoes"):
        assert part in text
    other = AdapterPlan.load(runs[1] / "plan.json")
    differ = sum(plan.ranks[name] != r for name, r in other.ranks.items())
    assert 0 < differ < len(plan.entries)
    assert f"{differ} sites have another rank" in text


def parsed(page):
    """Tables of a page as lists of rows of texts, each with the heading above it, and its text in all."""
    found, text = [], []
    state = {"heading": "", "in": ""}
    parser = HTMLParser()

    def start(tag, _):
        state["in"] = tag
        if tag in ("h1", "h2", "h3", "summary"):
            state["heading"] = ""
        elif tag == "table":
            found.append((state["heading"], []))
        elif tag == "tr":
            found[-1][1].append([])
        elif tag in ("td", "th"):
            found[-1][1][-1].append("")

    def end(tag):
        state["in"] = "" if tag in ("h1", "h2", "h3", "summary", "table", "script", "style") else state["in"]

    def data(part):
        if state["in"] in ("script", "style"):
            return
        text.append(part)
        if state["in"] in ("h1", "h2", "h3", "summary"):
            state["heading"] += part
        elif found and found[-1][1] and found[-1][1][-1] and state["in"]:
            found[-1][1][-1][-1] += part

    parser.handle_starttag, parser.handle_endtag, parser.handle_data = start, end, data
    parser.feed(page)
    tables = [(heading, [[" ".join(cell.split()) for cell in row] for row in rows]) for heading, rows in found]
    return tables, " ".join(" ".join(text).split())


def test_the_runs_are_side_by_side_first(runs, tmp_path):
    """One table before all others: metrics, parameters, seconds and dates, a dash where a run has none."""
    plan_of().save(tmp_path / "bare.json")
    page = make_page([read_run(path) for path in (*runs, tmp_path / "bare.json")])
    plan = AdapterPlan.load(runs[0] / "plan.json")
    heading, rows = parsed(page)[0][0]
    assert heading == "Runs side by side"
    assert rows == [
        ["run", "one", "two", "bare"],
        ["method", "oned", "twod", "first_order"],
        ["eval_loss", "0.1235", "1.123", "–"],
        ["only_one", "1,235", "–", "–"],
        ["only_two", "–", "1,235", "–"],
        ["training loss, last logged", "0.25", "1.25", "–"],  # 2 / 8, and one more
        ["adapters", *["10 of 20"] * 3],
        ["parameters", *[f"{plan.parameters:,}"] * 3],
        ["share of LoRA on all sites", *["50.0%"] * 3],
        ["selection, s", "9.568", "9.568", "–"],
        ["training, s", "61", "62", "–"],
        ["steps", "8", "8", "–"],
        ["results written, UTC", "1970-01-01 00:00", "1970-01-02 00:00", "–"],
    ]
    heads = re.findall(r"<h[12][^>]*>(.*?)</h[12]>", page)
    titles = ["Runs side by side", "Training loss", "Differences of sites"]
    assert heads == ["rotten_tomatoes on embedded/minilm", *titles, "one", "two", "bare"]
    assert "<title>rotten_tomatoes on embedded/minilm: one, two, bare</title>" in page


FOLDED = r"<details>.*?</details>"


def test_differences_and_options_are_folded(runs):
    page = make_page([read_run(path) for path in runs])
    assert "<details open" not in page
    folded, shown = " ".join(re.findall(FOLDED, page, re.DOTALL)), re.sub(FOLDED, "", page, flags=re.DOTALL)
    for part in ("have another rank", "Options of the selection", "model_name_or_path: embedded/minilm"):
        assert part in folded
        assert part not in shown
    assert len(re.findall("<details>", page)) == 1 + 2 * 2  # the pair of runs, and two of each run


def test_the_map_has_a_scale_of_its_colours(runs):
    """A colour's depth is the root of the score's share, so the middle one is at a quarter of the span."""
    run = read_run(runs[0])
    scores = run.plan.scores.values()
    low, high = min(scores), max(scores)
    page = make_page([run])
    scale = re.search(r'<ul class="scale".*?</ul>', page, re.DOTALL)[0]
    found = re.findall(r'--level: (\d+)"></span>([\d.]+)', scale)
    shares = {0: 0, 25: 1 / 16, 50: 1 / 4, 75: 9 / 16, 100: 1}
    assert found == [(str(level), f"{low + (high - low) * share:.4g}") for level, share in shares.items()]
    flat = run_of(plan_of(), score=0.5)
    assert "0.5 (all sites)" in make_page([flat])


def run_of(plan, score):
    entries = tuple(replace(entry, score=score) for entry in plan.entries)
    return SavedRun("flat", replace(plan, entries=entries), {}, (), {})


def figures(page):
    return json.loads(re.search(r'<script type="application/json" id="plots">(.*?)</script>', page, re.DOTALL)[1])


@pytest.mark.parametrize(("count", "mode"), [(1, "markers"), (2, "markers"), (3, "lines+markers"), (200, "lines")])
def test_no_line_is_drawn_through_two_points(count, mode):
    losses = tuple((float(step), 1.23456789 / (step + 1)) for step in range(count))
    [curve] = figures(make_page([SavedRun("a", plan_of(), {}, losses, {})]))["curves"]["data"]
    assert curve["mode"] == mode
    assert curve["y"][:2] == [1.235, 0.6173][:count]  # four digits


def test_rows_of_the_history_have_short_names():
    plan = plan_of()
    history = figures(make_page([SavedRun("a", plan, {}, (), {})]))["history-0"]
    axis = history["layout"]["yaxis"]
    best = max(plan.entries, key=lambda entry: entry.score)
    assert axis["tickvals"] == history["data"][0]["y"]
    assert axis["tickvals"][-1] == best.site.name
    layer, projection = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", best.site.name).groups()
    assert axis["ticktext"][-1] == f"{layer} {projection}"
    many = plan_of(layers=30)  # 150 sites, of which every fourth is named, the best too
    axis = figures(make_page([SavedRun("a", many, {}, (), {})]))["history-0"]["layout"]["yaxis"]
    assert len(axis["ticktext"]) == len(axis["tickvals"]) == 38
    assert axis["tickvals"][-1] == max(many.entries, key=lambda entry: entry.score).site.name


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


@pytest.mark.sampled(3)
@pytest.mark.parametrize("text", [*texts(seed=0, count=20), "</script><i>", "</SCRIPT ><i>"])
def test_no_name_of_a_user_becomes_markup(text):
    """Compared with the page of a plain name: the same tags and the same scripts."""

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
    return SavedRun(name, plan, {"model": name}, ((1.0, 2.0),), {})


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("results.json", "{", DataError),
        ("results.json", '{"losses": [[1, "x"]]}', DataError),
        ("results.json", '{"metrics": 3}', DataError),
        ("results.json", '{"training_seconds": "long"}', DataError),
        ("results.json", "[]", DataError),
        ("results.json", '{"metrics": {"loss": 1' + "0" * 400 + "}}", DataError),
        ("results.json", '{"losses": [[1, 1' + "0" * 400 + "]]}", DataError),
        ("results.json", '{"losses": [[1, {}]]}', DataError),
        ("results.json", '{"losses": [5]}', DataError),
        ("results.json", "[" * 100_000, DataError),
        ("config.yaml", "a: [", DataError),
        ("config.yaml", "[1]", DataError),
        ("config.yaml", "a: " + "[" * 60 + "]" * 60, DataError),
        ("config.yaml", "a: &a [*a]", DataError),
        ("config.yaml", "a: " + "[" * 5000, DataError),
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


@pytest.mark.parametrize(
    "state",
    [
        *("[]", "3", "{", '{"log_history": 3}', '{"log_history": [3]}', '{"log_history": [{"loss": 1}]}'),
        '{"log_history": [{"step": 1, "loss": 1' + "0" * 400 + "}]}",
    ],
)
def test_a_damaged_state_of_a_trainer_is_one_line(state, tmp_path, capsys):
    plan_of().save(tmp_path / "plan.json")
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(state)
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "r.html")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(tmp_path / "checkpoint-2" / "trainer_state.json") in said
    assert not (tmp_path / "r.html").exists()


CONFIGS = {
    "a date": ("when: 2020-01-02\n2021-03-04: x\ntask: 2022-05-06", ("2020-01-02", "2021-03-04", "2022-05-06")),
    "a set": ("some: !!set {one, two}\ntask: {a: 1}", ("one", "two")),
    "bytes": ("some: !!binary aGVsbG8=", ("aGVsbG8=",)),
    "half a letter": ('some: "\\ud800"\ntask: "\\ud800"\nmethod: "\\ud800"', ("ud800",)),
    "aliases": ("\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 1}]" for i in range(7)), ("*id001",)),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("text", "shown"), CONFIGS.values(), ids=CONFIGS)
def test_whatever_yaml_holds_is_shown(text, shown, runs, tmp_path):
    (runs[0] / "config.yaml").write_text(text)
    write_page(runs, tmp_path / "report.html")
    found = (tmp_path / "report.html").read_text(encoding="utf-8")
    for part in shown:
        assert part in found
    assert len(found) < 10_000_000


def test_metrics_of_any_size_are_shown(runs):
    metrics = {"huge": 1e300, "tiny": 1e-300, "none": float("nan"), "endless": float("-inf"), "half \ud800": 1.0}
    (runs[0] / "results.json").write_text(json.dumps({"metrics": metrics, "losses": [[1, 1e300], [2, float("inf")]]}))
    rows = {row[0]: row[1] for row in parsed(make_page([read_run(runs[0])]))[0][0][1]}
    assert [rows[name] for name in list(metrics)[:4]] == ["1e+300", "1e-300", "nan", "-inf"]
    assert rows["half \\ud800"] == "1"
    assert rows["training loss, last logged"] == "inf"


@pytest.mark.parametrize("depth", [60, 500, 900])
@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize("place", ["options", "lora", "versions"])
def test_a_plan_that_is_nested_deeply_is_one_line(depth, kind, place, runs, tmp_path, capsys):
    content = json.loads((runs[0] / "plan.json").read_text())
    value = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    content[place]["x"] = value
    (runs[0] / "plan.json").write_text(json.dumps(content))
    assert main(["report", str(runs[0]), "--output", str(tmp_path / "r.html")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(runs[0] / "plan.json") in said


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


@pytest.mark.sampled(1)
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    cut = section.locator(".cut")
    assert cut.is_visible()  # 80 layers are not all in sight, and the page says so
    assert "560" in page.locator("table.runs").inner_text()
    assert page.errors == []


@pytest.mark.slow
@needs_browser
def test_a_grid_that_is_whole_says_nothing_of_scrolling(runs, tmp_path, opened):
    write_page(runs, tmp_path / "report.html")
    page = opened(tmp_path / "report.html", viewport={"width": 1280, "height": 900})
    assert not page.locator("#run-0 .cut").is_visible()
    page.set_viewport_size({"width": 250, "height": 900})
    page.wait_for_function("!document.querySelector('#run-0 .cut').hidden")


@pytest.mark.slow
@needs_browser
def test_a_huge_loss_is_drawn(runs, tmp_path, opened):
    (runs[0] / "results.json").write_text(json.dumps({"losses": [[1, 1.0], [2, 1e300], [1e300, 3]], "metrics": {}}))
    write_page(runs, tmp_path / "report.html")
    assert opened(tmp_path / "report.html").errors == []


def test_sites_with_another_rank_stand_in_the_order_of_the_layers(large):
    text = large.read_text(encoding="utf-8")
    table = text[text.index("have another rank") : text.index('id="run-0"')].replace("<wbr>", "")
    layers = [int(number) for number in re.findall(r"model\.layers\.(\d+)\.", table)]
    assert len(layers) > 100
    assert layers == sorted(layers)
