"""What evaluations ask of a network: its width, its tokens."""

import pytest
import torch
from evaluation_tools import timm_network, tiny_network

from dino_lightning.errors import UserError
from dino_lightning.models.tokens import last_blocks, linear_features, patch_size, patch_tokens


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "efficientnet_b0", "test_vit"])
def test_width_is_that_of_the_features(name: str) -> None:
    network = timm_network(name, **({"img_size": 32} if "vit" in name else {}))
    assert network.backbone(torch.zeros(2, 3, 32, 32)).shape == (2, network.width)


def test_the_last_block_equals_the_output_of_the_network() -> None:
    network, images = tiny_network(depth=3), torch.randn(2, 3, 32, 32)
    blocks = last_blocks(network.backbone, images, n=2)
    assert len(blocks) == 2
    assert torch.equal(blocks[-1][:, 0], network.backbone(images))
    assert not torch.equal(blocks[0], blocks[1])


def test_patch_tokens_have_the_layout_of_the_patches() -> None:
    network, images = tiny_network(), torch.randn(1, 3, 32, 48)
    tokens = patch_tokens(network.backbone, images)
    assert tokens.shape == (1, 4, 6, 32)
    assert torch.equal(tokens.flatten(1, 2), last_blocks(network.backbone, images, n=1)[0][:, 1:])


def test_maps_of_convolutional_networks() -> None:
    network, images = timm_network("resnet18"), torch.randn(1, 3, 64, 96)
    maps = patch_tokens(network.backbone, images)
    assert maps.shape == (1, 2, 3, 512)
    torch.testing.assert_close(maps.mean(dim=(1, 2)), network.backbone(images))


def test_too_many_blocks_are_refused() -> None:
    images = torch.zeros(1, 3, 32, 32)
    with pytest.raises(UserError, match="eval.n_last_blocks=3: the network has 2 blocks"):
        last_blocks(tiny_network().backbone, images, n=3)
    with pytest.raises(UserError, match="eval.n_last_blocks=4 eval.avgpool=false: ResNet has no class token"):
        linear_features(timm_network("resnet18").backbone, images, n_last_blocks=4, avgpool=False)
    with pytest.raises(UserError, match="ResNet has no patches"):
        patch_size(timm_network("resnet18").backbone)
