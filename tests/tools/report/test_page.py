"""The report of a run, as text and in a browser."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("PIL")

from PIL import Image

import jaxnets as jn
from jaxnets.__main__ import main
from jaxnets.tools.report.svg_chart import Series, line_chart, nice_ticks

RESULT = {
    "experiment": "digits",
    "dataset": "digits <small>",
    "model": "convnet",
    "metric": "test accuracy",
    "unit": "%",
    "value": 0.95,
    "ci95": 0.01,
    "values": [0.94, 0.95, 0.96],
    "seeds": 3,
    "steps": 40,
    "parameters": 21482,
    "test_loss": 0.25,
    "train_seconds": 4.0,
    "compile_seconds": 1.0,
    "step_seconds": 2.5,
    "batches_seconds": 0.02,
    "notes": ["published: 97% <somewhere>"],
    "captions": {"mistakes": "the <worst>"},
    "command": "python -m experiments.digits --seeds 3 --out <here>",
    "python": "3.11",
    "jax": "0.10",
    "flax": "0.12",
    "optax": "0.2",
    "devices": ["cpu"],
    "cpu_cores": 2,
}


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"step": 20, "loss": [1.0, 2.0, 3.0], "test/loss": [1.5, 1.5, 1.5]},
        {"step": 40, "loss": [None, None, None], "test/loss": [0.9, 0.8, 0.7]},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps({"options": {"learning_rate": 0.001}}))
    for name in ("mistakes", "curves"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_a_report_contains_result_curves_images_and_the_command(folder):
    page = jn.write_report(folder, RESULT).read_text()
    assert "95.00%" in page and "1.00% (95% confidence interval of the mean of 3 networks" in page
    assert "each network: 94.00%, 95.00%, 96.00%" in page
    assert "line: mean of 3 networks; band: from the lowest to the highest" in page
    assert "published: 97% &lt;somewhere&gt;" in page and "the &lt;worst&gt;" in page
    assert "digits &lt;small&gt;" in page and "--out &lt;here&gt;" in page
    assert page.count("<svg") == 1  # one chart for both losses
    assert page.count("<polyline") == 1 and page.count("<circle") == 1  # one point is not finite
    assert page.count("<img") == 1 and 'alt="mistakes"' in page  # curves.png is replaced by a chart
    assert "waited for data in at most 0.5% of the training" in page
    assert "<td>learning rate</td><td>0.001</td>" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # self-contained

    opened = []

    class Balanced(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "img", "path", "polygon", "polyline", "circle"):
                opened.append(tag)

        def handle_startendtag(self, tag, attributes):
            pass

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Balanced().feed(page)
    assert opened == []


def test_a_run_of_ones_own_has_a_report_and_can_be_compared(tmp_path, capsys):
    write = jn.jsonl_writer(tmp_path / "metrics.jsonl")
    history = jn.History(rows=[{"step": 0, "loss": 2.0}], step=10, seconds=3.0)
    write.start(history, 0)
    write({"step": 10, "loss": 1.0})
    write.close()
    assert "2</text>" in jn.write_report(tmp_path).read_text()  # of a run that is not finished
    jn.write_result(
        tmp_path, dataset="mine", metric="error", unit="meters", values=[1.5], history=history
    )
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert "<h1>mine</h1>" in page and "1.5 <small>meters</small>" in page
    assert "error; 10 training steps" in page and "confidence" not in page
    other = tmp_path / "other"
    jn.write_result(other, dataset="mine", metric="error", unit="meters", values=[1.0, 1.2])
    assert main(["compare", str(tmp_path), str(other)]) == 0
    assert "1.5" in capsys.readouterr().out


def test_networks_that_diverged_are_named(folder):
    values = {"values": [0.9, None, None], "value": 0.9, "ci95": None}
    page = jn.write_report(folder, {**RESULT, **values}).read_text()
    assert "2 of 3 networks diverged and do not count" in page and "90.00%" in page
    values = {"values": [None], "value": None, "ci95": None}
    assert "no value" in jn.write_report(folder, {**RESULT, **values}).read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1, "lo', r"line 1: not the metrics of a run: it is cut"),
        ("metrics.jsonl", '{"step": 1}\n{"loss": 1}', "line 2: .* it has no 'step'"),
        ("metrics.jsonl", '{"step": 4}\n{"step": -5}', "line 2: .* step is -5, which is below 4"),
        ("metrics.jsonl", '{"step": 1, "loss": "1"}', r'line 1: .* loss is "1"'),
        ("metrics.jsonl", '{"step": 1, "loss": [[1]]}', r"line 1: .* loss\[0\] is \[1\]"),
        ("metrics.jsonl", f'{{"step": {10**400}}}', "line 1: .* step is 10*"),
        (
            "metrics.jsonl",
            '{"step": 1, "loss": [1, 2]}\n{"step": 2, "loss": [1]}',
            "line 2: .* loss has 1 values, not 2",
        ),
        (
            "metrics.jsonl",
            '{"step": 1, "loss": [1, 2]}\n{"step": 2, "loss": 1}',
            "line 2: .* loss is one number in some rows and a list in others",
        ),
        ("metrics.jsonl", '{"step": 1, "loss": []}', "line 1: .* loss has 0 values, not one or"),
        (
            "result.json",
            json.dumps({**RESULT, "step_seconds": "1"}),
            'line 1: .* step_seconds is "1"',
        ),
        ("config.json", "[1]", "line 1: not the configuration of a run: .*; mend or remove it"),
        ("result.json", '{"dataset": 1}', "line 1: not the result of a run: dataset is 1"),
        ("result.json", "[" * 100_000, "line 1: not the result of a run: it is nested"),
    ],
)
def test_a_damaged_file_is_named_with_its_line_and_ends_with_code_2(
    name, content, message, folder, capsys
):
    (folder / name).write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(folder)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"error: .*{name}, {message}", line)
    assert not (folder / "report.html").exists()


def test_a_folder_that_does_not_exist_ends_with_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path / "none")])
    assert stopped.value.code == 2 and "none" in capsys.readouterr().err


def test_text_that_is_no_unicode_is_shown_as_far_as_possible(folder):
    page = jn.write_report(folder, {**RESULT, "dataset": "half \ud800"}).read_text()
    assert "half ?" in page


def test_values_beyond_every_scale_are_not_drawn(folder):
    rows = [{"step": 0, "loss": 1e300}, {"step": 0, "loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "<circle" in jn.write_report(folder, RESULT).read_text()


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_even_and_span_the_range(low, width):
    ticks = nice_ticks(low, low + width)
    assert 2 <= len(ticks) <= 6
    slack = 1e-6 * max(abs(low), width)
    assert ticks[0] <= low + slack and ticks[-1] >= low + width - slack
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-6, atol=slack)


def test_a_chart_of_many_points_is_downsampled_and_one_of_none_is_empty():
    steps = np.arange(1, 5001)
    chart = line_chart("loss", {"loss": Series(steps, np.ones((5000, 2)))})
    (line,) = re.findall(r'<polyline points="([^"]*)"', chart)
    assert len(line.split()) == 300
    assert line_chart("loss", {"loss": Series(np.array([1]), np.array([[np.nan]]))}) == ""


def test_a_chart_goes_on_without_the_seed_that_diverged():
    values = np.array([[1.0, 3.0, 9.0], [2.0, 4.0, np.nan], [3.0, np.nan, np.nan]])
    steps = np.array([1, 2, 3])
    drawn = line_chart("loss", {"loss": Series(steps, values)})
    (line,) = re.findall(r'<polyline points="([^"]*)"', drawn)
    heights = [float(corner.split(",")[1]) for corner in line.split()]
    # Means 13 / 3, 3 and 3, in the same range.
    same = np.array([[1.0, 3.0, 9.0], [2.0, 4.0, 3.0], [3.0, 3.0, 3.0]])
    expected = line_chart("loss", {"loss": Series(steps, same)})
    (line,) = re.findall(r'<polyline points="([^"]*)"', expected)
    assert heights == [float(corner.split(",")[1]) for corner in line.split()]


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize(
    ("width", "scheme", "background"),
    [(375, 0, "rgb(21, 23, 27)"), (1200, 1, "rgb(251, 251, 249)")],
    ids=["phone_dark", "desktop_light"],
)
def test_a_browser_shows_every_image_without_errors_or_horizontal_scrolling(
    folder, width, scheme, background
):
    path = jn.write_report(folder, RESULT)
    # Headless windows are at least 500 pixels wide; a frame can be as narrow as a phone.
    probe = f"""<iframe src="report.html" width="{width}" height="800"></iframe><p></p><script>
      onload = () => {{ const page = document.querySelector("iframe").contentDocument;
        const images = [...page.images].map(image => image.naturalWidth);
        const hidden = page.documentElement.scrollWidth - page.documentElement.clientWidth;
        const color = getComputedStyle(page.body).backgroundColor;
        document.querySelector("p").textContent = JSON.stringify([images, hidden, color]);
      }}</script>"""
    (folder / "probe.html").write_text(probe)
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--allow-file-access-from-files", "--enable-logging=stderr"),
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--user-data-dir={folder / 'profile'}",
            (folder / "probe.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    (text,) = re.findall(r"<p>(.*?)</p>", done.stdout)
    assert json.loads(text) == [[4], 0, background]
    assert "CONSOLE" not in done.stderr
    assert path.is_file()
