"""The report of a made-up run: self-contained, well-formed, true to its inputs, and of use when stages are missing."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_module
from rich.console import Console

from ofa.errors import UserError
from ofa.files import read_json, read_jsonl, write_json, write_parquet
from ofa.report import print_summary, summary_table, write_report
from ofa.report.compression import front
from ofa.report.drawing import draw
from ofa.report.figures import _staircase
from ofa.report.load import STAGES, Chain, Search, load_run
from ofa.report.summary import arch_text, bound, show
from ofa.spec import NetSpec
from tests.ofa.report_fixture import AGENTS, LIMITS, command, compress, export_models, make_run

EVIL = """<script>alert("1")</script> $\\frac{$ & '[bold]' <!-- ]]>"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text()


def tree(page: str) -> ET.Element:
    """The page as XML, which raises where a tag is not closed or a character not escaped; without namespaces."""
    return ET.fromstring(re.sub(r' xmlns(:\w+)?="[^"]*"|\bxlink:', "", page.removeprefix("<!DOCTYPE html>")))


def texts(root: ET.Element, tag: str) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter(tag)]


def terminal(run: Path, width: int = 100) -> str:
    out = io.StringIO()
    print_summary(Console(file=out, width=width), run)
    return out.getvalue()


def test_page_is_well_formed_small_and_has_every_section(page: str) -> None:
    headings = ["Chosen nets", "Architectures", "Pareto fronts", "Search progress", "Supernet training", "Predictors"]
    assert texts(tree(page), "h2") == [*headings, "Reproduce"]
    assert len(page.encode()) < 2e6


