"""Batches on a GPU: bytes come through pinned memory, and are the images that a CPU gets."""

import torch

from realuid_fast import data
from realuid_fast.train.batches import Batches

from ..data.test_packed import write


def test_images_on_disk_arrive_as_on_a_cpu(tmp_path):
    write(tmp_path, train=40)
    dataset = data.packed(tmp_path)
    device = torch.device("cuda")
    there, here = Batches(dataset, 8, 0, device), Batches(dataset, 8, 0, torch.device("cpu"))
    for _ in range(20):
        (x, labels), (expected, own) = there.next(), here.next()
        assert x.device.type == labels.device.type == "cuda"
        # u / 127.5 - 1 in float32, whose division may round otherwise.
        torch.testing.assert_close(x.cpu(), expected, rtol=0, atol=2e-7)
        assert torch.equal(labels.cpu(), own)
    assert there._ahead[0][0].result().is_pinned()


def test_coins_of_a_resumed_run_fall_as_before(tmp_path):
    write(tmp_path, train=40)
    dataset = data.load({"name": "packed", "path": str(tmp_path), "flip": True})
    draws = torch.Generator("cuda").manual_seed(3)
    batches = Batches(dataset, 8, 0, torch.device("cuda"), draws)
    batches.next()
    state, coins = batches.state_dict(), draws.get_state()
    straight = [batches.next()[0] for _ in range(6)]
    resumed = Batches(dataset, 8, 1, torch.device("cuda"), draws)
    resumed.load_state_dict(state)
    draws.set_state(coins)
    assert all(torch.equal(resumed.next()[0], x) for x in straight)
