"""The shared building blocks against formulas written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from stages.networks.layers import (
    GEGLU,
    MAX_WRITTEN_OUT_KEYS,
    Attention,
    Downsample,
    FeedForward,
    ResnetBlock,
    TimeEmbedding,
    Upsample,
    attend,
    merge_heads,
    split_heads,
    temporal_positions,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def test_heads_are_consecutive_channels_and_merge_back():
    x = torch.randn(2, 3, 8)
    parts = split_heads(x, 4)
    assert parts.shape == (2, 4, 3, 2)
    assert torch.equal(parts[1, 2, 0], x[1, 0, 4:6])
    assert torch.equal(merge_heads(parts), x)


def test_attention_is_a_softmax_over_scaled_products_per_head():
    attention = Attention(12, 7, 3)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 4, 7)
    expected = torch.empty(2, 5, 12)
    query, key, value = attention.to_q(x), attention.to_k(context), attention.to_v(context)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = (query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(4)).softmax(dim=-1)
        expected[..., part] = weights @ value[..., part]
    torch.testing.assert_close(attention(x, context), attention.to_out[0](expected))


@pytest.mark.parametrize("num_keys", [5, MAX_WRITTEN_OUT_KEYS, MAX_WRITTEN_OUT_KEYS + 1])
def test_attention_in_bfloat16_is_that_of_fp32_rounded(num_keys):
    query, key, value = (torch.randn(2, 3, count, 8).bfloat16() for count in (7, num_keys, num_keys))
    exact = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    ours = attend(query, key, value)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), exact, rtol=0, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_are_not_seen_might_as_well_not_be_there(dtype):
    query, key, value = (torch.randn(2, 3, count, 8).to(dtype) for count in (4, 6, 6))
    seen = torch.zeros(4, 6, dtype=torch.bool)
    seen[:, 1], seen[:, 4] = True, True
    ours = attend(query, key, value, seen)
    expected = attend(query, key[:, :, [1, 4]], value[:, :, [1, 4]])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)


def test_queries_keys_and_values_have_no_bias_and_the_output_has():
    names = set(Attention(12, 7, 3).state_dict())
    assert names == {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"}


def test_geglu_gates_the_first_half_by_the_exact_gelu_of_the_second():
    layer = GEGLU(3, 2)
    x = torch.randn(5, 3)
    wide = layer.proj(x)
    gelu = wide[:, 2:] * 0.5 * (1 + torch.erf(wide[:, 2:] / math.sqrt(2)))
    torch.testing.assert_close(layer(x), wide[:, :2] * gelu)


def test_feed_forward_widens_four_times_and_keeps_the_checkpoints_places():
    feed_forward = FeedForward(6)
    shapes = {name: tuple(tensor.shape) for name, tensor in feed_forward.state_dict().items()}
    assert shapes == {
        "net.0.proj.weight": (48, 6),
        "net.0.proj.bias": (48,),
        "net.2.weight": (6, 24),
        "net.2.bias": (6,),
    }
    x = torch.randn(2, 6)
    torch.testing.assert_close(feed_forward(x), feed_forward.net[2](feed_forward.net[0](x)))


@pytest.mark.parametrize("out_channels", [8, 12])
def test_resnet_adds_the_time_between_its_convolutions(out_channels):
    block = ResnetBlock(8, out_channels, 5, num_groups=4, eps=1e-3)
    for parameter in block.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    x, time = torch.randn(2, 8, 3, 4), torch.randn(2, 5)
    inner = block.conv1(F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias, 1e-3)))
    inner = inner + block.time_emb_proj(time)[:, :, None, None]
    inner = block.conv2(F.silu(F.group_norm(inner, 4, block.norm2.weight, block.norm2.bias, 1e-3)))
    shortcut = x if out_channels == 8 else F.conv2d(x, block.conv_shortcut.weight, block.conv_shortcut.bias)
    torch.testing.assert_close(block(x, time), inner + shortcut)


def test_a_resnet_without_time_has_no_time_weights():
    block = ResnetBlock(8, 8, None, num_groups=4)
    assert not any("time" in name or "shortcut" in name for name in block.state_dict())
    assert block(torch.randn(1, 8, 3, 4)).shape == (1, 8, 3, 4)


def test_downsampling_pads_all_sides_so_that_odd_sizes_round_up():
    layer = Downsample(2)
    x = torch.randn(1, 2, 5, 6)
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1)), layer.conv.weight, layer.conv.bias, stride=2)
    assert expected.shape == (1, 2, 3, 3)
    torch.testing.assert_close(layer(x), expected)


def test_upsampling_repeats_pixels_up_to_the_size_that_the_skip_has():
    layer = Upsample(1)
    layer.conv.weight.zero_()
    layer.conv.weight[0, 0, 1, 1] = 1
    layer.conv.bias.fill_(10)
    grown = layer(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), (3, 4))
    assert grown[0, 0].tolist() == [[11, 11, 12, 12], [11, 11, 12, 12], [13, 13, 14, 14]]


def test_time_embedding_has_cosines_before_sines():
    embedding = TimeEmbedding(6, 10)
    steps = [0, 333, 999]
    waves = [
        [wave(step * math.exp(-math.log(10000) * i / 3)) for wave in (math.cos, math.sin) for i in range(3)]
        for step in steps
    ]
    expected = embedding.linear_2(F.silu(embedding.linear_1(torch.tensor(waves))))
    torch.testing.assert_close(embedding(torch.tensor(steps)), expected, rtol=0, atol=1e-4)


def test_time_embedding_has_the_precision_of_its_weights():
    embedding = TimeEmbedding(6, 10).double()
    assert embedding(torch.tensor([3])).dtype == torch.float64


def test_temporal_positions_alternate_sine_and_cosine():
    table = temporal_positions(7, 10)
    expected = [
        [(math.cos if i % 2 else math.sin)(position / 10000 ** ((i - i % 2) / 10)) for i in range(10)]
        for position in range(7)
    ]
    torch.testing.assert_close(table, torch.tensor(expected))


def test_temporal_positions_are_computed_also_while_a_network_is_built_without_memory():
    with torch.device("meta"):
        table = temporal_positions(3, 4)
    assert torch.equal(table, temporal_positions(3, 4))
