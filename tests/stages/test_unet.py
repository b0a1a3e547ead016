"""Both UNets against slow twins: nothing folded, projected beforehand or cut off, one session at a time."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stages.config import UNetConfig
from stages.networks.layers import Attention, Layers, rest_idle_modules
from stages.networks.unet import (
    Block,
    DenoisingUNet,
    LayerMemory,
    Memory,
    MotionModule,
    ReferenceUNet,
    TemporalModule,
    TokenAttention,
    TransformerBlock,
    attention_names,
    chunk_causal_mask,
    down_plans,
    extend_memory,
    project_memory,
    up_plans,
)

NUM_FRAMES, SIDE = 6, 6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def unet(networks) -> DenoisingUNet:
    return networks["denoising_unet"]


@pytest.fixture
def reference_unet(networks) -> ReferenceUNet:
    return networks["reference_unet"]


def picture_memory(unet: DenoisingUNet, reference_unet: ReferenceUNet, config: UNetConfig, seed: int) -> Memory:
    """The memory of a random picture."""
    random = torch.Generator().manual_seed(seed)
    latent, token = torch.randn(1, 12, SIDE, SIDE, generator=random), torch.randn(10, generator=random)
    return project_memory(unet, attention_names(config), reference_unet(latent, token), token)


def random_memory(attention: Attention, tokens: Tensor, constant: Tensor) -> LayerMemory:
    parts = (layer(tokens) for layer in (attention.to_k, attention.to_v))
    keys, values = (rearrange(part, "l (h d) -> h l d", h=attention.num_heads) for part in parts)
    return LayerMemory(keys, values, constant)


def call(unet: DenoisingUNet, seeds: list[int], memories: list[Memory], timesteps: Tensor | None = None) -> Tensor:
    """One call; the inputs of each session follow from its seed."""
    inputs = []
    for shape in ((12, SIDE, SIDE), (5, 6), (8, SIDE, SIDE)):
        each = [torch.randn(NUM_FRAMES, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        inputs.append(torch.stack(each))
    latents, motion, pose = inputs
    steps = torch.tensor([0, 0, 300, 300, 650, 650]) if timesteps is None else timesteps
    return unet(latents, steps, motion, pose, memories)


def test_attention_to_a_single_token_does_not_depend_on_the_query():
    folded, full = TokenAttention(8, 10), Attention(8, 10, 2)
    full.load_state_dict(folded.state_dict(), strict=False)
    token = torch.randn(10)
    expected = full(torch.randn(3, 7, 8), token.expand(3, 1, 10))
    torch.testing.assert_close(folded(token).expand(3, 7, 8), expected)


def test_projected_memories_equal_concatenated_features_that_every_frame_projects(config):
    """Two sessions of three frames; the second has a keyframe besides its portrait."""
    block = TransformerBlock(8, config.unet)
    attention = block.attn1
    x = torch.randn(6, 9, 8)
    features = [[torch.randn(9, 8)], [torch.randn(9, 8), torch.randn(4, 8)]]
    constants = torch.randn(2, 8)
    memories = [
        random_memory(attention, torch.cat(parts), constant)
        for parts, constant in zip(features, constants, strict=True)
    ]
    expected = []
    for frame in range(6):
        own = block.norm1(x[frame])
        context = torch.cat([own, *features[frame // 3]])
        tokens = x[frame] + attention(own[None], context[None])[0] + constants[frame // 3]
        expected.append(tokens + block.ff(block.norm3(tokens)))
    torch.testing.assert_close(block.read(x, memories), torch.stack(expected), rtol=0, atol=1e-5)


def test_projecting_a_pictures_features_serves_each_layer_with_its_own_weights(unet, config):
    names, token = attention_names(config.unet), torch.randn(10)
    features = [torch.randn(4, len(unet.get_submodule(name).norm1.weight)) for name in names]
    for name, layer, memory in zip(names, features, project_memory(unet, names, features, token), strict=True):
        block = unet.get_submodule(name)
        expected = random_memory(block.attn1, layer, block.attn2(token))
        assert torch.equal(memory.keys, expected.keys)
        assert torch.equal(memory.values, expected.values)
        assert torch.equal(memory.constant, expected.constant)


def test_an_extended_memory_has_the_keyframe_behind_and_keeps_its_constant(unet, reference_unet, config):
    portrait, keyframe = (picture_memory(unet, reference_unet, config.unet, seed) for seed in (1, 2))
    sizes = [layer.keys.shape[1] for layer in portrait]
    extended = extend_memory(portrait, keyframe)
    for old, new, both, size in zip(portrait, keyframe, extended, sizes, strict=True):
        assert torch.equal(both.keys[:, :size], old.keys) and torch.equal(both.keys[:, size:], new.keys)
        assert torch.equal(both.values[:, :size], old.values) and torch.equal(both.values[:, size:], new.values)
        assert torch.equal(both.constant, old.constant)
        assert old.keys.shape[1] == size


def test_the_reference_writes_its_features_in_the_order_of_the_names(reference_unet, config):
    names = attention_names(config.unet)
    seen: list[tuple[str, Tensor]] = []
    hooks = [
        reference_unet.get_submodule(f"{name}.norm1").register_forward_hook(
            lambda module, inputs, output, name=name: seen.append((name, output[0]))
        )
        for name in names
    ]
    features = reference_unet(torch.randn(1, 12, SIDE, SIDE), torch.randn(10))
    for hook in hooks:
        hook.remove()
    assert [name for name, _ in seen] == names
    assert all(torch.equal(layer, output) for layer, (_, output) in zip(features, seen, strict=True))


def test_the_denoiser_reads_in_the_order_of_the_names(unet, reference_unet, config):
    names, seen = attention_names(config.unet), []
    hooks = [
        unet.get_submodule(f"{name}.norm1").register_forward_hook(lambda *_, name=name: seen.append(name))
        for name in names
    ]
    call(unet, [1], [picture_memory(unet, reference_unet, config.unet, 1)])
    for hook in hooks:
        hook.remove()
    assert seen == names


def test_features_have_the_tokens_and_channels_of_their_resolution(reference_unet):
    features = reference_unet(torch.randn(1, 12, SIDE, SIDE), torch.randn(10))
    # Two resolutions attend, 6x6 and 3x3; the coarsest, 2x2, only in the middle.
    expected = [(36, 8), (9, 16), (4, 24), (9, 16), (9, 16), (36, 8), (36, 8)]
    assert [tuple(layer.shape) for layer in features] == expected


def test_names_of_the_official_model():
    names = attention_names(UNetConfig())
    assert len(names) == 16
    assert names[0] == "down_blocks.0.attentions.0.transformer_blocks.0"
    assert names[5:8] == [
        "down_blocks.2.attentions.1.transformer_blocks.0",
        "mid_block.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.0.transformer_blocks.0",
    ]
    assert names[-1] == "up_blocks.3.attentions.2.transformer_blocks.0"


def test_channels_of_the_official_model():
    assert [plan.layer_channels for plan in down_plans(UNetConfig())] == [
        (320, 320),
        (320, 640),
        (640, 1280),
        (1280, 1280),
    ]
    assert [plan.layer_channels for plan in up_plans(UNetConfig())] == [
        (2560, 2560, 2560),
        (2560, 2560, 1920),
        (1920, 1280, 960),
        (960, 640, 640),
    ]
    assert [plan.resamples for plan in down_plans(UNetConfig())] == ["down", "down", "down", None]
    assert [plan.resamples for plan in up_plans(UNetConfig())] == ["up", "up", "up", None]
    assert [plan.attends for plan in up_plans(UNetConfig())] == [False, True, True, True]


@pytest.mark.parametrize("levels", [(True, True, False), (False, True, False), (True, False, True)])
def test_the_reference_ends_at_the_last_features_without_changing_any(config, levels):
    unet_config = dataclasses.replace(config.unet, attention_levels=levels)
    short = ReferenceUNet(unet_config)
    whole = ReferenceUNet(unet_config)
    whole.up_blocks = Layers([Block(plan, unet_config, None) for plan in up_plans(unet_config)])
    missing, unexpected = whole.load_state_dict(short.state_dict(), strict=False)
    assert missing and not unexpected
    latent, token = torch.randn(1, 12, SIDE, SIDE), torch.randn(10)
    features = short(latent, token)
    assert len(features) == len(attention_names(unet_config))
    for ours, theirs in zip(features, whole(latent, token), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_two_sessions_with_memories_of_different_lengths_equal_two_single_calls(unet, reference_unet, config):
    portraits = [picture_memory(unet, reference_unet, config.unet, seed) for seed in (1, 2)]
    longer = extend_memory(portraits[1], picture_memory(unet, reference_unet, config.unet, 3))
    together = call(unet, [11, 12], [portraits[0], longer])
    assert together.shape == (2, NUM_FRAMES, 12, SIDE, SIDE)
    torch.testing.assert_close(together[:1], call(unet, [11], [portraits[0]]), rtol=0, atol=1e-5)
    torch.testing.assert_close(together[1:], call(unet, [12], [longer]), rtol=0, atol=1e-5)
    without = call(unet, [12], [portraits[1]])
    assert (together[1:] - without).abs().max() > 1e-3


def test_an_empty_memory_leaves_each_frame_its_own_tokens(unet, reference_unet, config):
    full = picture_memory(unet, reference_unet, config.unet, 1)
    empty = tuple(LayerMemory(layer.keys[:, :0], layer.values[:, :0], layer.constant) for layer in full)
    answer = call(unet, [11], [empty])
    assert answer.isfinite().all()
    assert (answer - call(unet, [11], [full])).abs().max() > 1e-3


def test_every_frame_has_its_own_timestep(unet, reference_unet, config):
    """Without temporal modules, a frame's answer depends on no other frame's timestep."""
    alone = copy.deepcopy(unet)
    for module in alone.modules():
        if isinstance(module, TemporalModule):
            module.temporal_transformer.proj_out.weight.zero_()
            module.temporal_transformer.proj_out.bias.zero_()
    memory = picture_memory(unet, reference_unet, config.unet, 1)
    usual = call(alone, [11], [memory])
    changed = call(alone, [11], [memory], torch.tensor([0, 0, 300, 10, 650, 650]))
    assert (changed - usual).abs().amax(dim=(0, 2, 3, 4)).gt(1e-4).tolist() == [False, False, False, True, False, False]


def test_pose_features_enter_behind_the_first_convolution(unet, reference_unet, config):
    memory, shift = picture_memory(unet, reference_unet, config.unet, 1), torch.randn(8)
    moved = copy.deepcopy(unet)
    moved.conv_in.bias.sub_(shift)
    inputs = [torch.randn(1, NUM_FRAMES, *shape) for shape in ((12, SIDE, SIDE), (5, 6), (8, SIDE, SIDE))]
    steps = torch.arange(NUM_FRAMES)
    expected = unet(inputs[0], steps, inputs[1], inputs[2], [memory])
    pose = inputs[2] + shift[:, None, None]
    torch.testing.assert_close(moved(inputs[0], steps, inputs[1], pose, [memory]), expected, rtol=0, atol=1e-5)


def test_a_frame_reads_only_its_own_motion_tokens(config):
    module = MotionModule(8, config.unet, 6)
    x, motion = torch.randn(3, 8, 2, 3), torch.randn(3, 5, 6)
    together = module(x, motion)
    for frame in range(3):
        part = slice(frame, frame + 1)
        torch.testing.assert_close(together[part], module(x[part], motion[part]))
    motion[1] += 1
    changed = (module(x, motion) - together).abs().amax(dim=(1, 2, 3))
    assert changed.gt(1e-4).tolist() == [False, True, False]


def slow_temporal(module: TemporalModule, frames: Tensor, num_heads: int) -> Tensor:
    """A temporal module, pixel by pixel; frames (f, C, h, w), the oldest first. Its positions are counted here."""
    outer, inner = module.temporal_transformer, module.temporal_transformer.transformer_blocks[0]
    num_frames, channels, height, width = frames.shape
    result = frames.clone()
    positions = torch.tensor(
        [
            [(math.cos if i % 2 else math.sin)(frame / 10000 ** ((i - i % 2) / channels)) for i in range(channels)]
            for frame in range(num_frames)
        ]
    )
    normed = F.group_norm(frames, 4, outer.norm.weight, outer.norm.bias, 1e-6)
    for row in range(height):
        for column in range(width):
            tokens = outer.proj_in(normed[:, :, row, column])
            for attention, norm in zip(inner.attention_blocks, inner.norms, strict=True):
                placed = norm(tokens) + positions
                heads = []
                for head in range(num_heads):
                    part = slice(head * channels // num_heads, (head + 1) * channels // num_heads)
                    query, key, value = (
                        layer(placed)[:, part] for layer in (attention.to_q, attention.to_k, attention.to_v)
                    )
                    heads.append((query @ key.T / math.sqrt(key.shape[1])).softmax(dim=-1) @ value)
                tokens = tokens + attention.to_out[0](torch.cat(heads, dim=-1))
            tokens = tokens + inner.ff(inner.ff_norm(tokens))
            result[:, :, row, column] += outer.proj_out(tokens)
    return result


def test_temporal_modules_look_along_time_only_with_positions_from_the_oldest_frame(config):
    module = TemporalModule(8, config.unet)
    windows = torch.randn(2, 5, 8, 2, 3)
    expected = torch.cat([slow_temporal(module, window, 4) for window in windows])
    found = module(rearrange(windows, "b f c h w -> (b f) c h w"), num_frames=5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_modules_that_add_nothing_rest_and_the_answer_stays(config, unet, reference_unet):
    unet = copy.deepcopy(unet)
    temporal = [module for module in unet.modules() if isinstance(module, TemporalModule)]
    assert rest_idle_modules(unet) == 0
    for module in temporal[1:]:
        module.temporal_transformer.proj_out.weight.zero_()
        module.temporal_transformer.proj_out.bias.zero_()
    memory = picture_memory(unet, reference_unet, config.unet, 1)
    inputs = (
        torch.randn(1, NUM_FRAMES, 12, SIDE, SIDE),
        torch.tensor([0, 0, 500, 500, 999, 999]),
        torch.randn(1, NUM_FRAMES, 5, 6),
        torch.randn(1, NUM_FRAMES, 8, SIDE, SIDE),
        [memory],
    )
    working = unet(*inputs)
    assert rest_idle_modules(unet) == len(temporal) - 1
    assert torch.equal(unet(*inputs), working)


def test_a_chunk_causal_frame_sees_its_own_chunk_and_cleaner_ones():
    assert chunk_causal_mask(5, 2).int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


def test_a_chunk_causal_module_answers_a_chunk_as_if_the_noisier_ones_were_not_there(config):
    module = TemporalModule(8, dataclasses.replace(config.unet, chunk_causal=2))
    window = torch.randn(6, 8, 2, 3)
    whole = module(window, num_frames=6)
    for length in (2, 4):
        torch.testing.assert_close(whole[:length], module(window[:length], num_frames=length), rtol=0, atol=1e-5)
    bidirectional = TemporalModule(8, config.unet)
    bidirectional.load_state_dict(module.state_dict())
    assert (bidirectional(window, 6) - whole)[:4].abs().amax((1, 2, 3)).min() > 1e-4


def test_equal_frames_are_told_apart_by_their_age_alone(config):
    module = TemporalModule(8, config.unet)
    still = torch.randn(1, 8, 2, 3).expand(5, -1, -1, -1)
    assert (module(still, 5)[0] - module(still, 5)[4]).abs().max() > 1e-4
    module.positions.zero_()
    torch.testing.assert_close(module(still, 5)[0], module(still, 5)[4])


def test_more_positions_than_frames_change_nothing(unet, reference_unet, config):
    longer = DenoisingUNet(dataclasses.replace(config.unet, max_positions=33), 6)
    longer.load_state_dict(unet.state_dict())
    memory = picture_memory(unet, reference_unet, config.unet, 1)
    torch.testing.assert_close(call(longer, [11], [memory]), call(unet, [11], [memory]), rtol=0, atol=1e-5)
