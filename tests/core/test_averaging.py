"""Every average against a direct computation from the stored list of iterates."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from problems import walk
from torch.nn import Parameter

from paceline import PACE, Averaging, Pullback, load_checkpoint, save_checkpoint
from paceline.averaging import BEMA, EMA, LAWA, SWA, PowerEMA, Uniform, parse


def ema(weight, every=1):
    """From the weight of step t; θ_0 first."""

    def average(iterates):
        a = iterates[0]
        for t in range(1, len(iterates)):
            if t % every == 0:
                a = (1 - weight(t)) * a + weight(t) * iterates[t]
        return a

    return average


def mean_of(chosen):
    """The mean of the iterates at the steps that `chosen(t)` lists, or the last where none is."""

    def average(iterates):
        t = len(iterates) - 1
        steps = list(chosen(t))
        return np.mean([iterates[s] for s in steps], axis=0) if steps else iterates[t]

    return average


def bema(power=0.5, bias=0.2, lag=10, rate=1.0, start=0, every=1):
    """As the paper's algorithm: at step t of the last update."""

    def average(iterates):
        last = len(iterates) - 1
        if last <= start:
            return iterates[last]
        result = mean = origin = iterates[start]
        for t in range(start + every, last + 1, every):
            beta, alpha = (lag + rate * t) ** -power, (lag + rate * t) ** -bias
            mean = (1 - beta) * mean + beta * iterates[t]
            result = alpha * (iterates[t] - origin) + mean
        return result

    return average


RULES = {
    "power": (PowerEMA(), ema(lambda t: (1 + t) ** -0.5)),
    "power with all": (
        PowerEMA(0.3, rate=2.0, start=4, every=3),
        ema(lambda t: (1 + 2 * max(0, t - 4)) ** -0.3, 3),
    ),
    "power at its floor": (PowerEMA(1.0, rate=1e6), ema(lambda t: max(1 / (1 + 1e6 * t), 1e-4))),
    "ema": (EMA(0.1), ema(lambda t: 0.1)),
    "ema every": (EMA(0.1, every=4), ema(lambda t: 0.1, 4)),
    "ema half-life": (EMA(half_life=7), ema(lambda t: 1 - 0.5 ** (1 / 7))),
    "ema half-life every": (EMA(half_life=6, every=3), ema(lambda t: 1 - 0.5**0.5, 3)),
    "uniform": (Uniform(), mean_of(lambda t: range(1, t + 1))),
    "uniform from": (Uniform(5), mean_of(lambda t: range(6, t + 1))),
    "swa": (SWA(4, 3), mean_of(lambda t: range(7, t + 1, 3))),
    "swa from the first": (SWA(), mean_of(lambda t: range(1, t + 1))),
    "lawa": (LAWA(3, every=4), mean_of(lambda t: list(range(4, t + 1, 4))[-3:])),
    "lawa of all": (LAWA(5), mean_of(lambda t: list(range(1, t + 1))[-5:])),
    "bema": (BEMA(), bema()),
    "bema with all": (BEMA(0.6, 0.4, 3, 0.5, start=4, every=5), bema(0.6, 0.4, 3, 0.5, 4, 5)),
}


