"""ControlNets run in patches beside the U-Net: the same picture, few messages, nothing gathered between the two."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torch import Tensor

import distrifusion as df
from distrifusion.geometry import Chain, Span, Window
from distrifusion.layers.stem import out_size
from models import distance
from pipelines import (
    ALWAYS_WARM,
    CFG,
    COLS,
    DISPLACED,
    EXACT,
    NUMPY_WARNINGS,
    SYNC,
    check,
    controlnet,
    half_mask,
    picture,
    quiet,
    sample,
    sd,
    sdxl,
    unet,
)

pytestmark = NUMPY_WARNINGS


def one(**more: Any) -> Any:
    return sd(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet(**more))


def two() -> Any:
    nets = MultiControlNetModel([controlnet(seed=3), controlnet(seed=4)])
    return sd(diffusers.StableDiffusionControlNetPipeline, controlnet=nets)


def xl() -> Any:
    return sdxl(diffusers.StableDiffusionXLControlNetPipeline, controlnet=controlnet("sdxl"))


def controlled(pipe: Any, **more: Any) -> Tensor:
    return sample(pipe, **{"image": picture(), "height": ..., "width": ..., **more})


def doubly(pipe: Any, **more: Any) -> Tensor:
    scales = {"controlnet_conditioning_scale": [0.7, 0.4], "control_guidance_end": [1.0, 0.5]}
    return controlled(pipe, image=[picture(1), picture(2)], **scales, **more)


def test_the_condition_changes_the_picture() -> None:
    plain, with_one = sample(sd()), controlled(one())
    assert distance(with_one, plain) > 0.05
    assert distance(controlled(one(), image=picture(9)), with_one) > 0.01


@pytest.mark.parametrize("config", [SYNC, COLS, ALWAYS_WARM], ids=str)
def test_one_controlnet(config: df.ParallelConfig) -> None:
    check(one, controlled, config=config)


def test_a_size_that_does_not_divide_and_five_ranks() -> None:
    check(one, lambda pipe: controlled(pipe, image=picture(height=88, width=56)), worlds=(5,))


def test_several_controlnets() -> None:
    check(two, doubly)


def test_a_controlnet_given_twice_with_two_pictures() -> None:
    def twice() -> Any:
        net = controlnet()
        return sd(diffusers.StableDiffusionControlNetPipeline, controlnet=MultiControlNetModel([net, net]))

    check(twice, doubly, worlds=(2,))

    def kinds(comm: Any) -> list[str]:
        pipe = df.parallelize(twice(), DISPLACED, comm)
        doubly(pipe)
        states = [branch.state.step for branch in pipe.controlnet.nets[0]._distrifusion._pictures._branches]
        assert states == [3, 3]  # one state for each picture, not one for both
        return df.report(pipe).kinds

    assert df.run_ranks(2, kinds) == [["sync", "displaced", "displaced"]] * 2


def test_sdxl() -> None:
    check(xl, controlled)


def guessing(pipe: Any) -> list[Tensor]:
    return [
        controlled(pipe, guess_mode=True, guidance_scale=3.0),
        controlled(pipe, prompt=["a", "b"], image=[picture(1), picture(2)], guess_mode=True, num_inference_steps=2),
        controlled(pipe, guess_mode=True, guidance_scale=1.0, num_inference_steps=2),
    ]


@pytest.mark.parametrize(("config", "worlds"), [(SYNC, (3,)), (ALWAYS_WARM, (2,)), (CFG, (2, 4))], ids=str)
def test_guess_mode(config: df.ParallelConfig, worlds: tuple[int, ...]) -> None:
    check(one, guessing, worlds=worlds, config=config)


def test_guess_mode_is_displaced_too() -> None:
    def rank(comm: Any) -> list[int]:
        pipe = df.parallelize(one(), DISPLACED, comm)
        controlled(pipe, guess_mode=True, num_inference_steps=4)
        return [branch.state.step for branch in pipe.controlnet._distrifusion._pictures._branches]

    assert df.run_ranks(2, rank) == [[4]] * 2


def test_pooled_conditions() -> None:
    def pooled() -> Any:
        return one(pools=True)

    check(pooled, controlled)
    check(pooled, controlled, worlds=(4,), config=CFG)
    # Patches of one row: below the first level some ranks have none, and nothing to pool.
    check(pooled, lambda pipe: controlled(pipe, image=picture(height=16)), worlds=(4,))


def test_pooled_conditions_of_a_naive_patch_are_its_own() -> None:
    naive = df.ParallelConfig(strategy="naive")

    def rank(comm: Any) -> tuple[Tensor, list[int]]:
        pipe = df.parallelize(one(pools=True), naive, comm)
        return controlled(pipe, image=picture(height=16)), df.report(pipe).messages  # some without rows below

    for result, messages in df.run_ranks(4, rank):
        assert result.isfinite().all()
        assert messages == [1, 1, 1]  # the output


@pytest.mark.parametrize("world", [2, 4, 6])
def test_branches_of_guidance_on_separate_ranks(world: int) -> None:
    def calls(pipe: Any) -> list[Tensor]:
        return [controlled(pipe), controlled(pipe, guidance_scale=1.0, num_inference_steps=2)]

    check(one, calls, worlds=(world,), config=CFG)


def test_several_controlnets_and_branches_on_separate_ranks() -> None:
    check(two, doubly, worlds=(4,), config=CFG)


def test_image_to_image_and_inpainting() -> None:
    def refined(pipe: Any) -> Tensor:
        return controlled(pipe, control_image=picture(1), strength=0.8, num_inference_steps=4)

    def painted(pipe: Any) -> Tensor:
        return controlled(pipe, control_image=picture(1), mask_image=half_mask(), strength=0.8, num_inference_steps=4)

    check(lambda: sd(diffusers.StableDiffusionControlNetImg2ImgPipeline, controlnet=controlnet()), refined, worlds=(3,))
    check(
        lambda: sd(diffusers.StableDiffusionControlNetInpaintPipeline, "inpaint", controlnet=controlnet()),
        painted,
        worlds=(3,),
    )


def test_calls_may_differ_in_size_and_batch() -> None:
    def calls(pipe: Any) -> list[Tensor]:
        return [
            controlled(pipe, num_inference_steps=2),
            controlled(pipe, prompt=["a", "b"], image=picture(height=40, width=72), num_inference_steps=2),
            controlled(pipe, num_images_per_prompt=3, guidance_scale=1.0, num_inference_steps=2),
        ]

    check(one, calls, worlds=(3,))
    check(one, calls, worlds=(2,), config=ALWAYS_WARM)


def test_a_held_input_makes_displaced_equal_to_one_device() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 18, 14, generator=generator), torch.randn(2, 9, 12, generator=generator)
    condition = torch.rand(2, 3, 72, 56, generator=generator)

    def step(pipe: Any) -> Tensor:
        timestep = torch.tensor(400)
        down, mid = pipe.controlnet(latents, timestep, text, condition, conditioning_scale=0.8, return_dict=False)
        return pipe.unet(
            latents,
            timestep,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample

    truth = step(one())

    def rank(comm: Any) -> tuple[list[Tensor], Any]:
        pipe = df.parallelize(one(), DISPLACED, comm)
        return [step(pipe) for _ in range(3)], df.report(pipe)

    for world in (2, 3):
        for results, report in df.run_ranks(world, rank):
            assert report.kinds == ["sync", "displaced", "displaced"]
            assert all(distance(result, truth) <= EXACT for result in results)


@pytest.mark.parametrize(("make", "call", "nets"), [(one, controlled, 1), (two, doubly, 2)], ids=["one", "two"])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_a_displaced_step_sends_few_messages(make: Any, call: Any, nets: int, world: int) -> None:
    def rank(comm: Any) -> Any:
        pipe = df.parallelize(make(), DISPLACED, comm)
        call(pipe)
        return df.report(pipe)

    for report in df.run_ranks(world, rank):
        assert report.kinds == ["sync", "displaced", "displaced"]
        # 8 of the U-Net, its output included, and 7 of each ControlNet, which gathers none.
        assert max(report.messages[1:]) <= 8 + 7 * nets
        assert report.messages[0] > 4 * report.messages[1]


def test_the_report_counts_the_controlnet() -> None:
    def rank(comm: Any) -> tuple[int, int]:
        with_one, without = df.parallelize(one(), SYNC, comm), df.parallelize(sd(), SYNC, comm)
        controlled(with_one)
        sample(without)
        reports = df.report(with_one), df.report(without)
        assert [len(report.kinds) for report in reports] == [3, 3]
        return reports[0].messages[-1], reports[1].messages[-1]

    for both, alone in df.run_ranks(2, rank):
        assert both > alone + 5


def test_nothing_is_gathered_between_controlnet_and_unet() -> None:
    seen: dict[int, list[tuple[int, ...]]] = {}

    def rank(comm: Any) -> None:
        pipe = df.parallelize(one(), SYNC, comm)
        net = pipe.controlnet
        down, mid = net(
            torch.ones(1, 4, 18, 14),
            torch.tensor(1),
            torch.ones(1, 9, 12),
            torch.ones(1, 3, 72, 56),
            return_dict=False,
        )
        seen[comm.rank] = [tuple(part.shape[2:]) for part in (*down, mid)]

    df.run_ranks(2, rank)
    assert seen == {0: [(10, 14), (10, 14), (5, 7), (5, 7), (5, 7)], 1: [(8, 14), (8, 14), (4, 7), (4, 7), (4, 7)]}


def test_restore_gives_back_the_controlnets() -> None:
    def rank(comm: Any) -> None:
        pipe = two()
        before = doubly(pipe)
        df.parallelize(pipe, SYNC, comm)
        doubly(pipe)
        df.restore(pipe)
        for net in (*pipe.controlnet.nets, pipe.unet):
            assert not hasattr(net, "_distrifusion")
            assert not any("forward" in module.__dict__ for module in net.modules())
        assert torch.equal(doubly(pipe), before)

    df.run_ranks(2, rank)


def test_restoring_the_unet_restores_what_feeds_it() -> None:
    def rank(comm: Any) -> None:
        pipe = one()
        before = controlled(pipe)
        df.parallelize(pipe, SYNC, comm)
        df.restore(pipe.unet)
        assert torch.equal(controlled(pipe), before)

    df.run_ranks(2, rank)


def test_a_controlnet_that_comes_later_runs_whole_and_gives_the_same_picture() -> None:
    """from_pipe, or a swap: outputs that are whole are cut for the U-Net."""

    def later(pipe: Any) -> Tensor:
        other = diffusers.StableDiffusionControlNetPipeline.from_pipe(
            pipe, controlnet=controlnet(), requires_safety_checker=False
        )
        return controlled(quiet(other))

    check(sd, later, worlds=(2,))

    def swapped(pipe: Any) -> list[Tensor]:
        before = controlled(pipe)
        pipe.controlnet = controlnet(seed=4)
        return [before, controlled(pipe)]

    check(one, swapped, worlds=(3,))


def test_the_pipeline_without_its_controlnet() -> None:
    def without(pipe: Any) -> list[Tensor]:
        plain = quiet(diffusers.StableDiffusionPipeline.from_pipe(pipe, requires_safety_checker=False))
        return [sample(plain), controlled(pipe), sample(plain)]

    check(one, without, worlds=(2,))


def test_the_unet_alone_takes_whole_outputs() -> None:
    def rank(comm: Any) -> Tensor:
        pipe = one()
        df.parallelize(pipe.unet, SYNC, comm)
        return controlled(pipe)

    truth = controlled(one())
    assert all(distance(result, truth) <= EXACT for result in df.run_ranks(2, rank))


def test_a_controlnet_alone_is_refused() -> None:
    def rank(comm: Any) -> None:
        df.parallelize(controlnet(), SYNC, comm)

    with pytest.raises(
        df.UnsupportedModel, match="ControlNetModel is spread together with its U-Net: give the pipeline"
    ):
        df.run_ranks(2, rank)


def test_a_controlnet_without_a_table_runs_whole_and_is_named() -> None:
    class Traced(diffusers.ControlNetModel):
        pass

    def traced() -> Any:
        net = controlnet()
        net.__class__ = Traced
        return sd(diffusers.StableDiffusionControlNetPipeline, controlnet=net)

    check(traced, controlled, worlds=(2,))

    def rank(comm: Any) -> list[str]:
        pipe = df.parallelize(traced(), SYNC, comm)
        controlled(pipe)
        return df.report(pipe).notes

    assert df.run_ranks(2, rank) == [["Traced runs whole on every rank"]] * 2


def test_beside_one_without_a_table_all_run_whole() -> None:
    """Their outputs are added up, and a patch and a whole cannot be."""

    class Traced(diffusers.ControlNetModel):
        pass

    def mixed() -> Any:
        nets = [controlnet(seed=3), controlnet(seed=4)]
        nets[1].__class__ = Traced
        return sd(diffusers.StableDiffusionControlNetPipeline, controlnet=MultiControlNetModel(nets))

    def rank(comm: Any) -> list[str]:
        pipe = df.parallelize(mixed(), SYNC, comm)
        doubly(pipe)
        return df.report(pipe).notes

    check(mixed, doubly, worlds=(2,))
    notes = ["ControlNetModel runs whole on every rank", "Traced runs whole on every rank"]
    assert df.run_ranks(2, rank) == [notes] * 2


def test_an_unknown_module_in_a_controlnet_is_named_and_nothing_stays_changed() -> None:
    class Blur(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    def rank(comm: Any) -> None:
        pipe = one()
        pipe.controlnet.down_blocks[0].resnets[0].nonlinearity = Blur()
        with pytest.raises(df.UnsupportedModel, match=r"down_blocks.0.resnets.0.nonlinearity \(Blur\) is not known"):
            df.parallelize(pipe, SYNC, comm)
        for net in (pipe.controlnet, pipe.unet):
            assert not hasattr(net, "_distrifusion")
            assert not any("forward" in module.__dict__ for module in net.modules())

    df.run_ranks(2, rank)


def test_a_condition_of_the_wrong_size_is_named() -> None:
    def rank(comm: Any) -> None:
        pipe = df.parallelize(one(), SYNC, comm)
        pipe.controlnet(torch.ones(1, 4, 16, 16), torch.tensor(1), torch.ones(1, 9, 12), torch.ones(1, 3, 32, 64))

    with pytest.raises(df.ConfigError, match="makes 8 x 16 of its picture and the latent is 16 x 16"):
        df.run_ranks(2, rank)


def test_a_residual_that_fits_nothing_is_named() -> None:
    """Of half the height, which a patch would have too: only a ControlNet that ran in patches may hand one over."""

    def rank(comm: Any) -> None:
        pipe = df.parallelize(sd(), SYNC, comm)
        down = [torch.ones(1, channels, 8, 16) for channels in (8, 8)]
        pipe.unet(
            torch.ones(1, 4, 16, 16),
            torch.tensor(1),
            torch.ones(1, 9, 12),
            down_block_additional_residuals=down,
            mid_block_additional_residual=torch.ones(1, 16, 8, 8),
        )

    with pytest.raises(df.UnsupportedModel, match=r"\(1, 8, 8, 16\) does not fit level 0, which is 16 x 16"):
        df.run_ranks(2, rank)


@pytest.mark.parametrize("size", [32, 37, 44])
def test_a_stem_reads_what_its_rows_need(size: int) -> None:
    torch.manual_seed(0)
    shapes = [(3, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 1)]
    windows = [Window(kernel, stride, (pad, pad)) for kernel, stride, pad in shapes]
    convs = [torch.nn.Conv1d(1, 1, kernel, stride, pad, bias=False) for kernel, stride, pad in shapes]

    def made(x: Tensor) -> Tensor:
        for conv in convs:
            x = conv(x)
        return x

    x = torch.randn(1, 1, size)
    assert made(x).shape[-1] == out_size(windows, size)
    for row in range(out_size(windows, size)):
        needed = Chain(tuple(windows)).reads(Span(row, row + 1)) & Span(0, size)
        other = torch.randn(1, 1, size)
        other[..., needed.start : needed.stop] = x[..., needed.start : needed.stop]
        assert torch.equal(made(other)[..., row], made(x)[..., row])
        for edge in (needed.start, needed.stop - 1):
            other = x.clone()
            other[..., edge] += 10
            assert not torch.equal(made(other)[..., row], made(x)[..., row])


def test_prototypes_are_not_shared() -> None:
    assert unet("sd").conv_in.weight.data_ptr() != unet("sd").conv_in.weight.data_ptr()
