"""Methods: how they are written, and the optimizers and schedules that they make."""

import pytest

pytest.importorskip("transformers")


from comparing import method_of, schedule_of

from paceline.averaging import BEMA, EMA, LAWA, SWA, PowerEMA, Uniform
from paceline.study.runs import share_runs
from paceline.train import InputError
from paceline.train.methods import METHODS, beside_the_pull, parse_method


def test_methods_are_written_as_documented():
    method = method_of("ema:twin:twin_gain=0.25:lr=3e-3")
    assert (method.name, method.schedule, method.twin_gain, method.lr) == (
        "ema",
        "twin",
        0.25,
        3e-3,
    )
    assert method.label == "ema twin kappa=0.3 twin_gain=0.25"
    assert method_of("pace").label == "pace pullback=3 kappa=0.3"
    assert method_of("adamw:cosine").label == "adamw cosine"
    assert method_of("uniform:start=0.25").label == "uniform start=0.25"
    assert method_of("swa:every=5").label == "swa every=5 start=0.75"
    assert method_of("lawa:window=4").label == "lawa window=4 every=40"
    assert method_of("bema:bias_power=0.4").label == "bema kappa=0.5 bias_power=0.4"
    assert method_of("ema:half_life=50").label == "ema half_life=50"
    assert method_of("ema:eps=1e-3").label == "ema kappa=0.3 eps=0.001"
    assert method_of("lookahead:alpha=0.8").label == "lookahead every=5 alpha=0.8"
    assert method_of("pullback:muon:pullback=1").label == "pullback muon pullback=1 kappa=0.3"
    assert method_of("pullback:sgd:cosine:gain=scalar:pullback=0.5").label == (
        "pullback sgd cosine pullback=0.5 kappa=0.3 gain=scalar"
    )


# Every method with every option that it has, and none of them with a default's value.
WRITTEN = [
    *(
        "adamw",
        "adamw:cosine:lr=3e-5:eps=1e-3",
        "adamw:twin:kappa=0.7:twin_gain=0.1",
        "adamw:power",
    ),
    *("ema", "ema:wsd:kappa=0.123456789:state=bf16", "ema:half_life=12.5:eps=0.1"),
    "ema:half_life=4M tokens",
    "ema:power:kappa=0.3:return_kappa=0.7",
    *(
        "ema:twin:kappa=1:twin_gain=1",
        "uniform:start=0.1:eps=1",
        "uniform:power:start=0",
        "swa:start=0.5:every=7:eps=1",
    ),
    *(
        "lawa:window=3:every=2:eps=1",
        "bema:kappa=0.4:bias_power=0.1:every=3:eps=1",
        "lookahead:every=7:alpha=0.25",
    ),
    *("schedule-free", "schedule-free:lr=1e30", "pace", "pace:pullback=0:kappa=0"),
    *(
        "pace:wsd:pullback=2e-7:every=5:eps=1e-4:state=bf16:return_kappa=0.7",
        "pace:power:return_kappa=0",
    ),
    *("pace:pullback=auto", "pace:gain=scalar:pullback=0.5"),
    *("pullback:muon", "pullback:sgd:cosine:pullback=1:kappa=0.9:gain=own:return_kappa=0.2"),
]


@pytest.mark.parametrize("text", WRITTEN)
def test_a_method_is_what_its_written_form_says(text):
    method = method_of(text)
    others = {"lr": 9.0, "pullback": 9.0, "kappa": 0.99, "twin_gain": 0.99, "schedule": "wsd"}
    if method.schedule == "constant":  # which has no name there
        others.pop("schedule")
    for one in (method, method.trajectory):
        assert parse_method(one.written, **others) == one
        assert hash(parse_method(one.written, **others)) == hash(one)
        assert parse_method(one.written, **others).label == one.label


def test_every_option_is_written_somewhere():
    given = {(m.name, o) for m in map(method_of, WRITTEN) for o in m.model_dump(exclude_none=True)}
    assert given >= {(name, option) for name, m in METHODS.items() for option in m.options()}