@pytest.mark.parametrize("name", RULES)
def test_rule_is_the_direct_computation(name):
    """At every step of a random walk, in float64: equal to rounding."""
    rule, direct = RULES[name]
    generator = np.random.default_rng(0)
    iterates = [generator.normal(size=6)]
    average = torch.tensor(iterates[0])
    kept = rule.begin(torch.tensor(iterates[0]), average.dtype)
    assert tuple(kept) == rule.keeps
    for t in range(1, 41):
        iterates.append(iterates[-1] + generator.normal(size=6))
        rule.update_(t, [torch.tensor(iterates[t])], [average], [kept])
        np.testing.assert_allclose(average, direct(iterates), rtol=1e-12, atol=1e-12)
        mixed = rule.coefficients(t).numpy() @ np.array(iterates)
        np.testing.assert_allclose(mixed, direct(iterates), rtol=1e-12, atol=1e-12)
    assert rule.coefficients(40).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("pullback", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_pace_keeps_every_average(name, dtype, pullback):
    """Its average is that of the weights that it stored, whatever moved them."""
    rule, direct = RULES[name]
    torch.manual_seed(0)
    p = Parameter(torch.randn(7).to(dtype))
    opt = PACE([p], lr=0.1, pullback=pullback, averaging=rule)
    iterates = [p.detach().double().numpy()]
    for _ in range(25):
        p.grad = torch.randn(7).to(dtype)
        opt.step()
        iterates.append(p.detach().double().numpy())
        # float32 holds it: 25 roundings of 6e-8 of weights around 1
        np.testing.assert_allclose(opt.state[p]["average"], direct(iterates), atol=3e-6)


def test_the_falloff_of_a_pull():
    """β_t for averages whose weight falls, whether or not a step takes in; 1 for the others."""
    assert PowerEMA(0.5, every=2).falloff(3) == 0.5
    assert EMA(0.1).falloff(3) == EMA(half_life=9).falloff(3) == LAWA(3).falloff(7) == 1
    assert Uniform().falloff(4) == 0.25
    assert Uniform(10).falloff(4) == 1
    assert SWA(2, 3).falloff(9) == 0.5
    assert BEMA().falloff(6) == 0.25


@pytest.mark.parametrize("name", RULES)
def test_tensors_of_steps(name):
    """What a step on an accelerator asks for: the same numbers, without reading the step."""
    rule, _ = RULES[name]
    steps = torch.arange(1, 30, dtype=torch.float64)
    for ask in (rule.weight, rule.falloff):
        found = torch.as_tensor(ask(steps), dtype=torch.float64).expand(29)
        expected = torch.tensor([float(ask(t)) for t in range(1, 30)], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_text_and_back(name):
    rule, _ = RULES[name]
    assert parse(str(rule)) == rule
    assert type(parse(str(rule))) is type(rule)


def test_text():
    assert str(PowerEMA()) == "ema:kappa=0.5"
    assert str(Uniform()) == "uniform"
    assert parse("ema") == PowerEMA()
    assert parse("ema:kappa=0.3") == PowerEMA(0.3)
    assert parse("ema:half_life=200") == EMA(half_life=200)
    assert parse(" lawa:window=3:every=10") == LAWA(3, every=10)
    assert parse("uniform:start=1e3") == Uniform(1000)
    for number in (1e-7, 1 / 3, 5e-324, 123456789.5, 1e16):
        assert parse(str(EMA(half_life=number))) == EMA(half_life=number)
    assert str(PowerEMA(np.float64(0.3))) == "ema:kappa=0.3"  # as a sweep has it


BAD = [
    (lambda: PowerEMA(1.5), "kappa of ema must be in [0, 1], got 1.5"),
    (lambda: PowerEMA(0.5, start=-1), "start of ema must be a number of steps >= 0, got -1"),
    (lambda: PowerEMA(float("nan")), "kappa of ema must be a finite number, got nan"),
    (lambda: PowerEMA(0.5, rate=0), "rate of ema must be > 0, got 0"),
    (lambda: PowerEMA(0.5, every=0), "every of ema must be >= 1, got 0"),
    (lambda: EMA(), "either beta or half_life, got beta=None and half_life=None"),
    (lambda: EMA(0.1, 5), "either beta or half_life, got beta=0.1 and half_life=5"),
    (lambda: EMA(0.0), "beta of ema must be in (0, 1], got 0.0"),
    (lambda: EMA(half_life=-2), "half_life of ema must be > 0, got -2"),
    (lambda: Uniform(1.5), "start of uniform must be a whole number, got 1.5"),
    (lambda: SWA(True), "start of swa must be a whole number, got True"),
    (lambda: LAWA(0), "window of lawa must be >= 1, got 0"),
    (lambda: LAWA(None), "window of lawa must be a whole number, got None"),
    (lambda: BEMA(lag=0.5), "lag of bema must be >= 1, got 0.5"),
    (lambda: BEMA(bias_power=-0.1), "bias_power of bema must be in [0, 1], got -0.1"),
    (lambda: BEMA(rate=-1), "rate of bema must be > 0, got -1"),
    (lambda: parse("polyak"), "unknown average 'polyak' in 'polyak'; known: ema, swa, uniform"),
    (lambda: parse("uniform:window=3"), "has no option 'window'; it has ['start']"),
    (lambda: parse("uniform:start"), "'start' must be one option=number"),
    (lambda: parse("uniform:start=soon"), "'start=soon' must be one option=number"),
    (lambda: parse("ema:kappa=0.1:kappa=0.2"), "'ema:kappa=0.1:kappa=0.2' gives 'kappa' twice"),
    (lambda: parse("lawa:window=2:window=2"), "'lawa:window=2:window=2' gives 'window' twice"),
    (lambda: parse("lawa:window=1e7"), "window of lawa must be at most 1000, got 10000000"),
    (lambda: LAWA(1001), "window of lawa must be at most 1000, got 1001"),
    (lambda: parse("lawa:window=2:every=1e300"), "every of lawa must be at most 2^53, got 1"),
    (lambda: SWA(every=2**53 + 1), "every of swa must be at most 2^53, got 9007199254740993"),
    (lambda: SWA(start=10**300), "start of swa must be at most 2^53, got 1000000"),
    (lambda: parse("uniform:start=1e300"), "start of uniform must be at most 2^53, got 1"),
    (lambda: PowerEMA(start=1e17), "start of ema must be at most 2^53, got 1e+17"),
    (lambda: PowerEMA(rate=1e300), "rate of ema must be at most 2^53, got 1e+300"),
    (lambda: BEMA(lag=1e300), "lag of bema must be at most 2^53, got 1e+300"),
    (lambda: BEMA(lag=10**400), "lag of bema must be a finite number, got 1000000"),
    (lambda: EMA(half_life=10**400), "half_life of ema must be a finite number, got 1000000"),
    (lambda: parse("bema:rate=1e400"), "rate of bema must be a finite number, got inf"),
    (lambda: parse("lawa"), "averaging 'lawa' needs window="),
    (lambda: parse("ema:kappa=2"), "'ema:kappa=2': kappa of ema must be in [0, 1], got 2"),
    (lambda: parse("ema:beta=0.1:power=1"), "has no option 'power'; it has ['beta', 'half_life'"),
    (
        lambda: PACE([Parameter(torch.zeros(2))], pullback=0.1, averaging=3),
        "averaging must be an average of paceline.averaging, or its text, got 3",
    ),
    (
        lambda: PACE([Parameter(torch.zeros(2))], pullback=0.1, averaging="uniform", kappa=0.3),
        "averaging must be left out with kappa, got 'uniform'",
    ),
    (
        lambda: PACE([Parameter(torch.zeros(2))], pullback=0, averaging=LAWA(2), capturable=True),
        "averaging='lawa:window=2' needs capturable left out",
    ),
    (
        lambda: PACE([Parameter(torch.zeros(2))], pullback=0, averaging=BEMA(),
                     state_dtype=torch.bfloat16),
        "averaging='bema:kappa=0.5' needs state_dtype left out, got torch.bfloat16",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "says"), BAD)
def test_bad_input(make, says):
    with pytest.raises(ValueError, match="^[^\n]+$") as error:
        make()
    assert says in str(error.value)


def test_groups_with_averages_of_their_own():
    a, b, c = (Parameter(torch.zeros(2)) for _ in range(3))
    opt = PACE(
        [{"params": a}, {"params": b, "averaging": Uniform()}, {"params": c, "kappa": 0.4}],
        pullback=0.0,
        kappa=0.3,
    )
    assert [g["averaging"] for g in opt.param_groups] == [
        *("ema:kappa=0.3", "uniform", "ema:kappa=0.4"),
    ]
    assert all("kappa" not in group for group in opt.param_groups)  # it has become averaging
    opt = PACE([{"params": a}, {"params": b, "kappa": 0.4}], pullback=0, averaging="uniform")
    assert [g["averaging"] for g in opt.param_groups] == ["uniform", "ema:kappa=0.4"]


# ---- rules of a user's own -----------------------------------------------------------------------


@dataclass(frozen=True)
class Linear(Averaging):
    """Iterate s counts in proportion to s: the example of the docstring."""

    name: ClassVar[str] = "linear"

    def falloff(self, step):
        return 2.0 / (step + 1.0)

    def weight(self, step):
        return self.falloff(step)


@dataclass(frozen=True)
class Last(Averaging):
    """The mean of the last two iterates, which keeps one of them."""

    share: float = 0.5
    name: ClassVar[str] = "last-two"

    @property
    def keeps(self):
        return ("before",)

    def begin(self, weights, dtype):
        return {"before": weights.detach().to(dtype, copy=True)}

    def falloff(self, step):
        return 1.0

    def update_(self, step, weights, averages, kept):
        for x, average, own in zip(weights, averages, kept, strict=True):
            average.copy_(own["before"]).lerp_(x.to(average.dtype), self.share)
            own["before"].copy_(x)


def linear(iterates):
    steps = np.arange(1, len(iterates))
    return np.average(iterates[1:], axis=0, weights=steps) if len(steps) else iterates[0]


def last_two(iterates):
    return 0.75 * iterates[-1] + 0.25 * iterates[-2]


@pytest.mark.parametrize("kind", ["PACE", "Pullback"])
@pytest.mark.parametrize(("rule", "direct"), [(Linear(), linear), (Last(0.75), last_two)])
def test_a_rule_of_ones_own_works_everywhere(rule, direct, kind, tmp_path):
    assert parse(str(rule)) == rule

    def make(params, **options):
        if kind == "PACE":
            return PACE(params, lr=0.05, pullback=2.0, **options)
        return Pullback(torch.optim.SGD(params, lr=0.05), gain="scalar", pullback=0.3, **options)

    model = torch.nn.Linear(5, 3)
    opt = make(model.parameters(), averaging=rule, returns={"own": rule, "slow": "ema:kappa=0.7"})
    iterates = [model.weight.detach().double().numpy().copy()]
    for t in range(9):
        if t == 5:
            save_checkpoint(tmp_path / "run.pt", model, opt)
            model = torch.nn.Linear(5, 3)
            opt = make(model.parameters())
            load_checkpoint(tmp_path / "run.pt", model, opt)
            assert opt.param_groups[0]["averaging"] == str(rule)
        walk(opt, list(model.parameters()), t, t + 1)
        iterates.append(model.weight.detach().double().numpy().copy())
        for key in ("average", "return_own"):
            found = opt.state[model.weight][key]
            np.testing.assert_allclose(found, direct(iterates), atol=1e-5)
    with opt.averaged("own"):
        np.testing.assert_allclose(model.weight.detach(), direct(iterates), atol=1e-5)


def test_its_coefficients():
    torch.testing.assert_close(Linear().coefficients(3), torch.tensor([0, 1, 2, 3]).double() / 6)


def not_a_dataclass():
    class Plain(Averaging):
        name: ClassVar[str] = "plain"

        def falloff(self, step):
            return 1.0

    return PACE([Parameter(torch.zeros(2))], pullback=0, averaging=Plain())


def without_a_name():
    @dataclass(frozen=True)
    class Nameless(Averaging):
        def falloff(self, step):
            return 1.0

    return PACE([Parameter(torch.zeros(2))], pullback=0, averaging=Nameless())


def of_words():
    @dataclass(frozen=True)
    class Words(Averaging):
        how: str = "slow"
        name: ClassVar[str] = "words"

        def falloff(self, step):
            return 1.0

    return Words()


def keeps_nothing():
    @dataclass(frozen=True)
    class Own(Averaging):
        name: ClassVar[str] = "own-update"

        def falloff(self, step):
            return 1.0

        def update_(self, step, weights, averages, kept):
            raise AssertionError

    return PACE([Parameter(torch.zeros(2))], pullback=0, averaging=Own())


def without_a_weight():
    @dataclass(frozen=True)
    class Still(Averaging):
        name: ClassVar[str] = "still"

        def falloff(self, step):
            return 1.0

    return PACE([Parameter(torch.zeros(2))], pullback=0, averaging=Still())


def keeps_a_step():
    @dataclass(frozen=True)
    class Counting(Last):
        name: ClassVar[str] = "counting"

        @property
        def keeps(self):
            return ("step",)

    return PACE([Parameter(torch.zeros(2))], pullback=0, averaging=Counting())


def taken():
    class Mine(Averaging):
        name: ClassVar[str] = "ema"


def misnamed():
    class Mine(Averaging):
        name: ClassVar[str] = "a:b"


OWN_BAD = [
    (not_a_dataclass, r"averaging Plain must be a @dataclass\(frozen=True\)"),
    (without_a_name, "averaging Nameless must have a class attribute `name` of its own"),
    (of_words, "how of words must be a finite number, got 'slow'"),
    (keeps_nothing, "averaging Own has update_, and must name tensors in `keeps`"),
    (without_a_weight, r"averaging Still must have weight\(\), or keeps and update_\(\)"),
    (keeps_a_step, "averaging Counting must not name a tensor 'step' in `keeps`"),
    (taken, "name of Mine must be its own, got 'ema'"),
    (misnamed, "name of Mine must be letters, digits, _ or -, got 'a:b'"),
]


@pytest.mark.parametrize(("make", "says"), OWN_BAD)
def test_what_a_rule_of_ones_own_must_say(make, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        make()


def test_a_class_defined_again_replaces_itself():
    def define(factor):
        @dataclass(frozen=True)
        class Again(Averaging):
            name: ClassVar[str] = "again"

            def falloff(self, step):
                return factor

        return Again

    first, second = define(0.5), define(0.25)
    assert isinstance(parse("again"), second)
    with pytest.raises(ValueError, match="averaging Again must have a class attribute `name`"):
        PACE([Parameter(torch.zeros(2))], pullback=0, averaging=first())
