"""SADM's segmentation network and synthetic anomalies against recorded arrays.

Left out: `perlin_before_rot` and `aug_names`. The rotation and the augmenters of the recording are draws of imgaug, so that only their
distribution is compared.
"""

import scipy.stats
import torch
import torch.nn.functional as F

from anodiff import SiameseUNet2DModel
from anodiff.models.unet_2d_dae import StandardizedConvBlock
from anodiff.schedulers.draws import make_keys
from anodiff.training import synthetic_anomalies
from anodiff.training.objective_sadm import segmentation_loss
from anodiff.training.synthetic_anomalies import blend, draw_anomalies, next_power_of_two, perlin_noise, texture

from .recordings import load, recordings


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def network(golden, **options):
    widths = [2 ** (int(golden["wf"]) + level) for level in range(int(golden["depth"]))]
    model = SiameseUNet2DModel(golden["x_in"].shape[1], widths, **options).eval()
    state = {name[2:]: values.float() for name, values in golden.items() if name.startswith("w/")}
    model.load_state_dict(model.convert_original_state_dict(state))
    return model


@torch.no_grad()
def test_network():
    for golden in map(load, recordings("sadm/segunet*.npz")):
        image, reconstruction = golden["x_in"], golden["reco"]
        model = network(golden, deep_supervision=True)
        decoded = {}
        for level, block in enumerate(model.up_path):
            block.register_forward_hook(
                lambda module, given, output, level=level, found=decoded: found.update({level: output})
            )
        logits = model(image, reconstruction).logits
        close(logits, golden["logits"])
        close(logits.sigmoid(), golden["prob"])
        for level, values in decoded.items():
            close(values, golden[f"dec{level}"])
        assert len(decoded) == int(golden["depth"]) - 1
        squared = network(golden, residual="squared")(image, reconstruction).logits
        close(squared.sigmoid(), golden["prob_l2_res"])
        plain = network(golden)
        assert not plain.deepsup_1x1
        close(plain(image, reconstruction, return_dict=False)[0], golden["logits"])


@torch.no_grad()
def test_losses():
    for golden in map(load, recordings("sadm/segunet*.npz")):
        model = network(golden, deep_supervision=True)
        output = model(golden["x_in"], golden["reco"])
        bce = F.binary_cross_entropy_with_logits(output.logits, golden["seg"], reduction="none").mean((1, 2, 3))
        close(bce.mean(), golden["loss_bce"])
        close(segmentation_loss("bce", output, golden["seg"]).mean(), golden["loss_bce_deepsup"])
        output = network(golden)(golden["x_in"], golden["reco"])
        close(segmentation_loss("bce", output, golden["seg"]).mean(), golden["loss_bce"])
        dice = segmentation_loss("dice", output, golden["seg"])
        close(dice.mean(), golden["loss_dice"])
        close(segmentation_loss("bce_dice", output, golden["seg"]), bce + dice)


@torch.no_grad()
def test_standardized_convolution_and_groups():
    for golden in map(load, recordings("sadm/segunet*.npz")):
        weight = golden["wn_weight"]
        convolution = StandardizedConvBlock(weight.shape[1], weight.shape[0]).block[1]
        convolution.load_state_dict({"weight": weight, "bias": golden["wn_bias"]})
        close(convolution(golden["wn_x"]), golden["wn_y"])
        for channels, groups in zip(golden["groups_channels"].tolist(), golden["groups_value"].tolist(), strict=True):
            with torch.device("meta"):
                assert StandardizedConvBlock(1, channels).block[3].num_groups == groups, channels


def test_perlin_noise():
    for golden in map(load, recordings("sadm/draem*.npz")):
        numbers = [name.removesuffix("_angles") for name in golden if name.endswith("_angles")]
        assert numbers
        for name in numbers:
            size, cells = tuple(golden[f"{name}_shape"].tolist()), golden[f"{name}_res"][None]
            noise = perlin_noise(size, cells, golden[f"{name}_angles"][None])[0]
            close(noise, golden[name].double(), atol=1e-6)
            # More angles than corners, as they are drawn.
            padded = F.pad(golden[f"{name}_angles"], (0, 3, 0, 5))[None]
            close(perlin_noise(size, cells, padded)[0], noise, atol=0)
        sizes = golden["nextpow2_in"].tolist()
        assert [next_power_of_two(size) for size in sizes] == golden["nextpow2_out"].tolist()


def test_texture_and_blend():
    for golden in map(load, recordings("sadm/draem*.npz")):
        noise = golden["perlin_after_rot"]
        mask = (noise > synthetic_anomalies.THRESHOLD)[:, None].float()
        close(mask, golden["mask"], atol=0)
        close(texture(noise), golden["source_u8"].float(), atol=0)
        augmented = golden["augmented_u8"][:, None].float()
        close(blend(golden["x"], mask, augmented, golden["beta"]), golden["x_anom"], atol=1e-6)


def test_distribution(monkeypatch):
    """Masks and textures are as large and as bright as those of the recording, for fixed seeds."""
    monkeypatch.setattr(synthetic_anomalies, "OPACITY", (1.0, 1.0))
    for golden in map(load, recordings("sadm/draem*.npz")):
        count, size = len(golden["stat_mask_fraction"]), golden["x"].shape[-2:]
        changed, masks = draw_anomalies(torch.zeros(count, 1, *size), make_keys(0, range(count)))
        share = masks.mean((1, 2, 3))
        # Equal distributions fail one comparison of two samples in 10,000.
        assert scipy.stats.ks_2samp(share, golden["stat_mask_fraction"]).pvalue > 1e-4
        empty = [[(values == 0).sum(), (values > 0).sum()] for values in (share, golden["stat_mask_fraction"])]
        assert scipy.stats.fisher_exact(empty).pvalue > 1e-4
        brightness = changed[share > 0].sum((1, 2, 3)) / masks[share > 0].sum((1, 2, 3))
        expected = golden["stat_perturbation_mean_in_mask"]
        assert scipy.stats.ks_2samp(brightness, expected[~expected.isnan()]).pvalue > 1e-4
