"""What the gateway's page shows in states that it is told: layout, faults, idleness, the past, slow requests."""

from __future__ import annotations

from itertools import pairwise

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from told_page import BOXES, MS, NOW_MS, crossed, model, node, overlaps, past, plan, told_page

GRAPHS = {
    "diamond with skips": [(-1, 0), (0, 1), (0, 2), (1, 3), (2, 3), (0, 3), (-1, 3), (3, -1)],
    "eight in a row": [(-1, 0), *((stage, stage + 1) for stage in range(7)), (7, -1)],
    "three branches": [(-1, 0), (0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (3, 4), (4, -1)],
    "skips over all": [(-1, 0), *((stage, stage + 1) for stage in range(4)), (0, 2), (0, 3), (0, 4), (1, 4), (4, -1)],
}
CHAIN = [(-1, 0), (0, 1), (1, -1)]
FAILURE = {"count": 7, "last": "input 'x' has the wrong shape"}


def nodes_of(edges, **changes):
    """A node for each stage of a graph."""
    return [node(stage, **changes) for stage in sorted({stage for edge in edges for stage in edge} - {-1})]


@pytest.fixture
def told(browser):
    """Opens the page with one model; keeps contexts open until the test ends."""
    opened = []

    def tell(edges=CHAIN, nodes=None, *, of_plan=None, options=None, **changes):
        nodes = nodes_of(edges) if nodes is None else nodes
        context = told_page(browser, [plan(edges, **(of_plan or {}))], [model(nodes, **changes)], **(options or {}))
        opened.append(context)
        return context.__enter__()

    yield tell
    for context in opened:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("width", [1180, 390])
@pytest.mark.parametrize("name", GRAPHS)
def test_no_line_meets_a_label_or_a_box(told, name, width):
    found = told(GRAPHS[name], options={"viewport": (width, 800)}).eval_on_selector(".graph", BOXES)
    assert len(found["labels"]) == sum(-1 not in edge for edge in GRAPHS[name])
    assert not [(box, at) for box in found["labels"] + found["texts"] for at in found["lines"] if crossed(box, at)]
    assert not [(box, at) for box in found["boxes"] for at in found["lines"] if crossed(box, at)]
    everything = found["labels"] + found["boxes"]
    assert not [(one, two) for at, one in enumerate(everything) for two in everything[:at] if overlaps(one, two)]
    tops = [y for line in found["lines"] for _, y in line] + [box["top"] for box in everything]
    assert min(tops) >= found["graph"]["top"], "nothing is cut"
    assert max(y for line in found["lines"] for _, y in line) <= found["graph"]["bottom"]


def test_a_graph_takes_the_whole_width(told):
    found = told(CHAIN).eval_on_selector(".graph", BOXES)
    assert found["frame"]["right"] - max(box["right"] for box in found["boxes"]) < 40
    assert min(box["left"] for box in found["boxes"]) - found["frame"]["left"] < 40


def test_a_graph_that_is_too_wide_scrolls_inside_its_frame_and_begins_at_the_first_stage(told):
    page = told(GRAPHS["eight in a row"])
    found = page.eval_on_selector(".graph", BOXES)
    assert found["graph"]["right"] > found["frame"]["right"]
    first = page.locator('.graph [data-id="s0"] rect').bounding_box()
    assert found["frame"]["left"] <= first["x"] < first["x"] + first["width"] <= found["frame"]["right"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_labels_of_edges_have_the_colour_of_the_page(told, scheme):
    page = told(options={"color_scheme": scheme})
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert page.eval_on_selector(".graph .label rect", "one => getComputedStyle(one).fill") == colour
    assert (colour == "rgb(255, 255, 255)") == (scheme == "light")


def test_an_idle_model_says_so_and_shows_no_old_figures(told):
    gone = {"answered": 0, "per_s": 0.0, "p50_ns": 0, "p99_ns": 0, "last_ms": NOW_MS - 12 * 60_000}
    page = told(nodes=nodes_of(CHAIN, per_s=0.0, run_ns=0, p99_ns=0), **gone)
    figures = page.locator(".figures").first.inner_text()
    assert "idle" in figures
    assert "last request 12 min ago" in figures
    assert "ms" not in figures
    assert "idle" in page.locator('.graph [data-id="in"]').text_content()
    assert page.locator("tbody td[data-name='p99']").all_inner_texts() == ["\N{EN DASH}"] * 2
    assert page.locator("tbody td[data-name='time']").all_inner_texts() == ["planned 1.00 ms"] * 2


def test_a_model_without_any_request_says_so(told):
    assert "no request yet" in told(answered=0, last_ms=0, p50_ns=0, p99_ns=0).locator(".figures").first.inner_text()


def test_a_model_that_writes_texts_is_not_idle(told):
    text = {"running": 1, "waiting": 0, "tokens_per_s": 9.0, "first_token_ns": 0, "gap_ns": 0, "cache_bytes": 0,
            "cache_usage": 0.0, "rows_per_step": 1.0, "replays": 0}  # fmt: skip
    assert "idle" not in told(answered=0, text=text).locator(".figures").first.inner_text()


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("INVALID", "7 requests of the last minute were refused (wrong input): the last said “input 'x' has the wrong"),
        ("REJECTED", "7 requests of the last minute were rejected: the last said"),
        ("TIMEOUT", "7 requests of the last minute ran out of time"),
        ("CANCELED", "7 requests of the last minute were given up by the caller."),
    ],
)
def test_what_callers_cause_is_said_quietly(told, reason, words):
    page = told(failures={reason: FAILURE})
    assert page.locator(".trouble").is_hidden()
    assert words in page.locator(".quiet").inner_text()
    colours = page.evaluate("[...document.querySelectorAll('.quiet, footer')].map(one => getComputedStyle(one).color)")
    assert colours[0] == colours[1], "as other text beside the main one"


