"""The ladder's driver: what a piece changes, and tables of whatever is complete."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ichpipe.common.artifacts import Artifacts
from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import ParamsError
from ichpipe.common.files import write_json
from ichpipe.params.schema import Params, load_params
from ichpipe.scoring.heldout_predictions import FINETUNED, LABELS, POOLED, write_predictions, write_table
from ichpipe.stages import cross_validate

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ladder():
    spec = importlib.util.spec_from_file_location("benchmark_ladder", ROOT / "benchmarks" / "ladder.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["ladder.yaml", "ladder-phantom.yaml", "ladder-small.yaml"])
def base(request):
    return load_params(ROOT / "params" / request.param, must_exist=True)


def test_every_piece_changes_its_section_and_nothing_else(ladder, base, tmp_path):
    plain = ladder.Run(ladder.BASE, 7, tmp_path).params(base).model_dump(by_alias=True)
    assert plain["fit-slices"]["seed"] == plain["finetune"]["seed"] == plain["sequence"]["bilstm"]["seed"] == 7
    for piece, (section, changes) in ladder.pieces_of(base).items():
        changed = ladder.Run(piece, 7, tmp_path).params(base).model_dump(by_alias=True)
        if section == "windows":
            assert [window["width_hu"] for window in changed[section]] == [80.0, 215.0, 2800.0]
        else:
            assert piece == ladder.ALONE or any(changed[section][key] != plain[section][key] for key in changes), piece
            for key in changed[section].keys() - changes.keys() - {"folds"}:
                assert changed[section][key] == plain[section][key], (piece, key)
        stage_one = {section, "fit-slices", "sequence", "finetune", "predict"}
        others = changed.keys() - ({section} if section == "finetune" else stage_one)
        assert all(changed[key] == plain[key] for key in others), piece
        for key in ("epochs", "batch_size", "learning_rate", "seed"):
            assert changed["fit-slices"][key] == plain["fit-slices"][key], (piece, key)


def predicted(probability, any_label):
    n = len(any_label)
    table = pd.DataFrame({name: np.full(n, probability) for name in CLASSES})
    table[LABELS] = 0.0
    table["label_any"] = any_label
    table["patient_id"] = [f"P{row % 4}" for row in range(n)]
    table["sop_uid"], table["split"] = [str(row) for row in range(n)], "test"
    table["series_uid"] = table["patient_id"]
    return table


def test_tables_hold_what_is_complete_with_intervals(ladder, base, tmp_path):
    truth = np.array([0.0, 1.0] * 8)
    for seed in (0, 1):
        folder = Artifacts(ladder.Run(ladder.BASE, seed, tmp_path).folder / "cv")
        for arm, probability in ((ladder.SLICE_CNN, 0.5), ("bilstm", 0.4)):
            write_predictions(predicted(probability, truth), folder.sequence(arm), POOLED)
            write_json(folder.sequence(arm) / "record.json", {"n_parameters": 3})
        write_table(predicted(0.3, truth), folder.predictions / f"{FINETUNED}.parquet")
    found = ladder.tables(base, tmp_path, [0, 1, 2])
    assert [row["arm"] for row in found["ladder"]["own"]] == [ladder.SLICE_CNN, "bilstm", FINETUNED]
    first = found["ladder"]["own"][0]
    assert first["seeds"] == 2
    assert first["weighted_log_loss"] == pytest.approx([math.log(2)] * 3)
    assert first["auc_any"] == pytest.approx([0.5] * 3)
    gain = found["ladder"]["arms"][1]["gain"]["weighted_log_loss"]["value"]
    by_hand = 2 / 7 * 0.5 * (math.log(0.4) + math.log(0.6)) + 5 / 7 * math.log(0.6) + math.log(2)
    assert gain == pytest.approx(by_hand)
    assert [row["arm"] for row in found["end to end"]["own"]] == [FINETUNED]
    assert "| slice-cnn | 2 | 0.6931 [0.6931, 0.6931] | 0.5000" in ladder.as_text(found)


def test_an_arm_of_several_seeds_counts_as_its_model(ladder, base, tmp_path):
    truth, run = np.array([0.0, 1.0] * 8), ladder.Run(ladder.BASE, 3, tmp_path)
    parts = [predicted(probability, truth).assign(seed=seed) for seed, probability in ((3, 0.2), (4, 0.4))]
    write_predictions(pd.concat(parts, ignore_index=True), run.pooled.sequence("bilstm"), POOLED)
    for average, expected in ((True, 0.3), (False, 0.2)):
        table = run.arm("bilstm", average_seeds=average)
        assert len(table) == len(truth)
        assert table["any"].tolist() == pytest.approx([expected] * len(truth))
        assert set(table["seed"]) == {3}


def test_a_piece_that_is_not_complete_has_no_scores_of_the_ladder_itself(ladder, base, tmp_path, monkeypatch):
    origin = Artifacts(ladder.Run(ladder.BASE, 0, tmp_path).folder / "cv")
    write_predictions(predicted(0.4, np.array([0.0, 1.0] * 8)), origin.sequence("bilstm"), POOLED)
    write_table(predicted(0.3, np.array([0.0, 1.0] * 8)), origin.predictions / f"{FINETUNED}.parquet")
    piece = next(name for name, (section, _) in ladder.pieces_of(base).items() if section == "finetune")

    def stopped(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ladder.cross_validate, "run", stopped)
    run = ladder.Run(piece, 0, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.train(base)
    assert run.arm("bilstm") is not None
    assert run.arm(FINETUNED) is None


def test_a_fold_that_is_not_there_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ParamsError, match=r"prepare\.folds is 5: there is no fold 9"):
        cross_validate.run(Params(), Artifacts(tmp_path), only_folds=[0, 9])
    assert not list(tmp_path.iterdir())


def test_a_blend_is_chosen_on_the_other_folds(ladder):
    table = pd.concat([predicted(0.5, np.array([0.0, 1.0] * 8)) for _ in range(30)], ignore_index=True)
    table["patient_id"] = [f"P{row // 16}" for row in range(len(table))]
    fold = np.arange(len(table)) // 16 % 2
    for name in CLASSES:  # the slice CNN is right about fold 0 and wrong about fold 1
        table[f"slice_{name}"] = np.where(fold == 0, np.abs(table[f"label_{name}"] - 0.1), 0.5)
        table.loc[fold == 1, f"slice_{name}"] = np.abs(table[f"label_{name}"] - 0.9)[fold == 1]
    blended = ladder.blend(table, fold)
    assert (blended.loc[fold == 0, "any"] == 0.5).all()  # by the weights of fold 1, where the model alone was better
    assert (blended.loc[fold == 1, "any"] != 0.5).all()
    assert (blended["epidural"] == 0.5).all()  # no positive slice: no weight
