from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..hub import registration  # noqa: F401  (the class below is a component of checkpoints)
from .noise import draw_gaussian, draw_pyramid


BETA_SCHEDULES = ("linear", "shifted_cosine")
NOISE_TYPES = ("pyramid", "gaussian")
NORMALIZATIONS = ("per_batch", "per_image")
PREDICTION_TYPES = ("epsilon", "v_prediction")


class ANDiScheduler(SchedulerMixin, ConfigMixin):
    r"""
    The diffusion process of ANDi (Frotscher et al., arXiv 2312.01904) and of its single-modality successor in UAD-IMAG (arXiv
    2512.01534). It is never walked: a slice is noised once for each timestep, and the mean of the reverse transition that the
    network predicts is compared with the true one. So there is no `step`.

    Timesteps are 0-based: t = 0, ..., T - 1. The reverse transition leads from t to t - 1, so ANDi evaluates t >= 1 only.

    UAD-IMAG: `num_train_timesteps=1001, beta_schedule="shifted_cosine", discount=0.9, prediction_type="v_prediction",
    clip_sample=True`; its time in [0, 1] is t / (T - 1).

    Args:
        num_train_timesteps (`int`, defaults to 1000): T.
        beta_schedule (`str`, defaults to `"linear"`):
            `"linear"`: from `beta_start` to `beta_end`, in float32 as the original. `"shifted_cosine"`: the logarithm of the
            signal-to-noise ratio is -2 log tan of an angle that grows evenly with t, plus 2 log `resolution_ratio`.
        beta_start (`float`, defaults to 1e-4), beta_end (`float`, defaults to 0.02): Of the linear schedule.
        log_snr_min (`float`, defaults to -15.0), log_snr_max (`float`, defaults to 15.0):
            Ends of the shifted cosine before the shift, at t = T - 1 and t = 0.
        resolution_ratio (`float`, defaults to 0.25): Of the shifted cosine; UAD-IMAG has 56 / 224. 1 is the cosine itself.
        noise_type (`str`, defaults to `"pyramid"`): `"pyramid"` or `"gaussian"`: what `draw_noise` draws for training.
        discount (`float`, defaults to 0.8): Weight of a level of the pyramid relative to the one before it.
        normalize (`str`, defaults to `"per_batch"`):
            `"per_batch"`: the authors' rule for training, the batch shares one standard deviation and the sizes of its pyramid.
            `"per_image"`: every image depends on its own generator alone.
        prediction_type (`str`, defaults to `"epsilon"`): `"epsilon"` or `"v_prediction"`: what the network's output is.
        clip_sample (`bool`, defaults to `False`): Limit the x_0 estimate of a deviation to [-1, 1].
        log_floor (`float`, defaults to 1e-10):
            Smallest deviation: under a geometric mean one exact zero would erase its pixel. 0 for the original's behaviour.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        log_snr_min: float = -15.0,
        log_snr_max: float = 15.0,
        resolution_ratio: float = 0.25,
        noise_type: str = "pyramid",
        discount: float = 0.8,
        normalize: str = "per_batch",
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        log_floor: float = 1e-10,
    ):
        for name, value, allowed in (
            ("beta_schedule", beta_schedule, BETA_SCHEDULES),
            ("noise_type", noise_type, NOISE_TYPES),
            ("normalize", normalize, NORMALIZATIONS),
            ("prediction_type", prediction_type, PREDICTION_TYPES),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")
        if not num_train_timesteps >= 2:
            raise ValueError(f"`num_train_timesteps` must be at least 2, got {num_train_timesteps}.")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"`beta_start` and `beta_end` must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}."
            )
        if not log_snr_min < log_snr_max:
            raise ValueError(f"`log_snr_min` must be below `log_snr_max`, got {log_snr_min} and {log_snr_max}.")
        for name, value in (("resolution_ratio", resolution_ratio), ("discount", discount)):
            if not value > 0:
                raise ValueError(f"`{name}` must be above 0, got {value}.")
        if not log_floor >= 0:
            raise ValueError(f"`log_floor` must not be negative, got {log_floor}.")

        # All tables are float64. Notation: abar_t is the product of 1 - beta_t, s = t - 1, variance = 1 - abar_t.
        if beta_schedule == "linear":
            self.betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32).double()
            self.alphas_cumprod = torch.cumprod(1.0 - self.betas, 0)
            variance = 1.0 - self.alphas_cumprod
        else:
            time = torch.linspace(0, 1, num_train_timesteps, dtype=torch.float64)
            first, last = torch.tensor([-log_snr_max / 2, -log_snr_min / 2], dtype=torch.float64).exp().atan()
            shift = torch.tensor(resolution_ratio, dtype=torch.float64).log()
            log_snr = 2.0 * (shift - torch.tan(first + time * (last - first)).log())
            self.alphas_cumprod = torch.sigmoid(log_snr)
            variance = torch.sigmoid(-log_snr)
            # 1 - abar_t / abar_s, without the difference of two numbers near 1.
            previous = torch.cat([torch.full((1,), torch.inf, dtype=torch.float64), log_snr[:-1]])
            self.betas = -torch.expm1(log_snr - previous) * variance
        previous_variance = torch.cat([torch.zeros(1, dtype=torch.float64), variance[:-1]])
        # DDPM eq. 7: the posterior q(x_{t-1} | x_t, x_0) has the mean original_weight * x_0 + sample_weight * x_t.
        original_weight = self.betas * (1.0 - previous_variance).sqrt() / variance
        sample_weight = previous_variance * (1.0 - self.betas).sqrt() / variance
        self.posterior_variance = self.betas * previous_variance / variance
        # The means of two noises at one x_t differ by noise_weight times the difference of the noises; its square is the factor
        # between a deviation and the squared error of the noise.
        noise_weight = self.betas / ((1.0 - self.betas) * variance).sqrt()
        self.deviation_weight = noise_weight.square()
        self._tables = {
            "original_scale": self.alphas_cumprod.sqrt(),
            "noise_scale": variance.sqrt(),
            "original_weight": original_weight,
            "sample_weight": sample_weight,
            "noise_weight": noise_weight,
            "variance": self.betas,
        }
        self._device_tables = {}
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps - 1, 0, -1)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        start: int = 1,
        stop: int | None = None,
    ):
        """
        Sets the timesteps that are aggregated: `stop` - 1, ..., `start`, or some of them, evenly spread.

        Args:
            num_inference_steps (`int`, *optional*):
                Number of timesteps, 1 to `stop` - `start`: each the middle of its share of the range. Defaults to all of them.
            device (`torch.device`, *optional*): Where the timesteps are kept.
            start (`int`, defaults to 1), stop (`int`, *optional*): 1 <= `start` < `stop` <= T. Defaults to all but t = 0.
        """
        stop = self.config.num_train_timesteps if stop is None else stop
        if not 1 <= start < stop <= self.config.num_train_timesteps:
            raise ValueError(
                f"`start` and `stop` must satisfy 1 <= start < stop <= {self.config.num_train_timesteps}, got {start} and"
                f" {stop}. t = 0 has no reverse transition."
            )
        count = stop - start if num_inference_steps is None else num_inference_steps
        if not 1 <= count <= stop - start:
            raise ValueError(
                f"The number of timesteps must be between 1 and `stop` - `start` = {stop - start}, got {count}."
            )
        self.num_inference_steps = count
        shares = torch.arange(count - 1, -1, -1)
        self.timesteps = (start + (2 * shares + 1) * (stop - start) // (2 * count)).to(device)

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: int | torch.Tensor,
    ) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, (N, C, H, W)."""
        alpha = self._gather("original_scale", timesteps, original_samples)
        sigma = self._gather("noise_scale", timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def predict_original_sample(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """The one-shot estimate of x_0, not limited: (x_t - sigma eps) / alpha, or alpha x_t - sigma v."""
        alpha = self._gather("original_scale", timestep, sample)
        sigma = self._gather("noise_scale", timestep, sample)
        if self.config.prediction_type == "v_prediction":
            return alpha * sample - sigma * model_output
        return (sample - sigma * model_output) / alpha

    def predict_epsilon(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """The noise that the network sees in x_t: its output, or sigma x_t + alpha v."""
        if self.config.prediction_type == "epsilon":
            return model_output
        alpha = self._gather("original_scale", timestep, sample)
        sigma = self._gather("noise_scale", timestep, sample)
        return sigma * sample + alpha * model_output

    def posterior_mean(
        self, original_sample: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7."""
        return (
            self._gather("original_weight", timestep, sample) * original_sample
            + self._gather("sample_weight", timestep, sample) * sample
        )

    def predicted_mean(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Mean of the network's transition to x_{t-1}: the posterior mean with its estimate of x_0, limited if the scheduler clips."""
        return self.posterior_mean(self._estimate(model_output, timestep, sample), timestep, sample)

    def mean_error(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        original_sample: torch.Tensor,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        `posterior_mean` minus `predicted_mean`, mu_q - mu_theta, without the difference of two means of size 1, which in float32
        is exactly 0 for up to a few pixels in a hundred.

        Both means share x_t, so what is left is a table value times the difference of two noises, or of two x_0.

        Args:
            model_output (`torch.Tensor` of shape `(N, C, H, W)`): The network's output at x_t.
            timestep (`int` or `torch.Tensor`): t, one for all or one per sample.
            sample (`torch.Tensor` of shape `(N, C, H, W)`): x_t.
            original_sample (`torch.Tensor` of shape `(N, C, H, W)`): x_0.
            noise (`torch.Tensor` of shape `(N, C, H, W)`, *optional*):
                The noise of x_t. Without it, or if the scheduler clips, the difference is that of x_0.
        """
        if noise is None or self.config.clip_sample:
            estimate = self._estimate(model_output, timestep, sample)
            return self._gather("original_weight", timestep, sample) * (original_sample - estimate)
        epsilon = self.predict_epsilon(model_output, timestep, sample)
        return self._gather("noise_weight", timestep, sample) * (epsilon - noise)

    def carry_error(self, mean_error: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
        """What a difference between two x_t adds to the difference of their posterior means at t - 1."""
        return self._gather("sample_weight", timestep, mean_error) * mean_error

    def deviation(self, mean_error: torch.Tensor) -> torch.Tensor:
        """d_t = (mu_q - mu_theta)^2, at least `log_floor`."""
        return mean_error.square().clamp(min=self.config.log_floor)

    def surprise(self, deviation: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
        """-log of UAD-IMAG's probability of a deviation: d_t / (2 beta_t)."""
        return deviation / (2.0 * self._gather("variance", timestep, deviation))

    def draw_noise(
        self,
        shape: tuple[int, int, int, int],
        timesteps: int | torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        device: str | torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        noise_type: str | None = None,
        normalize: str | None = None,
    ) -> torch.Tensor:
        """
        Draws noise, one draw of fixed size per sample. Without `noise_type` and `normalize` that of the configuration: what the
        network is trained with.

        Args:
            shape (`tuple` `(N, C, H, W)`): Shape of the noise.
            timesteps (`int` or `torch.Tensor`): Not used: this noise is the same for all t.
            generator (`torch.Generator` or a list of N): One generator is drawn from N times in turn. Required.
            noise_type (`str`, *optional*): `"pyramid"` or `"gaussian"`.
            normalize (`str`, *optional*): `"per_image"` or `"per_batch"`, of the pyramid.
        """
        count, channels, height, width = shape
        if generator is None:
            raise ValueError("Noise needs a `generator` (one, or a list of one per sample), got None.")
        if isinstance(generator, torch.Generator):
            generator = [generator] * count
        if len(generator) != count:
            raise ValueError(f"`generator` must have one entry per sample ({count}), got {len(generator)}.")
        if (noise_type or self.config.noise_type) == "gaussian":
            return draw_gaussian((channels, height, width), generator, torch.device(device), dtype)
        return draw_pyramid(
            (channels, height, width),
            generator,
            device,
            dtype,
            discount=self.config.discount,
            per_image=(normalize or self.config.normalize) == "per_image",
        )

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _estimate(self, model_output, timestep, sample) -> torch.Tensor:
        estimate = self.predict_original_sample(model_output, timestep, sample)
        return estimate.clamp(-1.0, 1.0) if self.config.clip_sample else estimate

    def _gather(self, name: str, timesteps: int | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        # One table value per sample, (1 or N, 1, 1, 1). Tables are float64, rounded once when they go to a device for the
        # first time; later look-ups stay on the device.
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        key = (name, sample.device, dtype)
        if key not in self._device_tables:
            self._device_tables[key] = self._tables[name].to(dtype).to(sample.device)
        timesteps = torch.as_tensor(timesteps, device=sample.device).reshape(-1)
        return self._device_tables[key][timesteps].to(sample.dtype).reshape(-1, 1, 1, 1)