def test_a_model_that_is_not_here_is_said_quietly(browser):
    astray = {"count": 1, "last": "model 'nope' is unknown"}
    with told_page(browser, [plan(CHAIN)], [model(nodes_of(CHAIN))], astray=astray) as page:
        assert "1 request of the last minute asked for a model that is not here" in page.inner_text("#astray")
        assert page.locator(".trouble").is_hidden()


LOSS = {"at_ms": NOW_MS - 5000, "story": "stage 1 (node 1.0) ended by signal 9"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nodes": [node(0), node(1, state="failed")], "ready": False}, "Stage 1 has no node."),
        ({"loss": LOSS}, "Last node lost: stage 1 (node 1.0) ended by signal 9 (5 s ago)"),
        ({"failures": {"OTHER": FAILURE}}, "7 requests of the last minute failed: the last said"),
        ({"ready": False, "reason": "node 0.0 cannot reach node 1.0"}, "takes no requests: node 0.0 cannot reach"),
        ({"ready": False, "state": "loading", "reason": "it is being loaded"}, "takes no requests: it is being loaded"),
    ],
)
def test_what_the_server_causes_is_red(told, changes, words):
    page = told(**changes)
    assert words in page.locator(".trouble").inner_text()
    red, green, blue = page.eval_on_selector(
        ".trouble", "one => getComputedStyle(one).color.match(/\\d+/g).slice(0, 3).map(Number)"
    )
    assert red > 2 * max(green, blue)


def test_a_node_that_was_lost_long_ago_and_is_back_is_no_trouble(told):
    page = told(loss={**LOSS, "at_ms": NOW_MS - 12 * 60_000})
    assert page.locator(".trouble").is_hidden()
    assert "A node was lost 12 min ago: stage 1" in page.locator(".quiet").inner_text()


@pytest.mark.parametrize(("estimated", "word"), [(False, "planned"), (True, "estimated")])
def test_the_measured_time_stands_beside_the_planned_one(told, estimated, word):
    page = told(of_plan={"predicted_ns": 920_000, "estimated": estimated}, nodes=nodes_of(CHAIN, run_ns=1_110_000))
    assert f"1.11 ms, {word} 0.920" in page.locator('.graph [data-id="s0"]').text_content()
    assert page.locator("tbody td[data-name='time']").all_inner_texts() == [f"1.11 ms, {word} 0.920"] * 2
    assert page.locator(".over").count() == 0, "1.21 times the plan"


@pytest.mark.parametrize(("replicas", "words"), [("", "2 of 2 nodes, "), ("1–4", "2 of 2 nodes (1–4), ")])  # noqa: RUF001
def test_a_range_of_replicas_stands_beside_the_nodes_in_the_box(told, replicas, words):
    page = told(of_plan={"replicas": replicas}, nodes=[node(0, utilisation=1.0), node(0, 1, utilisation=1.0), node(1)])
    box = page.locator('.graph [data-id="s0"]')
    assert words in box.text_content()
    frame = box.locator("rect").first.bounding_box()
    texts = [text.bounding_box() for text in box.locator("text").all()]
    assert all(text["x"] + text["width"] <= frame["x"] + frame["width"] for text in texts)


