"""The networks of the model, with every size in one place."""

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

LATENT_CHANNELS = 4
FACTOR = 8  # pixels per latent, each way
AUTOENCODER_WIDTH = 48
TEXT_WIDTH = 192
TEXT_LENGTH = 40


def make_autoencoder() -> AutoencoderTiny:
    """An f8 autoencoder of convolutions alone (no norms: a crop decodes as the whole does), thin at full size."""
    autoencoder = AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(AUTOENCODER_WIDTH,) * 4,
        decoder_block_out_channels=(AUTOENCODER_WIDTH,) * 4,
        num_encoder_blocks=(0, 1, 3, 4),
        num_decoder_blocks=(4, 3, 1, 0),
        scaling_factor=1.0,
    )
    start_from_average(autoencoder)
    return autoencoder


def start_from_average(autoencoder: AutoencoderTiny) -> None:
    """Set the first three channels up as shrunken and blown-up colours, so that training starts from a blurred copy."""
    to_latents = torch.tensor([[4 / 3, 4 / 3, 4 / 3], [4.0, 0.0, -4.0], [-5.0, 10.0, -5.0]])
    mean = torch.tensor([0.45, 0.42, 0.45])
    taps = torch.tensor([1.0, 2.0, 1.0])
    blur, centre = torch.outer(taps, taps) / 16, torch.zeros(3, 3)
    centre[1, 1] = 1
    eye = torch.eye(3)[:, :, None, None]
    with torch.no_grad():
        for network in (autoencoder.encoder, autoencoder.decoder):
            for module in network.modules():
                if isinstance(module, AutoencoderTinyBlock):
                    for tensor in (module.conv[-1].weight, module.conv[-1].bias):
                        tensor *= 0.2
                        tensor[:3] = 0
            plain = [layer for layer in network.layers if isinstance(layer, nn.Conv2d)]
            for index, layer in enumerate(plain):
                edge = index in (0, len(plain) - 1)
                layer.weight[:3] *= 0.1 if edge else 0.0
                layer.weight[:3, :3] = eye * (centre if edge else blur)
                if layer.bias is not None:
                    layer.bias[:3] = 0
        last, first = autoencoder.encoder.layers[-1], autoencoder.decoder.layers[0]
        last.weight[:3, :3] = to_latents[:, :, None, None] * centre
        last.bias[:3] = -to_latents @ mean
        first.weight[:3, :3] = to_latents.inverse()[:, :, None, None] * centre
        first.bias[:3] = mean


def make_unet() -> UNet2DConditionModel:
    """The denoiser: four levels, attention at the two lower ones, no absolute position anywhere."""
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96, 144, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def make_text_encoder(vocabulary: int, start: int, end: int) -> CLIPTextModel:
    """A small causal text encoder in CLIP's shape; `start` and `end` are token numbers, the end also pads."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH * 3,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=TEXT_WIDTH,
            hidden_act="quick_gelu",
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
