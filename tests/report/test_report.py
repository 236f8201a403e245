"""The report itself: tables, pictures, Markdown, LaTeX, and the HTML in a browser without a network."""

import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure

from fedlight.report import figures, tables
from fedlight.report.command import main
from fedlight.report.groups import Stat, group_runs
from fedlight.report.runs import find_runs
from fedlight.report.writers import Cell, Heading, Picture, Table, Text, write_html, write_latex, write_markdown
from tests.report.folders import MAN, config, write_run, write_study


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A report about a study with everything in it, a torn run and spectra among it."""
    root = tmp_path_factory.mktemp("runs")
    write_study(root)
    write_run(root / "torn" / "version_0", [0.1])
    (root / "torn" / "version_0" / "config.yaml").write_text("a: [")
    write_run(root / "half" / "version_0", [0.1, 0.2], config("FedProx"), finished=False)
    spectra = {
        "hessian/lambda_max": [30.0, 20.0, 10.0],
        "hessian/trace": [300.0, 200.0, 100.0],
        "hessian/layer/net.0/lambda_max": [3.0, 2.0, 1.0],
        "hessian/layer/net.2/lambda_max": [6.0, 4.0, 2.0],
    }
    path = write_run(root / "spectra" / "version_0", [0.2, 0.4, 0.5], config("FedDC", callbacks=[MAN]), spectra)
    out = root / "out"
    assert main([str(root), "-o", str(out), "--latex", "--title", "A <study> of $methods_"]) == 0
    for name in ("density_round9.png", "density_round19.png", "partition.png"):  # any PNG will do
        (path / "plots").mkdir(exist_ok=True)
        shutil.copyfile(out / "pictures" / "setting1" / "clients.png", path / "plots" / name)
    assert main([str(root), "-o", str(out), "--latex", "--title", "A <study> of $methods_"]) == 0
    return out


def rows(markdown: str, first: str) -> dict[str, list[str]]:
    """The rows of the table whose header begins with ``first``, by their first cell."""
    table = re.search(rf"^\| {re.escape(first)}.*?(?=\n\n|\Z)", markdown, re.M | re.S)
    assert table is not None, first
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[0].splitlines()]
    return {line[0].strip("| "): [cell.strip("| ") for cell in line[1:]] for line in lines}


def test_the_numbers_are_right(report):
    markdown = (report / "report.md").read_text()
    overview = rows(markdown, "method | alpha=0.3 | alpha=0.6")
    assert overview["FedAvg"] == ["51.00 ± 1.41", "54.00 ± 1.41"]  # 50 and 52; 53 and 55
    assert overview["FedDyn+MAN"] == ["**71.00 ± 1.41**", "**74.00 ± 1.41**"]
    assert overview["Central"] == ["90.00", "90.00"], "pooled data know no partition; the upper line is never the best"
    assert "18 of 20 runs make up the tables." in markdown
    gains = rows(markdown, "gain of MAN")
    assert gains["FedAvg+MAN"] == ["**+10.00 ± 0.00**", "**+10.00 ± 0.00**"]
    results = rows(markdown.split("## Setting: alpha=0.3")[1], "method | server")
    header = results["method"]
    assert header == ["server", "loss", "gain of MAN", "rounds to 50 %", "MB to 50 %", "seeds"]
    assert results["FedAvg"] == ["51.00 ± 1.41", "0.490 ± 0.014", "–", "3 ± 0", "6", "2"]
    assert results["Central"] == ["90.00", "0.100", "–", "1", "–", "1"]
    others = rows(markdown.split("## Setting: alpha=0.3")[1], "method | λ\\_max")
    of_loss = ["clients, loss: mean", "clients, loss: worst"]
    assert others["method"] == ["λ\\_max", "trace", "clients: mean", "clients: 10th percentile", *of_loss, "MB", "s"]
    assert others["FedDC+MAN"] == ["10", "100", "–", "–", "–", "–", "6", "6"]
    assert others["FedAvg"][2:6] == ["51.00 ± 1.41", "25.50 ± 0.71", "0.49 ± 0.01", "1.49 ± 0.01"]


def test_what_is_not_in_the_tables_is_said(report):
    markdown = (report / "report.md").read_text()
    assert "> Not in the tables: 1 interrupted, 1 torn." in markdown
    listed = rows(markdown, "folder")
    torn = next(cells for folder, cells in listed.items() if "torn" in folder)
    assert torn[0] == "torn"
    assert torn[-1].startswith("config.yaml cannot be read: ")
    half = next(cells for folder, cells in listed.items() if "half" in folder)
    assert half == ["interrupted", "FedProx", "alpha=0.3", "0", "2", "2 of 3 rounds"]


def test_what_differs(report):
    differs = rows((report / "report.md").read_text(), "method | setting | algorithm")
    assert differs["method"] == [
        "setting",
        "algorithm.class\\_path",
        "data.partitioner.alpha",
        "trainer.callbacks",
        "trainer.centralized",
    ]
    assert differs["FedDyn+MAN"][1:4] == ["FedDyn", "0.6", "MAN(zeta=0.15)"]


def test_pictures_are_there(report):
    names = {str(path.relative_to(report / "pictures")) for path in (report / "pictures").rglob("*.png")}
    assert {
        "setting1/val_accuracy.png",
        "setting1/val_loss.png",
        "setting1/train_loss.png",
        "setting1/spectra.png",
        "setting1/layers.png",
        "setting1/clients.png",
        "setting2/val_accuracy.png",
    } <= names
    own = {name.split("/", 2)[2] for name in names if "/method" in name}
    assert own == {"density_round19.png", "partition.png"}, "the run's own pictures; of several rounds the last"
    for link in re.findall(r"\]\((pictures/[^)]+)\)", (report / "report.md").read_text()):
        assert (report / link).is_file()


def test_the_html_needs_nothing_else(report):
    page = (report / "report.html").read_text()
    assert "<h1>A &lt;study&gt; of $methods_</h1>" in page
    assert "<td><strong>71.00 ± 1.41</strong></td>" in page
    assert page.count("data:image/png;base64,") >= 7
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", page) == []
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)


def test_latex(report):
    table = (report / "table.tex").read_text()
    assert r"\begin{tabular}{lrr}" in table
    assert r"FedDyn+MAN & \textbf{71.00 $\pm$ 1.41} & \textbf{74.00 $\pm$ 1.41} \\" in table
    assert r"method & alpha=0.3 & alpha=0.6 \\" in table


def browser() -> str:
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "chrome")]
    path = next((p for p in found if p), None)
    if path is None:
        pytest.skip("there is no Chromium (apt install chromium)")
    return path


def test_a_browser_shows_it_without_a_network(report, tmp_path):
    picture = tmp_path / "page.png"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,2400"]
    # Every name resolves to nothing: the page has to do without a network.
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    program, page = browser(), (report / "report.html").as_uri()
    env = {**os.environ, "HOME": str(tmp_path)}
    run = {"env": env, "capture_output": True, "timeout": 120, "check": True}
    subprocess.run([program, *options, f"--screenshot={picture}", page], **run)
    from matplotlib.image import imread

    pixels = imread(picture)
    assert pixels.shape[:2] == (2400, 1200)
    assert pixels[..., :3].min() < 0.1
    assert 0.02 < (pixels[..., :3].mean(axis=2) < 0.5).mean() < 0.5, "text and curves are dark on white"
    dom = subprocess.run([program, *options, "--dump-dom", page], **run).stdout.decode()
    assert dom.count("<img") >= 7
    assert "Methods and settings" in dom


def test_no_finished_run(tmp_path, capsys):
    write_run(tmp_path / "x" / "version_0", [0.1], finished=False)
    assert main([str(tmp_path), "-o", str(tmp_path / "out")]) == 1
    assert "1 interrupted" in capsys.readouterr().out
    assert "| interrupted |" in (tmp_path / "out" / "report.md").read_text()


def test_nan_and_missing_metrics_do_not_stop_a_report(tmp_path):
    write_run(tmp_path / "a" / "version_0", [float("nan"), float("nan")])
    for seed in (0, 1):
        diverged = {"val/loss": [1.0, float("inf") if seed else 2.0]}
        write_run(tmp_path / "b" / f"version_{seed}", [0.2, 0.4], config("FedDyn", seed), diverged)
    assert main([str(tmp_path), "-o", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| FedAvg | – |" in text
    assert "inf ± nan" in text


def test_runs_that_a_mean_leaves_out_are_named_and_the_rest_is_not_the_best(tmp_path):
    nan = float("nan")
    for seed, accuracy in enumerate(([0.5, 0.9, 0.9], [0.5, nan, nan])):
        sharp = {"hessian/lambda_max": [4.0, 3.0, 2.0]} if seed == 0 else {}
        write_run(tmp_path / "a" / f"version_{seed}", accuracy, config(seed=seed), sharp)
        hiccup = [0.5, nan if seed else 0.6, 0.7]
        write_run(tmp_path / "b" / f"version_{seed}", hiccup, config("FedDyn", seed))
        write_run(tmp_path / "c" / f"version_{seed}", [0.4] * 3, config("FedSAM", seed))
    args = ["--baseline", "FedSAM", "--rank", "--latex"]
    assert main([str(tmp_path), "-o", str(tmp_path / "out"), *args]) == 0
    text = (tmp_path / "out" / "report.md").read_text().replace("\\", "")
    assert "| FedAvg | 90.00 (1 of 2) |" in text
    assert "| FedDyn | **70.00 ± 0.00** |" in text
    lost = "Left out of means: FedAvg, seed 1: val/accuracy"
    paragraphs = text.split("\n\n")
    assert [p.split(":")[0][:20] for p in paragraphs if f"{lost} NaN from round 2." in p] == [
        *("val/accuracy in perc", "percentage points of", "Mean rank by val/acc")
    ]
    (results,) = (p for p in paragraphs if p.startswith("server, selected, all"))
    assert f"{lost}, val/loss NaN from round 2." in results
    (others,) = (p for p in paragraphs if p.startswith("λ_max, trace"))
    assert "FedAvg, seed 1: hessian/lambda_max not logged." in others
    assert "| 2 (1 of 2) |" in text
    assert "bold: the best of the setting, that is the largest." in text
    curves = [p for p in paragraphs if p.startswith("val/accuracy against")]
    also = f"{lost} NaN from round 2; FedDyn, seed 1: val/accuracy NaN from round 2."
    assert len(curves) == 2
    assert all(also in curve for curve in curves)
    assert f"{lost} NaN from round 2." in (tmp_path / "out" / "table.tex").read_text()


def test_accuracies_in_percent_are_read_as_such(tmp_path):
    write_run(tmp_path / "version_0", [50.0, 93.25], columns={"clients/accuracy_std": [0.5, 0.5], "val/loss": [1, 1]})
    assert main([str(tmp_path), "-o", str(tmp_path / "out"), "--target", "0.9"]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| FedAvg | 93.25 |" in text
    assert "| FedAvg | 93.25 | 1.000 | 2 | 4 | 1 |" in text
    assert "accuracies were logged in percent" in text
    write_run(tmp_path / "both" / "version_0", [0.5, 0.25], columns={"train/accuracy": [50, 60]})
    (run,) = find_runs([tmp_path / "both"])
    assert (run.last("val/accuracy"), run.last("train/accuracy")) == (0.25, 0.6)
    write_run(tmp_path / "inf" / "version_0", [math.inf, 0.5])
    assert find_runs([tmp_path / "inf"])[0].last("val/accuracy") == 0.5


def test_long_curves_are_thinned_and_keep_their_end(tmp_path):
    study, axes = group_runs(find_runs([write_run(tmp_path / "version_0", [0.1] * 4000)])), Figure().subplots()
    figures._curve(axes, study, study.groups[0], "val/accuracy")
    assert axes.lines[0].get_xdata().tolist() == list(range(1, 4001, 3))


def test_what_is_compared_is_what_validation_logs(tmp_path):
    path = write_run(tmp_path / "version_0", [0.1, 0.2], columns={"val_acc": [0.3, 0.4], "val_acc_all": [0.7, 0.8]})
    text = (path / "metrics.csv").read_text()
    (path / "metrics.csv").write_text(text.replace("val/accuracy", "top"))
    assert main([str(path), "-o", str(tmp_path / "out")]) == 0
    assert "| FedAvg | 0.40 |" in (tmp_path / "out" / "report.md").read_text()
    for arguments, message in (
        (["--metric", "val_ac"], "--metric 'val_ac' is in no run; there are val_acc, val_acc_all"),
        (["-o", str(path / "config.yaml" / "out")], "a part of the path is a file"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            main([str(path), *arguments])
    (path / "metrics.csv").write_text(text)
    with pytest.raises(MisconfigurationException, match=r"--target 46 must lie in 0 \.\. 1, as val/accuracy does"):
        main([str(path), "--target", "46"])


def test_rounds_that_nobody_reaches(tmp_path):
    write_run(tmp_path / "a" / "version_0", [0.1, 0.2])
    study = group_runs(find_runs([tmp_path]))
    assert tables.show_cost(study.groups[0], "val/accuracy", 0.5) == "> 2"


def test_numbers_as_they_are_shown():
    assert tables.show_number(None) == "–"
    assert tables.show_number(12345.6) == "12346"
    assert tables.show_number(0.00012345) == "0.0001234"
    assert tables.show_gain(Stat.of([-1e-6, -3e-6]), "accuracy").text == "0.00 ± 0.00"
    assert tables.show_stat(Stat(0.00012, 0.00003, 3), "val/mse") == "0.00012 ± 3e-05"
    assert tables.show_stat(Stat(0.52, 0.003, 3), "val/mse") == "0.52 ± 0.003"
    assert tables.show_stat(Stat(1e30, 2e29, 3), "val/loss") == "1e+30 ± 2e+29"
    assert tables.show_gain(None, "x") == Cell("–")
    assert tables.show_gain(Stat.of([0.10, 0.12, 0.14]), "accuracy") == Cell("+12.00 ± 4.97", bold=True)
    assert tables.show_gain(Stat.of([-0.1, 0.2]), "loss") == Cell("+0.05 ± 1.91"), "the interval holds 0"
    assert tables.show_gain(Stat.of([-0.1]), "accuracy") == Cell("-10.00 (1 seed)")
    assert tables.show_gain(Stat(0.1, None, 0), "accuracy") == Cell("+10.00 (no common seed)")


def test_the_best_of_small_numbers_is_one(tmp_path):
    for method, mse in (("FedAvg", 0.0004), ("FedDyn", 0.0003)):
        write_run(tmp_path / method / "version_0", [0.1], config(method), {"val/mse": [mse]})
    assert tables.best_of(group_runs(find_runs([tmp_path])).groups, "val/mse") == {"FedDyn"}


def ranked(tmp_path, settings: int) -> Table:
    for i in range(settings):
        for j, method in enumerate(["FedAvg", "FedProx", "FedDyn"]):
            write_run(
                tmp_path / f"{method}{i}" / "version_0", [0.1, 0.5 + 0.1 * j - 0.01 * i], config(method, alpha=i + 1.0)
            )
    write_run(tmp_path / "central" / "version_0", [0.9], config(centralized=True))
    table = tables.ranks(group_runs(find_runs([tmp_path])), "val/accuracy")
    assert table is not None
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["FedDyn", "1.00"],
        ["FedProx", "2.00"],
        ["FedAvg", "3.00"],
    ]
    return table


def test_ranks_over_settings(tmp_path):
    """Ranks 1, 2, 3 in each of 5 settings: χ² = 12·5/12·(1 + 4 + 9 − 12) = 10, of which the tail is e^-5.

    Demšar's table 5 has q = 2.343 for 3 methods: 2.343·sqrt(3·4/(6·5)) = 1.48.
    """
    note = ranked(tmp_path, 5).note
    assert "over 5 of 5 settings" in note
    assert "p = 0.0067." in note
    assert "1.48 apart" in note


def test_too_few_settings_for_a_test_of_ranks(tmp_path):
    assert "Friedman's test needs 3 methods and 5 settings: there are 3 and 4." in ranked(tmp_path, 4).note


def test_differences_to_a_baseline(tmp_path):
    for seed, (ours, theirs) in enumerate([(0.60, 0.50), (0.64, 0.52), (0.65, 0.51)]):
        write_run(tmp_path / "a" / f"version_{seed}", [0.1, theirs], config("FedAvg", seed))
        write_run(tmp_path / "b" / f"version_{seed}", [0.1, ours], config("FedDyn", seed))
    write_run(tmp_path / "c" / "version_0", [0.1, 0.7], config("FedProx", 0))
    out = tmp_path / "out"
    assert main([str(tmp_path), "-o", str(out), "--baseline", "FedAvg", "--rank"]) == 0
    text = (out / "report.md").read_text()
    # 10, 12 and 14 points: 12 ± 4.30265·2/sqrt(3).
    assert rows(text, "difference to FedAvg") == {
        "difference to FedAvg": ["digits"],
        "---": ["---:"],
        "FedDyn": ["**+12.00 ± 4.97**"],
        "FedProx": ["+20.00 (1 seed)"],
    }
    assert "(1-3 of each)" in text
    assert "needs 3 methods and 5 settings: there are 3 and 1." in text
    with pytest.raises(MisconfigurationException, match="--baseline 'FedSGD' is not among the runs"):
        main([str(tmp_path), "-o", str(out), "--baseline", "FedSGD"])


def test_writers_escape(tmp_path):
    table = Table(["a|b", "c_d"], [[Cell("<x>", bold=True), Cell("50 % & {y} αΔ")]], "a *note*")
    picture = tmp_path / "p q.png"
    picture.write_bytes(b"\x89PNG")
    document = [Heading("T#", 1), Text("<script>", warning=True), table, Picture(picture, "c<a>p")]
    write_markdown(document, tmp_path / "r.md")
    write_html(document, tmp_path / "r.html")
    write_latex(table, tmp_path / "t.tex")
    markdown, page = (tmp_path / "r.md").read_text(), (tmp_path / "r.html").read_text()
    assert "# T\\#" in markdown
    assert "> \\<script\\>" in markdown
    assert "| **\\<x\\>** | 50 % & {y} αΔ |" in markdown
    assert "(p%20q.png)" in markdown
    assert "<script>" not in page
    assert "<strong>&lt;x&gt;</strong>" in page
    assert r"\textbf{$<$x$>$} & 50 \% \& \{y\} $\alpha$$\Delta$ \\" in (tmp_path / "t.tex").read_text()
