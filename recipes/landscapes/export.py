"""Write the trained model as a diffusers pipeline folder in float16.

python -m recipes.landscapes.export --autoencoder DIR/autoencoder.pt --denoiser DIR --to FOLDER
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from .networks import make_autoencoder, make_text_encoder, make_unet
from .tokenizer import load_tokenizer, piece_table, write_tokenizer

CARD = Path(__file__).with_name("MODEL_CARD.md")


def make_sampler() -> DDIMScheduler:
    """The default scheduler: DDIM from pure noise; DPM-Solver++ can be made from its configuration."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def split(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of one module of the training checkpoint."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def load_pipeline(autoencoder_path: Path, denoiser_path: Path, tokenizer_folder: Path) -> StableDiffusionPipeline:
    """A float32 pipeline of the averaged weights."""
    tokenizer = load_tokenizer(tokenizer_folder)
    saved = torch.load(denoiser_path, map_location="cpu")["average"]
    unet = make_unet()
    unet.load_state_dict(split(saved, "unet."))
    text_encoder = make_text_encoder(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    text_encoder.load_state_dict(split(saved, "text_encoder."))
    with torch.no_grad():  # every piece of an unknown word reads the same row
        embedding = text_encoder.get_input_embeddings().weight
        embedding.copy_(embedding[piece_table(tokenizer)].clone())
    autoencoder: AutoencoderTiny = make_autoencoder()
    autoencoder.load_state_dict(torch.load(autoencoder_path, map_location="cpu")["weights"])
    return StableDiffusionPipeline(
        vae=autoencoder.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=make_sampler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _edit(path: Path, **entries: str | None) -> None:
    """Set entries of a configuration file; None removes one."""
    config = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}, indent=2) + "\n")


def export(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save next to the folder, then swap it in."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as work:
        fresh = Path(work) / "model"
        pipeline.to(dtype=torch.float16)
        pipeline.save_pretrained(fresh, safe_serialization=True)
        write_tokenizer(fresh / "tokenizer")
        for path in (fresh / "tokenizer").glob("tokenizer.json"):
            path.unlink()
        for path in fresh.rglob("*.safetensors"):  # shared storage and metadata normalised
            save_file({name: weight.contiguous() for name, weight in load_file(path).items()}, path, {"format": "pt"})
            path.chmod(0o644)
        # Loaded without a dtype, every part is float32; transformers would else take the files' own.
        _edit(fresh / "text_encoder" / "config.json", dtype="float32", torch_dtype="float32")
        _edit(fresh / "vae" / "config.json", block_out_channels=None)  # derived, and warned about when given
        shutil.copy(CARD, fresh / "README.md")
        old = Path(work) / "old"
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)


def write_checkpoint(autoencoder_path: Path, denoiser_path: Path, folder: Path) -> None:
    """The state to train on from, without the optimizer: float16 averages (the training starts from them)."""
    for path, name, to in ((autoencoder_path, "weights", "autoencoder.pt"), (denoiser_path, "average", "denoiser.pt")):
        saved = torch.load(path, map_location="cpu")
        small = {key: value for key, value in saved.items() if isinstance(value, int | float)}
        small[name] = {key: value.half() if value.is_floating_point() else value for key, value in saved[name].items()}
        torch.save(small, folder / to)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--denoiser", type=Path, required=True, help="the folder that the denoiser was trained in")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="also write the weights and their average there, float16")
    options = parser.parse_args()
    checkpoint = options.denoiser / "denoiser.pt"
    export(load_pipeline(options.autoencoder, checkpoint, options.denoiser / "tokenizer"), options.to)
    if options.checkpoint:
        options.checkpoint.mkdir(parents=True, exist_ok=True)
        write_checkpoint(options.autoencoder, checkpoint, options.checkpoint)
    size = sum(path.stat().st_size for path in options.to.rglob("*") if path.is_file())
    print(f"{options.to}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