def test_page_fetches_nothing(page: str) -> None:
    root = tree(page)
    tags = {element.tag for element in root.iter()}
    assert not tags & {"script", "link", "iframe", "object", "embed", "img", "base"}
    links = [
        value for element in root.iter() for key, value in element.attrib.items() if key in ("href", "src", "action")
    ]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.search(r"@import|url\((?!#)|\son\w+=", page)
    assert set(re.findall(r"\bhttps?://[\w./]+", page)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_ids_are_unique_and_every_reference_leads_to_one(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_every_colour_variable_is_defined_for_light_and_dark(page: str) -> None:
    used, defined = set(re.findall(r"var\((--\w+)\)", page)), re.findall(r"(--\w+):", page)
    assert used <= set(defined)
    assert {name: defined.count(name) for name in set(defined)} == dict.fromkeys(defined, 2)
    assert not re.search(r"#000[0-2]0\d", page)  # a colour that matplotlib drew and nothing replaced


def test_table_shows_the_numbers_of_the_exported_models(page: str) -> None:
    rows = [
        [("".join(c.itertext()), c.get("title")) for c in row]
        for row in tree(page).iter("tr")
        if row.get("class") == "model"
    ]
    assert [row[0][0] for row in rows] == ["predicted", "float", "pruned", "int8 shipped"] * 2
    shown = [text for text, _ in rows[1]]
    assert shown == ["float", "96.67 %", "2.86 M", "91.2 k", "61.4 kB", "371 kB", "0.812 ± 0.011 ms", "3e-06"]
    keys = ("accuracy", "macs", "params", "peak_memory_bytes", "file_bytes", "latency_ms")
    for row, model in zip(rows[1:4], export_models(1.0).values(), strict=True):
        assert [float(exact or "nan") for _, exact in row[1:7]] == [model[key] for key in keys]


def test_each_limit_is_shown_with_value_limit_and_answer(page: str) -> None:
    limits = [text for text in texts(tree(page), "div") if re.fullmatch(r".*: (yes|no)( \(.*\))?", text)]
    limits = [text for text in limits if text.count(":") == 1]
    assert limits[:5] == [
        "MACs2.21 M of at most 3 M: yes",
        "peak memory13.8 kB of at most 64 kB: yes",
        "weights98.8 kB of at most 400 kB: yes",
        "latency0.552 ms on a laptop of at most 1.5 ms: yes",
        "peak memory61.0 kB in tflm of at most 64 kB: yes (its arena)",
    ]
    assert limits[5:] == ["MACs10.6 M of at most 300 M: yes", "latency2.65 ms on a laptop of at most 2.5 ms: no"]
    assert re.findall(r"budget (?:not )?met", page) == ["budget met", "budget not met"] * 2


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_bars_of_the_budget_are_seen_whole_where_the_table_is_wider_than_the_screen(page: str, tmp_path: Path) -> None:
    ends = '[...document.querySelectorAll(".meter")].map(bar => bar.getBoundingClientRect().right)'
    table = 'document.querySelector(".nets").getBoundingClientRect().right'
    script = f"<script>document.title = [innerWidth, {table}, {ends}]</script>"
    (tmp_path / "page.html").write_text(page.replace("</body>", script + "</body>"))
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [*browser, "--window-size=390,900", "--dump-dom", f"file://{tmp_path}/page.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search("<title>(.*?)</title>", shown)
    assert found
    screen, table_end, *bars = map(float, found[1].split(","))
    assert 0 < max(bars) < screen < table_end


def test_page_follows_its_inputs(run: Path, page: str, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(run, tmp_path / "digits"))
    result = read_json(changed / "export/phone/result.json")
    result["models"]["int8"]["accuracy"] = 0.12346
    write_json(changed / "export/phone/result.json", result)
    other = write_report(changed).read_text()
    assert "12.35 %" not in page
    assert "12.35 %" in other
    assert write_report(run).read_text() == page  # the same inputs, the same bytes


def test_chains_of_compression_are_shown_with_every_number_and_what_zeros_do_not_give(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "digits", ("train",))
    assert "Compression" not in write_report(folder).read_text(), "a run need not have it, so that none is missing"
    compress(folder)
    root = tree(write_report(folder).read_text())
    section = next(element for element in root.iter("section") if element.get("id") == "compression")
    assert "give no speed in ONNX Runtime or LiteRT" in texts(section, "p")[0]
    rows = [[*texts(row, "th"), *texts(row, "td")] for row in section.iter("tr") if row.get("class") == "step"]
    assert [row[0] for row in rows] == ["before", "channels", "before", "magnitude", "kmeans"]
    assert rows[1][-2:] == ["–", "1.0×"], "no ONNX graph, no latency"
    assert rows[4][1:] == ["95.83 %", "2.86 M", "915 k", "366 M", "37.1 kB", "61.4 kB", "0.812 ms", "10.0×"]
    scan = [texts(row, "td") for row in section.iter("tr") if texts(row, "th") == ["units.0.conv"]]
    assert scan == [["144", "90.0", "30.0"]]
    labels = [element.get("aria-label") for element in section.iter("svg")]
    assert labels == ["stm32f746-float: accuracy against file size after each compression step"]
    assert {"before", "magnitude", "kmeans", "channels"} <= set(texts(section, "text"))


def test_networks_of_several_runs_are_told_apart_though_their_folders_have_one_name(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "digits", ("train",))
    compress(folder)
    place = folder / "compress/stm32f746-float"
    write_json(place / "int8/table.json", read_json(place / "channels/table.json") | {"network": "b/float.json"})
    section = next(s for s in tree(write_report(folder).read_text()).iter("section") if s.get("id") == "compression")
    titles = [title for figure in section.iter("figure") for title in texts(figure, "h3")]
    assert [title for title in titles if "float" in title] == ["float.json", "b/float.json"]


def test_names_of_chains_that_end_in_one_place_can_both_be_read() -> None:
    before, after = {"file_bytes": 90_000, "accuracy": 0.9}, {"file_bytes": 30_000, "accuracy": 0.8}
    chains = [
        Chain("net", "net", ({"step": "before", **before}, {"step": name, **after}), []) for name in ("int8", "mixed")
    ]
    places = {text.text: text.attrib for text in ET.fromstring(re.sub(r"\bxlink:", "", front("net", chains))).iter()}
    top, bottom = (float(places[name]["y"]) for name in ("int8", "mixed"))
    assert abs(top - bottom) > 8, "a letter's height in points"


def test_a_lone_panel_is_as_wide_as_one_of_two(page: str) -> None:
    rules = re.findall(r"^\.grid\b.*repeat\((auto-\w+)", page, re.MULTILINE)
    assert rules == ["auto-fill", "auto-fill"], "auto-fit stretches it over the page, with letters twice as high"


def test_captions_carry_scores_and_sample_counts(page: str) -> None:
    captions = " ".join(texts(tree(page), "figcaption")).replace("\u00a0", " ")
    for fact in ("tau 0.912 ± 0.013, RMSE 0.49 ± 0.07 points; n = 40 held-out nets (one of 5 random splits).",
                 "tau 0.956, MAPE 4.3 %, 95 % within 10 %; n = 40 held-out nets.",
                 "n = 900 evaluations", "Epoch 24 of 24", "n = 5 nets, 288 validation images"):  # fmt: skip
        assert fact in captions


def test_what_nets_beyond_the_budget_add_to_a_hypervolume_is_said(page: str) -> None:
    assert "Nets beyond the budget count among those evaluated and add none." in page


def test_header_names_data_machine_versions_and_times(page: str) -> None:
    facts = " | ".join(texts(tree(page), "dd") + texts(tree(page), "li"))
    for fact in ("10 classes, 1,149 training, 288 validation, 360 test images", "1a2b3c4", "Example CPU, cores 2",
                 "torch 2.14.1", "train7.5 s", "search1 min 0 s", "total7 min 52 s"):  # fmt: skip
        assert fact in facts


def test_rows_of_summary_table_equal_summary_json(run: Path, page: str) -> None:
    rows = summary_table(run)
    assert [(row["device"], row["model"]) for row in rows[:4]] == [
        ("stm32f746", m) for m in ("predicted", "float", "pruned", "int8")
    ]
    assert rows[3]["file_bytes"] == export_models(1.0)["int8"]["file_bytes"]
    assert rows[0]["file_bytes"] == read_json(run / "search/stm32f746/chosen.json")["predicted"]["weight_bytes"]
    summary = read_json(run / "report/summary.json")
    assert [row for device in summary["devices"] for row in device["models"]] == rows
    assert (summary["missing"], summary["next"]) == ([], None)


def test_terminal_table_fits_100_columns_and_hides_nothing(run: Path) -> None:
    text = terminal(run)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for fact in ("STM32F746  budget met", "PHONE  budget NOT met", "0.552 ± 0.016 ms", "96.11 %", "98.8 kB",
                 "2.65 ms of at most   2.5 ms  NO on a laptop", "61.0 kB of at most    64 kB  yes in tflm",
                 "32 px, depth 2-3-2: k3e3 k5e4 / k3e4 k7e6 k5e3 / k3e4 k5e6"):  # fmt: skip
        assert fact in text


@pytest.mark.parametrize("width", [100, 60])
def test_narrow_terminal_folds_numbers_but_keeps_them(run: Path, width: int) -> None:
    digits = re.sub(r"[^0-9.]", "", terminal(run, width))
    assert sorted(digits) == sorted(re.sub(r"[^0-9.]", "", terminal(run, 200)))


@pytest.mark.parametrize("count", range(len(STAGES)))
def test_stopped_run_shows_what_exists_and_the_next_command(tmp_path: Path, count: int) -> None:
    folder = make_run(tmp_path / "digits", STAGES[:count])
    page = write_report(folder).read_text()
    note = next(text for text in texts(tree(page), "p") if text.startswith("Not finished"))
    assert f"missing {', '.join(STAGES[count:])}" in note
    assert note.endswith(f"ofa-{STAGES[count]} experiment=digits")
    assert ("Supernet training" in texts(tree(page), "h2")) == (count > 0)
    assert read_json(folder / "report/summary.json")["missing"] == list(STAGES[count:])
    assert f"ofa-{STAGES[count]} experiment=digits" in terminal(folder)


def test_commands_name_the_folder_where_a_moved_run_is_now(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "digits", ("train",))
    made = {"command": "ofa-train seed=1 'run=old place' 'device=[phone]'", "run": str(folder)}
    write_json(folder / "command.json", command() | made)
    assert load_run(folder).command("fit") == "ofa-fit seed=1 'run=old place' 'device=[phone]'", "it has not moved"
    moved = Path(shutil.move(folder, tmp_path / "it's é new"))
    *options, run = shlex.split(load_run(moved).command("fit"))
    assert options == ["ofa-fit", "seed=1", "device=[phone]"]
    with initialize_config_module("conf", version_base="1.3"):
        assert Path(compose("config", [run]).run) == moved


def test_training_that_was_stopped_tells_how_far_it_came(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "digits", ("train",))
    (folder / "train/supernet.safetensors").unlink()
    lines = (folder / "train/log.jsonl").read_text().splitlines(keepends=True)
    (folder / "train/log.jsonl").write_text("".join(lines[:3]) + lines[3][:40])  # the last line is torn
    assert len(read_jsonl(folder / "train/log.jsonl")) == 3
    assert "training stands at epoch 3 of 24; missing train" in write_report(folder).read_text()


def test_search_without_a_feasible_net_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "digits", ("train", "measure", "fit", "search"))
    (folder / "search/phone/chosen.json").unlink()
    for agent in AGENTS:
        result = read_json(folder / f"search/phone/{agent}/result.json")
        write_json(folder / f"search/phone/{agent}/result.json", result | {"hypervolume": 0.0, "curve": [[300, 0.0]]})
        tried = pd.read_parquet(folder / f"search/phone/{agent}/evaluations.parquet")
        write_parquet(folder / f"search/phone/{agent}/evaluations.parquet", tried.assign(violation=1.0, front=False))
    page = write_report(folder).read_text()
    assert "none chosen yet" in page
    assert "missing search" in page


def test_stages_made_from_what_was_made_again_are_named(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "digits"))
    write_json(folder / "train/config.json", {"done": "monday", "after": {}})
    write_json(folder / "fit/config.json", {"done": "monday", "after": {"train": "monday"}})
    write_json(folder / "export/phone/config.json", {"done": "tuesday", "after": {"fit": "monday", "train": "monday"}})
    assert load_run(folder).outdated == () and "made again" not in write_report(folder).read_text()
    write_json(folder / "train/config.json", {"done": "wednesday", "after": {}})
    text = "fit, export: made before what they build on was made again; next: ofa-fit "
    assert text in terminal(folder) and text in write_report(folder).read_text()
    assert read_json(folder / "report/summary.json")["outdated"] == ["fit", "export"]


def test_a_network_exported_before_another_was_chosen_is_out_of_date(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "digits"))
    chosen = read_json(folder / "search/phone/chosen.json")
    write_json(folder / "export/phone/float.json", {"arch": chosen["arch"]})
    write_json(folder / "specialize/phone/float.json", {"arch": chosen["arch"]})
    assert load_run(folder).outdated == ()
    write_json(folder / "search/phone/chosen.json", chosen | {"arch": chosen["arch"] | {"resolution": 12}})
    assert load_run(folder).outdated == ("specialize", "export")
    write_json(folder / "specialize/phone/float.json", {"arch": chosen["arch"] | {"resolution": 12}})
    assert load_run(folder).outdated == ("export",)


