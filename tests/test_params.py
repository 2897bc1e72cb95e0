"""Parameters: every wrong key or value is one message that names it."""

from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from ichpipe.common.errors import MissingFileError, ParamsError
from ichpipe.params.schema import PAPER_WINDOWS, Params, load_params

ROOT = Path(__file__).parents[1]


def load(tmp_path, text, *overrides):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return load_params(path, overrides)


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted((ROOT / "params").glob("*.yaml"))], ids=lambda p: p.name
)
def test_every_set_of_numbers_in_the_project_is_valid(path):
    params = load_params(path)
    if path.stem.endswith("small"):  # public slices are clipped to the brain window
        assert all(0 <= window.level_hu - window.width_hu / 2 <= 80 - window.width_hu for window in params.windows)
    else:
        assert params.windows == PAPER_WINDOWS


def test_no_file_means_the_defaults_unless_one_was_named(tmp_path):
    assert load_params(tmp_path / "none.yaml") == Params()
    with pytest.raises(MissingFileError, match=r"none\.yaml.*--params"):
        load_params(tmp_path / "none.yaml", must_exist=True)


def test_an_override_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    text = "fit-slices: {epochs: 3, batch_size: 7}"
    params = load(tmp_path, text, "fit-slices.epochs=5", "sequence.new.hidden=9", "finetune.arm=new")
    assert (params.fit_slices.epochs, params.fit_slices.batch_size) == (5, 7)
    assert params.fit_slices.seed == Params().fit_slices.seed
    assert params.sequence["new"].hidden == 9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fit-slices: {epoch: 3}", ["fit-slices.epoch", "did you mean epochs?"]),
        ("fit_slice: {epochs: 3}", ["fit_slice", "unknown key"]),
        ("fit-slices: {epochs: three}", ["fit-slices.epochs"]),
        ("fit-slices: {epochs: 0}", ["fit-slices.epochs", "greater than 0"]),
        ("fit-slices: {epochs: 1.5}", ["fit-slices.epochs"]),
        ("prepare: {dataset: kaggle}", ["prepare.dataset", "rsna"]),
        ("prepare: {val_fraction: 0.6, test_fraction: 0.5}", ["prepare", "below 1"]),
        ("prepare: {folds: 3, test_fold: 3}", ["prepare", "below folds"]),
        ("windows: [{level_hu: 40, width_hu: 0}]", ["windows.0.width_hu"]),
        ("windows: []", ["windows"]),
        ("sequence: {paper: {cell: rnn}}", ["sequence.paper.cell", "lstm"]),
        ("sequence: {paper: {inputs: [pixels]}}", ["sequence.paper.inputs"]),
        ("sequence: {paper: {kernel: 4}}", ["sequence.paper", "odd", "4"]),
        ("sequence: {paper: {residual: true, layers: 3}}", ["sequence.paper", "two layers"]),
        ("sequence: {paper: {cell: transformer, hidden: 30}}", ["sequence.paper", "heads (8)"]),
        ("sequence: {paper: {cell: average}}", ["sequence.paper", "[logits]"]),
        ("sequence: {paper: {regularize: {crop_slice: 3}}}", ["regularize.crop_slice", "did you mean crop_slices?"]),
        ("evaluate: {baseline: papr}", ["papr", "paper"]),
        ("finetune: {arm: papr}", ["papr", "paper"]),
        ("prepare: [1, 2]", ["prepare"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, words):
    base = "" if "sequence" in text else "sequence: {paper: {}}\n"
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, base + text)
    message = str(caught.value)
    assert "params.yaml" in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("text", ["a: [1", "just text", "- a\n- b", "\x00"])
def test_what_is_no_table_of_sections_is_refused_with_the_file(tmp_path, text):
    with pytest.raises(ParamsError, match=r"params\.yaml"):
        load(tmp_path, text)


@pytest.mark.parametrize("override", ["epochs=3", "fit-slices.epochs", "=3", "fit-slices.=3", "fit-slices.epochs=[1"])
def test_a_malformed_override_is_quoted(tmp_path, override):
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, "", override)
    assert repr(override) in str(caught.value)


@given(st.floats(1e-12, 1e12, allow_nan=False))
def test_numbers_are_read_in_whatever_way_they_are_written(value):
    for text in (repr(value), f"{value:.0e}", f"{value:e}"):
        params = load_params(Path("none.yaml"), (f"fit-slices.learning_rate={text}",))
        assert params.fit_slices.learning_rate == float(text)


MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], z{n}: 1}}\n" for n in range(1, 12)
)


# PyYAML 6.0.4 merges a key that comes several times once, so the text is no bomb there, only an unknown key.
KEPT_ONCE = Version(version("pyyaml")) >= Version("6.0.4")
MANY = "\n".join(f"{name}: &{name} {{{', '.join(f'{name}{n}: 1' for n in range(6000))}}}" for name in "ab")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (MERGES, "'a0'" if KEPT_ONCE else "keys merged"),
        (MANY + "\nc: {<<: [*a, *b]}", "more than 10000 keys merged"),
        ("[" * 5000, "nested too deeply"),
        ("a: 1\n" * 300_000, "longer than"),
        ("fit-slices: {epochs: 3}\nfit-slices: {epochs: 4}", "'fit-slices' stands twice"),
        ("fit-slices: {epochs: 3, epochs: 4}", "'epochs' stands twice"),
        ("fit-slices: {epochs: 2020-13-45}", "a value can't be read"),
        (f"fit-slices: {{epochs: {'9' * 6000}}}", "a value can't be read"),
        ("a: !!int ''", "a value can't be read"),
        ("a: !!python/object/apply:os.system ['id']", "could not determine a constructor"),
        ("fit-slices: {learning_rate: .inf}", "fit-slices.learning_rate"),
    ],
)
def test_bombs_and_keys_written_twice_are_one_error(tmp_path, text, complaint):
    with pytest.raises(ParamsError, match=complaint) as caught:
        load(tmp_path, text)
    assert "params.yaml" in str(caught.value)


def test_anchors_and_merges_of_a_usual_size_are_read(tmp_path):
    text = "sequence:\n  paper: &p {hidden: 4, layers: 1}\n  b: {<<: *p, hidden: 5}\n  c: {<<: *p, hidden: 6}\n"
    arms = load(tmp_path, text).sequence
    assert [(arm.hidden, arm.layers) for arm in arms.values()] == [(4, 1), (5, 1), (6, 1)]
