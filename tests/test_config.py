"""The configuration says what is wrong with it, in one line that names the value."""

import dataclasses

import pytest

from distrifusion import ConfigError, DistrifusionError, ParallelConfig


def test_the_defaults_are_the_papers() -> None:
    assert dataclasses.asdict(ParallelConfig()) == {
        "strategy": "displaced",
        "cfg": 1,
        "patch": None,
        "split": "rows",
        "warmup_steps": 4,
        "group_norm": "corrected",
        "codec": None,
        "context_window": None,
        "text_encoders": "once",
        "balance": None,
        "topology": "plane",
        "shift": None,
        "shift_seed": 0,
        "overlap": 0,
        "latents": "rows",
        "remember": True,
        "pipe": None,
        "patches": None,
        "blocks": None,
        "max_memory": None,
        "stride": 1,
        "time_shift": False,
        "cuda_graphs": False,
    }


@pytest.mark.parametrize("strategy", ["sync", "displaced", "naive"])
@pytest.mark.parametrize("split", ["rows", "cols"])
@pytest.mark.parametrize("group_norm", ["corrected", "carried", "stale", "separate", "sync"])
def test_every_choice_is_accepted(strategy: str, split: str, group_norm: str) -> None:
    config = ParallelConfig(strategy=strategy, split=split, group_norm=group_norm, cfg=2, patch=3, warmup_steps=0)
    asked = f"strategy={strategy} cfg=2 patch=3 split={split} warmup_steps=0 group_norm={group_norm}"
    assert str(config) == asked


