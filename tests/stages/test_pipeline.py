"""Loading stages, and all four of them one after another."""

from __future__ import annotations

import copy
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from stages.errors import BadConfig, BadPortrait, BadWeights
from stages.networks.motion_encoder import PatchEmbed
from stages.official import LICENCE
from stages.pipeline import STAGE_NETWORKS, Stages, animate, load_networks, load_stages, network_dtype, runs_bfloat16
from stages.portraits import bundled_portraits, load_portrait
from stages.weights import NETWORKS, save_folder

NUM_CALLS = 5


@pytest.fixture
def copied(folder, tmp_path):
    """A folder that a test may damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def frames_of(stages: Stages, portrait, chunks, seed: int) -> np.ndarray:
    return np.stack(list(animate(stages, portrait, chunks, seed)))


def test_every_network_belongs_to_a_stage():
    assert {name for names in STAGE_NETWORKS.values() for name in names} == set(NETWORKS)


@pytest.mark.parametrize("stage", STAGE_NETWORKS)
def test_a_stage_loads_its_own_networks_alone(copied, stage):
    for name in NETWORKS.keys() - set(STAGE_NETWORKS[stage]):
        (copied / f"{name}.safetensors").unlink()
    loaded = load_stages(str(copied), [stage], device="cpu", num_threads=1)
    assert {name for name in STAGE_NETWORKS if getattr(loaded, name) is not None} == {stage}
    assert loaded.config == getattr(loaded, stage).config
    for other in STAGE_NETWORKS.keys() - {stage, "decode"}:
        with pytest.raises(BadWeights, match="is missing"):
            load_stages(str(copied), [other], device="cpu", num_threads=1)


def test_stages_get_their_networks_in_the_right_places(stages, tensors):
    for stage, names in STAGE_NETWORKS.items():
        for name in names:
            state = getattr(getattr(stages, stage), name).state_dict()
            assert state.keys() == tensors[name].keys()
            assert all(torch.equal(tensor, tensors[name][key]) for key, tensor in state.items())


def test_stages_of_one_process_share_their_vae(stages):
    assert stages.reference.vae is stages.decode.vae


def test_weights_are_run_in_fp32_on_the_cpu_however_they_are_stored(tmp_path, tensors, config):
    half = {key: tensor.half() for key, tensor in tensors["vae"].items()}
    save_folder(tmp_path, config, {"vae": half})
    vae = load_stages(str(tmp_path), ["decode"], device="cpu", num_threads=1).decode.vae
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def coarse(config, tensors, tmp_path_factory) -> Stages:
    """The small model in bfloat16, where this CPU multiplies it."""
    path = tmp_path_factory.mktemp("coarse")
    save_folder(path, replace(config, cpu_bfloat16=True), tensors)
    return load_stages(str(path), device="cpu", num_threads=1)


def dtypes(network: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in network.state_dict().values() if tensor.is_floating_point()}


def test_bfloat16_is_taken_where_config_and_processor_say_so(config, coarse):
    cpu, wished = torch.device("cpu"), replace(config, cpu_bfloat16=True)
    fast = torch.bfloat16 if runs_bfloat16() else torch.float32
    assert (network_dtype(config, cpu), network_dtype(wished, cpu)) == (torch.float32, fast)
    assert network_dtype(wished, torch.device("cuda")) == torch.float16
    assert dtypes(coarse.denoise.denoising_unet) == dtypes(coarse.motion.motion_encoder) == {fast}
    extractor = coarse.motion.keypoint_extractor
    assert {dtype for part in extractor.trunk() for dtype in dtypes(part)} == {fast}
    assert dtypes(extractor.fc_pitch) == dtypes(extractor.norm) == {torch.float32}


def test_a_session_is_kept_in_fp32_whatever_the_networks_run_in(coarse, draw_picture, draw_chunks):
    portrait = draw_picture(1)
    motion = coarse.motion.open(portrait)
    state = coarse.denoise.open(coarse.reference.open(portrait), motion.portrait_tokens, 5)
    for frames in draw_chunks(1, 2):
        [(motion, chunk)] = coarse.motion.run([motion], [frames])
        [(state, clean, _)] = coarse.denoise.run([state], [chunk])
        kept = (state.latents, state.tokens, state.bank, state.portrait, state.image_token)
        assert {tensor.dtype for tensor in kept} == {torch.float32}
        # A network's answer has eight bits; the latents, stepped from it, have more.
        assert not torch.equal(state.latents, state.latents.bfloat16().float())
        assert chunk.tokens.dtype == clean.latents.dtype == np.float32
    restored = coarse.denoise.restore(coarse.reference.open(portrait), [], coarse.denoise.snapshot(state))
    assert torch.equal(restored.latents, state.latents) and torch.equal(restored.bank, state.bank)


def test_in_bfloat16_sessions_go_through_the_extractor_one_after_another(coarse, draw_picture, draw_chunks):
    states = [coarse.motion.open(draw_picture(seed)) for seed in (1, 2)]
    sizes: list[int] = []
    hook = coarse.motion.keypoint_extractor.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    coarse.motion.run(states, [next(iter(draw_chunks(seed, 1))) for seed in (1, 2)])
    hook.remove()
    assert sizes == ([2, 2] if runs_bfloat16() else [4])


def test_frames_in_bfloat16_are_nearly_those_in_fp32(stages, coarse, draw_picture, draw_chunks):
    portrait, chunks = draw_picture(1), draw_chunks(1, NUM_CALLS)
    exact, ours = (frames_of(made, portrait, chunks, 5).astype(int) for made in (stages, coarse))
    assert np.abs(ours - exact).mean() < 3


def wrong_layers(network: nn.Module, max_error: float) -> tuple[list[str], list[str]]:
    """Lists that fill as the network runs: names of its layers, and of those that are off by more than `max_error`
    of what they give in fp32."""
    names: list[str] = []
    wrong: list[str] = []

    def watch(name: str, layer: nn.Module) -> None:
        exact = copy.deepcopy(layer).float()

        def compare(_layer: nn.Module, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
            expected = exact(*(part.float() for part in given))
            names.append(name)
            if (result - expected).norm() > max_error * expected.norm() + 1e-6:
                wrong.append(name)

        layer.register_forward_hook(compare)

    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.GroupNorm | nn.LayerNorm | nn.BatchNorm2d | PatchEmbed):
            watch(name, layer)
    return names, wrong


@pytest.mark.skipif(not runs_bfloat16(), reason="this CPU does not multiply bfloat16")
def test_no_layer_of_the_bundled_model_is_far_off_in_bfloat16():
    stages = load_stages(device="cpu", num_threads=1)
    parts = [(stage, name) for stage, names in STAGE_NETWORKS.items() for name in names]
    networks = {name: getattr(getattr(stages, stage), name) for stage, name in parts}
    watched = [wrong_layers(network, 0.02) for network in networks.values()]
    portrait = load_portrait(next(iter(bundled_portraits().values())).read_bytes(), stages.config.size_px)
    for _ in animate(stages, portrait, [np.repeat(portrait[None], stages.config.window.chunk_frames, 0)] * 4, 0):
        pass
    for names, wrong in watched:
        assert names and not wrong


def test_the_number_of_threads_is_set(folder):
    load_stages(str(folder), ["decode"], device="cpu", num_threads=2)
    assert torch.get_num_threads() == 2
    load_stages(str(folder), ["decode"], device="cpu", num_threads=1)
    assert torch.get_num_threads() == 1


def test_the_licence_of_given_weights_is_told(folder, caplog):
    with caplog.at_level(logging.WARNING):
        load_stages(str(folder), ["decode"], device="cpu", num_threads=1)
    assert str(folder) in caplog.text and "Licence: for tests only" in caplog.text


def test_the_bundled_weights_need_no_warning(caplog):
    with caplog.at_level(logging.WARNING):
        load_stages("tiny", ["decode"], device="cpu", num_threads=1)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["none", "config.json"])
def test_an_unknown_folder_is_refused(folder, name):
    with pytest.raises(BadWeights, match=rf"{name} does not exist: give a folder, or `tiny`"):
        load_stages(str(folder / name), device="cpu", num_threads=1)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(BadConfig, match=r"config\.json is missing"):
        load_stages(str(tmp_path), device="cpu", num_threads=1)


def test_an_official_folder_is_loaded_as_it_is(write_official, official_tensors):
    config, networks = load_networks(str(write_official()), ["vae", "reference_unet"])
    assert (config.size_px, config.licence) == (512, LICENCE)
    for name, network in networks.items():
        state = network.state_dict()
        assert all(torch.equal(tensor, official_tensors[name][key]) for key, tensor in state.items())


def test_a_folder_in_the_home_directory_is_found(copied, monkeypatch):
    monkeypatch.setenv("HOME", str(copied.parent))
    assert load_networks("~/copy", ["vae"])[0].name == "small"


def test_one_chunk_comes_out_for_each_that_goes_in(stages, draw_picture, draw_chunks):
    made = animate(stages, draw_picture(1), iter(draw_chunks(0, NUM_CALLS)), seed=3)
    frames = list(made)
    assert [(chunk.shape, chunk.dtype) for chunk in frames] == [((2, 48, 48, 3), np.uint8)] * NUM_CALLS


def test_a_chunk_comes_out_before_the_next_goes_in(stages, draw_picture, draw_chunks):
    taken = []

    def chunks():
        for number, chunk in enumerate(draw_chunks(0, NUM_CALLS)):
            taken.append(number)
            yield chunk

    for number, _ in enumerate(animate(stages, draw_picture(1), chunks(), seed=3)):
        assert taken == list(range(number + 1))


def test_frames_follow_from_portrait_chunks_and_seed(keyframe_stages, draw_picture, draw_chunks):
    portrait, chunks = draw_picture(1), draw_chunks(0, NUM_CALLS)
    first = frames_of(keyframe_stages, portrait, chunks, 3)
    assert np.array_equal(first, frames_of(keyframe_stages, portrait, chunks, 3))
    for other in (
        frames_of(keyframe_stages, portrait, chunks, 4),
        frames_of(keyframe_stages, draw_picture(2), chunks, 3),
        frames_of(keyframe_stages, portrait, draw_chunks(1, NUM_CALLS), 3),
    ):
        assert all((one != two).any() for one, two in zip(first, other, strict=True))


def test_later_driving_chunks_do_not_change_earlier_frames(stages, draw_picture, draw_chunks):
    chunks = draw_chunks(0, NUM_CALLS)
    whole = frames_of(stages, draw_picture(1), chunks, 3)
    assert np.array_equal(frames_of(stages, draw_picture(1), chunks[:3], 3), whole[:3])
    replaced = [*chunks[:3], *draw_chunks(1, 2)]
    assert np.array_equal(frames_of(stages, draw_picture(1), replaced, 3)[:3], whole[:3])


def test_animating_is_the_four_stages_with_keyframes_before_the_next_call(keyframe_stages, draw_picture, draw_chunks):
    stages, portrait, chunks = keyframe_stages, draw_picture(1), draw_chunks(0, NUM_CALLS)
    features, state = stages.reference.open(portrait), stages.motion.open(portrait)
    window = stages.denoise.open(features, state.portrait_tokens, 3)
    expected, num_keyframes = [], 0
    for chunk in chunks:
        [(state, motion)] = stages.motion.run([state], [chunk])
        [(window, clean, keyframe)] = stages.denoise.run([window], [motion])
        if keyframe is not None:
            window = stages.denoise.add_keyframe(window, stages.reference.keyframe(keyframe))
            num_keyframes += 1
        expected += stages.decode.run([clean])
    assert num_keyframes == 2
    assert np.array_equal(frames_of(stages, portrait, chunks, 3), np.stack(expected))


def test_keyframes_change_the_frames_after_them(stages, keyframe_stages, draw_picture, draw_chunks):
    portrait, chunks = draw_picture(1), draw_chunks(0, NUM_CALLS)
    without, with_keyframes = (frames_of(made, portrait, chunks, 3) for made in (stages, keyframe_stages))
    # The second chunk to leave gives the first keyframe.
    assert np.array_equal(without[:2], with_keyframes[:2])
    assert (without[2:] != with_keyframes[2:]).any(axis=(1, 2, 3, 4)).all()


def test_nothing_is_made_of_a_portrait_without_a_face(stages, draw_picture, draw_chunks):
    with pytest.raises(BadPortrait):
        next(animate(stages, np.zeros_like(draw_picture(1)), draw_chunks(0, 1), 3))


def test_the_bundled_model_finds_a_face_in_every_bundled_portrait():
    motion = load_stages("tiny", ["motion"], device="cpu", num_threads=1).motion
    assert len(bundled_portraits()) >= 2
    for path in bundled_portraits().values():
        assert motion.open(load_portrait(path.read_bytes(), 256)).portrait_tokens.shape == (16, 16)
