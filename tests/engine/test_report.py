"""The page about a run."""

import json
import os
import re
from html.parser import HTMLParser

import pytest

from tercet.engine.cli import main as cli
from tercet.engine.glossary import MEANINGS, general
from tercet.engine.report import main, write_report
from tercet.engine.report_charts import styles_of
from tercet.engine.report_runs import Run


class Page(HTMLParser):
    """Collects what a browser would fetch, and the text and tags it would show."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.fetched, self.tags, self.words = [], [], []
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v and v[0] != "#"]

    def handle_data(self, data):
        self.words.append(data)


def make_run(folder, steps=5):
    folder.mkdir(parents=True)
    rows = [
        {"step": s, "reward/mean": 0.1 * s, "reward/hard": -1.0, "reward/hard_spread": 0.0,
         "eval/recall@1": 0.2, "entropy": float("nan") if s == 2 else 1.0}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sample = {"step": 1, "text": "<script>alert(1)</script>", "rationale": "bees & hives"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    event = {"step": 3, "kind": "warning", "message": "reward part hard is dead"}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    (folder / "config.yaml").write_text("learning_rate: 1.0e-06\n")
    (folder / "env.json").write_text('{"torch": "2.13.0"}')
    return folder


def test_the_page_stands_alone_and_holds_everything(tmp_path):
    page = Page(write_report(make_run(tmp_path / "run")).read_text())
    text = " ".join(page.words)
    assert page.fetched == []
    assert page.tags.count("svg") == 4
    assert "script" not in page.tags
    assert "0.1 → 0.5" in text  # reward/mean
    for part in ("alert(1)", "bees & hives", "hard is dead", "learning_rate", "2.13.0", "recall@1"):
        assert part in text


def add_metrics(run, *rows):
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return run


def charts(run_or_folder):
    """Name of each metric drawn -> its part of the page."""
    parts = write_report(run_or_folder).read_text().split("<figcaption><span>")[1:]
    return {part.partition("<")[0]: part.partition("</figure>")[0] for part in parts}


def test_a_run_has_one_colour_on_the_whole_page(tmp_path):
    add_metrics(make_run(tmp_path / "b"), {"step": 1, "loss": 1.0})
    make_run(tmp_path / "a")
    drawn = charts(tmp_path)
    styles = styles_of([Run(name, {}, [], [], "", {}) for name in ("a", "b")])
    assert len(drawn) == 5
    for key, chart in drawn.items():
        assert f"stroke: {styles['b'].colour}" in chart
        assert (f"stroke: {styles['a'].colour}" in chart) == (key != "loss")
    legend = (tmp_path / "report.html").read_text().partition('class="legend">')[2].split("</p>")[0]
    for name, style in styles.items():
        assert f'{style.colour}"></i>{name}</span>' in legend


def test_eighteen_runs_are_told_apart():
    runs = [Run(str(i), {}, [], [], "", {}) for i in range(18)]
    assert len(set(styles_of(runs).values())) == 18


def test_runs_are_found_three_folders_deep(tmp_path):
    for place in ("a", "b/c", "b/d/e"):
        make_run(tmp_path / "runs" / place)
    make_run(tmp_path / "runs" / "b" / "d" / "f" / "g")  # too deep
    make_run(tmp_path / "runs" / "b" / "c" / "h")  # inside a run
    page = write_report(tmp_path / "runs").read_text()
    assert [f"<h2>{name}</h2>" in page for name in "acegh"] == [True] * 3 + [False] * 2
    (tmp_path / "runs" / "b" / "x").mkdir()
    with pytest.raises(FileNotFoundError, match=r"runs/b/x must be .*jsonl in it, nor 3 folders d"):
        write_report(tmp_path / "runs" / "b" / "x")


def test_runs_stand_in_the_order_in_which_they_were_started(tmp_path):
    for name, day in {"c": 2, "b": 3, "a": 4, "d": None}.items():
        env = {} if day is None else {"started": f"2026-01-0{day}T00:00:00+00:00"}
        (make_run(tmp_path / name) / "env.json").write_text(json.dumps(env))
    page = write_report(tmp_path).read_text()
    assert re.findall("<h2>(.)</h2>", page) == ["d", "c", "b", "a"]
    legend = page.partition('class="legend">')[2].split("</p>")[0]
    assert re.findall(r"</i>(.)</span>", legend) == ["d", "c", "b", "a"]
    page = write_report(tmp_path / "a", tmp_path / "c").read_text()  # as they are named
    assert re.findall("<h2>(.)</h2>", page) == ["a", "c"]


def test_a_run_is_called_as_the_table_calls_it(tmp_path):
    make_run(tmp_path / "document")
    make_run(tmp_path / "other")
    rows = [{"": "GRACE, <repaired>", "run": "document", "x": 1.0}, {"": "base", "run": "", "x": 2}]
    table = {"title": "t", "rows": rows, "notes": []}
    (tmp_path / "tables.json").write_text(
        json.dumps([table, {**table, "rows": [{"run": "other"}]}])
    )
    page = write_report(tmp_path).read_text()
    legend = page.partition('class="legend">')[2].split("</p>")[0]
    named = ["GRACE, &lt;repaired&gt; (document)", "other"]
    assert re.findall(r"</i>(.*?)</span>", legend) == named
    assert re.findall("<h2>(.*?)</h2>", page)[-2:] == named


def named(page):
    """What the legend calls the runs, in its order."""
    return re.findall(r"</i>(.*?)</span>", page.partition('class="legend">')[2].split("</p>")[0])


def test_runs_of_one_name_are_called_as_their_own_tables_call_them(tmp_path):
    for seed, label in (("s0", "first"), ("s1", "second")):
        for run in ("document", f"kept-{seed}"):
            make_run(tmp_path / seed / run)
        rows = [{"": label, "run": "document"}]
        table = json.dumps([{"title": "t", "rows": rows, "notes": []}])
        (tmp_path / seed / "tables.json").write_text(table)
    page = write_report(tmp_path / "s1", tmp_path / "s0").read_text()
    labels = ["second (s1/document)", "kept-s1", "first (s0/document)", "kept-s0"]
    assert named(page) == labels
    assert re.findall("<h2>(.*?)</h2>", page)[-4:] == labels
    rows = [{"": "one", "run": "s0/document"}, {"": "any", "run": "document"}]
    table = [{"title": "t", "rows": [*rows, {"": "s1/kept-s1", "run": "s1/kept-s1"}], "notes": []}]
    (tmp_path / "tables.json").write_text(json.dumps(table))
    page = write_report(tmp_path).read_text()
    assert named(page) == ["one (s0/document)", "kept-s0", "any (s1/document)", "kept-s1"]
    assert write_report(tmp_path, tmp_path / "s0" / "..").read_text() == page  # one folder


def test_runs_of_one_name_are_told_apart_and_keep_their_order(tmp_path):
    places = ("deep/z/run", "x/run", "run", "deep/y/run")
    for day, place in enumerate(places):
        started = {"started": f"2026-01-0{day + 1}T00:00:00+00:00"}
        (make_run(tmp_path / place) / "env.json").write_text(json.dumps(started))
    assert named(write_report(tmp_path).read_text()) == [
        "z/run", "x/run", f"{tmp_path.name}/run", "y/run",
    ]  # fmt: skip
    given = [tmp_path / place for place in (places[3], places[0])]
    assert named(write_report(*given).read_text()) == ["y/run", "z/run"]


def test_names_that_are_no_text_are_told_apart(tmp_path):
    for name in (b"\xfe", b"\xff"):
        make_run(tmp_path / os.fsdecode(name))
    assert named(write_report(tmp_path).read_text()) == [r"\udcfe", r"\udcff"]


def test_a_page_behind_a_link_is_written_there(tmp_path):
    run = make_run(tmp_path / "run")
    page, link = tmp_path / "page.html", tmp_path / "link.html"
    link.symlink_to(page)
    for _ in range(2):  # once to nowhere, once over the page
        assert write_report(run, output=link) == link
        assert link.is_symlink()
        assert page.read_text().startswith("<!doctype html>")
    assert sorted(tmp_path.iterdir()) == [link, page, run]


def test_one_run_needs_no_legend(tmp_path):
    assert 'class="legend"' not in write_report(make_run(tmp_path / "run")).read_text()


def test_what_never_leaves_0_is_named_and_not_drawn(tmp_path):
    run = add_metrics(make_run(tmp_path / "run"), {"step": 6, "reward/negative": 0.0})
    assert "reward/negative" not in charts(run)
    assert "0 at every step: <code>reward/hard_spread</code>" in (run / "report.html").read_text()
    assert "0 at every step: <code>reward/negative</code>" in (run / "report.html").read_text()


def test_spreads_share_one_scale(tmp_path):
    row = {"reward/a_spread": 0.5, "reward/b_spread": 8.0, "reward/a": 0.5, "reward/b": 8.0}
    run = add_metrics(make_run(tmp_path / "run"), {"step": 6, **row}, {"step": 7, **row})
    drawn = {key: Page(chart).words for key, chart in charts(run).items()}

    def ticks(key):  # the last words of a chart
        return [word.strip() for word in drawn[key] if word.strip()][-4:]

    assert ticks("reward/a_spread") == ticks("reward/b_spread") == ["0.0", "2.5", "5.0", "7.5"]
    assert ticks("reward/a") != ticks("reward/b")


def test_every_metric_has_its_chart_and_its_last_value(tmp_path):
    run = add_metrics(
        make_run(tmp_path / "run"), {"step": 6, "never/heard_of": 0.125, "kl": 4321.5}
    )
    drawn = charts(run)
    assert {"never/heard_of", "kl", "reward/mean"} < drawn.keys()
    assert ">0.125</b>" in drawn["never/heard_of"]
    assert ">4322</b>" in drawn["kl"]
    assert "Other metrics" in (run / "report.html").read_text()


def test_the_same_run_gives_the_same_page(tmp_path):
    run = make_run(tmp_path / "run")
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_the_figures_of_a_folder_stand_at_the_top(tmp_path):
    make_run(tmp_path / "run")
    row = {"": "<base>", "recall@1": 0.5, "greedy": None}
    tables = [{"title": "Two & three", "rows": [row], "notes": ["recall@1: of all"]}]
    (tmp_path / "tables.json").write_text(json.dumps(tables))
    top = write_report(tmp_path).read_text().partition("Where training began")[0]
    assert "<h2>Two &amp; three</h2>" in top
    assert '<td>&lt;base&gt;</td><td class="n">0.500</td><td class="n">-</td>' in top
    assert "recall@1: of all" in top
    (tmp_path / "tables.json").write_text(json.dumps([{**tables[0], "rows": []}]))
    top = write_report(tmp_path).read_text().partition("Where training began")[0]
    assert "<h2>Two &amp; three</h2><p>No rows.</p>" in top


@pytest.mark.parametrize(
    "text",
    [
        "{x", "{}", "[1]", '[{"title": "a"}]', '[{"title": 1, "rows": [], "notes": []}]',
        '[{"title": "a", "rows": [1], "notes": []}]', '[{"title": "a", "rows": [], "notes": [1]}]',
        '[{"title": "a", "rows": [], "notes": [], "row": 1}]',
        '[{"title": "a", "rows": {}, "notes": []}]', '[{"title": "a", "rows": [], "notes": {}}]',
    ],
)  # fmt: skip
def test_figures_that_are_none_are_an_error(tmp_path, text, capsys):
    (make_run(tmp_path / "run") / "tables.json").write_text(text)
    assert cli(["report", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert re.search(r"^tercet report: \S+tables\.json must .*; restore or delete it$", told)


def test_a_long_text_that_comes_again_is_a_ditto_mark(tmp_path):
    run = make_run(tmp_path / "run")
    long = "a text of more than four and twenty letters"
    rows = [{"step": 1, "text": long, "group": "g"}, {"step": 1, "text": long, "group": "g"}]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(run).read_text()
    assert page.count(long) == 1
    assert "<td>″</td><td>g</td>" in page


def test_runs_from_several_places_are_one_page(tmp_path):
    runs = [make_run(tmp_path / name / "run") for name in ("a", "b")]
    assert write_report(*runs).resolve() == tmp_path / "report.html"
    assert main([*map(str, runs), "--output", str(tmp_path / "page.html")], "tercet report") == 0
    text = " ".join(Page((tmp_path / "page.html").read_text()).words)
    assert "2 runs" in text
    assert "a/run" in text
    assert "b/run" in text


def test_the_command_says_what_it_wrote_over(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    over = " (in place of the file of that name)"
    for argv, page in ((["run"], "run/report.html"), (["run", "--output", "a.html"], "a.html")):
        for more in ("", over):
            assert cli(["report", *argv]) == 0
            assert capsys.readouterr().out == f"wrote {page}{more}\n"


def test_a_run_without_the_metrics_has_no_empty_column(tmp_path):
    run = make_run(tmp_path / "one")
    make_run(tmp_path / "other")
    (tmp_path / "other" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    began = write_report(tmp_path).read_text().partition("<h2>Curves")[0]
    assert f"<th>{run.name}</th>" in began
    assert "<th>other</th>" in began  # a loss is shown
    (tmp_path / "other" / "metrics.jsonl").write_text('{"step": 1, "kl": 1.0}\n')
    began = write_report(tmp_path).read_text().partition("<h2>Curves")[0]
    assert "<th>other</th>" not in began


def test_a_half_written_last_line_is_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    assert "1 run, 5 steps" in write_report(run).read_text()


def test_a_broken_line_in_the_middle_is_an_error_with_its_place(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 must be a JSON object"):
        write_report(run)


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got no metrics\.jsonl in it"):
        write_report(tmp_path)


def test_hostile_records_are_text_or_an_error(tmp_path):
    run = make_run(tmp_path / "run")
    attack = "<script>alert(1)</script>"
    (run / "events.jsonl").write_text(json.dumps({"step": attack, "message": "m"}) + "\n")
    (run / "samples.jsonl").write_text(json.dumps({"step": 1, "text": "half \ud800 pair"}) + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "reward/$\\foo$": 1.0, "loss": 1e308}) + "\n")
    page = Page(write_report(run).read_text())
    assert "script" not in page.tags
    assert not list(run.glob("*.tmp"))
    (run / "samples.jsonl").write_text(json.dumps({"step": attack}) + "\n")
    with pytest.raises(ValueError, match="must be an integer, got '<script>"):
        write_report(run)


@pytest.mark.parametrize(
    "line", ["[1]", "1", "null", '{"step": "x", "loss": 1}', '{"step": true, "loss": 1}']
)
def test_a_record_that_is_none_is_an_error(tmp_path, line):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"must be a(n integer| JSON object in UTF-8), got"):
        write_report(run)


BROKEN = {
    "env.json": [b"{x", b"[1]", b"\xff", b"[" * 100_000],
    "config.yaml": [b"a: \xff"],
    "metrics.jsonl": [b"{x\n", b"\xff\n", b"[" * 100_000 + b"\n"],
    "events.jsonl": [b"\xff\n"],
    "samples.jsonl": [b"\xff\n", b'{"step": 1' + b"0" * 400 + b"}\n"],
}


@pytest.mark.parametrize(("name", "data"), [(n, d) for n, ds in BROKEN.items() for d in ds])
def test_a_broken_file_is_one_line_with_its_name(tmp_path, name, data):
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(data)
    with pytest.raises(ValueError, match="must") as caught:
        write_report(run)
    told = str(caught.value)
    assert "run" in told if name == "samples.jsonl" else str(run / name) in told
    assert "\n" not in told
    assert len(told) < 500


def test_numbers_without_end_and_half_characters_are_shown(tmp_path):
    run = make_run(tmp_path / "run")
    sample = {"step": 1, "text": "many", "count": 10**400, "ratio": float("inf")}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "reward/\ud800": 1.0, "loss": 10**400}) + "\n")
    text = " ".join(Page(write_report(run).read_text()).words)
    assert "1" + "0" * 400 in text
    assert "inf" in text
    assert "reward/?" in text or " ? " in text


def test_the_page_goes_where_a_file_can(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"exists, got no .*/nowhere; make it$"):
        write_report(run, output=tmp_path / "nowhere" / "page.html")
    os.mkfifo(tmp_path / "pipe")  # what /dev/null is to a write: there, and no file
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match=r"must be a file, got .*; name a file$"):
            write_report(run, output=path)


def test_metrics_are_explained(tmp_path):
    page = Page(write_report(make_run(tmp_path / "run")).read_text())
    text = " ".join(page.words)
    assert MEANINGS["eval/recall@<k>"] in text
    assert MEANINGS["reward/<part>_spread"] in text
    assert MEANINGS["kl"] not in text


def test_names_fall_under_their_pattern():
    assert general("reward/hard_spread") == "reward/<part>_spread"
    assert general("time/update_s") == "time/<phase>_s"
    assert general("eval/hit@3") == "eval/hit@<k>"
    assert general("eval/hit@x") == general("unknown") == general("reward@1") == ""
