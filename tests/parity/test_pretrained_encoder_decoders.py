"""Encoder-decoders of transformers, loaded here. Optional: run with `-m parity`."""

import functools
import json

import jax
import numpy as np
import pytest

import jaxnets as jn
from jaxnets.models.transformer import Block

torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.parity

LENGTHS = np.array([9, 4, 1])
T5_SIZES = {
    "vocab_size": 40,
    "d_model": 12,
    "d_kv": 4,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
T5S = {
    "t5": {},
    "t5_1_1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "gated_silu": {"feed_forward_proj": "gated-silu", "num_decoder_layers": 1},
    "gelu": {"feed_forward_proj": "gelu", "layer_norm_epsilon": 1e-3, "num_heads": 3},
    "few_buckets": {"relative_attention_num_buckets": 6, "relative_attention_max_distance": 5},
    "many_buckets": {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 20},
}
WHISPER_SIZES = {
    "vocab_size": 40,
    "num_mel_bins": 6,
    "d_model": 12,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_source_positions": 7,
    "max_target_positions": 16,
    "decoder_start_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
WHISPERS = {
    "whisper": {},
    "short_decoder": {"decoder_layers": 1, "activation_function": "relu"},
    "more_mels": {"num_mel_bins": 9, "activation_function": "gelu_new"},
}


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(3, 40, shape)


def saved(folder, theirs, seed=0):
    """Write a random network, whose parameters are all away from 0 and 1."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1 and "embed" not in name and "shared" not in name:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(noise * 0.4 + (parameter.ndim == 1 and "weight" in name))
    theirs.eval().save_pretrained(folder)
    return jn.pretrained.load(folder)


@functools.partial(jax.jit, static_argnums=0)
def states_and_logits(module, variables, *inputs):
    """Return the outputs of the blocks and norms of both stacks, and the logits."""
    logits, state = module.apply(
        variables,
        *inputs,
        capture_intermediates=lambda module, _: isinstance(module, Block),
        mutable=["intermediates"],
    )
    recorded = state["intermediates"]
    encoder = recorded["encoder"].get("stack", recorded["encoder"])
    return [
        [stack[f"layer_{i}"]["__call__"][0][0] for i in range(len(stack))]
        for stack in (encoder, recorded["decoder"])
    ], logits


def close(found, expected, tolerance=1e-4):
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=0, atol=tolerance)


def check_states(network, inputs, theirs_inputs, theirs, valid=None):
    """Compare the logits and the hidden states of every layer."""
    found, logits = states_and_logits(network.module, network.variables, *inputs)
    expected = theirs(**theirs_inputs, output_hidden_states=True)
    close(logits, expected.logits)
    states = (expected.encoder_hidden_states, expected.decoder_hidden_states)
    for ours, all_states in zip(found, states, strict=True):
        # The last of theirs is normalized; the logits and the other stack depend on it.
        assert len(ours) == len(all_states) - 1 >= 1
        for layer, state in zip(ours[:-1], all_states[1:-1], strict=True):
            mask = np.ones(state.shape[:2]) if valid is None or ours is found[1] else valid
            close(layer * mask[..., None], state * torch.tensor(mask[..., None]).float())
    assert np.ptp(logits) > 0.5


def without_padding(tokens, theirs):
    """Pad with 0 after the end: their beam search pads with the end where the padding is 0."""
    ends = tokens == theirs.config.eos_token_id
    return np.where(np.cumsum(ends, axis=1) - ends > 0, 0, tokens)


def check_generation(network, source, lengths, theirs_inputs, theirs, prompt, suppressed=((), ())):
    """Compare greedy and beam search token for token, without what is suppressed.

    Returns:
        The greedy tokens.
    """
    module, variables, count = network.module, network.variables, 9
    end, (first, always) = theirs.config.eos_token_id, suppressed
    bias = np.zeros((2, module.vocabulary_size), np.float32)
    bias[:, always] = bias[0, first] = -np.inf
    options = {
        "num_tokens": count,
        "carry": module.apply(variables, source, lengths, prompt.shape[1] + count, method="start"),
        "logit_bias": bias,
    }
    greedy = jn.generate(
        *(module, variables, prompt),
        rng=jax.random.key(0),
        sampling=jn.Sampling(temperature=0.0),
        stop_tokens=(end,),
        **options,
    ).tokens
    beams = jn.beam_search(
        *(module, variables, prompt), num_beams=3, stop_token=end, length_penalty=0.0, **options
    ).tokens
    for num_beams, found in ((1, greedy), (3, beams.reshape(-1, count))):
        expected = transformers.GenerationMixin.generate(
            theirs,
            **theirs_inputs,
            decoder_input_ids=torch.tensor(prompt),
            max_new_tokens=count,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            do_sample=False,
            length_penalty=0.0,
            begin_suppress_tokens=list(first) or None,
            suppress_tokens=list(always) or None,
        )
        expected = without_padding(expected[:, prompt.shape[1] :].numpy(), theirs)
        np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
        assert not np.any(found[:, expected.shape[1] :])
    assert len(np.unique(greedy)) > 1
    assert np.any(greedy[:, None] != beams)
    return np.asarray(greedy)


def t5_inputs():
    source, target = tokens(3, 9), tokens(3, 6, seed=1)
    valid = np.arange(9)[None] < LENGTHS[:, None]
    theirs = {"input_ids": torch.tensor(source), "attention_mask": torch.tensor(valid).long()}
    return source, target, valid, theirs


@pytest.mark.parametrize("name", T5S)
def test_t5(tmp_path, name):
    config = transformers.T5Config(**T5_SIZES | T5S[name])
    theirs = transformers.T5ForConditionalGeneration(config)
    network = saved(tmp_path / name, theirs)
    source, target, valid, inputs = t5_inputs()
    decoder = inputs | {"decoder_input_ids": torch.tensor(target)}
    check_states(network, (source, target, LENGTHS), decoder, theirs, valid)
    check_generation(network, source, LENGTHS, inputs, theirs, np.zeros((3, 1), int))
    assert network.module.tied
    assert (network.module.output_scale == 1) == (name == "t5_1_1")
    assert network.module.config.mlp_dropout_rate == 0.1


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "not_scaled"])
def test_t5_with_an_output_layer_in_the_file(tmp_path, scaled):
    config = transformers.T5Config(**T5_SIZES, tie_word_embeddings=scaled)
    theirs = transformers.T5ForConditionalGeneration(config)
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn(40, 12))
    network = saved(tmp_path / "t5", theirs)
    source, target, valid, inputs = t5_inputs()
    decoder = inputs | {"decoder_input_ids": torch.tensor(target)}
    check_states(network, (source, target, LENGTHS), decoder, theirs, valid)
    assert not network.module.tied and (network.module.output_scale != 1) == scaled


def test_t5_of_a_folder_from_before_transformers_5(tmp_path):
    """There `tie_word_embeddings` is what it says, and the file may hold the table three times."""
    config = transformers.T5Config(**T5_SIZES)
    theirs = transformers.T5ForConditionalGeneration(config)
    folder = tmp_path / "t5"
    saved(folder, theirs)
    entries = json.loads((folder / "config.json").read_text())
    del entries["scale_decoder_outputs"]
    (folder / "config.json").write_text(json.dumps(entries))
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    assert {"lm_head.weight", "encoder.embed_tokens.weight"} <= state.keys()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    network = jn.pretrained.load(folder)
    source, target, valid, inputs = t5_inputs()
    decoder = inputs | {"decoder_input_ids": torch.tensor(target)}
    check_states(network, (source, target, LENGTHS), decoder, theirs, valid)
    assert network.module.tied and network.module.output_scale != 1


@pytest.mark.parametrize("own_head", [False, True], ids=["tied", "own_head"])
def test_mt5(tmp_path, own_head):
    theirs = transformers.MT5ForConditionalGeneration(transformers.MT5Config(**T5_SIZES))
    if own_head:
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(40, 12))
    network = saved(tmp_path / "mt5", theirs)
    source, target, valid, inputs = t5_inputs()
    decoder = inputs | {"decoder_input_ids": torch.tensor(target)}
    check_states(network, (source, target, LENGTHS), decoder, theirs, valid)
    check_generation(network, source, LENGTHS, inputs, theirs, np.zeros((3, 1), int))


@pytest.mark.parametrize("kind", ["T5EncoderModel", "T5ForConditionalGeneration"])
def test_the_encoder_of_t5_alone(tmp_path, kind):
    theirs = getattr(transformers, kind)(transformers.T5Config(**T5_SIZES))
    saved(tmp_path / "t5", theirs)
    network = jn.pretrained.load(tmp_path / "t5", architecture="T5EncoderModel")
    source, _, valid, inputs = t5_inputs()
    features = network.module.apply(network.variables, source, LENGTHS)
    expected = theirs.encoder(**inputs).last_hidden_state
    close(features, expected * torch.tensor(valid[..., None]))


def whisper_inputs(config):
    frames = np.random.default_rng(0).normal(size=(3, 14, config.num_mel_bins)).astype(np.float32)
    return frames, {"input_features": torch.tensor(np.swapaxes(frames, 1, 2))}


@pytest.mark.parametrize("name", WHISPERS)
def test_whisper(tmp_path, name):
    config = transformers.WhisperConfig(**WHISPER_SIZES | WHISPERS[name])
    theirs = transformers.WhisperForConditionalGeneration(config)
    network = saved(tmp_path / name, theirs)
    frames, inputs = whisper_inputs(config)
    target = tokens(3, 6, seed=1)
    decoder = inputs | {"decoder_input_ids": torch.tensor(target)}
    check_states(network, (frames, target), decoder, theirs)
    prompt = np.repeat([[1, 7, 5]], 3, axis=0)
    greedy = check_generation(network, frames, None, inputs, theirs, prompt)
    suppressed = (greedy[:, 0].tolist(), [int(greedy[0, -1])])
    assert theirs.config.eos_token_id not in suppressed[1]
    others = check_generation(network, frames, None, inputs, theirs, prompt, suppressed)
    assert not np.isin(others[:, 0], suppressed[0]).any() and np.any(others != greedy)


def test_whisper_without_its_output_layer(tmp_path):
    config = transformers.WhisperConfig(**WHISPER_SIZES)
    theirs = transformers.WhisperModel(config)
    network = saved(tmp_path / "whisper", theirs)
    frames, inputs = whisper_inputs(config)
    target = tokens(3, 6, seed=1)
    module, variables = network.module, network.variables
    logits = module.apply(variables, frames, target)
    features = theirs(**inputs, decoder_input_ids=torch.tensor(target)).last_hidden_state
    close(logits, features @ theirs.decoder.embed_tokens.weight.T)


@pytest.mark.parametrize("unified", [False, True], ids=["own_file", "processor_config"])
@pytest.mark.parametrize("num_mels", [80, 128])
def test_the_sounds_of_whisper(tmp_path, num_mels, unified):
    theirs = transformers.WhisperFeatureExtractor(feature_size=num_mels, chunk_length=2)
    theirs.save_pretrained(tmp_path)
    if unified:
        file = tmp_path / "preprocessor_config.json"
        content = {"feature_extractor": json.loads(file.read_text())}
        (tmp_path / "processor_config.json").write_text(json.dumps(content))
        file.unlink()
    processor = jn.pretrained.SoundProcessor.from_folder(tmp_path)
    rng = np.random.default_rng(0)
    sounds = [rng.normal(size=size).astype(np.float32) / 10 for size in (32_000, 12_345, 1)]
    expected = theirs(sounds, sampling_rate=16_000, return_tensors="np")["input_features"]
    found = processor(sounds, sample_rate=16_000)["inputs"]
    np.testing.assert_allclose(found, np.swapaxes(expected, 1, 2), rtol=0, atol=1e-4)


T5_REFUSED = {"feed_forward_proj": "gated-relu", "is_decoder": True, "num_heads": 0}
WHISPER_REFUSED = {
    "activation_function": "mish",
    "scale_embedding": True,
    "tie_word_embeddings": False,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 24,
    "encoder_layerdrop": 0.1,
}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [("t5", *item) for item in T5_REFUSED.items()]
    + [("whisper", *item) for item in WHISPER_REFUSED.items()],
)
def test_an_option_that_is_not_supported_is_refused_by_name_and_value(tmp_path, kind, name, value):
    sizes = T5_SIZES if kind == "t5" else WHISPER_SIZES
    config = transformers.AutoConfig.for_model(kind, **sizes)
    theirs = transformers.AutoModel.from_config(config)
    theirs.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(entries | {name: value}))
    with pytest.raises(ValueError, match=f"{name}, {json.dumps(value)}"):
        jn.pretrained.load(tmp_path)


@pytest.mark.parametrize("kind", ["t5", "mt5", "whisper"])
@pytest.mark.parametrize("scanned", [False, True], ids=["layers", "scanned"])
def test_a_saved_network_is_loaded_by_transformers(tmp_path, kind, scanned):
    sizes = WHISPER_SIZES if kind == "whisper" else T5_SIZES
    config = transformers.AutoConfig.for_model(kind, **sizes)
    theirs = transformers.AutoModelForSeq2SeqLM.from_config(config) if kind != "whisper" else None
    theirs = theirs or transformers.WhisperForConditionalGeneration(config)
    saved(tmp_path / "theirs", theirs)
    network = jn.pretrained.load(tmp_path / "theirs", scan_layers=scanned)
    jn.pretrained.save(tmp_path / "ours", network, layout="torch")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    states = theirs.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        np.testing.assert_array_equal(value.numpy(), states[1][name].numpy())
