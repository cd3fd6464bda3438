"""Counted equals predicted: bytes and messages of every strategy, codec and world, by rank, step and kind.

The prediction is of shapes alone; what counts them is the meter of the communicator that sends.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import distrifusion as df
from distrifusion.bench.shapes import SHAPES
from distrifusion.comm import Comm
from distrifusion.forms import CODECS
from distrifusion.geometry import Levels, Split, Window
from distrifusion.models import table_for
from distrifusion.planner import Anatomy, Context, Conv, Crossing, Norm, Traffic, traffic
from distrifusion.planner.words import frame
from distrifusion.strategies.anatomy import anatomy_of, anatomy_of_stages
from models import build, conditioning, latents
from transformers_cross import CROSS
from transformers_joint import JOINT
from transformers_tiny import build as build_transformer
from transformers_video import VIDEO

UNETS = {  # latents, in no even patches
    "time-cond": (19, 13),
    "ddpm": (18, 14),
    "sdxl": (23, 18),
    "sd15": (21, 13),
    "resnet-resample": (20, 24),
}
SMALL = ["time-cond", "ddpm", "flux", "pixart"]
TRANSFORMERS = {**CROSS, **JOINT, **VIDEO}
ROWS, COLS = 7, 5  # tokens

# Of diffusers, by its own Chroma.
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")


def config(**settings: Any) -> df.ParallelConfig:
    return df.ParallelConfig(**{"warmup_steps": 0, **settings})


MIXED = {"context": "1bit", "halo": "fp16"}  # and whole predictions
CONFIGS = [
    *(config(strategy=strategy) for strategy in ("sync", "displaced", "naive")),
    config(strategy="shifted", latents="whole", warmup_steps=2),
    *(config(strategy=strategy, codec=codec) for strategy in ("sync", "displaced") for codec in (*CODECS, MIXED)),
    *(config(group_norm=mode) for mode in ("carried", "stale", "separate", "sync")),
]
WINDOWS = [
    config(strategy=strategy, context_window=window, codec=codec)
    for strategy, window, codec in [
        ("sync", 0.0, None),
        ("displaced", 0.3, None),
        ("sync", 0.5, "1bit"),
        ("displaced", 1.0, "int8"),
        ("displaced", 0.4, {"halo": "int4"}),
    ]
]


def model_and_call(name: str, batch: int) -> tuple[Any, dict[str, Any]]:
    """A model of its own, and the arguments of a call."""
    if name in TRANSFORMERS:
        return build_transformer(TRANSFORMERS[name]), TRANSFORMERS[name].arguments(batch, ROWS, COLS)
    sample = latents(name, batch, *UNETS[name])
    return build(name), {"sample": sample, "timestep": 500, **conditioning(name, batch)}


def counted(name: str, settings: df.ParallelConfig, world: int, batch: int, steps: int) -> list[list[Traffic]]:
    """What each rank sent in each step of a picture."""

    def rank(comm: Comm) -> list[Traffic]:
        model, call = model_and_call(name, batch)
        df.parallelize(model, settings, comm)
        found = []
        for _ in range(steps):
            comm.meter.clear()
            model(**call)
            found.append(Traffic(comm.meter.messages.copy(), comm.meter.bytes.copy()))
        return found

    return df.run_ranks(world, rank, timeout=60)


def predicted(
    model: Any, call: dict[str, Any], settings: df.ParallelConfig, world: int, batch: int, steps: int
) -> list[list[Traffic]]:
    """The same, of shapes alone."""
    is_streamed = settings.strategy == "pipelined"
    anatomy = anatomy_of_stages(model, settings, **call) if is_streamed else anatomy_of(model, **call)
    table = table_for(model)
    dim = 2 if settings.split == "rows" else 3
    weights = settings.weights or (1.0,) * (settings.patches or world // settings.cfg)
    levels = table.levels(*table.size(table.bind((), call)), weights, dim)
    return [
        [traffic(anatomy, levels, settings, rank, batch=batch, step=step) for step in range(steps)]
        for rank in range(world)
    ]


def numbers(said: Traffic) -> tuple[dict[str, int], dict[str, int]]:
    """Without what is not the picture's, and without what is not there."""
    messages, num_bytes = ({k: n for k, n in part.items() if n and k != "control"} for part in vars(said).values())
    return messages, num_bytes


