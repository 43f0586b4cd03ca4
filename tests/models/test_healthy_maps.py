import torch

from anodiff import HealthyMapsModel
from anodiff.models.healthy_maps import level_weights


def test_places_are_relative_positions_between_the_first_and_last_slice_with_brain():
    brain = torch.ones(5, 2, 2, dtype=torch.bool)
    brain[0] = False
    # The brain lies in the slices 4, 5, 8 and 12: positions 0, 1/8, 1/2 and 1, of which levels are 1/2 apart.
    weights = level_weights(brain, [3, 4, 5, 8, 12], 3)
    expected = torch.tensor([[1, 0, 0], [1, 0, 0], [0.75, 0.25, 0], [0, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(weights, expected)


def test_a_slice_alone_is_in_the_middle():
    for brain in (torch.ones(1, 2, 2, dtype=torch.bool), torch.zeros(1, 2, 2, dtype=torch.bool)):
        torch.testing.assert_close(level_weights(brain, [7], 3), torch.tensor([[0.0, 1.0, 0.0]]))


def test_levels_are_interpolated_pixel_by_pixel():
    model = HealthyMapsModel(1, 2, depth=2)
    model.levels.copy_(torch.tensor([[[1.0, 4.0]], [[3.0, 2.0]]]))
    divisors = model.half()(torch.ones(3, 1, 2, dtype=torch.bool), [0, 1, 4])
    assert divisors.dtype == torch.float32
    torch.testing.assert_close(divisors[:, 0], torch.tensor([[1.0, 4.0], [1.5, 3.5], [3.0, 2.0]]))