def test_what_returns_a_slower_average_shares_the_training():
    texts = ["pace", "pace:return_kappa=0.7", "pace:return_kappa=0.5", "pace:every=2"]
    texts += ["pace:every=2:return_kappa=0.7", "pullback:sgd", "pullback:sgd:return_kappa=0.7"]
    texts += ["ema:power", "ema:power:return_kappa=0.7", "adamw:power", "ema:power:kappa=0.7"]
    assert [[m.label for m in run.methods] for run in share_runs(map(method_of, texts), (0,))] == [
        [
            "pace pullback=3 kappa=0.3",
            "pace pullback=3 kappa=0.3 return_kappa=0.7",
            "pace pullback=3 kappa=0.3 return_kappa=0.5",
        ],
        ["pace pullback=3 kappa=0.3 every=2", "pace pullback=3 kappa=0.3 every=2 return_kappa=0.7"],
        ["pullback sgd pullback=3 kappa=0.3", "pullback sgd pullback=3 kappa=0.3 return_kappa=0.7"],
        ["ema power kappa=0.3", "ema power kappa=0.3 return_kappa=0.7", "adamw power kappa=0.3"],
        ["ema power kappa=0.7"],  # under another schedule
    ]


def test_averages_of_methods():
    averages = {
        "ema": PowerEMA(0.3),
        "ema:half_life=50": EMA(half_life=50),
        "uniform:start=0.25": Uniform(50),
        "swa:start=0.1:every=5": SWA(20, 5),
        "lawa:window=4:every=7": LAWA(4, 7),
        "bema:every=3": BEMA(every=3),
        "bema:kappa=0.4:bias_power=0.1": BEMA(0.4, 0.1),
        "adamw": None,
        "pace": None,  # PACE keeps its own
        "pace:return_kappa=0.7": PowerEMA(0.7),
        "pullback:sgd:return_kappa=0.7": PowerEMA(0.7),
        "ema:power:return_kappa=0.7": PowerEMA(0.7),
        "ema:power:return_kappa=0": PowerEMA(0.0),
    }
    assert {text: method_of(text).averaging(200) for text in averages} == averages


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("4M tokens", 31.25),
        ("4000000tokens", 31.25),
        ("0.128 M tokens", 1),
        ("6.4e4 tokens", 0.5),
        ("1.28B tokens", 10**4),
        ("1.28T tokens", 10**7),
        ("2000 samples", 15.625),
        ("2k samples", 15.625),
        ("50", 50),
    ],
)
def test_half_lives_of_data(text, steps):
    """128 sequences of 1000 tokens a step."""
    method = method_of(f"ema:half_life={text}").in_steps(128, 128_000)
    assert method == method_of(f"ema:half_life={steps}")
    assert method.averaging(9) == EMA(half_life=steps)


def test_half_lives_of_tokens_where_steps_have_different_numbers():
    assert method_of("ema:half_life=256 samples").in_steps(128, None).half_life == 2
    with pytest.raises(
        InputError, match="half_life: .* give samples or --packing, got '1k tokens'"
    ):
        method_of("ema:half_life=1k tokens").in_steps(128, None)


def test_averages_at_another_batch():
    """A fourfold batch. A pull's average stays. A start that is a share of steps is still one."""
    averages = {
        "ema": [PowerEMA(0.3).scaled(4)],
        "ema:half_life=50": [EMA(half_life=12.5)],
        "uniform:start=0.25": [Uniform(50)],
        "swa:start=0.1:every=8": [SWA(20, 2)],
        "lawa:window=4:every=8": [LAWA(4, 2)],
        "bema:every=4": [BEMA(rate=4.0)],
        "adamw": [],
        "schedule-free": [],
        "pace": [PowerEMA(0.3)],
        "pace:pullback=0": [PowerEMA(0.3).scaled(4)],
        "pace:pullback=0:every=4": [PowerEMA(0.3, rate=4.0)],
        "pace:return_kappa=0.7": [PowerEMA(0.3), PowerEMA(0.7).scaled(4)],
        "pullback:sgd:return_kappa=0.7": [PowerEMA(0.3), PowerEMA(0.7).scaled(4)],
    }
    assert {text: method_of(text).rules(200, 4) for text in averages} == averages
    for text in ("lookahead", "bema"):
        with pytest.raises(ValueError, match="has no scaling by 4"):
            method_of(text).rules(200, 4)
        method_of(text).rules(200)


