"""The installation check: its report, and that it detects problems."""

import json
import pathlib
import re
import tomllib

import jax
import jax.numpy as jnp
import pytest

import jaxnets as jn
from jaxnets.__main__ import main
from jaxnets.tools import doctor

PYPROJECT = pathlib.Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture(scope="module")
def report():
    return doctor.examine()


@pytest.fixture
def without_self_tests(monkeypatch):
    """Skip the self-tests, which compile a training step."""
    monkeypatch.setattr(doctor, "_try", lambda name, check: doctor.Check(name, None, 0.0))


def pretend(monkeypatch, **versions):
    real = doctor.installed_version
    monkeypatch.setattr(
        doctor, "installed_version", lambda name: versions.get(name.replace("-", "_"), real(name))
    )


def test_a_good_installation_is_healthy(report):
    assert report.healthy
    assert report.problems == ()
    assert [check.error for check in report.checks] == [None, None]
    assert str(report).endswith("\nhealthy")


def test_the_report_names_what_is_installed(report):
    assert report.versions["jax"] == jax.__version__
    assert report.versions["jaxnets"] == jn.__version__
    assert len(report.devices) == jax.device_count()
    assert all(device.startswith("cpu") for device in report.devices)
    assert all(text in str(report) for text in (jax.__version__, "self-tests", "fashion_mnist"))


def test_the_columns_of_the_text_are_aligned(report):
    section = str(report).split("\n\n")[0].splitlines()[1:]
    starts = {re.match(r" +\S+ +", line).end() for line in section}
    assert len(starts) == 1


@pytest.mark.parametrize(("package", "version"), doctor.KNOWN_BAD)
@pytest.mark.usefixtures("without_self_tests")
def test_a_known_bad_version_is_a_problem_with_a_remedy(package, version, monkeypatch, capsys):
    pretend(monkeypatch, **{package: version})
    assert main(["doctor"]) == 1
    problem = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM")
    )
    assert f"{package} {version} " in problem
    assert re.search(r"jax issue \d+\); install jax ", problem)


def test_other_versions_of_the_same_packages_are_no_problem():
    assert doctor.version_problems({"jax": "0.10.1", "jaxlib": "0.12.0.1"}) == []


@pytest.mark.usefixtures("without_self_tests")
def test_a_missing_package_is_a_problem_with_a_remedy(monkeypatch):
    pretend(monkeypatch, orbax_checkpoint=None)
    report = doctor.examine()
    assert report.problems == (
        "orbax-checkpoint is not installed; run `pip install orbax-checkpoint`",
    )
    assert "not installed" in str(report)


def test_a_training_step_that_does_not_learn_is_a_problem(monkeypatch, capsys):
    def stuck(state, batch):
        return state, {"loss": jn.Mean(jnp.zeros(()), jnp.zeros(()))}

    monkeypatch.setattr(doctor, "jit_step", lambda step: stuck)
    assert main(["doctor", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["healthy"] is False
    assert "the loss went from nan to nan" in result["problems"][0]


def test_a_training_step_that_raises_is_reported_and_does_not_stop_the_report(monkeypatch):
    def broken(step):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(doctor, "jit_step", broken)
    report = doctor.examine()
    assert not report.healthy
    assert "RuntimeError: no kernel image" in report.problems[0]
    assert "FAILED" in str(report) and "PROBLEM" in str(report)


def test_wrong_sums_are_a_problem(monkeypatch):
    monkeypatch.setattr(doctor.jax, "jit", lambda function: lambda *args: function(*args) + 1)
    assert re.match("40000 of 40000 are wrong; install", doctor._check_sums())


@pytest.mark.usefixtures("without_self_tests")
def test_a_backend_that_does_not_start_is_reported(monkeypatch):
    def broken():
        raise RuntimeError("unknown backend 'gpv'")

    monkeypatch.setattr(doctor.jax, "devices", broken)
    assert doctor.examine().devices == ("none: unknown backend 'gpv'",)


@pytest.mark.usefixtures("without_self_tests")
def test_the_report_names_the_folder_of_a_data_set_or_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAXNETS_DATA", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").touch()
    report = doctor.examine()
    assert report.data["mnist"] == str(tmp_path / "mnist")
    assert str(tmp_path / "cache" / "jaxnets") in report.data["cifar10"]
    assert report.settings["JAXNETS_DATA"] == str(tmp_path)


@pytest.mark.usefixtures("without_self_tests")
def test_a_data_folder_that_does_not_exist_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXNETS_DATA", str(tmp_path / "absent"))
    assert "no such folder" in doctor.examine().settings["JAXNETS_DATA"]


@pytest.mark.usefixtures("without_self_tests")
def test_a_missing_extra_is_reported_with_its_command_and_is_no_problem(monkeypatch):
    pretend(monkeypatch, grain=None)
    report = doctor.examine()
    assert report.extras["grain"] == ("grain",)
    assert report.healthy
    assert "missing grain; pip install 'jaxnets[grain]'" in str(report)


def test_the_extras_are_those_of_the_project():
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    names = {
        extra: {re.match(r"[\w-]+", line)[0] for line in lines} - {"jaxnets"}
        for extra, lines in declared.items()
        if extra != "test"
    }
    assert {extra: set(packages) for extra, packages in doctor.EXTRAS.items()} == names


@pytest.mark.parametrize(
    ("folder", "text"), [("/programs", "/programs"), (None, "off; set JAX_COMPILATION_CACHE_DIR")]
)
def test_the_compilation_cache_is_reported(folder, text):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", folder)
    try:
        assert doctor._settings()["compilation cache"].startswith(text)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("without_self_tests")
def test_the_command_prints_one_json_object(capsys):
    assert main(["doctor", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["healthy"] is True
    assert result["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize("arguments", [[], ["doktor"], ["doctor", "--jso"]])
def test_an_unknown_command_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err
