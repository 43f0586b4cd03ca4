"""SADM's inference and training steps against recorded arrays, with a toy denoiser, a toy encoder and the weights of the segmentation
network's recording.

Left out: `tr_syn_x`, the clean slice, which only the drawing of anomalies sees.
"""

import torch
from torch.testing import assert_close

from anodiff import SADMPipeline, SiameseUNet2DModel
from anodiff.training.objective_sadm import LabelledSADMObjective, SADMObjective

from .recordings import load, over
from .test_sadm_cddpm import ToyEncoder, ToyUNet, as_slices, make_processor, make_scheduler, timesteps_of


def make_pipeline(arrays, **settings) -> SADMPipeline:
    golden = load("sadm/segunet.npz")
    model = SiameseUNet2DModel(1, [2 ** (int(golden["wf"]) + level) for level in range(int(golden["depth"]))]).eval()
    state = {name[2:]: values.float() for name, values in golden.items() if name.startswith("w/")}
    model.load_state_dict(model.convert_original_state_dict(state))
    encoder = ToyEncoder(arrays["enc_M"])
    unet = ToyUNet(condition_dim=encoder.config.num_labels).fill(arrays)
    scheduler = make_scheduler(int(arrays["toy_T"]))
    pipe = SADMPipeline(unet, model, scheduler, make_processor(), encoder, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_objective(kind, arrays):
    timesteps = timesteps_of(arrays["step_ensemble"])
    pipe = make_pipeline(arrays, timesteps=timesteps)
    return kind(pipe.segmentation_network, pipe, {"timesteps": timesteps})


class FromRecording:
    """Timesteps and noise of the recording instead of draws."""

    def _draw(self, batch, generators):
        images, masks = self.anomalies(batch, batch["image"], generators)
        return images, masks, batch["timesteps"], batch["noise"]


@over("sadm/sadm_steps*.npz")
def test_inference(path):
    arrays = load(path)
    slices, noise = as_slices(arrays["vol"]), arrays["noise_ens"]
    pipe = make_pipeline(arrays, timesteps=timesteps_of(arrays["step_ensemble"]))
    for batch_size in (4, 16):
        results = pipe.compute_maps(
            slices, list(range(len(slices))), seed=0, batch_size=batch_size, noise=noise, **pipe.default_settings()
        )
        assert_close(results.reconstruction, as_slices(arrays["reco_volume"]), rtol=0, atol=1e-5)
        assert_close(results.added, as_slices(arrays["cam_volume"])[:, 0], rtol=0, atol=1e-5)
    plain = pipe(slices, noise=noise).anomaly_map
    weighted = [pipe(slices, noise=noise, residual_weight=weight).anomaly_map for weight in (0.0, 1.0)]
    assert_close(weighted[0], results.added, rtol=0, atol=1e-6)
    assert_close(weighted[0] + weighted[1], plain, rtol=0, atol=1e-6)


@over("sadm/sadm_steps*.npz")
def test_training_with_synthetic_anomalies(path):
    arrays = load(path)

    class Objective(FromRecording, SADMObjective):
        def anomalies(self, batch, images, generators):
            return arrays["tr_syn_xano"], arrays["tr_syn_mask"]

    objective = make_objective(Objective, arrays)
    batch = {"image": arrays["tr_syn_x"], "timesteps": arrays["tr_syn_t"], "noise": arrays["tr_syn_noise"]}
    loss = objective.loss(objective.model.train(), batch, [])
    assert loss.shape == (len(batch["image"]),)
    assert_close(loss.mean(), arrays["tr_syn_loss"], rtol=0, atol=1e-5)


@over("sadm/sadm_steps*.npz")
def test_training_with_masks(path):
    arrays = load(path)

    class Objective(FromRecording, LabelledSADMObjective):
        pass

    chosen = arrays["tr_lab_slice"].tolist()
    batch = {
        "image": torch.stack([arrays["tr_lab_vol"][row, ..., number] for row, number in enumerate(chosen)]),
        "mask": torch.stack([arrays["tr_lab_seg"][row, ..., number] > 0 for row, number in enumerate(chosen)]),
        "annotations": torch.ones(len(chosen), dtype=torch.long),
        "timesteps": arrays["tr_lab_t"],
        "noise": arrays["tr_lab_noise"],
    }
    batch["label"] = batch["mask"].flatten(1).any(1).long()
    objective = make_objective(Objective, arrays)
    noised = objective.reconstruction.scheduler.add_noise(2 * batch["image"] - 1, batch["noise"], batch["timesteps"])
    assert_close(noised, arrays["tr_lab_xt"], rtol=0, atol=1e-5)
    assert_close(objective.loss(objective.model, batch, []).mean(), arrays["tr_lab_loss"], rtol=0, atol=1e-5)
