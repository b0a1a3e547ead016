"""Every size of every network, and the constants of the sliding window, as frozen dataclasses. No torch, no Ray.

The defaults are the official full-size model's; a weights folder's `config.json` holds the whole tree.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from stages.errors import BadConfig

T = TypeVar("T")

MAY_BE_ZERO = {
    "unet.chunk_causal",
    "keypoints.drawn",
    "unet.num_bases",
    "keypoints.colours",
    "keypoints.translation_scale",
    "window.timesteps",
    "window.max_keyframes",
    "window.keyframe_threshold",
    "window.first_keyframe_call",
    "pose_guider.head.margin",
    "vae.kept_detail",
    "keypoints.gathered_cells",
    "keypoints.fine_channels",
    "keypoints.upright_depths",
}
MAY_BE_EMPTY = {
    "keypoints.upright_channels",
    "keypoints.upright_depths",
    *(f"pose_guider.{part}_channels" for part in ("mover", "expression", "depth", "light")),
}
MAY_BE_NEGATIVE = {"pose_guider.head.centre"}
"""Every other number of a config is more than 0."""


@dataclass(frozen=True)
class UNetConfig:
    """Both UNets: the denoising one (3D) and the reference one (2D) share their shape."""

    in_channels: int = 4
    block_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    """Which resolutions carry reference attention, from the finest; the up path mirrors it."""
    layers_per_block: int = 2
    num_heads: int = 8
    cross_attention_dim: int = 768
    num_norm_groups: int = 32
    num_motion_heads: int = 8
    num_temporal_heads: int = 8
    motion_in_time: bool = False
    """Whether the sum of a frame's motion tokens also joins its time embedding, and so reaches every residual block: a
    quicker way to learn than attention."""
    num_bases: int = 0
    """Pictures in latents that come with the pose, from which the answer starts (`stages.networks.unet.with_bases`)."""
    max_positions: int = 32
    """Length of the temporal position table; a window may not have more frames."""
    chunk_causal: int = 0
    """0: frames of a window see all of it (paper, section 3.3); `chunk_frames`: only their own and cleaner chunks."""


@dataclass(frozen=True)
class MotionEncoderConfig:
    """Face crop to motion tokens (FAN trunk). `crop_px` must be a multiple of 8 and at least 4 · 2^hourglass_depth."""

    crop_px: int = 224
    stem_channels: int = 64
    mid_channels: int = 128
    trunk_channels: int = 256
    num_landmarks: int = 68
    attention_dim: int = 1024
    num_attention_heads: int = 8
    num_norm_groups: int = 32
    hourglass_depth: int = 4
    num_tokens: int = 32
    token_dim: int = 16


@dataclass(frozen=True)
class KeypointConfig:
    """Keypoint extractor (ConvNeXt V2) and how its points are drawn and boxed."""

    image_px: int = 256
    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    num_keypoints: int = 21
    num_angle_bins: int = 66
    gathered_cells: int = 0
    """0: what the heads read is the mean of the last map; otherwise that map's side: every cell has weights of its own,
    which tells places more exactly."""
    fine_channels: int = 0
    """0: none; otherwise the width of a part that finds each keypoint's place in pictures of `image_px`
    (`stages.networks.pinpoint`); the ConvNeXt then sees them at half that side."""
    upright_channels: tuple[int, ...] = ()
    """Empty: none; otherwise the widths of a part that looks again at the head that was found, turned upright, for its
    angles (`stages.networks.upright`)."""
    upright_depths: tuple[int, ...] = ()
    """Its residual blocks at each width."""
    upright_px: int = 128
    """Side of the square in which it looks."""
    drawn: tuple[int, ...] = (1, 2, 3, 4, 12, 15, 20)
    colours: tuple[tuple[int, ...], ...] = (
        (255, 0, 0),
        (255, 255, 0),
        (0, 255, 0),
        (0, 255, 255),
        (0, 0, 255),
        (255, 0, 255),
        (255, 0, 85),
    )
    """One RGB colour per drawn keypoint."""
    radius_px: int = 4
    box_factor: float = 1.7
    translation_scale: float = 0.5

    @property
    def downscale(self) -> int:
        """Picture side over the side of the extractor's last map."""
        return 2 ** (len(self.dims) + 1) * (2 if self.fine_channels else 1)