def test_a_time_far_above_the_plan_is_marked_in_words(told):
    page = told(of_plan={"predicted_ns": 800_000}, nodes=nodes_of(CHAIN, run_ns=1_110_000))
    assert page.locator('.graph [data-id="s0"] text.over').text_content() == "▲ 1.39 x the plan"
    assert page.locator("tbody td b.over").all_inner_texts() == ["▲ 1.39 x"] * 2


def test_texts_are_aligned_to_the_left_and_figures_to_the_right(told):
    sides = told().evaluate("""() => {
      const cells = document.querySelector("#models tbody tr").cells, heads = document.querySelectorAll("#models th");
      const side = (one) => getComputedStyle(one).textAlign;
      return Object.fromEntries([...heads].map((head, at) => [head.textContent, [side(head), side(cells[at])]]));
    }""")
    assert [sides.pop(name) for name in ("node", "state", "")] == [["left", "left"]] * 3
    assert set(map(tuple, sides.values())) == {("right", "right")}


PHONE = {"viewport": (390, 800), "has_touch": True, "is_mobile": True}


def test_everything_can_be_used_on_a_phone(told, browser):
    page = told(GRAPHS["diamond with skips"], slowest=1, options={**PHONE, "slowest": slowest()})
    page.wait_for_selector(".slow button")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    small = page.evaluate("""[...document.querySelectorAll("button, select, input, textarea, a, .graph .box rect")]
      .map(one => [one.textContent || one.tagName, one.getBoundingClientRect()])
      .filter(([, { width, height }]) => width && (width < 40 || height < 40)).map(([name]) => name)""")
    assert small == []
    outside = page.evaluate("""[...document.querySelectorAll("#models td")]
      .filter(one => one.getBoundingClientRect().right > innerWidth).length""")
    assert outside == 0, "rows of tables are cards"
    first = page.locator('.graph [data-id="s0"] rect').bounding_box()
    assert first["x"] + first["width"] <= 390


def points(count: int, step_s: int, missing: range = range(0)):
    """Points of a chart up to now, without some."""
    return [[NOW_MS - 1000 * step_s * at, 20.0, 8 * MS] for at in range(count - 1, -1, -1) if at not in missing]


COLUMNS = "document.querySelector('.chart').plot.data"


def test_a_chart_shows_the_past_of_a_minute_and_of_an_hour_with_gaps(told):
    pasts = [past(points(60, 1, range(20, 28)), points(360, 10, range(100, 130)))]
    page = told(now=[NOW_MS, 20.0, 8 * MS], options={"pasts": pasts})
    times, rates, p99s = page.evaluate(COLUMNS)
    assert (len(times), rates.count(None), set(p99s)) == (53, 1, {8, None}), "a gap of eight seconds"
    page.get_by_role("button", name="last hour").click()
    times, rates, _ = page.evaluate(COLUMNS)
    assert (len(times), rates.count(None)) == (331, 1)
    assert times[-1] - times[0] == 3590
    assert page.get_by_role("button", name="last hour").get_attribute("aria-pressed") == "true"


