import re

import nibabel as nib
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

import anodiff
from anodiff import AnoDDPMPipeline
from anodiff.hub.model_card import PROTOCOL_FIELDS, add_evaluation, describe_curve, make_card
from anodiff.hub.publishing import complete_folder

from ..hub_server import check_card
from ..tiny import make_pipeline


def tiny_pipeline(modalities=("flair",), brain_mask="nonzero", **inference):
    settings = {"noise_level": 2, **inference}
    return make_pipeline("AnoDDPMPipeline", modalities, processor_settings={"brain_mask": brain_mask}, **settings)


def evaluation():
    """What eval.py writes."""
    metrics = {"voxel_average_precision": 0.61, "dice_validation": None, "slice_auroc": 0.87, "threshold_oracle": 0.25}
    metrics |= {"voxel_average_precision_low": 0.5649, "voxel_average_precision_high": 0.66}
    metrics |= {"slice_auroc_low": None, "slice_auroc_high": None}
    return {
        "anodiff": "0.1.0",
        "data": {"name": "lab/lesions", "split": "test", "subjects": 12, "slices": 340, "anomalous_slices": 77},
        "protocol": {field: f"text of {field}" for field in PROTOCOL_FIELDS},
        "intervals": "95 % of some sort",
        "results": [
            {
                "name": "AnoDDPM",
                "kind": "pipeline",
                "model": "outputs/pipeline",
                "settings": {"noise_level": 2, "mode": "one_shot"},
                "metrics": metrics,
                "seconds_per_slice": 0.25,
            },
            {"name": "intensity of flair", "kind": "baseline", "metrics": {"voxel_average_precision": 0.66}},
        ],
        "device": "a CPU",
        "versions": {"torch": "2.13.0"},
        "seed": 0,
    }


def section(card, title):
    parts = re.split(r"^## ", str(card), flags=re.MULTILINE)
    return next(part for part in parts if part.startswith(f"{title}\n"))


def test_metadata():
    card = make_card(tiny_pipeline(), repo_id="owner/anoddpm-flair", licence="cc-by-nc-sa-4.0")
    assert card.data.to_dict() == {
        "anodiff_version": anodiff.__version__,
        "library_name": "diffusers",
        "license": "cc-by-nc-sa-4.0",
        "model_name": "anoddpm-flair",
        "pipeline_tag": "image-segmentation",
        "tags": ["anodiff", "anomaly-detection", "medical-imaging", "diffusion", "brain-mri", "flair"],
    }
    assert check_card(str(card), "model") == ([], [])
    assert "brain-mri" not in make_card(tiny_pipeline(("ct",))).data.tags


def test_text():
    config = {"method": "anoddpm", "optim": {"learning_rate": 1e-4}}
    recipe = {"source": "a study", "license": "cc-by-4.0", "processor": {"size": [8, 8]}, "slices": {"rule": "a|b"}}
    counts = {"train": {"subjects": 20, "slices": 900}, "test": {"subjects": 5, "slices": 200, "anomalous_slices": 31}}
    card = make_card(
        tiny_pipeline(threshold=0.5),
        config=config,
        recipe=recipe,
        population="all slices of the training subjects (a study)",
        data_summary=counts,
        training="Trained to step 300 in 7 minutes.",
        picture=("example.png", "Slices of the phantom"),
    )
    text = str(card)
    assert "denoise it with a network that knows healthy anatomy only" in " ".join(text.split())
    assert "Training needs healthy images only, no masks." in text
    assert "not a medical device" in text
    data = section(card, "Training data")
    assert "| split | subjects | slices | anomalous slices |\n| --- | --- | --- | --- |\n" in data
    assert "| train | 20 | 900 | - |\n| test | 5 | 200 | 31 |\n" in data
    assert '- source: a study\n- license: cc-by-4.0\n- slices: {"rule": "a\\|b"}\n' in data
    assert "| `size` | [16, 16] |" in data
    assert "Population: all slices of the training subjects (a study)." in data
    assert "| `noise_level` | 2 |" in section(card, "Inference defaults")
    assert "![Slices of the phantom](example.png)" in section(card, "Example")
    assert "Trained to step 300 in 7 minutes." in section(card, "Configuration and versions")
    assert "Not evaluated." in section(card, "Evaluation")
    assert "Training data: cc-by-4.0;" in section(card, "Licence")
    assert "CVPRW 2022" in section(card, "Citation")
    block = re.search(r"```yaml\n(.*?)```", section(card, "Configuration and versions"), re.DOTALL)
    assert yaml.safe_load(block.group(1)) == config
    assert not re.search(r"\{\{|\{%|\bNone\b|\bUndefined\b", text)


def test_a_card_without_anything_known_says_so():
    card = make_card(tiny_pipeline())
    assert section(card, "Training data").startswith("Training data\n\nNot recorded.\n\n")
    assert section(card, "Evaluation") == "Evaluation\n\nNot evaluated.\n\n<!-- end of evaluations -->\n\n"
    assert "## Example" not in str(card)
    assert "not recorded; it may restrict" in section(card, "Licence")


