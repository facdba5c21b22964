"""Tags of modalities: any case, aliases, lists, and what happens to unknown ones."""

import json

import pytest
from typer.testing import CliRunner

import corruptions  # noqa: F401 - fills the registry
from robustlab.cli.listing import list_
from robustlab.cli.main import app
from robustlab.core.errors import KindError, RobustlabWarning, UnknownNameError
from robustlab.core.registry import CORRUPTIONS
from robustlab.core.types import MODALITIES, ImageSpec

OURS = dict(CORRUPTIONS.items())


@pytest.mark.parametrize("tag", ["Histology", " histology ", "HISTOLOGY"])
def test_modalities_are_known_in_any_case(tag):
    shift = OURS["stain-shift"]()
    assert shift.skip_reason(ImageSpec(3, (8, 8), modality=tag)) is None
    assert "made for histology" in (shift.skip_reason(ImageSpec(3, (8, 8), modality="Photo")) or "")


def test_mri_is_mr_and_an_unknown_modality_is_told_of():
    assert ImageSpec(1, (8, 8), modality="MRI") == ImageSpec(1, (8, 8), modality="mr")
    with pytest.warns(RobustlabWarning, match=r"'histolgy' is no modality .* mean 'histology'\?.*photo"):
        assert ImageSpec(3, (8, 8), modality="histolgy").modality == "histolgy"
    with pytest.raises(KindError, match="modality as a string"):
        ImageSpec(3, (8, 8), modality=3)


def test_every_tag_of_a_corruption_is_a_known_modality():
    assert {tag for kind in OURS.values() for tag in (*(kind.seen_in or ()), *(kind.modalities or ()))} <= set(
        MODALITIES
    )


@pytest.mark.parametrize(
    ("given", "tag"), [("mri", "mr"), ("MR", "mr"), ("photo", "photo"), ("Histology", "histology")]
)
def test_lists_take_every_known_modality(given, tag):
    listed = CliRunner().invoke(app, ["list", "corruptions", "--modality", given, "--json"])
    assert listed.exit_code == 0, listed.output
    names = {entry["name"] for entry in json.loads(listed.stdout)}
    wanted = {
        name
        for name, kind in OURS.items()
        if all(tags is None or tag in tags for tags in (kind.modalities, kind.seen_in))
    }
    assert names & set(OURS) == wanted
    assert ("stain-shift" in names) == (tag == "histology")


def test_lists_refuse_an_unknown_modality_with_a_hint():
    with pytest.raises(UnknownNameError, match=r"mr, oct, photo.*Did you mean 'xray'\?"):
        list_("corruptions", "x-ray")