def check(name: str, settings: df.ParallelConfig, world: int, batch: int = 2, steps: int = 3) -> None:
    """Steps of a picture: the first, the first displaced one or the next synchronous one, and one more."""
    given = settings, world, batch, steps
    ranks = zip(counted(name, *given), predicted(*model_and_call(name, batch), *given), strict=True)
    for rank, (found, wanted) in enumerate(ranks):
        for step in range(steps):
            assert numbers(found[step]) == numbers(wanted[step]), f"rank {rank}, step {step}, {settings}"
        if settings.strategy == "displaced":
            assert sum(numbers(found[-1])[0].values()) <= 8 or settings.group_norm == "sync"


@pytest.mark.parametrize("world", [2, 3, 4, 5])
@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_every_configuration_at_every_world(number: int, world: int) -> None:
    """U-Nets and transformers in turn, rows and columns in turn."""
    split: Any = "cols" if (number + world // 2) % 2 else "rows"
    settings = {**vars(CONFIGS[number]), "split": split}
    check(SMALL[(number + world) % len(SMALL)], df.ParallelConfig(**settings), world)


@pytest.mark.parametrize("balance", [(2, 1, 1), (1, 3), (5, 1, 1, 1, 2)])
@pytest.mark.parametrize(("strategy", "codec"), [("sync", None), ("displaced", None), ("displaced", "int8")])
def test_rows_by_weights(balance: Any, strategy: Any, codec: Any) -> None:
    for name, split in (("time-cond", "rows"), ("pixart", "cols")):
        check(name, config(strategy=strategy, codec=codec, balance=balance, split=split), len(balance))


def test_warm_up_steps_are_synchronous() -> None:
    check("time-cond", config(warmup_steps=2, codec="int8"), 2, steps=5)


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("number", range(len(WINDOWS)))
def test_windows(number: int, world: int) -> None:
    settings = {**vars(WINDOWS[number]), "split": "cols" if (number + world) % 2 else "rows"}
    check(["sdxl", "time-cond", "ddpm"][number % 3], df.ParallelConfig(**settings), world)


@pytest.mark.parametrize("name", [*UNETS, *TRANSFORMERS])
def test_every_model(name: str) -> None:
    check(name, config(codec=MIXED, warmup_steps=0), 3, batch=1, steps=2)


@pytest.mark.parametrize("strategy", ["sync", "displaced", "naive"])
@pytest.mark.parametrize(("world", "batch"), [(2, 2), (4, 2), (6, 4), (4, 1)])
def test_the_cfg_split_halves_the_batch(strategy: Any, world: int, batch: int) -> None:
    """A batch of one is computed by both halves, each of which gathers its own."""
    for name in ("time-cond", "pixart"):
        codec = None if strategy == "naive" else "int8"
        check(name, config(strategy=strategy, cfg=2, codec=codec), world, batch)


@pytest.mark.parametrize(
    ("name", "world", "settings"),
    [
        ("flux", 2, {"patches": 3}),
        ("hunyuan", 3, {"patches": 2, "warmup_steps": 1, "split": "cols"}),  # skips beyond the next stage
        ("sd3", 4, {"patches": 4, "cfg": 2}),
        ("wan", 2, {"patches": 5}),
        ("lumina2", 2, {"patches": 2}),
    ],
)
def test_patches_that_stream_through_stages(name: str, world: int, settings: dict[str, Any]) -> None:
    pipe = world // settings.get("cfg", 1)
    check(name, config(strategy="pipelined", pipe=pipe, **settings), world, steps=4)


def test_patches_that_stream_by_hand() -> None:
    """Two tensors over the first link and one over the second: of three pictures, in two patches."""
    anatomy = Anatomy((Crossing(0, (10, 20), 25), Crossing(0, (4, 4), 4), Crossing(1, (10, 20), 25, 2)), channels=4)
    levels = Levels((Split((0, 3, 6)),), (5,))
    settings = config(strategy="pipelined", patches=2, pipe=3, warmup_steps=1)
    output = (3 * 4 * 6 * 5 + 64) * 4 * 2
    for rank, step, boundary, count in [
        (0, 0, 0, 0),  # everyone is told what there is
        (0, 1, 304 + 48, 1),  # whole: 300 and 48 bytes in words of 16
        (0, 2, 0, 0),  # and how large it is in patches
        (0, 3, 128 + 48 + 240 + 48, 2),
        (1, 3, 64 + 128, 2),
        (2, 3, 0, 0),
    ]:
        said = traffic(anatomy, levels, settings, rank, batch=3, step=step)
        assert (said.bytes["boundary"], said.messages["boundary"], said.bytes["output"]) == (boundary, count, output)
    with pytest.raises(df.ConfigError, match="is counted here with patches= and pipe= only"):
        traffic(anatomy, levels, config(strategy="pipelined"), 0)


def test_half_precision_halves_all_but_the_moments() -> None:
    text = conditioning("sd15", 2)["encoder_hidden_states"].bfloat16()
    call = latents("sd15", 2, *UNETS["sd15"]).bfloat16(), 500, text
    anatomy = anatomy_of(build("sd15", torch.bfloat16), *call)
    assert anatomy.item == 2
    for settings in (config(strategy="sync"), config()):

        def rank(comm: Comm, settings: df.ParallelConfig = settings) -> list[Traffic]:
            model = df.parallelize(build("sd15", torch.bfloat16), settings, comm)
            found = []
            for _ in range(3):
                comm.meter.clear()
                model(*call)
                found.append(Traffic(comm.meter.messages.copy(), comm.meter.bytes.copy()))
            return found

        levels = table_for(build("sd15")).levels(*UNETS["sd15"], (1.0,) * 3, 2)
        for r, found in enumerate(df.run_ranks(3, rank)):
            for step, each in enumerate(found):
                assert numbers(each) == numbers(traffic(anatomy, levels, settings, r, batch=2, step=step))


def test_an_anatomy_has_no_size_and_leaves_the_model_as_it_was() -> None:
    small, large = (latents("sdxl", 1, size, size) for size in (16, 40))
    model = build("sdxl")
    before = model(large, 500, **conditioning("sdxl")).sample
    assert anatomy_of(model, small, 500, **conditioning("sdxl")) == anatomy_of(
        model, large, 500, **conditioning("sdxl")
    )
    assert torch.equal(model(large, 500, **conditioning("sdxl")).sample, before)
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())