def test_what_ranks_must_agree_on_is_in_the_text_of_stages() -> None:
    """Two configurations that run differently must not read alike: ranks compare the texts."""
    asked = {}, {"patch": 2}, {"patch": 2, "split": "cols"}, {"patch": 2, "balance": (2, 1)}, {"stride": 2}, {"pipe": 2}
    asked += ({"time_shift": True},)
    texts = [str(ParallelConfig(strategy="pipelined", **settings)) for settings in asked]
    assert len(set(texts)) == len(asked)
    assert texts[2] == "strategy=pipelined cfg=1 pipe=all patch=2 split=cols warmup_steps=4"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategy": "fast"}, r"strategy='fast' must be one of 'sync', 'displaced', 'naive'"),
        ({"strategy": None}, r"strategy=None must be one of"),
        (
            {"strategy": "pipelined", "patch": 2, "patches": 4},
            r"patch=2 does not go with patches=4, which stream through stages of one rank each",
        ),
        ({"strategy": "sync", "stride": 2}, r"stride=2 goes with strategy='pipelined' only, not with 'sync'"),
        ({"strategy": "pipelined", "stride": 3}, r"stride=3 must be 1 or 2"),
        ({"strategy": "pipelined", "stride": 2, "patch": 2}, r"stride=2 does not go with patch=2: it is for stages"),
        (
            {"strategy": "pipelined", "stride": 2, "patches": 1},
            r"stride=2 does not go with patches=1: it",
        ),
        ({"strategy": "pipelined", "stride": 2, "pipe": 1}, r"stride=2 takes two ranks for the last stage"),
        ({"strategy": "sync", "time_shift": True}, r"time_shift=True goes with strategy='pipelined' only, not with"),
        ({"strategy": "pipelined", "time_shift": 1}, r"time_shift=1 must be True or False"),
        (
            {"strategy": "pipelined", "time_shift": True, "patches": 4},
            r"time_shift=True does not go with patches=4, which stream",
        ),
        ({"strategy": "pipelined", "time_shift": True, "pipe": 1}, r"time_shift=True is about .* pipe must be at lea"),
        ({"strategy": "sync", "pipe": 2}, r"pipe=2 goes with strategy='pipelined' only, not with 'sync'"),
        ({"strategy": "pipelined", "pipe": 0}, r"pipe=0 must be a whole number of at least 1"),
        (
            {"strategy": "pipelined", "codec": "int8"},
            r"codec='int8' does nothing under strategy='pipelined', which sends outputs of blocks",
        ),
        (
            {"strategy": "pipelined", "balance": (2, 1)},
            r"balance='2,1' are weights of patches, which",
        ),
        ({"topology": "ring"}, r"topology='ring' must be one of 'plane', 'ring-x', 'torus'"),
        (
            {"strategy": "shifted", "shift": "sometimes"},
            r"shift='sometimes' must be one of 'patch', 'golden', 'random', or a",
        ),
        (
            {"strategy": "shifted", "shift": -1},
            r"shift=-1 must be one of 'patch', 'golden', 'random', or a number of rows",
        ),
        ({"strategy": "shifted", "shift": True}, r"shift=True must be"),
        ({"strategy": "shifted", "shift": 1.5}, r"shift=1\.5 must be"),
        ({"strategy": "shifted", "overlap": -1}, r"overlap=-1 must be a whole number of at least 0"),
        ({"strategy": "shifted", "remember": 1}, r"remember=1 must be True or False"),
        ({"strategy": "naive", "remember": False}, r"remember=False does nothing under strategy='naive'"),
        ({"strategy": "shifted", "shift_seed": None}, r"shift_seed=None must be a whole number"),
        ({"strategy": "shifted", "latents": "none"}, r"latents='none' must be one of 'rows', 'whole'"),
        ({"strategy": "sync", "shift": 8}, r"shift=8 does nothing under strategy='sync', only under 'shifted'"),
        ({"strategy": "naive", "overlap": 8}, r"overlap=8 does nothing under strategy='naive', only under 'shifted'"),
        ({"latents": "whole"}, r"latents='whole' does nothing under strategy='displaced'"),
        ({"codec": "int8", "strategy": "shifted"}, r"codec='int8' does nothing under strategy='shifted'"),
        ({"strategy": "tensor", "patch": 2}, r"patch=2 does not go with strategy='tensor', whose ranks share the w"),
        ({"strategy": "tensor", "pipe": 2}, r"pipe=2 goes with strategy='pipelined' only, not with 'tensor'"),
        ({"strategy": "tensor", "balance": (2, 1)}, r"balance=\(2, 1\) is about rows and stages, which stra"),
        ({"strategy": "tensor", "codec": "int8"}, r"codec='int8' does nothing under strategy='tensor', which has no p"),
        ({"strategy": "tensor", "topology": "torus"}, r"topology='torus' is known for patches .* not for strategy='te"),
        ({"split": "columns"}, r"split='columns' must be one of 'rows', 'cols'"),
        (
            {"group_norm": "exact"},
            r"group_norm='exact' must be one of 'corrected', 'carried', 'stale', 'separate', 'sync'",
        ),
        ({"cfg": 3}, r"cfg=3 must be 1 or 2: guidance has two branches"),
        ({"cfg": 0}, r"cfg=0 must be a whole number of at least 1"),
        ({"cfg": True}, r"cfg=True must be a whole number"),
        ({"cfg": "2"}, r"cfg='2' must be a whole number"),
        ({"patch": 0}, r"patch=0 must be a whole number of at least 1"),
        ({"patch": 2.0}, r"patch=2\.0 must be a whole number"),
        ({"warmup_steps": -1}, r"warmup_steps=-1 must be a whole number of at least 0"),
        ({"warmup_steps": 1.5}, r"warmup_steps=1\.5 must be a whole number"),
        ({"warmup_steps": None}, r"warmup_steps=None must be a whole number"),
        (
            {"codec": "int3"},
            r"codec='int3' must be one of 'fp16', 'bf16', 'int8', 'int4', 'int2', '1bit', or a mapping of 'context', "
            r"'halo', 'output' to them",
        ),
        ({"codec": ""}, r"codec='' must be one of"),
        ({"codec": 8}, r"codec=8 must be one of"),
        (
            {"codec": {"moments": "int8"}},
            r"codec=\{'moments': 'int8'\} must be .* a mapping of 'context', 'halo', 'output' to them",
        ),
        ({"codec": {"halo": None}}, r"codec=\{'halo': None\} must be"),
        ({"codec": {"halo": ["int8"]}}, r"codec=\{'halo': \['int8'\]\} must be"),
        ({"codec": "halo="}, r"codec='halo=' must be"),
        ({"codec": "halo=int8,int4"}, r"codec='halo=int8,int4' must be"),
        ({"codec": "int8", "strategy": "naive"}, r"codec='int8' does nothing under strategy='naive'.*leave it out"),
        ({"context_window": 0.5, "strategy": "naive"}, r"context_window=0\.5 does nothing under strategy='naive'"),
        ({"context_window": 1.5}, r"context_window=1\.5 must be None or a number from 0 to 1"),
        ({"context_window": -0.1}, r"context_window=-0\.1 must be None or a number from 0 to 1"),
        ({"context_window": float("nan")}, r"context_window=nan must be"),
        ({"context_window": True}, r"context_window=True must be"),
        ({"context_window": "0.5"}, r"context_window='0\.5' must be"),
        ({"balance": (2, 0)}, r"balance=\(2, 0\) must be None, 'measured', or a positive number for each rank along"),
        ({"balance": (2, -1)}, r"balance=\(2, -1\) must be .* such as \(2, 1, 1\) or '2,1,1'"),
        ({"balance": (1, float("inf"))}, r"balance=\(1, inf\) must be"),
        ({"balance": (1, float("nan"))}, r"balance=\(1, nan\) must be"),
        ({"balance": (1, 10**400)}, r"balance=\(1, 1000"),
        ({"balance": (True, 1)}, r"balance=\(True, 1\) must be"),
        ({"balance": (1, None)}, r"balance=\(1, None\) must be"),
        ({"balance": ()}, r"balance=\(\) must be"),
        ({"balance": {2, 1}}, r"balance=\{1, 2\} must be"),
        ({"balance": 2}, r"balance=2 must be"),
        ({"balance": ""}, r"balance='' must be"),
        ({"balance": "2;1"}, r"balance='2;1' must be"),
        ({"balance": "2,,1"}, r"balance='2,,1' must be"),
        ({"balance": "fast"}, r"balance='fast' must be"),
        ({"balance": "measured", "warmup_steps": 0}, r"balance='measured' with warmup_steps=0 leaves no step"),
    ],
)
def test_a_bad_value_is_named_with_what_would_be_right(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ParallelConfig(**values)
    assert "\n" not in str(caught.value)


def test_an_unhashable_value_is_named_too() -> None:
    with pytest.raises(ConfigError, match=r"strategy=\['sync'\] must be one of"):
        ParallelConfig(strategy=["sync"])


def test_arguments_are_keywords_and_frozen() -> None:
    with pytest.raises(TypeError):
        ParallelConfig("sync")  # type: ignore[misc]
    with pytest.raises(TypeError, match="stragety"):
        ParallelConfig(stragety="sync")  # type: ignore[call-arg]
    config = ParallelConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.cfg = 2  # type: ignore[misc]


def test_errors_are_of_one_family_and_of_the_builtin_kind() -> None:
    assert issubclass(ConfigError, DistrifusionError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    ("codec", "text", "codecs"),
    [
        (None, None, {}),
        ({}, None, {}),
        ("int8", "int8", {"context": "int8", "halo": "int8", "output": "int8"}),
        ("bf16", "bf16", {"context": "bf16", "halo": "bf16", "output": "bf16"}),
        ("1bit", "1bit", {"context": "1bit", "halo": "1bit", "output": "int8"}),
        (
            {"output": "int8", "context": "int4", "halo": "int4"},
            "int4",
            {"context": "int4", "halo": "int4", "output": "int8"},
        ),
        ({"context": "1bit", "halo": "1bit"}, "context=1bit,halo=1bit", {"context": "1bit", "halo": "1bit"}),
        ({"output": "fp16"}, "output=fp16", {"output": "fp16"}),
        ({"halo": "fp16", "context": "int4"}, "context=int4,halo=fp16", {"context": "int4", "halo": "fp16"}),
        ("halo=fp16, context=int4", "context=int4,halo=fp16", {"context": "int4", "halo": "fp16"}),
        ({"context": "int2"}, "context=int2", {"context": "int2"}),
        ("context=int2", "context=int2", {"context": "int2"}),
    ],
)
def test_a_codec_has_one_form_however_it_is_given(codec: object, text: str | None, codecs: dict[str, str]) -> None:
    config = ParallelConfig(codec=codec)
    assert (config.codec, config.codecs) == (text, codecs)
    assert ParallelConfig(codec=config.codec) == config
    assert hash(config) == hash(ParallelConfig(codec=text))
    assert str(config).endswith(f" codec={text}" if text else "group_norm=corrected")


def test_the_window_is_said_where_it_is_set() -> None:
    assert str(ParallelConfig(context_window=0)).endswith("group_norm=corrected context_window=0")
    assert str(ParallelConfig(codec="int8", context_window=0.3)).endswith(" codec=int8 context_window=0.3")


@pytest.mark.parametrize(
    ("balance", "text", "weights"),
    [
        (None, None, None),
        ("measured", "measured", None),
        ((2, 1, 1), "2,1,1", (2.0, 1.0, 1.0)),
        ([2.0, 1, 1.0], "2,1,1", (2.0, 1.0, 1.0)),
        ("2, 1,1", "2,1,1", (2.0, 1.0, 1.0)),
        ((1.5, 0.1), "1.5,0.1", (1.5, 0.1)),
        ((1 / 3, 1e-300), "0.3333333333333333,1e-300", (1 / 3, 1e-300)),
        ("3", "3", (3.0,)),
    ],
)
def test_a_balance_has_one_form_however_it_is_given(
    balance: object, text: str | None, weights: tuple[float, ...] | None
) -> None:
    config = ParallelConfig(balance=balance)
    assert (config.balance, config.weights) == (text, weights)
    assert ParallelConfig(balance=config.balance) == config
    assert hash(config) == hash(ParallelConfig(balance=text))
    assert str(config).endswith(f" balance={text}" if text else "group_norm=corrected")


def test_stages_say_what_matters_to_them() -> None:
    config = ParallelConfig(strategy="pipelined", cfg=2, pipe=3, warmup_steps=0)
    assert str(config) == "strategy=pipelined cfg=2 pipe=3 warmup_steps=0"
    assert str(ParallelConfig(strategy="pipelined", balance="measured")).endswith(" balance=measured")