@dataclass(frozen=True)
class HeadConfig:
    """The ellipsoid that stands for a head where the portrait is moved with its keypoints (`stages.moved`), in units of
    the keypoints' root mean square distance from their mean, along the portrait's axes (z away from the viewer)."""

    centre: tuple[float, ...] = (0.0, -0.10, 0.52)
    """From the mean of the keypoints to the middle of the head."""
    radii: tuple[float, ...] = (1.14, 1.46, 0.9)
    margin: float = 0.35
    """How far beyond the outline, in radii, the picture still moves with the head."""
    softness: float = 0.085
    grid_px: int = 4
    """Places are computed for squares of this side and interpolated between them."""


@dataclass(frozen=True)
class PoseGuiderConfig:
    """Canvases (`stages.canvas`) to a feature map as large as the latents; each channel step after the first halves the
    sides."""

    channels: tuple[int, ...] = (16, 32, 96, 256)
    pixel_patch: int = 1
    """Squares of this side are folded into channels first."""
    shows_portrait: bool = False
    """Whether the canvas also holds the portrait, unmoved and as the keypoints move it (`stages.moved`)."""
    head: HeadConfig = field(default_factory=HeadConfig)
    mover_channels: tuple[int, ...] = ()
    """Widths, at 1/8 and 1/16 of the picture, of the network that moves the portrait (`stages.networks.mover`); empty:
    there is none, and the head turns as an ellipsoid."""
    expression_channels: tuple[int, ...] = ()
    """Widths of the part of it that looks at the portrait's face for what expressions do to it
    (`stages.networks.expressions`), at its own cells and at coarser ones."""
    depth_channels: tuple[int, ...] = ()
    """The same of the part that looks at the portrait for its depths (`stages.networks.depths`)."""
    light_channels: tuple[int, ...] = ()
    """The same of the part that looks at it for its light (`stages.networks.light`)."""

    @property
    def canvas_channels(self) -> int:
        """Channels of a canvas: the drawn keypoints and, where it shows the portrait, two pictures of it."""
        return 9 if self.shows_portrait else 3

    @property
    def downscale(self) -> int:
        """Canvas side over feature side."""
        return self.pixel_patch * 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class VaeConfig:
    """KL autoencoder. `pixel_patch` and `latent_patch` fold squares of pixels into channels around it (1: plain)."""

    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    num_norm_groups: int = 32
    mid_attention: bool = True
    scaling_factor: float = 0.18215
    pixel_patch: int = 1
    latent_patch: int = 1
    plain_output: bool = False
    """No norm and activation before the last convolutions, so that the whole can start as a linear transform."""
    kept_detail: float = 0.0
    """Share that decoded frames get back of what coding takes from the moved portrait; above 0 only where the canvases
    show it (`PoseGuiderConfig.shows_portrait`)."""

    @property
    def downscale(self) -> int:
        """Picture side over latent side."""
        return self.pixel_patch * 2 ** (len(self.block_channels) - 1) * self.latent_patch


