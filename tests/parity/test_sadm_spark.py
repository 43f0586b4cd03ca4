"""SparK's masking, sparse network, decoder and loss against arrays recorded from cDDPM's program.

The recorded encoder is a tiny ResNet of timm with a stem of three convolutions, which transformers' cannot say; it is written out here.
"""

import re
from types import SimpleNamespace

import torch
from torch import nn
from torch.testing import assert_close

from anodiff.models.spark import SparKModel, resize_cells, spark_loss

from .recordings import load, over


class Block(nn.Module):
    """timm's BasicBlock with a projection."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        hidden = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (hidden + self.downsample(x)).relu()


class DeepStemResNet(nn.Module):
    """Sizes from the recorded weights `w/sparse_encoder.sp_cnn.*`."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        layers = []
        for index, stride in ((0, 2), (3, 1), (6, 1)):
            after, before = weights[f"conv1.{index}.weight"].shape[:2]
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.conv1, self.bn1 = nn.Sequential(*layers[:-2]), layers[-2]
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for number in range(1, 5):
            after, before = weights[f"layer{number}.0.conv1.weight"].shape[:2]
            setattr(self, f"layer{number}", nn.Sequential(Block(before, after, 1 if number == 1 else 2)))

    def forward(self, x):
        maps = [self.maxpool(self.bn1(self.conv1(x)).relu())]
        for number in range(1, 5):
            maps.append(getattr(self, f"layer{number}")(maps[-1]))
        return SimpleNamespace(feature_maps=tuple(maps[1:]))


RENAMED = (
    (r"^sparse_encoder\.sp_cnn\.", "encoder."),
    (r"^dense_decoder\.dec\.(\d+)\.conv\.0\.b\.", r"decoder.\1.layers."),
    (r"^dense_decoder\.dec\.", "decoder."),
    (r"^dense_decoder\.proj\.", "head."),
    (r"^en_de_norms\.", "norms."),
    (r"^en_de_lins\.", "projections."),
    (r"^mask_tokens\.", "tokens."),
)


def named(arrays: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Recorded arrays under `prefix` by the names of `SparKModel`."""
    found = {}
    for name, value in arrays.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            for pattern, replacement in RENAMED:
                name = re.sub(pattern, replacement, name)
            found[name] = value
    return found


def make_model(arrays: dict[str, torch.Tensor]) -> SparKModel:
    weights = named(arrays, "w/")
    encoder = DeepStemResNet({n.removeprefix("encoder."): v for n, v in weights.items() if n.startswith("encoder.")})
    model = SparKModel(
        encoder,
        tuple(arrays["x"].shape[2:]),
        arrays["x"].shape[1],
        mask_ratio=float(arrays["mask_ratio"]),
        decoder_width=weights["decoder.0.up.weight"].shape[0],
    )
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and {name.rpartition(".")[2] for name in missing} <= {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    return model


@over("sadm/spark*.npz")
def test_visible_cells(path):
    arrays = load(path)
    model = make_model(arrays)
    assert model.mask_grid == (int(arrays["fmap"]),) * 2 and model.visible_cells == int(arrays["len_keep"])
    visible = model.choose_cells(arrays["mask_rand"])
    assert torch.equal(visible, arrays["active"])
    assert torch.equal(resize_cells(visible, arrays["x"].shape[2:]), arrays["active_ex"])


@over("sadm/spark*.npz")
def test_a_training_step_and_an_evaluation(path):
    arrays = load(path)
    model, images, visible = make_model(arrays), arrays["x"], arrays["active"]
    maps = []
    model.encoder.register_forward_hook(lambda module, inputs, output: maps.extend(output.feature_maps[::-1]))
    reconstruction = model.train()(images, visible)
    recorded = [arrays[name] for name in sorted(arrays) if name.startswith("fea_train")]
    assert len(maps) == len(recorded)
    for map_, expected in zip(maps, recorded, strict=True):
        assert_close(map_ * resize_cells(visible, map_.shape[2:]), expected, rtol=0, atol=1e-4)
    assert_close(reconstruction, arrays["rec_train"], rtol=0, atol=1e-4)

    loss = spark_loss(images, reconstruction, visible).mean()
    assert_close(loss, arrays["loss_train"], rtol=0, atol=1e-5)
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert_close(norm, arrays["grad_norm_total"], rtol=1e-3, atol=0)

    buffers, after = dict(model.named_buffers()), named(arrays, "buf_after/")
    assert {name for name in buffers if not name.endswith("num_batches_tracked")} == set(after)
    for name, expected in after.items():
        assert_close(buffers[name], expected, rtol=0, atol=1e-5, msg=name)

    reconstruction = model.eval()(images, visible)
    assert_close(reconstruction, arrays["rec_eval"], rtol=0, atol=1e-4)
    for name, settings in (
        ("loss_eval", {}),
        ("loss_eval_l1", {"loss": "l1"}),
        ("loss_eval_dense", {"region": "all"}),
        ("loss_eval_pixnorm", {"normalize": True}),
    ):
        loss = spark_loss(images, reconstruction, visible, **settings).mean()
        assert_close(loss, arrays[name], rtol=0, atol=1e-5, msg=name)