def test_on_the_meta_device_nothing_is_computed() -> None:
    here = anatomy_of(build("sdxl"), latents("sdxl"), 500, **conditioning("sdxl"))
    text = conditioning("sdxl")
    added = {name: value.to("meta") for name, value in text["added_cond_kwargs"].items()}
    words = {"encoder_hidden_states": text["encoder_hidden_states"].to("meta"), "added_cond_kwargs": added}
    time = torch.tensor(500, device="meta")
    assert anatomy_of(build("sdxl").to("meta"), latents("sdxl").to("meta"), time, **words) == here


def bench_shape(name: str, batch: int) -> tuple[Any, Anatomy]:
    """A real shape, of which nothing is computed and no weight is made."""
    settings = SHAPES[name]
    with torch.device("meta"):
        model = UNet2DConditionModel(**settings)
        pooled = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
        added = {"text_embeds": torch.empty(batch, pooled), "time_ids": torch.empty(batch, 6)}
        text = torch.empty(batch, 7, settings["cross_attention_dim"])
        return model, anatomy_of(model, torch.empty(batch, 4, 16, 16), 500, text, added_cond_kwargs=added)


def test_the_33_m_shape_sends_what_the_documents_say() -> None:
    """docs/codecs.md, which were counted by `bench`: two ranks, 1024 px."""
    model, anatomy = bench_shape("sdxl-mini", 1)
    levels = table_for(model).levels(128, 128, (1.0,) * 2, 2)
    wanted = {None: 24_850_912, "fp16": 12_432_752, "int8": 6_291_952, "int4": 3_203_568, "int2": 1_626_288}
    for codec, num_bytes in {**wanted, "1bit": 854_192}.items():
        assert sum(traffic(anatomy, levels, config(codec=codec), 0, step=2).bytes.values()) == num_bytes