@pytest.mark.parametrize(
    ("modalities", "brain_mask", "repo_id", "names"),
    [
        (("image",), "nonzero", "owner/name", ["scan"]),
        (("flair",), "nonzero", None, ["scan_flair"]),
        (("t1", "flair"), "nonzero", "owner/name", ["scan_t1", "scan_flair"]),
        (("flair",), "given", "owner/name", ["scan_flair", "scan_brain"]),
    ],
)
def test_quick_start_runs_as_printed(modalities, brain_mask, repo_id, names, tmp_path, monkeypatch):
    pipeline = tiny_pipeline(modalities, brain_mask, threshold=0.01)
    pipeline.save_pretrained(tmp_path / (repo_id or "."))
    values = np.random.default_rng(0).uniform(1, 2, (10, 9, 3)).astype(np.float32)
    for name in names:
        nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1, 1, 1])), tmp_path / f"{name}.nii.gz")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", str(make_card(pipeline, repo_id=repo_id)), re.DOTALL).group(1)
    exec(code, {})
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["anomaly_map.nii.gz", "pred_mask.nii.gz", "reconstruction.nii.gz", "result.json"]
    assert nib.load(tmp_path / "out" / "anomaly_map.nii.gz").shape == (10, 9, 3)


def test_evaluation_stands_in_table_and_metadata():
    report = evaluation()
    card = make_card(tiny_pipeline(), repo_id="owner/name", evaluation=report)
    text = section(card, "Evaluation")
    assert "12 subjects, 340 slices, 77 of them anomalous. Seed 0, anodiff 0.1.0, torch 2.13.0." in text
    assert "Not evaluated" not in text
    assert "| metric | AnoDDPM | intensity of flair (baseline) |" in text
    assert "| voxel average precision | 0.610 (0.56 to 0.66) | 0.660 |" in text
    assert "| slice auroc | 0.870 | - |" in text and "auroc low" not in text
    assert "Intervals in brackets: 95 % of some sort.\n\nThese numbers" in text
    assert "| dice validation | - | - |" in text
    assert "| threshold oracle | 0.250 | - |" in text
    assert "| seconds per slice | 0.250 | - |" in text
    for field in PROTOCOL_FIELDS:
        assert f"| {field.replace('_', ' ')} | text of {field} |" in text
    assert "Inference takes 0.25 s per slice on a CPU." in text
    assert "With `noise_level` 2, `mode` one_shot." in text

    # Only what this pipeline reached, only metrics, and each with its protocol.
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {metric: result.metric_value for metric, result in results.items()} == {
        "voxel_average_precision": 0.61,
        "slice_auroc": 0.87,
    }
    assert results["slice_auroc"].dataset_args == report["protocol"]
    assert (results["slice_auroc"].dataset_type, results["slice_auroc"].dataset_split) == ("lab/lesions", "test")
    assert check_card(str(card), "model") == ([], [])
    assert ModelCard(str(card)).data.eval_results == card.data.eval_results


def test_a_long_history_of_the_validation_is_a_short_table():
    curve = [{"step": 10 * (1 + number), "validation_loss": 0.5 + 0.001 * abs(number - 63)} for number in range(100)]
    text = describe_curve(curve)
    assert "lowest at step 640, 0.500." in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[4:]]
    assert len(rows) == 12 and rows[0] == ["10", "0.563"] and rows[-1] == ["1000", "0.536"]
    assert ["640", "0.500"] in rows and [int(step) for step, _ in rows] == sorted(int(step) for step, _ in rows)
    assert describe_curve(curve[:1]).splitlines()[4:] == ["| 10 | 0.563 |"]


def test_the_row_of_this_pipeline_among_several():
    report = evaluation()
    report["results"].append({**report["results"][0], "model": "owner/name", "metrics": {"slice_auroc": 0.5}})
    card = make_card(tiny_pipeline(), repo_id="owner/name", evaluation=report)
    assert [result.metric_value for result in card.data.eval_results] == [0.5]
    with pytest.raises(ValueError, match="it holds outputs/pipeline, owner/name"):
        make_card(tiny_pipeline(), repo_id="owner/other", evaluation=report)


def test_a_card_has_few_of_the_metrics_of_lesions_and_surfaces():
    report, kept = (
        evaluation(),
        ("lesion_recall_validation", "false_positives_healthy", "froc_score", "hausdorff_95_validation"),
    )
    left = ("surface_dice_validation", "hausdorff_95_yen", "froc_recall_0.125", "hausdorff_95_undefined_validation")
    report["results"][0]["metrics"] = dict.fromkeys((*kept, *left, "lesion_recall_oracle"), 0.5)
    card = make_card(tiny_pipeline(), evaluation=report)
    assert {result.metric_type for result in card.data.eval_results} == set(kept)
    assert "| froc score | 0.500 |" in card.text
    assert not [name for name in left if name.replace("_", " ") in card.text]


