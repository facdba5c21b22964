"""``robustlab list`` and ``robustlab show`` as a user runs them."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from robustlab.cli.main import app
from robustlab.core.errors import ConfigError, DataFileError, UnknownNameError
from robustlab.core.registry import CORRUPTIONS

RUN = CliRunner()


def run(*arguments):
    done = RUN.invoke(app, list(arguments))
    if done.exception is not None:
        raise done.exception
    return done.output


def test_list_says_everything_that_is_known_of_each_corruption():
    entries = {entry["name"]: entry for entry in json.loads(run("list", "corruptions", "--json"))}
    assert set(entries) == set(CORRUPTIONS.names())
    noise = entries["gaussian-noise"]
    assert noise["parameters"] == [
        {"name": "sigma", "unit": "of full range", "identity": 0.0, "severities": [0.03, 0.06, 0.1, 0.16, 0.25]}
    ]
    assert (noise["family"], noise["mode"], noise["label_safety"]) == ("noise", "physical", "safe")
    assert entries["poisson-noise"]["parameters"][0]["identity"] == "inf"
    assert entries["stain-shift"]["channels"] == [3]


def test_modality_keeps_what_is_met_there():
    names = {entry["name"] for entry in json.loads(run("list", "corruptions", "--modality", "xray", "--json"))}
    assert "gaussian-noise" in names
    assert "stain-shift" not in names
    histology = {entry["name"] for entry in json.loads(run("list", "corruptions", "--modality", "histology", "--json"))}
    assert "stain-shift" in histology
    with pytest.raises(UnknownNameError, match="xray"):
        run("list", "corruptions", "--modality", "x-ray")
    with pytest.raises(ConfigError, match="corruptions only"):
        run("list", "metrics", "--modality", "xray")


def test_show_prints_a_corruption_and_the_published_values_of_a_suite():
    text = run("show", "jpeg", "medmnist-c/pneumoniamnist")
    assert "libjpeg quality" in text
    entry = json.loads(run("show", "medmnist-c/pneumoniamnist", "--json"))[0]
    shifts = {shift["label"]: shift for shift in entry["shifts"]}
    assert len(shifts) == 13
    assert shifts["gaussian_noise"]["parameters"][0]["severities"] == [0.04, 0.05, 0.06, 0.07, 0.08]
    assert shifts["brightness_up"]["name"] == shifts["brightness_down"]["name"] == "ref:brightness"
    with pytest.raises(UnknownNameError, match="gaussian-noise"):
        run("show", "gausian")


def test_the_page_holds_the_pictures_that_the_code_makes(tmp_path):
    picture = tmp_path / "own.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70), dtype=np.uint8)).save(picture)
    page = tmp_path / "page.html"
    run("show", "gamma", "stain-shift", "--html", str(page), "--image", str(picture))
    text = page.read_text()
    pictures = [base64.b64decode(part) for part in re.findall(r"data:image/webp;base64,([^\"]+)", text)]
    assert len(pictures) == 3 * 6  # gamma on phantom and picture, the stain shift on its phantom only
    assert "own.png: not shown, needs 3 channels" in text
    assert all(Image.open(io.BytesIO(data)).size == (224, 224) for data in pictures)
    assert len({np.asarray(Image.open(io.BytesIO(data))).tobytes() for data in pictures}) == len(pictures)
    assert not re.findall(r"https?://", text)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="--html"):
        run("show", "gamma", "--image", "a.png")
    with pytest.raises(ConfigError, match="standard"):
        run("show", "standard", "--html", str(tmp_path / "a.html"))
    with pytest.raises(DataFileError, match="picture"):
        run("show", "gamma", "--html", str(tmp_path / "a.html"), "--image", str(tmp_path / "none.png"))
