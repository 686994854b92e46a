"""Methods of training runs whose pull sets itself."""

import pytest
import torch
from gains import FAST, SLOW

from paceline.averaging import PowerEMA


@pytest.fixture(scope="module")
def methods():
    return pytest.importorskip("paceline.train.methods")


METHODS = {  # κ of the average, and of the one to return
    "pace:pullback=auto": (FAST, SLOW),
    "pace:cosine:pullback=auto:lr=3e-4": (FAST, SLOW),
    "pace:pullback=auto:kappa=0.5": (0.5, None),
    "pace:pullback=auto:return_kappa=0.7": (FAST, 0.7),
    "pace:pullback=auto:kappa=0.5:return_kappa=0.8": (0.5, 0.8),
}


@pytest.mark.parametrize("text", METHODS)
def test_methods_say_it(text, methods):
    kappa, returned = METHODS[text]
    method = methods.parse_method(text, lr=1.0, pullback=0.1, kappa=0.4)
    assert (method.pullback, method.kappa, method.return_kappa) == ("auto", kappa, returned)
    assert "pullback=auto" in method.label
    assert methods.parse_method(method.written) == method
    model = torch.nn.Linear(3, 2)
    opt = method.build(methods.Setup(model, {"weight"}, weight_decay=0.1, warmup=0, steps=10))
    for group in opt.param_groups:
        assert (group["pullback"], group["averaging"]) == ("auto", f"ema:kappa={kappa}")
        assert group["returns"] == (returned and f"returned={PowerEMA(returned)}")
    watched = methods.parse_method("pace", lr=1.0, pullback=0.1, kappa=0.4)  # as it was
    assert (watched.pullback, watched.kappa, watched.return_kappa) == (0.1, 0.4, None)


def test_methods_pass_the_kind_of_gain_on(methods):
    method = methods.parse_method("pace:pullback=0.2:gain=scalar", lr=1.0, kappa=0.4)
    model = torch.nn.Linear(3, 2)
    opt = method.build(methods.Setup(model, set(), weight_decay=0.0, warmup=0, steps=10))
    assert {group["gain"] for group in opt.param_groups} == {"scalar"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pullback:sgd:pullback=auto", "pullback=auto is only for pace"),
        ("pace:pullback=automatic", r"pullback: .*got 'automatic'"),
        ("pace:pullback=-1", r"pullback: .*got '-1'"),
        ("pace:pullback=nan", r"pullback: "),
    ],
)
def test_bad_methods(text, says, methods):
    from paceline.train import InputError

    with pytest.raises(InputError, match=f"^method '{text}': {says}") as raised:
        methods.parse_method(text, lr=1.0, kappa=0.4)
    assert "\n" not in str(raised.value)