def test_searches_under_other_limits_are_left_out(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "digits"))
    chosen, (other, *_) = read_json(folder / "search/phone/chosen.json")["agent"], AGENTS
    assert other != chosen
    file = folder / f"search/phone/{other}/result.json"
    result = read_json(file)
    write_json(file, result | {"limits": result["limits"] | {"macs": 1.0}})
    phone = next(device for device in load_run(folder).devices if device.name == "phone")
    assert phone.others == (other,) and [s.agent for s in phone.searches] == sorted({*AGENTS} - {other})
    assert phone.limits == LIMITS["phone"]
    assert f"Left out, as their limits or objectives were others: {other}." in write_report(folder).read_text()


def test_hypervolumes_of_measured_and_predicted_values_are_not_compared(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "digits"))
    other = next(iter(AGENTS))
    file = folder / f"search/phone/{other}/result.json"
    write_json(file, read_json(file) | {"measured": ["accuracy"], "reference": [-0.5, 1.0], "hypervolume": 1e-3})
    page = write_report(folder).read_text()
    assert "accuracy measured" in page and f"In the end: {other} 100.0" in page


def test_a_device_that_no_network_fits_is_told_and_nothing_of_it_is_missing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "digits")
    shutil.rmtree(folder / "search/phone")
    shutil.rmtree(folder / "export/phone")
    reason = "no network meets macs <= 1 <&>"
    write_json(folder / "search/phone/infeasible.json", {"device": {"name": "Phone <1>"}, "reason": reason})
    page = write_report(folder).read_text()
    found = read_json(folder / "report/summary.json")
    assert found["missing"] == [] and [device["infeasible"] for device in found["devices"]] == [None, reason]
    rows = texts(tree(page), "tbody")
    assert any("Phone <1> no network fits" in row and reason in row for row in rows)
    across = [cell for row in tree(page).iter("tr") if row.get("class") == "across" for cell in row]
    assert across and not any(cell.text for cell in across)  # only an element can follow a scrolled table
    assert "Phone <1>  no network fits" in terminal(folder) and reason in terminal(folder)