def test_a_chart_says_the_value_under_the_pointer_and_follows_the_keys(told):
    minute = [[NOW_MS - 1000 * at, float(at), (1 + at) * MS] for at in range(59, 0, -1)]
    page = told(now=[NOW_MS, 0.0, 0], options={"pasts": [past(minute)]})
    said = page.locator(".said")
    assert "0.0 requests/s, none answered" in said.inner_text()
    page.focus(".canvas")
    page.keyboard.press("ArrowLeft")
    assert "1.0 requests/s, p99 2.00 ms" in said.inner_text()
    page.keyboard.press("ArrowLeft")
    assert "2.0 requests/s, p99 3.00 ms" in said.inner_text()
    box = page.locator(".canvas .u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    assert "30.0 requests/s, p99 31.0 ms" in said.inner_text()


def test_a_chart_stands_still_for_who_wants_little_motion(told):
    pasts = [past([[NOW_MS - 1000, 3.0, MS]])]
    page = told(now=[NOW_MS, 0.0, 0], options={"pasts": pasts, "reduced_motion": "reduce"})
    assert "3.0 requests/s" in page.locator(".said").inner_text()
    assert "20.0" in page.locator(".figures").first.inner_text(), "the figures go on"


def slowest():
    """What the address of slow requests says of two requests, of which one failed."""
    parts = [
        ("read", "", 1),
        ("queue", "", 3),
        ("send", "", 1),
        ("wait", "1.0", 34),
        ("run", "1.0", 10),
        ("send", "", 1),
    ]
    begun, periods = 0, []
    for kind, where, ms in [*parts, ("answer", "", 1)]:
        periods.append({"kind": kind, "node": where, "start_ns": begun * MS, "ns": ms * MS})
        begun += ms
    answered = {
        "at_ms": NOW_MS - 3000, "total_ns": 51 * MS, "reason": "", "message": "", "periods": periods, "beside": [],
        "summary": "Most of the time it waited for stage 1 (34 of 51 ms).", "placed": True,
    }  # fmt: skip
    failed = {**answered, "total_ns": 40 * MS, "reason": "TIMEOUT", "summary": "It failed after 40 ms: late",
              "periods": [{"kind": "failed", "node": "", "start_ns": 0, "ns": 40 * MS}]}  # fmt: skip
    return [{"name": "told", "version": "1", "requests": [answered, failed]}]


def test_a_slow_request_opens_its_timeline_by_key(told):
    page = told(slowest=1, options={"slowest": slowest()})
    page.focus(".slow button")
    page.keyboard.press("Enter")
    assert page.inner_text(".timeline .summary") == "Most of the time it waited for stage 1 (34 of 51 ms)."
    names = page.locator(".timeline .measure .name").all_inner_texts()
    assert names == [
        "its inputs were read", "waited in the gateway's queue", "on its way to node 1.0", "waited for node 1.0",
        "ran in stage 1 (node 1.0)", "on its way back", "its response was written",
    ]  # fmt: skip
    values = [float(text.removesuffix(" ms")) for text in page.locator(".timeline .measure .value").all_inner_texts()]
    assert sum(values) == pytest.approx(51)
    ends = page.evaluate("""[...document.querySelectorAll(".timeline .bar i")].map(one => one.getBoundingClientRect())
      .map(({ left, right }) => [left, right])""")
    assert all(after[0] == pytest.approx(before[1], abs=1) for before, after in pairwise(ends))
    page.keyboard.press("Enter")
    assert page.locator(".timeline").count() == 0


def test_a_failed_request_is_listed_as_such(told):
    page = told(slowest=1, options={"slowest": slowest()})
    page.click(".slow button >> nth=1")
    assert "failed: timeout" in page.locator(".slow button").nth(1).inner_text()
    assert page.inner_text(".timeline .summary") == "It failed after 40 ms: late"


WATCHED = "device h1 runs at 0.52 of its speed; a new cut would answer 1.46 times as many requests"


@pytest.mark.parametrize(
    ("recut", "generation", "words"),
    [
        (None, 1, ""),
        ({"phase": "steady", "last": "", "advice": WATCHED}, 1, f"Watched for a better cut: {WATCHED}."),
        (
            {"phase": "loading", "last": "", "advice": WATCHED},
            1,
            "The plan is being changed: the nodes of another plan start beside those that serve.",
        ),
        (
            {"phase": "steady", "last": "the plan that was asked for stays", "advice": ""},
            2,
            "Last change of the plan: the plan that was asked for stays. Plan 2 serves.",
        ),
        (
            {"phase": "proving", "last": "it failed.", "advice": ""},
            1,
            "The plan is being changed: the new plan takes the requests, and is compared with the old one.\n"
            "Last change of the plan: it failed.",
        ),
    ],
)
def test_what_a_new_cut_would_gain_and_what_is_done_is_one_line_each(told, recut, generation, words):
    page = told(of_plan={"generation": generation}, recut=recut, generation=generation)
    assert page.locator(".recut").is_hidden() == (not words)
    assert page.locator(".recut").inner_text() == words


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_long_reason_for_a_change_fits(told, width, scheme):
    recut = {"phase": "steady", "last": "x" * 300, "advice": f"{WATCHED}; {'word ' * 60}"}
    page = told(recut=recut, options={"viewport": (width, 800), "color_scheme": scheme})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    colours = page.evaluate("[...document.querySelectorAll('.recut, footer')].map(one => getComputedStyle(one).color)")
    assert colours[0] == colours[1], "as other text beside the main one"


def test_nodes_of_another_plan_are_not_drawn_on_this_one(told):
    page = told(nodes=nodes_of(GRAPHS["three branches"]), generation=2)
    assert page.locator(".graph .box").count() == 0, "the plan of these nodes follows"