@pytest.mark.parametrize(
    ("name", "batch", "side", "worlds"),
    [("sdxl-mini", 1, 64, (2, 3, 4)), ("sdxl-mini", 1, 128, (2, 4, 8)), ("sdxl", 2, 128, (2, 4, 8))],
)
def test_one_bit_sends_at_most_a_24th_of_all_bytes(name: str, batch: int, side: int, worlds: tuple[int, ...]) -> None:
    """Of float32's, prediction and moments included. And of SDXL, the volume that is known of it."""
    model, anatomy = bench_shape(name, batch)
    for world in worlds:
        levels = table_for(model).levels(side, side, (1.0,) * world, 2)
        for strategy, rank in (("sync", 0), ("displaced", 1)):
            none, bit = (
                sum(traffic(anatomy, levels, settings, rank, batch=batch, step=2).bytes.values())
                for settings in (config(strategy=strategy), config(strategy=strategy, codec="1bit"))
            )
            assert bit <= none / 24
    if name == "sdxl":  # DistriFusion's: 419 M keys and values, of which 8 ranks have an eighth each, for 7 others
        said = traffic(anatomy, levels, config(strategy="sync"), 0, batch=2)
        assert said.bytes["context"] / 4 == pytest.approx(419.4e6 / 8 * 7, rel=1e-3)


def test_by_hand() -> None:
    """A convolution, a norm and an attention on three ranks of 4, 2 and 2 rows of 8, two pictures."""
    wide = Window(3, 1, (1, 1))
    anatomy = Anatomy((Conv(10, 0, 0, (wide, wide)), Norm(4), Context(0, 12)), channels=3)
    levels = Levels((Split((0, 4, 6, 8)),), (5,))
    sync = traffic(anatomy, levels, config(strategy="sync"), 1, batch=2)
    halo = 2 * 10 * 5 * 4  # one row of 5
    assert sync.messages == {"halo": 2, "moments": 1, "context": 1, "output": 1}
    assert sync.bytes == {
        "halo": 2 * halo,
        "moments": 2 * (1 + 2 * 2 * 4) * 4,
        "context": 2 * (2 * 4 * 5 * 12) * 4,  # padded to the 4 rows of rank 0
        "output": 2 * (2 * 3 * 4 * 5 + 64) * 4,
    }
    # 2800 and 408 and 7680 bytes in all go into two chunks: the middle of the last is beyond the half of them.
    late = traffic(anatomy, levels, config(), 0, batch=2, step=2)
    assert late.messages == {"chunk": 3, "output": 1}
    assert late.bytes["chunk"] == halo + 2 * (80 + 2 * 4 * 5 * 12 * 4)
    coded = traffic(anatomy, levels, config(strategy="sync", codec="int8"), 0, batch=2, step=1)
    assert coded.bytes["halo"] == frame((2, 10, 1, 5), "int8") == 16 + 160  # 100 codes, 25 factors: 150, in words
    assert coded.bytes["context"] == 2 * (16 + 592)  # 480 codes and 40 + 12 factors: 584
    assert coded.bytes["moments"] == sync.bytes["moments"]


@pytest.mark.parametrize(("codec", "bits"), [("fp16", 16), ("int8", 8), ("int4", 4), ("int2", 2), ("1bit", 1)])
def test_frames_of_large_values_weigh_what_a_code_does(codec: str, bits: int) -> None:
    assert frame((1, 4096, 2048), codec) == pytest.approx(4096 * 2048 * bits / 8, rel=0.015)


def test_predicting_loads_no_torch() -> None:
    code = "import sys, distrifusion.planner; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