@pytest.mark.parametrize(
    ("objectives", "y", "x"),
    [
        ({"macs": 1}, "predicted accuracy (%)", ["MACs (M)"]),
        ({"latency_ms": 1}, "predicted accuracy (%)", ["latency (ms)"]),
        ({"macs": 1, "accuracy_int8": -1}, "predicted int8 accuracy (%)", ["MACs (M)"]),
        ({"macs": 1, "latency_ms": 1}, "predicted MACs (M)", ["latency (ms)"]),
    ],
)
def test_fronts_show_whatever_was_sought(tmp_path: Path, objectives: dict[str, int], y: str, x: list[str]) -> None:
    folder = make_run(tmp_path / "digits", ("train", "measure", "fit", "search"))
    shutil.rmtree(folder / "search/phone")
    for agent in AGENTS:
        place = folder / f"search/stm32f746/{agent}"
        write_json(place / "result.json", read_json(place / "result.json") | {"objectives": objectives})
        tried = pd.read_parquet(place / "evaluations.parquet")
        write_parquet(place / "evaluations.parquet", tried.assign(accuracy_int8=tried["accuracy"] - 0.01))
    section = next(s for s in tree(write_report(folder).read_text()).iter("section") if s.get("id") == "pareto-fronts")
    axes = [text for text in texts(section, "text") if "(" in text]
    assert axes == [label for name in x for label in (name, y)]


