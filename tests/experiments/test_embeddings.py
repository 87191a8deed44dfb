"""Lines of a text file by a sentence encoder: vectors, search, clusters, the command."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sentence_networks import save_encoder, write_modules

import jaxnets as jn
from experiments import embeddings
from experiments.harness.run_folder import RunError
from jaxnets.pretrained import PretrainedNetwork

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
LINES = ["a b", "c", "a b", "", "d e " * 10, "  f g h ", "c $x$ d", "h " * 100]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "network"
    save_encoder(folder, WORDS, max_length=32)
    write_modules(folder, {"": "Transformer", "1_Pooling": "Pooling"})
    return folder


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\r\n".join(LINES))
    return path


def test_lines_are_read_once_and_without_blanks(texts):
    expected = ["a b", "c", ("d e " * 10).strip(), "f g h", "c $x$ d", ("h " * 100).strip()]
    assert embeddings.read_lines(texts) == expected


def test_batches_change_no_vector_and_compile_once_a_length(folder, texts):
    network = embeddings.load_encoder(folder)
    assert not network.module.normalize
    lines = embeddings.read_lines(texts)
    traced = []

    class Counted:
        def apply(self, variables, tokens, **rest):
            traced.append(tokens.shape)
            return network.module.apply(variables, tokens, **rest)

    counted = dataclasses.replace(network, module=Counted())
    vectors = embeddings.embed(counted, lines, batch_size=3)
    # Equal parts of the four short lines; no more rows than lines of a length.
    assert sorted(traced) == [(1, 24), (1, 32), (2, 16)]
    assert network.processor.max_length == 32
    batch = network.processor(lines, truncate=True)
    plain = np.asarray(network.module.apply(network.variables, **batch))
    expected = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_search_ranks_by_cosine():
    vectors = np.array([[0.6, 0.8], [1, 0], [-1, 0], [0.8, 0.6]], np.float32)
    rows, cosines = embeddings.search(np.array([1, 0], np.float32), vectors, 3)
    assert rows.tolist() == [1, 3, 0]
    np.testing.assert_allclose(cosines, [1, 0.8, 0.6])
    assert len(embeddings.search(vectors[0], vectors, 9)[0]) == 4


def test_clusters_are_groups_the_largest_first_with_their_central_line():
    # Around 10, -10 and 0 on a line; the middle of each group is next to its mean.
    values = [-11, 10, 0, 9, -10, 11, -9, 10.2, -10.1, 9.7]
    vectors = np.array([[value, 0] for value in values], np.float32)
    found = embeddings.cluster(vectors, 3)
    assert found.labels.tolist() == [1, 0, 2, 0, 1, 0, 1, 0, 1, 0]
    assert found.sizes.tolist() == [5, 4, 1]
    assert found.central.tolist() == [1, 4, 2]


def test_more_clusters_than_different_vectors_are_refused():
    with pytest.raises(RunError, match="--clusters is 3, but only 2 lines differ"):
        embeddings.cluster(np.array([[1, 0], [0, 1], [1, 0]], np.float32), 3)


def test_the_command_prints_and_draws(folder, texts, tmp_path, capsys):
    arguments = [f"--pretrained={folder}", f"--texts={texts}", f"--out={tmp_path / 'out'}"]
    query = ["--query", "f g h", "--top", "2", "--clusters", "4"]
    assert embeddings.main([*arguments, *query]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[:2] == ["cosine  line most similar to 'f g h'", " 1.000  f g h"]
    assert lines[3:5] == ["", "cluster  lines  central line"]
    assert sum(int(line.split()[1]) for line in lines[5:]) == 6 and len(lines) == 9
    with Image.open(tmp_path / "out" / "clusters.png") as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").tobytes())) > 50


def test_a_file_of_one_line_is_one_cluster(folder, tmp_path, capsys):
    path = tmp_path / "line.txt"
    path.write_text("a b")
    arguments = [f"--pretrained={folder}", f"--texts={path}", f"--out={tmp_path}"]
    assert embeddings.main([*arguments, "--query", "b"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "      1      1  a b"
    with Image.open(tmp_path / "clusters.png") as picture:
        assert picture.width > 1000


def test_the_default_is_as_many_clusters_as_lines_differ():
    vectors = np.eye(3, dtype=np.float32)
    assert embeddings.cluster(vectors[[0, 1, 1, 2]]).sizes.tolist() == [2, 1, 1]
    assert len(embeddings.cluster(np.eye(20, dtype=np.float32)).sizes) == 8


def test_a_picture_of_many_clusters_fits_on_a_screen(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    single = embeddings.Clusters(np.arange(300), np.arange(300), np.ones(300, int))
    embeddings.draw([str(row) for row in range(300)], vectors, single, tmp_path / "many.png")
    with Image.open(tmp_path / "many.png") as picture:
        assert picture.height < 1300


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            "a\nb\n".encode("utf-16-le"),
            [],
            "lines.txt is not text in UTF-8: it has a byte 0 at 1, as",
        ),
        (b"a\nb\n", ["--seed", "-1"], "--seed is -1; give 0 or more"),
        (b"a\nb\n", ["--seed", "4294967296"], r"--seed is 4294967296; give less than 2\^32"),
        (b"a\nb\n", ["--out", __file__], "--out is .*test_embeddings.py, a file; give a folder"),
        (b" \n\n", [], "lines.txt has no line of text; give"),
        (b"a\n\xff\n", [], "lines.txt is not UTF-8 at byte 2"),
        (b"a\nb\na\n", ["--clusters", "3"], "--clusters is 3, but .* has 2 different lines"),
        (b"a\nb\n", ["--clusters", "0"], "--clusters is 0; give 1 or more"),
        (b"a\nb\n", ["--clusters", "1", "--query", " "], "--query is ' '; give a sentence"),
        (b"a\nb\n", ["--clusters", "1", "--texts", "missing.txt"], "No such file.*missing.txt"),
        (b"a\nb\n", ["--clusters", "1", "--pretrained", "missing"], "missing does not exist"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, capsys, content, options, message):
    path = tmp_path / "lines.txt"
    path.write_bytes(content)
    arguments = [f"--pretrained={folder}", f"--texts={path}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stopped:
        embeddings.main([*arguments, *options])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_sentence_encoder_is_refused(folder, tmp_path):
    module = jn.MLP(features=(2,), num_outputs=2)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 3)))
    jn.pretrained.save(tmp_path / "mlp", PretrainedNetwork(module, variables))
    with pytest.raises(RunError, match=r"mlp is a MLP, not a sentence encoder; give a folder of"):
        embeddings.load_encoder(tmp_path / "mlp")
    network = jn.pretrained.load(folder)
    jn.pretrained.save(tmp_path / "own", dataclasses.replace(network, processor=None))
    with pytest.raises(RunError, match="own has no tokenizer"):
        embeddings.load_encoder(tmp_path / "own")
