"""Models to start from: what is refused of saved ones and of new ones, each by one line."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")

from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from paceline.train import InputError
from paceline.train.build import _model, _tokenizer
from paceline.train.data import make_tokenizer
from paceline.train.model import load_model
from paceline.train.recipe import Recipe

NEW = {"model_type": "gpt2", "n_positions": 64, "n_embd": 8, "n_layer": 2, "n_head": 2}
LLAMA = {
    **{"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
}
FIRST = "transformer.h.0.mlp.c_fc.weight"
LORA = f"base_model.model.{FIRST}".replace("weight", "lora_B.weight")

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(["why not", "yes"], 300)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """The folder of a tied model."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0,
        **{k: x for k, x in NEW.items() if k != "model_type"},
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def spoilt(saved, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(saved, tmp_path / "spoilt")


@pytest.fixture
def start(tokenizer):
    """The model that a recipe starts from, or the tokenizer."""

    def build(model=None, **keys):
        if keys.pop("only_tokenizer", False):
            return _tokenizer(Recipe(model=str(model)), None)
        values = {"model": model and str(model), "tokenizer": "bpe", "context": 16, **keys}
        return _model(Recipe(**values), tokenizer)

    return build


def rewrite(folder, change):
    path = folder / "model.safetensors"
    state = {name: x.clone() for name, x in load_file(path).items()}  # the file is written over
    save_file(change(state), path, {"format": "pt"})


def without(*names):
    return lambda state: {name: x for name, x in state.items() if name not in names}


def pickled(folder, value):
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")


class Code:
    """What runs a command when a pickle of it is loaded."""

    def __reduce__(self):
        return (print, ("it ran",))


# ---- saved models -------------------------------------------------------------------------------


SPOILT_TENSORS = {
    "missing": (without(FIRST), f"{{}} has no tensor '{FIRST}', which its configuration needs"),
    "norm": (without("transformer.ln_f.weight"), "{} has no tensor 'transformer.ln_f.weight'"),
    "tied": (without("transformer.wte.weight"), "{} has no tensor 'transformer.wte.weight'"),
    "renamed": (
        lambda state: {f"module.{name}": x for name, x in state.items()},
        "{} has no tensor 'transformer.h.0.attn.c_attn.bias', nor ",
    ),
    "shape": (
        lambda state: state | {FIRST: torch.ones(2, 3)},
        f"tensor '{FIRST}' of {{}} is of shape (2, 3), and its configuration needs (8, 32)",
    ),
    "nan": (
        lambda state: state | {"transformer.ln_f.bias": torch.full((8,), float("nan"))},
        "tensor 'transformer.ln_f.bias' of {} holds a NaN or infinity",
    ),
    "infinity": (
        lambda state: state | {"transformer.ln_f.bias": torch.full((8,), -float("inf"))},
        "tensor 'transformer.ln_f.bias' of {} holds a NaN or infinity",
    ),
    "integers": (
        lambda state: state | {FIRST: state[FIRST].to(torch.int8)},
        f"tensor '{FIRST}' of {{}} is quantized to I8",
    ),
    "float8": (
        lambda state: state | {FIRST: state[FIRST].to(torch.float8_e4m3fn)},
        f"tensor '{FIRST}' of {{}} is quantized to F8_E4M3",
    ),
    "scales": (
        lambda state: state | {f"{FIRST}_scale_inv": torch.ones(1)},
        f"{{}} has the tensor '{FIRST}_scale_inv' of a quantized model",
    ),
}


@pytest.mark.parametrize("name", SPOILT_TENSORS)
def test_tensors_that_are_not_as_the_configuration_says(name, spoilt, start):
    change, says = SPOILT_TENSORS[name]
    rewrite(spoilt, change)
    with pytest.raises(InputError, match=r"^model: [^\n]+$") as refused:
        start(spoilt)
    assert says.format(spoilt) in str(refused.value)


@pytest.mark.parametrize(
    ("base", "adapter", "says"),
    [
        ({}, {}, None),
        ({FIRST: None}, {}, f"no tensor '{FIRST}', which"),
        ({FIRST: torch.ones(4, 4)}, {}, r"is of shape \(4, 4\), and its configuration needs"),
        ({}, {LORA: None}, "no tensor '.*lora_B.*', which"),
    ],
)
def test_adapters_and_their_base_models(base, adapter, says, saved, spoilt, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(spoilt), config)
    for x in model.parameters():
        torch.nn.init.normal_(x) if x.requires_grad else None
    model.save_pretrained(tmp_path / "adapter")
    change(spoilt / "model.safetensors", base)
    change(tmp_path / "adapter" / "adapter_model.safetensors", adapter)
    if says:
        with pytest.raises(InputError, match=says):
            load_model(str(tmp_path / "adapter"), dtype="auto")
        return
    loaded, ids = load_model(str(tmp_path / "adapter"), dtype="auto"), torch.tensor([[1, 2]])
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


def change(file, changes):
    tensors = {k: x for k, x in (load_file(file) | changes).items() if x is not None}
    save_file(tensors, file, {"format": "pt"})


def test_integers_under_the_names_of_a_model_without_a_head(saved, tmp_path):
    GPT2LMHeadModel.from_pretrained(saved).transformer.save_pretrained(tmp_path)
    name = FIRST.removeprefix("transformer.")
    change(tmp_path / "model.safetensors", {name: torch.ones(8, 32, dtype=torch.int8)})
    with pytest.raises(InputError, match=f"'{name}' of .* is quantized to I8"):
        load_model(str(tmp_path))


def test_what_is_whole_is_loaded(saved, start, capfd):
    """Also where tied weights have one name, or two."""
    model = start(saved)
    assert model.lm_head.weight is model.transformer.wte.weight
    state = load_file(saved / "model.safetensors")
    assert "lm_head.weight" not in state
    assert all(x.equal(model.state_dict()[name]) for name, x in state.items())
    assert capfd.readouterr() == ("", "")


def test_what_the_configuration_does_not_use_is_told(spoilt, start, capfd):
    rewrite(spoilt, lambda state: state | {"transformer.h.2.mlp.c_fc.weight": torch.ones(2)})
    start(spoilt)
    assert capfd.readouterr().err == (
        f"paceline: {spoilt} has 1 tensors that its configuration does not use, such as "
        "'transformer.h.2.mlp.c_fc.weight'; they are left out\n"
    )


@pytest.mark.parametrize("content", [b"", b"x", None], ids=["empty", "text", "truncated"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_files_of_weights(name, content, spoilt, start, capfd):
    if name == "pytorch_model.bin":
        pickled(spoilt, load_file(spoilt / "model.safetensors"))
    path = spoilt / name
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(InputError, match=rf"^model: {spoilt}[^\n]+$"):
        start(spoilt)
    assert "it ran" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "value",
    [{FIRST: Code()}, GPT2LMHeadModel, [1], {FIRST: 1}],
    ids=["code", "class", "list", "number"],
)
def test_pickles_of_more_than_tensors(value, spoilt, start, capfd):
    pickled(spoilt, value)
    with pytest.raises(InputError, match=rf"^model: {spoilt}[^\n\x1b]+$") as refused:
        start(spoilt)
    assert "weights_only" not in str(refused.value)  # an advice to trust the file
    assert "it ran" not in capfd.readouterr().out


def test_pickled_weights_are_loaded(spoilt, start):
    state = load_file(spoilt / "model.safetensors")
    pickled(spoilt, state)
    assert start(spoilt).state_dict()[FIRST].equal(state[FIRST])
    pickled_again = spoilt / "pytorch_model.bin"
    torch.save(state | {FIRST: state[FIRST] * float("nan")}, pickled_again)
    with pytest.raises(InputError, match=f"tensor '{FIRST}' of .* holds a NaN or infinity"):
        start(spoilt)


@pytest.mark.parametrize("content", ["[]", '[{"model_type": "gpt2"}]', '"gpt2"', "null", "", "{"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_configurations_that_are_no_objects(name, content, spoilt, start):
    (spoilt / name).write_text(content)
    with pytest.raises(InputError, match=rf"^model: [^\n]*{name} is not (a )?JSON[^\n]*$"):
        start(spoilt)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": ["gpt2"]}, "model_type in .*config.json must be a text"),
        ({"n_layer": [2]}, "Field 'n_layer' expected int, got list"),
        ({"n_layer": 3}, "has no tensor 'transformer.h.2"),
        ({"n_head": 0}, "config: n_head must be a whole number from 1 to 2147483647, got 0"),
        ({"n_head": -2}, "config: n_head must be .*, got -2"),
        ({"quantization_config": []}, "model: "),
        ({"auto_map": {"AutoConfig": "x.Y"}, "model_type": "own"}, "model: .* code "),
    ],
)
def test_configurations_that_cannot_be(changes, says, spoilt, start):
    path = spoilt / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=rf"^[^\n]*{says}[^\n]*$"):
        start(spoilt)


@pytest.mark.parametrize("content", ["[]", "null", "3", "{", '"' + "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_tokenizers_whose_files_are_no_objects(name, content, spoilt, start, tokenizer):
    tokenizer.save_pretrained(spoilt)
    (spoilt / name).write_text(content)
    with pytest.raises(InputError, match=rf"^model: [^\n]*{name}[^\n]+$"):
        start(spoilt, only_tokenizer=True)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_tokenizers_whose_files_are_misshapen(name, spoilt, start, tokenizer):
    tokenizer.save_pretrained(spoilt)
    path = spoilt / name
    path.write_text(json.dumps({key: [1] for key in json.loads(path.read_text())}))
    with pytest.raises(InputError, match=r"^model: [^\n]+$"):
        start(spoilt, only_tokenizer=True)


def test_a_deep_configuration_and_an_index_without_a_map(spoilt, start):
    (spoilt / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(InputError, match="index.json has no weight_map of tensors to files"):
        start(spoilt)
    (spoilt / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"^model: [^\n]*config.json: [^\n]+$"):
        start(spoilt)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_head": 0}, "config: n_head must be"),
        ({"vocab_size": 0}, "config: vocab_size must be"),
        ({"n_layer": [1]}, "config: .*expected int, got list"),
        ({"n_layer": 3}, "has no tensor 'transformer.h.2"),
        ({"n_embd": 16}, "is of shape .*, and its configuration needs"),
        ({"model_type": "llama"}, "config: model_type of .* is 'gpt2'"),
    ],
)
def test_changes_that_a_saved_model_does_not_bear(changes, says, saved, start):
    with pytest.raises(InputError, match=rf"^[^\n]*{says}[^\n]*$"):
        start(saved, config=changes)


# ---- new models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    ("config", "name"),
    [
        *((NEW, name) for name in ("n_head", "n_embd", "n_layer", "n_positions", "vocab_size")),
        *((LLAMA, name) for name in (*LLAMA, "vocab_size", "head_dim") if name != "model_type"),
    ],
)
def test_sizes_below_one(config, name, value, start):
    with pytest.raises(InputError, match=r"^(config|model): [^\n]+$"):
        start(config=config | {name: value})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (NEW | {"n_head": 3}, "model: .*must be divisible"),
        (NEW | {"n_layer": 10**6}, "config: n_layer must be a whole number from 1 to 10000, got 1"),
        (NEW | {"n_positions": 10**30}, "config: n_positions must be"),
        (NEW | {"n_positions": 2**31 - 1, "n_embd": 2048}, "model: its weights need 1.76e.04 GB"),
        (NEW | {"n_embd": 10**9}, "model: "),
        (NEW | {"initializer_range": 1e38}, "model: with its configuration it computes a NaN"),
        (NEW | {"initializer_range": -1.0}, "model: "),
        (NEW | {"layer_norm_epsilon": -1e9}, "model: with its configuration it computes a NaN"),
        (NEW | {"attn_pdrop": 2}, "model: .*dropout probability"),
        (LLAMA | {"num_key_value_heads": 3}, "model: its configuration cannot be computed: "),
        (LLAMA | {"head_dim": 3}, "model: its configuration cannot be computed: "),
        (LLAMA | {"pad_token_id": 10**6}, "model: "),
        (LLAMA | {"hidden_act": ["silu"]}, "config: "),
    ],
    ids=lambda x: None if isinstance(x, dict) else x,
)
def test_new_models_that_cannot_be(config, says, start):
    with pytest.raises(InputError, match=rf"^{says}[^\n]*$"):
        start(config=config)


@pytest.mark.parametrize("config", [NEW, LLAMA])
def test_checks_leave_the_random_weights_as_they_are(config, tokenizer, start):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    checked = start(config=config)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{"vocab_size": len(tokenizer), **ids, **config})
    )
    assert checked.training == plain.training
    for name, x in plain.state_dict().items():
        assert x.equal(checked.state_dict()[name])