def test_accuracy_of_a_search_that_iterates_is_called_measured(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "digits", ("train", "measure", "fit", "search"))
    iterated = folder / "search/phone/random/result.json", folder / "search/stm32f746/random/result.json"
    for path in iterated:  # of the phone beside agents that predict
        write_json(path, read_json(path) | {"measured": ["accuracy"]})
    for agent in ("evolution", "optuna"):
        shutil.rmtree(folder / "search/stm32f746" / agent)
    labels = [svg.get("aria-label") for svg in tree(write_report(folder).read_text()).iter("svg")]
    assert {"stm32f746: measured accuracy against MACs", "phone: accuracy against MACs"} <= set(labels)


def test_unknown_run_and_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run folder .*nowhere does not exist; .* ofa-run run="):
        write_report(tmp_path / "nowhere")
    folder = make_run(tmp_path / "digits", ("train", "measure", "fit"))
    (folder / "fit/fit.json").write_text("{")
    with pytest.raises(UserError, match=r"fit\.json is not valid JSON"):
        write_report(folder)
    (folder / "fit/fit.json").unlink()
    (folder / "fit/predictions.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"predictions\.parquet is not a readable Parquet"):
        write_report(folder)


def test_hostile_names_stay_text(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "digits"))
    write_json(
        folder / "command.json",
        command() | {"experiment": EVIL, "data": {"name": EVIL}, "command": f"ofa-run x={EVIL}"},
    )
    result = read_json(folder / "export/phone/result.json")
    result["device"] = {"name": EVIL, "description": EVIL}
    result["models"][EVIL] = result["models"].pop("pruned")
    result["budget"][0]["limit"] = EVIL
    write_json(folder / "export/phone/result.json", result)
    (folder / "search/phone/random").rename(folder / "search/phone" / EVIL.replace("/", "|"))
    lines = (folder / "train/log.jsonl").read_text().replace('"full"', '"<b>$\\\\frac{$"')
    (folder / "train/log.jsonl").write_text(lines)
    page = write_report(folder).read_text()
    root = tree(page)
    assert not {element.tag for element in root.iter()} & {"script", "b>"}
    assert texts(root, "h1") == [EVIL]
    assert EVIL in texts(root, "pre")[0]
    assert "<b>$\\frac{$" in texts(root, "text")
    assert EVIL in " ".join(terminal(folder, width=400).split("\n"))


