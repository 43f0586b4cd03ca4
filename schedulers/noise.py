"""Seeds of simplex noise, and pyramid noise, drawn by key."""

from collections.abc import Sequence

import torch

from .draws import fold_in, normal, uniform, words


RATES, LEVELS = 0, 1  # draws of one image


def draw_seeds(keys: torch.Tensor, channels: int) -> torch.Tensor:
    """Draws seeds for `OctaveSimplexNoise`: keys `(N, 2)` to `(N, channels)`, int64, uniform in [0, 2^62)."""
    halves = words(keys, 2 * channels).unflatten(1, (channels, 2)) >> 1
    return (halves[..., 0] << 31) | halves[..., 1]


def pyramid_sizes(height: int, width: int, rates: torch.Tensor) -> torch.Tensor:
    """Computes height and width of the levels of pyramid noise, `(..., L, 2)` int64, 0 after the last one, from r of
    each level, `rates` `(..., L)` within [2, 4). Level 0 is as large as the image; level i is level i - 1 over r_i^i,
    rounded down and at least 1 (the program of Frotscher et al.); the level of one pixel is the last."""
    size = torch.stack([torch.full_like(rates[..., 0], height), torch.full_like(rates[..., 0], width)], -1)
    sizes = []
    for level in range(rates.shape[-1]):
        ended = (size <= 1).all(-1, keepdim=True) & (level > 0)
        size = (size / rates[..., level, None] ** level).floor().clamp(min=1).masked_fill(ended, 0)
        sizes.append(size)
    return torch.stack(sizes, -2).long()


def pyramid_noise(
    base: torch.Tensor, levels: list[torch.Tensor], sizes: torch.Tensor, discount: float, per_image: bool
) -> torch.Tensor:
    """
    Computes the pyramid noise of ANDi `(N, C, H, W)` from given draws: `base` plus the levels, brought to the size of
    the image by bilinear interpolation and weighted with `discount`^i, over their standard deviation. Nothing but
    elementwise operations, so that an image has the same bits in any batch.

    Args:
        base (`torch.Tensor` of shape `(N, C, H, W)`): Standard normal draw.
        levels (`list[torch.Tensor]`):
            Standard normal draw of each level, `(N, C, h, w)` with h and w of `sizes` or larger: the upper left part
            is used. Level 0 is `(N, C, H, W)`.
        sizes (`torch.Tensor` of shape `(N, L, 2)` or `(L, 2)`): From [`pyramid_sizes`]; for each image, or for all.
        discount, per_image: As of [`draw_pyramid`].
    """
    count, channels, height, width = base.shape
    sizes = sizes.to(base.dtype).expand(count, len(levels), 2)
    noise = base + levels[0]
    for level in range(1, len(levels)):
        weight = (discount**level * (sizes[:, level, 0] > 0))[:, None, None, None]
        field = levels[level] * weight
        if field.shape[2:] != (1, 1):
            # Columns, then whole rows, which are fast to fetch.
            low, high, fraction = _neighbours(sizes[:, level, 1], width)
            columns = [index[:, None, None].expand(-1, channels, field.shape[2], -1) for index in (low, high)]
            field = _mix(field.gather(3, columns[0]), field.gather(3, columns[1]), fraction[:, None, None])
            low, high, fraction = _neighbours(sizes[:, level, 0], height)
            first_row = torch.arange(count * channels, device=base.device).view(count, channels, 1) * field.shape[2]
            rows = [(first_row + index[:, None]).flatten() for index in (low, high)]
            field = _mix(
                *(field.view(-1, width).index_select(0, index).view_as(base) for index in rows),
                fraction[:, None, :, None],
            )
        noise += field
    if not per_image:
        return noise / noise.std()
    flat = noise.flatten(1)
    flat = flat - sum_pixels(flat) / flat.shape[1]
    return noise / (sum_pixels(flat.square_()) / (flat.shape[1] - 1)).sqrt()[..., None, None]


def _neighbours(counts: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Interpolates `counts[n]` values linearly to `length`, half-pixel centres: both neighbours and the weight of
    the second, each `(N, length)`."""
    last = counts.clamp(min=1)[:, None] - 1
    pixels = torch.arange(length, dtype=counts.dtype, device=counts.device)
    position = ((pixels + 0.5) * ((last + 1) / length) - 0.5).clamp(min=0).minimum(last)
    low = position.floor()
    return low.long(), (low + 1).minimum(last).long(), position - low


def _mix(first: torch.Tensor, second: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """`first` + `fraction` (`second` - `first`), in the memory of `second`."""
    return second.sub_(first).mul_(fraction).add_(first)


def draw_pyramid(
    keys: torch.Tensor,
    size: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    discount: float = 0.8,
    per_image: bool = True,
) -> torch.Tensor:
    """
    Draws the pyramid noise of ANDi: white noise plus white noise of ever coarser grids, so that slow changes over the
    image are as likely as a lesion is large. Made on the device without waiting for it.

    Args:
        keys (`torch.Tensor` of shape `(N, 2)`): One per image.
        size (`tuple` `(C, H, W)`): Of one image.
        dtype (`torch.dtype`): Of the result, `(N, C, H, W)`.
        discount (`float`, defaults to 0.8): Weight of a level relative to the one before it. UAD-IMAG: 0.9.
        per_image (`bool`, defaults to `True`):
            Image i depends on `keys[i]` alone, and has the standard deviation 1 (with an offset of about 0.3). `False`
            is the authors' rule: the batch shares its sizes, which the first key decides, and one standard deviation.
    """
    channels, height, width = size
    # The largest sizes there can be, from the smallest rate, 2: what is drawn does not depend on the rates.
    largest = [(height, width)]
    while largest[-1] != (1, 1):
        shift = len(largest)
        largest.append((max(1, largest[-1][0] >> shift), max(1, largest[-1][1] >> shift)))
    shapes = (largest[0], *largest)  # the base, then the levels
    numbers = [channels * rows * columns for rows, columns in shapes]
    values = normal(fold_in(keys, LEVELS), (sum(numbers),), torch.float64 if dtype == torch.float64 else torch.float32)
    rates = 2 + 2 * uniform(fold_in(keys if per_image else keys[:1], RATES), (len(largest),))
    base, *levels = [
        part.unflatten(1, (channels, *shape)) for part, shape in zip(values.split(numbers, 1), shapes, strict=True)
    ]
    return pyramid_noise(base, levels, pyramid_sizes(height, width, rates), discount, per_image).to(dtype)


def sum_pixels(fields: torch.Tensor) -> torch.Tensor:
    """Sums over the last axis, folded in halves: elementwise, so that the order of additions is always the same."""
    while fields.shape[-1] > 1:
        half = fields.shape[-1] // 2
        folded = fields[..., :half] + fields[..., half : 2 * half]
        fields = torch.cat([folded, fields[..., 2 * half :]], -1) if fields.shape[-1] % 2 else folded
    return fields