@dataclass(frozen=True)
class ImageEncoderConfig:
    """CLIP vision tower that turns the portrait into one token."""

    image_px: int = 224
    patch_px: int = 14
    hidden_dim: int = 1024
    intermediate_dim: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    projection_dim: int = 768
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class WindowConfig:
    """The sliding window: `num_levels` chunks of `chunk_frames` frames, the cleanest first."""

    chunk_frames: int = 4
    timesteps: tuple[int, ...] = (0, 333, 666, 999)
    """One timestep per level, from the cleanest to the noisiest."""
    prediction: Literal["epsilon", "sample"] = "epsilon"
    """What the denoiser's output means: the noise, or the clean latent itself."""
    beta_start: float = 0.00085
    beta_end: float = 0.02
    max_keyframes: int = 3
    keyframe_threshold: float = 17.0
    """Distance in motion-token space above which a finished frame becomes a keyframe."""
    first_keyframe_call: int = 9
    """Calls before this one never add a keyframe (counted from 0)."""
    interpolated_start: bool = True
    """Whether the transition leads from the portrait's motion to the first driving frame's (paper, section 3.3); if
    not, all of it but its first frame has the latter at once."""

    @property
    def num_levels(self) -> int:
        return len(self.timesteps)

    @property
    def num_frames(self) -> int:
        """Frames inside the denoiser."""
        return self.num_levels * self.chunk_frames

    @property
    def num_transition_frames(self) -> int:
        """Frames that lead from the portrait to the first driving frame; also the structural delay in frames."""
        return (self.num_levels - 1) * self.chunk_frames


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: what `config.json` of a weights folder holds."""

    name: str = "personalive"
    licence: str = "see WEIGHTS.md"
    size_px: int = 512
    cpu_bfloat16: bool = False
    """Whether the networks run in bfloat16 on a CPU that multiplies it in hardware (on others in fp32)."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    motion_encoder: MotionEncoderConfig = field(default_factory=MotionEncoderConfig)
    keypoints: KeypointConfig = field(default_factory=KeypointConfig)
    pose_guider: PoseGuiderConfig = field(default_factory=PoseGuiderConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    window: WindowConfig = field(default_factory=WindowConfig)

    def __post_init__(self) -> None:
        check_config(self)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one frame's latent."""
        side = self.size_px // self.vae.downscale
        return self.unet.in_channels, side, side


def check_config(config: ModelConfig) -> None:
    """Raises BadConfig where a number makes no sense by itself, or where sizes contradict each other, naming both."""
    _check_numbers(config)
    vae, unet, window = config.vae, config.unet, config.window
    points, encoder = config.keypoints, config.motion_encoder
    guider = config.pose_guider
    wrong = [
        (config.size_px % vae.downscale, f"size_px {config.size_px} is not a multiple of the VAE's {vae.downscale}"),
        (
            unet.in_channels != vae.latent_channels * vae.latent_patch**2,
            f"unet.in_channels {unet.in_channels} is not vae.latent_channels · latent_patch²",
        ),
        (guider.downscale != vae.downscale, f"pose guider shrinks by {guider.downscale}, the VAE by {vae.downscale}"),
        (
            len(guider.head.centre) != 3 or len(guider.head.radii) != 3,
            "pose_guider.head.centre and radii are three numbers each",
        ),
        (
            len(guider.mover_channels) not in (0, 2) or (guider.mover_channels and not guider.shows_portrait),
            "pose_guider.mover_channels are two numbers, and need pose_guider.shows_portrait",
        ),
        *(
            (
                len(getattr(guider, name)) != len(guider.mover_channels),
                f"pose_guider.{name} are two numbers where there are mover_channels, and else none",
            )
            for name in ("expression_channels", "depth_channels", "light_channels")
        ),
        (
            guider.mover_channels and config.size_px % (2 * guider.head.grid_px),
            f"size_px {config.size_px} is not a multiple of twice pose_guider.head.grid_px {guider.head.grid_px}",
        ),
        (
            points.image_px % points.downscale,
            f"keypoints.image_px {points.image_px} is not a multiple of the extractor's {points.downscale}",
        ),
        (
            points.gathered_cells not in (0, points.image_px // points.downscale),
            f"keypoints.gathered_cells {points.gathered_cells} is neither 0 nor the side of the last map, "
            f"{points.image_px // points.downscale}",
        ),
        (
            unet.num_bases not in (0, 2),
            f"unet.num_bases {unet.num_bases} must be 0, or 2: the portrait as the keypoints move it, and unmoved",
        ),
        (
            unet.num_bases and not (config.pose_guider.shows_portrait and window.prediction == "sample"),
            'unet.num_bases needs pose_guider.shows_portrait, and window.prediction "sample"',
        ),
        (
            vae.kept_detail > 1 or (vae.kept_detail and not config.pose_guider.shows_portrait),
            f"vae.kept_detail {vae.kept_detail} is at most 1, and needs pose_guider.shows_portrait",
        ),
        (not any(unet.attention_levels), "unet.attention_levels must be true somewhere: the portrait is read there"),
        (len(unet.attention_levels) != len(unet.block_channels), "unet.attention_levels needs one entry per block"),
        (
            window.num_frames > unet.max_positions,
            f"{window.num_frames} window frames exceed unet.max_positions {unet.max_positions}",
        ),
        (
            unet.chunk_causal not in (0, window.chunk_frames),
            f"unet.chunk_causal {unet.chunk_causal} is neither 0 nor window.chunk_frames {window.chunk_frames}",
        ),
        (window.num_levels < 2, "window.timesteps needs at least two levels"),
        (not window.beta_start <= window.beta_end < 1, "window.beta_start, window.beta_end and 1 must increase"),
        (len(points.colours) != len(points.drawn), "keypoints.colours needs one entry per drawn keypoint"),
        (
            any(len(colour) != 3 or max(colour) > 255 for colour in points.colours),
            "keypoints.colours are three numbers of 0 to 255 each",
        ),
        (max(points.drawn) >= points.num_keypoints, "keypoints.drawn names more than num_keypoints"),
        (len(points.dims) != len(points.depths), "keypoints.dims and keypoints.depths differ in length"),
        (
            len(points.upright_channels) != len(points.upright_depths),
            "keypoints.upright_channels and keypoints.upright_depths differ in length",
        ),
        (
            points.upright_px % 2 ** len(points.upright_channels),
            f"keypoints.upright_px {points.upright_px} must be a multiple of 2^(number of keypoints.upright_channels)",
        ),
        (
            encoder.crop_px % 8 or encoder.crop_px < 4 * 2**encoder.hourglass_depth,
            f"motion_encoder.crop_px {encoder.crop_px} must be a multiple of 8, at least 4 · 2^hourglass_depth",
        ),
        (list(window.timesteps) != sorted(set(window.timesteps)), "window.timesteps must increase"),
        (max(window.timesteps) > 999, "window.timesteps lie between 0 and 999"),
        (encoder.token_dim % 2, f"motion_encoder.token_dim {encoder.token_dim} must be even"),
        *_undivided_heads(config),
        (
            config.image_encoder.projection_dim != unet.cross_attention_dim,
            "image_encoder.projection_dim must equal unet.cross_attention_dim",
        ),
    ]
    for bad, message in wrong:
        if bad:
            raise BadConfig(f"model config: {message}")


def _check_numbers(section: Any, where: str = "") -> None:
    """Raises BadConfig for a number that is not finite or too small, and for an empty list."""
    for part in dataclasses.fields(section):
        name, value = f"{where}{part.name}", getattr(section, part.name)
        if dataclasses.is_dataclass(value):
            _check_numbers(value, f"{name}.")
        if value == () and name not in MAY_BE_EMPTY:
            raise BadConfig(f"model config: {name} must not be empty")
        for number in _numbers(value):
            if not math.isfinite(number):
                raise BadConfig(f"model config: {name} {number} must be finite")
            if name not in MAY_BE_NEGATIVE and (number < 0 or (number == 0 and name not in MAY_BE_ZERO)):
                bound = "0 or more" if name in MAY_BE_ZERO else "more than 0"
                raise BadConfig(f"model config: {name} {number} must be {bound}")


def _numbers(value: Any) -> list[float]:
    if isinstance(value, tuple):
        return [number for entry in value for number in _numbers(entry)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _undivided_heads(config: ModelConfig) -> list[tuple[bool, str]]:
    """For every attention, whether its heads do not divide its channels."""
    unet, encoder, clip = config.unet, config.motion_encoder, config.image_encoder
    divisions = [
        ("motion_encoder.num_attention_heads", encoder.num_attention_heads, encoder.attention_dim),
        ("image_encoder.num_heads", clip.num_heads, clip.hidden_dim),
    ]
    for name in ("num_heads", "num_motion_heads", "num_temporal_heads"):
        divisions += [(f"unet.{name}", getattr(unet, name), channels) for channels in unet.block_channels]
    return [
        (channels % heads > 0, f"{name} {heads} does not divide {channels} channels")
        for name, heads, channels in divisions
    ]


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any], where: str = "config") -> T:
    """Builds a config dataclass from JSON values. Unknown keys and wrong types raise BadConfig with their path."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise BadConfig(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(hints))}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise BadConfig(f"{where}: expected an object, got {value!r}")
        return from_dict(hint, value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise BadConfig(f"{where}: expected a list, got {value!r}")
        return tuple(_convert(typing.get_args(hint)[0], entry, where) for entry in value)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise BadConfig(f"{where}: {value!r} is not one of {', '.join(map(str, typing.get_args(hint)))}")
        return value
    allowed: Any = (int, float) if hint is float else hint
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
        raise BadConfig(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise BadConfig(f"{where}: the number has more than 64 bits")
    return float(value) if hint is float else value


def load_config(folder: Path) -> ModelConfig:
    """Reads `config.json` of a weights folder in our own format. Raises BadConfig."""
    path = folder / "config.json"
    try:
        values = read_object(path)
    except FileNotFoundError:
        raise BadConfig(f"{path} is missing: not a weights folder, or one still to be converted") from None
    return from_dict(ModelConfig, values, "config.json")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError, and BadConfig for everything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BadConfig(f"{path} cannot be read ({error.strerror or error}): it must be a readable file") from None
    except RecursionError:
        raise BadConfig(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise BadConfig(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise BadConfig(f"{path} does not hold a JSON object: copy or convert the weights folder again")
    return values


def save_config(config: ModelConfig, folder: Path) -> None:
    """Writes `config.json`."""
    (folder / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")