def test_front_line_joins_exactly_the_nets_that_none_beats() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 12, (60, 2))
    nets = pd.DataFrame(values, columns=["macs", "accuracy"]).assign(front=True)
    search = Search("random", {"objectives": {"accuracy": -1, "macs": 1}}, nets)
    cost = values * (1, -1)
    no_worse, better = cost[None] <= cost[:, None], cost[None] < cost[:, None]
    beaten = np.any(np.all(no_worse, axis=2) & np.any(better, axis=2), axis=1)
    expected = sorted({(int(macs), int(accuracy)) for macs, accuracy in values[~beaten]})
    assert [tuple(map(int, point)) for point in _staircase(search, "macs", "accuracy")] == expected


def test_drawing_labels_every_block_and_the_size_on_the_way(run: Path) -> None:
    spec = NetSpec.from_dict(read_json(run / "export/phone/result.json")["spec"])
    root = ET.fromstring(draw(spec))
    words = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("MBConv 7×7") == sum(unit.kind == "mbconv" and unit.kernel == 7 for unit in spec.units)
    assert [word for word in words if word.endswith("²")] == ["32²", "16²", "8²", "4²", "2²", "1²"]
    assert words.count("/2") == sum(unit.stride == 2 for unit in spec.units)
    assert words.count("×6") == sum(unit.mid == 6 * unit.cin for unit in spec.units if unit.mid)
    arcs = [element for element in root.iter() if element.get("class") == "shortcut"]
    assert len(arcs) == sum(unit.shortcut for unit in spec.units)
    bars = [
        float(e.get("width", 0))
        for e in root.iter("{http://www.w3.org/2000/svg}rect")
        if e.get("fill-opacity") != "0.14"
    ]
    channels = [spec.in_channels, *(unit.cout for unit in spec.units if unit.kind in ("conv", "mbconv"))]
    assert np.allclose(bars, max(bars) * np.sqrt(np.array(channels) / max(channels)), atol=0.2)


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("accuracy", 0.93057, "93.06 %"),
        ("accuracy_int8", 0.93057, "93.06 %"),
        ("macs", 2_861_234, "2.86 M"),
        ("macs", 999, "999"),
        ("peak_memory_bytes", 65536, "65.5 kB"),
        ("latency_ms", 0.01234, "0.0123 ms"),
        ("latency_ms", 0.0, "0 ms"),
        ("energy_uj", 50.0, "50.0 µJ"),
        ("params", None, "–"),
        ("accuracy", float("nan"), "–"),
    ],
)
def test_values_are_shown_with_three_digits_and_their_unit(metric: str, value: float | None, text: str) -> None:
    assert show(metric, value) == text


def test_spread_and_limits_keep_the_digits_that_matter() -> None:
    assert show("latency_ms", 243.69, 0.02) == "243.69 ± 0.02 ms"
    assert bound("weight_bytes", 262144) == "262.144 kB"
    assert bound("macs", LIMITS["stm32f746"]["macs"]) == "3 M"


def test_the_line_of_a_limit_says_what_it_counts(page: str) -> None:
    lines = {text for text in texts(tree(page), "text") if text.startswith("limit")}
    assert lines == {"limit 3 M MACs", "limit 1.5 ms latency"}


def test_architecture_with_full_length_lists_is_still_told() -> None:
    arch = {"resolution": 24, "depth": [1], "kernel": [3, 5], "expand": [3, 4], "width": [0.5]}
    assert arch_text(arch) == "24 px, width 0.5, depth 1, kernel 3-5, expand 3-4"
    assert arch_text({"resolution": 32, "width": [1], "op": [2, 0, 1]}) == "32 px, op 2-0-1"


def test_later_results_prove_earlier_stages(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "digits", ("train", "measure", "fit", "search"))
    (folder / "train/supernet.safetensors").unlink()
    assert load_run(folder).missing == ("specialize", "export")


def test_report_never_loads_torch(run: Path) -> None:
    code = f"import sys, ofa.report as r; r.write_report({str(run)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_the_time_of_training_counts_the_sessions_that_were_killed(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    times = read_json(copy / "timings.json")
    write_json(copy / "timings.json", times | {"train": 1.0})
    assert load_run(copy).timings == pytest.approx(times | {"train": 24 * 0.3})
