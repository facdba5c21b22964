"""load_predictions: every format gives the same answers, and every mistake is refused in words."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from robustlab import wrap
from robustlab.core.errors import (
    ConfigError,
    DataFileError,
    DuplicateNameError,
    KindError,
    LabelError,
    MissingExtraError,
    ModelError,
    RangeError,
    ShapeError,
)
from robustlab.core.types import Batch
from robustlab.data import load_data, load_predictions

IDS = [f"case {i}" for i in range(8)]


def source(ids=IDS, classes=3, **options):
    count = len(ids)
    settings = {"labels": np.arange(count) % classes, "name": "cases"} | options
    return load_data(np.zeros((count, 4, 4), np.uint8), ids=ids, **settings)


def numbers(columns=3, seed=0):
    return np.random.default_rng(seed).normal(size=(len(IDS), columns)).astype(np.float32)


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def save(path, key, rows, ids=IDS, conditions=None):
    """Write answers in the format that the suffix names, by means that are not robustlab's."""
    conditions = conditions or ["clean"] * len(ids)
    if path.suffix == ".jsonl":
        plain = rows.tolist() if isinstance(rows, np.ndarray) else rows
        records = zip(ids, conditions, plain, strict=True)
        return write_lines(path, *({"id": i, "condition": c, key: row} for i, c, row in records))
    if path.suffix == ".npz":
        np.savez(path, ids=np.array(ids), conditions=np.array(conditions), **{key: np.array(rows)})
    else:
        pytest.importorskip("pyarrow")
        frame = pd.DataFrame({"id": ids, "condition": conditions})
        frame[key] = list(rows)
        frame.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".npz", ".parquet"])
@pytest.mark.parametrize("ids", [IDS, [7, -3, 2**62, 0, 1, 2, 3, 4]])
def test_logits_come_back_bit_for_bit_in_the_order_of_the_data(tmp_path, suffix, ids):
    x = numbers()
    saved = load_predictions(save(tmp_path / f"answers{suffix}", "logits", x, ids))
    order = np.random.default_rng(1).permutation(len(ids))
    data = source([ids[i] for i in order])
    assert torch.equal(saved.bind(data).answers("clean", data), torch.from_numpy(x[order]))
    assert saved.conditions == ("clean",)
    assert (saved.num_classes, saved.has_offset, saved.answers_only) == (3, True, False)
    assert saved.model_name == "answers"


def test_numbered_columns_mean_the_same_as_a_list_column(tmp_path):
    pytest.importorskip("pyarrow")
    x = numbers(11)
    frame = pd.DataFrame({"id": IDS} | {f"probs_{i}": x[:, i] for i in reversed(range(11))})
    frame = frame.rename(columns=lambda name: name.replace("probs", "logits"))
    frame.to_parquet(tmp_path / "a.parquet")
    saved = load_predictions(tmp_path / "a.parquet")
    assert torch.equal(saved.answers("clean", source()), torch.from_numpy(x))
    frame.drop(columns="logits_4").to_parquet(tmp_path / "gap.parquet")
    with pytest.raises(ShapeError, match="logits_3, logits_5"):
        load_predictions(tmp_path / "gap.parquet")


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("kind", ["logits", "log_probs", "probs"])
@pytest.mark.parametrize("columns", [1, 3])
def test_numbers_become_logits_as_those_of_a_wrapped_network_do(tmp_path, task, kind, columns):
    z = torch.from_numpy(numbers(columns)) * 4
    sigmoid = columns == 1 or task == "multilabel"
    raw = {"logits": z, "log_probs": F.logsigmoid(z) if sigmoid else F.log_softmax(z, 1)}
    raw["probs"] = raw["log_probs"].exp()
    raw["probs"][0] = torch.eye(columns)[0]
    raw["log_probs"][0] = raw["probs"][0].log()
    live = wrap(lambda images: raw[kind], task=task, output=kind)
    expected = live.predict(Batch(torch.zeros(8, 1, 4, 4), None, torch.arange(8))).logits
    data = source(task=task, labels=np.zeros((8, columns), int)) if task == "multilabel" else source(classes=2)
    path = tmp_path / "a.npz"
    np.savez(path, ids=np.array(IDS), **{kind: raw[kind].numpy()})
    saved = load_predictions(path).bind(data)
    assert saved.task == ("binary" if task == "multiclass" else task)
    assert saved.has_offset == live.has_offset
    assert torch.equal(saved.answers("clean", data), expected)


