"""The notebooks: what is committed is clean, and each still runs from top to bottom.

The slow group trains for a fifth of the steps, the exhaustive one for all.
"""

import base64
import io
import os
import pathlib
import re
import sys

import nbclient
import nbformat
import PIL.Image
import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = (
    *("autoencoder", "convolutional", "feedforward", "gan", "multi_device", "populations"),
    *("pretrained", "recurrent", "speech", "transformer"),
)
# A slash that starts a path of two parts or more; "loss/test" and the slashes of a URL start none.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/)])/\w[\w.+-]*/\w|\b[A-Za-z]:\\\w|\bfile://")

# Literal numbers of training steps, of more than one digit: shorter trainings take no time.
NUM_STEPS = re.compile(r"\b((?:num_steps|NUM_STEPS) ?= ?)(\d\d+)\b")


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def written_text(notebook):
    """Sources and everything that was printed or displayed as text; pictures are left out."""
    texts = [cell.source for cell in notebook.cells]
    for output in outputs(notebook):
        texts.append(output.get("text", ""))
        texts += [text for kind, text in output.get("data", {}).items() if "text/" in kind]
    return "\n".join(texts)


def complaints(notebook):
    """Errors, and whatever went to standard error: the library and its notebooks write nothing."""
    return [
        output.get("text") or f"{output.ename}: {output.evalue}"
        for output in outputs(notebook)
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def test_every_notebook_of_the_folder_is_tested():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NOTEBOOKS)


@pytest.mark.parametrize(
    "text, found",
    [
        ("see /home/someone/run.py", True),
        ("'/var/x'", True),
        (r"C:\Users\someone", True),
        ("file:///x", True),
        ("https://example.org/a/b", False),
        ("hidden_0/kernel, loss (nats)/step, 1 / 2 / 3", False),
    ],
)
def test_absolute_paths_are_recognized(text, found):
    assert bool(ABSOLUTE_PATH.search(text)) is found


@pytest.mark.parametrize("name", NOTEBOOKS)
class TestCommittedNotebook:
    def test_is_valid_and_names_the_generic_kernel(self, name):
        notebook = read(name)
        nbformat.validate(notebook)
        assert notebook.metadata.kernelspec.name == "python3"

    def test_was_run_once_from_top_to_bottom(self, name):
        counts = [cell.execution_count for cell in code_cells(read(name))]
        assert counts == list(range(1, len(counts) + 1))

    def test_has_pictures_and_printed_results(self, name):
        kinds = {kind for output in outputs(read(name)) for kind in output.get("data", {})}
        streams = {output.get("name") for output in outputs(read(name))}
        assert "image/png" in kinds
        assert "stdout" in streams

    def test_its_pictures_can_be_decoded(self, name):
        for output in outputs(read(name)):
            if "image/png" in output.get("data", {}):
                picture = base64.b64decode(output["data"]["image/png"], validate=True)
                PIL.Image.open(io.BytesIO(picture)).load()

    def test_shows_neither_errors_nor_warnings(self, name):
        assert complaints(read(name)) == []

    def test_names_no_path_of_a_machine(self, name):
        assert ABSOLUTE_PATH.findall(written_text(read(name))) == []

    def test_explains_itself_between_the_cells(self, name):
        kinds = [cell.cell_type for cell in read(name).cells]
        assert kinds[0] == "markdown"
        assert kinds.count("markdown") >= kinds.count("code") / 2


def shortened(source):
    """A cell with a fifth of the training steps."""
    return NUM_STEPS.sub(lambda match: f"{match[1]}{int(match[2]) // 5}", source)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_without_errors_or_warnings(name, execute):
    notebook = read(name)
    found = sum(len(NUM_STEPS.findall(cell.source)) for cell in code_cells(notebook))
    assert found, "no cell says how long it trains"
    for cell in code_cells(notebook):
        cell.source = shortened(cell.source)
    execute(notebook)
    assert complaints(notebook) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_trains_to_the_end_without_errors_or_warnings(name, execute):
    notebook = read(name)
    execute(notebook)
    assert complaints(notebook) == []


@pytest.fixture
def execute(tmp_path, monkeypatch, optimized_processes):
    """A function that runs a notebook, as a reader of this checkout would."""
    search = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, search)))
    # The kernel of this interpreter, whatever else is called python3 on this machine.
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("JUPYTER_PATH", os.path.join(sys.prefix, "share", "jupyter"))
    options = {"timeout": 600, "kernel_name": "python3"}
    folder = {"metadata": {"path": str(tmp_path)}}
    return lambda notebook: nbclient.NotebookClient(notebook, resources=folder, **options).execute()