def results_of(card):
    return {(r.dataset_name, r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}


def test_evaluations_are_added_and_replaced_and_nothing_else_changes():
    by_hand = str(make_card(tiny_pipeline(), repo_id="owner/name")).replace(
        "## Citation", "## Thanks\n\nTo all.\n\n## Citation"
    )
    first = add_evaluation(ModelCard(by_hand), evaluation(), repo_id="owner/name", picture="cases.png")
    assert "](cases.png)" in section(first, "Evaluation") and "To all." in str(first)
    assert str(first).count("text of geometry") == 2  # in the metadata and in the table
    assert results_of(first) == {
        ("lab/lesions", "test", "voxel_average_precision"): 0.61,
        ("lab/lesions", "test", "slice_auroc"): 0.87,
    }

    other = evaluation()
    other["data"]["name"] = "lab/strokes"
    second = add_evaluation(ModelCard(str(first)), other)
    again = evaluation()
    again["results"][0]["metrics"] = {"slice_auroc": 0.9}
    third = add_evaluation(ModelCard(str(second)), again)
    assert results_of(third) == {
        ("lab/lesions", "test", "slice_auroc"): 0.9,
        ("lab/strokes", "test", "voxel_average_precision"): 0.61,
        ("lab/strokes", "test", "slice_auroc"): 0.87,
    }
    text = section(third, "Evaluation")
    assert text.index("### lab/lesions, split `test`") < text.index("### lab/strokes, split `test`")
    assert text.count("### ") == 2 and "0.870" in text and "0.900" in text
    assert str(third).replace(text, "") == str(second).replace(section(second, "Evaluation"), "").replace(
        second.data.to_yaml(), third.data.to_yaml()
    )
    assert check_card(str(third), "model") == ([], [])


def test_an_evaluation_in_a_card_that_somebody_else_wrote():
    card = add_evaluation(ModelCard("---\nlicense: mit\n---\n# Mine\n\nWords.\n"), evaluation(), repo_id="owner/name")
    assert "# Mine\n\nWords.\n\n## Evaluation\n\n<!-- evaluation of" in str(card)
    assert card.data.license == "mit" and card.data.model_name == "name" and len(card.data.eval_results) == 2
    assert check_card(str(card), "model") == ([], [])


def test_a_card_learns_its_address():
    card = add_evaluation(make_card(tiny_pipeline()), evaluation(), repo_id="owner/name")
    assert card.data.model_name == "name" and 'from_pretrained("owner/name")' in section(card, "Quick start")


def test_a_pipeline_without_paper_is_refused():
    class Undocumented(AnoDDPMPipeline):
        """Nothing."""

    pipeline = tiny_pipeline()
    pipeline.__class__ = Undocumented
    with pytest.raises(ValueError, match="Undocumented needs a paragraph that begins with `Paper:`"):
        make_card(pipeline)


def test_an_evaluation_without_protocol_is_refused():
    report = evaluation()
    del report["protocol"]["geometry"]
    with pytest.raises(ValueError, match="lacks the protocol field.* geometry"):
        make_card(tiny_pipeline(), evaluation=report)


def test_the_hub_accepts_the_card_and_gives_it_back(hub, hub_client, tmp_path):
    pipeline = tiny_pipeline()
    card = make_card(pipeline, repo_id="owner/name", config={"text": "ä | ö"}, evaluation=evaluation())
    pipeline.save_pretrained(tmp_path / "folder")
    complete_folder(tmp_path / "folder", str(card))
    script = """
import json, sys
from huggingface_hub import ModelCard, create_repo

card = ModelCard.load(sys.argv[1])
card.validate()
create_repo("owner/name")
card.push_to_hub("owner/name")
pulled = ModelCard.load("owner/name")
print(json.dumps([str(pulled) == open(sys.argv[1], encoding="utf-8").read(), pulled.data.eval_results == card.data.eval_results]))
"""
    assert hub_client(script, tmp_path / "folder" / "README.md") == [True, True]
    assert hub.requests.count("POST /api/validate-yaml") >= 2
    broken = make_card(pipeline, licence="all mine")
    assert any("license" in error for error in check_card(str(broken), "model")[0])


def test_an_ensemble_of_segmentations_is_no_anomaly_map():
    for modality, where in (("image", "in pictures, 16 x 16"), ("ct", "in axial slices of ct, 16 x 16")):
        card = make_card(make_pipeline("CIMDPipeline", (modality,)), repo_id="owner/cimd")
        detects = section(card, "What it detects")
        assert f"What the annotators of its training data marked, {where} pixels: several" in detects
        assert "not confidence of a diagnosis" in detects
        assert "the mask of every member" in section(card, "Quick start")
        assert "segmentation whose annotators disagree" in section(card, "Intended use and limits")
        assert "segmentation" in card.data.tags and "anomaly-detection" not in card.data.tags
        assert "anomaly map" not in str(card) and "pseudo-healthy" not in str(card)
        assert check_card(str(card), "model") == ([], [])
    report = {**evaluation(), "task": "Ambiguous segmentation"}
    text = section(add_evaluation(card, report, repo_id="owner/cimd", picture="cases.png"), "Evaluation")
    assert "77 of them marked by an annotator." in text and "![Best to worst case: image, annotations, samples" in text