def test_a_single_number_a_line_is_one_sigmoid(tmp_path):
    saved = load_predictions(write_lines(tmp_path / "a.jsonl", {"id": "a", "probs": 0.75}, {"id": "b", "probs": [0.5]}))
    rows = saved.answers("clean", source(["a", "b"], classes=2))
    assert torch.allclose(rows.softmax(1), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))


def test_missing_and_broken_numbers_are_kept_as_such(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"id": 0, "logits": [1, NaN]}\n\n{"id": 1, "logits": null}\n'
        '{"id": 2, "logits": [Infinity, 0]}\n{"id": 3, "logits": [null, 2]}\n{"id": 4, "logits": [1, 2]}\n'
    )
    rows = load_predictions(path).answers("clean", source(range(5), classes=2))
    assert torch.isfinite(rows).all(1).tolist() == [False, False, False, False, True]
    assert rows[2].tolist() == [float("inf"), 0.0]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("clean", "clean"),
        ("", "clean"),
        (None, "clean"),
        ("gaussian-noise@3", "gaussian-noise@3"),
        ("gaussian-noise@3.0", "gaussian-noise@3"),
        ("gaussian-noise_s2.5", "gaussian-noise@2.5"),
        ("gaussian-noise_s3.npz", "gaussian-noise@3"),
        ("gaussian-noise_2_s3", "gaussian-noise#2@3"),
        ("gaussian-noise@0", "clean"),
        (" scanner b@1 ", "scanner b@1"),
        ("val", "val"),
        ("ood:near/site-b@2", "ood:near/site-b@2"),
    ],
)
def test_condition_names(tmp_path, text, name):
    saved = load_predictions(write_lines(tmp_path / "a.jsonl", {"id": 1, "condition": text, "label": 0}))
    assert saved.conditions == (name,)


def test_a_missing_condition_column_is_clean_and_one_text_holds_for_all(tmp_path):
    np.savez(tmp_path / "a.npz", id=np.arange(3), label=np.arange(3))
    np.savez(tmp_path / "b.npz", ids=np.arange(3), labels=np.arange(3), condition=np.array("blur_s4"))
    assert load_predictions(tmp_path / "a.npz").conditions == ("clean",)
    assert load_predictions(tmp_path / "b.npz").conditions == ("blur@4",)


