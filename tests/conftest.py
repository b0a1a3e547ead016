"""What holds for every test."""

import os
import sys

import pytest

NUM_THREADS = int(os.environ.get("OMP_NUM_THREADS", 0))


@pytest.fixture(autouse=True)
def threads_as_they_were():
    """Commands that are tested in this process choose torch's threads. The tests after them shall not have more than
    `make test` gives to each of its processes, or all of them wait for each other."""
    yield
    if NUM_THREADS and (torch := sys.modules.get("torch")):
        torch.set_num_threads(NUM_THREADS)


@pytest.fixture(scope="session")
def find_faces():
    """find_faces(extractor, share): makes a random keypoint extractor find a face in the middle of everything. By the
    share of its last weights that is left, what it sees still moves that face a little."""

    def made(extractor, share):
        import torch

        from training.world import canonical_keypoints, sample_identity

        with torch.no_grad():
            for layer in (extractor.fc_kp, extractor.fc_t, extractor.fc_scale):
                layer.weight.mul_(share)
                layer.bias.zero_()
            extractor.fc_kp.bias.copy_(torch.from_numpy(canonical_keypoints(sample_identity(1)).flatten()))
            extractor.fc_scale.bias.fill_(0.6)

    return made