def test_methods_that_only_watch_share_their_training():
    texts = ["adamw", "ema", "pace", "uniform", "ema:state=bf16", "lawa", "bema", "ema:wsd"]
    texts += ["ema:eps=0.1", "adamw:eps=0.1", "ema:eps=0.01"]
    runs = share_runs(map(method_of, texts), (0,))
    assert [[m.label for m in run.methods] for run in runs[4:]] == [
        ["ema kappa=0.3 eps=0.1", "adamw eps=0.1"],  # of another AdamW
        ["ema kappa=0.3 eps=0.01"],
    ]
    assert runs[5].name == "ema-kappa0.3-eps0.01-lr0.01-seed0"
    texts = texts[:-3]
    texts += ["ema:twin", "uniform:twin", "uniform:twin:kappa=0.5", "ema:kappa=0.7", "adamw:wsd"]
    runs = share_runs(map(method_of, texts), (0, 1))
    assert [[m.label for m in run.methods] for run in runs[:6]] == [
        ["adamw", "ema kappa=0.3", "uniform start=0.75", "lawa window=10 every=40",
         "bema kappa=0.5 bias_power=0.2", "ema kappa=0.7"],
        ["pace pullback=3 kappa=0.3"],
        ["ema kappa=0.3 state=bf16"],
        ["ema wsd kappa=0.3", "adamw wsd"],
        ["ema twin kappa=0.3 twin_gain=0.5", "uniform twin start=0.75 kappa=0.3 twin_gain=0.5"],
        ["uniform twin start=0.75 kappa=0.5 twin_gain=0.5"],
    ]  # fmt: skip
    assert [run.seed for run in runs] == [0] * 6 + [1] * 6


def test_schedules():
    beta = [(1 + t) ** -0.3 for t in range(1, 51)]
    assert schedule_of("adamw:power") == pytest.approx(beta)
    assert schedule_of("adamw:twin:twin_gain=1") == pytest.approx(beta)
    assert schedule_of("adamw:twin:twin_gain=0.5") == pytest.approx([2 * b / (1 + b) for b in beta])
    assert schedule_of("adamw") == pytest.approx([1.0] * 50)
    wsd = schedule_of("adamw:wsd")
    assert wsd[:41] == pytest.approx([1.0] * 41)
    assert wsd[41:] == pytest.approx([1 - i / 10 for i in range(1, 10)])
    cosine = schedule_of("adamw:cosine")
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[25] == pytest.approx(0.5)
    for name in ("constant", "cosine", "wsd", "power", "twin"):
        warm = schedule_of(f"adamw:{name}", warmup=10)
        assert warm[0] == 0
        assert warm[:8] == sorted(warm[:8])
    assert schedule_of("schedule-free", warmup=10) == [1.0] * 50  # warms up by itself


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pase", "unknown method 'pase'; did you mean 'pace'"),
        ("pace:steep", "unknown schedule 'steep'"),
        ("pace:k=3", "has no option 'k'; it has .*'pullback', 'kappa'"),
        ("adamw:pullback=3", "has no option 'pullback'"),
        ("adamw:state=bf16", "has no option 'state'"),
        ("schedule-free:eps=0.1", "has no option 'eps'"),
        ("ema:eps=0", "eps: .*greater than 0"),
        ("pace:state=fp8", "state: must be 'fp32' or 'bf16', got 'fp8'"),
        ("ema:twin_gain=0.5", "has no option 'twin_gain'"),
        ("uniform:return_kappa=0.7", "has no option 'return_kappa'"),
        ("ema:every=2", "has no option 'every'"),
        ("pullback:sgd:every=2", "has no option 'every'"),
        ("pace:every=0", "every: .*greater than or equal to 1"),
        ("pace:return_kappa=2", "return_kappa: .*less than or equal to 1"),
        ("pace:kappa=1.5", "method 'pace:kappa=1.5': kappa: .*less than or equal to 1"),
        ("ema:lr=0", "lr: .*greater than 0"),
        ("ema:half_life=5:kappa=0.3", "half_life and kappa say the same thing"),
        ("ema:twin:half_life=5", "half_life and kappa say the same thing"),
        ("ema:half_life=0", "half_life: .*greater than 0"),
        ("ema:half_life=nan", "half_life: .*finite"),
        *(
            (f"ema:half_life={text}", f"half_life: give steps > 0, .* got '{text}'")
            for text in (
                "soon",
                "4M",
                "4m tokens",
                "2000 sample",
                "0 tokens",
                "-1 samples",
                "1e999 tokens",
                "1.2.3 tokens",
                "M tokens",
            )
        ),
        ("ema:return_kappa=0.7", "return_kappa: the schedule constant has no kappa; give kappa"),
        ("ema:wsd:return_kappa=0.7", "return_kappa: the schedule wsd has no kappa"),
        ("uniform:start=1", "start: .*less than 1"),
        ("uniform:kappa=0.3", "has no option 'kappa'; it has .*'start'"),
        ("lawa:window=0", "window: .*greater than or equal to 1"),
        ("lawa:every=1.5", "every: .*integer"),
        ("lookahead:alpha=0", "alpha: .*greater than 0"),
        ("pullback", "method 'pullback': unknown optimizer ''; pullback:NAME knows sgd, adam"),
        ("pullback:sophiah", "unknown optimizer 'sophiah'"),
        ("pullback:muon:gain=big", "gain: must be 'adam', 'own' or 'scalar'"),
        ("ema:lr=nan", "lr: .*finite"),
        ("pace:kappa=0.1:kappa=0.2", "method 'pace:kappa=0.1:kappa=0.2' gives 'kappa' twice"),
        ("pace:kappa=0.1:kappa=0.1", "gives 'kappa' twice"),
        ("pace:c=1:c=2", "gives 'c' twice"),
        ("ema:cosine:wsd", "method 'ema:cosine:wsd' gives 'schedule' twice"),
        ("pace:cosine:cosine", "gives 'schedule' twice"),
        ("pace:schedule=cosine", "has no option 'schedule'"),
        ("schedule-free:schedule=cosine", "has no option 'schedule'"),
        ("pullback:muon:base=sgd", "has no option 'base'"),
        ("lawa:window=10000000", "window: .*less than or equal to 1000,"),
        ("lawa:every=100000000000000000000", "every: .*less than or equal to 9007199254740992,"),
        ("swa:every=100000000000000000000", "every: .*less than or equal to"),
        ("pace:every=100000000000000000000", "every: .*less than or equal to"),
        ("bema:every=100000000000000000000", "every: .*less than or equal to"),
        ("lookahead:every=100000000000000000000", "every: .*less than or equal to"),
        ("schedule-free:cosine", "method 'schedule-free:cosine': schedule-free has no schedule"),
    ],
)
def test_bad_methods(text, message):
    with pytest.raises(InputError, match=message):
        method_of(text)


