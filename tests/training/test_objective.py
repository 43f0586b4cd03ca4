"""The contract of training objectives: what is wrong in a configuration is found before any data is made or read."""

import importlib
import inspect

import pytest

from anodiff.train import OBJECTIVES
from anodiff.train import main as train
from anodiff.training.loop import fit
from anodiff.training.objective import Objective
from anodiff.training.options import DataOptions, LoopOptions, TrainOptions


def objective_class(method: str) -> type[Objective]:
    module, name = OBJECTIVES[method]
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("method", OBJECTIVES)
def test_a_typo_in_any_block_is_found_without_data(method, tmp_path):
    data, loop = DataOptions(path=str(tmp_path / "nothing")), LoopOptions(output_dir=str(tmp_path / "run"))
    cls = objective_class(method)
    for block in ("unet", "scheduler", "inference", "objective", "processor"):
        # A component is no setting, either.
        for key in ("typo", "unet"):
            options = TrainOptions(method=method, data=data, train=loop, **{block: {key: 1}})
            with pytest.raises(ValueError, match=f"^`{block}` has no key {key}; .* takes "):
                fit(options, cls)
    wrong = [({"unet": {"_class_name": "Typo"}}, r"`unet._class_name` must be one of .*, got 'Typo'")]
    if method == "autoddpm":
        wrong.append(
            ({"objective": {"modality_dropout": 0.2}}, "`objective.modality_dropout` must be 0 for the method")
        )
    if not cls.unet_classes:
        wrong = [({"unet": {"_class_name": "Typo"}}, "`unet` has no key _class_name")]
    if "encoder" in cls.objective_keys:
        wrong.append(({"objective": {"encoder": {"typo": 1}}}, "`objective.encoder` has no key typo; resnet takes"))
        wrong.append(
            ({"objective": {"encoder": {"model_type": "typo"}}}, "`objective.encoder.model_type` must be one")
        )
    for path in {"classifier_path", "reconstruction_path"} & set(cls.objective_keys):
        wrong.append(({}, f"`objective.{path}` must be the folder or Hub id of a trained"))
    pipeline_class = cls.pipeline_class
    if pipeline_class is None or not pipeline_class.sees_neighbours:
        wrong.append(
            ({"processor": {"context": 1}}, f"`processor.context` must be 0 for the method {method}, .*got 1")
        )
    for blocks, message in wrong:
        with pytest.raises(ValueError, match=message):
            fit(TrainOptions(method=method, data=data, train=loop, **blocks), cls)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("method", OBJECTIVES)
def test_keys_of_the_objective_are_what_its_constructor_takes(method):
    cls = objective_class(method)
    settings = {
        parameter.name
        for base in cls.__mro__[:-1]
        for parameter in inspect.signature(base.__init__).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    parts = {"reconstruction_path", "encoder", "encoder_path"}
    parts |= {"mask_ratio", "mask_grid", "decoder_width"}  # of SparK's model
    assert settings == set(cls.objective_keys) - parts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unet.layers", "2"], "`unet` has no key layers; UNet2DModel takes sample_size"),
        (["--data.streaming", "true", "--processor.context", "1"], "`data.streaming` does not bring together"),
        (["--train.max_steps", "0"], "`train.max_steps` must be an integer of at least 1, got 0"),
        (["--train.seed", "-1"], "`train.seed` must be an integer between 0"),
        (["--data.augmentation.blur", "2"], "`data.augmentation.blur` must be a finite number .*, got 2"),
        (["--optim.lr_scheduler", "zigzag"], "`optim.lr_scheduler` must be one of"),
        (["--train.resume", "latest"], "holds no checkpoint"),
        (["--method", "magic"], "`method` must be one of anoddpm"),
    ],
)
def test_no_phantom_is_made_for_a_run_that_cannot_be(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr("anodiff.training.samples.load_prepared", lambda *args, **kwargs: pytest.fail("data was made"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(["--train.output_dir", str(tmp_path / "run"), *arguments])
    assert not (tmp_path / "run").exists()