def test_classes_as_indices_names_and_nothing(tmp_path):
    texts = [" Benign", "MALIGNANT ", "I cannot tell.", None, "", 1, 0.0, float("nan")]
    saved = load_predictions(save(tmp_path / "a.jsonl", "label", texts)).bind(
        data := source(classes=2, class_names=("benign", "malignant"))
    )
    nothing = [float("nan")] * 2
    expected = torch.tensor([[1.0, 0], [0, 1], nothing, nothing, nothing, [0, 1], [1, 0], nothing])
    assert saved.answers_only
    assert not saved.has_offset
    assert torch.equal(saved.answers("clean", data).nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_classes_in_arrays(tmp_path, suffix):
    data = source(classes=3)
    answers = np.arange(8) % 3
    given = load_predictions(save(tmp_path / f"a{suffix}", "label", answers)).bind(data)
    assert torch.equal(given.answers("clean", data).argmax(1), torch.from_numpy(answers))
    holes = answers.astype(float)
    holes[5] = np.nan
    rows = load_predictions(save(tmp_path / f"b{suffix}", "label", holes)).bind(data).answers("clean", data)
    assert torch.isnan(rows).all(1).tolist() == [i == 5 for i in range(8)]
    words = np.array(["a", "b", "c"])[answers]
    named = load_predictions(save(tmp_path / f"c{suffix}", "label", words), class_names=("A", "B", "C"))
    assert torch.equal(named.answers("clean", data), given.answers("clean", data))


def test_number_of_classes_comes_from_the_declaration_the_names_or_the_data(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *({"id": i, "label": 0} for i in IDS))
    with pytest.raises(ModelError, match="num_classes="):
        _ = load_predictions(path).num_classes
    assert load_predictions(path, num_classes=5).num_classes == 5
    assert load_predictions(path, class_names="abcd").num_classes == 4
    assert load_predictions(path).bind(source(classes=3)).num_classes == 3
    assert load_predictions(path).bind(source(class_names=tuple("abcde"))).num_classes == 5
    assert load_predictions(path).bind(source(labels=[0] * 8)).num_classes == 2


def test_output_picks_one_of_several_answers(tmp_path):
    np.savez(tmp_path / "a.npz", ids=np.arange(8), logits=numbers(), labels=np.arange(8))
    with pytest.raises(DataFileError, match=r"'logits' and 'label'.*output='logits'"):
        load_predictions(tmp_path / "a.npz")
    assert load_predictions(tmp_path / "a.npz", output="logits").num_classes == 3
    lines = [{"id": 0, "probs": [0.5, 0.5], "label": 1}, {"id": 1, "label": 0, "probs": [0.1, 0.9], "text": "yes"}]
    path = write_lines(tmp_path / "b.jsonl", *lines)
    assert load_predictions(path, output="label").kind == "label"
    with pytest.raises(DataFileError, match="answers under 'logits'"):
        load_predictions(path, output="logits")


def test_a_saved_model_cannot_run_and_says_what_it_is(tmp_path):
    saved = load_predictions(save(tmp_path / "vendor.jsonl", "logits", numbers()), name="vendor 2.1")
    batch = source().read([0])
    for call in (saved.outputs, saved.predict, lambda b: saved(b.images)):
        with pytest.raises(ModelError, match=r"cannot run on images.*write_corrupted"):
            call(batch)
    assert saved.modules() == ()
    assert saved.model_name == "vendor 2.1"
    assert saved.settings() == {
        "file": "vendor.jsonl",
        "answers": "logits",
        "task": "multiclass",
        "rows": 8,
        "conditions": 1,
    }
    assert saved.to("cpu") is saved
    assert saved.parameter_count() == 0


def test_the_fingerprint_is_that_of_the_answers(tmp_path):
    x = numbers()
    first = load_predictions(save(tmp_path / "a.jsonl", "logits", x)).fingerprint()
    assert load_predictions(save(tmp_path / "b.npz", "logits", x)).fingerprint() == first
    other = x.copy()
    other[3, 1] = np.nextafter(other[3, 1], np.float32(9))
    assert load_predictions(save(tmp_path / "c.npz", "logits", other)).fingerprint() != first
    blur = load_predictions(save(tmp_path / "d.npz", "logits", x, conditions=["blur@1"] * 8))
    assert blur.fingerprint() != first


BAD_LINES = [
    (DataFileError, r"line 2: expected one JSON object a line", ['{"id": 1, "label": 0}', "{id: 2}"]),
    (DataFileError, r"line 1: expected a JSON object, got list", ["[1, 2]"]),
    (DataFileError, r"line 2: expected a key 'id'", ['{"id": 1, "label": 0}', '{"label": 0}']),
    (DataFileError, r"line 1: expected one of 'logits'.*got none", ['{"id": 1, "answer": 0}']),
    (DataFileError, r"line 1: expected one of .*'probs' and 'label'", ['{"id": 1, "label": 0, "probs": [1, 0]}']),
    (
        DataFileError,
        r"line 4: expected an answer under 'label', as in the first row, got 'probs'",
        ['{"id": 1, "label": 0}', "", '{"id": 2, "label": 0}', '{"id": 3, "probs": [1, 0]}'],
    ),
    (DataFileError, "an empty file", [""]),
    (
        DuplicateNameError,
        r"line 3: expected one answer.*'blur@1' \(1 such rows in all\)",
        [
            '{"id": 1, "condition": "blur@1", "label": 0}',
            '{"id": 1, "label": 0}',
            '{"id": 1, "condition": "blur_s1", "label": 0}',
        ],
    ),
    (
        ShapeError,
        r"line 2: expected 2 numbers.*got 3",
        ['{"id": 1, "logits": [1, 0]}', '{"id": 2, "logits": [1, 0, 2]}'],
    ),
    (ShapeError, r"line 2: expected 2 numbers.*got 1", ['{"id": 1, "logits": [1, 0]}', '{"id": 2, "logits": 3}']),
    (ShapeError, r"one number a class", ['{"id": 1, "logits": []}']),
    (KindError, r"line 2: expected numbers", ['{"id": 1, "logits": [1, 0]}', '{"id": 2, "logits": [1, "2"]}']),
    (KindError, r"line 2: expected ids that are all.*got str", ['{"id": 1, "label": 0}', '{"id": "2", "label": 0}']),
    (KindError, r"line 1: expected ids that are all.*got bool", ['{"id": true, "label": 0}']),
    (LabelError, r"line 2: expected a class index.*got -1.*null", ['{"id": 1, "label": 0}', '{"id": 2, "label": -1}']),
    (LabelError, r"line 1: .*got 0\.5", ['{"id": 1, "label": 0.5}']),
    (LabelError, r"line 1: .*got bool|got True", ['{"id": 1, "label": true}']),
    (LabelError, r"line 1: .*got list", ['{"id": 1, "label": [0, 1]}']),
    (LabelError, r"line 1: ", ['{"id": 1, "label": Infinity}']),
    (
        ConfigError,
        r"line 2: expected a condition.*'noise'.*scanner-b@1",
        ['{"id": 1, "label": 0}', '{"id": 2, "label": 0, "condition": "noise"}'],
    ),
    (ConfigError, r"line 1: expected a condition as a text", ['{"id": 1, "label": 0, "condition": 3}']),
    (RangeError, r"line 1: expected severity from 0 to 5", ['{"id": 1, "label": 0, "condition": "blur@7"}']),
    (ModelError, r"probabilities in \[0, 1\], got values from -1 to 1.5", ['{"id": 1, "probs": [1.5, -1]}']),
    (ModelError, r"log-probabilities", ['{"id": 1, "log_probs": [0.5, -1]}']),
]


@pytest.mark.parametrize(("error", "text", "lines"), BAD_LINES)
def test_bad_lines(tmp_path, error, text, lines):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(error, match=text) as caught:
        load_predictions(path)
    assert all((caught.value.who, caught.value.expected, caught.value.got, caught.value.fix))
    assert "case" not in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(DataFileError, match="no such file"):
        load_predictions(tmp_path / "none.jsonl")
    for name, content in (("a.npz", b"nothing"), ("a.parquet", b"nothing"), ("a.jsonl", b'{"id": "\xff"}\n')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises((DataFileError, MissingExtraError)):
            load_predictions(tmp_path / name)
    (tmp_path / "a.csv").write_text("id,label\n")
    with pytest.raises(DataFileError, match=r"\.jsonl.*got \.csv"):
        load_predictions(tmp_path / "a.csv")
    np.savez(tmp_path / "b.npz", ids=np.array(["a", None], dtype=object), label=np.arange(2))
    with pytest.raises(DataFileError, match="without pickled objects"):
        load_predictions(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", logits=numbers())
    with pytest.raises(DataFileError, match="a column 'ids', got logits"):
        load_predictions(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", ids=np.arange(3), logits=numbers())
    with pytest.raises(ShapeError, match="3 rows of logits"):
        load_predictions(tmp_path / "d.npz")
    np.savez(tmp_path / "e.npz", ids=np.arange(0), labels=np.arange(0))
    with pytest.raises(DataFileError, match="an empty file"):
        load_predictions(tmp_path / "e.npz")
    np.savez(tmp_path / "f.npz", ids=np.array([1, 2, 1]), labels=np.arange(3))
    with pytest.raises(DuplicateNameError, match="row 3"):
        load_predictions(tmp_path / "f.npz")
    np.savez(tmp_path / "g.npz", ids=np.array([1.5, 2]), labels=np.arange(2))
    with pytest.raises(KindError, match=r"row 1.*float"):
        load_predictions(tmp_path / "g.npz")
    with pytest.raises(KindError, match="a path"):
        load_predictions({"id": 1})


def test_bad_arguments(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"id": "case 0", "label": 2}, {"id": "case 1", "label": 0})
    for options, text in (
        ({"task": "regression"}, "task among"),
        ({"output": "scores"}, "output among"),
        ({"class_names": ("a", "A")}, "differ in more than case"),
        ({"class_names": ("a", "b", "c"), "num_classes": 2}, "2 and 3 class_names"),
        ({"task": "multilabel"}, "probabilities or logits of every label"),
    ):
        with pytest.raises(ConfigError, match=text):
            load_predictions(path, **options)
    with pytest.raises(LabelError, match="from 0 to 1, got class 2"):
        load_predictions(path, num_classes=2)
    with pytest.raises(LabelError, match="from 0 to 1, got class 2"):
        load_predictions(path).bind(source(classes=2, class_names=("a", "b")))
    numeric = save(tmp_path / "b.npz", "logits", numbers())
    with pytest.raises(ShapeError, match="numbers for 4 classes, as num_classes says, got 3"):
        load_predictions(numeric, num_classes=4)
    with pytest.raises(ShapeError, match="as class_names says"):
        load_predictions(numeric, class_names="ab")


def test_texts_need_names_of_which_some_occur(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *({"id": i, "label": "yes"} for i in IDS))
    with pytest.raises(ConfigError, match="class_names, as answers are texts"):
        load_predictions(path).bind(source(classes=2))
    with pytest.raises(LabelError, match=r"ja, nein, got 1 different texts, none of them one"):
        load_predictions(path, class_names=("ja", "nein"))


def test_missing_samples_are_counted_without_naming_their_ids(tmp_path):
    saved = load_predictions(save(tmp_path / "a.jsonl", "logits", numbers()[:6], IDS[:6]))
    with pytest.raises(
        ConfigError, match=r"'clean' for all 8 samples of 'cases', got none for 2 of 8.*position 6"
    ) as e:
        saved.answers("clean", source())
    assert "case " not in str(e.value)
    with pytest.raises(ConfigError, match=r"expected answers under 'blur@1', got answers under 'clean'"):
        saved.answers("blur@1", source())
    assert saved.matches("clean", source(IDS[4:])) == (2, 4)
    digits = load_predictions(save(tmp_path / "b.jsonl", "logits", numbers(), [str(i) for i in range(8)]))
    with pytest.raises(ConfigError, match="texts of digits"):
        digits.answers("clean", source(range(8)))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match="pip install pyarrow"):
        load_predictions(tmp_path / "a.parquet")


def test_probabilities_that_do_not_sum_to_one_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": 0, "probs": [0.9, 0.1]}\n{"id": 1, "probs": [0.9, 0.9]}\n')
    with pytest.raises(ModelError, match="1 rows that do not"):
        load_predictions(path, task="multiclass")
    assert load_predictions(path, task="multilabel").num_classes == 2