@pytest.mark.parametrize(
    ("pulled", "ema", "differing"),
    [
        ("pace", "ema", set()),
        ("pullback:adamw", "ema", set()),
        ("pace:pullback=auto", "ema:kappa=0.6", set()),  # what it returns
        ("pace:return_kappa=0.7", "ema:kappa=0.7", set()),  # the same average is returned
        ("pace:return_kappa=0.7", "ema", {"return_kappa"}),
        ("pace:cosine", "ema:cosine", set()),
        ("pace:twin:return_kappa=0.7", "ema:twin:return_kappa=0.7", set()),
        ("pace:twin:kappa=0.2:return_kappa=0.7", "ema:twin:return_kappa=0.7", {"kappa"}),
        ("pace", "ema:twin", {"schedule", "twin_gain"}),
        ("pace:every=3", "ema", {"every"}),
        ("pace:state=bf16", "ema", {"state"}),
        ("pace:eps=1e-3", "ema", {"eps"}),
        ("pace", "ema:half_life=9", {"half_life", "return_kappa"}),
        ("pace:lr=1", "ema", {"lr"}),
    ],
)
def test_what_differs_beside_the_pull(pulled, ema, differing):
    assert beside_the_pull(method_of(pulled), method_of(ema)) == differing


def test_a_scalar_gain_is_in_0_to_1():
    for text in ("pace:gain=scalar:pullback=2", "pullback:sgd:gain=scalar:pullback=2"):
        with pytest.raises(InputError, match=r"it is the gain itself, in \[0, 1\], got 2"):
            method_of(text)
    assert method_of("pace:gain=scalar:pullback=1").get("pullback") == 1
