import pytest

from cluster.errors import MemberLost, PoolFailed, StageFailed
from cluster.pool import MAX_FAILED_LOADS, give_up
from stages.errors import BadWeights


def test_weights_that_cannot_be_used_end_the_pool_at_once_with_their_own_words() -> None:
    with pytest.raises(PoolFailed, match=r"vae\.safetensors is missing"):
        give_up("decode-0", BadWeights("vae.safetensors is missing"), num_failed=1)


@pytest.mark.parametrize("error", [MemberLost("killed"), StageFailed("RuntimeError: out of memory")])
def test_other_failures_are_tried_again_but_not_for_ever(error: Exception) -> None:
    for num_failed in range(MAX_FAILED_LOADS):
        give_up("decode-0", error, num_failed)
    with pytest.raises(PoolFailed, match=f"decode-0 failed {MAX_FAILED_LOADS} times.*{error}"):
        give_up("decode-0", error, MAX_FAILED_LOADS)
